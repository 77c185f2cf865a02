"""Flax msgpack files of Hugging Face (`flax_model.msgpack`), read-only."""

from __future__ import annotations

import pathlib

import numpy as np

from clip_jax.interop.msgpack import flat_arrays, restore


def detect(path: pathlib.Path, head: bytes) -> bool:
    """Return whether a file starts with a msgpack mapping. (0x80, the empty mapping, starts a pickle.)"""
    return head[:1] > b"\x80"


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], None]:
    """Return the arrays, their nested names joined by dots. Raises ValueError for a damaged file."""
    try:
        arrays = dict(flat_arrays(restore(path)))
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it contains values that are not arrays")
    # A damaged byte can make the parser and Flax's decoder raise any exception.
    except Exception as error:
        raise ValueError(f"{path}: expected Flax msgpack, got a truncated or damaged file ({error})") from error
    return {name.removeprefix("/").replace("/", "."): array for name, array in arrays.items()}, None

"""Conversion of weights from one format to another, with a summary. The command is `clip_jax/convert.py`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from clip_jax.config import WeightsConfig, name_of
from clip_jax.interop import formats, reading
from clip_jax.models import count_parameters
from clip_jax.typing import Params


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], *, to: str = "msgpack", **options) -> str:
    """Convert weights and return a summary of the model and of the files written.

    Args:
      source: see `reading.read`.
      to: writable format in `formats.FORMATS`: 'msgpack', 'npz', 'directory' (for other libraries), or one registered.
      **options: arguments of `reading.read`: model, activation, preprocess, tokenizer, image_size, context_length,
        prefix, heads, dtype.

    Raises:
      FileNotFoundError: if there is no such source.
      ValueError: if the source can't be read or the format can't be written.

    >>> import tempfile
    >>> from clip_jax.inference import random_model
    >>> from clip_jax.interop import msgpack
    >>> folder, model = tempfile.mkdtemp(), random_model("emoji")
    >>> msgpack.write(f"{folder}/emoji.msgpack", model.params, model.config)
    >>> print(convert(f"{folder}/emoji.msgpack", f"{folder}/emoji.npz", to="npz"))  # doctest: +ELLIPSIS
    found    ...emoji.msgpack: clip_jax msgpack
      model:         emoji, ... parameters
      ...
    wrote    ...emoji.npz: clip_jax.load('...emoji.npz')
    """
    write = formats.writer(to, target)
    if to == "directory" and options.get("dtype") == "bfloat16":
        raise ValueError(
            "--dtype=bfloat16: expected --to=msgpack or npz, got directory, which is float32; its libraries have"
            " options of their own, e.g. torch_dtype"
        )
    weights = reading.read(source, **options)
    config = dataclasses.replace(weights.config, source=os.fspath(source))
    usage = write(target, weights.params, config)
    lines = [f"found    {source}: {weights.format}", *_rows(_summary(config, weights.params))]
    lines.append(f"wrote    {target}" + ("" if usage else f": clip_jax.load({os.fspath(target)!r})"))
    return "\n".join([*lines, *_rows(usage or {})])


def _rows(values: Mapping[str, str]) -> list[str]:
    return [f"  {name + ':':<15}{value}" for name, value in values.items()]


def _summary(config: WeightsConfig, params: Params) -> dict[str, str]:
    image, text, spec = config.model.image, config.model.text, config.preprocess
    activations = {getattr(tower, "activation", "") for tower in (image, text)} - {""}
    has_tokenizer = config.tokenizer.name == "clip_bpe" or config.tokenizer_file or config.tokenizer.path
    return {
        "model": f"{name_of(config.model)}, {count_parameters(params):,} parameters",
        "image": f"{image.image_size} px, {image.description}",
        "text": f"{text.context_length} tokens of {text.vocab_size:,}, {text.description}",
        "embedding": f"{config.model.embed_dim}",
        "activation": " and ".join(sorted(activations)),
        "preprocessing": f"{spec.description}, mean {spec.mean}, std {spec.std}, as {spec.implementation}",
        "tokenizer": config.tokenizer.name + ("" if has_tokenizer else " (none with the weights)"),
    }

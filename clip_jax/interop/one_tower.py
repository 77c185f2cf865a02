"""Weights of one tower alone: transformers' CLIPVisionModel, CLIPTextModel and their siblings, or half a state dict.

The architecture's other tower is a placeholder without parameters. Source: transformers `configuration_clip.py`,
`configuration_siglip.py` (a config of one tower has the keys of `vision_config` or `text_config`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from clip_jax.config import Architecture, TextTransformer, ViT
from clip_jax.interop.name_tables import Table

# Parameters that one kind of tower has.
_PATHS = {"image": ("image/patch_embedding", "image/stem_conv1/kernel"), "text": ("text/token_embedding/embedding",)}
_MODEL_TYPES = {
    "clip_vision_model": ("clip", "vision_config"),
    "clip_text_model": ("clip", "text_config"),
    "siglip_vision_model": ("siglip", "vision_config"),
    "siglip_text_model": ("siglip", "text_config"),
}


def missing_tower(tensors: Mapping[str, np.ndarray], table: Table) -> str:
    """Return the tower, 'image' or 'text', that has no tensors; '' if both have."""
    names = {tower: {table[path].name for path in paths if path in table} for tower, paths in _PATHS.items()}
    return next((tower for tower, found in names.items() if found.isdisjoint(tensors)), "")


def whole_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a config.json of one tower as that of a model of two, with the default other tower; another unchanged."""
    family, key = _MODEL_TYPES.get(config.get("model_type", ""), ("", ""))
    return {"model_type": family, key: dict(config)} if family else config


def is_text_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a text tower alone: an image processor in its directory has no model."""
    return _MODEL_TYPES.get(config.get("model_type", ""), ("", ""))[1] == "text_config"


def architecture(model: Architecture, tensors: Mapping[str, np.ndarray], table: Table, missing: str) -> Architecture:
    """Return the architecture with a placeholder for the missing tower, and the projection that the tensors have."""
    tower = "text" if missing == "image" else "image"
    found, projection = getattr(model, tower), table.get(f"{tower}/projection")
    projected = projection is not None and projection.name in tensors
    if isinstance(found, ViT):
        found = dataclasses.replace(found, projection=projected)
    elif isinstance(found, TextTransformer) and not projected:
        found = dataclasses.replace(found, projection="none")
    if projected:
        embed_dim = tensors[projection.name].shape[0 if projection.transposed else -1]
    else:
        embed_dim = found.width if isinstance(found, (ViT, TextTransformer)) else model.embed_dim
    placeholder = {"image": ViT(), "text": TextTransformer()}[missing]
    return Architecture(**{tower: found, missing: placeholder}, embed_dim=embed_dim)

"""Allowed ranges of the numbers in a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from clip_jax.models.architecture import Architecture
from clip_jax.models.towers.base import COUNT, Range

_FRACTION = (0.0, 1.0)
_COUNT_OR_ZERO = (0, 2**62)
# Inclusive (low, high) bounds of every number in a config; those of tower fields are in the towers.
RANGES: dict[str, Range] = {
    "tokenizer.pad_id": (-1, 2**31 - 1),
    "model.embed_dim": COUNT,
    "preprocess.mean": _FRACTION,
    "preprocess.std": (1e-6, 10.0),
    "preprocess.resize_size": _COUNT_OR_ZERO,
    "preprocess.fill_color": (0, 255),
    "data.mixture.*.weight": (1e-9, 1e9),
    "data.captions.*": (0.0, 1e9),
    "data.filters.min_image_size": _COUNT_OR_ZERO,
    "data.filters.max_aspect_ratio": (0.0, 1e9),
    "data.filters.min_caption_characters": (0, 8192),
    "data.filters.max_caption_characters": (0, 8192),  # captions are cut there
    "data.augment.min_crop_area": (0.01, 1.0),
    "data.augment.rotate_degrees": (0.0, 180.0),
    "data.augment.zoom": (0.0, 0.9),
    "data.augment.shift": _FRACTION,
    "data.augment.brightness": _FRACTION,
    "data.augment.contrast": _FRACTION,
    "data.augment.saturation": _FRACTION,
    "data.augment.hue_degrees": (0.0, 180.0),
    "data.augment.grayscale_probability": _FRACTION,
    "data.augment.flip_probability": _FRACTION,
    "data.augment.cutout": _FRACTION,
    "data.texts_per_caption": (1, 1000),
    "data.validation_fraction": (0.0, 0.99),
    "data.max_bad_fraction": _FRACTION,
    "data.max_stall_seconds": (0.0, 1e6),
    "data.decode_threads": _COUNT_OR_ZERO,
    "data.prefetch_batches": COUNT,
    "loss.logit_scale_init": (1e-3, 1e4),
    "loss.logit_scale_max": (1.0, 1e4),
    "loss.logit_bias_init": (-1e4, 1e4),
    "teacher.weight": (0.0, 1e4),
    "optim.learning_rate": (0.0, 10.0),
    "optim.warmup_steps": _COUNT_OR_ZERO,
    "optim.b1": (0.0, 0.9999999),
    "optim.b2": (0.0, 0.9999999),
    "optim.eps": (0.0, 1.0),
    "optim.weight_decay": (0.0, 100.0),
    "optim.layer_decay": (0.01, 1.0),
    "optim.max_grad_norm": (0.0, 1e9),
    "optim.ema_decay": (0.0, 0.9999999),
    "train.batch_size": COUNT,
    "train.total_steps": _COUNT_OR_ZERO,
    "train.total_epochs": (0.0, 1e9),
    "train.total_examples": _COUNT_OR_ZERO,
    "train.seed": (0, 2**31 - 1),
    "train.log_every_steps": COUNT,
    "train.max_nonfinite_steps": COUNT,
    "train.patch_dropout": (0.0, 0.99),
    "train.micro_batches": COUNT,
    "train.text_capacity": (0.01, 1.0),
    "mesh.fsdp": COUNT,
    "mesh.tensor": COUNT,
    "checkpoint.every_steps": COUNT,
    "checkpoint.keep": COUNT,
    "checkpoint.keep_every_steps": _COUNT_OR_ZERO,
    "eval.every_steps": _COUNT_OR_ZERO,
    "eval.batch_size": COUNT,
    "eval.validation_examples": COUNT,
    "eval.thresholds.*": (-1e9, 1e9),
}


def ranges_of(model: Architecture) -> dict[str, Range]:
    """Return the ranges by dotted key, including those of the model's towers."""
    towers = {"image": model.image, "text": model.text}
    return RANGES | {
        f"model.{name}.{key}": row for name, tower in towers.items() for key, row in tower.ranges().items()
    }


def check(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raise ValueError for the first number out of range, with its key; `*` stands for any key of a mapping."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        rows = key, f"{section}.*", f"{section.rpartition('.')[0]}.*.{name}"
        low, high = next((ranges[row] for row in rows if row in ranges), (-math.inf, math.inf))
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool) and not low <= number <= high:
                source = "; the bounds are those of the tower's `ranges()`" if key.startswith("model.") else ""
                raise ValueError(f"{key}={value} is out of range; it must be between {low:g} and {high:g}{source}")

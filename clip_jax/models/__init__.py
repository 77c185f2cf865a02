"""CLIP encoders in Flax linen, used as pure functions of their parameters."""

from clip_jax.models.clip import Model, attention_implementations, count_parameters, make_model, matmul_precision
from clip_jax.models.towers import TOWERS, ImageTower, TextTower

__all__ = [
    "TOWERS",
    "ImageTower",
    "Model",
    "TextTower",
    "attention_implementations",
    "count_parameters",
    "make_model",
    "matmul_precision",
]

"""CLIP encoders in Flax linen, used as pure functions of their parameters."""

from clip_jax.models.clip import Model, attention_implementations, make_model, matmul_precision
from clip_jax.models.params import count_parameters, split_batch_stats, tree_path
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
    "split_batch_stats",
    "tree_path",
]

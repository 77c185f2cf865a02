"""Encoders in linen, used as pure functions."""

from clip_jax.models.clip import Model, count_parameters, make_model

__all__ = ["Model", "count_parameters", "make_model"]

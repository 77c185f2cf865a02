"""Two towers and a temperature: the model as pure functions of its parameters.

Source: Radford et al. 2021, figure 3. Linen's `init` and `apply` are called here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from clip_jax.architectures import Architecture, Preprocess
from clip_jax.models.edgenet import EdgeNet
from clip_jax.models.text import TextTransformer
from clip_jax.models.vit import VisionTransformer
from clip_jax.typing import ArrayLike, Params


class Model(NamedTuple):
    """A CLIP as functions. `params` has the keys image, text, logit_scale (natural logarithm, float32).

    init: key -> params, float32.
    encode_image: (params, uint8[B H W 3]) -> float32[B E], unit rows.
    encode_text: (params, int32[B L]) -> float32[B E], unit rows.
    """

    init: Callable[[jax.Array], Params]
    encode_image: Callable[[Params, UInt8[Array, "B H W 3"]], Float[Array, "B E"]]
    encode_text: Callable[[Params, Int32[Array, "B L"]], Float[Array, "B E"]]


class CLIP(nn.Module):
    """The towers under one roof, so that their parameters make one tree."""

    architecture: Architecture
    dtype: jnp.dtype
    remat: str
    logit_scale_init: float

    def setup(self) -> None:
        arch = self.architecture
        if arch.image.kind == "vit":
            self.image = VisionTransformer(arch.image, arch.embed_dim, arch.activation, self.dtype, self.remat)
        else:
            self.image = EdgeNet(arch.image, arch.embed_dim, self.dtype)
        self.text = TextTransformer(arch.text, arch.embed_dim, arch.activation, self.dtype, self.remat)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(self.logit_scale_init)), ())

    def encode_image(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
        return self.image(image)

    def encode_text(self, text: Int32[ArrayLike, "B L"]) -> Float[Array, "B E"]:
        return self.text(text)

    def __call__(self, image: Float[Array, "B H W 3"], text: Int32[ArrayLike, "B L"]) -> None:
        self.image(image)
        self.text(text)


def make_model(
    architecture: Architecture,
    preprocess: Preprocess = Preprocess(),  # noqa: B008 (frozen)
    *,
    dtype: str = "float32",
    remat: str = "none",
    logit_scale_init: float = 1 / 0.07,
) -> Model:
    """Return the model's functions.

    Args:
      dtype: of the computation; parameters and embeddings are float32 in any case.
      remat: 'none', 'dots' or 'full': what a backward pass recomputes.
    """
    module = CLIP(architecture, jnp.dtype(dtype), remat, logit_scale_init)
    mean, std = (np.array(channels, np.float32).reshape(1, 1, 1, 3) for channels in (preprocess.mean, preprocess.std))

    def init(key: jax.Array) -> Params:
        size = architecture.image.image_size
        image = jnp.zeros((1, size, size, 3), module.dtype)
        text = jnp.zeros((1, architecture.text.length), jnp.int32)
        return module.init(key, image, text)["params"]

    def encode_image(params: Params, image: UInt8[ArrayLike, "B H W 3"]) -> Float[Array, "B E"]:
        pixels = (jnp.asarray(image, jnp.float32) / 255 - mean) / std
        return _unit(module.apply({"params": params}, pixels.astype(module.dtype), method="encode_image"))

    def encode_text(params: Params, text: Int32[ArrayLike, "B L"]) -> Float[Array, "B E"]:
        return _unit(module.apply({"params": params}, text, method="encode_text"))

    return Model(init, encode_image, encode_text)


def count_parameters(params: Params) -> int:
    """Return the number of parameters; works on shapes alone."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _unit(x_BE: Float[Array, "B E"]) -> Float[Array, "B E"]:
    x_BE = x_BE.astype(jnp.float32)
    return x_BE / jnp.linalg.norm(x_BE, axis=-1, keepdims=True)

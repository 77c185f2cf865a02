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
from jaxtyping import Array, Float, Int32, Key, UInt8

from clip_jax.models import packing
from clip_jax.models.architecture import Architecture, Preprocess
from clip_jax.models.edgenet import EdgeNet
from clip_jax.models.layers import Compute, widen
from clip_jax.models.resnet import ModifiedResNet
from clip_jax.models.text import TextTransformer, end_positions
from clip_jax.models.vit import VisionTransformer
from clip_jax.typing import ArrayLike, Metrics, Params


class Model(NamedTuple):
    """A CLIP as functions of `params`, a nested dict with these keys:

    image, text: the towers'.
    logit_scale: natural logarithm, float32. logit_bias: for losses that have one.
    batch_stats: running averages, for towers with batch norm; not trained, but part of what weights are.

    init: key -> params, float32.
    encode_image: (params, uint8[B H W 3]) -> float32[B E], unit rows.
    image_features: (params, uint8[B H W 3]) -> float32[B D], the input of the image tower's projection, of any length:
      what linear probes see (Radford et al. 2021, appendix A.3). Of a tower without projection its output; of a ResNet
      the attention pool's heads, which the paper leaves open.
    encode_image_train: (params, uint8[B H W 3], keys[B]) -> (float32[B E], batch_stats): statistics of the batch
      itself, and the running averages after it, None without batch norm; a picture's patches are dropped by its key.
    encode_text: (params, int32[B L]) -> float32[B E], unit rows.
    encode_text_train: the same to rounding, and metrics: captions end to end where `text_capacity` says so.
    """

    init: Callable[[jax.Array], Params]
    encode_image: Callable[[Params, UInt8[Array, "B H W 3"]], Float[Array, "B E"]]
    image_features: Callable[[Params, UInt8[Array, "B H W 3"]], Float[Array, "B D"]]
    encode_image_train: Callable[..., tuple[Float[Array, "B E"], Params | None]]
    encode_text: Callable[[Params, Int32[Array, "B L"]], Float[Array, "B E"]]
    encode_text_train: Callable[[Params, Int32[Array, "B L"]], tuple[Float[Array, "B E"], Metrics]]


class CLIP(nn.Module):
    """The towers under one roof, so that their parameters make one tree."""

    architecture: Architecture
    compute: Compute
    logit_scale_init: float
    logit_bias_init: float
    patch_dropout: float

    def setup(self) -> None:
        arch, compute = self.architecture, self.compute
        if arch.image.kind == "vit":
            self.image = VisionTransformer(arch.image, arch.embed_dim, compute, self.patch_dropout)
        elif arch.image.kind == "resnet":
            self.image = ModifiedResNet(arch.image, arch.embed_dim, compute)
        else:
            self.image = EdgeNet(arch.image, arch.embed_dim, compute.dtype)
        self.text = TextTransformer(arch.text, arch.embed_dim, compute)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(self.logit_scale_init)), ())
        if arch.logit_bias:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.logit_bias_init), ())

    def encode_image(
        self, image: Float[Array, "B H W 3"], train: bool = False, key_B: Key[Array, "B"] | None = None
    ) -> Float[Array, "B E"]:
        return self.image(image, train, key_B) if self.patch_dropout else self.image(image, train)

    def image_features(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        return self.image(image, project=False)

    def encode_text(self, text: Int32[ArrayLike, "B L"] | packing.Stream) -> Float[Array, "B E"]:
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
    unroll: bool = False,
    logit_scale_init: float = 1 / 0.07,
    logit_bias_init: float = -10.0,
    patch_dropout: float = 0.0,
    text_capacity: float = 1.0,
    text_groups: int = 1,
    rows: jax.sharding.Sharding | None = None,
) -> Model:
    """Return the model's functions.

    Args:
      dtype: of the computation; parameters and embeddings are float32, or wider if this is.
      remat: 'none', 'dots', 'names' or 'full': what a backward pass recomputes.
      unroll: write the loops over layers out. The numbers are the same, and compiling takes minutes.
      patch_dropout: the fraction of patches that `encode_image_train` leaves out; for vision transformers.
      text_capacity: the fraction of a batch's text positions for which `encode_text_train` makes room; captions that
        need more are encoded in rows, as all are at 1. For towers that pool at the end token behind a causal mask.
      text_groups: so many equal parts of a batch are packed each by itself: one for every part that a device has.
      rows: the sharding of activations; see `Compute`. Batches must divide by it.
    """
    compute = Compute(jnp.dtype(dtype), remat, unroll, rows)
    module = CLIP(architecture, compute, logit_scale_init, logit_bias_init, patch_dropout)
    mean, std = (np.array(channels, np.float32).reshape(1, 1, 1, 3) for channels in (preprocess.mean, preprocess.std))

    def init(key: jax.Array) -> Params:
        size = architecture.image.image_size
        image = jnp.zeros((1, size, size, 3), compute.dtype)
        text = jnp.zeros((1, architecture.text.length), jnp.int32)
        variables = module.init(key, image, text)
        return _params(variables)

    def normalise(image: UInt8[ArrayLike, "B H W 3"]) -> Float[Array, "B H W 3"]:
        wide = jnp.promote_types(compute.dtype, jnp.float32)
        return ((jnp.asarray(image, wide) / 255 - mean) / std).astype(compute.dtype)

    def encode_image(params: Params, image: UInt8[ArrayLike, "B H W 3"]) -> Float[Array, "B E"]:
        return _unit(module.apply(_variables(params), normalise(image), method="encode_image"))

    def image_features(params: Params, image: UInt8[ArrayLike, "B H W 3"]) -> Float[Array, "B D"]:
        return widen(module.apply(_variables(params), normalise(image), method="image_features"))

    def encode_image_train(
        params: Params, image: UInt8[ArrayLike, "B H W 3"], key_B: Key[Array, "B"]
    ) -> tuple[Float[Array, "B E"], Params | None]:
        embeddings, changed = module.apply(
            _variables(params),
            normalise(image),
            train=True,
            key_B=key_B,
            method="encode_image",
            mutable=["batch_stats"],
        )
        return _unit(embeddings), changed.get("batch_stats")

    def encode_text(params: Params, text: Int32[ArrayLike, "B L"] | packing.Stream) -> Float[Array, "B E"]:
        return _unit(module.apply(_variables(params), text, method="encode_text"))

    def encode_text_train(params: Params, text: Int32[ArrayLike, "B L"]) -> tuple[Float[Array, "B E"], Metrics]:
        tower, (rows, length) = architecture.text, text.shape
        count, size = packing.chunks(rows // text_groups, length, text_capacity)
        room = rows // text_groups * length
        if text_capacity >= 1 or not (tower.causal and tower.pool == "end") or count * size >= room:
            return encode_text(params, text), {}
        text = jnp.asarray(text)
        stream, tokens_S = packing.pack(text, end_positions(tower, text), text_groups, text_capacity)
        fits = jnp.all(tokens_S <= count * size)
        # What a rare batch needs in rows is computed again for its gradient, so that the others hold nothing for it.
        in_rows = jax.checkpoint(lambda params: encode_text(params, text))
        embeddings = jax.lax.cond(fits, lambda params: encode_text(params, stream), in_rows, params)
        filled = jnp.max(tokens_S) / room
        return embeddings, {"text/filled": filled, "text/in_rows": 1 - fits.astype(jnp.float32)}

    return Model(init, encode_image, image_features, encode_image_train, encode_text, encode_text_train)


def _variables(params: Params) -> Params:
    """Return `params` as linen has them: collections first."""
    trained = {name: value for name, value in params.items() if name != "batch_stats"}
    return {"params": trained} | ({"batch_stats": params["batch_stats"]} if "batch_stats" in params else {})


def _params(variables: Params) -> Params:
    return variables["params"] | ({"batch_stats": variables["batch_stats"]} if "batch_stats" in variables else {})


def count_parameters(params: Params) -> int:
    """Return the number of trained parameters; works on shapes alone."""
    trained = {name: value for name, value in params.items() if name != "batch_stats"}
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))


def _unit(x_BE: Float[Array, "B E"]) -> Float[Array, "B E"]:
    x_BE = widen(x_BE)
    return x_BE / jnp.linalg.norm(x_BE, axis=-1, keepdims=True)

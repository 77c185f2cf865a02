"""The CLIP model as pure functions of its parameters: two towers and a learned logit scale.

Source: Radford et al. 2021, figure 3. Linen's `init` and `apply` are called only here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Key, UInt8

from clip_jax.models import packing
from clip_jax.models.architecture import Architecture, Preprocess
from clip_jax.models.attention import attention_implementation
from clip_jax.models.layers import Compute, upcast
from clip_jax.models.params import split_batch_stats
from clip_jax.models.towers.base import Encoder
from clip_jax.typing import ArrayLike, Metrics, Params


class Model(NamedTuple):
    """A CLIP model as functions of `params`, a nested dict with these keys:

    * image, text: parameters of the towers.
    * logit_scale: natural logarithm of the logit scale, float32 scalar.
    * logit_bias: float32 scalar, if the architecture has one.
    * batch_stats: running averages of batch norm, if the image tower has it; stored with the weights and not trained.

    Attributes:
      init: key -> params, float32.
      encode_image: (params, uint8[B, H, W, 3]) -> float32[B, E], unit norm.
      image_features: (params, uint8[B, H, W, 3]) -> float32[B, D], the input of the image tower's projection without
        normalization, for linear probes (Radford et al. 2021, appendix A.3). For a tower without projection, its
        output; for a ResNet, the concatenated heads of the attention pooling, which the paper does not specify.
      encode_image_train: (params, uint8[B, H, W, 3], keys[B]) -> (float32[B, E], batch_stats). Batch norm uses the
        statistics of the batch; the second result is the updated running averages, or None without batch norm.
        Patches of each image are dropped by its key.
      encode_text: (params, int32[B, L]) -> float32[B, E], unit norm.
      encode_text_train: as encode_text, to rounding, plus metrics; captions are packed if `text_capacity` < 1.
    """

    init: Callable[[jax.Array], Params]
    encode_image: Callable[[Params, UInt8[Array, "B H W 3"]], Float[Array, "B E"]]
    image_features: Callable[[Params, UInt8[Array, "B H W 3"]], Float[Array, "B D"]]
    encode_image_train: Callable[..., tuple[Float[Array, "B E"], Params | None]]
    encode_text: Callable[[Params, Int32[Array, "B L"]], Float[Array, "B E"]]
    encode_text_train: Callable[[Params, Int32[Array, "B L"]], tuple[Float[Array, "B E"], Metrics]]


class CLIP(nn.Module):
    """Both towers in one module, so their parameters are one tree."""

    architecture: Architecture
    compute: Compute
    logit_scale_init: float
    logit_bias_init: float
    patch_dropout: float

    def setup(self) -> None:
        arch = self.architecture
        self.image = Encoder(arch.image, arch.embed_dim, self.compute, self.patch_dropout)
        self.text = Encoder(arch.text, arch.embed_dim, self.compute)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(self.logit_scale_init)), ())
        if arch.logit_bias:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(self.logit_bias_init), ())

    def encode_image(
        self,
        image: Float[Array, "B H W 3"],
        train: bool = False,
        key_B: Key[Array, "B"] | None = None,
        project: bool = True,
    ) -> Float[Array, "B E"]:
        return self.image(image, train, key_B, project)

    def encode_text(self, text: Int32[ArrayLike, "B L"] | packing.Stream) -> Float[Array, "B E"]:
        return self.text(text)

    def __call__(self, image: Float[Array, "B H W 3"], text: Int32[ArrayLike, "B L"]) -> None:
        self.encode_image(image)
        self.encode_text(text)


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
    batch_sharding: jax.sharding.Sharding | None = None,
    frozen: str = "",
) -> Model:
    """Return the model's functions.

    Args:
      architecture: towers and embedding size; `clip_jax.config.MODELS` has the published ones.
      preprocess: mean and standard deviation of the pixels.
      dtype: of the computation, with matmul precision to match; see `matmul_precision`. Parameters and embeddings are
        float32, or wider if this is.
      remat: 'none', 'dots', 'names' or 'full': how much the backward pass recomputes.
      unroll: whether to write the loops over layers out. The results are the same; compiling takes minutes.
      patch_dropout: fraction of patches that `encode_image_train` drops, if the tower supports it.
      text_capacity: packed positions as a fraction of the batch's text positions. A batch that needs more is encoded
        padded, as all batches are at 1. Only for towers that support packing.
      text_groups: number of equal groups of the batch that are packed separately, one per batch shard.
      batch_sharding: sharding of activations over the batch; see `Compute`. It must divide the batch size.
      frozen: regular expression of parameters that are not trained, whose batch norm runs as in inference.

    Example:
      >>> from clip_jax.config import MODELS
      >>> from clip_jax.models import count_parameters
      >>> model = make_model(MODELS["vit_b32"])
      >>> params = jax.eval_shape(model.init, jax.random.key(0))  # shapes; jax.jit(model.init) returns arrays
      >>> count_parameters(params)
      151277313
      >>> jax.eval_shape(model.encode_image, params, np.zeros((2, 224, 224, 3), np.uint8)).shape
      (2, 512)
    """
    compute = Compute(jnp.dtype(dtype), remat, unroll, batch_sharding, frozen)
    module = CLIP(architecture, compute, logit_scale_init, logit_bias_init, patch_dropout)
    mean, std = (np.array(channels, np.float32).reshape(1, 1, 1, 3) for channels in (preprocess.mean, preprocess.std))

    def init(key: jax.Array) -> Params:
        size = architecture.image.image_size
        image = jnp.zeros((1, size, size, 3), compute.dtype)
        text = jnp.zeros((1, architecture.text.context_length), jnp.int32)
        variables = module.init(key, image, text)
        return variables["params"] | ({"batch_stats": variables["batch_stats"]} if "batch_stats" in variables else {})

    def apply(method: str, params: Params, *inputs: Any, **options: Any) -> Any:
        trained, stats = split_batch_stats(params)
        variables = {"params": trained} | ({} if stats is None else {"batch_stats": stats})
        precision = matmul_precision(dtype)
        with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
            return module.apply(variables, *inputs, method=method, **options)

    def normalize(image: UInt8[ArrayLike, "B H W 3"]) -> Float[Array, "B H W 3"]:
        pixels = jnp.asarray(image, jnp.promote_types(compute.dtype, jnp.float32))
        return ((pixels / 255 - mean) / std).astype(compute.dtype)

    def encode_image(params: Params, image: UInt8[ArrayLike, "B H W 3"]) -> Float[Array, "B E"]:
        return _unit_norm(apply("encode_image", params, normalize(image)))

    def image_features(params: Params, image: UInt8[ArrayLike, "B H W 3"]) -> Float[Array, "B D"]:
        return upcast(apply("encode_image", params, normalize(image), project=False))

    def encode_image_train(
        params: Params, image: UInt8[ArrayLike, "B H W 3"], key_B: Key[Array, "B"]
    ) -> tuple[Float[Array, "B E"], Params | None]:
        options = {"train": True, "key_B": key_B, "mutable": ["batch_stats"]}
        embeddings, updated = apply("encode_image", params, normalize(image), **options)
        return _unit_norm(embeddings), updated.get("batch_stats")

    def encode_text(params: Params, text: Int32[ArrayLike, "B L"] | packing.Stream) -> Float[Array, "B E"]:
        return _unit_norm(apply("encode_text", params, text))

    def encode_text_train(params: Params, text: Int32[ArrayLike, "B L"]) -> tuple[Float[Array, "B E"], Metrics]:
        tower, (batch, length) = architecture.text, text.shape
        count, size = packing.chunks(batch // text_groups, length, text_capacity)
        positions = batch // text_groups * length
        if text_capacity >= 1 or not tower.supports_packing or count * size >= positions:
            return encode_text(params, text), {}
        text = jnp.asarray(text)
        stream, tokens_S = packing.pack(text, tower.end_positions(text), text_groups, text_capacity)
        fits = jnp.all(tokens_S <= count * size)
        # The rare padded branch is rematerialized, so that it saves no residuals when packing succeeds.
        padded = jax.checkpoint(lambda params: encode_text(params, text))
        embeddings = jax.lax.cond(fits, lambda params: encode_text(params, stream), padded, params)
        filled = jnp.max(tokens_S) / positions
        return embeddings, {"text/filled": filled, "text/padded": 1 - fits.astype(jnp.float32)}

    return Model(init, encode_image, image_features, encode_image_train, encode_text, encode_text_train)


def matmul_precision(dtype: str) -> str | None:
    """Return the precision of the towers' matmuls and convolutions for a computation dtype.

    XLA's default for float32 operands is one bfloat16 pass on TPUs and TF32 on GPUs. For float32 and wider this
    returns "float32", which is the full precision on every device; for bfloat16 it returns None, XLA's default.
    """
    return "float32" if jnp.finfo(dtype).bits >= 32 else None


def attention_implementations(
    architecture: Architecture, mesh: jax.sharding.Mesh, *, dtype: str = "bfloat16", text_capacity: float = 1.0
) -> dict[str, str]:
    """Return the implementation of each tower's self-attention on a mesh, and the reason if it is XLA's.

    For example {"image": "Pallas kernel", "text": "XLA: head width 80 does not divide 128"}.
    """
    found = {}
    for name, tower in (("image", architecture.image), ("text", architecture.text)):
        shape = tower.attention_shape
        packed = name == "text" and text_capacity < 1 and tower.supports_packing
        if packed:
            size = packing.chunks(1, shape.tokens, text_capacity)[1]
            shape = shape._replace(tokens=2 * size)  # keys: the previous chunk and its own
        found[name] = attention_implementation(shape, mesh, dtype, masked=packed) if shape else "no self-attention"
    return found


def _unit_norm(x_BE: Float[Array, "B E"]) -> Float[Array, "B E"]:
    x_BE = upcast(x_BE)
    return x_BE / jnp.linalg.norm(x_BE, axis=-1, keepdims=True)

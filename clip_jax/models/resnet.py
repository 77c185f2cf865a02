"""CLIP's ModifiedResNet: three convolutions to begin with, average pools where others stride, attention at the end.

Source: Radford et al. 2021, section 2.4; openai/CLIP `clip/model.py`. A stage's first block changes shape and stands
alone; the others are scanned, so RN50x64's 63 blocks compile as eight.

Batch statistics are over the global batch: under `jit` with a sharded batch a mean over the batch axis is that. The
running variance is torch's, divided by n - 1; Flax's own BatchNorm keeps the biased one.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from clip_jax.models.architecture import ResNet as Tower
from clip_jax.models.layers import Compute, project_heads, widen

EXPANSION = 4  # of a bottleneck's width at its end


class ModifiedResNet(nn.Module):
    """Normalised pixels to a projected vector."""

    tower: Tower
    embed_dim: int
    compute: Compute

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W 3"], train: bool = False, project: bool = True
    ) -> Float[Array, "B E"]:
        width, compute = self.tower.width, self.compute

        def stem(module: nn.Module, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w c"]:
            for number, (features, stride) in enumerate(((width // 2, 2), (width // 2, 1), (width, 1)), start=1):
                x = convolution(x, features, 3, compute.dtype, f"stem_conv{number}", stride)
                x = jax.nn.relu(BatchNorm(compute, name=f"stem_norm{number}")(x, train))
            return _average(x, 2)

        x = compute.forget(stem)(self, image)
        first = compute.forget(Bottleneck, static_argnums=(2,))
        for stage, blocks in enumerate(self.tower.layers):
            stride = 1 if stage == 0 else 2
            x = first(width << stage, stride, compute, name=f"stage{stage}_first")(x, train)
            if blocks > 1:
                rest = compute.repeat(_Repeated, blocks - 1, static_argnums=(2,), batch_stats=0)
                x = rest(width << stage, 1, compute, name=f"stage{stage}_rest")(x, train)[0]
        return AttentionPool(self.tower.heads, self.embed_dim, compute.dtype, name="pool")(x, project)


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3, 1 × 1 convolutions beside a shortcut, which is a convolution where the shape changes."""

    width: int
    stride: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], train: bool) -> Float[Array, "B h2 w2 c2"]:
        out, compute = self.width * EXPANSION, self.compute
        y = convolution(x, self.width, 1, compute.dtype, "conv1")
        y = jax.nn.relu(BatchNorm(compute, name="norm1")(y, train))
        y = convolution(y, self.width, 3, compute.dtype, "conv2")
        y = jax.nn.relu(BatchNorm(compute, name="norm2")(y, train))
        y = convolution(_average(y, self.stride), out, 1, compute.dtype, "conv3")
        y = BatchNorm(compute, scale_init=nn.initializers.zeros, name="norm3")(
            y, train
        )  # as released: a block starts as nothing
        if self.stride > 1 or x.shape[-1] != out:
            x = convolution(_average(x, self.stride), out, 1, compute.dtype, "shortcut_conv")
            x = BatchNorm(compute, name="shortcut_norm")(x, train)
        return jax.nn.relu(x + y)


class _Repeated(Bottleneck):
    """A bottleneck as `nn.scan` wants it: carry in, carry and nothing out."""

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], train: bool) -> tuple[Float[Array, "B h w c"], None]:
        return super().__call__(x, train), None


class BatchNorm(nn.Module):
    """Batch norm in float32 or wider over all but the channels, cast back; running averages as torch keeps them.

    It follows every convolution, so it is here that activations are pinned to where the batch is.
    """

    compute: Compute
    scale_init: Callable = nn.initializers.ones
    epsilon: float = 1e-5
    momentum: float = 0.1  # what a new batch adds to the running averages

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], train: bool) -> Float[Array, "B h w c"]:
        channels = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", self.scale_init, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        x = self.compute.pin(x)
        wide = widen(x)
        mean, var = running_mean.value, running_var.value
        if train:
            mean, var = jnp.mean(wide, (0, 1, 2)), jnp.var(wide, (0, 1, 2))
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        mean, factor, bias = (channel[None, None, None] for channel in (mean, factor, bias))
        return ((wide - mean) * factor + bias).astype(x.dtype)


class AttentionPool(nn.Module):
    """One query, the mean of all positions, attends to them and itself; then a projection."""

    heads: int
    embed_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], project: bool = True) -> Float[Array, "B E"]:
        width = x.shape[-1]
        x_BLD = x.reshape(x.shape[0], -1, width)
        x_BLD = jnp.concatenate([x_BLD.mean(axis=1, keepdims=True), x_BLD], axis=1)
        init = nn.initializers.normal(width**-0.5)
        positions_LD = self.param("positional_embedding", init, x_BLD.shape[1:])
        x_BLD = x_BLD + positions_LD[None].astype(self.dtype)
        query, key, value = (
            project_heads(self.heads, width, init, self.dtype, name)(source)
            for name, source in (("query", x_BLD[:, :1]), ("key", x_BLD), ("value", x_BLD))
        )
        pooled_B1NK = jax.nn.dot_product_attention(query, key, value)
        pooled_BD = pooled_B1NK.reshape(x.shape[0], width)
        if not project:
            return pooled_BD
        return nn.Dense(self.embed_dim, kernel_init=init, dtype=self.dtype, name="projection")(pooled_BD)


def convolution(
    x: Float[Array, "B h w c"], features: int, size: int, dtype: jnp.dtype, name: str, stride: int = 1
) -> Float[Array, "B h2 w2 c2"]:
    """Convolve without bias at the same size, but for the stride: torch's padding of size // 2."""
    padding = ((size // 2, size // 2),) * 2
    layer = nn.Conv(features, (size, size), stride, padding=padding, use_bias=False, dtype=dtype, name=name)
    return checkpoint_name(layer(x), "convolution")


def _average(x: Float[Array, "B h w c"], size: int) -> Float[Array, "B h2 w2 c"]:
    return nn.avg_pool(x, (size, size), (size, size)) if size > 1 else x

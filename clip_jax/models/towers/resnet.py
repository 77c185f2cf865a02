"""CLIP's ModifiedResNet: three stem convolutions, average pooling before strided convolutions, attention pooling.

Sources: Radford et al. 2021, section 2.4; openai/CLIP `clip/model.py`. The first block of a stage changes the shape and
is separate; the others run in a scan, so the 63 blocks of RN50x64 compile as eight.

Batch statistics are those of the global batch: under `jit`, the mean over a sharded batch axis includes all devices.
The running variance is torch's, unbiased (divided by n - 1); Flax's own BatchNorm keeps the biased one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from clip_jax.models.layers import NORM_RULES, PROJECTION_RULES, Compute, Rules, attend_from_query, upcast
from clip_jax.models.towers.base import Encoder, ImageTower, check_multiple

EXPANSION = 4  # output width of a bottleneck / its inner width


@dataclasses.dataclass(frozen=True)
class ResNet(ImageTower):
    """CLIP's ModifiedResNet. The defaults are RN50's."""

    image_size: int = 224  # px
    width: int = 64  # output channels of the stem
    layers: tuple[int, ...] = (3, 4, 6, 3)  # bottlenecks per stage
    heads: int = 32  # of the attention pooling, whose width is 32 × width for four stages
    kind: Literal["resnet"] = "resnet"

    positions_path: ClassVar[tuple[str, ...]] = ("pool", "positional_embedding")
    num_prefix_tokens: ClassVar[int] = 1  # the mean of the grid, which is the query
    stacked: ClassVar[str] = r"stage\d+_rest/.*"
    sharding_rules: ClassVar[Rules] = (
        *NORM_RULES,
        *PROJECTION_RULES,
        (r"(.*/|stem_|shortcut_)?conv\d/kernel|.*/shortcut_conv/kernel", ("fsdp",)),  # output channels
        (r"pool/projection/kernel", ("fsdp", None)),
        (r"pool/(positional_embedding|projection/bias)", ()),
    )

    def encode(
        self, module: Encoder, image: Float[Array, "B H W 3"], train: bool, key_B: Key[Array, "B"] | None, project: bool
    ) -> Float[Array, "B E"]:
        del key_B  # nothing is random
        width, compute = self.width, module.compute

        def stem(_: nn.Module, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w c"]:
            for number, (features, stride) in enumerate(((width // 2, 2), (width // 2, 1), (width, 1)), start=1):
                x = convolution(x, features, 3, compute.dtype, f"stem_conv{number}", stride)
                x = jax.nn.relu(BatchNorm(compute, name=f"stem_norm{number}")(x, train))
            return _average_pool(x, 2)

        x = compute.remat_module(stem)(module, image)
        first = compute.remat_module(Bottleneck, static_argnums=(2,))
        for stage, blocks in enumerate(self.layers):
            stride = 1 if stage == 0 else 2
            x = first(width << stage, stride, compute, name=f"stage{stage}_first")(x, train)
            if blocks > 1:
                rest = compute.repeat(_ScanBottleneck, blocks - 1, static_argnums=(2,), batch_stats=0)
                x = rest(width << stage, 1, compute, name=f"stage{stage}_rest")(x, train)[0]
        return AttentionPool(self.heads, module.embed_dim, compute.dtype, name="pool")(x, project)

    def layer(self, path: str) -> int | range:
        """Each stage is one layer."""
        if path.startswith("stem_"):
            return 0
        stage = re.match(r"stage(\d+)_", path)
        return int(stage[1]) + 1 if stage else self.output_layer

    @property
    def output_layer(self) -> int:
        return len(self.layers) + 1

    def tiny(self) -> ResNet:
        return dataclasses.replace(self, image_size=64, width=8, layers=(2, 1, 1, 1), heads=4)

    @property
    def description(self) -> str:
        return f"{'-'.join(map(str, self.layers))} bottlenecks from {self.width}"

    @property
    def stride(self) -> int:
        return 2 << len(self.layers)

    def check(self, key: str, embed_dim: int) -> None:
        check_multiple(f"{key}.image_size", self.image_size, f"2**(1 + len({key}.layers))", self.stride)
        if (attention_width := self.width << (len(self.layers) + 1)) % self.heads:
            raise ValueError(f"{key}.heads: expected a divisor of {attention_width}, got {self.heads}")
        super().check(key, embed_dim)


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3, 1 × 1 convolutions plus a shortcut, which is a convolution where the shape changes."""

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
        y = convolution(_average_pool(y, self.stride), out, 1, compute.dtype, "conv3")
        # As in the release, a residual branch is initialized to zero.
        y = BatchNorm(compute, scale_init=nn.initializers.zeros, name="norm3")(y, train)
        if self.stride > 1 or x.shape[-1] != out:
            x = convolution(_average_pool(x, self.stride), out, 1, compute.dtype, "shortcut_conv")
            x = BatchNorm(compute, name="shortcut_norm")(x, train)
        return jax.nn.relu(x + y)


class _ScanBottleneck(Bottleneck):
    """A bottleneck with the signature of `nn.scan`: returns the carry and no output."""

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], train: bool) -> tuple[Float[Array, "B h w c"], None]:
        return super().__call__(x, train), None


class BatchNorm(nn.Module):
    """Batch norm in at least float32 over all axes but the channels; the result has the input's dtype.

    It follows every convolution, so the batch sharding of activations is constrained here.
    """

    compute: Compute
    scale_init: Callable = nn.initializers.ones
    epsilon: float = 1e-5
    momentum: float = 0.1  # weight of a new batch in the running averages, as in torch

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], train: bool) -> Float[Array, "B h w c"]:
        channels = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        scale = self.param("scale", self.scale_init, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        x = self.compute.constrain(x)
        x_float32 = upcast(x)
        mean, var = running_mean.value, running_var.value
        if train and not self.compute.is_frozen(self):
            mean, var = jnp.mean(x_float32, (0, 1, 2)), jnp.var(x_float32, (0, 1, 2))
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value += self.momentum * (mean - running_mean.value)
                running_var.value += self.momentum * (unbiased - running_var.value)
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        mean, factor, bias = (channel[None, None, None] for channel in (mean, factor, bias))
        return ((x_float32 - mean) * factor + bias).astype(x.dtype)


class AttentionPool(nn.Module):
    """One query, the mean of all positions, attends to the positions and itself; a projection follows."""

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
        pooled_BD = attend_from_query(x_BLD[:, :1], x_BLD, self.heads, self.dtype).reshape(x.shape[0], width)
        if not project:
            return pooled_BD
        return nn.Dense(self.embed_dim, kernel_init=init, dtype=self.dtype, name="projection")(pooled_BD)


def convolution(
    x: Float[Array, "B h w c"], features: int, size: int, dtype: jnp.dtype, name: str, stride: int = 1
) -> Float[Array, "B h2 w2 c2"]:
    """Convolve without bias, padded by size // 2 on each side as in torch."""
    padding = ((size // 2, size // 2),) * 2
    layer = nn.Conv(features, (size, size), stride, padding=padding, use_bias=False, dtype=dtype, name=name)
    return checkpoint_name(layer(x), "convolution")


def _average_pool(x: Float[Array, "B h w c"], size: int) -> Float[Array, "B h2 w2 c"]:
    return nn.avg_pool(x, (size, size), (size, size)) if size > 1 else x

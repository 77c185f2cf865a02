"""Transformer blocks as CLIP has them: pre-norm residual blocks, biases everywhere, no dropout.

Source: Radford et al. 2021, section 2.4, and openai/CLIP `clip/model.py`. Parameters are float32; `dtype` is that of
the computation. Blocks are stacked along a leading axis by `nn.scan`, so a model of any depth compiles once.
Initialisation is that of OpenAI's text tower for both towers: the release leaves the image tower's unstated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Apply x·σ(1.702x), the approximation that OpenAI's weights were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

# What the backward pass finds in memory; it computes the rest again.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 with CLIP's epsilon, cast back to the input's dtype."""

    epsilon: float = 1e-5  # Flax's default is 1e-6
    dtype: jnp.dtype = jnp.float32

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return super().__call__(x).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; scores and softmax in float32."""

    heads: int
    causal: bool
    output_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        width = x_BLD.shape[-1]

        def project(name: str) -> Float[Array, "B L N K"]:
            init = nn.initializers.normal(width**-0.5)
            features = (self.heads, width // self.heads)
            return nn.DenseGeneral(features, kernel_init=init, dtype=self.dtype, name=name)(x_BLD)

        y_BLNK = jax.nn.dot_product_attention(project("query"), project("key"), project("value"), is_causal=self.causal)
        init = nn.initializers.normal(self.output_std)
        return nn.DenseGeneral(width, axis=(-2, -1), kernel_init=init, dtype=self.dtype, name="out")(y_BLNK)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    mlp_ratio: float
    activation: str
    causal: bool
    layers: int  # of the whole tower: residual branches start smaller the deeper it is
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], _: None = None) -> tuple[Float[Array, "B L D"], None]:
        width = x_BLD.shape[-1]
        output_std = width**-0.5 * (2 * self.layers) ** -0.5
        attention = Attention(self.heads, self.causal, output_std, self.dtype, name="attention")
        x_BLD = x_BLD + attention(LayerNorm(name="norm1")(x_BLD))

        init = nn.initializers.normal((2 * width) ** -0.5)
        hidden = nn.Dense(int(width * self.mlp_ratio), kernel_init=init, dtype=self.dtype, name="mlp_in")
        init = nn.initializers.normal(output_std)
        output = nn.Dense(width, kernel_init=init, dtype=self.dtype, name="mlp_out")
        x_BLD = x_BLD + output(ACTIVATIONS[self.activation](hidden(LayerNorm(name="norm2")(x_BLD))))
        return x_BLD, None


class Transformer(nn.Module):
    """`layers` blocks, scanned over parameters stacked along axis 0."""

    layers: int
    heads: int
    mlp_ratio: float
    activation: str
    causal: bool
    dtype: jnp.dtype
    remat: Literal["none", "dots", "full"] = "none"

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        block = Block
        if self.remat != "none":
            # Inside a scan nothing can be merged away, so the barrier against that is only cost.
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        blocks = scan(self.heads, self.mlp_ratio, self.activation, self.causal, self.layers, self.dtype, name="blocks")
        return blocks(x_BLD, None)[0]

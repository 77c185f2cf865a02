"""Transformer blocks as CLIP has them: pre-norm residual blocks, biases everywhere, no dropout.

Source: Radford et al. 2021, section 2.4, and openai/CLIP `clip/model.py`; layer scale as in open_clip
`transformer.py`. Parameters are float32; `dtype` is that of the computation. Blocks are stacked along a leading axis by
`nn.scan`, so a model of any depth compiles once. Initialisation is that of OpenAI's text tower for both towers: the
release leaves the image tower's unstated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.architectures import TextTransformer, ViT


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Apply x·σ(1.702x), the approximation that OpenAI's weights were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
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


def project_heads(heads: int, width: int, init: Callable, dtype: jnp.dtype, name: str) -> nn.DenseGeneral:
    """Return the projection of [B L D] to queries, keys or values [B L N K]."""
    return nn.DenseGeneral((heads, width // heads), kernel_init=init, dtype=dtype, name=name)


class Attention(nn.Module):
    """Multi-head self-attention; scores and softmax in float32."""

    heads: int
    causal: bool
    output_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        width = x_BLD.shape[-1]
        init = nn.initializers.normal(width**-0.5)
        query, key, value = (
            project_heads(self.heads, width, init, self.dtype, name)(x_BLD) for name in ("query", "key", "value")
        )
        y_BLNK = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        init = nn.initializers.normal(self.output_std)
        return nn.DenseGeneral(width, axis=(-2, -1), kernel_init=init, dtype=self.dtype, name="out")(y_BLNK)


class Perceptron(nn.Module):
    """Dense, activation, dense."""

    hidden: int
    activation: str
    output_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        width = x.shape[-1]
        init = nn.initializers.normal((2 * width) ** -0.5)
        x = nn.Dense(self.hidden, kernel_init=init, dtype=self.dtype, name="in")(x)
        init = nn.initializers.normal(self.output_std)
        return nn.Dense(width, kernel_init=init, dtype=self.dtype, name="out")(ACTIVATIONS[self.activation](x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); each branch times a learnt gain if the tower has layer scale."""

    tower: ViT | TextTransformer
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], _: None = None) -> tuple[Float[Array, "B L D"], None]:
        tower, width = self.tower, self.tower.width
        # Residual branches start smaller the deeper the tower is.
        output_std = width**-0.5 * (2 * tower.layers) ** -0.5
        attention = Attention(tower.heads, self.causal, output_std, self.dtype, name="attention")
        mlp = Perceptron(int(width * tower.mlp_ratio), tower.activation, output_std, self.dtype, name="mlp")
        for number, branch in enumerate((attention, mlp), start=1):
            y_BLD = branch(LayerNorm(tower.norm_epsilon, name=f"norm{number}")(x_BLD))
            if tower.layer_scale:
                init = nn.initializers.constant(tower.layer_scale)
                gain_D = self.param(f"layer_scale{number}", init, (width,))
                y_BLD = y_BLD * gain_D[None, None].astype(self.dtype)
            x_BLD = x_BLD + y_BLD
        return x_BLD, None


class Transformer(nn.Module):
    """The blocks of a tower, scanned over parameters stacked along axis 0."""

    tower: ViT | TextTransformer
    causal: bool
    dtype: jnp.dtype
    remat: Literal["none", "dots", "full"] = "none"

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        block = Block
        if self.remat != "none":
            # Inside a scan nothing can be merged away, so the barrier against that is only cost.
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.tower.layers)
        return scan(self.tower, self.causal, self.dtype, name="blocks")(x_BLD, None)[0]

"""Transformer blocks as CLIP has them: pre-norm residual blocks, biases everywhere, no dropout.

Source: Radford et al. 2021, section 2.4, and openai/CLIP `clip/model.py`; layer scale as in open_clip
`transformer.py`. Parameters are float32; `dtype` is that of the computation. Blocks are stacked along a leading axis
and run in a loop, so a model of any depth compiles once; `Compute.unroll` writes the loop out, which gives the same
numbers. Where a tower gives one position, its last block computes that one alone after attention: 6 % of the flops of
12 layers. Initialisation is that of OpenAI's text tower for both towers: the release leaves the image tower's unstated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from clip_jax.models import packing
from clip_jax.models.architecture import TextTransformer, ViT
from clip_jax.models.attention import attend


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Apply x·σ(1.702x), the approximation that OpenAI's weights were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

# Takes the positions that a tower gives, [B L D] -> [N D], of any D.
Pool = Callable[[Float[Array, "B L D"]], Float[Array, "N D"]]

# What the backward pass finds in memory; it computes the rest again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names("layer"),  # a slice of what is there anyway
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # As wide as the stream, and dear to compute; what follows a convolution, batch norm and ReLU, is cheap.
    "names": jax.checkpoint_policies.save_only_these_names("attention", "convolution"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Compute(NamedTuple):
    """How towers compute, and nothing of what: any choice gives the same numbers, to rounding.

    dtype: of activations; parameters are float32, or wider if dtype is.
    remat: a key of REMAT_POLICIES. unroll: whether the loop over layers is written out.
    rows: the sharding of what has an example in each row; None: the compiler's choice. Where `fsdp` cuts parameters, it
      chooses to cut activations by their width and to reduce them: ViT-B/32 on 16 v4 took 20.7 GB a chip, now 2.1.
    """

    dtype: jnp.dtype = jnp.dtype("float32")
    remat: Literal["none", "dots", "names", "full"] = "none"
    unroll: bool = False
    rows: jax.sharding.Sharding | None = None

    def pin(self, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Return activations whose examples lie where the batch's do."""
        return x if self.rows is None else jax.lax.with_sharding_constraint(x, self.rows)

    def forget(self, block: Any, static_argnums: tuple[int, ...] = (), prevent_cse: bool = True) -> Any:
        """Return a module's class, or a function of a module, as one whose inside the backward pass computes again."""
        if self.remat == "none":
            return block
        policy = REMAT_POLICIES[self.remat]
        return nn.remat(block, policy=policy, prevent_cse=prevent_cse, static_argnums=static_argnums)

    def forget_inside(self, f: Callable[..., Array], prevent_cse: bool = True) -> Callable[..., Array]:
        """Return a pure function as one whose inside the backward pass computes again."""
        return jax.checkpoint(f, policy=REMAT_POLICIES[self.remat], prevent_cse=prevent_cse)

    def repeat(self, block: type[nn.Module], count: int, static_argnums: tuple[int, ...] = (), **axes: int) -> Callable:
        """Return a block as `count` of them, one after another, parameters stacked along axis 0."""
        # Inside a loop nothing can be merged away, so the barrier against that is only cost.
        return nn.scan(
            self.forget(block, static_argnums, prevent_cse=self.unroll),
            variable_axes={"params": 0} | axes,
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=count,
            unroll=count if self.unroll else 1,
        )


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 or wider with CLIP's epsilon, cast back to the input's dtype."""

    epsilon: float = 1e-5  # Flax's default is 1e-6

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return super().__call__(widen(x)).astype(x.dtype)


def widen(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x in float32, or as it is if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def project_heads(heads: int, width: int, init: Callable, dtype: jnp.dtype, name: str) -> nn.DenseGeneral:
    """Return the projection of [B L D] to queries, keys or values [B L N K]."""
    return nn.DenseGeneral((heads, width // heads), kernel_init=init, dtype=dtype, name=name)


class Heads(nn.Module):
    """The parameters of a projection of width D to N heads of K, under the names that `nn.DenseGeneral` gives them."""

    heads: int

    @nn.compact
    def __call__(self, width: int) -> tuple[Float[Array, "D N K"], Float[Array, "N K"]]:
        shape = (self.heads, width // self.heads)
        kernel = self.param("kernel", nn.initializers.normal(width**-0.5), (width, *shape))
        return kernel, self.param("bias", nn.initializers.zeros, shape)


class Attention(nn.Module):
    """Multi-head self-attention; scores and softmax in float32.

    With a mask, rows are the chunks of streams: each attends to the one before and itself (`packing.py`). With a pool,
    all positions attend, and those that it takes are projected.
    """

    heads: int
    causal: bool
    output_std: float
    compute: Compute

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], mask_SRPP: Bool[Array, "S R L L2"] | None = None, pool: Pool | None = None
    ) -> Float[Array, "B L D"] | Float[Array, "N D"]:
        width, dtype = x_BLD.shape[-1], self.compute.dtype
        parts = [Heads(self.heads, name=name)(width) for name in ("query", "key", "value")]
        # One product for the three: the input is read once, and so is its gradient written.
        kernel_DCX, bias_CX = (
            jnp.stack([x.reshape(*x.shape[:-2], width) for x in like], axis=-2).astype(dtype)
            for like in zip(*parts, strict=True)
        )
        query, key, value = jnp.einsum("BLD,DCX->CBLX", x_BLD, kernel_DCX) + bias_CX[:, None, None]
        mask_BLM = None
        if mask_SRPP is not None:
            key, value = (_with_chunk_before(x, mask_SRPP.shape[:2]) for x in (key, value))
            mask_BLM = mask_SRPP.reshape(-1, *mask_SRPP.shape[2:])
        causal = self.causal and mask_BLM is None
        y_BLX = attend(query, key, value, self.heads, causal=causal, mask_BLM=mask_BLM, rows=self.compute.rows)
        y = checkpoint_name(y_BLX if pool is None else pool(y_BLX), "attention")
        init = nn.initializers.normal(self.output_std)
        out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=init, dtype=dtype, name="out")
        return out(y.reshape(*y.shape[:-1], self.heads, -1))


def _with_chunk_before(x_BPX: Float[Array, "B P X"], chunks: tuple[int, int]) -> Float[Array, "B P2 X"]:
    x_SRPX = x_BPX.reshape(*chunks, *x_BPX.shape[1:])
    return jnp.concatenate([packing.before(x_SRPX), x_SRPX], axis=2).reshape(-1, 2 * x_BPX.shape[1], x_BPX.shape[2])


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
    """x + attention(norm(x)), then x + mlp(norm(x)); each branch times a learnt gain if the tower has layer scale.

    With a pool, only the positions that it takes go on from attention.
    """

    tower: ViT | TextTransformer
    causal: bool
    compute: Compute

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], mask_SRPP: Bool[Array, "S R L L2"] | None = None, pool: Pool | None = None
    ) -> tuple[Float[Array, "B L D"] | Float[Array, "N D"], None]:
        tower, width, dtype = self.tower, self.tower.width, self.compute.dtype
        # Residual branches start smaller the deeper the tower is.
        output_std = width**-0.5 * (2 * tower.layers) ** -0.5
        attention = Attention(tower.heads, self.causal, output_std, self.compute, name="attention")
        mlp = Perceptron(int(width * tower.mlp_ratio), tower.activation, output_std, dtype, name="mlp")
        y = attention(LayerNorm(tower.norm_epsilon, name="norm1")(x_BLD), mask_SRPP, pool)
        x = self._add(x_BLD if pool is None else pool(x_BLD), y, "layer_scale1")
        return self._add(x, mlp(LayerNorm(tower.norm_epsilon, name="norm2")(x)), "layer_scale2"), None

    def _add(self, x: Float[Array, "... D"], y: Float[Array, "... D"], name: str) -> Float[Array, "... D"]:
        if self.tower.layer_scale:
            gain_D = self.param(name, nn.initializers.constant(self.tower.layer_scale), x.shape[-1:])
            y = y * jnp.expand_dims(gain_D.astype(y.dtype), range(y.ndim - 1))
        return self.compute.pin(x + y)


class Transformer(nn.Module):
    """The blocks of a tower, over parameters stacked along axis 0."""

    tower: ViT | TextTransformer
    causal: bool
    compute: Compute

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], mask_SRPP: Bool[Array, "S R L L2"] | None = None, pool: Pool | None = None
    ) -> Float[Array, "B L D"] | Float[Array, "N D"]:
        """Return all positions, or those that a pool takes."""
        x_BLD = self.compute.pin(x_BLD)
        if pool is not None and not self.is_initializing():
            return self._pooled(x_BLD, mask_SRPP, pool)
        blocks = self.compute.repeat(Block, self.tower.layers)
        x_BLD, _ = blocks(self.tower, self.causal, self.compute, name="blocks")(x_BLD, mask_SRPP)
        return x_BLD if pool is None else pool(x_BLD)

    def _pooled(
        self, x_BLD: Float[Array, "B L D"], mask_SRPP: Bool[Array, "S R L L2"] | None, pool: Pool
    ) -> Float[Array, "N D"]:
        """Run all blocks but the last in a loop, and the last for the positions that the pool takes."""
        compute, last, stack = self.compute, self.tower.layers - 1, self.variables["params"]["blocks"]
        block = Block(self.tower, self.causal, compute, parent=None)

        def apply(x_BLD: Array, params: Any, pool: Pool | None = None) -> Array:
            return block.apply({"params": params}, x_BLD, mask_SRPP, pool)[0]

        def step(x_BLD: Array, layer: Array, slot: Any) -> Array:
            # Looked up in here, where all is forgotten, as each layer's slice would be kept otherwise.
            one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stack)
            return apply(x_BLD, checkpoint_name(jax.tree.map(_instead_of, slot, one), "layer"))

        # Inside a loop nothing can be merged away, so the barrier against that is only cost.
        step = compute.forget_inside(step, prevent_cse=compute.unroll)
        layers = (jnp.arange(last), jax.tree.map(lambda leaf: leaf[:last], stack))
        unroll = max(1, last) if compute.unroll else 1
        x_BLD, _ = jax.lax.scan(lambda x_BLD, layer: (step(x_BLD, *layer), None), x_BLD, layers, unroll=unroll)
        final = compute.forget_inside(functools.partial(apply, pool=lambda x_BLD: compute.pin(pool(x_BLD))))
        return final(x_BLD, jax.tree.map(lambda leaf: leaf[last], stack))


@jax.custom_vjp
def _instead_of(x: Array, y: Array) -> Array:
    """Return y, which has x's value, and hand gradients to x: for a loop over a slice [:-1] of a stack, x's.

    The loop looks into the whole stack, so that nobody reads the slice and it isn't copied; and gradients are written
    one after another, where those of the stack itself would be added up: 2.3 GB a step of ViT-B/32 on v6e.
    """
    return y


_instead_of.defvjp(lambda x, y: (y, None), lambda _, gradient: (gradient, None))

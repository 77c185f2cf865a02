"""Pre-norm transformer blocks as in CLIP: biases everywhere, no dropout.

Sources: Radford et al. 2021, section 2.4; openai/CLIP `clip/model.py`; layer scale: open_clip `transformer.py`. Both
towers are initialized as OpenAI's text tower, because the release does not state the image tower's initialization.

Parameters are float32, those of all blocks stacked along axis 0. The blocks run in a scan, so the compile time does not
depend on the depth. If a tower pools one position, its last block computes only that position after attention, which
saves 6 % of the FLOPs of 12 layers.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from clip_jax.models import packing
from clip_jax.models.attention import attend

Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Compute x·σ(1.702x), the GELU approximation that OpenAI's weights were trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

# Selects positions: [B, L, D] -> [N, D], for any D. None: all positions.
Pool = Callable[[Float[Array, "B L D"]], Float[Array, "N D"]] | None
Pooled = Float[Array, "B L D"] | Float[Array, "N D"]
ChunkMask = Bool[Array, "S R L L2"] | None  # `packing.Stream.mask`

# Residuals that are saved for the backward pass; it recomputes all others.
REMAT_POLICIES = {
    # "layer" names a layer's parameters, which are a slice of the stacked parameters and need no copy.
    "none": jax.checkpoint_policies.save_anything_except_these_names("layer"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # As large as the residual stream and expensive to recompute, unlike the batch norm and ReLU after a convolution.
    "names": jax.checkpoint_policies.save_only_these_names("attention", "convolution"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

# (regular expression of parameter paths, mesh axes of their last dimensions)
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]
# Sharding rules of the modules below, wherever a tower has them.
NORM_RULES: Rules = ((r"(.*/)?\w*norm\w*/(scale|bias)", ()),)
PROJECTION_RULES: Rules = (
    (r".*/(query|key|value)/kernel", ("fsdp", "tensor", None)),
    (r".*/(query|key|value)/bias", ("tensor", None)),
)
TRANSFORMER_RULES: Rules = (
    *NORM_RULES,
    *PROJECTION_RULES,
    (r".*/(attention|pool)/out/kernel|pool/out/kernel", ("tensor", None, "fsdp")),
    (r".*/mlp/in/kernel", ("fsdp", "tensor")),
    (r".*/mlp/in/bias", ("tensor",)),
    (r".*/mlp/out/kernel", ("tensor", "fsdp")),
    (r".*/out/bias", ()),
    (r".*/layer_scale\d", ()),
)


class Compute(NamedTuple):
    """How towers compute. No choice changes results beyond rounding, except `frozen`.

    dtype: dtype of activations. Parameters are float32, or wider if dtype is.
    remat: a key of REMAT_POLICIES.
    unroll: whether to write the loop over layers out.
    batch_sharding: sharding of arrays whose first axis is the batch; None: XLA chooses. If parameters are sharded over
      `fsdp`, XLA would shard activations by width and all-reduce them: ViT-B/32 on 16 v4 chips took 20.7 GB per chip
      that way and takes 2.1 GB with the constraint.
    frozen: regular expression of parameters that are not trained. A batch norm whose gain and bias match runs as in
      inference: with the running averages, which do not change. Empty: none.
    """

    dtype: jnp.dtype = jnp.dtype("float32")
    remat: Literal["none", "dots", "names", "full"] = "none"
    unroll: bool = False
    batch_sharding: jax.sharding.Sharding | None = None
    frozen: str = ""

    def is_frozen(self, module: nn.Module) -> bool:
        """Return whether a module's gain and bias are frozen."""
        paths = ["/".join((*module.path, name)) for name in ("scale", "bias")]
        return bool(self.frozen) and all(re.search(self.frozen, path) for path in paths)

    def constrain(self, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Constrain activations to the batch sharding."""
        return x if self.batch_sharding is None else jax.lax.with_sharding_constraint(x, self.batch_sharding)

    def remat_module(self, block: Any, static_argnums: tuple[int, ...] = (), prevent_cse: bool = True) -> Any:
        """Rematerialize a module class, or a function whose first argument is a module, by the remat policy."""
        if self.remat == "none":
            return block
        policy = REMAT_POLICIES[self.remat]
        return nn.remat(block, policy=policy, prevent_cse=prevent_cse, static_argnums=static_argnums)

    def remat_function(self, f: Callable[..., Array], prevent_cse: bool = True) -> Callable[..., Array]:
        """Rematerialize a pure function by the remat policy."""
        return jax.checkpoint(f, policy=REMAT_POLICIES[self.remat], prevent_cse=prevent_cse)

    def repeat(self, block: type[nn.Module], count: int, static_argnums: tuple[int, ...] = (), **axes: int) -> Callable:
        """Return a module class that applies `count` blocks in sequence, their parameters stacked along axis 0."""
        # XLA cannot merge the recomputation across iterations of a loop, so the barrier of prevent_cse would only cost.
        return nn.scan(
            self.remat_module(block, static_argnums, prevent_cse=self.unroll),
            variable_axes={"params": 0} | axes,
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=count,
            unroll=count if self.unroll else 1,
        )


class LayerNorm(nn.LayerNorm):
    """Layer norm in at least float32 with CLIP's epsilon; the result has the input's dtype."""

    epsilon: float = 1e-5  # Flax's default is 1e-6

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return super().__call__(upcast(x)).astype(x.dtype)


def upcast(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Convert to float32; wider types are unchanged."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def patches(image: Float[Array, "B H W C"], size: int) -> Float[Array, "B L P"]:
    """Split images into flat patches [B, H/p · W/p, p · p · C] in row-major order.

    Pixels after the last whole patch are ignored: SigLIP uses 378 of its 384 px.
    """
    batch, height, width, channels = image.shape
    rows, columns = height // size, width // size
    x = image[:, : rows * size, : columns * size].reshape(batch, rows, size, columns, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


def attend_from_query(
    query_B1D: Float[Array, "B 1 D"], x_BLD: Float[Array, "B L D"], heads: int, dtype: jnp.dtype
) -> Float[Array, "B 1 N K"]:
    """Attend from one query to all positions. The projections are submodules of the calling module."""
    width = x_BLD.shape[-1]
    init, shape = nn.initializers.normal(width**-0.5), (heads, width // heads)
    query, key, value = (
        nn.DenseGeneral(shape, kernel_init=init, dtype=dtype, name=name)(source)
        for name, source in (("query", query_B1D), ("key", x_BLD), ("value", x_BLD))
    )
    return jax.nn.dot_product_attention(query, key, value)


class HeadParams(nn.Module):
    """Parameters of a projection from width D to N heads of K, named as in `nn.DenseGeneral`."""

    heads: int

    @nn.compact
    def __call__(self, width: int) -> tuple[Float[Array, "D N K"], Float[Array, "N K"]]:
        shape = (self.heads, width // self.heads)
        kernel = self.param("kernel", nn.initializers.normal(width**-0.5), (width, *shape))
        return kernel, self.param("bias", nn.initializers.zeros, shape)


class Attention(nn.Module):
    """Multi-head self-attention; scores and softmax are float32.

    With a mask, the rows of the batch are chunks of packed texts and attend to the previous chunk and themselves
    (`packing.py`). With a pool, all positions attend, and only the selected ones are projected.
    """

    heads: int
    causal: bool
    output_std: float
    compute: Compute

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], mask_SRPP: ChunkMask = None, pool: Pool = None) -> Pooled:
        width, dtype = x_BLD.shape[-1], self.compute.dtype
        params = [HeadParams(self.heads, name=name)(width) for name in ("query", "key", "value")]
        # One matmul for the three projections reads the input once and writes its gradient once.
        kernel_DCX, bias_CX = (
            jnp.stack([x.reshape(*x.shape[:-2], width) for x in leaves], axis=-2).astype(dtype)
            for leaves in zip(*params, strict=True)
        )
        query, key, value = jnp.einsum("BLD,DCX->CBLX", x_BLD, kernel_DCX) + bias_CX[:, None, None]
        mask_BLM = None
        if mask_SRPP is not None:
            key, value = (_with_previous_chunk(x, mask_SRPP.shape[:2]) for x in (key, value))
            mask_BLM = mask_SRPP.reshape(-1, *mask_SRPP.shape[2:])
        causal, sharding = self.causal and mask_BLM is None, self.compute.batch_sharding
        y_BLX = attend(query, key, value, self.heads, causal=causal, mask_BLM=mask_BLM, batch_sharding=sharding)
        y = checkpoint_name(y_BLX if pool is None else pool(y_BLX), "attention")
        init = nn.initializers.normal(self.output_std)
        out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=init, dtype=dtype, name="out")
        return out(y.reshape(*y.shape[:-1], self.heads, -1))


def _with_previous_chunk(x_BPX: Float[Array, "B P X"], chunks: tuple[int, int]) -> Float[Array, "B P2 X"]:
    x_SRPX = x_BPX.reshape(*chunks, *x_BPX.shape[1:])
    with_previous = jnp.concatenate([packing.previous_chunk(x_SRPX), x_SRPX], axis=2)
    return with_previous.reshape(-1, 2 * x_BPX.shape[1], x_BPX.shape[2])


class MLP(nn.Module):
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Base class of towers with transformer blocks. They have the fields `width`, `layers` and `heads`, too."""

    mlp_ratio: float = 4.0  # hidden width of the MLP / width
    # OpenAI's weights need 'quick_gelu', most others 'gelu'; the wrong one costs 2.7 points of ImageNet accuracy
    # without an error. SigLIP: 'gelu_tanh' in Hugging Face's copies, 'gelu' in some of open_clip's.
    activation: Activation = "quick_gelu"
    norm_epsilon: float = 1e-5  # of the layer norms
    layer_scale: float = 0.0  # initial gain of the residual branches; 0: no layer scale

    stacked: ClassVar[str] = r"transformer/blocks/.*"

    def layer(self, path: str) -> int | range:
        if path.startswith("transformer/"):
            return range(1, self.layers + 1)
        first = path.startswith(("patch_", "class_", "token_", "positional_", "norm_pre"))
        return 0 if first else self.output_layer

    @property
    def output_layer(self) -> int:
        return self.layers + 1

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    def post_attention_flops(self, positions: int) -> float:
        """Return the FLOPs of a block's output projection and MLP at `positions` positions."""
        return 2.0 * positions * (self.width**2 + 2 * self.width * self.mlp_width)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with layer scale, each branch is multiplied by a learned gain.

    With a pool, only the selected positions continue after attention.
    """

    config: TransformerConfig
    causal: bool
    compute: Compute

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], mask_SRPP: ChunkMask = None, pool: Pool = None
    ) -> tuple[Pooled, None]:
        config, dtype = self.config, self.compute.dtype
        # The initial residual branches are smaller the deeper the tower is.
        output_std = config.width**-0.5 * (2 * config.layers) ** -0.5
        attention = Attention(config.heads, self.causal, output_std, self.compute, name="attention")
        mlp = MLP(config.mlp_width, config.activation, output_std, dtype, name="mlp")
        y = attention(LayerNorm(config.norm_epsilon, name="norm1")(x_BLD), mask_SRPP, pool)
        x = self._add(x_BLD if pool is None else pool(x_BLD), y, "layer_scale1")
        return self._add(x, mlp(LayerNorm(config.norm_epsilon, name="norm2")(x)), "layer_scale2"), None

    def _add(self, x: Float[Array, "... D"], y: Float[Array, "... D"], name: str) -> Float[Array, "... D"]:
        if self.config.layer_scale:
            gain_D = self.param(name, nn.initializers.constant(self.config.layer_scale), x.shape[-1:])
            y = y * jnp.expand_dims(gain_D.astype(y.dtype), range(y.ndim - 1))
        return self.compute.constrain(x + y)


class Transformer(nn.Module):
    """The blocks of a tower; parameters are stacked along axis 0."""

    config: TransformerConfig
    causal: bool
    compute: Compute

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], mask_SRPP: ChunkMask = None, pool: Pool = None) -> Pooled:
        """Return all positions, or those that `pool` selects."""
        x_BLD = self.compute.constrain(x_BLD)
        if pool is not None and not self.is_initializing():
            return self._pooled(x_BLD, mask_SRPP, pool)
        blocks = self.compute.repeat(Block, self.config.layers)
        x_BLD, _ = blocks(self.config, self.causal, self.compute, name="blocks")(x_BLD, mask_SRPP)
        return x_BLD if pool is None else pool(x_BLD)

    def _pooled(self, x_BLD: Float[Array, "B L D"], mask_SRPP: ChunkMask, pool: Pool) -> Float[Array, "N D"]:
        """Run all blocks but the last in a loop, and the last for the selected positions."""
        compute, last, stack = self.compute, self.config.layers - 1, self.variables["params"]["blocks"]
        block = Block(self.config, self.causal, compute, parent=None)

        def apply(x_BLD: Array, params: Any, pool: Pool = None) -> Array:
            return block.apply({"params": params}, x_BLD, mask_SRPP, pool)[0]

        def step(x_BLD: Array, layer: Array, slot: Any) -> Array:
            # The lookup is inside the rematerialized function; outside, each layer's slice would be saved.
            params = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stack)
            return apply(x_BLD, checkpoint_name(jax.tree.map(_straight_through, slot, params), "layer"))

        step = compute.remat_function(step, prevent_cse=compute.unroll)
        layers = (jnp.arange(last), jax.tree.map(lambda leaf: leaf[:last], stack))
        unroll = max(1, last) if compute.unroll else 1
        x_BLD, _ = jax.lax.scan(lambda x_BLD, layer: (step(x_BLD, *layer), None), x_BLD, layers, unroll=unroll)
        final = compute.remat_function(functools.partial(apply, pool=lambda x_BLD: compute.constrain(pool(x_BLD))))
        return final(x_BLD, jax.tree.map(lambda leaf: leaf[last], stack))


@jax.custom_vjp
def _straight_through(x: Array, y: Array) -> Array:
    """Return y, which equals x, and pass gradients to x. For a scan over the slice [:-1] of a stack, x is the slice.

    The scan reads from the whole stack, so the slice is never read and XLA does not copy it. The gradients of the slice
    are written layer by layer, while those of the stack would be summed: 2.3 GB per step of ViT-B/32 on v6e.
    """
    return y


_straight_through.defvjp(lambda x, y: (y, None), lambda _, gradient: (gradient, None))

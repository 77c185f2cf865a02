"""Attention for short sequences: on TPUs one Pallas kernel that keeps a head's scores in on-chip memory (VMEM).

Up to about 600 tokens, all scores of a head fit into VMEM, so the kernel computes a plain softmax and does not stream
and rescale as flash attention does (Dao et al. 2022, arXiv:2205.14135). XLA writes float32 scores to HBM and reads them
back about 13 times per layer, padded from 257 to 384 columns: half of the bytes of a ViT-L/14 step. The backward pass
saves only queries, keys and values.

ViT-L/14 (257 tokens, 16 heads of 64, bfloat16), which the compiler's byte count does not include: a grid step holds
[r, 257, 128] of each of 4 (backward 7) operands, two heads in the 128 lanes, twice for the pipeline, 1.8 MB at r = 2;
up to four scores f32[257, 257] take 1.6 MB; a kernel may use 16 MB. A head's lanes are masked, not sliced, so matmuls
have 128 lanes, of which 64 are used, and 257 tokens are padded to 264 rows and 384 columns: 7 matmuls of
2 · 264 · 384 · 128 per head and layer are 8.9 TFLOP for 128 images, 32 ms at v4's peak, of which 11 ms are counted.
The vector unit's 15 operations per score forward and 25 backward take about 45 ms, in parallel.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

LANES = 128  # per vector register of a TPU
MAX_TOKENS = 640  # the paper's models have at most 577; the scores of a head take 1.6 MB of VMEM at 640
_BLOCK_BYTES = 1 << 18  # of one operand in one grid step; a step takes several short sequences
_MASKED = -1e30  # finite, because -inf - -inf is NaN


class AttentionShape(NamedTuple):
    """Sizes of a self-attention: heads, features per head, tokens."""

    heads: int
    head_dim: int
    tokens: int


def attend(
    query_BLX: Float[Array, "B L X"],
    key_BMX: Float[Array, "B M X"],
    value_BMX: Float[Array, "B M X"],
    heads: int,
    *,
    causal: bool = False,
    mask_BLM: Bool[Array, "B L M"] | None = None,
    batch_sharding: NamedSharding | None = None,
) -> Float[Array, "B L X"]:
    """Compute softmax(Q Kᵀ / √K) V for each head; scores and softmax are float32.

    Args:
      query_BLX, key_BMX, value_BMX: the heads' features side by side, X = N · K.
      heads: number of heads, N.
      causal: whether a token attends only to itself and earlier tokens.
      mask_BLM: True where a token attends to another, instead of `causal`; at least once per row.
      batch_sharding: sharding of the batch, on a mesh whose axis `tensor` shards the heads. Its devices determine the
        implementation; None: XLA.
    """
    if batch_sharding is not None:
        axes = batch_sharding.spec[0]
        shards = math.prod(
            batch_sharding.mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or [])
        )
        shape = AttentionShape(heads, query_BLX.shape[-1] // heads, max(query_BLX.shape[1], key_BMX.shape[1]))
        # The batch of one that initializes parameters does not divide over the devices.
        if query_BLX.shape[0] % shards == 0 and not _kernel_obstacle(shape, batch_sharding.mesh):
            specs = PartitionSpec(*batch_sharding.spec, None, "tensor")
            kernel = functools.partial(short_attention, head_dim=shape.head_dim, causal=causal)
            return jax.shard_map(  # the compiler cannot partition a kernel
                kernel,
                mesh=batch_sharding.mesh,
                in_specs=(specs, specs, specs, batch_sharding.spec),
                out_specs=specs,
                check_vma=False,
            )(query_BLX, key_BMX, value_BMX, mask_BLM)
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in (query_BLX, key_BMX, value_BMX))
    mask_B1LM = None if mask_BLM is None else mask_BLM[:, None]
    flash = mask_BLM is None and batch_sharding is not None and _has_cudnn_flash(batch_sharding.mesh, query.dtype)
    options = {"implementation": "cudnn"} if flash else {}
    y_BLNK = jax.nn.dot_product_attention(query, key, value, mask=mask_B1LM, is_causal=causal, **options)
    return y_BLNK.reshape(query_BLX.shape)


def attention_implementation(
    shape: AttentionShape, mesh: Mesh, dtype: str = "bfloat16", *, masked: bool = False
) -> str:
    """Return the implementation that `attend` selects on a mesh, and the reason if it is XLA's.

    Args:
      shape: sizes of the attention, of all devices together.
      mesh: mesh with an axis `tensor`, which shards the heads.
      dtype: of queries, keys and values.
      masked: whether there is a mask, as with packed captions.
    """
    obstacle = _kernel_obstacle(shape, mesh)
    if not obstacle:
        return "Pallas kernel"
    if not masked and _has_cudnn_flash(mesh, dtype):
        return "cuDNN flash attention"
    return f"XLA: {obstacle}"


def _kernel_obstacle(shape: AttentionShape, mesh: Mesh) -> str:
    """Return the reason why the kernel cannot compute an attention on a mesh, or an empty string."""
    if (platform := mesh.devices.flat[0].platform) != "tpu":
        return f"the kernel needs a TPU, the platform is {platform}"
    if LANES % shape.head_dim:
        return f"head width {shape.head_dim} does not divide {LANES}"
    if shape.heads * shape.head_dim // mesh.shape["tensor"] % LANES:
        heads = shape.heads / mesh.shape["tensor"]
        return f"{heads:g} heads of width {shape.head_dim} per device do not fill multiples of {LANES} lanes"
    if shape.tokens > MAX_TOKENS:
        return f"{shape.tokens} tokens exceed the kernel's {MAX_TOKENS}"
    return ""


def _has_cudnn_flash(mesh: Mesh, dtype: jnp.dtype | str) -> bool:
    """Return whether cuDNN's flash attention is available: Ampere or later, half precision."""
    device = mesh.devices.flat[0]
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return half and device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= 8.0


def short_attention(
    query_BLX: Float[Array, "B L X"],
    key_BMX: Float[Array, "B M X"],
    value_BMX: Float[Array, "B M X"],
    mask_BLM: Bool[Array, "B L M"] | None = None,
    *,
    head_dim: int,
    causal: bool = False,
    interpret: bool = False,
) -> Float[Array, "B L X"]:
    """Run the kernel on one device's shard; arguments as for `attend`. `head_dim` divides 128, and 128 divides X."""
    return _attention((head_dim, causal, interpret), (query_BLX, key_BMX, value_BMX), mask_BLM)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, operands, mask):
    return _call(_forward, options, operands, mask, outputs=operands[:1], matmuls=2)[0]


def _attention_forward(options, operands, mask):
    return _attention(options, operands, mask), (operands, mask)


def _attention_backward(options, residuals, d_out):
    operands, mask = residuals
    return tuple(_call(_backward, options, (*operands, d_out), mask, outputs=operands, matmuls=5)), None


_attention.defvjp(_attention_forward, _attention_backward)


def _call(body, options, operands, mask, outputs, matmuls):
    """Run a kernel over examples and groups of heads that fill the lanes; `outputs` have the results' shapes."""
    head_dim, causal, interpret = options
    (batch, length, width), (_, keys, _), dtype = operands[0].shape, operands[1].shape, operands[0].dtype
    example_bytes = keys * LANES * dtype.itemsize
    block = max(r for r in range(1, batch + 1) if batch % r == 0 and (r == 1 or r * example_bytes <= _BLOCK_BYTES))

    def blocks(arrays):
        return [pl.BlockSpec((block, x.shape[1], LANES), lambda i, j: (i, 0, j)) for x in arrays]

    masks = [] if mask is None else [mask.astype(jnp.int8)]
    mask_block = pl.BlockSpec((block, length, keys), lambda i, j: (i, 0, 0))
    scores = batch * width // head_dim * length * keys
    traffic = sum(x.size * x.dtype.itemsize for x in (*operands, *masks, *outputs))
    return pl.pallas_call(
        functools.partial(body, head_dim=head_dim, causal=causal, masked=mask is not None),
        grid=(batch // block, width // LANES),
        in_specs=[mask_block] * len(masks) + blocks(operands),
        out_specs=blocks(outputs),
        out_shape=[jax.ShapeDtypeStruct(x.shape, dtype) for x in outputs],
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * scores * head_dim, transcendentals=scores, bytes_accessed=traffic
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=f"short_attention{body.__name__}",
    )(*masks, *operands)


def _forward(*refs, head_dim, causal, masked):
    mask_ref, query_ref, key_ref, value_ref, out_ref = refs if masked else (None, *refs)

    def example(i, _):
        query, key, value, apply_mask = query_ref[i], key_ref[i], value_ref[i], _masking(mask_ref, i, causal)
        out = jnp.zeros(query.shape, jnp.float32)
        for lanes in _head_lanes(head_dim):
            exp, total = _softmax(jnp.where(lanes, query, 0), key, head_dim, apply_mask)
            out += jnp.where(lanes, _matmul(exp.astype(value.dtype), value) / total, 0)
        out_ref[i] = out.astype(out_ref.dtype)
        return 0

    jax.lax.fori_loop(0, query_ref.shape[0], example, 0)


def _backward(*refs, head_dim, causal, masked):
    mask_ref, *refs = refs if masked else (None, *refs)
    query_ref, key_ref, value_ref, d_out_ref, d_query_ref, d_key_ref, d_value_ref = refs

    def example(i, _):
        query, key, value, d_out = query_ref[i], key_ref[i], value_ref[i], d_out_ref[i]
        apply_mask = _masking(mask_ref, i, causal)
        d_query, d_key, d_value = (jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
        for lanes in _head_lanes(head_dim):
            # Lanes of other heads are 0, so the sum over heads concatenates the heads.
            head_query, head_key, head_d_out = (jnp.where(lanes, x, 0) for x in (query, key, d_out))
            exp, total = _softmax(head_query, key, head_dim, apply_mask)
            weight = exp / total
            d_weight = _matmul(head_d_out, value, contract=(1, 1))
            d_score = weight * (d_weight - jnp.sum(weight * d_weight, axis=1, keepdims=True))
            weight, d_score = weight.astype(query.dtype), d_score.astype(query.dtype)
            d_value += _matmul(weight, head_d_out, contract=(0, 0))
            d_query += _matmul(d_score, head_key)
            d_key += _matmul(d_score, head_query, contract=(0, 0))
        scale = head_dim**-0.5
        for ref, gradient in ((d_query_ref, d_query * scale), (d_key_ref, d_key * scale), (d_value_ref, d_value)):
            ref[i] = gradient.astype(ref.dtype)
        return 0

    jax.lax.fori_loop(0, query_ref.shape[0], example, 0)


def _head_lanes(head_dim):
    """Return the lane mask [1, 128] of each head of a group."""
    head = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) // head_dim
    return [head == i for i in range(LANES // head_dim)]


def _masking(mask_ref, i, causal):
    """Return a function that masks an example's scores [L, M]."""
    if mask_ref is not None:
        mask = mask_ref[i].astype(jnp.int32) != 0
        return lambda score: jnp.where(mask, score, _MASKED)
    if not causal:
        return lambda score: score

    def mask_causal(score):
        row, column = (jax.lax.broadcasted_iota(jnp.int32, score.shape, axis) for axis in (0, 1))
        return jnp.where(column <= row, score, _MASKED)

    return mask_causal


def _softmax(query, key, head_dim, apply_mask):
    """Return exp(score - row maximum) and its row sum, float32."""
    score = apply_mask(_matmul(query, key, contract=(1, 1)))
    exp = jnp.exp((score - jnp.max(score, axis=1, keepdims=True)) * head_dim**-0.5)
    return exp, jnp.sum(exp, axis=1, keepdims=True)


def _matmul(a, b, contract=(1, 0)):
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    # Explicit, because the backward kernel is traced outside the context that sets the towers' precision.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)

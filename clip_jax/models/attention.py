"""Attention of short sequences: on TPUs one Pallas kernel, in which a head's scores never leave the chip's own memory.

Up to some 600 tokens, the scores of a head fit into VMEM whole, so nothing is streamed and rescaled as in flash
attention (Dao et al. 2022, arXiv:2205.14135): the softmax is the plain one. XLA writes float32 scores to HBM and reads
them back some 13 times a layer, padded from 257 columns to 384: half of the bytes of a ViT-L/14's step. Elsewhere
`jax.nn.dot_product_attention` does the same, by cuDNN's flash attention on GPUs. A backward pass keeps queries, keys
and values only.

What the compiler's count of bytes can't see, for ViT-L/14's image tower, 257 tokens and 16 heads of 64, bf16:

- VMEM. A grid step holds [r, 257, 128] of every operand, two heads side by side, twice for the pipeline: at r = 2,
  2 · 257 · 128 · 2 bytes = 132 kB each, 4 forward and 7 backward, 1.8 MB. Scores f32[257, 257] are 264 · 384 · 4 =
  406 kB, and up to four are alive, 1.6 MB. That is a fifth of the 16 MB which a kernel may use by default.
- Matrix unit. A head's lanes are masked, not sliced: products contract or produce all 128 lanes, of which 64 count, as
  a 128 × 128 unit would pad them anyway. With 257 padded to 264 rows and 384 columns, a third of what the unit does is
  useful: 7 products of 2 · 264 · 384 · 128 a head and layer are 8.9 TFLOP a chip at 128 pictures, 32 ms at v4's peak,
  of which 3.0 TFLOP, 11 ms, are counted.
- Vector unit. About 15 operations per score forward and 25 backward, 384 · 264 scores a head: 2.0e11 operations, about
  45 ms on v4, beside the products, where XLA's fusions would spend them too.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

LANES = 128  # of a TPU's vector registers
MAX_TOKENS = 640  # 577 are the most of the paper's models; a head's scores are 1.6 MB of VMEM at 640
_BLOCK_BYTES = 1 << 18  # of one operand in one grid step: short sequences come several at a time
_LOW = -1e30  # finite, unlike -inf, whose difference to itself is none


def attend(
    query_BLX: Float[Array, "B L X"],
    key_BMX: Float[Array, "B M X"],
    value_BMX: Float[Array, "B M X"],
    heads: int,
    *,
    causal: bool = False,
    mask_BLM: Bool[Array, "B L M"] | None = None,
    rows: jax.sharding.NamedSharding | None = None,
) -> Float[Array, "B L X"]:
    """Return softmax(Q Kᵀ / √K) V for every head; scores and softmax in float32.

    Args:
      query_BLX, key_BMX, value_BMX: heads side by side, X = N · K.
      causal: whether a token sees only itself and those before.
      mask_BLM: which tokens see which, instead; each sees one at least.
      rows: where the examples lie, on a mesh with an axis `tensor` for the heads; its devices decide what computes.
        None: XLA, anywhere.
    """
    if rows is not None and _fits_kernel(rows, query_BLX, key_BMX, heads):
        wide = PartitionSpec(*rows.spec, None, "tensor")
        kernel = functools.partial(short_attention, head_dim=query_BLX.shape[-1] // heads, causal=causal)
        return jax.shard_map(  # the compiler can't cut a kernel
            kernel, mesh=rows.mesh, in_specs=(wide, wide, wide, rows.spec), out_specs=wide, check_vma=False
        )(query_BLX, key_BMX, value_BMX, mask_BLM)
    query, key, value = (x.reshape(*x.shape[:2], heads, -1) for x in (query_BLX, key_BMX, value_BMX))
    mask_B1LM = None if mask_BLM is None else mask_BLM[:, None]
    flash = mask_BLM is None and rows is not None and _fits_cudnn(rows, query)
    chosen = {"implementation": "cudnn"} if flash else {}
    y_BLNK = jax.nn.dot_product_attention(query, key, value, mask=mask_B1LM, is_causal=causal, **chosen)
    return y_BLNK.reshape(query_BLX.shape)


def _fits_kernel(rows: jax.sharding.NamedSharding, query_BLX: Array, key_BMX: Array, heads: int) -> bool:
    """Tell whether the kernel computes these shapes on these devices."""
    if (
        rows.mesh.devices.flat[0].platform != "tpu" or query_BLX.shape[0] % rows.num_devices
    ):  # as when parameters are made
        return False
    width, head_dim = query_BLX.shape[-1] // rows.mesh.shape["tensor"], query_BLX.shape[-1] // heads
    return width % LANES == 0 and LANES % head_dim == 0 and max(query_BLX.shape[1], key_BMX.shape[1]) <= MAX_TOKENS


def _fits_cudnn(rows: jax.sharding.NamedSharding, query_BLNK: Array) -> bool:
    """Tell whether these devices have cuDNN's flash attention: Ampere or later, half precision."""
    device = rows.mesh.devices.flat[0]
    half = query_BLNK.dtype in (jnp.bfloat16, jnp.float16)
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
    """Run the kernel on one chip's part, as `attend` says. `head_dim` divides 128, and 128 divides X."""
    return _attention((head_dim, causal, interpret), (query_BLX, key_BMX, value_BMX), mask_BLM)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, operands, mask):
    return _call(_forward, how, operands, mask, like=operands[:1], products=2)[0]


def _attention_forward(how, operands, mask):
    return _attention(how, operands, mask), (operands, mask)


def _attention_backward(how, kept, d_out):
    operands, mask = kept
    return tuple(_call(_backward, how, (*operands, d_out), mask, like=operands, products=5)), None


_attention.defvjp(_attention_forward, _attention_backward)


def _call(body, how, operands, mask, like, products):
    """Run a kernel over examples, and groups of heads that fill the lanes; results have the shapes of `like`."""
    head_dim, causal, interpret = how
    (batch, length, width), (_, seen, _), dtype = operands[0].shape, operands[1].shape, operands[0].dtype
    example_bytes = seen * LANES * dtype.itemsize
    at_once = max(r for r in range(1, batch + 1) if batch % r == 0 and (r == 1 or r * example_bytes <= _BLOCK_BYTES))

    def blocks(arrays):
        return [pl.BlockSpec((at_once, x.shape[1], LANES), lambda i, j: (i, 0, j)) for x in arrays]

    masks = [] if mask is None else [mask.astype(jnp.int8)]
    mask_block = pl.BlockSpec((at_once, length, seen), lambda i, j: (i, 0, 0))
    scores = batch * width // head_dim * length * seen
    traffic = sum(x.size * x.dtype.itemsize for x in (*operands, *masks, *like))
    return pl.pallas_call(
        functools.partial(body, head_dim=head_dim, causal=causal, masked=mask is not None),
        grid=(batch // at_once, width // LANES),
        in_specs=[mask_block] * len(masks) + blocks(operands),
        out_specs=blocks(like),
        out_shape=[jax.ShapeDtypeStruct(x.shape, dtype) for x in like],
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * head_dim, transcendentals=scores, bytes_accessed=traffic
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=f"short_attention{body.__name__}",
    )(*masks, *operands)


def _forward(*refs, head_dim, causal, masked):
    mask_ref, (query_ref, key_ref, value_ref, out_ref) = _mask_and_rest(refs, masked)

    def example(i, _):
        query, key, value, allowed = query_ref[i], key_ref[i], value_ref[i], _allowed(mask_ref, i, causal)
        out = jnp.zeros(query.shape, jnp.float32)
        for own in _heads(head_dim):
            exp, total = _softmax(jnp.where(own, query, 0), key, head_dim, allowed)
            out += jnp.where(own, _matmul(exp.astype(value.dtype), value) / total, 0)
        out_ref[i] = out.astype(out_ref.dtype)
        return 0

    jax.lax.fori_loop(0, query_ref.shape[0], example, 0)


def _backward(*refs, head_dim, causal, masked):
    mask_ref, refs = _mask_and_rest(refs, masked)
    query_ref, key_ref, value_ref, d_out_ref, d_query_ref, d_key_ref, d_value_ref = refs

    def example(i, _):
        query, key, value, d_out = query_ref[i], key_ref[i], value_ref[i], d_out_ref[i]
        allowed = _allowed(mask_ref, i, causal)
        d_query, d_key, d_value = (jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
        for own in _heads(head_dim):
            # What has other heads' lanes at 0 adds nothing to them, so the sum over heads puts each in its place.
            own_query, own_key, own_d_out = (jnp.where(own, x, 0) for x in (query, key, d_out))
            exp, total = _softmax(own_query, key, head_dim, allowed)
            weight = exp / total
            d_weight = _matmul(own_d_out, value, contract=(1, 1))
            d_score = weight * (d_weight - jnp.sum(weight * d_weight, axis=1, keepdims=True))
            weight, d_score = weight.astype(query.dtype), d_score.astype(query.dtype)
            d_value += _matmul(weight, own_d_out, contract=(0, 0))
            d_query += _matmul(d_score, own_key)
            d_key += _matmul(d_score, own_query, contract=(0, 0))
        scale = head_dim**-0.5
        for ref, gradient in ((d_query_ref, d_query * scale), (d_key_ref, d_key * scale), (d_value_ref, d_value)):
            ref[i] = gradient.astype(ref.dtype)
        return 0

    jax.lax.fori_loop(0, query_ref.shape[0], example, 0)


def _mask_and_rest(refs, masked):
    return (refs[0], refs[1:]) if masked else (None, refs)


def _heads(head_dim):
    """Return for every head of a group which lanes are its own, [1, 128]."""
    head = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) // head_dim
    return [head == i for i in range(LANES // head_dim)]


def _allowed(mask_ref, i, causal):
    """Return a function of scores [L, M] that makes low what an example's tokens don't see."""
    if mask_ref is not None:
        seen = mask_ref[i].astype(jnp.int32) != 0
        return lambda score: jnp.where(seen, score, _LOW)
    if not causal:
        return lambda score: score

    def behind(score):
        row, column = (jax.lax.broadcasted_iota(jnp.int32, score.shape, axis) for axis in (0, 1))
        return jnp.where(column <= row, score, _LOW)

    return behind


def _softmax(query, key, head_dim, allowed):
    """Return exp(score - the row's maximum) and its sum over a row, float32."""
    score = allowed(_matmul(query, key, contract=(1, 1)))
    exp = jnp.exp((score - jnp.max(score, axis=1, keepdims=True)) * head_dim**-0.5)
    return exp, jnp.sum(exp, axis=1, keepdims=True)


def _matmul(a, b, contract=(1, 0)):
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

"""The kernel for short sequences: its numbers in Pallas's interpreter, its programs by the TPU's own compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from clip_jax.devices import sharding
from clip_jax.models import attention
from clip_jax.models.attention import attend, short_attention
from tests.tpu import parse_topology

# Float32 sums of up to 577 terms in another order: some 1e-6 of the largest.
SAME = 1e-5
# bfloat16 has 8 bits; weights, scores' gradients and results are rounded to it.
HALF = 0.03


def dense(query, key, value, mask, heads):
    """Attend in float64 NumPy; returns the result and a function of its gradient to those of the three inputs."""
    q, k, v = (np.asarray(x, np.float64).reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5
    score = np.einsum("BLNK,BMNK->BNLM", q, k) * scale
    score = np.where(mask[:, None], score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    out = np.einsum("BNLM,BMNK->BLNK", weight, v)

    def backward(d_out):
        d_out = np.asarray(d_out, np.float64).reshape(out.shape)
        d_weight = np.einsum("BLNK,BMNK->BNLM", d_out, v)
        d_score = weight * (d_weight - (weight * d_weight).sum(-1, keepdims=True)) * scale
        gradients = (
            np.einsum("BNLM,BMNK->BLNK", d_score, k),
            np.einsum("BNLM,BLNK->BMNK", d_score, q),
            np.einsum("BNLM,BLNK->BMNK", weight, d_out),
        )
        return [g.reshape(x.shape) for g, x in zip(gradients, (query, key, value), strict=True)]

    return out.reshape(query.shape), backward


def draw(batch, length, seen, width, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(length), 4)
    return [
        jax.random.normal(key, (batch, tokens, width), dtype)
        for key, tokens in zip(keys, (length, seen, seen, length), strict=True)
    ]


def assert_as_dense(inputs, heads, mask, tolerance, **options):
    query, key, value, d_out = inputs
    kernel = functools.partial(short_attention, head_dim=query.shape[-1] // heads, interpret=True, **options)
    out, pull = jax.vjp(kernel, query, key, value)
    expected, backward = dense(query, key, value, mask, heads)
    for name, ours, theirs in zip(
        ("out", "query", "key", "value"), (out, *pull(d_out)), (expected, *backward(d_out)), strict=True
    ):
        assert ours.dtype == query.dtype
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(), rtol=0, err_msg=name)


def behind(batch, length):
    return np.broadcast_to(np.tri(length, dtype=bool), (batch, length, length))


@pytest.mark.parametrize(
    ("length", "batch", "heads", "head_dim", "causal"),
    [
        (50, 3, 4, 64, False),  # ViT-B/32
        (197, 2, 2, 64, False),  # B/16
        (257, 1, 2, 64, False),  # L/14
        (577, 1, 2, 64, False),  # L/14 at 336 px
        (77, 3, 2, 64, True),  # text
        (9, 2, 4, 32, False),  # four heads side by side
        (9, 2, 1, 128, True),  # one
    ],
)
def test_kernel_is_dense_attention(length, batch, heads, head_dim, causal):
    mask = behind(batch, length) if causal else np.ones((batch, length, length), bool)
    assert_as_dense(draw(batch, length, length, heads * head_dim), heads, mask, SAME, causal=causal)


def test_kernel_with_a_mask_is_dense_attention():
    """Captions end to end: 80 tokens that see some of 160."""
    mask = np.random.default_rng(0).random((3, 80, 160)) < 0.2
    mask[:, np.arange(80), np.arange(80) + 80] = True  # a token sees itself
    query, key, value, d_out = draw(3, 80, 160, 128)
    kernel = functools.partial(short_attention, head_dim=64, interpret=True)
    out, pull = jax.vjp(lambda *x: kernel(*x, jnp.asarray(mask)), query, key, value)
    expected, backward = dense(query, key, value, mask, heads=2)
    for ours, theirs in zip((out, *pull(d_out)), (expected, *backward(d_out)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=SAME * np.abs(theirs).max(), rtol=0)


def test_kernel_in_half_precision_stays_near():
    mask = np.ones((2, 50, 50), bool)
    assert_as_dense(draw(2, 50, 50, 128, jnp.bfloat16), 2, mask, HALF)


def test_large_scores_don_t_overflow():
    query, key, value, _ = draw(1, 50, 50, 128)
    out = short_attention(1e4 * query, key, value, head_dim=64, interpret=True)
    expected, _ = dense(1e4 * query, key, value, np.ones((1, 50, 50), bool), heads=2)
    np.testing.assert_allclose(out, expected, atol=SAME * 1e2)  # where two scores nearly tie, float32 decides otherwise


@pytest.mark.parametrize("chip", ["v4-8", "v5e-4", "v6e-4"])
@pytest.mark.parametrize(("length", "causal"), [(50, False), (257, False), (577, False), (77, True)])
def test_mosaic_compiles_the_kernel_both_ways(chip, length, causal):
    """The program holds one kernel forward and one backward, and no scores outside of them."""
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(parse_topology(chip).devices())
    rows = sharding.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((8 * mesh.size, length, 256), jnp.bfloat16, sharding=rows)

    def loss(query, key, value):
        return jnp.sum(attend(query, key, value, 4, causal=causal, rows=rows).astype(jnp.float32) ** 2)

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert f"{length},{length}]" not in text


def test_mosaic_compiles_the_kernel_with_a_mask_on_cut_heads():
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(parse_topology("v4-8").devices(), tensor=2)
    rows = sharding.batch_sharding(mesh)
    wide = NamedSharding(mesh, jax.P(*rows.spec, None, "tensor"))
    query = jax.ShapeDtypeStruct((16, 80, 256), jnp.bfloat16, sharding=wide)
    key = jax.ShapeDtypeStruct((16, 160, 256), jnp.bfloat16, sharding=wide)
    mask = jax.ShapeDtypeStruct((16, 80, 160), bool, sharding=rows)

    def loss(query, key, value, mask):
        return jnp.sum(attend(query, key, value, 4, mask_BLM=mask, rows=rows).astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, mask).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


def test_what_the_kernel_can_t_take_is_xla_s():
    """Heads of 80 (ViT-H/14), a head on each of two chips, more tokens than VMEM has room for, no mesh at all."""
    pytest.importorskip("libtpu")
    devices = parse_topology("v4-8").devices()
    for tensor, heads, head_dim, length in ((1, 16, 80, 50), (4, 4, 64, 50), (1, 2, 64, attention.MAX_TOKENS + 1)):
        mesh = sharding.make_mesh(devices, tensor=tensor)
        rows = sharding.batch_sharding(mesh)
        x = jax.ShapeDtypeStruct((8, length, heads * head_dim), jnp.bfloat16, sharding=rows)
        text = jax.jit(functools.partial(attend, heads=heads, rows=rows)).lower(x, x, x).as_text()
        assert "tpu_custom_call" not in text


def test_without_a_tpu_it_is_xla_s_attention():
    query, key, value, _ = draw(2, 50, 50, 128)
    rows = sharding.batch_sharding(sharding.make_mesh(jax.devices("cpu")[:1]))
    out = attend(query, key, value, 2, rows=rows)
    expected, _ = dense(query, key, value, np.ones((2, 50, 50), bool), heads=2)
    np.testing.assert_allclose(out, expected, atol=SAME)
    assert (
        "custom_call" not in jax.jit(functools.partial(attend, heads=2, rows=rows)).lower(query, key, value).as_text()
    )

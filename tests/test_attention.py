"""Attention kernel: numbers in Pallas's interpreter, programs by the TPU compiler, choice of implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from clip_jax.config import MODELS, Architecture, TextTransformer, ViT
from clip_jax.devices import sharding
from clip_jax.models import attention, attention_implementations, make_model
from clip_jax.models.attention import AttentionShape, attend, attention_implementation, short_attention
from clip_jax.planner.topology import parse_topology

# Float32 sums of up to 577 terms in another order: about 1e-6 of the largest element.
FLOAT32_TOLERANCE = 1e-5
# bfloat16 has 8 significant bits; softmax weights, score gradients and results are rounded to it.
BFLOAT16_TOLERANCE = 0.03


def dense(query, key, value, mask, heads):
    """Compute attention in float64 NumPy; return the result and its VJP."""
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


def draw(batch, length, keys, width, dtype=jnp.float32):
    """Return random queries, keys, values and output gradients."""
    seeds = jax.random.split(jax.random.key(length), 4)
    return [
        jax.random.normal(seed, (batch, tokens, width), dtype)
        for seed, tokens in zip(seeds, (length, keys, keys, length), strict=True)
    ]


def assert_equals_dense(inputs, heads, mask, tolerance, **options):
    query, key, value, d_out = inputs
    kernel = functools.partial(short_attention, head_dim=query.shape[-1] // heads, interpret=True, **options)
    out, pull = jax.vjp(kernel, query, key, value)
    expected, backward = dense(query, key, value, mask, heads)
    names = ("out", "query", "key", "value")
    for name, a, b in zip(names, (out, *pull(d_out)), (expected, *backward(d_out)), strict=True):
        assert a.dtype == query.dtype
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), rtol=0, err_msg=name)


def causal_mask(batch, length):
    return np.broadcast_to(np.tri(length, dtype=bool), (batch, length, length))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "batch", "heads", "head_dim", "causal"),
    [
        (50, 3, 4, 64, False),  # ViT-B/32
        (197, 2, 2, 64, False),  # B/16
        (257, 1, 2, 64, False),  # L/14
        (577, 1, 2, 64, False),  # L/14 at 336 px
        (77, 3, 2, 64, True),  # text
        (9, 2, 4, 32, False),  # four heads in the lanes
        (9, 2, 1, 128, True),  # one head in the lanes
    ],
)
def test_kernel_equals_dense_attention(length, batch, heads, head_dim, causal):
    mask = causal_mask(batch, length) if causal else np.ones((batch, length, length), bool)
    assert_equals_dense(draw(batch, length, length, heads * head_dim), heads, mask, FLOAT32_TOLERANCE, causal=causal)


def test_kernel_with_mask_equals_dense_attention():
    """As for packed captions: 80 queries, of which each attends to some of 160 keys."""
    mask = np.random.default_rng(0).random((3, 80, 160)) < 0.2
    mask[:, np.arange(80), np.arange(80) + 80] = True  # a token attends to itself
    query, key, value, d_out = draw(3, 80, 160, 128)
    kernel = functools.partial(short_attention, head_dim=64, interpret=True)
    out, pull = jax.vjp(lambda *x: kernel(*x, jnp.asarray(mask)), query, key, value)
    expected, backward = dense(query, key, value, mask, heads=2)
    for a, b in zip((out, *pull(d_out)), (expected, *backward(d_out)), strict=True):
        np.testing.assert_allclose(a, b, atol=FLOAT32_TOLERANCE * np.abs(b).max(), rtol=0)


def test_bfloat16_kernel_is_close_to_dense_attention():
    mask = np.ones((2, 50, 50), bool)
    assert_equals_dense(draw(2, 50, 50, 128, jnp.bfloat16), 2, mask, BFLOAT16_TOLERANCE)


def test_large_scores_do_not_overflow():
    query, key, value, _ = draw(1, 50, 50, 128)
    out = short_attention(1e4 * query, key, value, head_dim=64, interpret=True)
    expected, _ = dense(1e4 * query, key, value, np.ones((1, 50, 50), bool), heads=2)
    np.testing.assert_allclose(out, expected, atol=FLOAT32_TOLERANCE * 1e2)  # near ties are decided by float32 rounding


@pytest.mark.parametrize("chip", ["v4-8", "v5e-4", "v6e-4"])
@pytest.mark.parametrize(("length", "causal"), [(50, False), (257, False), (577, False), (77, True)])
def test_tpu_compiler_accepts_the_forward_and_backward_kernel(chip, length, causal):
    """The program has one forward and one backward kernel, and no scores outside of them."""
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(parse_topology(chip).devices())
    batch_sharding = sharding.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((8 * mesh.size, length, 256), jnp.bfloat16, sharding=batch_sharding)

    def loss(query, key, value):
        return jnp.sum(
            attend(query, key, value, 4, causal=causal, batch_sharding=batch_sharding).astype(jnp.float32) ** 2
        )

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert f"{length},{length}]" not in text


def test_tpu_compiler_accepts_the_kernel_with_mask_and_sharded_heads():
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(parse_topology("v4-8").devices(), tensor=2)
    batch_sharding = sharding.batch_sharding(mesh)
    sharded_heads = NamedSharding(mesh, jax.P(*batch_sharding.spec, None, "tensor"))
    query = jax.ShapeDtypeStruct((16, 80, 256), jnp.bfloat16, sharding=sharded_heads)
    key = jax.ShapeDtypeStruct((16, 160, 256), jnp.bfloat16, sharding=sharded_heads)
    mask = jax.ShapeDtypeStruct((16, 80, 160), bool, sharding=batch_sharding)

    def loss(query, key, value, mask):
        return jnp.sum(
            attend(query, key, value, 4, mask_BLM=mask, batch_sharding=batch_sharding).astype(jnp.float32) ** 2
        )

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, mask).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


# ---------------------------------------------------------------------------------------- choice of implementation


def lowered(mesh, batch, shape):
    """Return the program of an attention on a mesh, before compilation."""
    batch_sharding = sharding.batch_sharding(mesh)
    size = (batch, shape.tokens, shape.heads * shape.head_dim)
    divides = batch % sharding.batch_shards(mesh) == 0
    x_sharding = batch_sharding if divides else sharding.replicated(mesh)
    x = jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=x_sharding)
    f = functools.partial(attend, heads=shape.heads, batch_sharding=batch_sharding)
    return jax.jit(f).lower(x, x, x).as_text()


@pytest.mark.parametrize(
    ("tensor", "shape", "expected"),
    [
        (1, AttentionShape(4, 64, 50), "Pallas kernel"),
        (2, AttentionShape(4, 64, 50), "Pallas kernel"),
        (4, AttentionShape(4, 64, 50), "XLA: 1 heads of width 64 per device do not fill multiples of 128 lanes"),
        (1, AttentionShape(16, 80, 50), "XLA: head width 80 does not divide 128"),
        (1, AttentionShape(2, 64, attention.MAX_TOKENS + 1), "XLA: 641 tokens exceed the kernel's 640"),
    ],
)
def test_reported_implementation_is_in_the_program(tensor, shape, expected):
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(parse_topology("v4-8").devices(), tensor=tensor)
    assert attention_implementation(shape, mesh, "bfloat16") == expected
    assert ("tpu_custom_call" in lowered(mesh, 8, shape)) == (expected == "Pallas kernel")


def test_kernel_needs_a_batch_that_divides_over_the_batch_shards_only():
    """4 devices with tensor=2 are 2 batch shards: a batch of 6 uses the kernel, one of 3 does not."""
    pytest.importorskip("libtpu")
    mesh, shape = sharding.make_mesh(parse_topology("v4-8").devices(), tensor=2), AttentionShape(4, 64, 50)
    assert "tpu_custom_call" in lowered(mesh, 6, shape)
    assert "tpu_custom_call" not in lowered(mesh, 3, shape)


def test_packed_captions_use_the_kernel_on_a_tensor_axis():
    """Two kernels, in the scan and in the last block, for packed and for padded captions each."""
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(parse_topology("v4-8").devices(), tensor=2)
    text = TextTransformer(512, 77, 511, width=256, layers=2, heads=4)
    options = {"text_capacity": 0.35, "text_groups": 2, "batch_sharding": sharding.batch_sharding(mesh)}
    model = make_model(Architecture(ViT(16, 8, 32, 1, 2), text, 16), dtype="bfloat16", **options)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((8, 77), jnp.int32, sharding=options["batch_sharding"])
    assert jax.jit(model.encode_text_train).lower(params, tokens).as_text().count("tpu_custom_call") == 4


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("vit_b32", "Pallas kernel", "Pallas kernel"),
        ("vit_l14_336", "Pallas kernel", "Pallas kernel"),
        ("vit_h14", "XLA: head width 80 does not divide 128", "Pallas kernel"),
        ("vit_g14", "XLA: head width 88 does not divide 128", "Pallas kernel"),
        ("vit_bigg14", "XLA: head width 104 does not divide 128", "Pallas kernel"),
        ("siglip_so400m14", "XLA: head width 72 does not divide 128", "XLA: head width 72 does not divide 128"),
        ("rn50", "no self-attention", "Pallas kernel"),
        ("emoji", "no self-attention", "XLA: 3 heads of width 32 per device do not fill multiples of 128 lanes"),
    ],
)
def test_implementation_of_each_tower_is_reported_with_its_reason(name, image, text):
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(parse_topology("v4-8").devices())
    assert attention_implementations(MODELS[name], mesh, text_capacity=0.35) == {"image": image, "text": text}


def test_cpu_uses_xla():
    query, key, value, _ = draw(2, 50, 50, 128)
    mesh = sharding.make_mesh(jax.devices("cpu")[:1])
    function = functools.partial(attend, heads=2, batch_sharding=sharding.batch_sharding(mesh))
    expected, _ = dense(query, key, value, np.ones((2, 50, 50), bool), heads=2)
    np.testing.assert_allclose(function(query, key, value), expected, atol=FLOAT32_TOLERANCE)
    assert "custom_call" not in jax.jit(function).lower(query, key, value).as_text()
    expected = "XLA: the kernel needs a TPU, the platform is cpu"
    assert attention_implementation(AttentionShape(2, 64, 50), mesh, "bfloat16") == expected

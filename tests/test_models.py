"""Models: parameter counts, a NumPy reference of the forward pass, recorded embeddings, precision, batch norm."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.config import (
    MODELS,
    PREPROCESS,
    Architecture,
    Preprocess,
    ResNet,
    TextTransformer,
    ViT,
    with_activation,
)
from clip_jax.models import count_parameters, flops, make_model, matmul_precision, tree_path
from clip_jax.models.attention import short_attention
from clip_jax.models.layers import REMAT_POLICIES, Compute, Transformer
from tests import tiny_models

# Counted in the released weights of Radford et al. 2021.
PARAMETERS = {
    "rn50": 102_007_137,
    "rn101": 119_688_033,
    "rn50x4": 178_300_601,
    "rn50x16": 290_979_217,
    "rn50x64": 623_258_305,
    "vit_b32": 151_277_313,
    "vit_b16": 149_620_737,
    "vit_l14": 427_616_513,
    "vit_l14_336": 427_944_193,
}

SMALL = Architecture(ViT(16, 8, 32, 3, 2), TextTransformer(64, 8, 63, width=32, layers=3, heads=2), 16)
# Six layer norms and three blocks in float32, compared with float64.
FORWARD_TOLERANCE = 2e-5
PEERS_TOLERANCE = 1e-6  # for unit vectors: float32 sums in another order


@pytest.fixture(scope="module")
def params():
    return _init(make_model(SMALL))


def _init(model):
    return jax.jit(model.init)(jax.random.key(0, impl="rbg"))  # compiles ten times faster than the default generator


def _inputs(rows: int = 3):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8)
    text = rng.integers(1, 63, (rows, 8)).astype(np.int32)
    text[np.arange(rows), rng.integers(2, 8, rows)] = 63
    return image, text


def _keys(seed: int, rows: int):
    return jax.random.split(jax.random.key(seed), rows)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_papers(name):
    shapes = jax.eval_shape(make_model(MODELS[name]).init, jax.random.key(0))
    assert count_parameters(shapes) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_embeddings_equal_a_numpy_reference(params, activation):
    architecture = with_activation(SMALL, activation)
    model = make_model(architecture)
    image, text = _inputs()
    reference = _Numpy(params, architecture)
    np.testing.assert_allclose(model.encode_image(params, image), reference.image(image), atol=FORWARD_TOLERANCE)
    np.testing.assert_allclose(model.encode_text(params, text), reference.text(text), atol=FORWARD_TOLERANCE)


def test_tokens_after_the_end_token_have_no_effect(params):
    _, text = _inputs()
    changed = text.copy()
    for row in changed:
        row[list(row).index(63) + 1 :] = 5
    model = make_model(SMALL)
    np.testing.assert_array_equal(model.encode_text(params, text), model.encode_text(params, changed))


@pytest.mark.slow
def test_text_is_pooled_at_the_first_end_token(params):
    model = make_model(SMALL)
    one, two = np.full((2, 1, 8), 3, np.int32)
    one[0, 4] = two[0, 4] = two[0, 7] = 63
    np.testing.assert_array_equal(model.encode_text(params, one), model.encode_text(params, two))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialization_does_not_change_gradients(params, remat):
    image, _ = _inputs()

    def gradient(policy: str):
        model = make_model(SMALL, remat=policy)
        return jax.jit(jax.grad(lambda params: model.encode_image(params, image)[0, 0]))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(remat), gradient("none"))


def _transformer(layers: int, **compute: object) -> Transformer:
    config = TextTransformer(64, 8, 63, width=32, layers=layers, heads=2, layer_scale=0.5)
    return Transformer(config, True, Compute(**compute))


def _first_two(x_BLD):
    return x_BLD[:, :2].reshape(-1, x_BLD.shape[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "unroll", "remat"),
    [*((4, False, remat) for remat in REMAT_POLICIES), (4, True, "names"), (1, False, "none")],
)
def test_last_block_of_the_pooled_positions_equals_the_full_block(layers, unroll, remat):
    """The reference computes all blocks at all positions, in float64."""
    with jax.enable_x64(True):
        x_BLD = jax.random.normal(jax.random.key(1), (3, 8, 32), jnp.float64)
        pooled = _transformer(layers, dtype=jnp.dtype("float64"), unroll=unroll, remat=remat)
        params = pooled.init(jax.random.key(0), x_BLD, pool=_first_two)
        noise = jax.random.normal(jax.random.key(2), (6, 32), jnp.float64)

        def full(params, x_BLD):
            return (_first_two(pooled.apply(params, x_BLD)) * noise).sum()

        def pooled_last(params, x_BLD):
            return (pooled.apply(params, x_BLD, pool=_first_two) * noise).sum()

        found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, x_BLD) for f in (pooled_last, full))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)
        saved = flops.count(full, params, x_BLD) - flops.count(pooled_last, params, x_BLD)
        assert saved == 2 * (3 * 8 - 6) * 9 * 32**2  # projection and MLP at positions that are not pooled


@pytest.mark.parametrize("remat", ["dots", "names", "full"])
def test_scan_over_blocks_does_not_copy_the_stacked_parameters(remat):
    """In the forward pass and in the backward pass, where each layer's gradient is written in place."""
    transformer, x_BLD = _transformer(24, remat=remat), jnp.ones((1, 2, 32))
    params = jax.eval_shape(transformer.init, jax.random.key(0), x_BLD)
    gradient = jax.grad(lambda params, x_BLD: transformer.apply(params, x_BLD, pool=_first_two).sum())
    memory = jax.jit(gradient).lower(params, x_BLD).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.6 * memory.output_size_in_bytes


# ------------------------------------------------------------------------------------------------- initialization

# Standard deviations; 0 and 1 are constants. `w`: width of the tower or of a ResNet's pooling, `layers`: its blocks,
# `fan_in`: inputs of one output. openai/CLIP `clip/model.py`, `initialize_parameters` and the constructors of
# `VisionTransformer` and `AttentionPool2d`; blocks of the image tower as those of the text tower. Two choices are not
# OpenAI's, which leaves them to torch's defaults: biases are 0 instead of uniform, and convolutions, before a norm that
# removes their scale, have variance 1 / fan_in instead of 1 / (3 fan_in).
INITIALIZATION = {
    r"logit_scale": lambda **_: math.log(1 / 0.07),
    r"logit_bias": lambda **_: -10.0,
    r"text/token_embedding/embedding": lambda **_: 0.02,
    r"text/positional_embedding": lambda **_: 0.01,
    r"(text|image)/projection": lambda w, **_: w**-0.5,
    r"image/(pool/)?positional_embedding|image/class_embedding|image/pool/probe": lambda w, **_: w**-0.5,
    r".*/(query|key|value)/kernel": lambda w, **_: w**-0.5,
    r".*/blocks/attention/out/kernel": lambda w, layers, **_: w**-0.5 * (2 * layers) ** -0.5,
    r".*/mlp/in/kernel": lambda w, **_: (2 * w) ** -0.5,
    r".*/blocks/mlp/out/kernel": lambda w, layers, **_: w**-0.5 * (2 * layers) ** -0.5,
    r"image/pool/(out|mlp/out|projection)/kernel": lambda w, **_: w**-0.5,
    r"image/(patch_embedding|.*conv\d?/kernel)": lambda fan_in, **_: fan_in**-0.5,
    r"image/stage\d_\w+/norm3/scale": lambda **_: 0.0,
    r"(?!.*stage\d_\w+/norm3/).*norm\w*/scale": lambda **_: 1.0,
    r".*layer_scale\d": lambda **_: 0.5,  # the config's
    r"(?!logit_).*bias": lambda **_: 0.0,
    r"batch_stats/.*/mean": lambda **_: 0.0,
    r"batch_stats/.*/var": lambda **_: 1.0,
}
CONSTANTS = r"logit_scale|.*bias|.*(norm\w*/scale|layer_scale\d|/mean|/var)"


@pytest.mark.parametrize("name", ["vit", "layer_scale", "resnet", "clipa", "siglip"])
def test_every_parameter_is_initialized_as_openai_does(name):
    """Constants are exact; the sample variance of n normal values is within 6 of its standard errors, (2 / n)^0.5."""
    architecture = tiny_models.ARCHITECTURES[name]
    widths = {"text": architecture.text.width, "image": getattr(architecture.image, "width", 0)}
    if name == "resnet":
        widths["image"] <<= 5  # of the pooling: four stages of four times the width
    for path, leaf in jax.tree_util.tree_leaves_with_path(_init(make_model(architecture))):
        full, x = tree_path(path), np.asarray(leaf, np.float64)
        rows = [row for row in INITIALIZATION if re.fullmatch(row, full)]
        assert len(rows) == 1, (full, rows)
        stacked = re.search(r"/blocks/|_rest/", full) is not None
        layers = getattr(getattr(architecture, full.split("/")[0], None), "layers", 0)
        fan_in = math.prod(x.shape[stacked:-1])
        expected = INITIALIZATION[rows[0]](w=widths.get(full.split("/")[0]), layers=layers, fan_in=fan_in)
        if re.fullmatch(CONSTANTS, full):
            np.testing.assert_allclose(x, expected, rtol=1e-6, err_msg=full)
            continue
        assert abs(x.mean()) < 6 * expected / x.size**0.5, full
        assert abs((x**2).mean() / expected**2 - 1) < 6 * (2 / x.size) ** 0.5, full
        if stacked and len(x) > 1:
            assert abs(np.corrcoef(x[0].ravel(), x[1].ravel())[0, 1]) < 6 / x[0].size ** 0.5, full  # layers differ


@pytest.mark.parametrize("scale", [1 / 0.07, 10.0])
def test_logit_scale_has_its_initial_value(scale):
    model = make_model(MODELS["emoji"], logit_scale_init=scale)
    np.testing.assert_allclose(jnp.exp(_init(model)["logit_scale"]), scale, rtol=1e-6)


def test_pixels_are_normalized_with_mean_and_std_of_the_preprocessing(params):
    image, _ = _inputs()
    white = make_model(SMALL, Preprocess(mean=(1.0, 1.0, 1.0), std=(0.5, 0.5, 0.5)))
    black = make_model(SMALL, Preprocess(mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5)))
    np.testing.assert_allclose(
        white.encode_image(params, np.full_like(image, 255)),
        black.encode_image(params, np.zeros_like(image)),
        atol=1e-6,
    )


def test_pixels_of_a_partial_patch_are_ignored():
    image = ViT(18, 8, 32, 2, 2, pool="attention", norm_pre=False, patch_bias=True, projection=False)
    architecture = Architecture(image, SMALL.text, 32)
    model = make_model(architecture)
    params = _init(model)
    assert params["image"]["positional_embedding"].shape == (4, 32)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 18, 18, 3), dtype=np.uint8)
    changed = pixels.copy()
    changed[:, 16:], changed[:, :, 16:] = 0, 0
    encode = jax.jit(model.encode_image)
    np.testing.assert_array_equal(encode(params, pixels), encode(params, changed))


@pytest.mark.slow
def test_patch_dropout_drops_its_fraction_in_training_only(params):
    image, _ = _inputs()
    model, dropping = make_model(SMALL), make_model(SMALL, patch_dropout=0.5)
    np.testing.assert_array_equal(dropping.encode_image(params, image), model.encode_image(params, image))
    # With two of four patches kept, the embedding depends on the positions of two patches and the class token.
    position_gradient = jax.grad(
        lambda positions_LD, key_B: dropping.encode_image_train(
            params | {"image": params["image"] | {"positional_embedding": positions_LD}}, image[:1], key_B
        )[0][0, 0]
    )
    gradient = position_gradient(params["image"]["positional_embedding"], _keys(3, 1))
    assert [bool(np.any(row)) for row in gradient[1:]].count(True) == 2 and np.any(gradient[0])
    first, again, other = (dropping.encode_image_train(params, image, _keys(seed, 3))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny_models.ARCHITECTURES if name != "siglip_timm"])
def test_embeddings_equal_those_of_open_clip_and_transformers(name):
    """Recorded by golden/make_features.py; the weights are drawn from seeds."""
    golden = np.load(pathlib.Path(__file__).parent / "golden/features.npz")
    architecture = tiny_models.ARCHITECTURES[name]
    params, (pixels, tokens) = tiny_models.params(architecture), tiny_models.inputs(architecture)
    model = make_model(architecture, PREPROCESS["siglip" if architecture.logit_bias else "openai"])  # as recorded
    np.testing.assert_allclose(
        jax.jit(model.encode_image)(params, pixels), golden[f"{name}/image"], atol=PEERS_TOLERANCE
    )
    np.testing.assert_allclose(jax.jit(model.encode_text)(params, tokens), golden[f"{name}/text"], atol=PEERS_TOLERANCE)


def _precisions(jaxpr) -> set:
    """Return the precisions of all matmuls and convolutions in a jaxpr, inner jaxprs included."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.add(equation.params["precision"])
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    found |= _precisions(getattr(inner, "jaxpr", inner))
    return found


FLOAT32 = (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "resnet", "siglip", "emoji"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_matmuls_have_float32_precision_in_both_passes(name, dtype):
    """XLA's default for float32 is one bfloat16 pass on TPUs."""
    architecture = MODELS["emoji"] if name == "emoji" else tiny_models.ARCHITECTURES[name]
    model = make_model(architecture, dtype=dtype, remat="full", text_capacity=0.5)
    params = jax.eval_shape(model.init, jax.random.key(0))
    image, text = tiny_models.inputs(architecture, rows=4)
    keys = jax.eval_shape(lambda: _keys(0, 4))

    def objective(params, keys):
        return model.encode_image_train(params, image, keys)[0].sum() + model.encode_text_train(params, text)[0].sum()

    found = _precisions(jax.make_jaxpr(jax.grad(objective))(params, keys).jaxpr)
    assert found == {FLOAT32} if dtype == "float32" else FLOAT32 not in found
    assert matmul_precision(dtype) == ("float32" if dtype == "float32" else None)


def test_float32_kernel_has_float32_precision():
    query = jnp.ones((1, 8, 128))
    f = lambda *x: short_attention(*x, head_dim=64, interpret=True).sum()  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(f, argnums=(0, 1, 2)))(query, query, query).jaxpr
    assert _precisions(jaxpr) == {FLOAT32}


TINY_RESNET = Architecture(ResNet(64, 8, (2, 1, 1, 1), 4), SMALL.text, 16)


def test_running_statistics_are_updated_as_in_torch():
    """A tenth of the new value is added, and the variance of the batch is multiplied by n / (n - 1)."""
    model = make_model(TINY_RESNET)
    params = _init(model)
    image = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    _, stats = jax.jit(model.encode_image_train)(params, image, _keys(0, 4))
    spec = Preprocess()
    pixels = (image / 255 - np.array(spec.mean)) / np.array(spec.std)
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params["image"]["stem_conv1"]["kernel"], np.float64)
    windows = np.stack([padded[:, y : y + 63 : 2, x : x + 63 : 2] for y in range(3) for x in range(3)], axis=3)
    convolved = np.einsum("bhwpc,pcd->bhwd", windows, kernel.reshape(9, 3, -1)).reshape(-1, 4)
    found = stats["image"]["stem_norm1"]
    np.testing.assert_allclose(found["mean"], 0.1 * convolved.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * convolved.var(0, ddof=1), rtol=1e-5)


@pytest.mark.slow
def test_inference_uses_the_running_statistics():
    model = make_model(TINY_RESNET)
    params = _init(model)
    image = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    _, stats = jax.jit(model.encode_image_train)(params, image, _keys(0, 4))
    encode = jax.jit(model.encode_image)
    before, after = (encode(params | {"batch_stats": s}, image) for s in (params["batch_stats"], stats))
    assert np.abs(before - after).max() > 1e-4
    np.testing.assert_allclose(encode(params, image[:1]), before[:1], atol=1e-5)


class _Numpy:
    """Reference of CLIP in float64 NumPy, after figure 3 and section 2.4 of the paper."""

    def __init__(self, params, architecture: Architecture):
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.architecture = architecture

    def image(self, image: np.ndarray) -> np.ndarray:
        params, tower, spec = self.params["image"], self.architecture.image, Preprocess()
        pixels = (image / 255 - np.array(spec.mean)) / np.array(spec.std)
        p, rows = tower.patch_size, []
        for pixels_HWC in pixels:
            patches = [
                np.einsum("hwc,hwcd->d", pixels_HWC[y : y + p, x : x + p], params["patch_embedding"])
                for y in range(0, tower.image_size, p)
                for x in range(0, tower.image_size, p)
            ]
            x = np.stack([params["class_embedding"], *patches]) + params["positional_embedding"]
            x = self._blocks(self._norm(x, params["norm_pre"]), params, tower, causal=False)
            rows.append(self._norm(x[0], params["norm_post"]) @ params["projection"])
        return self._unit(rows)

    def text(self, text: np.ndarray) -> np.ndarray:
        params, tower = self.params["text"], self.architecture.text
        rows = []
        for tokens in text:
            x = params["token_embedding"]["embedding"][tokens] + params["positional_embedding"]
            x = self._norm(self._blocks(x, params, tower, causal=True), params["norm_final"])
            rows.append(x[list(tokens).index(tower.eos_id)] @ params["projection"])
        return self._unit(rows)

    def _blocks(self, x, params, tower, causal: bool):
        for layer in range(tower.layers):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["transformer"]["blocks"])
            x = x + self._attention(self._norm(x, block["norm1"]), block["attention"], causal)
            hidden = self._norm(x, block["norm2"]) @ block["mlp"]["in"]["kernel"] + block["mlp"]["in"]["bias"]
            x = x + self._activation(hidden) @ block["mlp"]["out"]["kernel"] + block["mlp"]["out"]["bias"]
        return x

    def _attention(self, x, params, causal: bool):
        q, k, v = (
            np.einsum("ld,dnk->nlk", x, params[n]["kernel"]) + params[n]["bias"][:, None]
            for n in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        if causal:
            scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("nlk,nkd->ld", weights @ v, params["out"]["kernel"]) + params["out"]["bias"]

    def _activation(self, x):
        if self.architecture.text.activation == "quick_gelu":
            return x / (1 + np.exp(-1.702 * x))
        return np.vectorize(lambda z: z * 0.5 * (1 + math.erf(z / 2**0.5)))(x)

    @staticmethod
    def _norm(x, params):
        centered = x - x.mean(-1, keepdims=True)
        return centered / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * params["scale"] + params["bias"]

    @staticmethod
    def _unit(rows):
        rows = np.stack(rows)
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

"""Small models of each family, with weights and inputs drawn by NumPy, for comparisons with other libraries."""

import math

import jax
import numpy as np

from clip_jax.config import (
    Architecture,
    EdgeNet,
    ResNet,
    TextTransformer,
    ViT,
    WeightsConfig,
    siglip_image,
    with_activation,
)
from clip_jax.interop import msgpack
from clip_jax.models import make_model

_TEXT = TextTransformer(width=64, heads=1, layers=2)
_SMALL_TEXT = TextTransformer(600, 16, 599, width=64, heads=1, layers=2)
_CLIPA_TEXT = TextTransformer(160, 16, 1, width=64, heads=1, layers=2, causal=False, pool="last")
_IMAGE = ViT(64, 16, 128, 2, 2)
_SIGLIP_TEXT = TextTransformer(
    160, 16, 1, width=128, heads=2, layers=2, causal=False, pool="last", norm_epsilon=1e-6, projection="bias"
)

ARCHITECTURES = {
    "vit": Architecture(_IMAGE, _TEXT, 32),  # with CLIP's full vocabulary, for the tokenizers
    "vit_gelu": with_activation(Architecture(_IMAGE, _SMALL_TEXT, 32), "gelu"),
    "layer_scale": with_activation(
        Architecture(
            ViT(64, 16, 128, 2, 4, mlp_ratio=3.7, layer_scale=0.5),
            TextTransformer(600, 16, 599, 64, 2, 1, layer_scale=0.5),
            32,
        ),
        "gelu",
    ),
    "resnet": Architecture(ResNet(64, 16, (2, 1, 2, 1), 8), _SMALL_TEXT, 32),
    "clipa": with_activation(
        Architecture(ViT(64, 16, 128, 2, 2, norm_pre=False, pool="mean"), _CLIPA_TEXT, 32), "gelu"
    ),
    "siglip": with_activation(
        Architecture(
            ViT(
                64,
                16,
                128,
                2,
                2,
                pool="attention",
                norm_pre=False,
                norm_epsilon=1e-6,
                patch_bias=True,
                projection=False,
            ),
            _SIGLIP_TEXT,
            128,
            logit_bias=True,
        ),
        "gelu_tanh",
    ),
    # timm has no smaller SigLIP towers than this.
    "siglip_timm": Architecture(
        siglip_image(224, 16, 768, "gelu"),
        TextTransformer(160, 16, 1, 768, 1, 12, False, "last", "bias", activation="gelu", norm_epsilon=1e-6),
        768,
        logit_bias=True,
    ),
}


EDGENET = Architecture(
    EdgeNet(image_size=16, width=8),
    TextTransformer(vocab_size=600, context_length=12, eos_id=599, width=32, layers=1, heads=2),
    embed_dim=8,
)


def write_edgenet(path):
    """Write a msgpack file of EDGENET with normally distributed parameters; return the path."""
    shapes = jax.eval_shape(make_model(EDGENET).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes)
    msgpack.write(path, params, WeightsConfig(EDGENET))
    return path


def params(architecture, seed=0):
    """Return float32 parameters, batch statistics included, that keep activations near 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if name == "logit_scale":
            return np.array(2.5, np.float32)
        if name.endswith("/var"):
            return 0.5 + np.abs(noise)
        if name.endswith(("scale", "layer_scale1", "layer_scale2")):
            return (0.3 if "_rest/norm3" in name or "first/norm3" in name else 1.0) + 0.1 * noise
        if name.endswith(("bias", "mean", "embedding", "positional_embedding", "class_embedding", "probe")):
            return 0.1 * noise
        # Unit variance in, unit variance out: with larger weights, rounding in deep towers exceeds 1e-6.
        shape = leaf.shape[1:] if "/blocks/" in name or "_rest/" in name else leaf.shape
        outputs = 2 if name.endswith(("query/kernel", "key/kernel", "value/kernel")) else 1
        return noise * np.float32(math.prod(shape[:-outputs]) ** -0.5)

    shapes = jax.eval_shape(make_model(architecture).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def inputs(architecture, rows=3, seed=0):
    """Return uint8 images and token ids; each text has its end token at another position."""
    rng, image, text = np.random.default_rng([seed, 1]), architecture.image, architecture.text
    # Coarse blocks, because average pooling removes noise; noise, because equal patches are on the same side of a ReLU,
    # and rounding would flip all of them at once.
    coarse, repeat = rng.integers(20, 236, (rows, 4, 4, 3)), image.image_size // 4
    pixels = coarse.repeat(repeat, axis=1).repeat(repeat, axis=2)
    pixels = (pixels + rng.integers(-20, 20, pixels.shape)).astype(np.uint8)
    tokens = rng.integers(3, min(text.vocab_size, 40_000) - 2, (rows, text.context_length)).astype(np.int32)
    for row, ids in enumerate(tokens):
        end = 4 + 3 * row % (text.context_length - 4)
        ids[end], ids[end + 1 :] = text.eos_id, 0
    return pixels, tokens

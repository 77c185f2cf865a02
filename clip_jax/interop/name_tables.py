"""Name tables: where other libraries store each parameter. One table per naming, used to read and to write.

A table maps clip_jax paths, those of the tree that `Model.init` returns, to tensors of a file. Parameters of blocks are
stacked over layers in clip_jax and are one tensor per layer in a file. A table covers all parameters that models with
this naming can have. To read the weights of a new tower, add its paths to a table, or add a `Naming`.

Sources: openai/CLIP `clip/model.py`; open_clip `model.py`; transformers `modeling_clip.py`, `modeling_siglip.py`; timm
`vision_transformer.py`, `attention_pool.py`; big_vision `models/vit.py`, `models/proj/image_text/text_transformer.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The tensor of a file that stores a parameter."""

    name: str  # `{}` is the layer
    transposed: bool = False  # torch layout: matrix (out, in), convolution (out, in, height, width)
    chunk: tuple[int, int] = (0, 1)  # (i, n): chunk i of n along axis 0, e.g. of fused query, key, value
    leading_axes: int = 0  # axes of length 1 before the parameter's
    first_layer: int = 0  # index of the first layer
    merged_heads: bool = False  # heads and head dimension in one axis, as in all transposed matrices


Table = dict[str, Tensor]


def _norm(path: str, source: str, first: int = 0) -> Table:
    leaves = {"scale": "weight", "bias": "bias"}
    return {f"{path}/{leaf}": Tensor(f"{source}.{name}", first_layer=first) for leaf, name in leaves.items()}


def _batch_norm(path: str, source: str, first: int = 0) -> Table:
    stats = {"mean": "running_mean", "var": "running_var"}
    leaves = {f"batch_stats/{path}/{leaf}": f"{source}.{name}" for leaf, name in stats.items()}
    return _norm(path, source, first) | {leaf: Tensor(name, first_layer=first) for leaf, name in leaves.items()}


def _dense(path: str, source: str, first: int = 0) -> Table:
    """Linear layer or convolution of torch."""
    kernel = Tensor(f"{source}.weight", transposed=True, first_layer=first)
    return {f"{path}/kernel": kernel, f"{path}/bias": Tensor(f"{source}.bias", first_layer=first)}


def _fused(path: str, names: tuple[str, ...], source: str, separator: str = ".") -> Table:
    """Several layers, e.g. query, key and value, that torch fuses into one."""
    table: Table = {}
    for number, name in enumerate(names):
        chunk = (number, len(names))
        table[f"{path}/{name}/kernel"] = Tensor(f"{source}{separator}weight", transposed=True, chunk=chunk)
        table[f"{path}/{name}/bias"] = Tensor(f"{source}{separator}bias", chunk=chunk)
    return table


_QKV = ("query", "key", "value")
_SCALARS = {name: Tensor(name) for name in ("logit_scale", "logit_bias")}


def _openai_blocks(tower: str, prefix: str) -> Table:
    path, source = f"{tower}/transformer/blocks", f"{prefix}transformer.resblocks.{{}}"
    return (
        _fused(f"{path}/attention", _QKV, f"{source}.attn.in_proj", "_")
        | _dense(f"{path}/attention/out", f"{source}.attn.out_proj")
        | _norm(f"{path}/norm1", f"{source}.ln_1")
        | _norm(f"{path}/norm2", f"{source}.ln_2")
        | _dense(f"{path}/mlp/in", f"{source}.mlp.c_fc")
        | _dense(f"{path}/mlp/out", f"{source}.mlp.c_proj")
        | {f"{path}/layer_scale{n}": Tensor(f"{source}.ls_{n}.gamma") for n in (1, 2)}
    )


def _bottleneck(path: str, source: str, first: int = 0) -> Table:
    table: Table = {}
    for number in (1, 2, 3):
        table |= _dense(f"{path}/conv{number}", f"{source}.conv{number}", first)
        table |= _batch_norm(f"{path}/norm{number}", f"{source}.bn{number}", first)
    table |= _dense(f"{path}/shortcut_conv", f"{source}.downsample.0", first)
    return table | _batch_norm(f"{path}/shortcut_norm", f"{source}.downsample.1", first)


def _openai_resnet() -> Table:
    table: Table = {"image/pool/positional_embedding": Tensor("visual.attnpool.positional_embedding")}
    for number in (1, 2, 3):
        table |= _dense(f"image/stem_conv{number}", f"visual.conv{number}")
        table |= _batch_norm(f"image/stem_norm{number}", f"visual.bn{number}")
    for stage in range(4):
        table |= _bottleneck(f"image/stage{stage}_first", f"visual.layer{stage + 1}.0")
        table |= _bottleneck(f"image/stage{stage}_rest", f"visual.layer{stage + 1}.{{}}", first=1)
    for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("projection", "c")):
        table |= _dense(f"image/pool/{name}", f"visual.attnpool.{letter}_proj")
    return table


_OPENAI_TEXT = (
    {"text/token_embedding/embedding": Tensor("token_embedding.weight")}
    | {"text/positional_embedding": Tensor("positional_embedding")}
    | _openai_blocks("text", "")
    | _norm("text/norm_final", "ln_final")
)

# OpenAI and open_clip's own towers.
OPENAI: Table = (
    _SCALARS
    | _OPENAI_TEXT
    | {"text/projection": Tensor("text_projection")}
    | {"image/patch_embedding": Tensor("visual.conv1.weight", transposed=True)}
    | {f"image/{name}": Tensor(f"visual.{name}") for name in ("class_embedding", "positional_embedding")}
    | _norm("image/norm_pre", "visual.ln_pre")
    | _openai_blocks("image", "visual.")
    | _norm("image/norm_post", "visual.ln_post")
    | {"image/projection": Tensor("visual.proj")}
    | _openai_resnet()
)


def _timm_image() -> Table:
    path, block, pool = "image/transformer/blocks", "visual.trunk.blocks.{}", "visual.trunk.attn_pool"
    return (
        {"image/patch_embedding": Tensor("visual.trunk.patch_embed.proj.weight", transposed=True)}
        | {"image/patch_bias": Tensor("visual.trunk.patch_embed.proj.bias")}
        | {"image/positional_embedding": Tensor("visual.trunk.pos_embed", leading_axes=1)}
        | _norm(f"{path}/norm1", f"{block}.norm1")
        | _fused(f"{path}/attention", _QKV, f"{block}.attn.qkv")
        | _dense(f"{path}/attention/out", f"{block}.attn.proj")
        | _norm(f"{path}/norm2", f"{block}.norm2")
        | _dense(f"{path}/mlp/in", f"{block}.mlp.fc1")
        | _dense(f"{path}/mlp/out", f"{block}.mlp.fc2")
        | _norm("image/norm_post", "visual.trunk.norm")
        | {"image/pool/probe": Tensor(f"{pool}.latent", leading_axes=2)}
        | _dense("image/pool/query", f"{pool}.q")
        | _fused("image/pool", ("key", "value"), f"{pool}.kv")
        | _dense("image/pool/out", f"{pool}.proj")
        | _norm("image/pool/norm", f"{pool}.norm")
        | _dense("image/pool/mlp/in", f"{pool}.mlp.fc1")
        | _dense("image/pool/mlp/out", f"{pool}.mlp.fc2")
    )


# open_clip SigLIP: timm's image tower, open_clip's text tower under `text.`.
OPEN_CLIP_SIGLIP: Table = (
    _SCALARS
    | {path: dataclasses.replace(tensor, name=f"text.{tensor.name}") for path, tensor in _OPENAI_TEXT.items()}
    | {"text/projection": Tensor("text.text_projection.weight", transposed=True)}
    | {"text/projection_bias": Tensor("text.text_projection.bias")}
    | _timm_image()
)


def _huggingface_tower(tower: str, source: str) -> Table:
    path, layer = f"{tower}/transformer/blocks", f"{source}.encoder.layers.{{}}"
    table: Table = {}
    for name in _QKV:
        table |= _dense(f"{path}/attention/{name}", f"{layer}.self_attn.{name[0]}_proj")
    return (
        table
        | _dense(f"{path}/attention/out", f"{layer}.self_attn.out_proj")
        | _norm(f"{path}/norm1", f"{layer}.layer_norm1")
        | _norm(f"{path}/norm2", f"{layer}.layer_norm2")
        | _dense(f"{path}/mlp/in", f"{layer}.mlp.fc1")
        | _dense(f"{path}/mlp/out", f"{layer}.mlp.fc2")
        | {f"{tower}/positional_embedding": Tensor(f"{source}.embeddings.position_embedding.weight")}
    )


_HUGGINGFACE_TOWERS = (
    _huggingface_tower("image", "vision_model")
    | _huggingface_tower("text", "text_model")
    | {"image/patch_embedding": Tensor("vision_model.embeddings.patch_embedding.weight", transposed=True)}
    | _norm("image/norm_post", "vision_model.post_layernorm")
    | {"text/token_embedding/embedding": Tensor("text_model.embeddings.token_embedding.weight")}
    | _norm("text/norm_final", "text_model.final_layer_norm")
)

HUGGINGFACE: Table = (
    _SCALARS
    | _HUGGINGFACE_TOWERS
    | {"image/class_embedding": Tensor("vision_model.embeddings.class_embedding")}
    | _norm("image/norm_pre", "vision_model.pre_layrnorm")  # transformers' spelling
    | {"image/projection": Tensor("visual_projection.weight", transposed=True)}
    | {"text/projection": Tensor("text_projection.weight", transposed=True)}
)

HUGGINGFACE_SIGLIP: Table = (
    {name: Tensor(name, leading_axes=1) for name in _SCALARS}
    | _HUGGINGFACE_TOWERS
    | {"image/patch_bias": Tensor("vision_model.embeddings.patch_embedding.bias")}
    | {"image/pool/probe": Tensor("vision_model.head.probe", leading_axes=2)}
    | _fused("image/pool", _QKV, "vision_model.head.attention.in_proj", "_")
    | _dense("image/pool/out", "vision_model.head.attention.out_proj")
    | _norm("image/pool/norm", "vision_model.head.layernorm")
    | _dense("image/pool/mlp/in", "vision_model.head.mlp.fc1")
    | _dense("image/pool/mlp/out", "vision_model.head.mlp.fc2")
    | {"text/projection": Tensor("text_model.head.weight", transposed=True)}
    | {"text/projection_bias": Tensor("text_model.head.bias")}
)


def _in_flax(tensor: Tensor, path: str) -> Tensor:
    leaf, name = path.rpartition("/")[2], tensor.name
    if name.endswith(".weight"):
        leaf = leaf if leaf in ("scale", "embedding") else "kernel"
        leaf = "embedding" if "position_embedding" in name else leaf
        name = name.removesuffix("weight") + leaf
    return dataclasses.replace(tensor, name=name, transposed=False, merged_heads=tensor.transposed)


# Hugging Face's former `flax_model.msgpack`, nested keys joined by dots.
HUGGINGFACE_FLAX: Table = {path: _in_flax(tensor, path) for path, tensor in HUGGINGFACE.items()}


def _unchanged(path: str, source: str, leaves: tuple[str, ...] = ("kernel", "bias")) -> Table:
    return {f"{path}/{leaf}": Tensor(f"{source}/{leaf}") for leaf in leaves}


def _big_vision_tower(tower: str, source: str) -> Table:
    path, layer, norm = f"{tower}/transformer/blocks", f"{source}/encoderblock_{{}}", ("scale", "bias")
    table: Table = {}
    for name in (*_QKV, "out"):
        table |= _unchanged(f"{path}/attention/{name}", f"{layer}/MultiHeadDotProductAttention_0/{name}")
    return (
        table
        | _unchanged(f"{path}/norm1", f"{layer}/LayerNorm_0", norm)
        | _unchanged(f"{path}/norm2", f"{layer}/LayerNorm_1", norm)
        | _unchanged(f"{path}/mlp/in", f"{layer}/MlpBlock_0/Dense_0")
        | _unchanged(f"{path}/mlp/out", f"{layer}/MlpBlock_0/Dense_1")
    )


def _big_vision() -> Table:
    pool, head, norm = "image/pool", "img/MAPHead_0", ("scale", "bias")
    table = _big_vision_tower("image", "img/Transformer") | _big_vision_tower("text", "txt/Encoder_0")
    for name in (*_QKV, "out"):
        table |= _unchanged(f"{pool}/{name}", f"{head}/MultiHeadDotProductAttention_0/{name}")
    return (
        table
        | {"logit_scale": Tensor("t", leading_axes=1), "logit_bias": Tensor("b", leading_axes=1)}
        | {"image/class_embedding": Tensor("img/cls", leading_axes=2)}  # LiT
        | {"image/patch_embedding": Tensor("img/embedding/kernel")}
        | {"image/patch_bias": Tensor("img/embedding/bias")}
        | {"image/positional_embedding": Tensor("img/pos_embedding", leading_axes=1)}
        | {"text/positional_embedding": Tensor("txt/pos_embedding", leading_axes=1)}
        | _unchanged("image/norm_post", "img/Transformer/encoder_norm", norm)
        | {f"{pool}/probe": Tensor(f"{head}/probe", leading_axes=2)}
        | _unchanged(f"{pool}/norm", f"{head}/LayerNorm_0", norm)
        | _unchanged(f"{pool}/mlp/in", f"{head}/MlpBlock_0/Dense_0")
        | _unchanged(f"{pool}/mlp/out", f"{head}/MlpBlock_0/Dense_1")
        | {"text/token_embedding/embedding": Tensor("txt/Embed_0/embedding")}
        | _unchanged("text/norm_final", "txt/Encoder_0/encoder_norm", norm)
        | {"text/projection": Tensor("txt/head/kernel"), "text/projection_bias": Tensor("txt/head/bias")}
    )


BIG_VISION: Table = _big_vision()


@dataclasses.dataclass(frozen=True)
class Naming:
    """A library's naming of tensors and the defaults of its models without a config."""

    title: str
    table: Table
    markers: tuple[str, ...]  # a file with one of these tensors has this naming
    prefix: str = ""  # removed from the names
    activation: str = ""  # of all models with this naming; empty: unknown
    siglip: bool = False  # text tower and preprocessing of SigLIP, even without logit bias (LiT)


NAMINGS = (
    Naming("OpenAI", OPENAI, ("visual.conv1.weight",), prefix="text."),  # open_clip's custom_text adds `text.`
    Naming("open_clip SigLIP", OPEN_CLIP_SIGLIP, ("visual.trunk.attn_pool.latent",)),
    Naming("Hugging Face SigLIP", HUGGINGFACE_SIGLIP, ("vision_model.head.probe",)),
    Naming("Hugging Face", HUGGINGFACE, ("vision_model.embeddings.patch_embedding.weight",)),
    Naming("Hugging Face Flax", HUGGINGFACE_FLAX, ("vision_model.embeddings.patch_embedding.kernel",)),
    # gelu_tanh is the default of flax.linen.gelu.
    Naming("big_vision", BIG_VISION, ("img/embedding/kernel", "txt/Embed_0/embedding"), "params/", "gelu_tanh", True),
)
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # DistributedDataParallel, torch.compile


def detect_naming(tensors: Mapping[str, np.ndarray], file: str) -> tuple[Naming, dict[str, np.ndarray]]:
    """Return the naming of a file's tensors, and the tensors without the prefixes of wrappers and of the naming.

    Raises:
      ValueError: if no entry of `NAMINGS` matches.
    """
    unwrapped = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    for naming in NAMINGS:
        plain = {name.removeprefix(naming.prefix): tensor for name, tensor in unwrapped.items()}
        if any(marker in plain for marker in naming.markers):
            return naming, plain
    timm = next((name for name in unwrapped if name.startswith("visual.trunk.")), None)
    found = f"an unsupported timm tower ({timm})" if timm else f"names such as {', '.join(sorted(unwrapped)[:4])}"
    expected = ", ".join(naming.title for naming in NAMINGS)
    raise ValueError(f"{file}: expected tensors of CLIP, CLIPA, SigLIP or LiT by the names of {expected}, got {found}")

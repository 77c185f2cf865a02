"""What others call our parameters: one table for each naming, read in both directions.

A table maps our paths, those of the tree that `Model.init` returns, to places in a file of theirs. Parameters of blocks
that we stack are one tensor for each layer there. A table lists whatever a model may have; a model has some of it.

Sources: openai/CLIP `clip/model.py`; open_clip `model.py`; transformers `modeling_clip.py`, `modeling_siglip.py`; timm
`vision_transformer.py`, `attention_pool.py`; big_vision `models/vit.py`, `models/proj/image_text/text_transformer.py`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter lies in a file.

    name: of the tensor; `{}` stands for the layer.
    transposed: torch's layout: a matrix is (out, in), a convolution (out, in, height, width).
    part: it is the i-th of n equal parts along the tensor's first axis: torch fuses queries, keys and values.
    leading: axes of length 1 before its own.
    first: the number of the first layer of a stack.
    merged: the heads of attention lie in one axis with what each of them has, as they do where it is transposed.
    """

    name: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    leading: int = 0
    first: int = 0
    merged: bool = False


Table = dict[str, Place]


def _norm(ours: str, theirs: str, first: int = 0, scale: str = "weight") -> Table:
    places = {"scale": scale, "bias": "bias"}
    return {f"{ours}/{leaf}": Place(f"{theirs}.{name}", first=first) for leaf, name in places.items()}


def _batch_norm(ours: str, theirs: str, first: int = 0) -> Table:
    stats = {"mean": "running_mean", "var": "running_var"}
    running = {f"batch_stats/{ours}/{leaf}": Place(f"{theirs}.{name}", first=first) for leaf, name in stats.items()}
    return _norm(ours, theirs, first) | running


def _dense(ours: str, theirs: str, first: int = 0) -> Table:
    """Linear layers, and convolutions, in torch's layout."""
    kernel = Place(f"{theirs}.weight", transposed=True, first=first)
    return {f"{ours}/kernel": kernel, f"{ours}/bias": Place(f"{theirs}.bias", first=first)}


def _fused(ours: str, names: tuple[str, ...], theirs: str, separator: str = ".") -> Table:
    """Return the parts, e.g. queries, keys and values, of one linear layer."""
    table: Table = {}
    for number, name in enumerate(names):
        part = (number, len(names))
        table[f"{ours}/{name}/kernel"] = Place(f"{theirs}{separator}weight", transposed=True, part=part)
        table[f"{ours}/{name}/bias"] = Place(f"{theirs}{separator}bias", part=part)
    return table


_QKV = ("query", "key", "value")
_SCALARS = {name: Place(name) for name in ("logit_scale", "logit_bias")}


def _openai_blocks(ours: str, theirs: str) -> Table:
    ours, theirs = f"{ours}/transformer/blocks", f"{theirs}transformer.resblocks.{{}}"
    return (
        _fused(f"{ours}/attention", _QKV, f"{theirs}.attn.in_proj", "_")
        | _dense(f"{ours}/attention/out", f"{theirs}.attn.out_proj")
        | _norm(f"{ours}/norm1", f"{theirs}.ln_1")
        | _norm(f"{ours}/norm2", f"{theirs}.ln_2")
        | _dense(f"{ours}/mlp/in", f"{theirs}.mlp.c_fc")
        | _dense(f"{ours}/mlp/out", f"{theirs}.mlp.c_proj")
        | {f"{ours}/layer_scale{n}": Place(f"{theirs}.ls_{n}.gamma") for n in (1, 2)}
    )


def _bottleneck(ours: str, theirs: str, first: int = 0) -> Table:
    table: Table = {}
    for number in (1, 2, 3):
        table |= _dense(f"{ours}/conv{number}", f"{theirs}.conv{number}", first)
        table |= _batch_norm(f"{ours}/norm{number}", f"{theirs}.bn{number}", first)
    table |= _dense(f"{ours}/shortcut_conv", f"{theirs}.downsample.0", first)
    return table | _batch_norm(f"{ours}/shortcut_norm", f"{theirs}.downsample.1", first)


def _openai_resnet() -> Table:
    table: Table = {"image/pool/positional_embedding": Place("visual.attnpool.positional_embedding")}
    for number in (1, 2, 3):
        table |= _dense(f"image/stem_conv{number}", f"visual.conv{number}")
        table |= _batch_norm(f"image/stem_norm{number}", f"visual.bn{number}")
    for stage in range(4):
        table |= _bottleneck(f"image/stage{stage}_first", f"visual.layer{stage + 1}.0")
        table |= _bottleneck(f"image/stage{stage}_rest", f"visual.layer{stage + 1}.{{}}", first=1)
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("projection", "c")):
        table |= _dense(f"image/pool/{ours}", f"visual.attnpool.{theirs}_proj")
    return table


_OPENAI_TEXT = (
    {"text/token_embedding/embedding": Place("token_embedding.weight")}
    | {"text/positional_embedding": Place("positional_embedding")}
    | _openai_blocks("text", "")
    | _norm("text/norm_final", "ln_final")
)

# OpenAI's and open_clip's own towers.
OPENAI: Table = (
    _SCALARS
    | _OPENAI_TEXT
    | {"text/projection": Place("text_projection")}
    | {"image/patch_embedding": Place("visual.conv1.weight", transposed=True)}
    | {f"image/{name}": Place(f"visual.{name}") for name in ("class_embedding", "positional_embedding")}
    | _norm("image/norm_pre", "visual.ln_pre")
    | _openai_blocks("image", "visual.")
    | _norm("image/norm_post", "visual.ln_post")
    | {"image/projection": Place("visual.proj")}
    | _openai_resnet()
)


def _timm_image() -> Table:
    block, pool = "image/transformer/blocks", "image/pool"
    return (
        {"image/patch_embedding": Place("visual.trunk.patch_embed.proj.weight", transposed=True)}
        | {"image/patch_bias": Place("visual.trunk.patch_embed.proj.bias")}
        | {"image/positional_embedding": Place("visual.trunk.pos_embed", leading=1)}
        | _norm(f"{block}/norm1", "visual.trunk.blocks.{}.norm1")
        | _fused(f"{block}/attention", _QKV, "visual.trunk.blocks.{}.attn.qkv")
        | _dense(f"{block}/attention/out", "visual.trunk.blocks.{}.attn.proj")
        | _norm(f"{block}/norm2", "visual.trunk.blocks.{}.norm2")
        | _dense(f"{block}/mlp/in", "visual.trunk.blocks.{}.mlp.fc1")
        | _dense(f"{block}/mlp/out", "visual.trunk.blocks.{}.mlp.fc2")
        | _norm("image/norm_post", "visual.trunk.norm")
        | {f"{pool}/probe": Place("visual.trunk.attn_pool.latent", leading=2)}
        | _dense(f"{pool}/query", "visual.trunk.attn_pool.q")
        | _fused(pool, ("key", "value"), "visual.trunk.attn_pool.kv")
        | _dense(f"{pool}/out", "visual.trunk.attn_pool.proj")
        | _norm(f"{pool}/norm", "visual.trunk.attn_pool.norm")
        | _dense(f"{pool}/mlp/in", "visual.trunk.attn_pool.mlp.fc1")
        | _dense(f"{pool}/mlp/out", "visual.trunk.attn_pool.mlp.fc2")
    )


# open_clip's SigLIP: timm's image tower, its own text tower under `text.`.
OPEN_CLIP_SIGLIP: Table = (
    _SCALARS
    | {path: dataclasses.replace(place, name=f"text.{place.name}") for path, place in _OPENAI_TEXT.items()}
    | {"text/projection": Place("text.text_projection.weight", transposed=True)}
    | {"text/projection_bias": Place("text.text_projection.bias")}
    | _timm_image()
)


def _huggingface_tower(ours: str, theirs: str) -> Table:
    block, layer = f"{ours}/transformer/blocks", f"{theirs}.encoder.layers.{{}}"
    table: Table = {}
    for name, letter in zip(_QKV, "qkv", strict=True):
        table |= _dense(f"{block}/attention/{name}", f"{layer}.self_attn.{letter}_proj")
    return (
        table
        | _dense(f"{block}/attention/out", f"{layer}.self_attn.out_proj")
        | _norm(f"{block}/norm1", f"{layer}.layer_norm1")
        | _norm(f"{block}/norm2", f"{layer}.layer_norm2")
        | _dense(f"{block}/mlp/in", f"{layer}.mlp.fc1")
        | _dense(f"{block}/mlp/out", f"{layer}.mlp.fc2")
        | {f"{ours}/positional_embedding": Place(f"{theirs}.embeddings.position_embedding.weight")}
    )


_HUGGINGFACE_TOWERS = (
    _huggingface_tower("image", "vision_model")
    | _huggingface_tower("text", "text_model")
    | {"image/patch_embedding": Place("vision_model.embeddings.patch_embedding.weight", transposed=True)}
    | _norm("image/norm_post", "vision_model.post_layernorm")
    | {"text/token_embedding/embedding": Place("text_model.embeddings.token_embedding.weight")}
    | _norm("text/norm_final", "text_model.final_layer_norm")
)

HUGGINGFACE: Table = (
    _SCALARS
    | _HUGGINGFACE_TOWERS
    | {"image/class_embedding": Place("vision_model.embeddings.class_embedding")}
    | _norm("image/norm_pre", "vision_model.pre_layrnorm")  # so they spell it
    | {"image/projection": Place("visual_projection.weight", transposed=True)}
    | {"text/projection": Place("text_projection.weight", transposed=True)}
)

HUGGINGFACE_SIGLIP: Table = (
    {name: Place(name, leading=1) for name in _SCALARS}
    | _HUGGINGFACE_TOWERS
    | {"image/patch_bias": Place("vision_model.embeddings.patch_embedding.bias")}
    | {"image/pool/probe": Place("vision_model.head.probe", leading=2)}
    | _fused("image/pool", _QKV, "vision_model.head.attention.in_proj", "_")
    | _dense("image/pool/out", "vision_model.head.attention.out_proj")
    | _norm("image/pool/norm", "vision_model.head.layernorm")
    | _dense("image/pool/mlp/in", "vision_model.head.mlp.fc1")
    | _dense("image/pool/mlp/out", "vision_model.head.mlp.fc2")
    | {"text/projection": Place("text_model.head.weight", transposed=True)}
    | {"text/projection_bias": Place("text_model.head.bias")}
)


def _in_flax(place: Place, path: str) -> Place:
    leaf = path.rpartition("/")[2]
    if place.name.endswith(".weight"):
        leaf = {"kernel": "kernel", "scale": "scale", "embedding": "embedding"}.get(leaf, "kernel")
        leaf = "embedding" if "position_embedding" in place.name else leaf
        place = dataclasses.replace(place, name=place.name.removesuffix("weight") + leaf)
    return dataclasses.replace(place, transposed=False, merged=place.transposed)


# Hugging Face's former `flax_model.msgpack`, its nested keys joined by dots.
HUGGINGFACE_FLAX: Table = {path: _in_flax(place, path) for path, place in HUGGINGFACE.items()}


def _as_is(ours: str, theirs: str, leaves: tuple[str, ...] = ("kernel", "bias")) -> Table:
    return {f"{ours}/{leaf}": Place(f"{theirs}/{leaf}") for leaf in leaves}


def _big_vision_tower(ours: str, theirs: str) -> Table:
    block, layer, norm = f"{ours}/transformer/blocks", f"{theirs}/encoderblock_{{}}", ("scale", "bias")
    table: Table = {}
    for name in (*_QKV, "out"):
        table |= _as_is(f"{block}/attention/{name}", f"{layer}/MultiHeadDotProductAttention_0/{name}")
    return (
        table
        | _as_is(f"{block}/norm1", f"{layer}/LayerNorm_0", norm)
        | _as_is(f"{block}/norm2", f"{layer}/LayerNorm_1", norm)
        | _as_is(f"{block}/mlp/in", f"{layer}/MlpBlock_0/Dense_0")
        | _as_is(f"{block}/mlp/out", f"{layer}/MlpBlock_0/Dense_1")
    )


def _big_vision() -> Table:
    pool, head, norm = "image/pool", "img/MAPHead_0", ("scale", "bias")
    table = _big_vision_tower("image", "img/Transformer") | _big_vision_tower("text", "txt/Encoder_0")
    for name in (*_QKV, "out"):
        table |= _as_is(f"{pool}/{name}", f"{head}/MultiHeadDotProductAttention_0/{name}")
    return (
        table
        | {"logit_scale": Place("t", leading=1), "logit_bias": Place("b", leading=1)}
        | {"image/class_embedding": Place("img/cls", leading=2)}  # LiT's
        | {"image/patch_embedding": Place("img/embedding/kernel"), "image/patch_bias": Place("img/embedding/bias")}
        | {"image/positional_embedding": Place("img/pos_embedding", leading=1)}
        | {"text/positional_embedding": Place("txt/pos_embedding", leading=1)}
        | _as_is("image/norm_post", "img/Transformer/encoder_norm", norm)
        | {f"{pool}/probe": Place(f"{head}/probe", leading=2)}
        | _as_is(f"{pool}/norm", f"{head}/LayerNorm_0", norm)
        | _as_is(f"{pool}/mlp/in", f"{head}/MlpBlock_0/Dense_0")
        | _as_is(f"{pool}/mlp/out", f"{head}/MlpBlock_0/Dense_1")
        | {"text/token_embedding/embedding": Place("txt/Embed_0/embedding")}
        | _as_is("text/norm_final", "txt/Encoder_0/encoder_norm", norm)
        | {"text/projection": Place("txt/head/kernel"), "text/projection_bias": Place("txt/head/bias")}
    )


BIG_VISION: Table = _big_vision()

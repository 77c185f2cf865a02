"""Name tables: where other libraries store each parameter. One table per naming, used to read and to write.

A table maps clip_jax paths, those of the tree that `Model.init` returns, to tensors of a file. Parameters of blocks are
stacked over layers in clip_jax and are one tensor per layer in a file. A table covers all parameters that models with
this naming can have. To read the weights of a new tower, add its paths to a table, or a table to `NAMINGS`
(`naming.py`).

Sources: openai/CLIP `clip/model.py`; open_clip `model.py`; transformers `modeling_clip.py`, `modeling_siglip.py`; timm
`vision_transformer.py`, `attention_pool.py`; big_vision `models/vit.py`, `models/proj/image_text/text_transformer.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The tensor of a file that stores a parameter."""

    name: str  # `{}` is the layer
    transposed: bool = False  # torch layout: matrix (out, in), convolution (out, in, height, width)
    chunk: tuple[int, int] = (0, 1)  # (i, n): chunk i of n along axis 0, e.g. of fused query, key, value
    leading_axes: int = 0  # axes of length 1 before the parameter's
    first_layer: int = 0  # index of the first layer
    merged_heads: bool = False  # heads and head dimension in one axis, as in all transposed matrices

    def of_layer(self, layer: int | None) -> str:
        """Return the name of a layer's tensor. None: the parameter is not stacked over layers."""
        return self.name.format((layer or 0) + self.first_layer)


Table = dict[str, Tensor]
_QKV = ("query", "key", "value")


def _tensors(names: Mapping[str, str], path: str = "", source: str = "", **fields: Any) -> Table:
    """Single tensors: clip_jax path below `path` -> name below `source`."""
    return {f"{path}{name}": Tensor(f"{source}{other}", **fields) for name, other in names.items()}


def _layers(names: Mapping[str, str], path: str = "", source: str = "", *, first: int = 0, flax: bool = False) -> Table:
    """Linear layers, convolutions and norms: clip_jax path below `path` -> name in torch, or Flax, below `source`."""
    table: Table = {}
    for name, other in names.items():
        leaf = "scale" if "norm" in name else "kernel"
        weight, separator = (leaf, "/") if flax else ("weight", ".")
        transposed = leaf == "kernel" and not flax
        table[f"{path}{name}/{leaf}"] = Tensor(f"{source}{other}{separator}{weight}", transposed, first_layer=first)
        table[f"{path}{name}/bias"] = Tensor(f"{source}{other}{separator}bias", first_layer=first)
    return table


def _batch_norms(names: Mapping[str, str], path: str = "", source: str = "", *, first: int = 0) -> Table:
    stats = {f"{name}/mean": f"{other}.running_mean" for name, other in names.items()}
    stats |= {f"{name}/var": f"{other}.running_var" for name, other in names.items()}
    return _layers(names, path, source, first=first) | _tensors(stats, f"batch_stats/{path}", source, first_layer=first)


def _fused(path: str, names: tuple[str, ...], source: str) -> Table:
    """Several layers, e.g. query, key and value, that torch fuses into one."""
    table: Table = {}
    for number, name in enumerate(names):
        chunk = (number, len(names))
        table[f"{path}{name}/kernel"] = Tensor(f"{source}weight", transposed=True, chunk=chunk)
        table[f"{path}{name}/bias"] = Tensor(f"{source}bias", chunk=chunk)
    return table


_SCALARS = {"logit_scale": Tensor("logit_scale"), "logit_bias": Tensor("logit_bias")}


def _openai_blocks(tower: str, prefix: str) -> Table:
    path, source = f"{tower}/transformer/blocks/", f"{prefix}transformer.resblocks.{{}}."
    layers = {"attention/out": "attn.out_proj", "mlp/in": "mlp.c_fc", "mlp/out": "mlp.c_proj"}
    return (
        _fused(f"{path}attention/", _QKV, f"{source}attn.in_proj_")
        | _layers(layers | {"norm1": "ln_1", "norm2": "ln_2"}, path, source)
        | _tensors({"layer_scale1": "ls_1.gamma", "layer_scale2": "ls_2.gamma"}, path, source)
    )


def _bottleneck(path: str, source: str, first: int = 0) -> Table:
    convolutions = {"conv1": "conv1", "conv2": "conv2", "conv3": "conv3", "shortcut_conv": "downsample.0"}
    norms = {"norm1": "bn1", "norm2": "bn2", "norm3": "bn3", "shortcut_norm": "downsample.1"}
    return _layers(convolutions, path, source, first=first) | _batch_norms(norms, path, source, first=first)


def _openai_resnet() -> Table:
    pool = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": "c_proj"}
    table: Table = {"image/pool/positional_embedding": Tensor("visual.attnpool.positional_embedding")}
    table |= _layers(pool, "image/pool/", "visual.attnpool.")
    table |= _layers({f"image/stem_conv{number}": f"visual.conv{number}" for number in (1, 2, 3)})
    table |= _batch_norms({f"image/stem_norm{number}": f"visual.bn{number}" for number in (1, 2, 3)})
    for stage in range(4):
        table |= _bottleneck(f"image/stage{stage}_first/", f"visual.layer{stage + 1}.0.")
        table |= _bottleneck(f"image/stage{stage}_rest/", f"visual.layer{stage + 1}.{{}}.", first=1)
    return table


_OPENAI_TEXT = (
    {"text/token_embedding/embedding": Tensor("token_embedding.weight")}
    | {"text/positional_embedding": Tensor("positional_embedding")}
    | _openai_blocks("text", "")
    | _layers({"text/norm_final": "ln_final"})
)

# OpenAI and open_clip's own towers.
OPENAI: Table = (
    _SCALARS
    | _OPENAI_TEXT
    | {"text/projection": Tensor("text_projection"), "image/projection": Tensor("visual.proj")}
    | {"image/patch_embedding": Tensor("visual.conv1.weight", transposed=True)}
    | {f"image/{name}": Tensor(f"visual.{name}") for name in ("class_embedding", "positional_embedding")}
    | _layers({"image/norm_pre": "visual.ln_pre", "image/norm_post": "visual.ln_post"})
    | _openai_blocks("image", "visual.")
    | _openai_resnet()
)


def _timm_image() -> Table:
    path, block, pool = "image/transformer/blocks/", "visual.trunk.blocks.{}.", "visual.trunk.attn_pool."
    mlp = {"mlp/in": "mlp.fc1", "mlp/out": "mlp.fc2"}
    return (
        {"image/patch_embedding": Tensor("visual.trunk.patch_embed.proj.weight", transposed=True)}
        | {"image/patch_bias": Tensor("visual.trunk.patch_embed.proj.bias")}
        | {"image/positional_embedding": Tensor("visual.trunk.pos_embed", leading_axes=1)}
        | _fused(f"{path}attention/", _QKV, f"{block}attn.qkv.")
        | _layers(mlp | {"attention/out": "attn.proj", "norm1": "norm1", "norm2": "norm2"}, path, block)
        | _layers({"image/norm_post": "visual.trunk.norm"})
        | {"image/pool/probe": Tensor(f"{pool}latent", leading_axes=2)}
        | _fused("image/pool/", ("key", "value"), f"{pool}kv.")
        | _layers(mlp | {"query": "q", "out": "proj", "norm": "norm"}, "image/pool/", pool)
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
    layers = {f"attention/{name}": f"self_attn.{name[0]}_proj" for name in _QKV}
    layers |= {"attention/out": "self_attn.out_proj", "mlp/in": "mlp.fc1", "mlp/out": "mlp.fc2"}
    layers |= {"norm1": "layer_norm1", "norm2": "layer_norm2"}
    blocks = _layers(layers, f"{tower}/transformer/blocks/", f"{source}encoder.layers.{{}}.")
    return blocks | {f"{tower}/positional_embedding": Tensor(f"{source}embeddings.position_embedding.weight")}


_HUGGINGFACE_TOWERS = (
    _huggingface_tower("image", "vision_model.")
    | _huggingface_tower("text", "text_model.")
    | {"image/patch_embedding": Tensor("vision_model.embeddings.patch_embedding.weight", transposed=True)}
    | {"text/token_embedding/embedding": Tensor("text_model.embeddings.token_embedding.weight")}
    | _layers({"image/norm_post": "vision_model.post_layernorm", "text/norm_final": "text_model.final_layer_norm"})
)

HUGGINGFACE: Table = (
    _SCALARS
    | _HUGGINGFACE_TOWERS
    | {"image/class_embedding": Tensor("vision_model.embeddings.class_embedding")}
    | _layers({"image/norm_pre": "vision_model.pre_layrnorm"})  # transformers' spelling
    | {"image/projection": Tensor("visual_projection.weight", transposed=True)}
    | {"text/projection": Tensor("text_projection.weight", transposed=True)}
)

_SIGLIP_POOL = {"out": "attention.out_proj", "norm": "layernorm", "mlp/in": "mlp.fc1", "mlp/out": "mlp.fc2"}
HUGGINGFACE_SIGLIP: Table = (
    {name: Tensor(name, leading_axes=1) for name in _SCALARS}
    | _HUGGINGFACE_TOWERS
    | {"image/patch_bias": Tensor("vision_model.embeddings.patch_embedding.bias")}
    | {"image/pool/probe": Tensor("vision_model.head.probe", leading_axes=2)}
    | _fused("image/pool/", _QKV, "vision_model.head.attention.in_proj_")
    | _layers(_SIGLIP_POOL, "image/pool/", "vision_model.head.")
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


def _big_vision() -> Table:
    heads = (*_QKV, "out")
    attention, mlp = "MultiHeadDotProductAttention_0", {"mlp/in": "MlpBlock_0/Dense_0", "mlp/out": "MlpBlock_0/Dense_1"}
    block = mlp | {f"attention/{name}": f"{attention}/{name}" for name in heads}
    block |= {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1"}
    pool = mlp | {name: f"{attention}/{name}" for name in heads} | {"norm": "LayerNorm_0"}
    norms = {"image/norm_post": "img/Transformer/encoder_norm", "text/norm_final": "txt/Encoder_0/encoder_norm"}
    return (
        {"logit_scale": Tensor("t", leading_axes=1), "logit_bias": Tensor("b", leading_axes=1)}
        | {"image/class_embedding": Tensor("img/cls", leading_axes=2)}  # LiT
        | {"image/patch_embedding": Tensor("img/embedding/kernel"), "image/patch_bias": Tensor("img/embedding/bias")}
        | {"image/positional_embedding": Tensor("img/pos_embedding", leading_axes=1)}
        | {"text/positional_embedding": Tensor("txt/pos_embedding", leading_axes=1)}
        | _layers(block, "image/transformer/blocks/", "img/Transformer/encoderblock_{}/", flax=True)
        | _layers(block, "text/transformer/blocks/", "txt/Encoder_0/encoderblock_{}/", flax=True)
        | {"image/pool/probe": Tensor("img/MAPHead_0/probe", leading_axes=2)}
        | _layers(pool, "image/pool/", "img/MAPHead_0/", flax=True)
        | _layers(norms, flax=True)
        | {"text/token_embedding/embedding": Tensor("txt/Embed_0/embedding")}
        | {"text/projection": Tensor("txt/head/kernel"), "text/projection_bias": Tensor("txt/head/bias")}
    )


BIG_VISION: Table = _big_vision()

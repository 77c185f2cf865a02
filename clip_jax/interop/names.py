"""What others call our parameters: one table for each naming, read in both directions.

A table maps our paths, those of the tree that `Model.init` returns, to places in a file of theirs. Parameters of blocks
that we stack are one tensor for each layer there. A table lists whatever a model may have; a model has some of it.

Sources: openai/CLIP `clip/model.py`; open_clip `model.py`; transformers `modeling_clip.py`, `modeling_siglip.py`; timm
`vision_transformer.py`, `attention_pool.py`; big_vision `models/vit.py`, `models/proj/image_text/text_transformer.py`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from clip_jax.architectures import Architecture
from clip_jax.models import make_model
from clip_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter lies in a file.

    name: of the tensor; `{}` stands for the layer.
    transposed: torch's layout: a matrix is (out, in), a convolution (out, in, height, width).
    part: it is the i-th of n equal parts along the tensor's first axis: torch fuses queries, keys and values.
    leading: axes of length 1 before its own.
    first: the number of the first layer of a stack.
    """

    name: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    leading: int = 0
    first: int = 0


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
    return dataclasses.replace(place, transposed=False)


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


# ------------------------------------------------------------------------------------------------- both directions


# Ends of names that files have beside parameters: counters, masks and the like, which follow from the shapes.
IGNORED = ("position_ids", "num_batches_tracked", "attn_mask", "input_resolution", "context_length", "vocab_size")


def from_theirs(model: Architecture, tensors: Mapping[str, np.ndarray], table: Table, where: str) -> Params:
    """Return our parameters, float32, from a file's tensors.

    Args:
      where: the file's name, for errors.

    Raises:
      ValueError: naming file and tensor, what was expected and what was found; for tensors that are left over too.
    """
    used: set[str] = set()

    def take(path: str, shape: tuple[int, ...], layer: int | None) -> np.ndarray:
        place = table[path]
        name = place.name if layer is None else place.name.format(layer + place.first)
        if name not in tensors:
            raise ValueError(f"{where} has no tensor {name!r}, which the model's {path} comes from")
        tensor, expected = tensors[name], their_shape(path, shape, place)
        if _squeezed(tensor.shape) != _squeezed(expected) and _squeezed(tensor.shape) != _squeezed(shape):
            raise ValueError(f"{where}: the tensor {name} has shape {tensor.shape}, expected {expected} for {path}")
        if tensor.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise ValueError(f"{where}: the tensor {name} is {tensor.dtype}, expected floating point for {path}")
        used.add(name)
        number, parts = place.part
        rows = len(tensor) // parts if parts > 1 else 0
        return _to_ours(tensor[number * rows : (number + 1) * rows] if parts > 1 else tensor, shape, place)

    def parameter(path: str, shape: tuple[int, ...], layers: int) -> np.ndarray:
        if path not in table:
            raise ValueError(f"{where}: this format has no place for {path}")
        array = _empty((layers, *shape) if layers else shape)
        for layer in range(layers) if layers else (None,):
            _copy(array if layer is None else array[layer], take(path, shape, layer))
        return array

    shapes = parameter_shapes(model)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy copies without the interpreter's lock
        arrays = pool.map(lambda path: parameter(path, *shapes[path]), shapes)
        params = nested(dict(zip(shapes, arrays, strict=True)))
    left = sorted(name for name in tensors if name not in used and not name.endswith(IGNORED))
    if left:
        raise ValueError(f"{where} has {len(left)} tensors that the model has no place for: {', '.join(left[:5])}")
    return params


class Tensors(Mapping[str, np.ndarray]):
    """A format's tensors, float32, each made from our parameters when it is asked for: all together are never held.

    Raises ValueError where the format has no place for one of the model's parameters.
    """

    def __init__(self, model: Architecture, params: Params, table: Table):
        self._leaves, self._table = flat(params), table
        self._parts: dict[str, list[tuple[str, int | None]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, (shape, layers) in parameter_shapes(model).items():
            if path not in table:
                raise ValueError(f"this format has no place for the model's {path}")
            place = table[path]
            for layer in range(layers) if layers else (None,):
                name = place.name if layer is None else place.name.format(layer + place.first)
                self._parts.setdefault(name, []).append((path, layer))
                self.shapes[name] = their_shape(path, shape, place)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = np.empty(self.shapes[name], np.float32)
        for path, layer in self._parts[name]:
            place = self._table[path]
            number, parts = place.part
            rows = len(tensor) // parts if parts > 1 else 0
            target = tensor[number * rows : (number + 1) * rows] if parts > 1 else tensor
            leaf = np.asarray(self._leaves[path] if layer is None else self._leaves[path][layer])
            _copy(target, _to_theirs(leaf, target.shape, place))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@functools.cache
def parameter_shapes(model: Architecture) -> dict[str, tuple[tuple[int, ...], int]]:
    """Return the model's parameters by path: the shape of one layer, and how many are stacked, 0 for none."""
    shapes = jax.eval_shape(lambda: make_model(model).init(jax.random.key(0)))
    found = {}
    for path, leaf in flat(shapes).items():
        stacked = "/blocks/" in path or "_rest/" in path
        found[path] = (leaf.shape[1:], leaf.shape[0]) if stacked else (leaf.shape, 0)
    return found


def their_shape(path: str, shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """Return the shape in a file of the tensor that our parameter of `shape`, one layer of it, lies in."""
    if place.transposed and len(shape) == 4:
        height, width, inner, outer = shape
        shape = (outer, inner, height, width)
    elif place.transposed:
        # Only the projection behind attention has its heads on the inner side.
        inner = len(shape) - 1 if path.endswith("out/kernel") else 1
        shape = (math.prod(shape[inner:]), math.prod(shape[:inner]))
    elif len(shape) > 1 and path.endswith("/bias"):
        shape = (math.prod(shape),)
    if place.part[1] > 1:
        shape = (shape[0] * place.part[1], *shape[1:])
    return (1,) * place.leading + shape


def _to_ours(tensor: np.ndarray, shape: tuple[int, ...], place: Place) -> np.ndarray:
    if place.transposed:
        tensor = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    return tensor.reshape(shape)


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 at a multiple of 64 bytes: JAX takes such an array on a CPU as it is, any other it copies."""
    size = 4 * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(np.float32).reshape(shape)


_LINE = 16  # numbers of float32 in 64 bytes


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy in strips as wide as a line of the cache: a transposed matrix takes a third of NumPy's own time so."""
    if target.ndim < 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for start in range(0, target.shape[-1], _LINE):
        target[..., start : start + _LINE] = source[..., start : start + _LINE]


def _to_theirs(array: np.ndarray, shape: tuple[int, ...], place: Place) -> np.ndarray:
    if not place.transposed:
        return array.reshape(shape)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.reshape(shape[::-1]).T


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)


def flat(tree: Params) -> dict:
    """Return a nested tree's leaves by path, e.g. `text/projection`."""
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in jax.tree.leaves_with_path(tree)}


def nested(leaves: Mapping[str, np.ndarray]) -> Params:
    """Return the tree of leaves by path: `flat` the other way."""
    tree: dict = {}
    for path, value in leaves.items():
        _insert(tree, path, value)
    return tree


def _insert(tree: dict, path: str, value: np.ndarray) -> None:
    *parents, leaf = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value

"""Weights of others, whatever the file: what it is follows from its first bytes and its tensors' names, not its ending.

What a file can't tell, its neighbours may (config.json, open_clip_config.json, tokenizers), and else the caller has to:
no state dict says which GELU it was trained with, and the wrong one costs points in silence, so nothing is guessed.

Source of the layouts: openai/CLIP `clip/model.py`, open_clip `factory.py`, transformers `modeling_utils.py`, big_vision
`utils.py` (`load_params`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from clip_jax.config import (
    MODELS,
    SIGLIP_PREPROCESS,
    Activation,
    Architecture,
    Preprocess,
    TokenizerConfig,
    WeightsConfig,
    check_name,
    name_of,
    tokenizer_of,
    with_activation,
)
from clip_jax.interop import (
    conversion,
    hub,
    huggingface,
    infer_architecture,
    msgpack,
    name_tables,
    npz,
    open_clip,
    positions,
    safetensors,
    torch_file,
)
from clip_jax.tokenizers import ClipBPE
from clip_jax.tokenizers.bpe import MAX_VOCAB_SIZE
from clip_jax.typing import Params

# Whole names first: of several in one folder the first is read. open_clip prefers its own, so do we.
_WEIGHT_FILES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("flax_model.msgpack", "flax_model.msgpack.index.json"),
)
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters, what they mean, and the format that they were found in."""

    params: Params
    config: WeightsConfig
    format: str


def read(
    path: str | os.PathLike[str],
    *,
    model: str = "",
    activation: str = "",
    image_size: int = 0,
    context_length: int = 0,
    tokenizer: TokenizerConfig | str = "",
) -> Weights:
    """Read weights of any registered format.

    Args:
      path: file, directory, name of an OpenAI model, or 'hf-hub:<owner>/<name>'.
      model: name in `config.MODELS`, for files without a config.
      activation: 'quick_gelu', 'gelu' or 'gelu_tanh', for files without a config. It overrides a config.
      image_size: px; position embeddings are resized to it. 0: unchanged.
      context_length: tokens, likewise.
      tokenizer: replaces the tokenizer of the file: path of a SentencePiece `.model` or a Hugging Face
        `tokenizer.json`, used with the settings of the published models, or a TokenizerConfig.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, unsafe, incomplete or doesn't match its config.
    """
    if model:
        check_name("model", model, MODELS)
    if activation:
        check_name("activation", activation, ("quick_gelu", "gelu", "gelu_tanh"))
    weights = _read(_existing(path), model, activation)
    resized, params = positions.resize(
        weights.config.model, weights.params, image_size=image_size, length=context_length
    )
    config = dataclasses.replace(weights.config, model=resized)
    if isinstance(tokenizer, str) and tokenizer:
        name = "huggingface" if tokenizer.endswith(".json") else "sentencepiece"
        tokenizer = dataclasses.replace(tokenizer_of(resized), name=name, path=tokenizer)
    if tokenizer:
        config = dataclasses.replace(config, tokenizer=tokenizer, tokenizer_file=b"")
    return Weights(params, config, weights.format)


def _existing(path: str | os.PathLike[str]) -> pathlib.Path:
    place = hub.locate(path)
    if not place.exists():
        raise FileNotFoundError(f"{path}: there is no such file or directory")
    return place


def _read(place: pathlib.Path, model: str, activation: str) -> Weights:
    file = _weight_file(place) if place.is_dir() else place
    if msgpack.is_ours(file):
        params, config = msgpack.read(file)
        return _ours(file, params, config, model, activation, "clip_jax msgpack")
    if npz.is_ours(file):
        params, config = npz.read(file)
        return _ours(file, params, config, model, activation, "clip_jax npz")
    tensors, container = _tensors(file)
    tensors, table, naming = _naming(tensors, os.fspath(file))
    described = _beside(file) if not model else None
    if described is None:
        described = _undescribed(file, tensors, table, model, activation)
    architecture, preprocess, tokenizer, tokenizer_file = described
    if activation:
        architecture = with_activation(architecture, activation)
    params = conversion.params_from_tensors(architecture, tensors, table, os.fspath(file))
    config = WeightsConfig(architecture, tokenizer, preprocess, name_of(architecture), tokenizer_file=tokenizer_file)
    return Weights(params, config, f"{naming}, {container}")


_TOWERS = {"img": "image", "image": "image", "txt": "text", "text": "text"}


def split_tower(path: str) -> tuple[str, str]:
    """Return the path and the tower of big_vision's notation: 'lit.npz:img' means the image tower of that file."""
    file, _, name = path.rpartition(":")
    return (file, _TOWERS[name]) if file and name in _TOWERS else (path, "")


def read_tower(path: str | os.PathLike[str], tower: str, model: Architecture) -> Params:
    """Return one tower of a weight file, its positions resized to those of `model`, which has such a tower.

    The rest of the file may be anything: a text tower that clip_jax doesn't build, or none at all.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming file, tensor, what was expected and what was found.
    """
    place = _existing(path)
    file = _weight_file(place) if place.is_dir() else place
    if msgpack.is_ours(file) or npz.is_ours(file):
        weights = read(file)
        stored, params = weights.config.model, weights.params
        if getattr(stored, tower) != _with_sizes(getattr(model, tower), getattr(stored, tower)):
            raise ValueError(f"{file}: its {tower} tower is {getattr(stored, tower)}, expected {getattr(model, tower)}")
    else:
        tensors, table, _ = _naming(_tensors(file)[0], os.fspath(file))
        stored = model
        if tower == "image":
            image = dataclasses.replace(
                model.image, image_size=infer_architecture.image_tower(tensors, table, os.fspath(file)).image_size
            )
            stored = dataclasses.replace(model, image=image)
        else:
            length = tensors[table["text/positional_embedding"].name].shape[-2]
            stored = dataclasses.replace(model, text=dataclasses.replace(model.text, length=length))
        params = conversion.params_from_tensors(stored, tensors, table, os.fspath(file), tower=tower)
    image_size, length = (model.image.image_size, 0) if tower == "image" else (0, model.text.length)
    _, params = positions.resize(stored, params, image_size=image_size, length=length)
    return {key: params[key] for key in (tower, *(["batch_stats"] if tower == "image" else [])) if key in params}


def _with_sizes(tower: Any, stored: Any) -> Any:
    """Return a tower with the stored one's number of positions, which can be resized."""
    sizes = {
        key: getattr(stored, key) for key in ("image_size", "length") if hasattr(tower, key) and hasattr(stored, key)
    }
    return dataclasses.replace(tower, **sizes)


def _ours(file: pathlib.Path, params: Params, config: WeightsConfig, model: str, activation: str, kind: str) -> Weights:
    _check_shapes(file, params, config.model)
    if model and MODELS[model] != config.model:
        raise ValueError(f"model={model!r} is not what the file says, and ours always say what they are: leave it out")
    if activation:
        config = dataclasses.replace(config, model=with_activation(config.model, activation))
    return Weights(params, config, kind)


def _check_shapes(file: pathlib.Path, params: Params, model: Architecture) -> None:
    """Raise ValueError, naming the parameter, where the parameters don't fit the config."""
    found = {name: array.shape for name, array in conversion.flat(params).items()}
    one_layer = conversion.parameter_shapes(model)
    expected = {name: (layers, *shape) if layers else shape for name, (shape, layers) in one_layer.items()}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{file}: the parameter {name} has shape {found.get(name, 'none')}, its config describes"
                f" {expected.get(name, 'none')}"
            )


# ------------------------------------------------------------------------------------------------------ containers


def _weight_file(folder: pathlib.Path) -> pathlib.Path:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds none of {', '.join(_WEIGHT_FILES)}; name the file itself")


def _tensors(file: pathlib.Path) -> tuple[Mapping[str, np.ndarray], str]:
    """Return the tensors of a file, read when they are used where the format allows it, and the format's name."""
    if file.name.endswith(".index.json"):
        return _sharded(file)
    with file.open("rb") as stream:
        head = stream.read(16)
    if not head:
        raise ValueError(f"{file} is empty: whatever wrote it did not finish")
    if head[8:9] == b"{":
        return safetensors.read(file), "safetensors"
    if head[:2] == b"PK" and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
        if members and all(name.endswith(".npy") for name in members):
            return npz.read_tensors(file), "npz"
    if head[:2] == b"PK" or head[0] == 0x80:
        return torch_file.read(file), "torch"
    if head[0] >= 0x81:  # msgpack's mappings; 0x80 begins a pickle
        return msgpack.read_foreign(file), "flax msgpack"
    raise ValueError(
        f"{file} is no weight file that clip_jax knows: it begins with {head!r}. It reads torch's files, safetensors,"
        " flax's msgpack and npz"
    )


def _sharded(index: pathlib.Path) -> tuple[Mapping[str, np.ndarray], str]:
    """Return the tensors of several files, which an index of Hugging Face's lists."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards: it needs a weight_map from tensors to files") from error
    parts = []
    for name in shards:
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"{index} lists the shard {name!r}, which lies in another folder")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} lists the shard {name}, and there is no such file beside it")
        parts.append(_tensors(index.parent / name))
    merged: dict[str, Any] = {}
    for tensors, _ in parts:
        merged |= {name: (tensors, name) for name in tensors}
    return _Views(merged), f"{parts[0][1]} in {len(parts)} shards"


class _Views(Mapping):
    """Tensors that lie in others' mappings, under names there: shards, and names without their prefix."""

    def __init__(self, places: Mapping[str, tuple[Mapping[str, np.ndarray], str]]):
        self._places = places

    def __getitem__(self, name: str) -> np.ndarray:
        tensors, theirs = self._places[name]
        return tensors[theirs]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


# ---------------------------------------------------------------------------------------------------------- naming


def _naming(tensors: Mapping[str, np.ndarray], where: str) -> tuple[Mapping[str, np.ndarray], name_tables.Table, str]:
    """Return the tensors without their prefixes, the table that their names follow, and what it is called."""
    plain = {_PREFIXES.sub("", name): name for name in tensors}
    if "visual.conv1.weight" in plain:  # open_clip's custom text towers have a prefix of their own
        plain = {name.removeprefix("text."): theirs for name, theirs in plain.items()}
        table, naming = name_tables.OPENAI, "OpenAI's names"
    elif "visual.trunk.attn_pool.latent" in plain:
        table, naming = name_tables.OPEN_CLIP_SIGLIP, "open_clip's SigLIP names"
    elif "vision_model.head.probe" in plain:
        table, naming = name_tables.HUGGINGFACE_SIGLIP, "Hugging Face's SigLIP names"
    elif "vision_model.embeddings.patch_embedding.weight" in plain:
        table, naming = name_tables.HUGGINGFACE, "Hugging Face's names"
    elif "vision_model.embeddings.patch_embedding.kernel" in plain:
        table, naming = name_tables.HUGGINGFACE_FLAX, "Hugging Face's Flax names"
    elif any(name.endswith(("img/embedding/kernel", "txt/Embed_0/embedding")) for name in plain):
        plain = {name.removeprefix("params/"): theirs for name, theirs in plain.items()}
        table, naming = name_tables.BIG_VISION, "big_vision's names"
    else:
        trunk = next((name for name in plain if name.startswith("visual.trunk.")), None)
        first = ", ".join(sorted(plain)[:4])
        reason = f"a tower of timm's that clip_jax does not build ({trunk})" if trunk else f"names such as {first}"
        raise ValueError(f"{where} has {reason}; known are CLIP, CLIPA and SigLIP by the names of OpenAI, open_clip,"
                         " Hugging Face and big_vision")  # fmt: skip
    return _Views({name: (tensors, theirs) for name, theirs in plain.items()}), table, naming


# ------------------------------------------------------------------------------------------------------- the config

_Described = tuple[Architecture, Preprocess, TokenizerConfig, bytes]


def _beside(file: pathlib.Path) -> _Described | None:
    """Return what the configs in a weight file's folder say; None without one."""
    folder = file.parent
    ours, theirs = folder / "open_clip_config.json", folder / "config.json"
    if ours.is_file() and file.name.startswith("open_clip"):
        content = _json(ours)
        architecture = open_clip.architecture(content.get("model_cfg", content), os.fspath(ours))
        preprocess = open_clip.preprocess(content.get("preprocess_cfg") or {})
    elif theirs.is_file():
        architecture = huggingface.architecture(_json(theirs), os.fspath(theirs))
        processor = folder / "preprocessor_config.json"
        preprocess = huggingface.preprocess(_json(processor) if processor.is_file() else {}, architecture)
    else:
        return None
    tokenizer, content = _tokenizer(architecture, folder)
    if tokenizer.name != "clip_bpe" and file.name.startswith("open_clip"):
        tokenizer = open_clip.tokenizer(tokenizer, _json(ours))
    return architecture, preprocess, tokenizer, content


def _tokenizer(architecture: Architecture, folder: pathlib.Path) -> tuple[TokenizerConfig, bytes]:
    """Return the tokenizer of a folder, and the content of its file where it isn't CLIP's own."""
    merges = folder / "merges.txt"
    clip_size = architecture.text.vocab_size == MAX_VOCAB_SIZE
    if merges.is_file():
        content = merges.read_bytes()
        published = clip_size and content.decode("utf-8", "replace").split("\n")[1:-1] == ClipBPE().as_huggingface()[1]
        return (TokenizerConfig(), b"") if published else (TokenizerConfig("clip_bpe", merges.name), content)
    config = tokenizer_of(architecture)
    if config.name == "clip_bpe" and not clip_size:
        config = TokenizerConfig("sentencepiece")  # of whatever kind it is, CLIP's it isn't
    files = {"spiece.model": "sentencepiece", "tokenizer.model": "sentencepiece", "tokenizer.json": "huggingface"}
    for name, kind in files.items() if not clip_size else ():
        if (folder / name).is_file():
            return dataclasses.replace(config, name=kind, path=name), (folder / name).read_bytes()
    return config, b""


def _json(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a mapping")
    return content


def _undescribed(
    file: pathlib.Path, tensors: Mapping[str, np.ndarray], table: name_tables.Table, model: str, activation: str
) -> _Described:
    """Return what the caller says, or the shapes tell."""
    if model:
        architecture = MODELS[model]
    else:
        architecture = infer_architecture.architecture(tensors, table, os.fspath(file))
        activation = activation or _activation(file, table)
        if not activation:
            raise ValueError(
                f"{file} does not say which activation its model was trained with, and the wrong one costs points in"
                " silence. Give activation='quick_gelu' (OpenAI, DFN, MetaCLIP and open_clip's …-quickgelu) or 'gelu'"
                " (LAION, DataComp and most others), or the model, e.g. model='vit_b32'"
            )
        architecture = with_activation(architecture, activation)
    big_vision = architecture.logit_bias or table is name_tables.BIG_VISION
    preprocess = dataclasses.replace(SIGLIP_PREPROCESS if big_vision else Preprocess(), implementation="openai")
    return architecture, preprocess, *_tokenizer(architecture, file.parent)


def _activation(file: pathlib.Path, table: name_tables.Table) -> Activation | str:
    """Return the activation where the format tells it: OpenAI's archives carry their code, big_vision has but one."""
    if table is name_tables.BIG_VISION:
        return "gelu_tanh"  # flax.linen.gelu's default
    code = torch_file.torchscript_code(file) if table is name_tables.OPENAI else ""
    return "quick_gelu" if "QuickGELU" in code or "1.702" in code else ""

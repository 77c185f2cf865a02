"""Weights of any registered format with their configuration.

The format follows from the content of a file, not from its name. The configuration comes from the file, from config
files in its directory, or from the caller. A state dict does not record its activation, and the wrong one costs
accuracy without an error, so it is never guessed. Sources of the layouts: openai/CLIP `clip/model.py`, open_clip
`factory.py`, transformers `modeling_utils.py`, big_vision `utils.py` (`load_params`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from clip_jax import config as configs
from clip_jax.config import Architecture, Preprocess, TokenizerConfig, WeightsConfig
from clip_jax.interop import (
    conversion,
    directory,
    formats,
    huggingface,
    infer_architecture,
    open_clip,
    positions,
    tokenizer_files,
)
from clip_jax.interop.hub import locate
from clip_jax.interop.name_tables import Naming, detect_naming
from clip_jax.interop.torch_file import torchscript_code
from clip_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters with their configuration."""

    params: Params
    config: WeightsConfig
    format: str  # for messages, e.g. 'OpenAI names, safetensors'


def read(
    path: str | os.PathLike[str],
    *,
    model: str = "",
    activation: str = "",
    image_size: int = 0,
    context_length: int = 0,
    tokenizer: TokenizerConfig | str = "",
) -> Weights:
    """Read weights of any registered format. Arguments and errors are those of `clip_jax.load`."""
    if model:
        configs.check_name("model", model, configs.MODELS)
    if activation:
        configs.check_name("activation", activation, ("quick_gelu", "gelu", "gelu_tanh"))
    weights = _read(_existing(path), model, activation, tokenizer)
    resized, params = positions.resize(weights.config.model, weights.params, image_size, context_length)
    config = dataclasses.replace(weights.config, model=resized)
    if isinstance(tokenizer, str) and tokenizer:
        tokenizer = tokenizer_files.of_path(tokenizer, resized)
    if tokenizer:
        config = dataclasses.replace(config, tokenizer=tokenizer, tokenizer_file=b"")
    return Weights(params, config, weights.format)


def _existing(path: str | os.PathLike[str]) -> pathlib.Path:
    local = locate(path)
    if not local.exists():
        raise FileNotFoundError(f"{path}: expected a file or directory, got none; give another path")
    return local


def _read(path: pathlib.Path, model: str, activation: str, tokenizer: TokenizerConfig | str) -> Weights:
    params, stored = formats.read(path)
    if stored is not None:
        if model and configs.MODELS[model] != stored.model:
            raise ValueError(f"model={model!r}: expected the architecture in {path}, got another; omit model")
        _check_shapes(path, params, stored.model)
        config, kind = stored, f"clip_jax {formats.detect(path)}"
    else:
        file = directory.weight_file(path) if path.is_dir() else path
        naming, tensors = detect_naming(params, os.fspath(file))
        config = None if model else _config_of_directory(file, tokenizer)
        config = config or _config_of_tensors(file, tensors, naming, model, activation, tokenizer)
        params = conversion.params_from_tensors(config.model, tensors, naming.table, os.fspath(file))
        kind = f"{naming.title} names, {formats.detect(file)}"
    architecture = configs.with_activation(config.model, activation) if activation else config.model
    source = stored.source if stored else configs.name_of(architecture)
    return Weights(params, dataclasses.replace(config, model=architecture, source=source), kind)


def _check_shapes(path: pathlib.Path, params: Params, model: Architecture) -> None:
    found = {name: np.shape(array) for name, array in conversion.flat(params).items()}
    per_layer = conversion.parameter_shapes(model)
    expected = {name: (layers, *shape) if layers else shape for name, (shape, layers) in per_layer.items()}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{path}: parameter {name}: expected shape {expected.get(name, 'none')} by its config, got"
                f" {found.get(name, 'none')}"
            )


_TOWERS = {"img": "image", "image": "image", "txt": "text", "text": "text"}


def split_tower(path: str) -> tuple[str, str]:
    """Split big_vision's notation: 'lit.npz:img' is the image tower of that file. The tower is '' for both."""
    file, _, name = path.rpartition(":")
    return (file, _TOWERS[name]) if file and name in _TOWERS else (path, "")


def read_tower(path: str | os.PathLike[str], tower: str, model: Architecture) -> Params:
    """Read one tower with the architecture of `model`; position embeddings are resized to its sizes.

    The other tower of the file is ignored; clip_jax need not support it. Errors as for `read`.
    """
    local = _existing(path)
    params, config = formats.read(local)
    expected = getattr(model, tower)
    if config is not None:
        _check_shapes(local, params, config.model)
        stored, found = config.model, getattr(config.model, tower)
        sizes = {key: getattr(found, key, None) for key in ("image_size", "context_length") if hasattr(expected, key)}
        if found != dataclasses.replace(expected, **sizes):
            raise ValueError(f"{local}: expected the {tower} tower {expected}, got {found}")
    else:
        naming, tensors = detect_naming(params, os.fspath(local))
        if tower == "image":
            sizes = {"image_size": infer_architecture.image_tower(tensors, naming, os.fspath(local)).image_size}
        else:
            sizes = {"context_length": tensors[naming.table["text/positional_embedding"].name].shape[-2]}
        stored = dataclasses.replace(model, **{tower: dataclasses.replace(expected, **sizes)})
        params = conversion.params_from_tensors(stored, tensors, naming.table, os.fspath(local), tower=tower)
    size, length = (model.image.image_size, 0) if tower == "image" else (0, model.text.context_length)
    _, params = positions.resize(stored, params, size, length)
    return {key: params[key] for key in (tower, *(["batch_stats"] if tower == "image" else [])) if key in params}


def _config_of_directory(file: pathlib.Path, tokenizer: TokenizerConfig | str) -> WeightsConfig | None:
    """Return the configuration by the config files in the directory of a weight file; None without one.

    The directory's tokenizer is not read if the caller gives one.
    """
    folder = file.parent
    if (config := folder / "open_clip_config.json").is_file() and file.name.startswith("open_clip"):
        content = _json(config)
        model = open_clip.architecture(content.get("model_cfg", content), os.fspath(config))
        preprocess = open_clip.preprocess(content.get("preprocess_cfg") or {})
    elif (config := folder / "config.json").is_file():
        content, processor = None, folder / "preprocessor_config.json"
        model = huggingface.architecture(_json(config), os.fspath(config))
        preprocess = huggingface.preprocess(_json(processor) if processor.is_file() else {}, model)
    else:
        return None
    found, tokenizer_file = TokenizerConfig(), b""
    if not tokenizer:
        settings = open_clip.tokenizer(content, model) if content is not None else None
        if content is None or settings:
            found, tokenizer_file = tokenizer_files.read(folder, model, settings)
    return WeightsConfig(model, found, preprocess, tokenizer_file=tokenizer_file)


def _config_of_tensors(
    file: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    naming: Naming,
    model: str,
    activation: str,
    tokenizer: TokenizerConfig | str,
) -> WeightsConfig:
    """Return the configuration of the named model, or by the shapes of the tensors."""
    if model:
        architecture = configs.MODELS[model]
    else:
        architecture = infer_architecture.architecture(tensors, naming, os.fspath(file))
        code = torchscript_code(file)  # of archives such as OpenAI's
        in_code = "quick_gelu" if "QuickGELU" in code or "1.702" in code else ""
        activation = activation or naming.activation or in_code
        if not activation:
            raise ValueError(
                f"{file}: expected an activation, got none in the file, and the wrong one costs accuracy without an"
                " error; give activation='quick_gelu' (OpenAI, DFN, MetaCLIP and open_clip's …-quickgelu) or 'gelu'"
                " (LAION, DataComp and most others), or the model, e.g. model='vit_b32'"
            )
        architecture = configs.with_activation(architecture, activation)
    preprocess = configs.SIGLIP_PREPROCESS if architecture.logit_bias or naming.siglip else Preprocess()
    preprocess = dataclasses.replace(preprocess, implementation="openai")
    settings = configs.tokenizer_of(architecture)
    found = (settings, b"") if tokenizer else tokenizer_files.read(file.parent, architecture, settings)
    return WeightsConfig(architecture, found[0], preprocess, tokenizer_file=found[1])


def _json(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content

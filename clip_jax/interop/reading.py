"""Weights of any registered format with their configuration.

The format follows from the content of a file, not from its name. The configuration comes from the file, from config
files in its directory, or from the caller. A state dict does not record its activation, and the wrong one costs
accuracy without an error, so it is never guessed. Sources of the layouts: openai/CLIP `clip/model.py`, open_clip
`factory.py`, transformers `modeling_utils.py`, big_vision `utils.py` (`load_params`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from clip_jax import config as configs
from clip_jax.config import Architecture, Preprocess, TokenizerConfig, WeightsConfig
from clip_jax.interop import (
    config_files,
    conversion,
    directory,
    formats,
    infer_architecture,
    open_clip,
    positions,
    tokenizer_files,
)
from clip_jax.interop.hub import locate
from clip_jax.interop.infer_architecture import Heads
from clip_jax.interop.naming import Naming, detect_naming
from clip_jax.interop.one_tower import architecture as one_tower_architecture
from clip_jax.interop.one_tower import missing_tower
from clip_jax.interop.torch_file import torchscript_code
from clip_jax.paths import path_kind
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
    preprocess: Preprocess | str = "",
    prefix: str = "",
    heads: Sequence[int] = (),
    like: Architecture | None = None,
    one_tower: bool = False,
    dtype: str = "",
) -> Weights:
    """Read weights of any registered format. Arguments and errors are those of `clip_jax.load`.

    Args:
      like: architecture with the attention heads of files without a config whose shapes are equal to it.
      one_tower: whether weights of one tower alone are read; their parameters lack the other tower and the scalars.
      dtype: of the parameters, 'float32' or 'bfloat16'; '': as stored in formats of clip_jax, float32 for others.
    """
    if dtype:
        configs.check_name("dtype", dtype, ("float32", "bfloat16"))
    if len(heads) not in (0, 2):
        raise ValueError(f"heads: expected two numbers, of the image and of the text tower, got {heads!r}")
    if model:
        configs.check_name("model", model, configs.MODELS)
    if activation:
        configs.check_name("activation", activation, ("quick_gelu", "gelu", "gelu_tanh"))
    known = _known_heads(heads, like)
    weights = _read(_existing(path), model, activation, prefix, known, preprocess, tokenizer, dtype)
    for tower, size in (("image", image_size), ("text", context_length)):
        if tower not in weights.params and (size or not one_tower):
            raise ValueError(
                f"{path}: expected weights of both towers, got none of the {tower} tower; clip_jax.load reads one tower"
                " alone, without image_size or context_length of the other"
            )
    resized, params = positions.resize(weights.config.model, weights.params, image_size, context_length)
    old_size, new_size = weights.config.model.image.image_size, resized.image.image_size
    spec = weights.config.preprocess.scaled(old_size, new_size)
    config = dataclasses.replace(weights.config, model=resized, preprocess=spec)
    if isinstance(tokenizer, str) and tokenizer:
        tokenizer = tokenizer_files.of_path(tokenizer, resized)
    if tokenizer:
        config = dataclasses.replace(config, tokenizer=tokenizer, tokenizer_file=b"")
    return Weights(params, config, weights.format)


def _existing(path: str | os.PathLike[str]) -> pathlib.Path:
    local = locate(path)
    if not local.exists():
        raise FileNotFoundError(f"{path}: expected a file or directory, got none; give another path")
    if path_kind(local) not in ("a file", "a directory"):
        raise ValueError(f"{path}: expected a file or directory, got {path_kind(local)}; copy its content to a file")
    return directory.model_folder(local)


def _read(
    path: pathlib.Path,
    model: str,
    activation: str,
    prefix: str,
    heads: Heads,
    preprocess: Preprocess | str,
    tokenizer: TokenizerConfig | str,
    dtype: str,
) -> Weights:
    directory.check_whole(path)
    params, stored = formats.read(path)
    if stored is not None:
        _check_no_heads(heads, path)
        if prefix:
            raise ValueError(f"prefix={prefix!r}: expected no prefix, as {path} contains one model; omit prefix")
        if model and configs.MODELS[model] != stored.model:
            raise ValueError(f"model={model!r}: expected the architecture in {path}, got another; omit model")
        _check_shapes(path, params, stored.model)
        spec = config_files.given_preprocess(preprocess, stored.model) if preprocess else stored.preprocess
        config, kind = dataclasses.replace(stored, preprocess=spec), f"clip_jax {formats.detect(path)}"
        params = conversion.cast(params, dtype)
    else:
        file = directory.weight_file(path) if path.is_dir() else path
        naming, tensors, found_prefix = detect_naming(params, os.fspath(file), prefix)
        config = None if model else _config_of_directory(file, naming, preprocess, tokenizer)
        if config or model:
            _check_no_heads(heads, path)
        config = config or _config_of_tensors(file, tensors, naming, model, activation, heads, preprocess, tokenizer)
        _check_logit_scale(file, tensors, naming)
        tower = ""
        if missing := missing_tower(tensors, naming.table):
            tower = "text" if missing == "image" else "image"
            found = one_tower_architecture(config.model, tensors, naming.table, missing)
            config = dataclasses.replace(config, model=found)
        params = conversion.params_from_tensors(
            config.model, tensors, naming.table, os.fspath(file), tower=tower, dtype=dtype
        )
        kind = f"{naming.title} names, {formats.detect(file)}" + (f", below {found_prefix!r}" if found_prefix else "")
    _check_finite(path, params)
    architecture = configs.with_activation(config.model, activation) if activation else config.model
    source = stored.source if stored else configs.name_of(architecture)
    return Weights(params, dataclasses.replace(config, model=architecture, source=source), kind)


def _known_heads(given: Sequence[int], like: Architecture | None) -> Heads:
    presets = [*configs.MODELS.values(), *([like] if like else [])]
    return Heads(tuple(given), presets)


def _check_no_heads(heads: Heads, path: pathlib.Path) -> None:
    if heads.given:
        raise ValueError(
            f"heads={heads.given}: expected no heads, as {path} has a config or model= is given; omit heads"
        )


_MAX_LOGIT_SCALE = 7.0  # exp(7) = 1097; published models have at most ln 100 = 4.6, SigLIP 4.8


def _check_logit_scale(file: pathlib.Path, tensors: Mapping[str, np.ndarray], naming: Naming) -> None:
    """Raise ValueError for a logit scale that is stored instead of its logarithm."""
    name = naming.table["logit_scale"].name
    stored = np.asarray(tensors.get(name, 0), np.float64)
    if stored.size == 1 and stored.item() > _MAX_LOGIT_SCALE:
        raise ValueError(
            f"{file}: tensor {name}: expected the natural logarithm of the logit scale, e.g. 4.6052 for 100, got"
            f" {stored.item():.6g}; replace it by its logarithm, {math.log(stored.item()):.6g}, and save the file again"
        )


_PROJECTION = re.compile(r"(image|text)/(pool/)?projection(_bias|/kernel|/bias)?")
_PIECE = 1 << 22  # values that are checked at once


def _check_finite(path: pathlib.Path, params: Params) -> None:
    """Raise ValueError with the parameter's path if a parameter is NaN or infinite, or a tower's projection is 0."""

    def is_finite(array: np.ndarray) -> bool:
        values = np.asarray(array).reshape(-1)
        return all(np.isfinite(values[i : i + _PIECE]).all() for i in range(0, values.size, _PIECE))

    leaves = conversion.flat(params)
    for tower in ("image", "text"):
        projections = {name: leaves[name] for name in leaves if _PROJECTION.fullmatch(name) and name.startswith(tower)}
        if projections and not any(np.any(array) for array in projections.values()):
            raise ValueError(
                f"{path}: parameter {next(iter(projections))}: expected a projection, got zeros alone, for which no"
                " features have a direction; use weights of a trained model"
            )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy releases the GIL
        for name, finite in zip(leaves, pool.map(is_finite, leaves.values()), strict=True):
            if not finite:
                raise ValueError(
                    f"{path}: parameter {name}: expected finite numbers, got NaN or infinity: the training diverged"
                    " or the file is damaged; use an earlier checkpoint or copy it again"
                )


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
        naming, tensors, _ = detect_naming(params, os.fspath(local))
        if tower == "image":
            sizes = {"image_size": infer_architecture.image_size(tensors, naming, os.fspath(local))}
        else:
            sizes = {"context_length": tensors[naming.table["text/positional_embedding"].name].shape[-2]}
        stored = dataclasses.replace(model, **{tower: dataclasses.replace(expected, **sizes)})
        params = conversion.params_from_tensors(
            stored, tensors, naming.table, os.fspath(local), tower=tower, ignore_others=True
        )
    size, length = (model.image.image_size, 0) if tower == "image" else (0, model.text.context_length)
    _, params = positions.resize(stored, params, size, length)
    return {key: params[key] for key in (tower, *(["batch_stats"] if tower == "image" else [])) if key in params}


def _config_of_directory(
    file: pathlib.Path, naming: Naming, given: Preprocess | str, tokenizer: TokenizerConfig | str
) -> WeightsConfig | None:
    """Return the configuration by the config files in the directory of a weight file; None without one.

    The directory's preprocessing and tokenizer are not read if the caller gives others.
    """
    config = config_files.find(file.parent, naming.config_file)
    if config is None:
        return None
    model = config_files.architecture(config)
    preprocess = config_files.given_preprocess(given, model) if given else config_files.preprocess(config, model)
    if preprocess is None:
        preprocess = dataclasses.replace(configs.preprocess_of(model), implementation="huggingface")
    preprocess = preprocess if given else directory.restored(file.parent, preprocess)
    found, tokenizer_file = TokenizerConfig(), b""
    if not tokenizer:
        is_open_clip = config.name == config_files.OPEN_CLIP
        settings = open_clip.tokenizer(config_files.read_json(config), model) if is_open_clip else None
        if settings or not is_open_clip:
            found, tokenizer_file = tokenizer_files.read(file.parent, model, settings)
    return WeightsConfig(model, found, preprocess, tokenizer_file=tokenizer_file)


_OPENAI_HEAD_WIDTH = 64


def _config_of_tensors(
    file: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    naming: Naming,
    model: str,
    activation: str,
    heads: Heads,
    given_preprocess: Preprocess | str,
    given_tokenizer: TokenizerConfig | str,
) -> WeightsConfig:
    """Return the configuration of the named model, or by the shapes of the tensors."""
    code = torchscript_code(file)  # of archives such as OpenAI's, whose `build_model` has heads of 64
    if model:
        architecture = configs.MODELS[model]
        architecture = configs.with_activation(architecture, activation) if activation else architecture
    else:
        heads = dataclasses.replace(heads, width=_OPENAI_HEAD_WIDTH) if code else heads
        architecture = infer_architecture.architecture(tensors, naming, os.fspath(file), heads)
        in_code = "quick_gelu" if "QuickGELU" in code or "1.702" in code else ""
        activation = activation or naming.activation or in_code
        if not activation:
            raise ValueError(
                f"{file}: expected an activation, got none in the file, and the wrong one costs accuracy without an"
                " error; give activation='quick_gelu' (OpenAI, DFN, MetaCLIP and open_clip's …-quickgelu) or 'gelu'"
                " (LAION, DataComp and most others), or the model, e.g. model='vit_b32'"
            )
        architecture = configs.with_activation(architecture, activation)
    if not given_preprocess and missing_tower(tensors, naming.table) == "image":
        preprocess = Preprocess()
    else:
        preprocess = _preprocess_of_tensors(file, naming, architecture, given_preprocess, archive=bool(code))
    found, tokenizer_file = configs.tokenizer_of(architecture), b""
    if not given_tokenizer:
        found, tokenizer_file = tokenizer_files.read(file.parent, architecture, found)
    return WeightsConfig(architecture, found, preprocess, tokenizer_file=tokenizer_file)


def _preprocess_of_tensors(
    file: pathlib.Path, naming: Naming, model: Architecture, given: Preprocess | str, archive: bool = False
) -> Preprocess:
    """Return the given preprocessing, that of a config file in the directory, or that of the published weights."""
    config = config_files.find(file.parent, naming.config_file)
    if not given and config is not None and (found := config_files.preprocess(config, model)):
        return directory.restored(file.parent, found)
    names = ("siglip",) if naming.siglip else configs.preprocess_names(model)
    names = ("openai",) if archive else names
    if not given and len(names) != 1:
        reason = "in which the published weights of this model differ" if names else "of an image tower without preset"
        listed = ", ".join(map(repr, names or configs.PREPROCESS))
        raise ValueError(
            f"{file}: expected the preprocessing, {reason}, got none; give preprocess=, one of {listed}, or the"
            " weights' config file"
        )
    return config_files.given_preprocess(given or names[0], model)

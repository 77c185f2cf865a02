"""Configuration by JSON files: those in the directory of a weight file, and a preprocessing that the caller gives.

A config file counts for every weight file in its directory. If open_clip's and transformers' are both there, the names
of the tensors decide (`Naming.config_file`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

from clip_jax import config as configs
from clip_jax.config import PREPROCESS, Architecture, Preprocess
from clip_jax.interop import huggingface, image_processor, one_tower, open_clip
from clip_jax.paths import check_not_pointer

OPEN_CLIP, HUGGINGFACE = "open_clip_config.json", "config.json"
_PROCESSOR, _IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"


def find(folder: pathlib.Path, preferred: str) -> pathlib.Path | None:
    """Return the config file in a directory, the preferred one if there are two; None without one."""
    names = [preferred, *({OPEN_CLIP, HUGGINGFACE} - {preferred})]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def architecture(file: pathlib.Path) -> Architecture:
    """Return the architecture of a config file. Raises ValueError, with the key, for an unsupported one."""
    content = read_json(file)
    if file.name == OPEN_CLIP:
        return open_clip.architecture(content.get("model_cfg", content), os.fspath(file))
    return huggingface.architecture(one_tower.whole_config(content), os.fspath(file))


def preprocess(file: pathlib.Path, model: Architecture) -> Preprocess | None:
    """Return the preprocessing that belongs to a config file; None without one, as transformers has no default."""
    if file.name == OPEN_CLIP:
        return open_clip.preprocess(read_json(file).get("preprocess_cfg") or {}, os.fspath(file))
    if one_tower.is_text_config(read_json(file)):
        return None
    # As in transformers 5: an image processor inside processor_config.json has precedence.
    for name in (_PROCESSOR, _IMAGE_PROCESSOR):
        if (processor := file.with_name(name)).is_file():
            content = read_json(processor)
            if name == _IMAGE_PROCESSOR or "image_processor" in content:
                return _image_processor(content, model, processor)
    return None


def given_preprocess(given: Preprocess | str, model: Architecture) -> Preprocess:
    """Return the preprocessing that the argument `preprocess` of `clip_jax.load` selects.

    Raises ValueError if it is neither a name in PREPROCESS nor a file, or if the file is not supported.
    """
    if isinstance(given, Preprocess):
        return given
    if given in PREPROCESS:
        return dataclasses.replace(PREPROCESS[given], implementation="openai")
    file = pathlib.Path(given).expanduser()
    if not file.is_file():
        raise ValueError(
            f"preprocess={given!r}: expected one of {', '.join(PREPROCESS)} or a JSON file such as {_IMAGE_PROCESSOR}"
            f" or {OPEN_CLIP}, got no such file{configs.did_you_mean(given, PREPROCESS)}"
        )
    content = read_json(file)
    if "preprocess_cfg" in content or "model_cfg" in content:
        return open_clip.preprocess(content.get("preprocess_cfg") or {}, os.fspath(file))
    return _image_processor(content, model, file)


def _image_processor(content: dict[str, Any], model: Architecture, file: pathlib.Path) -> Preprocess:
    """Return the preprocessing of an image processor, which is the content or inside of it."""
    name = f"{file}: image_processor" if "image_processor" in content else os.fspath(file)
    found = content.get("image_processor", content)
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(found).__name__}")
    return image_processor.read(found, model, name)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError if there is none."""
    check_not_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content

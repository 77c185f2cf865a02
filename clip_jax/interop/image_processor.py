"""Image processors of transformers (`CLIPImageProcessor`, `SiglipImageProcessor`), read and written.

Every key of the file is obeyed, has no effect on pixels (`_WITHOUT_EFFECT`), or is an error; no key is ignored.

Source: transformers `image_processing_base.py` (precedence of files), `image_processing_utils.py` (forms of sizes),
`image_processing_backends.py` (order of steps), `image_processing_pil_clip.py` and `…_siglip.py` (defaults).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from clip_jax.config import SIGLIP_PREPROCESS, Architecture, Preprocess

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")

_CLIP: dict[str, Any] = {
    **dict.fromkeys(_STEPS, True),
    **{"size": {"shortest_edge": 224}, "default_to_square": False, "crop_size": 224, "resample": 3},
    **{"rescale_factor": 1 / 255, "image_mean": Preprocess.mean, "image_std": Preprocess.std},
}
_SIGLIP: dict[str, Any] = _CLIP | {
    **{"do_center_crop": False, "crop_size": None, "size": {"height": 224, "width": 224}},
    **{"image_mean": SIGLIP_PREPROCESS.mean, "image_std": SIGLIP_PREPROCESS.std},
}
_DEFAULTS = {"CLIPImageProcessor": _CLIP, "SiglipImageProcessor": _SIGLIP}

# Without `do_convert_rgb`, transformers' models accept only images that are RGB already, which it does not change.
# `pad_size` is that of `do_pad`, which is an error. The others concern the processor's input or its output array.
_WITHOUT_EFFECT = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "_valid_processor_keys", "use_fast"),
    *("do_convert_rgb", "pad_size", "data_format", "input_data_format", "return_tensors", "device"),
    *("disable_grouping", "image_seq_length"),
}


def read(content: Mapping[str, Any], model: Architecture, file: str) -> Preprocess:
    """Return the preprocessing of a preprocessor_config.json; absent keys and null have the processor's defaults.

    Raises:
      ValueError: with the key, for a processor, key or value that `clip_jax.preprocess` does not reproduce.
    """
    kind = content.get("image_processor_type") or content.get("feature_extractor_type")
    kind = kind or ("SiglipImageProcessor" if model.logit_bias else "CLIPImageProcessor")
    name = str(kind).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in _DEFAULTS:
        raise _unsupported(file, "image_processor_type", " or ".join(_DEFAULTS), kind)
    settings = _DEFAULTS[name] | {key: value for key, value in content.items() if value is not None}
    for key, value in settings.items():
        if key not in _CLIP and key not in _WITHOUT_EFFECT and value is not False:
            raise _unsupported(file, key, "no such key", value)
        if key in _STEPS and not isinstance(value, bool):
            raise _unsupported(file, key, "true or false", value)
    if (resample := settings["resample"]) not in list(_RESAMPLE):
        raise _unsupported(file, "resample", f"one of {_RESAMPLE}", resample)
    resize, resize_size = _sizes(settings, model.image.image_size, file)
    mean, std = _normalization(settings, file)
    return Preprocess(mean, std, _RESAMPLE[resample], resize, "huggingface", resize_size)


def _sizes(settings: Mapping[str, Any], image_size: int, file: str) -> tuple[str, int]:
    """Return the fields `resize` and `resize_size`. The result of all steps must have the model's image size."""
    resize, side = "none", 0
    if settings["do_resize"]:
        size = _size_dict(settings["size"], settings["default_to_square"])
        sides = set(size.values())
        if len(sides) != 1 or size.keys() not in ({"shortest_edge"}, {"height", "width"}):
            raise _unsupported(file, "size", "shortest_edge, or equal height and width, in pixels", settings["size"])
        resize, side = "squash" if "height" in size else "shortest", sides.pop()
    if settings["do_center_crop"]:
        if _size_dict(settings["crop_size"], square=True) != {"height": image_size, "width": image_size}:
            expected = f"the model's image size, {image_size} px in height and width"
            raise _unsupported(file, "crop_size", expected, settings["crop_size"])
    elif (resize, side) != ("squash", image_size):  # the result would not be a square of the image size
        key = "size" if settings["do_resize"] else "do_resize"
        expected = f"height and width of the model's image size, {image_size} px, without do_center_crop"
        raise _unsupported(file, key, expected, settings[key])
    return resize, 0 if side == image_size else side


def _size_dict(size: Any, square: bool) -> dict[str, int]:
    """Return a size in its dict form, or {} for an invalid one."""
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    valid = isinstance(size, Mapping) and all(type(side) is int and side > 0 for side in size.values())
    return dict(size) if valid else {}


def _normalization(settings: Mapping[str, Any], file: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation with (x / 255 - mean) / std = (factor * x - image_mean) / image_std."""
    scale = 255.0  # times the factor
    if settings["do_rescale"]:
        factor = settings["rescale_factor"]
        if not _is_number(factor) or factor <= 0:
            raise _unsupported(file, "rescale_factor", "a positive number", factor)
        scale = factor / (1 / 255)  # exactly 1 for 1 / 255
    mean, std = (0.0,) * 3, (1.0,) * 3
    if settings["do_normalize"]:
        mean, std = (_channels(settings, key, file) for key in ("image_mean", "image_std"))
        if min(std) <= 0:
            raise _unsupported(file, "image_std", "positive numbers", settings["image_std"])
    return tuple(x / scale for x in mean), tuple(x / scale for x in std)


def _channels(settings: Mapping[str, Any], key: str, file: str) -> tuple[float, ...]:
    value = settings[key]
    channels = (value,) * 3 if _is_number(value) else value
    if not isinstance(channels, (list, tuple)) or len(channels) != 3 or not all(map(_is_number, channels)):
        raise _unsupported(file, key, "a number, or one for each of three channels", value)
    return tuple(map(float, channels))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _unsupported(file: str, key: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{file}: {key}: expected {expected}, for clip_jax, got {value!r}")


def write(spec: Preprocess, size: int, siglip: bool) -> dict[str, Any]:
    """Return the preprocessor_config.json for images of `size` px. Raises ValueError if transformers has no such."""
    if spec.resize == "longest" or (spec.fill_color and spec.pads(size)):
        raise ValueError(
            f"transformers has no preprocess.resize={spec.resize!r} with fill_color={spec.fill_color}; its processors"
            " pad with 0 alone and have no 'longest'"
        )
    resized = spec.resize_size or size
    squash, sides = spec.resize == "squash", {"height": size, "width": size}
    return {
        "image_processor_type": "SiglipImageProcessor" if siglip else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": spec.resize != "none",
        "size": {"height": resized, "width": resized} if squash else {"shortest_edge": resized},
        "do_center_crop": not squash or resized != size,
        "crop_size": sides,
        "resample": {name: number for number, name in _RESAMPLE.items()}[spec.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }

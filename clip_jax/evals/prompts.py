"""Class names and the sentences they stand in: ours, a user's file, or the published ones where a package brings them.

Published prompts are read as data from packages that ship them, which are not imported: CLIP_benchmark's JSON for some
thirty sets (OpenAI's, mostly), and open_clip's for ImageNet: the 1000 names that Radford et al. 2021 curated, their 80
templates, and the 7 that they later found by forward selection. A name such as `clip_benchmark:eurosat` says which.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import pathlib
from collections.abc import Iterable

from clip_jax.config import check_name
from clip_jax.typing import Unavailable

SLOT = "{}"  # where the class's name goes

OURS: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    # For sets of everyday pictures without a published set: how a picture was taken, not what of.
    "views": (
        "a photo of a {}.",
        "a photo that shows the {}.",
        "a {} seen from close by.",
        "a {} seen from afar.",
        "a blurred picture of a {}.",
        "a dark picture of the {}.",
        "a drawing of a {}.",
        "a part of a {}.",
    ),
}

# Where CLIP_benchmark has them.
CLIP_BENCHMARK = {"templates": "en_zeroshot_classification_templates.json", "class_names": "en_classnames.json"}
# What open_clip calls the things in its `zero_shot_metadata.py`.
OPEN_CLIP_TEMPLATES = {"imagenet_80": "OPENAI_IMAGENET_TEMPLATES", "imagenet_7": "SIMPLE_IMAGENET_TEMPLATES"}
OPEN_CLIP_CLASS_NAMES = {"imagenet": "IMAGENET_CLASSNAMES"}
FORMAT = 'a JSON object such as {"class_names": ["cat", ["dog", "puppy"]], "templates": ["a photo of a {}."]}'


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What classes are called in a zero-shot classifier.

    class_names: of every class one name or more.
    templates: sentences with SLOT.
    """

    class_names: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]

    def wordings(self) -> tuple[tuple[str, ...], ...]:
        """Return for every class each of its names in each template, as in `EvalDataset.texts`."""
        return tuple(
            tuple(template.replace(SLOT, name) for template, name in itertools.product(self.templates, names))
            for names in self.class_names
        )

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that are another's only if every wording is: numbers are logged with it."""
        text = json.dumps([self.class_names, self.templates], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def templates(name: str) -> tuple[str, ...]:
    """Return the templates of a key of OURS, `clip_benchmark:<set>`, `open_clip:imagenet_80` or `_7`, or a JSON file.

    Raises:
      Unavailable: if the package isn't installed.
      ValueError: for a name that it doesn't have, or a template without SLOT.
    """
    found = OURS[name] if name in OURS else _published_or_own("templates", name, OPEN_CLIP_TEMPLATES, OURS)
    for template in found:
        if not isinstance(template, str) or SLOT not in template:
            raise ValueError(f"{name}: the template {template!r} has no {SLOT!r} for the class's name")
    return tuple(found)


def class_names(name: str) -> tuple[tuple[str, ...], ...]:
    """Return the names of `clip_benchmark:<set>`, `open_clip:imagenet` or a JSON file, in the order of class ids.

    ImageNet's are 998 for 1000 classes: a missile and sunglasses are there twice, in the paper too.

    Raises:
      Unavailable: if the package isn't installed.
      ValueError: for a name that it doesn't have, or a class without a name.
    """
    found = _published_or_own("class_names", name, OPEN_CLIP_CLASS_NAMES)
    several = [(names,) if isinstance(names, str) else tuple(names) for names in found]
    for class_id, names in enumerate(several):
        if not names or not all(isinstance(one, str) and one.strip() for one in names):
            raise ValueError(f"{name}: class {class_id} is called {names}; give it a name, or a list of names")
    return tuple(several)


def _published_or_own(kind: str, name: str, in_open_clip: dict[str, str], ours: Iterable[str] = ()) -> list:
    """Return what `name` says of a kind, 'templates' or 'class_names': out of a package or a file."""
    package, _, key = name.partition(":")
    if package == "clip_benchmark":
        by_set = _clip_benchmark(CLIP_BENCHMARK[kind])
        check_name(kind, key, by_set)
        return [item.replace("{c}", SLOT) if kind == "templates" else item for item in by_set[key]]
    if package == "open_clip":
        check_name(kind, key, in_open_clip)
        return _open_clip(in_open_clip[key])
    if name.endswith(".json"):
        return _from_file(name, kind)
    known = [*ours, "clip_benchmark:<set>", *(f"open_clip:{key}" for key in in_open_clip)]
    raise ValueError(f"{kind}={name!r}: use {', '.join(known)}, or a .json file")


def _from_file(path: str, key: str) -> list:
    file = pathlib.Path(path).expanduser()
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: {error}. Prompts are {FORMAT}") from error
    if not isinstance(value, dict) or not isinstance(value.get(key), list) or not value[key]:
        raise ValueError(f"{file} has no list {key!r} that is not empty. Prompts are {FORMAT}")
    return value[key]


def _directory(package: str, install: str) -> pathlib.Path:
    """Return where a package lies without importing it, which would import torch."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"published prompts come with {package}, which is not installed: pip install {install}")
    return pathlib.Path(spec.submodule_search_locations[0])


@functools.cache
def _clip_benchmark(file: str) -> dict[str, list]:
    directory = _directory("clip_benchmark", "--no-deps clip-benchmark")
    return json.loads((directory / "datasets" / file).read_text(encoding="utf-8"))


@functools.cache
def _open_clip(variable: str) -> list[str]:
    """Return a tuple of strings, or of functions that put a name into a sentence, out of open_clip's source."""
    file = _directory("open_clip", "--no-deps open_clip_torch") / "zero_shot_metadata.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == variable for t in node.targets):
            return [_sentence(item) for item in node.value.elts]
    raise ValueError(f"{file} defines no {variable}; open_clip_torch 3.3.0 does")


def _sentence(node: ast.expr) -> str:
    """Return 'x' of the expression 'x', and 'x {} y' of lambda c: f'x {c} y'."""
    if not isinstance(node, ast.Lambda):
        return ast.literal_eval(node)
    parts = node.body.values if isinstance(node.body, ast.JoinedStr) else [node.body]
    return "".join(SLOT if isinstance(part, ast.FormattedValue) else ast.literal_eval(part) for part in parts)

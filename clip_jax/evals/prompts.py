"""Class names and templates of zero-shot classifiers: built in, from a JSON file, or published.

Published prompts are read from installed packages, without importing them: CLIP_benchmark's JSON for about thirty
datasets (mostly OpenAI's), e.g. `clip_benchmark:eurosat`; and open_clip's for ImageNet: the 1000 names of Radford et
al. 2021, their 80 templates, and the 7 that they later found by forward selection.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Sequence

from clip_jax.config import check_name
from clip_jax.typing import Unavailable

SLOT = "{}"  # placeholder of the class name
Names = tuple[tuple[str, ...], ...]  # one or more names (or prompts) per class

BUILTIN: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    # For photos without published templates.
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

# File names in CLIP_benchmark.
CLIP_BENCHMARK = {"templates": "en_zeroshot_classification_templates.json", "class_names": "en_classnames.json"}
# Variable names in open_clip's `zero_shot_metadata.py`.
OPEN_CLIP_TEMPLATES = {"imagenet_80": "OPENAI_IMAGENET_TEMPLATES", "imagenet_7": "SIMPLE_IMAGENET_TEMPLATES"}
OPEN_CLIP_CLASS_NAMES = {"imagenet": "IMAGENET_CLASSNAMES"}
FORMAT = 'a JSON object such as {"class_names": ["cat", ["dog", "puppy"]], "templates": ["a photo of a {}."]}'


def class_texts(class_names: Names, templates: Sequence[str]) -> Names:
    """Return the prompts of every class: each of its names in each template."""
    return tuple(
        tuple(template.replace(SLOT, name) for template in templates for name in names) for names in class_names
    )


def digest(class_names: Names, templates: Sequence[str]) -> str:
    """Return a hash of class names and templates, twelve hexadecimal digits, for reports."""
    text = json.dumps([class_names, templates], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def templates(name: str) -> tuple[str, ...]:
    """Return the templates of a key of BUILTIN, `clip_benchmark:<set>`, `open_clip:imagenet_80` or `_7`, or a .json.

    Raises Unavailable if the package is not installed, and ValueError for an unknown name or a template without SLOT.
    """
    found = BUILTIN[name] if name in BUILTIN else _read_prompts("templates", name, OPEN_CLIP_TEMPLATES, BUILTIN)
    for template in found:
        if not isinstance(template, str) or SLOT not in template:
            raise ValueError(f"{name}: expected {SLOT!r} in every template, got {template!r}")
    return tuple(found)


def class_names(name: str) -> Names:
    """Return the class names of `clip_benchmark:<set>`, `open_clip:imagenet` or a JSON file, by class id.

    ImageNet has 998 different names for 1000 classes: missile and sunglasses occur twice, as in the paper. Raises
    Unavailable if the package is not installed, and ValueError for an unknown name or a class without a name.
    """
    found = _read_prompts("class_names", name, OPEN_CLIP_CLASS_NAMES)
    several = [(names,) if isinstance(names, str) else tuple(names) for names in found]
    for class_id, names in enumerate(several):
        if not names or not all(isinstance(one, str) and one.strip() for one in names):
            raise ValueError(f"{name}: class {class_id}: expected a name or a list of names, got {names}")
    return tuple(several)


def _read_prompts(kind: str, name: str, in_open_clip: dict[str, str], builtin: Iterable[str] = ()) -> list:
    """Read 'templates' or 'class_names' from a package or a file."""
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
    known = [*builtin, "clip_benchmark:<set>", *(f"open_clip:{key}" for key in in_open_clip)]
    raise ValueError(f"{kind}={name!r}: use {', '.join(known)}, or a .json file")


def _from_file(path: str, key: str) -> list:
    file = pathlib.Path(path).expanduser()
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: {error}. Prompts are {FORMAT}") from error
    if not isinstance(value, dict) or not isinstance(value.get(key), list) or not value[key]:
        raise ValueError(f"{file}: expected a list {key!r} that is not empty. Prompts are {FORMAT}")
    return value[key]


def _directory(package: str, install: str) -> pathlib.Path:
    """Return the directory of a package without importing it, which would import torch."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"published prompts need the package {package}: pip install {install}")
    return pathlib.Path(spec.submodule_search_locations[0])


@functools.cache
def _clip_benchmark(file: str) -> dict[str, list]:
    directory = _directory("clip_benchmark", "--no-deps clip-benchmark")
    return json.loads((directory / "datasets" / file).read_text(encoding="utf-8"))


@functools.cache
def _open_clip(variable: str) -> list[str]:
    """Return a tuple of strings, or of lambdas as templates, from open_clip's source."""
    file = _directory("open_clip", "--no-deps open_clip_torch") / "zero_shot_metadata.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == variable for t in node.targets):
            return [_template(item) for item in node.value.elts]
    raise ValueError(f"{file} defines no {variable}; open_clip_torch 3.3.0 does")


def _template(node: ast.expr) -> str:
    """Return 'x' for the expression 'x', and 'x {} y' for lambda c: f'x {c} y'."""
    if not isinstance(node, ast.Lambda):
        return ast.literal_eval(node)
    parts = node.body.values if isinstance(node.body, ast.JoinedStr) else [node.body]
    return "".join(SLOT if isinstance(part, ast.FormattedValue) else ast.literal_eval(part) for part in parts)

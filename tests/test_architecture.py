"""Architecture rules, checked on the syntax trees. A rule that no test checks is gone in a month.

Import layers: a package imports only packages of lower layers, so packages of one layer never import each other:
an object of one reaches another as an argument. A new package gets its line in LAYERS. Every rule has a bad snippet
below that it must catch.
"""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from tests import vocabulary

ROOT = pathlib.Path(__file__).parents[1]

LAYERS = {
    **dict.fromkeys(["paths", "provenance", "typing"], 0),
    **dict.fromkeys(["models", "losses"], 1),
    "config": 2,
    **dict.fromkeys(["data", "devices", "preprocess", "tokenizers"], 3),
    **dict.fromkeys(["evals", "interop"], 4),
    "training": 5,
    **dict.fromkeys(["__main__", "command", "inference", "planner"], 6),
    "embedding": 7,
    **dict.fromkeys(["completion", "convert", "embed", "evaluate", "index", "inspect", "main", "plan", "search"], 8),
    "__init__": 9,  # re-exports lazily: the subprocess test below
}
COMMANDS = {name for name, layer in LAYERS.items() if layer == 8}

# Heavy dependencies, each with the only paths (units or modules of clip_jax) that may import it.
OWNERS = {
    "tensorflow": {"data"},
    "tensorflow_datasets": {"evals/datasets", "data/sources/tfds"},
    "orbax": {"training/checkpoint"},
    "flax": {"models", "interop/msgpack"},
    "absl": COMMANDS | {"command"},
    "torch": set(),
}
CONFIG_IMPORTS = {"clip_jax.config", "ml_collections", "__future__"}
CATCH_ALLS = {"utils", "util", "common", "helpers", "misc"}
MAX_LINES = 450  # of a file
MAX_FUNCTION_LINES = 80  # without the docstring


# --------------------------------------------------------------------------------------------------- the rules
# Each takes (path relative to the root, source, tree) and yields violations.


def imports_of(path, tree):
    """Yield (line, dotted module) of all imports, those inside functions too; relative ones made absolute."""
    package = ["clip_jax", *path.relative_to("clip_jax").parent.parts] if path.parts[0] == "clip_jax" else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "clip_jax":  # `from clip_jax import config` imports a module
                yield from ((node.lineno, f"clip_jax.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def unit_of(path):
    """Return the name in LAYERS of a path such as clip_jax/data/images.py: data."""
    return path.with_suffix("").parts[1]


def layers(path, source, tree):
    if path.parts[0] != "clip_jax":
        return
    unit = unit_of(path)
    if unit not in LAYERS:
        yield f"{path}: {unit!r} has no layer; add it to LAYERS in {pathlib.Path(__file__).name}"
        return
    for line, module in imports_of(path, tree):
        parts = module.split(".")
        other = parts[1] if parts[0] == "clip_jax" and len(parts) > 1 else None
        if other in (None, unit, "__version__"):
            continue
        layer, below = LAYERS[unit], LAYERS.get(other)
        if below is None or below >= layer:
            yield f"{path}:{line}: {unit} (layer {layer}) imports {other} (layer {below})"


def owners(path, source, tree):
    if path.parts[0] == "clip_jax":
        module = "/".join(path.with_suffix("").parts[1:])
        for line, imported in imports_of(path, tree):
            allowed = OWNERS.get(imported.split(".")[0])
            if allowed is not None and not any(module == a or module.startswith(a + "/") for a in allowed):
                yield f"{path}:{line}: imports {imported}, which belongs to {', '.join(sorted(allowed)) or 'nobody'}"


def configs(path, source, tree):
    if path.parts[0] == "configs":
        for line, module in imports_of(path, tree):
            if module not in CONFIG_IMPORTS:
                yield f"{path}:{line}: a config imports {module}"


def file_names(path, source, tree):
    if path.stem in CATCH_ALLS:
        yield f"{path}: name the file for its content; {path.stem!r} has none"


def docstrings(path, source, tree):
    empty_package = path.parts[0] == "tests" and not source.strip()  # an __init__.py
    if not empty_package and not ast.get_docstring(tree):
        yield f"{path}: has no docstring"


def lengths(path, source, tree):
    if (lines := source.count("\n")) > MAX_LINES:
        yield f"{path}: {lines} lines, at most {MAX_LINES}"
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        documentation = node.body[0] if ast.get_docstring(node, clean=False) else None
        lines = node.end_lineno - node.lineno + 1
        lines -= documentation.end_lineno - documentation.lineno + 1 if documentation else 0
        if lines > MAX_FUNCTION_LINES:
            yield f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"


RULES = (layers, owners, configs, file_names, docstrings, lengths)


def violations(path, source):
    path, tree = pathlib.PurePosixPath(path), ast.parse(source)
    return [message for rule in RULES for message in rule(path, source, tree)]


# ------------------------------------------------------------------------------------------------------- the tests

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("clip_jax", "configs", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES)
def test_file_keeps_the_rules(path):
    assert not violations(path, (ROOT / path).read_text(encoding="utf-8"))


def test_every_folder_of_the_package_is_a_package():
    """Otherwise setup.py's find_packages leaves it out, and only the installed package misses it."""
    folders = {path.parent for path in (ROOT / "clip_jax").rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


DOC = '"""What it is."""\n'


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("clip_jax/config/schema.py", "import clip_jax.data", r"config \(layer 2\) imports data \(layer 3\)"),
        ("clip_jax/losses/softmax.py", "from clip_jax.devices import sharding", r"losses \(layer 1\) imports devices"),
        ("clip_jax/losses/softmax.py", "from ..data import order", r"losses \(layer 1\) imports data"),
        ("clip_jax/models/clip.py", "def f():\n    import clip_jax.losses", "models .* imports losses"),
        ("clip_jax/evals/embed.py", "from clip_jax.interop import names", r"evals \(layer 4\) imports interop"),
        (
            "clip_jax/training/loop.py",
            "from clip_jax.main import main",
            r"\(layer 5\) imports main \(layer 8\)",
        ),
        ("clip_jax/search.py", "from clip_jax import load", r"imports load \(layer None\)"),
        ("clip_jax/surprise.py", "", "'surprise' has no layer"),
        ("clip_jax/models/vit.py", "import tensorflow as tf", "tensorflow, which belongs to data"),
        ("clip_jax/training/loop.py", "from orbax import checkpoint", "orbax, which belongs to training/checkpoint"),
        ("clip_jax/interop/openai.py", "from flax import serialization", "belongs to interop/msgpack, models"),
        (
            "clip_jax/training/loop.py",
            "from absl import logging",
            "absl, which belongs to command, completion, convert, embed, evaluate, index, inspect, main, plan, search",
        ),
        ("clip_jax/interop/openai.py", "import torch", "torch, which belongs to nobody"),
        ("configs/x.py", "import jax", "a config imports jax"),
        ("configs/x.py", "from clip_jax import models", "a config imports clip_jax.models"),
        ("clip_jax/evals/utils.py", "", "'utils' has none"),
        ("clip_jax/config/schema.py", "from clip_jax.config import MODELS", None),
        ("clip_jax/data/pipeline.py", "from clip_jax.data import order", None),
        ("clip_jax/interop/msgpack.py", "from flax import serialization", None),
        ("clip_jax/main.py", "from absl import app", None),
    ],
)
def test_rules_catch_what_they_name_and_nothing_else(path, code, message):
    found = violations(path, DOC + code)
    assert bool(found) == (message is not None), found
    if message:
        assert re.search(message, found[0])


def test_rules_catch_missing_docstrings_long_files_and_long_functions():
    assert "has no docstring" in violations("clip_jax/config/schema.py", "x = 1\n")[0]
    assert f"at most {MAX_LINES}" in violations("clip_jax/config/schema.py", DOC + "x = 1\n" * MAX_LINES)[0]
    function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert f"at most {MAX_FUNCTION_LINES}" in violations("clip_jax/config/schema.py", DOC + function)[0]


@pytest.mark.parametrize("path", vocabulary.checked_files())
def test_file_keeps_the_vocabulary(path):
    assert not vocabulary.violations(path, (ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("path", "source", "replacement"),
    [
        ("clip_jax/models/vit.py", "def encode(picture): pass", "use image"),
        ("clip_jax/models/vit.py", "class TextPerceptron: pass", "use mlp"),
        ("clip_jax/models/vit.py", "img_size = 3", "use image"),
        ("clip_jax/models/vit.py", "x.label = 3", "use class_id"),
        ("clip_jax/models/vit.py", 'def f():\n    """Return what a block costs."""', "use name the thing"),
        ("clip_jax/models/vit.py", "x = 1  # so many neighbors", "use a gloss"),
        ("clip_jax/models/vit.py", "raise ValueError(f'{x} was told to stop')", "use return, report"),
        ("tests/test_x.py", "theirs = 1", "use source"),
        ("docs/x.md", "A gate for images", "use threshold"),
        ("docs/x.md", "```sh\nmake a_gate  # for pictures\n```\n", None),
        ("docs/x.md", "`picture` is a key of TFDS", None),
        ("Makefile", "# ask the compiler", "use request"),
        ("Makefile", "ask:\n\techo", None),
        ("clip_jax/models/vit.py", "x = record.picture", None),
        ("clip_jax/models/vit.py", "x = itertools.product(a, b)", None),
        ("clip_jax/models/vit.py", "x = 1  # the dot product; errors say what to do", "use report"),
        ("clip_jax/models/vit.py", "x = 1  # the dot product; what to do", None),
    ],
)
def test_vocabulary_catches_planted_words_and_no_others(path, source, replacement):
    found = vocabulary.violations(path, source)
    assert bool(found) == (replacement is not None), found
    if replacement:
        assert replacement in found[0]


def test_vocabulary_exceptions_are_used_and_have_reasons():
    for (prefix, word), reason in vocabulary.ALLOWED.items():
        assert reason
        files = [path for path in vocabulary.checked_files() if path.startswith(prefix)]
        assert files, prefix
        if word:
            texts = [(ROOT / path).read_text(encoding="utf-8").lower() for path in files]
            assert any(re.search(rf"(?:{word})", text) for text in texts), (prefix, word)


@pytest.mark.parametrize("heavy", ["tensorflow", "orbax", "flax", "torch"])
def test_importing_the_package_imports_nothing_heavy(heavy):
    code = f"import sys, clip_jax; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

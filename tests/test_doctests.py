"""The examples in docstrings: every module of the package with a `>>>` runs as a doctest."""

import doctest
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "clip_jax").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_module(module):
    results = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert results.attempted and not results.failed


def test_modules_with_public_functions_have_examples():
    assert {"clip_jax.data", "clip_jax.preprocess", "clip_jax.tokenizers"} <= set(MODULES)
    assert {"clip_jax.inference", "clip_jax.interop.convert", "clip_jax.interop.msgpack"} <= set(MODULES)

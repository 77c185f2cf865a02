"""The examples in docstrings run."""

import doctest
import importlib

import pytest

MODULES = [
    "clip_jax.inference",
    "clip_jax.interop.convert",
    "clip_jax.interop.msgpack",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed

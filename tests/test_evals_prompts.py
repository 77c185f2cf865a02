"""Prompts: built in, from files, and from packages that are read without an import."""

import json
import sys

import pytest

from clip_jax.evals import prompts
from clip_jax.typing import Unavailable

# The syntax of open_clip: lambdas, names over several lines.
SOURCE = """
import torch_that_is_not_there
SIMPLE_IMAGENET_TEMPLATES = (
    lambda c: f'a {c} of mine.',
    lambda name: f"{name}, it's said, or {name}",
)
IMAGENET_CLASSNAMES = (
    "tench", "great {white} shark",
    'sunglasses', "sunglasses",
)
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Fake packages with the files that are read; importing either fails."""
    for name in ("clip_benchmark", "open_clip"):
        (tmp_path / name / "datasets").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("raise ImportError('read, not imported')")
    (tmp_path / "open_clip/zero_shot_metadata.py").write_text(SOURCE)
    data = tmp_path / "clip_benchmark/datasets"
    data.joinpath("en_classnames.json").write_text(
        json.dumps({"eurosat": ["forest", "sea"], "fer2013": [["glad", "happy"], ""]})
    )
    data.joinpath("en_zeroshot_classification_templates.json").write_text(
        json.dumps({"eurosat": ["a photo of {c} from above.", "{c}."], "broken": ["no slot"]})
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("clip_benchmark", "open_clip"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for cached in (prompts._clip_benchmark, prompts._open_clip):
        cached.cache_clear()
    yield
    for cached in (prompts._clip_benchmark, prompts._open_clip):
        cached.cache_clear()


def test_published_prompts_are_read_without_an_import(packages):
    assert prompts.templates("clip_benchmark:eurosat") == ("a photo of {} from above.", "{}.")
    assert prompts.class_names("clip_benchmark:eurosat") == (("forest",), ("sea",))
    assert prompts.templates("open_clip:imagenet_7") == ("a {} of mine.", "{}, it's said, or {}")
    names = prompts.class_names("open_clip:imagenet")
    assert names == (("tench",), ("great {white} shark",), ("sunglasses",), ("sunglasses",))
    assert not {"clip_benchmark", "open_clip"} & set(sys.modules)


@pytest.mark.parametrize(
    "read, name, message",
    [
        ("templates", "clip_benchmark:eurosats", "templates='eurosats' is none of eurosat, broken.*eurosat"),
        ("templates", "clip_benchmark:broken", "expected '{}' in every template, got 'no slot'"),
        ("templates", "open_clip:imagenet_80", "defines no OPENAI_IMAGENET_TEMPLATES; open_clip_torch 3.3.0 does"),
        ("templates", "photos", "use name, photo, views, clip_benchmark:<set>"),
        ("class_names", "clip_benchmark:fer2013", r"class 1: expected a name or a list of names, got \('',\)"),
        ("class_names", "cats", "use clip_benchmark:<set>, open_clip:imagenet, or a .json file"),
    ],
)
def test_unknown_and_invalid_prompts_are_errors(packages, read, name, message):
    with pytest.raises(ValueError, match=message):
        getattr(prompts, read)(name)


def test_a_missing_package_is_reported_with_the_install_command(monkeypatch):
    prompts._clip_benchmark.cache_clear()
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="pip install --no-deps clip-benchmark"):
        prompts.templates("clip_benchmark:eurosat")


def test_prompts_of_a_json_file(tmp_path):
    file = tmp_path / "pets.json"
    file.write_text('{"class_names": ["cat", ["dog", "puppy"]], "templates": ["{}", "my {}, a {}"]}')
    texts = prompts.class_texts(prompts.class_names(str(file)), prompts.templates(str(file)))
    assert texts == (("cat", "my cat, a cat"), ("dog", "puppy", "my dog, a dog", "my puppy, a puppy"))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "Expecting property name.*Prompts are a JSON object such as"),
        ("[]", "expected a list 'templates'"),
        ('{"templates": []}', "expected a list 'templates' that is not empty"),
        ('{"templates": [3]}', "every template, got 3"),
    ],
)
def test_an_invalid_file_is_an_error_with_the_format(tmp_path, content, message):
    file = tmp_path / "own.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        prompts.templates(str(file))
    with pytest.raises(ValueError, match="No such file"):
        prompts.templates(str(tmp_path / "none.json"))


def test_the_digest_changes_with_any_prompt_and_the_order_of_classes():
    base = prompts.digest((("cat",), ("dog",)), ("a {}",))
    others = [
        prompts.digest((("dog",), ("cat",)), ("a {}",)),
        prompts.digest((("cat", "dog"),), ("a {}",)),
        prompts.digest((("cat",), ("dog",)), ("a {}.",)),
    ]
    assert len({base, *others}) == 4
    assert base == prompts.digest((("cat",), ("dog",)), ("a {}",)) == "38c4e22f0598"


def test_builtin_templates_have_a_slot():
    assert all(prompts.templates(name) for name in prompts.BUILTIN)

"""Configs: strict from the outside, checked number by number, and frozen as golden JSON.

After a change that is meant to change a config: `python tests/test_config.py`; then read the diff of the JSON.
"""

import dataclasses
import math
import pathlib
import runpy
import sys
import types
import typing
from collections.abc import Mapping

import ml_collections
import pytest

from clip_jax import config as c
from clip_jax.config import MODELS, Architecture
from clip_jax.config.ranges import RANGES

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/configs"
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))

# Mappings have no keys of their own: one stands for all.
EXAMPLE_KEYS = {
    "data.captions": "txt",
    "data.options": "examples",
    "eval.tasks": "x",
    "eval.tasks.x.options": "shots",
    "eval.thresholds": "retrieval/a/b",
}


def load(name):
    return runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]()


def numbers_of(hint, path=""):
    """Yield (dotted key, row in RANGES, int or float, sequence or not) of every number below a type."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        for name, inner in typing.get_type_hints(hint).items():
            yield from numbers_of(inner, f"{path}.{name}".lstrip("."))
    elif origin in (typing.Union, types.UnionType):
        for option in options:
            yield from numbers_of(option, path)
    elif origin is tuple and options[0] in (int, float):
        yield path, path, options[0], True
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        for key, row, kind, many in numbers_of(options[1], f"{path}.{EXAMPLE_KEYS[path]}"):
            yield key, row.replace(EXAMPLE_KEYS[path], "*"), kind, many
    elif hint in (int, float):
        yield path, path, hint, False


NUMBERS = {key: rest for key, *rest in numbers_of(c.Config)}
IMAGE_TOWERS = typing.get_args(typing.get_type_hints(Architecture)["image"])


def config_with(key, value):
    """Return a whole config as nested dicts, with one value changed; its image tower is the first that has the key."""
    tower = next(
        (t for t in IMAGE_TOWERS if key.removeprefix("model.image.") in typing.get_type_hints(t)), IMAGE_TOWERS[0]
    )
    tree = dataclasses.asdict(c.Config(model=Architecture(image=tower())))
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    node[last] = value
    return tree


# ------------------------------------------------------------------------------------------------ every number


def test_every_number_has_a_range_and_every_range_a_number():
    assert {row for row, _, _ in NUMBERS.values()} == set(RANGES)


@pytest.mark.parametrize("key", NUMBERS)
def test_number_out_of_range_is_refused_by_name(key):
    row, kind, many = NUMBERS[key]
    low, high = RANGES[row]
    step = 1 if kind is int else max(1e-9, abs(high) * 1e-6)
    for bad in (low - 1, high + step):
        with pytest.raises(ValueError, match=rf"{key}.* is out of range; it must lie between") as error:
            c.from_config_dict(config_with(key, [bad] if many else bad))
        assert f"{low:g} and {high:g}" in str(error.value)
    for good in (low, high):
        c.from_config_dict(config_with(key, [kind(good)] if many else kind(good)))


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_everywhere(key, bad):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        c.from_config_dict(config_with(key, [bad] if NUMBERS[key][2] else bad))


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("bad", ["3", True, None, [[1]]])
def test_what_is_no_number_is_refused_everywhere(key, bad):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        c.from_config_dict(config_with(key, bad))


# ------------------------------------------------------------------------------------------- keys, types, unions


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"trian": {}}, "no key 'trian'; did you mean 'train'"),
        ({"train": {"batchsize": 8}}, r"no key 'train\.batchsize'; did you mean 'batch_size'"),
        ({"data": {"augment": {"hue_degree": 8}}}, r"no key 'data\.augment\.hue_degree'; did you mean 'hue_degrees'"),
        ({"model": {"image": {"kind": "vit", "patchsize": 16}}}, "did you mean 'patch_size'"),
        (
            {"eval": {"tasks": {"a": {"evaluater": "x"}}}},
            r"no key 'eval\.tasks\.a\.evaluater'; did you mean 'evaluator'",
        ),
        (
            {"train": {"dtype": "bf16"}},
            r"train\.dtype='bf16' is none of 'bfloat16', 'float32'; did you mean 'bfloat16'",
        ),
        ({"model": {"image": {"kind": "swin"}}}, r"model\.image\.kind='swin' is none of 'vit', 'resnet', 'edges'"),
        ({"model": {"image": {"layers": 3}}}, r"model\.image\.kind=None is none of"),
        ({"train": {"batch_size": 8.0}}, r"train\.batch_size=8\.0 is a float, expected int"),
        ({"data": {"files": ["a"]}}, r"data\.files=\['a'\] is a list, expected str"),
        ({"preprocess": {"mean": "0.5"}}, r"preprocess\.mean='0\.5' should be a sequence"),
        ({"data": {"captions": "txt"}}, r"data\.captions='txt' should be a mapping"),
        ({"train": 8}, "train=8 should be a mapping with the keys of TrainConfig"),
    ],
)
def test_error_says_what_is_wrong_and_what_is_right(tree, message):
    with pytest.raises(ValueError, match=message):
        c.from_config_dict(tree)


def test_a_flag_cannot_add_a_key():
    with pytest.raises(AttributeError, match="batch_size"):
        c.default_config().train.batchsize = 8


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="'vit_b23'; did you mean 'vit_b32'"):
        c.default_config("vit_b23")


def test_an_unknown_name_of_a_registry_names_the_nearest():
    with pytest.raises(ValueError, match="loss.name='sofmax' is none of softmax, sigmoid; did you mean 'softmax'"):
        c.check_name("loss.name", "sofmax", {"softmax": None, "sigmoid": None})


def test_an_integer_will_do_for_a_float():
    rate = c.from_config_dict({"optim": {"learning_rate": 1}}).optim.learning_rate
    assert rate == 1.0
    assert isinstance(rate, float)


def test_differences_are_named_by_dotted_key():
    old, new = (c.from_config_dict({"train": {"seed": seed}}) for seed in (0, 1))
    assert c.differences(old, new) == {"train.seed": (0, 1)}
    assert c.differences(old, old) == {}


# --------------------------------------------------------------------------------------------- the configs we ship


def test_every_config_is_named_for_its_model_and_has_its_golden_file():
    assert set(CONFIGS) == {path.stem for path in GOLDEN.glob("*.json")}
    papers = {"rn50", "rn101", "rn50x4", "rn50x16", "rn50x64", "vit_b32", "vit_b16", "vit_l14", "vit_l14_336"}
    assert papers | {"siglip_b16", "emoji"} == set(CONFIGS) <= set(MODELS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_its_golden_json_there_and_back(name):
    config = c.from_config_dict(load(name))
    golden = (GOLDEN / f"{name}.json").read_text()
    assert c.to_json(config) == golden
    assert c.from_json(golden) == config
    assert config.model == MODELS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_resolves_and_is_locked(name):
    config_dict = load(name)
    assert isinstance(config_dict, ml_collections.ConfigDict)
    assert config_dict.is_locked
    resolved = c.resolve(c.from_config_dict(config_dict), devices=8, examples=1_000_000)
    assert resolved.batch_per_device * 8 == resolved.config.train.batch_size


# 32 epochs of 400 M pairs in batches of 32,768; one epoch for the fine-tuning at 336 px.
@pytest.mark.parametrize(
    ("name", "steps", "rate", "size"),
    [
        ("rn50", 390_625, 5e-4, 224),
        ("rn101", 390_625, 5e-4, 224),
        ("rn50x4", 390_625, 5e-4, 288),
        ("rn50x16", 390_625, 4e-4, 384),
        ("rn50x64", 390_625, 3.6e-4, 448),
        ("vit_b32", 390_625, 5e-4, 224),
        ("vit_b16", 390_625, 5e-4, 224),
        ("vit_l14", 390_625, 4e-4, 224),
        ("vit_l14_336", 12_207, 2e-5, 336),
    ],
)
def test_the_paper_s_recipe(name, steps, rate, size):
    resolved = c.resolve(c.from_config_dict(load(name)), devices=256)
    config = resolved.config
    assert (resolved.total_steps, config.optim.learning_rate, config.train.batch_size) == (steps, rate, 32_768)
    assert (config.optim.warmup_steps, config.optim.weight_decay) == (2000, 0.2)
    b2, eps = (0.999, 1e-8) if name.startswith("rn") else (0.98, 1e-6)
    assert (config.optim.b1, config.optim.b2, config.optim.eps) == (0.9, b2, eps)
    assert config.model.image.image_size == size
    assert (config.loss.logit_scale_init, config.loss.logit_scale_max) == (1 / 0.07, 100.0)


# -------------------------------------------------------------------------------------------------------- resolve


def resolve(devices=8, processes=1, examples=None, train=None, **rest):
    train = {"batch_size": 64, "total_steps": 10_000} | (train or {})
    return c.resolve(
        c.from_config_dict({"train": train, **rest}), devices=devices, processes=processes, examples=examples
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"train": {"batch_size": 1000}, "devices": 32},
            r"batch_size=1000 does not divide over 32 devices; use 992 or 1024",
        ),
        ({"train": {"batch_size": 5}}, r"batch_size=5 does not divide over 8 devices; use 8$"),
        ({"devices": 8, "processes": 3}, "8 devices do not divide over 3 processes"),
        ({"train": {"total_steps": 0}}, "give one of train.total_steps.*got none of them"),
        ({"train": {"total_examples": 9}}, "got train.total_steps=10000 and train.total_examples=9"),
        (
            {"train": {"total_steps": 0, "total_epochs": 2}},
            r"total_epochs=2\.0 needs the data.*give train.total_examples",
        ),
        (
            {"train": {"total_steps": 2000}},
            r"warmup_steps=2000 does not end before the run's 2000 steps; use at most 200",
        ),
        ({"model": {"image": {"kind": "vit", "patch_size": 30}}}, "224 is not a multiple of .*patch_size=30; use 210"),
        (
            {"model": {"image": {"kind": "resnet", "image_size": 200}}},
            r"image_size=200 is not a multiple of 2\*\*\(1 \+ len\(model\.image\.layers\)\)=32; use 192",
        ),
        ({"loss": {"name": "sigmoid"}}, "loss.name='sigmoid' has a bias.*model.logit_bias=True"),
        (
            {"model": {"image": {"kind": "resnet"}}, "train": {"patch_dropout": 0.5}},
            "patch_dropout=0.5 needs patches",
        ),
        (
            {"model": {"text": {"projection": "none"}, "embed_dim": 640}},
            "model.text has no projection, so model.embed_dim=640 has to be its width 512",
        ),
        ({"model": {"text": {"heads": 7}}}, "model.text.width=512 is not a multiple of model.text.heads=7"),
        (
            {"model": {"image": {"kind": "edges", "cell": 5}}},
            r"image_size=48 is not a multiple of model\.image\.cell · 2\*\*len\(model\.image\.channels\)=20; use 40",
        ),
    ],
)
def test_resolve_refuses_and_names_the_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve(**arguments)


def test_the_batches_that_the_error_names_do_work():
    for batch in (992, 1024):
        assert resolve(devices=32, train={"batch_size": batch}).batch_per_device == batch // 32


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"total_steps": 5000}, 5000),
        ({"total_steps": 0, "total_examples": 64 * 5000 + 63}, 5000),
        ({"total_steps": 0, "total_epochs": 2.5}, 5000),
    ],
)
def test_length_is_the_same_in_steps_examples_and_epochs(train, steps):
    assert resolve(train=train, examples=64 * 2000).total_steps == steps


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for stale in set(GOLDEN.glob("*.json")) - {GOLDEN / f"{name}.json" for name in CONFIGS}:
        stale.unlink()
    for config_name in CONFIGS:
        (GOLDEN / f"{config_name}.json").write_text(c.to_json(c.from_config_dict(load(config_name))))
    sys.exit(print(f"wrote {len(CONFIGS)} files to {GOLDEN}"))

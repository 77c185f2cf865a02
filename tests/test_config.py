"""Configs: strict conversion, ranges of all numbers, golden JSON files.

After an intended change of a config, run `PYTHONPATH=. python tests/test_config.py` and review the diff of the JSON.
"""

import dataclasses
import math
import pathlib
import re
import runpy
import sys
import typing
from collections.abc import Mapping

import ml_collections
import pytest

from clip_jax import config as c
from clip_jax.config import MODELS, TOWERS, Architecture
from clip_jax.config.ranges import RANGES, ranges_of

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/configs"
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))

# An example key for each mapping with free keys.
EXAMPLE_KEYS = {
    "data.captions": "txt",
    "data.options": "examples",
    "data.mixture": "first",
    "data.mixture.first.options": "examples",
    "eval.tasks": "x",
    "eval.tasks.x.options": "shots",
    "eval.thresholds": "retrieval/a/b",
}


def load(name):
    return runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]()


class Number(typing.NamedTuple):
    """A number in a config: its dotted key, key of its range, type, whether it is in a sequence, and its model."""

    key: str
    row: str
    kind: type
    many: bool
    model: Architecture = Architecture()


def numbers_of(hint, path=""):
    """Yield all numbers of a config class; those of towers once for each registered tower."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, (c.ImageTower, c.TextTower)):
        for tower in TOWERS.values():
            if issubclass(tower, hint):
                model = Architecture(**{path.rpartition(".")[2]: tower()})
                yield from (number._replace(model=model) for number in numbers_of_fields(tower, path))
    elif dataclasses.is_dataclass(hint):
        yield from numbers_of_fields(hint, path)
    elif origin is tuple and options[0] in (int, float):
        yield Number(path, path, options[0], True)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        for number in numbers_of(options[1], f"{path}.{EXAMPLE_KEYS[path]}"):
            yield number._replace(row=number.row.replace(EXAMPLE_KEYS[path], "*"))
    elif hint in (int, float):
        yield Number(path, path, hint, False)


def numbers_of_fields(cls, path):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield from numbers_of(hints[field.name], f"{path}.{field.name}".lstrip("."))


NUMBERS = list(numbers_of(c.Config))
every_number = pytest.mark.parametrize("number", NUMBERS, ids=[f"{n.key}-{n.model.image.kind}" for n in NUMBERS])


def config_with(number, value):
    """Return a whole config as nested dicts, with one number changed."""
    tree = dataclasses.asdict(c.Config(model=number.model))
    *parents, last = number.key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = [value] if number.many else value
    return tree


# ------------------------------------------------------------------------------------------------ every number


def test_every_number_has_a_range_and_every_range_a_number():
    assert {number.row for number in NUMBERS if not number.key.startswith(("model.image", "model.text"))} == set(RANGES)
    for number in NUMBERS:
        assert number.row in ranges_of(number.model)
    for kind, tower in TOWERS.items():
        part = "image" if issubclass(tower, c.ImageTower) else "text"
        keys = {n.key for n in NUMBERS if n.key.startswith(f"model.{part}.") and getattr(n.model, part).kind == kind}
        assert keys == {f"model.{part}.{key}" for key in tower.ranges()}


@every_number
def test_number_out_of_range_is_rejected_with_its_key(number):
    low, high = ranges_of(number.model)[number.row]
    step = 1 if number.kind is int else max(1e-9, abs(high) * 1e-6)
    for bad in (low - 1, high + step):
        with pytest.raises(ValueError, match=rf"{number.key}.* is out of range; it must be between") as error:
            c.from_config_dict(config_with(number, bad))
        assert f"{low:g} and {high:g}" in str(error.value)
    for good in (low, high):
        c.from_config_dict(config_with(number, number.kind(good)))


@every_number
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_rejected(number, bad):
    with pytest.raises(ValueError, match=number.key.replace(".", r"\.")):
        c.from_config_dict(config_with(number, bad))


@every_number
@pytest.mark.parametrize("bad", ["3", True, None, [[1]]])
def test_value_that_is_no_number_is_rejected(number, bad):
    with pytest.raises(ValueError, match=number.key.replace(".", r"\.")):
        c.from_config_dict(config_with(number._replace(many=False), bad))


# ------------------------------------------------------------------------------------------- keys, types, unions


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"trian": {}}, "no key 'trian'; did you mean 'train'"),
        ({"train": {"nosuch": 1}}, r"no key 'train\.nosuch' \(keys here: batch_size, "),
        ({"train": {"warmup": 1}}, r"no key 'train\.warmup'; did you mean 'optim\.warmup_steps'"),
        ({"batch_size": 8}, r"no key 'batch_size'; did you mean 'train\.batch_size'"),
        ({"optim": {"lr": 1e-3}}, r"no key 'optim\.lr'; did you mean 'optim\.learning_rate'"),
        ({"optim": {"wd": 0.1}}, r"no key 'optim\.wd'; did you mean 'optim\.weight_decay'"),
        ({"eval": {"total_steps": 8}}, r"no key 'eval\.total_steps'; did you mean 'train\.total_steps'"),
        ({"train": {"batchsize": 8}}, r"no key 'train\.batchsize'; did you mean 'train\.batch_size'"),
        (
            {"data": {"augment": {"hue_degree": 8}}},
            r"no key 'data\.augment\.hue_degree'; did you mean 'data\.augment\.hue_degrees'",
        ),
        ({"model": {"image": {"kind": "vit", "patchsize": 16}}}, "did you mean 'model.image.patch_size'"),
        (
            {"eval": {"tasks": {"a": {"evaluater": "x"}}}},
            r"no key 'eval\.tasks\.a\.evaluater'; did you mean 'eval\.tasks\.a\.evaluator'",
        ),
        (
            {"train": {"dtype": "bf16"}},
            r"train\.dtype='bf16' is none of 'bfloat16', 'float32'; did you mean 'bfloat16'",
        ),
        (
            {"model": {"image": {"kind": "swin"}}},
            r"model\.image\.kind='swin' is none of vit, resnet, edgenet .*--modules",
        ),
        ({"model": {"image": {"layers": 3}}}, r"model\.image\.kind=None is none of"),
        ({"train": {"batch_size": 8.0}}, r"train\.batch_size=8\.0 is a float, expected int"),
        ({"data": {"files": ["a"]}}, r"data\.files=\['a'\] is a list, expected str"),
        ({"preprocess": {"resize": "longer"}}, r"preprocess\.resize='longer' is none of .* did you mean 'longest'"),
        ({"preprocess": {"mean": "0.5"}}, r"preprocess\.mean='0\.5' should be a sequence"),
        ({"data": {"captions": "txt"}}, r"data\.captions='txt' should be a mapping"),
        ({"train": 8}, "train=8 should be a mapping with the keys of TrainConfig"),
    ],
)
def test_error_has_the_key_and_a_suggestion(tree, message):
    with pytest.raises(ValueError, match=message):
        c.from_config_dict(tree)


def test_flags_cannot_add_a_key():
    with pytest.raises(AttributeError, match="batch_size"):
        c.default_config().train.batchsize = 8


def test_unknown_model_is_rejected_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown model 'vit_b23'; did you mean 'vit_b32'"):
        c.default_config("vit_b23")


def test_name_that_is_not_registered_is_rejected_with_the_nearest_name():
    with pytest.raises(ValueError, match="loss.name='sofmax' is none of softmax, sigmoid; did you mean 'softmax'"):
        c.check_name("loss.name", "sofmax", {"softmax": None, "sigmoid": None})


def test_integer_is_converted_to_float():
    rate = c.from_config_dict({"optim": {"learning_rate": 1}}).optim.learning_rate
    assert rate == 1.0
    assert isinstance(rate, float)


def test_differences_have_dotted_keys():
    old, new = (c.from_config_dict({"train": {"seed": seed}}) for seed in (0, 1))
    assert c.differences(old, new) == {"train.seed": (0, 1)}
    assert c.differences(old, old) == {}


# --------------------------------------------------------------------------------------------- the shipped configs


def test_every_config_has_the_name_of_its_model_and_a_golden_file():
    assert set(CONFIGS) == {path.stem for path in GOLDEN.glob("*.json")}
    papers = {"rn50", "rn101", "rn50x4", "rn50x16", "rn50x64", "vit_b32", "vit_b16", "vit_l14", "vit_l14_336"}
    assert papers | {"siglip_b16", "emoji"} == set(CONFIGS) <= set(MODELS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_equals_its_golden_json_in_both_directions(name):
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
def test_configs_have_the_papers_recipe(name, steps, rate, size):
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
        ({"train": {"batch_size": 1}, "devices": 1}, "batch_size=1 has no negatives.*use at least 2"),
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
        (
            {"checkpoint": {"every_steps": 500, "keep_every_steps": 1200}},
            r"keep_every_steps=1200 is no multiple of checkpoint\.every_steps=500, .*; use 1000 or 1500$",
        ),
        ({"checkpoint": {"keep_every_steps": 7}}, r"keep_every_steps=7 is no multiple .*every_steps=1000.*; use 1000$"),
        ({"preprocess": {"resize": "longest"}}, "preprocess.resize='longest' .* inference alone.* Use 'shortest'"),
        ({"preprocess": {"resize_size": 200}}, "resize_size=200 .*a resize_size of 0 or at least 224 px"),
        ({"preprocess": {"fill_color": 9}}, "fill_color=9 is for inference alone"),
        ({"loss": {"name": "sigmoid"}}, "loss.name='sigmoid' has a bias.*model.logit_bias=True"),
        (
            {"model": {"image": {"kind": "resnet"}}, "train": {"patch_dropout": 0.5}},
            "patch_dropout=0.5 needs patches",
        ),
        (
            {"model": {"text": {"kind": "transformer", "projection": "none"}, "embed_dim": 640}},
            "model.text has no projection, so model.embed_dim=640 has to be its width 512",
        ),
        (
            {"model": {"text": {"kind": "transformer", "heads": 7}}},
            "model.text.width=512 is not a multiple of model.text.heads=7",
        ),
        (
            {"model": {"image": {"kind": "edgenet", "cell": 5}}},
            r"image_size=48 is not a multiple of model\.image\.cell · 2\*\*len\(model\.image\.channels\)=20; use 40",
        ),
    ],
)
def test_resolve_rejects_inconsistent_configs_with_the_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve(**arguments)


@pytest.mark.parametrize(
    ("key", "changes", "needed"),
    [
        ("loss.logit_bias_init=-5.0", {"loss": {"logit_bias_init": -5.0}}, "model.logit_bias=True"),
        ("optim.eps=1e-08", {"optim": {"name": "lion", "eps": 1e-8}}, "optim.name='adamw'"),
        ("optim.stochastic_rounding=False", {"optim": {"stochastic_rounding": False}}, "a half-precision optim"),
        ("optim.no_weight_decay='x'", {"optim": {"no_weight_decay": "x", "weight_decay": 0}}, "optim.weight_decay"),
        (
            "train.text_capacity=0.5",
            {"train": {"text_capacity": 0.5}, "model": {"text": {"kind": "transformer", "pool": "last"}}},
            "a causal text tower",
        ),
        ("eval.baselines_dataset='digits'", {"eval": {"baselines_dataset": "digits"}}, "a task of eval.tasks with"),
        ("init.preprocess='openai'", {"init": {"preprocess": "openai"}}, "init.weights: set it, or init.preprocess=''"),
        ("teacher.weight=2.0", {"teacher": {"weight": 2.0}}, "teacher.weights"),
    ],
)
def test_value_without_effect_is_refused(key, changes, needed):
    with pytest.raises(ValueError, match=re.escape(f"{key} has no effect without {needed}")):
        resolve(**changes)


def test_batch_sizes_suggested_by_the_error_work():
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
def test_duration_in_steps_examples_and_epochs_agrees(train, steps):
    assert resolve(train=train, examples=64 * 2000).total_steps == steps


@pytest.mark.parametrize(
    ("train", "examples", "notes"),
    [
        ({"total_steps": 100}, 128, []),
        ({"total_steps": 1}, 100, []),
        ({"total_steps": 2}, 100, ["100 examples are 1.5625 batches of 64: an epoch ends within a batch"]),
        ({"total_steps": 5}, 60, ["60 examples are fewer than train.batch_size=64: a batch repeats examples"]),
        ({"total_examples": 200}, 6400, ["total_examples=200 is rounded down to 3 steps: its last 8 examples are not"]),
        ({"total_epochs": 1.0}, 70, ["total_epochs=1.0 is rounded down to 1 steps: its last 6 examples are not used"]),
        ({"total_epochs": 0.5}, 100, ["total_epochs=0.5 is less than a batch and is rounded up to 1 step"]),
    ],
)
def test_batches_that_repeat_or_skip_examples_are_stated_in_a_sentence(train, examples, notes):
    config = c.from_config_dict({"optim": {"warmup_steps": 0}, "train": {"batch_size": 64} | train})
    steps = c.resolve(config, devices=1, examples=examples).total_steps
    found = c.data_notes(config, steps, examples)
    assert len(found) == len(notes) and all(note in text for note, text in zip(notes, found, strict=True)), found


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for stale in set(GOLDEN.glob("*.json")) - {GOLDEN / f"{name}.json" for name in CONFIGS}:
        stale.unlink()
    for config_name in CONFIGS:
        (GOLDEN / f"{config_name}.json").write_text(c.to_json(c.from_config_dict(load(config_name))))
    sys.exit(print(f"wrote {len(CONFIGS)} files to {GOLDEN}"))

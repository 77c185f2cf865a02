"""Strict conversion between ConfigDicts and the dataclasses of the schema.

`configs/*.py` start from `default_config()`, a locked ConfigDict, and change values. Flags change it further
(`--config.train.batch_size=512`). `from_config_dict` then returns the dataclasses or an error with the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import ml_collections

from clip_jax.config import ranges
from clip_jax.config.models import MODELS, preprocess_of, tokenizer_of
from clip_jax.config.schema import Config
from clip_jax.losses import LOSSES, ContrastiveLoss
from clip_jax.models.towers import TOWERS, Tower


def default_config(model: str = "vit_b32") -> ml_collections.ConfigDict:
    """Return the paper's recipe for a model of `MODELS`, a locked ConfigDict with every key.

    Raises:
      ValueError: for an unknown model.

    >>> default_config("vit_b16").train.batch_size
    32768
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}{did_you_mean(model, MODELS)}; expected one of {', '.join(MODELS)}")
    architecture = MODELS[model]
    return to_config_dict(
        Config(model=architecture, preprocess=preprocess_of(architecture), tokenizer=tokenizer_of(architecture))
    )


def to_config_dict(value: Any) -> ml_collections.ConfigDict:
    """Convert a config dataclass to a locked ConfigDict, which flags can override."""
    return ml_collections.ConfigDict(dataclasses.asdict(value)).lock()


def from_config_dict(config: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Convert nested mappings to a checked Config; absent keys have their defaults.

    Raises:
      ValueError: for unknown keys, wrong types and values out of range.

    >>> from_config_dict({"train": {"batch_size": 512}}).train.batch_size
    512
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    result = build(Config, config)
    ranges.check(flatten(dataclasses.asdict(result)), ranges.ranges_of(result.model))
    return result


def from_json(text: str) -> Config:
    """Parse the output of `to_json`, as strictly as `from_config_dict`."""
    return from_config_dict(json.loads(text))


def to_json(config: Any) -> str:
    """Format a config dataclass as JSON, keys in order of definition."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the old and new value of every dotted key in which two configs differ."""
    old_flat, new_flat = (flatten(dataclasses.asdict(c)) for c in (old, new))
    return {k: (old_flat.get(k), new_flat.get(k)) for k in old_flat | new_flat if old_flat.get(k) != new_flat.get(k)}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


@functools.cache
def mapping_keys() -> tuple[str, ...]:
    """Return the dotted keys whose values are mappings from names of the user's.

    >>> mapping_keys()
    ('data.mixture', 'data.captions', 'data.options', 'eval.thresholds', 'eval.tasks')
    """

    def keys(kind: type, prefix: str) -> Iterator[str]:
        for name, hint in typing.get_type_hints(kind).items():
            if typing.get_origin(hint) is Mapping:
                yield prefix + name
            elif dataclasses.is_dataclass(hint):
                yield from keys(hint, f"{prefix}{name}.")

    return tuple(keys(Config, ""))


@functools.cache
def schema_keys() -> tuple[str, ...]:
    """Return the dotted keys of the default config, in order of definition."""
    return tuple(flatten(dataclasses.asdict(Config())))


def check_name(key: str, name: object, names: Iterable[str]) -> None:
    """Raise ValueError if `name`, the value of a config key, is none of `names`, the keys of a registry."""
    if name not in (names := list(names)):
        raise ValueError(
            f"{key}={name!r} is none of {', '.join(names)}{did_you_mean(str(name), names)} (names of your own: import"
            " their module first, in commands by --modules)"
        )


def check_known_options(owner: str, options: Mapping[str, Any], function: Callable[..., Any], first: int) -> None:
    """Raise ValueError for an option that `function` has not among its parameters from number `first` on.

    Values of parameters that are annotated as numbers, strings, sequences of them or literals are checked, too.
    `owner` begins the message: the key of the options, and the source or evaluator that they are for.

    >>> def source(config, columns: Sequence[str] = ()): ...
    >>> check_known_options("data.options", {"columns": "a,b"}, source, first=1)
    Traceback (most recent call last):
    ValueError: data.options: columns='a,b' should be a sequence, e.g. (1, 2) or ('a', 'b')
    """
    known, hints = list(inspect.signature(function).parameters)[first:], {}
    with contextlib.suppress(NameError):  # of names that are imported for type checkers only
        hints = typing.get_type_hints(function)
    for name, value in options.items():
        if name not in known:
            near = did_you_mean(name, known)
            its = f"{near} Its" if near else "; its"
            raise ValueError(f"{owner} has no option {name!r}{its} options: {', '.join(known) or 'none'}")
        hint = hints.get(name)
        if hint in (bool, int, float, str) or typing.get_origin(hint) in (Literal, tuple, Sequence):
            try:
                build(hint, value, name)
            except ValueError as error:
                raise ValueError(f"{owner}: {error}") from None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return '; did you mean …?' with the most similar of `names`, or '' if none is similar.

    >>> did_you_mean("batchsize", ["batch_size", "seed"]), did_you_mean("lr", ["layer_decay", "learning_rate"])
    ("; did you mean 'batch_size'?", "; did you mean 'learning_rate'?")
    """
    near = _nearest(name, names)
    return f"; did you mean {near!r}?" if near else ""


def unknown_key(key: str, keys: Iterable[str]) -> str:
    """Return the error for a dotted key that is none of a config's `keys`, with the nearest of any section.

    >>> unknown_key("optim.lr", ["optim.learning_rate", "train.batch_size"])
    "config has no key 'optim.lr'; did you mean 'optim.learning_rate'?"
    >>> unknown_key("batch_size", ["optim.learning_rate", "train.batch_size"])
    "config has no key 'batch_size'; did you mean 'train.batch_size'?"
    >>> unknown_key("train.nosuch", ["train.batch_size", "data.source"])
    "config has no key 'train.nosuch'"
    """
    keys, (section, _, name) = list(keys), key.rpartition(".")
    siblings = {x.rpartition(".")[2]: x for x in keys if x.rpartition(".")[0] == section}
    others = {x.rpartition(".")[2]: x for x in reversed(keys)}  # the first of equal names
    nearest = name if name in others else _nearest(name, siblings) or _nearest(name, others, cutoff=0.65)
    near = siblings.get(nearest) or others.get(nearest)
    return f"config has no key {key!r}" + (f"; did you mean {near!r}?" if near else "")


def _nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """Return the name that `name` abbreviates, as 'lr' for 'learning_rate', or the most similar; '' without any.

    `cutoff` is the lowest ratio of `difflib.SequenceMatcher`: 0.67 for 'warmup' and 'warmup_steps'.
    """
    names = list(names)
    abbreviated = [x for x in names if len(name) > 1 and name == "".join(word[:1] for word in x.split("_"))]
    return next(iter(abbreviated or difflib.get_close_matches(name, names, n=1, cutoff=cutoff)), "")


def build(hint: Any, value: Any, path: str = "") -> Any:
    """Convert nested mappings, sequences and scalars to a type annotation of the schema, without range checks.

    Raises ValueError for unknown keys and wrong types, with `path`, the value's dotted key.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, Tower):
        towers = {kind: tower for kind, tower in TOWERS.items() if issubclass(tower, hint)}
        kind = value.get("kind") if isinstance(value, Mapping) else None
        check_name(f"{path}.kind", kind, towers)
        return _build_dataclass(towers[kind], value, path)
    if hint is ContrastiveLoss:
        name = value.get("name", "softmax") if isinstance(value, Mapping) else "softmax"
        check_name(f"{path}.name", name, LOSSES)
        return _build_dataclass(LOSSES[name], value, path)
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, path)
    if origin is Literal:
        if value not in options:
            raise ValueError(
                f"{path}={value!r} is none of {', '.join(map(repr, options))}{did_you_mean(str(value), options)}"
            )
        return value
    if origin in (tuple, Sequence):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise ValueError(f"{path}={value!r} should be a sequence, e.g. (1, 2) or ('a', 'b')")
        return tuple(build(options[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}={value!r} should be a mapping from names to values")
        return {str(k): build(options[1], item, f"{path}.{k}") for k, item in value.items()}
    return _build_scalar(hint, value, path)


def _build_dataclass(cls: type, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path or 'the config'}={value!r} should be a mapping with the keys of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in names:
            known = [*(prefix + name for name in names), *schema_keys()]
            raise ValueError(f"{unknown_key(prefix + key, known)} (keys here: {', '.join(names)})")
    return cls(**{key: build(hints[key], item, prefix + key) for key, item in value.items()})


def _build_scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{path}={value!r} is a {type(value).__name__}, expected {hint.__name__}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{path}={value} is not a finite number")
    return value

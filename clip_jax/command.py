"""Shared by the commands: flags and their help, logging, exit codes, and errors as one sentence."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import logging
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict

from clip_jax import config as configs
from clip_jax import paths

FINISHED, FAILED, REFUSED = 0, 1, 2

_MODULES = flags.DEFINE_list("modules", [], "Python modules to import first, which register towers, evaluators …")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of every error.")

# Arguments of `clip_jax.load` that are flags of every command that reads weights.
_WEIGHTS_FLAGS = {
    "model": "Model name, e.g. vit_b32, for weights without a config.",
    "activation": "quick_gelu, gelu or gelu_tanh, for weights without a config.",
    "preprocess": "Name such as openai, siglip, clipa, or preprocessor_config.json, for weights without a config.",
    "tokenizer": "SentencePiece .model or tokenizer.json, for weights without a tokenizer.",
    "prefix": "Prefix of the model's tensors, for files with several models, e.g. state_dict_ema.",
}

# Values of --config flags for names of the user's, by dotted key: `ml_collections` sets keys of the config file only.
_MAPPING_VALUES: dict[str, Any] = {}

Main = Callable[[list[str]], int]  # (positional arguments) -> exit code


def run(
    main: Main,
    *,
    positional: bool = False,
    refused: tuple[type[Exception], ...] = (ValueError, OSError),
    level: int = logging.WARNING,
    leave: Callable[[int], object] = sys.exit,
) -> None:
    """Parse the flags, run a command and exit with its code.

    Wrong flags, errors of the types `refused`, and a full or read-only disk exit with REFUSED and one sentence, with
    --debug after a traceback; other errors exit with FAILED and a traceback. --help prints the docstring of the
    command's module and its flags.

    Args:
      positional: whether the command accepts arguments that are not flags.
      level: of the messages of libraries; those of clip_jax are shown from INFO on.
      leave: exits after an error. `os._exit` for commands that run in several processes: `sys.exit` waits in JAX's
        shutdown barrier for the other hosts. They wait in a collective for this one, whose heartbeat continues: both
        would wait for five minutes without a message.
    """

    def parse(argv: list[str]) -> list[str]:
        if {"-h", "--help"} & set(itertools.takewhile("--".__ne__, argv[1:])):
            print(_help(main))
            sys.exit(FINISHED)
        try:
            _refuse_repeated(argv)
            sys.argv = _without_mapping_values(argv)  # where `ml_collections` reads its flags
            return flags.FLAGS(sys.argv)
        except flags.Error as error:
            _exit(REFUSED, str(error), leave)
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            # ml_collections raises AttributeError for an unknown config key.
            message = _unknown_key(argv) or _innermost_message(error)
            _exit(REFUSED, f"in the config or a --config flag: {message}", leave)

    def guarded(argv: list[str]) -> None:
        _set_up_logging(level)
        try:
            if argv[1:] and not positional:
                raise ValueError(f"unexpected argument {argv[1]!r}; flags begin with --")
            _import_modules(_MODULES.value)
            code = main(argv[1:])
        except Exception as error:  # noqa: BLE001
            if isinstance(error, refused) or paths.disk_error(error):
                _exit(REFUSED, paths.error_sentence(error), leave, with_traceback=_DEBUG.value)
            _exit(FAILED, f"{type(error).__name__}: {error}", leave, with_traceback=True)
        sys.exit(code)

    app.run(guarded, flags_parser=parse)


def _help(main: Main) -> str:
    """Return the docstring of a command's module, and a line or two for each of its flags."""
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    lines = [inspect.cleandoc(main.__globals__["__doc__"]), "", "flags:"]
    for flag in [*sorted(own, key=lambda flag: flag.name), *(flags.FLAGS[name] for name in ("modules", "debug"))]:
        value = "" if flag.boolean else "=" + ("" if flag.default is None else flag.default_as_str.strip("'"))
        head, margin = f"  --{flag.name}{value}", " " * 24
        text = textwrap.fill(flag.help, 100, initial_indent=margin, subsequent_indent=margin)
        lines.append(head + text[len(head) :] if len(head) < len(margin) else f"{head}\n{text}")
    return "\n".join(lines)


def define_weights_flags() -> Callable[[], dict[str, Any]]:
    """Define the flags that describe weights; return a function that returns their values, arguments of `load`."""
    flags.disclaim_key_flags()  # they are the calling module's, for --help
    found = {name: flags.DEFINE_string(name, "", text) for name, text in _WEIGHTS_FLAGS.items()}
    heads = flags.DEFINE_list("heads", [], "Attention heads of image and text tower, e.g. 12,8, for other sizes.")

    def values() -> dict[str, Any]:
        if not all(text.isdecimal() for text in heads.value) or len(heads.value) not in (0, 2):
            raise ValueError(f"--heads: expected two numbers such as 12,8, got {','.join(heads.value)}")
        return {name: flag.value for name, flag in found.items()} | {"heads": tuple(map(int, heads.value))}

    return values


def checked_config(value: ConfigDict | None) -> configs.Config:
    """Return the checked config of the --config flags. Raises ValueError if there is no such file."""
    if not isinstance(value, ConfigDict):
        path = pathlib.Path(flags.FLAGS["config"].config_filename)
        near = configs.did_you_mean(str(path), map(str, path.parent.glob("*.py")))
        raise ValueError(f"there is no config file {path}{near or '; give e.g. configs/emoji.py'}")
    tree = value.to_dict()
    for key, given in _MAPPING_VALUES.items():
        *sections, name = key.split(".")
        functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, tree)[name] = given
    return configs.from_config_dict(tree)


def _given_flags(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Yield name and argument of every known flag and config override, `--no<name>` as `<name>`."""
    for argument in itertools.takewhile("--".__ne__, argv[1:]):
        name = argument.lstrip("-").partition("=")[0] if argument.startswith("-") else ""
        for known in (name, name.removeprefix("no")):
            if known in flags.FLAGS or known.startswith("config."):
                yield known, argument
                break


def _refuse_repeated(argv: list[str]) -> None:
    """Raise flags.Error for a flag that is given twice: absl would silently use the last."""
    given: dict[str, str] = {}
    for name, argument in _given_flags(argv):
        if name in given:
            raise flags.Error(f"--{name} is given twice, as {given[name]} and {argument}; give it once")
        given[name] = argument


def _without_mapping_values(argv: list[str]) -> list[str]:
    """Return the arguments without those for a mapping's names, such as --config.data.options.image=photo; keep these.

    A value is a Python literal, e.g. 2.5 or ('a','b'), or else a string.
    """
    prefixes = tuple(f"--config.{key}." for key in configs.mapping_keys())
    end = argv.index("--") if "--" in argv else len(argv)
    for argument in argv[:end]:
        if argument.startswith(prefixes):
            name, _, text = argument.removeprefix("--config.").partition("=")
            try:
                _MAPPING_VALUES[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                _MAPPING_VALUES[name] = text
    if _MAPPING_VALUES and not any(re.match("--?config(=|$)", argument) for argument in argv[:end]):
        raise flags.Error(f"--config.{next(iter(_MAPPING_VALUES))} needs --config, whose values it changes")
    return [argument for argument in argv[:end] if not argument.startswith(prefixes)] + argv[end:]


def _unknown_key(argv: list[str]) -> str:
    """Return the error for the first --config.<key> whose key the config file does not have; '' if it has all."""
    keys = [name.removeprefix("config.") for name, _ in _given_flags(argv) if name.startswith("config.")]
    if not keys:
        return ""
    sys.argv, original = [argument for argument in argv if "config." not in argument.partition("=")[0]], sys.argv
    try:
        flags.FLAGS(sys.argv)  # without overrides, which ml_collections reads from sys.argv
        tree = flags.FLAGS["config"].value.to_dict()
    except Exception:  # noqa: BLE001 (the config file itself is wrong)
        return ""
    finally:
        sys.argv = original
    known = configs.flatten(tree)
    known = dict.fromkeys(key for key in (*configs.schema_keys(), *known) if key in known)  # a ConfigDict is sorted
    sections = {key[:dot] for key in known for dot in range(len(key)) if key[dot] == "."}
    return next((configs.unknown_key(key, known) for key in keys if key not in known.keys() | sections), "")


def _import_modules(names: list[str]) -> None:
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"--modules={name}: {error}; run in its directory or set PYTHONPATH") from error


def _set_up_logging(level: int) -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(levelname).1s %(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for library in ("absl", "jax", "orbax", "tensorflow", "fontTools"):
        logging.getLogger(library).setLevel(level)


def _innermost_message(error: BaseException) -> str:
    """Return the message of the innermost of nested ml_collections errors, on one line."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return ", ".join(str(error.args[0] if error.args else error).splitlines())


def _exit(code: int, message: str, leave: Callable[[int], object], *, with_traceback: bool = False) -> NoReturn:
    if with_traceback:
        traceback.print_exc()
    started = sys.argv[0]  # the module's file, or "clip-jax search"
    name = started if started.startswith("clip-jax ") else f"clip_jax.{pathlib.Path(started).stem}"
    print(f"{name}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    leave(code)
    raise AssertionError("not reached: `leave` exits")

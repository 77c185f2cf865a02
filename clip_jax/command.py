"""What the commands that take a config have in common: how a wrong flag is answered."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict

from clip_jax import config as configs


def parse_flags(argv: list[str], refuse: Callable[[str], NoReturn]) -> list[str]:
    """Parse, and answer a wrong flag with one sentence: a config key that is not there raises AttributeError."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        refuse(str(error))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        refuse(f"in the config or a --config flag: {_innermost(error)}")


def given_config(value: ConfigDict | None) -> configs.Config:
    """Return the checked config of --config, which is not None. Raises ValueError where there is no such file."""
    if not isinstance(value, ConfigDict):
        raise ValueError(f"there is no config file {flags.FLAGS['config'].config_filename}; give e.g. configs/emoji.py")
    return configs.from_config_dict(value)


def _innermost(error: BaseException) -> str:
    """Return the words of an error that ml_collections has wrapped in others, on one line."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return ", ".join(str(error.args[0] if error.args else error).splitlines())

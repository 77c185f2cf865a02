"""Flag parsing of the commands with a --config: errors as one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict

from clip_jax import config as configs


def parse_flags(argv: list[str], refuse: Callable[[str], NoReturn]) -> list[str]:
    """Parse the flags, and call `refuse` with one sentence for a wrong flag.

    ml_collections raises AttributeError for an unknown config key.
    """
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        refuse(str(error))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        refuse(f"in the config or a --config flag: {_innermost_message(error)}")


def checked_config(value: ConfigDict | None) -> configs.Config:
    """Return the checked config of the --config flag. Raises ValueError if there is no such file."""
    if not isinstance(value, ConfigDict):
        raise ValueError(f"there is no config file {flags.FLAGS['config'].config_filename}; give e.g. configs/emoji.py")
    return configs.from_config_dict(value)


def _innermost_message(error: BaseException) -> str:
    """Return the message of the innermost of nested ml_collections errors, on one line."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return ", ".join(str(error.args[0] if error.args else error).splitlines())

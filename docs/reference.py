"""Write the pages of the documentation that are made from the code: config keys, commands, API, several hosts.

`docs/conf.py` calls `write_pages` before Sphinx reads the pages.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from clip_jax.__main__ import COMMANDS
from clip_jax.config import Config
from clip_jax.config.ranges import RANGES
from clip_jax.losses import LOSSES
from clip_jax.models.architecture import Architecture
from clip_jax.models.towers import TOWERS
from clip_jax.models.towers.base import ImageTower

_HEADINGS = ("loss.name", "model.image", "model.image.kind", "model.text", "model.text.kind")
_ANY = 1e9  # a bound that means none
ROOT = Path(__file__).parents[1]
API = {
    "Inference": ["clip_jax.inference", "clip_jax.preprocess", "clip_jax.embedding"],
    "Models and losses": ["clip_jax.models", "clip_jax.models.clip", "clip_jax.losses"],
    "Training": ["clip_jax.training.step", "clip_jax.training.optim", "clip_jax.training.checkpoint"],
    "Data": ["clip_jax.typing", "clip_jax.data", "clip_jax.data.pipeline"],
    "Evaluation": ["clip_jax.evals.metrics", "clip_jax.evals.zeroshot", "clip_jax.evals.retrieval"],
    "Weights": ["clip_jax.interop.formats", "clip_jax.interop.msgpack"],
}


def write_pages(folder: Path) -> None:
    """Write the generated pages to a folder."""
    folder.mkdir(exist_ok=True)
    launch = (ROOT / "launch/README.md").read_text(encoding="utf-8").replace("](../docs/", "](../")
    pages = {"config": config_page(), "commands": commands_page(), "api": api_page(), "launch": launch}
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # Sphinx reads new pages only
            path.write_text(text, encoding="utf-8")


def config_page() -> str:
    """Return a table of the keys of each section: type, default, range and meaning, from the dataclasses."""
    parts = [
        "# Config keys",
        "A config file's `get_config()` returns these keys, and `--config.KEY=VALUE` replaces one on the command line."
        " Ranges include both ends.",
    ]
    for field in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[field.name]
        if dataclasses.is_dataclass(kind) and field.name not in ("model", "loss"):
            parts += [f"## {field.name}", summary(kind), table(kind, f"{field.name}.")]
    parts += ["## loss", "`loss.name` chooses one of the losses, whose keys are:"]
    for name, loss in LOSSES.items():
        parts += [f"### name={name!r}", summary(loss), table(loss, "loss.")]
    parts += ["## model", table(Architecture, "model.")]
    parts.append("`model.image.kind` and `model.text.kind` choose the towers, whose keys are:")
    for name, tower in TOWERS.items():
        parts += [
            f"### kind={name!r}",
            summary(tower),
            table(tower, f"model.{'image' if issubclass(tower, ImageTower) else 'text'}."),
        ]
    return "\n\n".join(parts) + "\n"


def summary(kind: type) -> str:
    return inspect.cleandoc(kind.__doc__).split("\n\n")[0]


def table(kind: type, prefix: str) -> str:
    """Return a table of the fields of a dataclass and of the dataclasses in it."""
    lines = ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows(kind, prefix)]
    return "\n".join(lines)


def rows(kind: type, prefix: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield key, type, default, range and meaning of each field."""
    tower_ranges = kind().ranges() if hasattr(kind, "ranges") else {}
    texts, hints = meanings(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key = prefix + field.name
        if key in _HEADINGS:
            continue
        if dataclasses.is_dataclass(hints[field.name]):
            yield from rows(hints[field.name], f"{key}.")
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "" if default is dataclasses.MISSING else f"`{default!r}`"
        low, high = RANGES.get(key) or tower_ranges.get(field.name, (None, None))
        span = "" if low is None else f"from {low:,}" if high >= _ANY else f"{low:,} to {high:,}"
        kind_name = field.type
        if typing.get_origin(hints[field.name]) is typing.Literal:
            kind_name, span = "str", ", ".join(f"`{choice!r}`" for choice in typing.get_args(hints[field.name]))
        yield f"`{key}`", f"`{kind_name}`", shown, span, texts.get(field.name, "")


def meanings(kind: type) -> dict[str, str]:
    """Return the meaning of each field of a dataclass and of its bases.

    It is an entry `name: text` of the docstring, the comment of the field's line, or those of the lines before it.
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        for names, text in re.findall(
            r"^ *(\w+(?:, \w+)*): (.+(?:\n +.+)*)", inspect.cleandoc(base.__doc__), re.MULTILINE
        ):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
        before: list[str] = []
        for line in inspect.getsource(base).splitlines():
            if m := re.match(r"    # (.*)", line):
                before.append(m[1])
            elif m := re.match(r"    (\w+): [^#]*(?:# (.*))?$", line):
                if text := m[2] or " ".join(before):
                    found[m[1]] = text.removeprefix("field: ")
                before = []
    return found


def commands_page() -> str:
    """Return the help of every command."""
    parts = ["# Commands", "`clip-jax COMMAND --help` prints these pages."]
    for name, (module, _) in COMMANDS.items():
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
        parts += [f"## clip-jax {name}", f"```text\n{done.stdout.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def api_page() -> str:
    """Return the page from which Sphinx makes the reference of the public functions and classes."""
    parts = ["# API"]
    for title, modules in API.items():
        parts.append(f"## {title}")
        parts += [f"### {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```" for name in modules]
    return "\n\n".join(parts) + "\n"

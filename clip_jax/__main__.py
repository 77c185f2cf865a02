"""The command line `clip-jax`: `clip-jax train --config=configs/emoji.py` is `python -m clip_jax.main --config=…`.

`clip-jax` prints the commands, `clip-jax COMMAND --help` the examples and flags of one, and `clip-jax completion` a
script that completes commands, flags and config keys in bash, zsh or fish.
"""

from __future__ import annotations

import difflib
import os
import runpy
import sys

COMMANDS = {
    "train": ("clip_jax.main", "train a model, or resume its run"),
    "evaluate": ("clip_jax.evaluate", "zero-shot, retrieval and linear-probe metrics of weights, with a report"),
    "search": ("clip_jax.search", "rank images by similarity to texts"),
    "embed": ("clip_jax.embed", "embed a collection of images, in the layout of clip-retrieval"),
    "convert": ("clip_jax.convert", "convert weights between clip_jax, open_clip, transformers and OpenAI"),
    "plan": ("clip_jax.plan", "memory, time and cost of a training run on a slice that is not booked yet"),
    "index": ("clip_jax.index", "index training shards once for all hosts"),
    "inspect": ("clip_jax.inspect", "statistics of training data, and a contact sheet of the model's input"),
    "completion": ("clip_jax.completion", "print a completion script for bash, zsh or fish"),
}


def main() -> None:
    """Run `clip-jax COMMAND …`. Exits with the code of the command; 2 for an unknown one."""
    name, arguments = (sys.argv[1:] + [""])[0], sys.argv[2:]
    if name in ("", "help", "-h", "--help") and not arguments:
        print(_overview())
        sys.exit(0)
    if name == "--version":
        from clip_jax import __version__

        print(__version__)
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        print(f"clip-jax: there is no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    module, _ = COMMANDS[name]
    # As `python -m`: the configs and the modules of the user are found in the working directory.
    sys.path.insert(0, os.getcwd())
    sys.argv = [f"clip-jax {name}", *arguments]
    runpy.run_module(module, run_name="__main__")


def _overview() -> str:
    rows = [f"  {name:<11} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: clip-jax COMMAND [arguments]",
            "",
            "Train, evaluate and exchange CLIP models in JAX and Flax.",
            "",
            *rows,
            "",
            "clip-jax COMMAND --help shows examples and flags.",
        ]
    )


if __name__ == "__main__":
    main()

"""Print a completion script: commands, flags and config keys of `clip-jax`.

    source <(clip-jax completion bash)
    source <(clip-jax completion zsh)
    clip-jax completion fish > ~/.config/fish/completions/clip-jax.fish

Add the first or the second line to ~/.bashrc or ~/.zshrc. The script is complete: pressing the tab key starts nothing.
"""

from __future__ import annotations

import concurrent.futures
import re
import subprocess
import sys

from clip_jax import command
from clip_jax import config as configs
from clip_jax.__main__ import COMMANDS

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
{prefix}_clip_jax() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "${{COMP_WORDS[1]}} $word" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o default -F _clip_jax clip-jax
"""


def main(shells: list[str]) -> int:
    """Print the script for a shell. Returns the exit code."""
    if len(shells) != 1 or shells[0] not in SHELLS:
        raise ValueError(f"expected one of {', '.join(SHELLS)}, got {' '.join(shells) or 'nothing'}")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = dict(zip(COMMANDS, pool.map(_flags, [module for module, _ in COMMANDS.values()]), strict=True))
    print(_fish(found) if shells[0] == "fish" else _bash(found, shells[0]), end="")
    return command.FINISHED


def _flags(module: str) -> list[str]:
    """Return the flags of a command as its --help shows them, with the keys of --config."""
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    names = re.findall(r"^  --(\w+=?)", done.stdout.partition("\nflags:\n")[2], re.MULTILINE)
    keys = [f"config.{key}=" for key in configs.schema_keys()] if "config=" in names else []
    return [*names, *keys]


def _bash(found: dict[str, list[str]], shell: str) -> str:
    cases = "\n".join(
        f'      "{name} -"*) words="{" ".join(f"--{flag}" for flag in flags)}" ;;' for name, flags in found.items()
    )
    prefix = "autoload -Uz bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return _BASH.format(prefix=prefix, commands=" ".join(COMMANDS), cases=cases)


def _fish(found: dict[str, list[str]]) -> str:
    lines = [f"complete -c clip-jax -n __fish_use_subcommand -f -a {name} -d '{COMMANDS[name][1]}'" for name in found]
    for name, flags in found.items():
        condition = f"-n '__fish_seen_subcommand_from {name}'"
        for flag in flags:
            lines.append(f"complete -c clip-jax {condition} -l {flag.rstrip('=')}" + " -r" * flag.endswith("="))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command.run(main, positional=True)

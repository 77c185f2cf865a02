"""`clip-jax COMMAND`, its help and its completion script."""

import shlex
import subprocess
from importlib import metadata

import pytest

from clip_jax import __main__ as cli
from clip_jax import __version__, completion
from tests import commands


def run(*arguments):
    return commands.run(["-m", "clip_jax", *arguments])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_overview_lists_the_commands(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["clip-jax", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    printed = capsys.readouterr().out
    assert left.value.code == 0
    assert all(f"\n  {name} " in printed for name in cli.COMMANDS)


def test_version_is_printed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["clip-jax", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out == f"{__version__}\n"


def test_entry_point_is_installed():
    (script,) = metadata.entry_points(group="console_scripts", name="clip-jax")
    assert script.load() is cli.main


@pytest.mark.parametrize(("name", "hint"), [("trian", "did you mean train?"), ("xyz", "expected one of train, ")])
def test_unknown_command_names_the_nearest(name, hint, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["clip-jax", name])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and hint in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_three_examples_and_all_flags(name):
    """tests/test_docs.py checks the flags of the examples, tests/test_docs_commands.py runs them."""
    done = run(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    usage, flags = done.stdout.split("\nflags:\n")
    assert usage.count(f"    clip-jax {name} ") + usage.count(f"<(clip-jax {name} ") >= 3
    assert "  --debug  " in flags and "  --modules=  " in flags
    module = cli.COMMANDS[name][0]
    source = (commands.ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert flags.count("\n  --") + flags.startswith("  --") >= source.count("DEFINE_") + 2


def test_modules_have_the_help_of_their_commands():
    assert commands.run(["-m", "clip_jax.search", "-h"]).stdout == run("search", "--help").stdout


def test_commands_have_the_exit_code_and_the_error_of_their_modules():
    one, other = run("search"), commands.run(["-m", "clip_jax.search"])
    assert one.returncode == other.returncode == 2
    assert one.stderr.startswith("clip-jax search: expected --weights=FILE and a query")
    assert one.stderr.partition(": ")[2] == other.stderr.partition(": ")[2]


def test_debug_shows_the_traceback():
    plain, debug = run("search", "--weights=/nowhere", "a dog"), run("search", "--weights=/nowhere", "--debug", "a dog")
    assert plain.stderr.count("\n") == 1 and plain.stderr in debug.stderr
    assert debug.stderr.startswith("Traceback") and "FileNotFoundError: /nowhere" in debug.stderr


# ------------------------------------------------------------------------------------------------------- completion


@pytest.fixture
def found():
    """Two commands with flags and config keys."""
    return {"train": ["config=", "dry_run", "config.optim.name=", "config.optim.b1="], "search": ["weights=", "top="]}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["se"], ["search"]),
        ([""], [*cli.COMMANDS]),
        (["train", "--config.opt"], ["--config.optim.name=", "--config.optim.b1="]),
        (["train", "--dry"], ["--dry_run"]),
        (["search", "--w"], ["--weights="]),
        (["search", "dog"], []),
    ],
)
def test_bash_completes_commands_flags_and_keys(found, words, expected):
    script = completion._bash(found, "bash") + f"COMP_WORDS=(clip-jax {shlex.join(words)})\nCOMP_CWORD={len(words)}\n"
    script += "_clip_jax\nprintf '%s\\n' \"${COMPREPLY[@]}\"\n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected and not done.stderr


def test_flags_are_those_of_the_help():
    found = completion._flags("clip_jax.plan")
    assert {"config=", "json", "search", "topology=", "debug", "config.optim.learning_rate="} <= {*found}


def test_fish_script_has_a_line_per_command_and_flag(found):
    lines = completion._fish(found).splitlines()
    assert len(lines) == 2 + 6
    assert "complete -c clip-jax -n '__fish_seen_subcommand_from search' -l weights -r" in lines


@pytest.mark.parametrize("shells", [[], ["tcsh"], ["bash", "zsh"]])
def test_unknown_shell_is_refused(shells):
    with pytest.raises(ValueError, match="expected one of bash, zsh, fish, got "):
        completion.main(shells)

"""README and docs: commands, flags, config keys, files, links and printed outputs are the real ones."""

import ast
import inspect
import pathlib
import re
import runpy
import shlex

import jax
import pytest

import clip_jax
from clip_jax.__main__ import COMMANDS
from clip_jax.config import MODELS, Config, TokenizerConfig, WeightsConfig, default_config, mapping_keys
from clip_jax.interop import msgpack
from clip_jax.models import make_model
from tests.commands import run

ROOT = pathlib.Path(__file__).parents[1]
PATHS = [
    "README.md",
    "CONTRIBUTING.md",
    "launch/README.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
PAGES = {path: (ROOT / path).read_text(encoding="utf-8") for path in PATHS}
README = PAGES["README.md"]
MODULES = {name: module.replace(".", "/") + ".py" for name, (module, _) in COMMANDS.items()}
ALL = "\n".join(PAGES.values())


def blocks(text, language):
    """Return the contents of fenced blocks of a language; continued lines are joined."""
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def commands():
    """Return every command of the pages and of the help texts, as the words of `python -m clip_jax.…` from -m on."""
    helps = [ast.get_docstring(ast.parse((ROOT / path).read_text())) for path in MODULES.values()]
    sources = [*blocks(ALL, "sh"), *re.findall(r"`(python -m clip_jax[^`]*)`", ALL), *helps]
    lines = [re.sub(r"^ *clip-jax (\w+)", named_module, line) for block in sources for line in block.splitlines()]
    found = [
        re.sub(r"\s(#|[<>&;]|\d>).*|;.*", "", m[1])
        for line in lines
        if (m := re.search(r"python (-m clip_jax\.(?!…).*)", line))
    ]
    split = [shlex.split(command) for command in dict.fromkeys(found)]
    return [words for words in split if len(words) > 2 and not any("…" in word for word in words)]


def named_module(match):
    return f"python -m {COMMANDS[match[1]][0]}" if match[1] in COMMANDS else match[0]


def config_keys(config, prefix=""):
    """Return the dotted keys of a ConfigDict."""
    nested = ((key, config[key]) for key in config)
    return {
        dotted
        for key, value in nested
        for dotted in (config_keys(value, f"{prefix}{key}.") if hasattr(value, "keys") else {f"{prefix}{key}"})
    }


def test_readme_has_at_most_150_lines():
    assert README.count("\n") <= 150


def test_pages_contain_no_placeholder():
    assert not re.findall(r"@@\w+@@|TODO|FIXME", ALL)


def test_commands_are_found():
    assert len(commands()) >= 15


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:90])
def test_module_flags_configs_and_keys_of_a_command_exist(words):
    module = words[1].removeprefix("clip_jax.")
    source = "".join((ROOT / f"clip_jax/{name}.py").read_text() for name in (module, "command"))
    for word in (w for w in words[2:] if w.startswith("--")):
        name, _, value = word.removeprefix("--").partition("=")
        if name == "config":
            assert value.startswith("/my/code/") or (ROOT / value.split(":")[0]).exists()
        elif name.startswith("config."):
            assert name.removeprefix("config.") in config_keys(default_config()), name
        else:
            assert re.search(rf'DEFINE_\w+\(\s*"{name}"', source), name


def test_config_keys_in_the_text_exist():
    sections = "|".join(default_config())
    named = set(re.findall(rf"`(?:--config\.)?((?:{sections})\.\w+(?:\.\w+)*)(?:=[^`]*)?`", ALL))
    files, groups = {"config.json", "tokenizer.json"}, {"data.filters", *mapping_keys()}
    assert len(named) > 20
    of_users = {key for key in named if key.startswith(tuple(f"{group}." for group in mapping_keys()))}
    assert named - files - of_users <= config_keys(default_config()) | groups


@pytest.mark.slow
def test_dry_run_prints_the_shown_summary():
    (command,) = [words for words in commands() if "--dry_run" in words]
    env = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}  # one device, unlike conftest's eight
    result = run(command, env=env)
    assert result.returncode == 0, result.stderr
    assert "151,277,313" in result.stdout
    (shown,) = [block for block in blocks(PAGES["docs/training.md"], "text") if "parameters:" in block]
    assert result.stdout == shown


def test_demo_commands_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text().replace("$(DEMO)", "runs/emoji")
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    expected = re.findall(r"\$\(BIN\)/(.*)$", recipe, re.MULTILINE)
    assert len(expected) == 2
    shown = {line for block in blocks(PAGES["docs/getting_started.md"], "sh") for line in block.splitlines()}
    assert set(expected) <= shown


def test_make_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"\.PHONY:((?:.*\\\n)*.*)", makefile)[1].replace("\\\n", " ").split())
    named = set(re.findall(r"make (?:PYTHON=\S+ )?([a-z]+(?:-[a-z]+)*)`", ALL))
    assert {"demo", "test", "test-all", "test-lowest", "test-peers", "clean"} <= named
    assert named <= phony
    for target in phony:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    extras = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["EXTRAS"]
    assert set(re.findall(r"\[(\w+)\]'", ALL)) - {"cuda12"} <= {*extras, "tpu"}
    for extra in extras:
        assert f"`{extra}`" in PAGES["docs/getting_started.md"], extra


def test_map_names_every_package_with_its_layer():
    layers = runpy.run_path(str(ROOT / "tests/test_architecture.py"))["LAYERS"]
    (tree,) = [block for block in blocks(PAGES["docs/architecture.md"], "text") if block.startswith("clip_jax/")]
    shown = {name: int(layer) for name, layer in re.findall(r"^  (\w+)(?:\.py|/) +(\d)  ", tree, re.MULTILINE)}
    there = {
        path.stem for path in (ROOT / "clip_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert shown == {name: layers[name] for name in there - {"__init__"}}


@pytest.mark.parametrize("path", PATHS)
def test_links_and_files_exist(path):
    folder, text = (ROOT / path).parent, PAGES[path]
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", text):
        linked = folder / target if target else ROOT / path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, anchor
    for file in re.findall(r"`((?:clip_jax|configs|tests|launch|benchmarks|docs)/[\w./]+)`", text):
        assert (ROOT / file).exists(), file


@pytest.fixture
def emoji_weights(tmp_path, monkeypatch):
    """Random weights of the demo's shapes at its path; the printed values themselves need its training."""
    config = Config(model=MODELS["emoji"])
    model = make_model(config.model, config.preprocess)
    (tmp_path / "runs/emoji").mkdir(parents=True)
    weights = WeightsConfig(config.model, TokenizerConfig(), config.preprocess)
    msgpack.write(tmp_path / "runs/emoji/params.msgpack", model.init(jax.random.key(0)), weights)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "numbers"), [("README.md", 9), ("docs/getting_started.md", 2)])
def test_inference_example_runs(path, numbers, emoji_weights, capsys):
    exec(compile(blocks(PAGES[path], "python")[0], path, "exec"), {})
    assert len(re.findall(r"\d\.\d*", capsys.readouterr().out)) == numbers


def test_arguments_of_the_pretrained_weights_example_exist():
    """Published weights are not at hand, so the calls are bound, not made."""
    code = blocks(PAGES["docs/pretrained_weights.md"], "python")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert len(calls) == 2
    for call in calls:
        arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        inspect.signature(clip_jax.load).bind(*map(ast.literal_eval, call.args), **arguments)
        assert arguments.get("model", "vit_b32") in MODELS

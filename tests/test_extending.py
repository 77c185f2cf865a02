"""The examples of docs/extending.md as files outside the package: contract tests, a run, evaluation, conversion."""

import os
import re
import subprocess
import sys

import pytest

from tests import commands, runs, test_docs

PAGE = test_docs.PAGES["docs/extending.md"]
CONTRACTS = {
    "my_loss": ("losses", "image_to_text"),
    "my_tower": ("towers", "patch_mlp"),
    "my_source": ("sources", "colors"),
    "my_evaluator": ("evaluators", "pairwise"),
    "my_format": ("formats", "toy"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the page's examples as files."""
    folder = tmp_path_factory.mktemp("code")
    for block in test_docs.blocks(PAGE, "python"):
        (folder / re.match(r"# (\w+\.py)\n", block)[1]).write_text(block)
    assert {path.stem for path in folder.iterdir()} == {*CONTRACTS, "my_dataset", "my_config"}
    return folder


def environment(folder, devices=1):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    env |= runs.QUICK | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{folder}{os.pathsep}{test_docs.ROOT}"}
    return env | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def run(words, folder, devices=1):
    result = commands.run(words, env=environment(folder, devices))
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def test_each_extension_touches_one_file_and_one_line():
    rows = re.findall(r"^\| an? (.*?) \| (one .*?) \|", PAGE, re.MULTILINE)
    assert len(rows) == 6
    for _, touched in rows:
        (file,) = re.findall(r"`(clip_jax/[\w/]+\.py)`", touched)
        assert (test_docs.ROOT / file).exists()
        assert touched.startswith(("one file, one line in", "one row in"))


@pytest.mark.slow
@pytest.mark.parametrize("module", CONTRACTS)
def test_example_passes_the_contract_tests(module, folder):
    kind, name = CONTRACTS[module]
    words = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-p", module]
    words += [f"tests/contracts/test_{kind}.py", "-k", name]
    env = environment(folder, devices=8)
    result = subprocess.run(words, cwd=test_docs.ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and int(re.search(r"(\d+) passed", result.stdout)[1]) >= 3, result.stdout[-3000:]


@pytest.mark.slow
def test_examples_train_on_eight_devices_evaluate_and_export(folder, tmp_path):
    weights = tmp_path / "params.msgpack"
    main = [
        "-m",
        "clip_jax.main",
        f"--config={folder}/my_config.py",
        f"--workdir={tmp_path}/run",
        f"--export={weights}",
    ]
    printed = run(main, folder, devices=8)
    assert re.search(r"pairwise/shapes/auc +[01]\.\d+", printed)
    evaluate = ["-m", "clip_jax.evaluate", f"--weights={weights}", f"--out={tmp_path}/report", "--cache_dir="]
    evaluate += ["--modules=my_tower,my_evaluator", "--evaluators=pairwise", "--datasets=digits"]
    assert re.search(r"pairwise/digits/auc +[01]\.\d+", run(evaluate, folder))
    toy = str(tmp_path / "params.toy")
    run(["-m", "clip_jax.convert", "--modules=my_tower,my_format", str(weights), toy, "--to=toy"], folder)
    (tmp_path / "check.py").write_text(f"""
import my_format, my_tower, clip_jax
models = [clip_jax.load(path) for path in ({str(weights)!r}, {toy!r})]
one, other = (model.encode_text(["a red image"]) for model in models)
assert (one == other).all()
""")
    run([str(tmp_path / "check.py")], folder)


def test_dataset_example_reads_class_folders(folder, tmp_path):
    from PIL import Image

    from clip_jax.evals.datasets.registry import DATASETS
    from clip_jax.evals.load import LoadOptions, load_dataset

    before = dict(DATASETS)
    try:
        exec(compile((folder / "my_dataset.py").read_text(), "my_dataset.py", "exec"), {})
        for name in ("sparrow", "robin"):
            target = tmp_path / "my_birds/test" / name
            target.mkdir(parents=True)
            Image.new("RGB", (8, 8), "red").save(target / "0.png")
        dataset = load_dataset("my_birds", LoadOptions(data_dir=str(tmp_path)))
        assert len(dataset.images) == 2
    finally:
        DATASETS.clear()
        DATASETS.update(before)

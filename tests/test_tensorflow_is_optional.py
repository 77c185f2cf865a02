"""TensorFlow is needed for training input only: all other modules import without it."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
# Modules that read training records, or check that they exist.
NEED_TENSORFLOW = {
    "clip_jax.evals.datasets.emoji",
    "clip_jax.evals.datasets.synthetic",
    "clip_jax.training.dry_run",
    "clip_jax.training.loop",
}
# Imports each module with TensorFlow blocked, and prints the names of the failing modules.
IMPORT_ALL = """
import importlib, sys
from absl import flags

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "tensorflow_datasets"):
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocker())
for module in sys.argv[1:]:
    before = set(flags.FLAGS)
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        assert str(error).startswith("blocked: tensorflow"), error
        print(module)
    for flag in set(flags.FLAGS) - before:  # commands define the same flags
        delattr(flags.FLAGS, flag)
"""


def test_only_training_input_needs_tensorflow():
    paths = sorted((ROOT / "clip_jax").rglob("*.py"))
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    command = [sys.executable, "-c", IMPORT_ALL, *modules]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    failed = set(run.stdout.split())
    data = {module for module in modules if module.startswith("clip_jax.data")}
    assert data <= failed <= data | NEED_TENSORFLOW

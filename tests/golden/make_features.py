"""Write features.npz: features of open_clip and transformers for the weights and inputs of tests/tiny_models.py.

    make test-peers          # for the environment
    .venv-peers/bin/python tests/golden/make_features.py

With open_clip_torch 3.3.0, transformers 5.23.0, torch 2.13.0 on a CPU.
"""

import os
import pathlib
import sys
import tempfile
import types

os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = pathlib.Path(__file__).parents[2]
# A package of the demo installs a top-level package `tests`.
for name in ("tests", "tests.peers"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(ROOT / name.replace(".", "/"))]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import tests.peers.conftest  # noqa: E402, F401
from clip_jax.config import SIGLIP_PREPROCESS, Preprocess  # noqa: E402
from tests import tiny_models  # noqa: E402
from tests.peers import peer_models  # noqa: E402


def main() -> None:
    """Compute features with open_clip, or with transformers if open_clip has no such model."""
    arrays = {}
    for name, architecture in tiny_models.ARCHITECTURES.items():
        if name == "siglip_timm":  # 90 million parameters; tests/peers compares it live
            continue
        with tempfile.TemporaryDirectory() as folder:
            status = peer_models.write(pathlib.Path(folder) / "weights", architecture, tiny_models.params(architecture))
            load = (
                peer_models.load_transformers
                if status["open_clip"].startswith("skipped")
                else peer_models.load_open_clip
            )
            model = load(f"{folder}/weights")
        pixels, tokens = tiny_models.inputs(architecture)
        with torch.no_grad():
            spec = SIGLIP_PREPROCESS if architecture.logit_bias else Preprocess()
            image, text = peer_models.features(model, pixels, tokens, spec)
        arrays |= {f"{name}/image": image.numpy(), f"{name}/text": text.numpy()}
    np.savez(pathlib.Path(__file__).with_name("features.npz"), **arrays)
    print({name: array.shape for name, array in arrays.items()})


if __name__ == "__main__":
    main()

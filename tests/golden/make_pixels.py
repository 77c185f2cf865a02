"""Write pixels.npz: preprocessing by open_clip and transformers of the images of tests/test_preprocess.py.

    make test-peers          # for the environment
    .venv-peers/bin/python tests/golden/make_pixels.py

With open_clip_torch 3.3.0, transformers 5.23.0, Pillow 13.0.0. No image is more than twice as high as wide, because
Pillow 12 and 13 differ there; clip_jax has the pixels of Pillow 12.
"""

import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).parents[2]
# A package of the demo installs a top-level package `tests`.
for name in ("tests", "tests.peers"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(ROOT / name.replace(".", "/"))]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import tests.peers.conftest  # noqa: E402, F401
from clip_jax.config import Preprocess  # noqa: E402
from tests.test_preprocess import GOLDEN_MODES, GOLDEN_SIZE, GOLDEN_SIZES, make_image  # noqa: E402


def main() -> None:
    """Preprocess each image with both and undo the normalization."""
    import open_clip
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    spec, sides = Preprocess(), {"height": GOLDEN_SIZE, "width": GOLDEN_SIZE}
    transform = open_clip.transform.image_transform(GOLDEN_SIZE, False, mean=spec.mean, std=spec.std)
    processor = CLIPImageProcessorPil(size={"shortest_edge": GOLDEN_SIZE}, crop_size=sides)
    arrays = {}
    for mode in GOLDEN_MODES:
        for width, height in GOLDEN_SIZES:
            image = make_image(width, height, mode)
            found = {
                "openai": transform(image).numpy(),
                "huggingface": processor(images=image, return_tensors="np")["pixel_values"][0],
            }
            for implementation, pixels in found.items():
                levels = (pixels.transpose(1, 2, 0) * np.array(spec.std) + np.array(spec.mean)) * 255
                assert np.abs(levels - levels.round()).max() < 1e-3
                arrays[f"{implementation}/{mode}/{width}x{height}"] = levels.round().astype(np.uint8)
    np.savez_compressed(pathlib.Path(__file__).with_name("pixels.npz"), **arrays)
    print(len(arrays), "images")


if __name__ == "__main__":
    main()

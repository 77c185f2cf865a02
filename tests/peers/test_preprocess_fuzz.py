"""Random image processors of transformers and preprocess_cfgs of open_clip: pixels within 1 of 255, or refused."""

import dataclasses
import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

from clip_jax.interop import image_processor
from clip_jax.interop import open_clip as open_clip_configs
from clip_jax.preprocess import preprocess
from tests import tiny_models

CASES = 100  # of each kind
TOLERANCE = 1.0  # of 255
TORCHVISION_TOLERANCE = 2.0  # torch's fixed point has 16 bits, Pillow's 32; both round after each of the two passes
SIZE = 32
PEERS = {
    ("CLIPImageProcessor", "pil"): CLIPImageProcessorPil,
    ("SiglipImageProcessor", "pil"): SiglipImageProcessorPil,
    ("CLIPImageProcessor", "torchvision"): CLIPImageProcessor,  # the default of transformers 5 if torchvision is there
    ("SiglipImageProcessor", "torchvision"): SiglipImageProcessor,
}
MODEL = tiny_models.ARCHITECTURES["vit"]
MODEL = dataclasses.replace(MODEL, image=dataclasses.replace(MODEL.image, image_size=SIZE))


def _image(rng: random.Random) -> Image.Image:
    width, height = rng.choice([(50, 31), (31, 50), (40, 40), (33, 32), (21, 64), (20, 18), (32, 32), (97, 41)])
    noise = np.random.default_rng(rng.randrange(2**31)).normal(0, 40, (height, width, 4))
    pixels = np.clip(np.linspace(-60, 315, width)[None, :, None] + noise, 0, 255).astype(np.uint8)
    image, mode = Image.fromarray(pixels), rng.choice(["RGB", "RGB", "RGB", "L", "P", "RGBA", "CMYK", "1", "LA"])
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def _some(rng: random.Random, choices: dict, probability: float) -> dict:
    return {key: rng.choice(values) for key, values in choices.items() if rng.random() < probability}


def _processor_config(rng: random.Random) -> dict:
    """Return a valid configuration, which most often has the model's image size and sometimes another."""
    side = rng.choice([SIZE, SIZE, SIZE, 40, 37, 28, 27])
    sizes = [side, {"shortest_edge": side}, [side, side], *[{"height": side, "width": side}] * 4]
    sizes += [{"height": side, "width": SIZE}, {"shortest_edge": side, "longest_edge": side + 9}]
    crop = rng.choice([SIZE, SIZE, SIZE, SIZE, 24])
    steps = ["do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"]
    config = {"size": rng.choice(sizes), "crop_size": rng.choice([crop, {"height": crop, "width": crop}, [crop, crop]])}
    config |= _some(rng, dict.fromkeys(steps, [True, True, False]), 0.4)
    config |= _some(rng, {"resample": range(6), "rescale_factor": [1 / 255, 1 / 127.5, 0.0039, 1]}, 0.5)
    config |= _some(rng, {"image_mean": [0.4, [0.1, 0.2, 0.3]], "image_std": [0.5, [0.3, 0.2, 0.4]]}, 0.5)
    return config | _some(
        rng, {"default_to_square": [True, False], "do_pad": [False, False, True], "pad_size": [40]}, 0.1
    )


def _open_clip_config(rng: random.Random) -> dict:
    choices = {"resize_mode": ["shortest", "longest", "squash"], "interpolation": ["bicubic", "bilinear", "random"]}
    choices |= {"fill_color": [0, 0, 127, 255], "mode": ["RGB"], "size": [SIZE, 224]}
    return _some(rng, choices | {"mean": [0.4, 0.0, [0.1, 0.2, 0.3]], "std": [0.5, [0.3, 0.2, 0.4]]}, 0.6)


def _normalized(image, spec):
    return (preprocess(image, SIZE, spec) / 255 - np.array(spec.mean)) / np.array(spec.std)


def _assert_close(found, expected, spec, context, tolerance=TOLERANCE):
    """Compare in the units of uint8 pixels, so that the normalization counts as well."""
    assert expected.shape == found.shape, context
    assert np.abs((found - expected) * np.array(spec.std) * 255).max() <= tolerance, context


@pytest.mark.parametrize(("kind", "backend"), PEERS)
def test_pixels_of_random_image_processors_equal_transformers_or_are_refused(kind, backend):
    tolerance = TOLERANCE if backend == "pil" else TORCHVISION_TOLERANCE
    compared, refused = 0, {}
    for case in range(CASES):
        rng = random.Random(f"{kind}{case}")
        config = _processor_config(rng)
        image = _image(rng)
        processor = PEERS[kind, backend](**config)
        saved = processor.to_dict()
        try:
            spec = image_processor.read(config | {"image_processor_type": kind}, MODEL, "f")
        except ValueError as error:
            refused[case] = key = str(error).split(": ")[1]
            assert key in config, (case, error)
            continue
        assert image_processor.read(saved, MODEL, "f") == spec, (case, config)
        if backend == "torchvision" and (spec.interpolation in ("nearest", "box", "hamming") or spec.pads(SIZE)):
            continue  # nearest: below; torchvision has no box and hamming; an odd padding is one pixel apart
        try:
            expected = processor(images=[image], return_tensors="np")["pixel_values"][0]
        except (ValueError, RuntimeError):  # PIL and torchvision
            assert not config.get("do_convert_rgb", True) and image.mode != "RGB", (case, config)
            continue
        if len(expected) != 3:  # transformers' models refuse such images
            assert not config.get("do_convert_rgb", True), (case, config)
            continue
        context = (case, config, image.mode, image.size)
        _assert_close(_normalized(image, spec), expected.transpose(1, 2, 0), spec, context, tolerance)
        compared += 1
    assert compared >= CASES / (3 if backend == "pil" else 10) and refused, (compared, refused)


@pytest.mark.parametrize(("width", "height"), [(50, 31), (20, 18), (427, 640), (97, 41), (41, 97), (300, 1000)])
def test_nearest_pixels_differ_from_torchvision_only_at_ties(width, height):
    """A pixel whose center is between two pixels of the image: Pillow sums steps, torch multiplies in float32."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    steps = {"do_normalize": False, "do_rescale": False, "resample": 0, "do_center_crop": False}
    expected = CLIPImageProcessor(size={"shortest_edge": SIZE}, **steps)(images=[image], return_tensors="np")
    expected = np.asarray(expected["pixel_values"][0]).transpose(1, 2, 0)
    found = np.array(image.resize(expected.shape[1::-1], Image.Resampling.NEAREST))
    unequal = (expected != found).any(axis=2)
    for axis, (old, new) in enumerate(zip((height, width), unequal.shape, strict=True)):
        ties = (2 * np.arange(new) + 1) * old % (2 * new) == 0  # the center of pixel i is at (i + 1/2) old / new
        unequal = unequal[~ties] if axis == 0 else unequal[:, ~ties]
    assert unequal.size and not unequal.any()


def test_pixels_of_random_open_clip_configs_equal_open_clip():
    for case in range(CASES):
        rng = random.Random(case)
        config, image = _open_clip_config(rng), _image(rng)
        spec = open_clip_configs.preprocess(config, "f")
        merged = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), config)
        peer = open_clip.transform.PreprocessCfg(**merged | {"size": SIZE})  # as in `create_model`
        with torch.no_grad():
            expected = open_clip.transform.image_transform_v2(peer, is_train=False)(image).numpy()
        _assert_close(
            _normalized(image, spec), expected.transpose(1, 2, 0), spec, (case, config, image.mode, image.size)
        )

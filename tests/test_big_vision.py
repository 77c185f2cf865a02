"""big_vision archives (SigLIP, LiT) and single towers of any format."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from clip_jax.config import SIGLIP_PREPROCESS, WeightsConfig
from clip_jax.interop import conversion, msgpack, name_tables, reading, torch_file
from tests import tiny_models

SIGLIP, RESNET = tiny_models.ARCHITECTURES["siglip"], tiny_models.ARCHITECTURES["resnet"]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_siglip_npz_of_big_vision_is_read(tmp_path, stacked, half):
    tensors = dict(conversion.LazyTensors(SIGLIP, tiny_models.params(SIGLIP), name_tables.BIG_VISION))
    assert tensors["t"].shape == tensors["b"].shape == (1,) and tensors["img/MAPHead_0/probe"].shape == (1, 1, 128)
    if stacked:  # layout with a scan over layers
        layers = {name: x for name, x in tensors.items() if "encoderblock_0" in name}
        for name in layers:
            other = name.replace("encoderblock_0", "encoderblock_1")
            tensors[name.replace("encoderblock_0", "encoderblock")] = np.stack([tensors.pop(name), tensors.pop(other)])
    if half:  # NumPy saves bfloat16 as void
        tensors = {name: x.astype(ml_dtypes.bfloat16).view("V2") for name, x in tensors.items()}
    np.savez(tmp_path / "siglip.npz", **{f"params/{name}": x for name, x in tensors.items()})
    found = reading.read(tmp_path / "siglip.npz")
    assert found.config.model == SIGLIP
    assert found.config.preprocess == dataclasses.replace(SIGLIP_PREPROCESS, implementation="openai")
    tolerance = 2**-8 if half else 0.0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance / 100),
        found.params,
        tiny_models.params(SIGLIP),
    )


def _lit():
    """Return the architecture of LiT: a ViT with a class token and no projection, the text tower of SigLIP."""
    image = dataclasses.replace(SIGLIP.image, pool="class")
    return dataclasses.replace(SIGLIP, image=image, logit_bias=False)


@pytest.mark.parametrize("form", ["current", "with class position", "posembed_input"])
def test_lit_npz_of_big_vision_is_read(tmp_path, form):
    architecture = _lit()
    params = tiny_models.params(architecture)
    if form == "current":  # the class token has no position
        params["image"]["positional_embedding"][0] = 0
    tensors = dict(conversion.LazyTensors(architecture, params, name_tables.BIG_VISION))
    position = tensors.pop("img/pos_embedding")
    if form == "current":
        tensors["img/pos_embedding"] = position[:, 1:]
    elif form == "with class position":
        tensors["img/pos_embedding"] = position
    else:
        tensors["img/Transformer/posembed_input/pos_embedding"] = position
    np.savez(tmp_path / "lit.npz", **tensors)
    found = reading.read(tmp_path / "lit.npz")
    assert found.config.model == architecture
    assert found.config.preprocess == dataclasses.replace(SIGLIP_PREPROCESS, implementation="openai")
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_heads_of_big_vision_are_those_of_the_file(tmp_path):
    np.savez(tmp_path / "w.npz", **conversion.LazyTensors(SIGLIP, tiny_models.params(SIGLIP), name_tables.BIG_VISION))
    heads = SIGLIP.image.heads, SIGLIP.text.heads
    assert reading.read(tmp_path / "w.npz", heads=heads).config.model == SIGLIP
    message = rf"heads of the image tower: expected {heads[0]}, got {2 * heads[0]}"
    with pytest.raises(ValueError, match=message):
        reading.read(tmp_path / "w.npz", heads=(2 * heads[0], heads[1]))


def test_archive_behind_other_bytes_is_not_npz(tmp_path):
    np.savez(tmp_path / "w.npz", x=np.ones(3))
    (tmp_path / "w.npz").write_bytes(b"ZZ" + (tmp_path / "w.npz").read_bytes())
    with pytest.raises(ValueError, match="expected one of the formats"):
        reading.read(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.npz:img", ("a.npz", "image")),
        ("a.npz:txt", ("a.npz", "text")),
        ("a.npz", ("a.npz", "")),
        ("gs://a.npz", ("gs://a.npz", "")),
        ("hf-hub:b:image", ("hf-hub:b", "image")),
    ],
)
def test_tower_follows_a_colon(path, expected):
    assert reading.split_tower(path) == expected


def _write(folder, source):
    """Return a file and its architecture; the npz file has an unsupported text tower."""
    if source == "npz":
        tensors = conversion.LazyTensors(_lit(), tiny_models.params(_lit()), name_tables.BIG_VISION)
        images = {name: tensor for name, tensor in tensors.items() if name.startswith("img")}
        np.savez(folder / "w.npz", **images, **{"txt/bert/kernel": np.ones(3, "f4")})
        return folder / "w.npz", _lit()
    params, file = tiny_models.params(RESNET), folder / "w"
    if source == "msgpack":
        msgpack.write(file, params, WeightsConfig(RESNET))
    else:
        torch_file.write(file, conversion.LazyTensors(RESNET, params, name_tables.OPENAI))
    return file, RESNET


@pytest.mark.parametrize(
    ("source", "tower"),
    [("npz", "image"), ("torch", "image"), ("torch", "text"), ("msgpack", "image"), ("msgpack", "text")],
)
def test_one_tower_is_read_and_the_other_ignored(tmp_path, source, tower):
    file, architecture = _write(tmp_path, source)
    found = reading.read_tower(file, tower, architecture)
    params = tiny_models.params(architecture)
    assert found.keys() == {tower} | ({"batch_stats"} if tower == "image" and "batch_stats" in params else set())
    for key, value in found.items():
        jax.tree.map(np.testing.assert_array_equal, value, params[key])
    another = dataclasses.replace(getattr(architecture, tower), width=256)
    with pytest.raises(ValueError, match="expected"):
        reading.read_tower(file, tower, dataclasses.replace(architecture, **{tower: another}))


def test_positions_of_a_tower_are_resized(tmp_path):
    np.savez(tmp_path / "w.npz", **conversion.LazyTensors(SIGLIP, tiny_models.params(SIGLIP), name_tables.BIG_VISION))
    image, text = (
        dataclasses.replace(SIGLIP.image, image_size=96),
        dataclasses.replace(SIGLIP.text, context_length=20),
    )
    larger = dataclasses.replace(SIGLIP, image=image, text=text)
    assert reading.read_tower(tmp_path / "w.npz", "image", larger)["image"]["positional_embedding"].shape == (36, 128)
    assert reading.read_tower(tmp_path / "w.npz", "text", larger)["text"]["positional_embedding"].shape == (20, 128)

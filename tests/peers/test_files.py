"""Files written by torch in all common forms, read without torch."""

import argparse
import collections
import datetime
import json
import pathlib

import clip
import clip.model
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clip_jax.interop import conversion, name_tables, reading, torch_file
from tests import tiny_models

ARCHITECTURE = tiny_models.ARCHITECTURES["vit"]
PARAMS = tiny_models.params(ARCHITECTURE)


@pytest.fixture(scope="module")
def state_dict():
    return {
        name: torch.tensor(x) for name, x in conversion.LazyTensors(ARCHITECTURE, PARAMS, name_tables.OPENAI).items()
    }


def _assert_read(path, tolerance=0.0, **arguments):
    found = reading.read(path, **arguments)
    assert found.config.model == ARCHITECTURE
    _assert_params(found.params, tolerance)


def _assert_params(params, tolerance=0.0):
    expected, found = conversion.flat(PARAMS), conversion.flat(params)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance / 100, err_msg=name)


HALF, BRAIN = 2**-11, 2**-8  # relative rounding errors of float16 and bfloat16
FORMS = {
    "state dict": (lambda sd: sd, 0.0),
    "float16": (lambda sd: {k: v.half() for k, v in sd.items()}, HALF),
    "bfloat16": (lambda sd: {k: v.bfloat16() for k, v in sd.items()}, BRAIN),
    "DataParallel": (lambda sd: {f"module.{k}": v for k, v in sd.items()}, 0.0),
    "compiled": (lambda sd: {f"_orig_mod.{k}": v for k, v in sd.items()}, 0.0),
    "custom text tower": (
        lambda sd: {k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in sd.items()},
        0.0,
    ),
    "with OpenAI's integers": (
        lambda sd: sd | {"input_resolution": torch.tensor(64), "vocab_size": torch.tensor(9)},
        0.0,
    ),
    "training checkpoint": (
        lambda sd: {
            "epoch": 3,
            "name": "run",
            "state_dict": collections.OrderedDict((f"module.{k}", v) for k, v in sd.items()),
            "optimizer": {
                "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}},
                "param_groups": [{"lr": 0.1}],
            },
        },
        0.0,
    ),
    "model and its average": (lambda sd: {"model": sd, "ema": {k: v * 0 for k, v in sd.items()}}, 0.0),
    "list": (lambda sd: [sd, 3], 0.0),
    **{
        f"with a {type(value).__module__}.{type(value).__name__}": (
            lambda sd, value=value: {"epoch": 3, "state_dict": sd, "value": value},
            0.0,
        )
        for value in (
            *(torch.get_rng_state(), torch.tensor(0.3), torch.float16, torch.device("cpu"), torch.strided),
            *(argparse.Namespace(lr=1), np.float64(0.5), np.arange(3), np.random.default_rng(0), pathlib.Path("x")),
            *({1, 2}, collections.defaultdict(list), datetime.date(2024, 1, 2)),
        )
    },
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_torch_files_are_read(state_dict, form, legacy, tmp_path):
    make, tolerance = FORMS[form]
    torch.save(make(state_dict), tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    _assert_read(tmp_path / "w.pt", tolerance, activation="quick_gelu", heads=(2, 1), preprocess="openai")


FLOAT8 = [(f"w.{file}", dtype) for file in ("pt", "safetensors") for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
FLOAT8 += [("w.pt", torch.float8_e4m3fnuz), ("w.pt", torch.float8_e5m2fnuz)]


@pytest.mark.parametrize(("file", "dtype"), FLOAT8)
def test_float8_tensors_are_read(state_dict, dtype, file, tmp_path):
    projection = state_dict["text_projection"].to(dtype)
    (torch.save if file == "w.pt" else save_file)(state_dict | {"text_projection": projection}, tmp_path / file)
    found = reading.read(tmp_path / file, activation="quick_gelu", heads=(2, 1), preprocess="openai")
    np.testing.assert_array_equal(found.params["text"]["projection"], projection.float().numpy())


def test_views_of_one_storage_are_read(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    torch.save({"t": base.t(), "row": base[1], "parameter": torch.nn.Parameter(base[:, 2:4])}, tmp_path / "w.pt")
    found = torch_file.read(tmp_path / "w.pt")[0]
    np.testing.assert_array_equal(found["t"], base.t())
    np.testing.assert_array_equal(found["row"], base[1])
    np.testing.assert_array_equal(found["parameter"], base[:, 2:4])


@pytest.mark.parametrize("half", [False, True])
def test_torchscript_archives_of_openai_are_read(state_dict, tmp_path, half):
    """Traced like the released archives, which keep norms and embeddings in float32 and the rest in float16."""
    image, text = ARCHITECTURE.image, ARCHITECTURE.text
    sizes = (image.image_size, image.layers, image.width, image.patch_size)
    model = clip.model.CLIP(
        ARCHITECTURE.embed_dim, *sizes, text.context_length, text.vocab_size, text.width, text.heads, text.layers
    )
    model.load_state_dict(state_dict)
    if half:
        clip.model.convert_weights(model)
    for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    pixels, tokens = tiny_models.inputs(ARCHITECTURE, 1)
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2).copy()).to(model.dtype)
    with pytest.warns(Warning):  # deprecation of tracing, and shapes that become constants
        traced = torch.jit.trace_module(model.eval(), {"encode_image": pixels}, check_trace=False)
    with pytest.warns(DeprecationWarning):
        torch.jit.save(traced, tmp_path / "ViT.pt")
    _assert_read(tmp_path / "ViT.pt", 2 * HALF if half else 0.0)


def test_safetensors_written_by_torch_are_read(state_dict, tmp_path):
    save_file({k: v.bfloat16() for k, v in state_dict.items()}, tmp_path / "w.safetensors")
    found = reading.read(tmp_path / "w.safetensors", activation="quick_gelu", heads=(2, 1), preprocess="openai")
    _assert_params(found.params, BRAIN)


def test_written_files_are_read_by_torch(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.float32(2.5) * np.ones(()),
        "empty": np.ones((0, 2)),
    }
    torch_file.write(tmp_path / "w.pt", tensors)
    found = torch.load(tmp_path / "w.pt", weights_only=True)
    assert {name: tuple(x.shape) for name, x in found.items()} == {"a": (2, 3), "scalar": (), "empty": (0, 2)}
    np.testing.assert_array_equal(found["a"], tensors["a"])
    assert found["scalar"] == 2.5
    read_back, _ = torch_file.read(tmp_path / "w.pt")
    np.testing.assert_array_equal(read_back["a"], tensors["a"])


def test_configs_of_open_clip_are_supported_or_refused_with_their_names():
    import open_clip

    from clip_jax.config import tokenizer_of
    from clip_jax.interop import open_clip as configs

    built, refused = [], {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        try:
            model = configs.architecture(json.loads(json.dumps(config)), name)
        except ValueError as error:
            refused[name] = str(error)
            continue
        built.append(name)
        spec = configs.preprocess({}, name)
        written = configs.config(model, spec, tokenizer_of(model))["model_cfg"]
        assert configs.architecture(written, name) == model
    assert len(built) >= 81 and not {
        "ViT-B-32",
        "RN50x64",
        "ViT-bigG-14",
        "ViT-H-14-CLIPA",
        "ViT-SO400M-14-SigLIP-384",
    } - {*built}
    assert all(name in message and "clip_jax" in message for name, message in refused.items())

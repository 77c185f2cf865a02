"""Models of other libraries with the weights of tests/tiny_models.py, and their features."""

import dataclasses
import pathlib
import warnings

import clip
import numpy as np
import open_clip
import torch
import transformers

from clip_jax.config import SIGLIP_PREPROCESS, Preprocess, TokenizerConfig, WeightsConfig
from clip_jax.interop import directory


def write(folder: pathlib.Path, architecture, params) -> dict[str, str]:
    """Write a directory for all libraries and return the report of `directory.write`."""
    spec = SIGLIP_PREPROCESS if architecture.logit_bias else Preprocess()
    spec = dataclasses.replace(spec, implementation="openai")
    bpe = architecture.text.eos_id == architecture.text.vocab_size - 1
    tokenizer = TokenizerConfig("clip_bpe" if bpe else "sentencepiece")
    return directory.write(folder, params, WeightsConfig(architecture, tokenizer, spec))


def load_open_clip(folder):
    model = open_clip.create_model(f"local-dir:{folder}")
    return model.eval()


def load_transformers(folder):
    return transformers.AutoModel.from_pretrained(folder).eval()


def load_clip(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clip.load tries the deprecated torch.jit.load first
        model, _ = clip.load(f"{folder}/clip.pt", device="cpu")
    return model.float()


def features(model, pixels, tokens, spec=None):
    """Return the normalized embeddings of uint8 images and of token ids, as torch tensors with gradients."""
    image = model.get_image_features(normalized(pixels, spec)) if hasattr(model, "get_image_features") else None
    if image is None:
        image, text = model.encode_image(normalized(pixels, spec)), model.encode_text(torch.tensor(tokens).long())
    else:
        text = model.get_text_features(torch.tensor(tokens).long())
    return tuple(torch.nn.functional.normalize(getattr(x, "pooler_output", x), dim=-1) for x in (image, text))


def normalized(pixels, spec=None):
    spec = spec or Preprocess()
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return torch.tensor(((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2).copy())

"""Trained weights as functions of pictures and strings.

    model = clip_jax.load("params.msgpack")  # or a file or directory of OpenAI's, open_clip's, Hugging Face's …
    model.zero_shot(["photo.jpg"], ["dog", "cat"])

Each encoder is compiled once for every batch size of 1, 2, 4 … 64 that is met: other numbers of inputs are split and
filled up. Neither TensorFlow nor Orbax is imported.

Source of the zero-shot classifier: Radford et al. 2021, section 3.1.4.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int32, UInt8

from clip_jax.config import TokenizerConfig, WeightsConfig
from clip_jax.evals.embed import average_prompts
from clip_jax.interop import reading
from clip_jax.models import make_model
from clip_jax.preprocess import ImageLike, preprocess_many
from clip_jax.tokenizers import make_tokenizer
from clip_jax.typing import Params, Tokenizer

Images = Sequence[ImageLike] | UInt8[np.ndarray, "n H W 3"]

_MAX_BATCH = 64  # 64 pictures of 336 px in ViT-L/14 take some 2 GiB of activations


@dataclasses.dataclass(frozen=True)
class Clip:
    """A model with its weights. Images are PIL's, paths, encoded bytes, or uint8 arrays [H W 3]."""

    config: WeightsConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    _encode_image: Callable[..., jax.Array] = dataclasses.field(repr=False)
    _encode_text: Callable[..., jax.Array] = dataclasses.field(repr=False)

    def encode_image(self, images: Images) -> Float[np.ndarray, "n E"]:
        """Return a unit vector for every picture.

        Raises:
          ValueError: if a picture can't be decoded, saying which.
          TypeError: if one picture was given where several are expected.
        """
        size = self.config.model.image.image_size

        def prepare(batch: Sequence[ImageLike], first: int) -> np.ndarray:
            return preprocess_many(batch, size, self.config.preprocess, first=first)

        return self._encode(self._encode_image, prepare, _several(images, "picture"))

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Return a unit vector for every text.

        Raises:
          ValueError: if a text is too long, unless the model was loaded with `truncate=True`.
          TypeError: if one text was given where several are expected.
        """
        return self._encode(self._encode_text, lambda batch, first: self.tokenizer(batch), _several(texts, "text"))

    def logits(self, images: Images, texts: Sequence[str]) -> Float[np.ndarray, "n m"]:
        """Return the cosine of every picture with every text, times the learnt scale, plus the bias if there is one."""
        bias = np.asarray(self.params.get("logit_bias", 0.0), np.float32)
        return self.scale * self.encode_image(images) @ self.encode_text(texts).T + bias

    def zero_shot(
        self, images: Images, classes: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> Float[np.ndarray, "n Q"]:
        """Return the probability of every class for every picture; a row sums to 1.

        Args:
          templates: sentences with `{}` where the class's name goes. A class is the mean of its sentences' vectors.
        """
        templates = _several(templates, "template")
        for template in templates:
            if "{}" not in template:
                raise ValueError(
                    f"the template {template!r} has no '{{}}' for the class's name, e.g. 'a photo of a {{}}.'"
                )
        prompts = [template.replace("{}", name) for name in _several(classes, "class") for template in templates]
        class_QE = average_prompts(self.encode_text(prompts), np.full(len(classes), len(templates)))
        logits_nQ = self.scale * self.encode_image(images) @ class_QE.T
        exp_nQ = np.exp(logits_nQ - logits_nQ.max(axis=1, keepdims=True))
        return exp_nQ / exp_nQ.sum(axis=1, keepdims=True)

    @property
    def scale(self) -> np.float32:
        """The factor between cosines and logits: the inverse of the learnt temperature."""
        return np.exp(np.asarray(self.params["logit_scale"], np.float32))

    def _encode(
        self, encode: Callable[..., jax.Array], prepare: Callable[[Any, int], np.ndarray], items: Sequence[Any]
    ) -> Float[np.ndarray, "n E"]:
        outputs = [np.zeros((0, self.config.model.embed_dim), np.float32)]
        for start in range(0, len(items), _MAX_BATCH):
            rows = prepare(items[start : start + _MAX_BATCH], start)
            missing = _bucket(len(rows)) - len(rows)
            filled = np.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1), mode="edge")
            outputs.append(np.asarray(encode(self.params, filled))[: len(rows)])
        return np.concatenate(outputs)


def load(
    path: str | os.PathLike[str],
    *,
    model: str = "",
    activation: str = "",
    image_size: int = 0,
    context_length: int = 0,
    tokenizer: TokenizerConfig | str = "",
    truncate: bool = False,
) -> Clip:
    """Return the model of a weight file, a directory, a published model or a repository of Hugging Face's hub.

    Formats: ours (`--export`, `clip_jax.convert`), OpenAI's archives, torch's state dicts and training checkpoints,
    safetensors, open_clip's and Hugging Face's directories, Flax msgpack, big_vision's npz. What a file can't tell is
    asked for, never guessed.

    Args:
      path: a file or directory; or a name such as 'vit_b32', for OpenAI's weights as its own code leaves them in
        ~/.cache/clip; or 'hf-hub:<owner>/<name>'.
      model: a name in `config.MODELS`, for files that can't tell.
      activation: 'quick_gelu', 'gelu' or 'gelu_tanh', for files that can't tell. It wins over what they say.
      image_size: px, other than the model's: its position embeddings are resized as open_clip does.
      context_length: tokens, other than the model's, likewise.
      tokenizer: for weights that come without theirs: a SentencePiece `.model` or a Hugging Face `tokenizer.json`, used
        as the published weights of such a model expect; or a TokenizerConfig, which says how.
      truncate: cut texts that are longer than the model reads, keeping the end token; else they are an error, as in
        OpenAI's code.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged or hostile, of a model that is not built, or not what its config describes.
    """
    weights = reading.read(
        path,
        model=model,
        activation=activation,
        image_size=image_size,
        context_length=context_length,
        tokenizer=tokenizer,
    )
    config, params = weights.config, weights.params
    del weights  # `_moved` frees each NumPy array after its copy
    functions = make_model(config.model, config.preprocess)
    return Clip(
        config,
        _moved(dict(params)),
        _tokenizer(config, truncate),
        jax.jit(functions.encode_image),
        jax.jit(functions.encode_text),
    )


def _moved(params: dict[str, Any]) -> Params:
    """Put arrays on the device, and empty `params` meanwhile: no more than one array is held twice."""
    moved = {}
    for name in list(params):
        value = params.pop(name)
        moved[name] = _moved(value) if isinstance(value, dict) else jax.device_put(value)
    return moved


def _tokenizer(config: WeightsConfig, truncate: bool) -> Tokenizer:
    if config.tokenizer.name != "clip_bpe" and not (config.tokenizer.path or config.tokenizer_file):
        return _NoTokenizer(config.model.text.vocab_size, config.model.text.length, 0, config.model.text.eos_id)
    return make_tokenizer(config.tokenizer, config.model.text, truncate=truncate, tokenizer_file=config.tokenizer_file)


@dataclasses.dataclass(frozen=True)
class _NoTokenizer:
    """Stands for a tokenizer that did not come with the weights: pictures can be encoded without it."""

    vocab_size: int
    length: int
    pad_id: int
    eos_id: int

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n L"]:
        raise ValueError(
            f"the weights came without their tokenizer of {self.vocab_size:,} tokens; load them with its file, e.g."
            " load(…, tokenizer='/data/c4_en.model')"
        )


def _several(items: Any, kind: str) -> list[Any]:
    """Refuse one item where several are expected: a string is a sequence of letters, an array one of rows."""
    single_array = isinstance(items, np.ndarray) and items.ndim < 4
    if isinstance(items, (str, bytes, os.PathLike)) or single_array or not hasattr(items, "__len__"):
        raise TypeError(f"expected a sequence, e.g. a list with one {kind}, got one {type(items).__name__}")
    return list(items)


def _bucket(count: int) -> int:
    """Return the power of two that holds `count` rows."""
    return 1 << (count - 1).bit_length()

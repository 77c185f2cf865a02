"""Inference: `model = clip_jax.load("params.msgpack")`, a model as functions of images and strings.

Each encoder is compiled for batch sizes 1, 2, 4 … 64, each on first use; other numbers of inputs are split and padded.
Neither TensorFlow nor Orbax is imported. Source of the zero-shot classifier: Radford et al. 2021, section 3.1.4.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int32, UInt8

import clip_jax.training  # noqa: F401 (registers the format of runs)
from clip_jax.config import MODELS, Preprocess, TokenizerConfig, WeightsConfig, check_name, name_of
from clip_jax.evals.embed import average_prompts, weights_fingerprint
from clip_jax.interop import reading
from clip_jax.models import make_model
from clip_jax.models.params import count_parameters
from clip_jax.preprocess import ImageLike, preprocess_many
from clip_jax.tokenizers import make_tokenizer
from clip_jax.typing import Params, Tokenizer

Images = Sequence[ImageLike] | UInt8[np.ndarray, "n H W 3"] | UInt8[jax.Array, "n H W 3"]

_MAX_BATCH = 64  # 64 images of 336 px need about 2 GiB of activations in ViT-L/14


@dataclasses.dataclass(frozen=True, repr=False)
class Clip:
    """A CLIP model with its parameters. Images are PIL images, paths, encoded bytes, files, or uint8 arrays [H W 3].

    A model can be pickled and copied, e.g. for worker processes; a copy compiles its functions again. Start processes
    with 'spawn' or 'forkserver': a process that was forked after JAX started hangs.

    >>> model, images = random_model("emoji"), np.zeros((1, 48, 48, 3), np.uint8)
    >>> model.encode_image(images).shape, model.encode_text(["a dog", "a cat"]).shape
    ((1, 128), (2, 128))
    >>> model
    <Clip emoji: 3,497,567 parameters, 48 px images>
    >>> model.logits(images, ["a dog", "a cat"]).shape
    (1, 2)
    >>> probabilities = model.zero_shot(images, ["dog", "cat"], ["a {}."])
    >>> probabilities.shape, probabilities.sum().round(4).item()
    ((1, 2), 1.0)
    """

    config: WeightsConfig
    params: Params
    tokenizer: Tokenizer
    _encode_image: Callable[..., jax.Array]
    _encode_text: Callable[..., jax.Array]
    _sharding: jax.sharding.NamedSharding | None = None  # of batches, over several devices

    def __reduce__(self) -> tuple[Callable[..., Clip], tuple[Any, ...]]:
        """Pickle without the compiled functions, which are made again from the configuration."""
        return _from_parts, (self.config, self.params, self.tokenizer)

    def __repr__(self) -> str:
        size = self.config.model.image.image_size
        return f"<Clip {name_of(self.config.model)}: {count_parameters(self.params):,} parameters, {size} px images>"

    def encode_image(self, images: Images) -> Float[np.ndarray, "n E"]:
        """Return the embeddings of images, L2-normalized.

        Raises:
          ValueError: if an image can't be decoded, with its index.
          TypeError: for a single image instead of a sequence, or for an item that is no image, with its index.
        """
        self._check_parameters("image")
        size = self.config.model.image.image_size

        def prepare(batch: Sequence[ImageLike], first: int) -> np.ndarray:
            return preprocess_many(batch, size, self.config.preprocess, first=first)

        return self._encode(self._encode_image, prepare, _as_list(images, "image"))

    def encode_pixels(self, pixels: np.ndarray) -> Float[np.ndarray, "n E"]:
        """Return the embeddings of images that are preprocessed, e.g. by other threads or processes.

        Args:
          pixels: uint8[n H W 3] from `clip_jax.preprocess.preprocess_many`, of the model's image size.

        Raises:
          ValueError: for another dtype or shape.
        """
        self._check_parameters("image")
        size = self.config.model.image.image_size
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"pixels: expected uint8[n {size} {size} 3], got {pixels.dtype}{list(pixels.shape)}")
        return self._encode(self._encode_image, lambda batch, first: batch, pixels)

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "n E"]:
        """Return the embeddings of texts, L2-normalized.

        Raises:
          ValueError: for a text that exceeds the context length, unless the model was loaded with `truncate=True`.
          TypeError: for a single text instead of a sequence, or for an item that is no text, with its index.
        """
        self._check_parameters("text")
        return self._encode(self._encode_text, lambda batch, first: self.tokenizer(batch), _as_texts(texts))

    def logits(self, images: Images, texts: Sequence[str]) -> Float[np.ndarray, "n m"]:
        """Return `scale * cosine + logit_bias` for every pair of image and text; models without a bias have 0."""
        bias = np.float32(0.0) if self._logit_bias is None else self._logit_bias
        return self.scale * self.encode_image(images) @ self.encode_text(texts).T + bias

    def zero_shot(
        self,
        images: Images,
        classes: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
        *,
        probabilities: str = "",
    ) -> Float[np.ndarray, "n Q"]:
        """Return class probabilities, of the logits of each image with each class embedding.

        Args:
          templates: prompts with `{}` for the class name. A class embedding is the normalized mean over the prompts.
          probabilities: 'softmax', which sums to 1 over the classes, or 'sigmoid', which is independent of the other
            classes: `1 / (1 + exp(-logit))`, with the model's logit bias. By default that of the model's loss: sigmoid
            for models with a logit bias (SigLIP), as in transformers' zero-shot-image-classification pipeline.

        Raises:
          ValueError: for a template without `{}`, or other `probabilities`.
        """
        default = "softmax" if self._logit_bias is None else "sigmoid"
        probabilities = probabilities or default
        check_name("probabilities", probabilities, ("softmax", "sigmoid"))
        templates = _as_list(templates, "template")
        if wrong := [template for template in templates if "{}" not in template]:
            raise ValueError(
                f"templates: expected '{{}}' for the class name, got {wrong[0]!r}; use e.g. 'a photo of a {{}}.'"
            )
        prompts = [template.replace("{}", name) for name in _as_list(classes, "class") for template in templates]
        class_QE = average_prompts(self.encode_text(prompts), np.full(len(classes), len(templates)))
        logits_nQ = self.scale * self.encode_image(images) @ class_QE.T
        if probabilities == "sigmoid":
            logits_nQ = logits_nQ + (0.0 if self._logit_bias is None else self._logit_bias)
            return 0.5 * (1 + np.tanh(0.5 * logits_nQ))  # 1 / (1 + exp(-logits)), without overflow
        exp_nQ = np.exp(logits_nQ - logits_nQ.max(axis=1, keepdims=True))
        return exp_nQ / exp_nQ.sum(axis=1, keepdims=True)

    def on_devices(self, devices: Sequence[jax.Device]) -> Clip:
        """Return the model with its parameters on every one of the devices, which share each batch.

        >>> model = random_model("emoji").on_devices(jax.local_devices())
        >>> model.max_batch == 64 * jax.local_device_count()
        True
        """
        mesh = jax.sharding.Mesh(np.array(devices), ("data",))
        everywhere, divided = (jax.sharding.NamedSharding(mesh, jax.P(*axes)) for axes in ((), ("data",)))
        return dataclasses.replace(self, params=jax.device_put(self.params, everywhere), _sharding=divided)

    @property
    def max_batch(self) -> int:
        """The largest number of inputs that the devices encode at once."""
        return _MAX_BATCH * (self._sharding.num_devices if self._sharding else 1)

    @property
    def fingerprint(self) -> str:
        """A hash of the architecture, preprocessing, dtype and parameters: of all that embeddings depend on."""
        return weights_fingerprint(self.config, self.params, _computation_dtype(self.params))

    @property
    def scale(self) -> np.float32:
        """The factor between cosines and logits, `exp(logit_scale)`."""
        self._check_parameters("logit_scale")
        return np.exp(np.asarray(self.params["logit_scale"], np.float32))

    @property
    def _logit_bias(self) -> np.float32 | None:
        return np.asarray(self.params["logit_bias"], np.float32)[()] if "logit_bias" in self.params else None

    def _check_parameters(self, name: str) -> None:
        if name not in self.params:
            found = " and ".join(tower for tower in ("image", "text") if tower in self.params)
            raise ValueError(
                f"expected weights of both towers with {name}, got the {found} tower alone; load weights of both towers"
            )

    def _encode(
        self,
        encode: Callable[..., jax.Array],
        prepare: Callable[[Any, int], np.ndarray],
        items: Sequence[Any] | np.ndarray,
    ) -> Float[np.ndarray, "n E"]:
        outputs = [np.zeros((0, self.config.model.embed_dim), np.float32)]
        devices = self.max_batch // _MAX_BATCH
        for start in range(0, len(items), self.max_batch):
            rows = prepare(items[start : start + self.max_batch], start)
            padded_rows = devices << (-(-len(rows) // devices) - 1).bit_length()  # a power of two on each device
            padding = [(0, padded_rows - len(rows))] + [(0, 0)] * (rows.ndim - 1)
            padded = jax.device_put(np.pad(rows, padding, mode="edge"), self._sharding)
            outputs.append(np.asarray(encode(self.params, padded))[: len(rows)])
        return np.concatenate(outputs)


def load(
    path: str | os.PathLike[str],
    *,
    model: str = "",
    activation: str = "",
    image_size: int = 0,
    context_length: int = 0,
    preprocess: Preprocess | str = "",
    tokenizer: TokenizerConfig | str = "",
    prefix: str = "",
    heads: Sequence[int] = (),
    dtype: str = "float32",
    truncate: bool = False,
) -> Clip:
    """Load a model from a weight file, a directory, a name of an OpenAI model or a repository of the Hugging Face hub.

    Of weights of one tower alone, such as transformers' CLIPVisionModel, only that tower's method can be called; its
    embeddings are those before the projection if the weights have none.

    Formats: clip_jax's, OpenAI's archives, torch state dicts and checkpoints, safetensors, directories of open_clip and
    Hugging Face, Flax msgpack, big_vision npz, runs of clip_jax, and others in `clip_jax.interop.formats.FORMATS`.

    Args:
      path: file or directory; workdir of a run, finished or not, or one of its checkpoints; name such as 'vit_b32' for
        OpenAI's weights in ~/.cache/clip; or 'hf-hub:<owner>/<name>'.
      model: name in `config.MODELS`, for files without a config.
      activation: 'quick_gelu', 'gelu' or 'gelu_tanh', for files without a config. It overrides a config.
      image_size: px; position embeddings are resized to it, as in open_clip. 0: unchanged.
      context_length: tokens, likewise.
      preprocess: name in `config.PREPROCESS`, path of a preprocessor_config.json, processor_config.json or
        open_clip_config.json, or a Preprocess, for files without a config. It overrides a config.
      tokenizer: for weights without one: path of a SentencePiece `.model` or a Hugging Face `tokenizer.json`, used with
        the settings of the published models, or a TokenizerConfig.
      prefix: of the model's tensors, for files with several models, e.g. 'state_dict_ema'. It is determined if the file
        has one model, alone or with an average of its weights (EMA), which is not read.
      heads: attention heads of the image and the text tower, e.g. (12, 8), for files without a config whose towers have
        other sizes than all models in `config.MODELS`.
      dtype: of the parameters in memory and of the computation, 'float32' or 'bfloat16', which takes half the memory.
        Embeddings are float32; their cosine with those of the float32 model is above 0.999 in the tests.
      truncate: truncate texts that exceed the context length and keep the end token; otherwise they are an error, as
        in OpenAI's code.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, unsafe, of an unsupported model, or doesn't match its config.

    >>> import tempfile
    >>> from clip_jax.interop import msgpack
    >>> path = tempfile.mkdtemp() + "/params.msgpack"
    >>> random = random_model("emoji")
    >>> msgpack.write(path, random.params, random.config)
    >>> load(path).config.source
    'random parameters, seed 0'
    """
    sizes = {"image_size": image_size, "context_length": context_length}
    described = {"model": model, "activation": activation, "heads": heads, "prefix": prefix}
    weights = reading.read(
        path, preprocess=preprocess, tokenizer=tokenizer, one_tower=True, dtype=dtype, **described, **sizes
    )
    config, params = weights.config, weights.params
    del weights  # `_to_device` frees each NumPy array after its copy
    return _clip(config, _to_device(dict(params)), truncate)


@functools.lru_cache(maxsize=1)
def random_model(name: str, seed: int = 0) -> Clip:
    """Return a preset of `config.MODELS` with randomly initialized parameters, e.g. to test code without weights."""
    config = WeightsConfig(MODELS[name], source=f"random parameters, seed {seed}")
    return _clip(config, jax.jit(make_model(config.model).init)(jax.random.key(seed)), truncate=False)


def _clip(config: WeightsConfig, params: Params, truncate: bool) -> Clip:
    text = config.model.text
    if config.tokenizer.name != "clip_bpe" and not (config.tokenizer.path or config.tokenizer_file):
        tokenizer = _MissingTokenizer(text.vocab_size, text.context_length, 0, text.eos_id)
    else:
        tokenizer = make_tokenizer(config.tokenizer, text, truncate=truncate, tokenizer_file=config.tokenizer_file)
    return _from_parts(config, params, tokenizer)


def _from_parts(config: WeightsConfig, params: Params, tokenizer: Tokenizer) -> Clip:
    functions = make_model(config.model, config.preprocess, dtype=_computation_dtype(params))
    encoders = (functions.encode_image, functions.encode_text)
    if "logit_scale" not in params:  # one tower alone; no tower uses the scale, but the module has it
        encoders = [_with_logit_scale(encode) for encode in encoders]
    return Clip(config, params, tokenizer, *map(jax.jit, encoders))


def _with_logit_scale(encode: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda params, inputs: encode({"logit_scale": np.float32(0), **params}, inputs)


def _computation_dtype(params: Params) -> str:
    """Return 'bfloat16' if all parameters but the scalars are, else 'float32'."""
    return (
        "bfloat16" if {leaf.dtype.name for leaf in jax.tree.leaves(params) if leaf.ndim} == {"bfloat16"} else "float32"
    )


def _to_device(params: dict[str, Any]) -> Params:
    """Move arrays to the device one by one and remove each from `params`, so that only one is in memory twice."""
    moved = {}
    for name in list(params):
        value = params.pop(name)
        moved[name] = _to_device(value) if isinstance(value, dict) else jax.device_put(value)
    return moved


@dataclasses.dataclass(frozen=True)
class _MissingTokenizer:
    """Placeholder for weights without a tokenizer: images can be encoded, a text is an error."""

    vocab_size: int
    length: int
    pad_id: int
    eos_id: int

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "n L"]:
        raise ValueError(
            f"tokenizer: expected one of {self.vocab_size:,} tokens with the weights, got none; load its file, e.g."
            " load(…, tokenizer='/data/c4_en.model')"
        )


def _as_texts(items: Any) -> list[str]:
    """Return texts as a list. An item that is no text is an error with its index."""
    texts = _as_list(items, "text")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {index}: expected a str, got {type(text).__name__}")
    return texts


def _as_list(items: Any, kind: str) -> list[Any]:
    """Return a sequence as a list. A single item is an error: strings and arrays are sequences of letters and rows."""
    single_array = isinstance(items, (np.ndarray, jax.Array)) and items.ndim < 4
    if isinstance(items, (str, bytes, os.PathLike)) or single_array or not hasattr(items, "__len__"):
        raise TypeError(f"expected a sequence, e.g. a list with one {kind}, got one {type(items).__name__}")
    return list(items)

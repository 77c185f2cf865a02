"""Initial parameters of a run: random, or from pretrained weights; and the teacher's parameters for distillation."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

import jax
import optax
from jax.sharding import Mesh

from clip_jax.config import Architecture, Config, InitConfig, TeacherConfig
from clip_jax.interop import positions, reading
from clip_jax.models import Model
from clip_jax.tokenizers import make_tokenizer
from clip_jax.training import step, workdir
from clip_jax.training.step import TrainState
from clip_jax.typing import Params, Tokenizer

log = logging.getLogger(__name__)

# Texts whose token ids are compared: tokenizers differ in merges, case, punctuation, entities and other scripts.
_SAMPLES = (
    "a photo of a dog",
    "The QUICK brown fox, jumps: over 13 lazy dogs!",
    "Motörhead &amp; 東京タワー 🦊 in the snow",
)


def initial_state(model: Model, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh) -> TrainState:
    """Return the state before the first step, sharded over the mesh. Random parameters follow from `train.seed`."""
    shardings = jax.tree.map(lambda x: x.sharding, step.abstract_state(model, optimizer, config, mesh))
    pretrained = initial_params(config) if config.init.weights else {}

    def init(key: jax.Array, pretrained: Params) -> TrainState:
        params = pretrained if "logit_scale" in pretrained else model.init(key) | pretrained  # one tower, or none
        return step.init_state(params, optimizer, config.optim)

    return jax.jit(init, out_shardings=shardings)(jax.random.key(config.train.seed), pretrained)


def initial_params(config: Config) -> Params:
    """Return the pretrained parameters in `init.weights`, with position embeddings resized to the model's sizes.

    A suffix selects one tower, as in 'lit.npz:img'; the result then has the parameters of that tower only. Raises
    ValueError if there is no such file, or its model or preprocessing differs from the config.
    """
    name = f"init.weights={config.init.weights!r}"
    path, tower = reading.split_tower(config.init.weights)
    if tower:
        log.info("initializing the %s tower from %s", tower, path)
        with _named_errors(name):
            return reading.read_tower(path, tower, config.model)
    weights = _read(config.init, config, name)
    stored = dataclasses.replace(config, model=weights.config.model, preprocess=weights.config.preprocess)
    _check_same(stored, config, f"{name} has another model or other pixels")
    log.info("initializing from %s (%s)", config.init.weights, weights.format)
    return weights.params


def teacher_params(config: Config, tokenizer: Tokenizer) -> tuple[Architecture, Params]:
    """Return the architecture and the parameters in `teacher.weights`, with resized position embeddings.

    Raises ValueError if there is no such file, or its preprocessing differs from the run's, or its tokenizer, if the
    weights contain one, returns other ids for sample texts than the run's.
    """
    name = f"teacher.weights={config.teacher.weights!r}"
    if reading.split_tower(config.teacher.weights)[1]:
        raise ValueError(f"{name} is one tower, and a teacher needs both: remove the colon and the tower's name")
    weights = _read(config.teacher, config, name)
    found, tokenizer_config = weights.config.model, weights.config.tokenizer
    text = dataclasses.replace(config.model.text, vocab_size=found.text.vocab_size, eos_id=found.text.eos_id)
    stored = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, text=text),
        preprocess=weights.config.preprocess,
        tokenizer=dataclasses.replace(tokenizer_config, path=config.tokenizer.path),
    )
    _check_same(stored, config, f"{name} has other pixels or token ids")
    if tokenizer_config.name == "clip_bpe" or weights.config.tokenizer_file:
        stored_tokenizer = make_tokenizer(tokenizer_config, found.text, tokenizer_file=weights.config.tokenizer_file)
        for sample in _SAMPLES:
            expected, ids = (tokenize([sample])[0].tolist() for tokenize in (stored_tokenizer, tokenizer))
            if ids != expected:
                raise ValueError(
                    f"{name} has other token ids than this run: {sample!r}: expected {expected}, got {ids}"
                )
    log.info("distilling from %s (%s)", config.teacher.weights, weights.format)
    return found, weights.params


def make_teacher(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> step.Teacher | None:
    """Return the teacher with its parameters on the mesh; None without `teacher.weights`."""
    if not config.teacher.weights:
        return None
    architecture, params = teacher_params(config, tokenizer)
    return step.make_teacher(architecture, params, config, mesh)


def _read(section: InitConfig | TeacherConfig, config: Config, name: str) -> reading.Weights:
    """Read the section's weights, resized to the run's image size and context length, for the run's preprocessing."""
    size, length = config.model.image.image_size, config.model.text.context_length
    with _named_errors(name):
        described = {key: getattr(section, key) for key in ("model", "activation", "preprocess")}
        weights = reading.read(section.weights, like=config.model, **described)
        model, params = positions.resize(weights.config.model, weights.params, image_size=size, context_length=length)
    spec = weights.config.preprocess.scaled(weights.config.model.image.image_size, model.image.image_size)
    preprocess = dataclasses.replace(spec, implementation=config.preprocess.implementation)
    stored = dataclasses.replace(weights.config, model=model, preprocess=preprocess)
    return dataclasses.replace(weights, params=params, config=stored)


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _check_same(stored: Config, config: Config, message: str) -> None:
    if changed := workdir.format_differences(stored, config):
        raise ValueError(f"{message} than this run: {changed}")

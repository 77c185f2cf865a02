"""Initial parameters of a run: random, or from pretrained weights; and the teacher's parameters for distillation."""

from __future__ import annotations

import dataclasses
import functools
import logging

import jax
import optax
from jax.sharding import Mesh

from clip_jax.config import Architecture, Config, differences
from clip_jax.interop import positions, reading
from clip_jax.models import Model
from clip_jax.tokenizers import make_tokenizer
from clip_jax.training import step
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
    """Return the state before the first step, sharded over the mesh.

    Random parameters are a function of `train.seed`, equal on every host.
    """
    shardings = jax.tree.map(lambda x: x.sharding, step.abstract_state(model, optimizer, config, mesh))
    init = functools.partial(step.init_state, optimizer=optimizer, config=config.optim)
    key = jax.random.key(config.train.seed)
    if not config.init.weights:
        return jax.jit(lambda key: init(model.init(key)), out_shardings=shardings)(key)
    params = initial_params(config)
    if "logit_scale" not in params:  # one tower; the rest is random
        params = jax.jit(model.init)(key) | params
    return jax.jit(init, out_shardings=shardings)(params)


def initial_params(config: Config) -> Params:
    """Return the pretrained parameters in `init.weights`, with position embeddings resized to the model's sizes.

    A suffix selects one tower, as in 'lit.npz:img'; the result then has the parameters of that tower only.

    Raises:
      ValueError: there is no such file, or its model or preprocessing differs from the config; the message has the
        differing keys.
    """
    init, model = config.init, config.model
    path, tower = reading.split_tower(init.weights)
    try:
        if tower:
            log.info("initializing the %s tower from %s", tower, path)
            return reading.read_tower(path, tower, model)
        weights = reading.read(init.weights, model=init.model, activation=init.activation)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"init.weights={init.weights!r}: {error}") from error
    size, length = model.image.image_size, model.text.context_length
    found, params = positions.resize(weights.config.model, weights.params, image_size=size, context_length=length)
    preprocess = dataclasses.replace(weights.config.preprocess, implementation=config.preprocess.implementation)
    stored = dataclasses.replace(config, model=found, preprocess=preprocess)
    _check_same(stored, config, f"init.weights={init.weights!r} has another model or other pixels")
    log.info("initializing from %s (%s)", init.weights, weights.format)
    return params


def teacher_params(config: Config, tokenizer: Tokenizer) -> tuple[Architecture, Params]:
    """Return the architecture and the parameters in `teacher.weights`, with resized position embeddings.

    Args:
      tokenizer: tokenizer of the run. If the weights contain a tokenizer, both must return equal ids for sample texts.

    Raises:
      ValueError: there is no such file, or its preprocessing or token ids differ from those of the run.
    """
    teacher, model = config.teacher, config.model
    name = f"teacher.weights={teacher.weights!r}"
    if reading.split_tower(teacher.weights)[1]:
        raise ValueError(f"{name} is one tower, and a teacher needs both: remove the colon and the tower's name")
    try:
        weights = reading.read(teacher.weights, model=teacher.model, activation=teacher.activation)
        size, length = model.image.image_size, model.text.context_length
        found, params = positions.resize(weights.config.model, weights.params, image_size=size, context_length=length)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    text = dataclasses.replace(model.text, vocab_size=found.text.vocab_size, eos_id=found.text.eos_id)
    stored = dataclasses.replace(
        config,
        model=dataclasses.replace(model, text=text),
        preprocess=dataclasses.replace(weights.config.preprocess, implementation=config.preprocess.implementation),
        tokenizer=dataclasses.replace(weights.config.tokenizer, path=config.tokenizer.path),
    )
    _check_same(stored, config, f"{name} has other pixels or token ids")
    if weights.config.tokenizer.name == "clip_bpe" or weights.config.tokenizer_file:
        stored_tokenizer = make_tokenizer(
            weights.config.tokenizer, found.text, tokenizer_file=weights.config.tokenizer_file
        )
        _check_same_token_ids(stored_tokenizer, tokenizer, name)
    log.info("distilling from %s (%s)", teacher.weights, weights.format)
    return found, params


def make_teacher(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> step.Teacher | None:
    """Return the teacher with its parameters on the mesh; None without `teacher.weights`."""
    if not config.teacher.weights:
        return None
    architecture, params = teacher_params(config, tokenizer)
    return step.make_teacher(architecture, params, config, mesh)


def _check_same(stored: Config, config: Config, message: str) -> None:
    differing = differences(stored, config)
    if differing:
        keys = "; ".join(f"{key} is {there!r} there, {here!r} here" for key, (there, here) in differing.items())
        raise ValueError(f"{message} than this run: {keys}")


def _check_same_token_ids(stored: Tokenizer, tokenizer: Tokenizer, name: str) -> None:
    for sample in _SAMPLES:
        there, here = (tokenize([sample])[0].tolist() for tokenize in (stored, tokenizer))
        if there != here:
            raise ValueError(f"{name} has other token ids than this run: {sample!r} is {there} there, {here} here")

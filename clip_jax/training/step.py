"""The training step as a pure function of state and batch: gradient, optimizer update, metrics.

A step whose loss or gradient is not finite leaves parameters and optimizer state unchanged and only counts.
`optax.apply_if_finite` is not used because it applies a NaN update after a number of consecutive errors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32, PyTree

from clip_jax.config import Architecture, Config, OptimConfig, TrainConfig
from clip_jax.devices import sharding
from clip_jax.devices.sharding import BATCH, BATCH_AXES, REPLICATED, batch_sharding
from clip_jax.losses import distilled
from clip_jax.models import Model, make_model, split_batch_stats
from clip_jax.training import optim
from clip_jax.typing import Batch, Leaf, Metrics, Params

Arrays = dict[str, Array]  # arguments of a loss by name
LossAndAux = tuple[Float[Array, ""], tuple[Metrics, Params | None]]  # (loss, (metrics, batch_stats))

TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
Gradient = Callable[..., tuple[LossAndAux, Params]]  # of (params, batch_stats, batch, key, teacher_params)
# (params, batch_stats, examples) -> (embeddings, (batch_stats, metrics))
Embed = Callable[[Params, Params | None, "Examples"], tuple[Arrays, tuple[Params | None, Metrics]]]
EmbedTeacher = Callable[["Examples"], Arrays]
# (embeddings of student and teacher, the student's logit parameters) -> (loss, metrics)
BatchLoss = Callable[[Arrays, Params], tuple[Float[Array, ""], Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays that training updates, which are the contents of a checkpoint."""

    step: Leaf  # int32, number of steps taken; it determines the position in the data
    params: Params  # float32, or bfloat16 where `optim.half_precision_params` matches
    opt_state: PyTree  # see `optim.make_optimizer`
    batch_stats: Params | None  # running averages of batch norm; None for models without it
    ema: Params | None  # exponential moving average of the parameters, float32; None without `optim.ema_decay`
    skipped_steps: Leaf  # int32, number of steps without update because loss or gradient were not finite
    consecutive_skipped_steps: Leaf  # int32, number of them since the last update

    @property
    def eval_params(self) -> Params:
        """Parameters for evaluation and export, float32: the EMA if there is one."""
        return _with_stats(optim.upcast(self.params) if self.ema is None else self.ema, self.batch_stats)


class Teacher(NamedTuple):
    """A frozen model for distillation. Its parameters are an input of the step, sharded like the student's."""

    model: Model
    params: Params


class Examples(NamedTuple):
    """Inputs of the towers."""

    image: Leaf
    text: Leaf
    key: Leaf  # per example, so that its random numbers are independent of the rest of the batch


def model_from_config(config: Config, mesh: Mesh) -> Model:
    """Return the model of a training run on a mesh."""
    return make_model(
        config.model,
        config.preprocess,
        remat=config.train.remat,
        logit_scale_init=config.loss.logit_scale_init,
        logit_bias_init=config.loss.logit_bias_init,
        patch_dropout=config.train.patch_dropout,
        frozen=config.optim.freeze,
        **_compute_options(config.train, mesh),
    )


def _compute_options(train: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """Return the arguments of `make_model` that student and teacher share."""
    return {
        "dtype": train.dtype,
        "unroll": train.unroll_layers,
        "text_capacity": train.text_capacity,
        "text_groups": sharding.batch_shards(mesh),
        "batch_sharding": sharding.batch_sharding(mesh),
    }


def make_teacher(architecture: Architecture, params: Params, config: Config, mesh: Mesh) -> Teacher:
    """Return the teacher of a run, which computes in the run's dtype. Raises ValueError as `abstract_state`."""
    model = make_model(architecture, config.preprocess, **_compute_options(config.train, mesh))
    shardings = sharding.param_shardings(params, mesh, architecture)
    return Teacher(model, jax.jit(lambda x: x, out_shardings=shardings)(params))


def init_state(params: Params, optimizer: optax.GradientTransformation, config: OptimConfig) -> TrainState:
    """Return the state before the first step. `params` includes `batch_stats` for models that have them."""
    zero = jnp.zeros((), jnp.int32)
    trained, stats = split_batch_stats(params)
    ema = jax.tree.map(jnp.copy, trained) if config.ema_decay else None  # a copy, because the step donates both
    trained = optim.cast_params(trained, config.half_precision_params)
    return TrainState(zero, trained, optimizer.init(trained), stats, ema, zero + 0, zero + 0)


def abstract_state(
    model: Model, optimizer: optax.GradientTransformation, config: Config, mesh: sharding.AnyMesh
) -> TrainState:
    """Return the shapes, dtypes and shardings of the state. Raises ValueError if `mesh.tensor` does not divide it."""
    shapes = jax.eval_shape(lambda key: init_state(model.init(key), optimizer, config.optim), jax.random.key(0))
    shardings = sharding.state_shardings(shapes, mesh, config.model, shard_moments=config.optim.shard_moments)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def make_train_step(
    model: Model, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh, teacher: Teacher | None = None
) -> TrainStep:
    """Return the compiled step (state, batch) -> (state, metrics). The state is donated and keeps its shardings.

    Metrics are replicated float32 scalars: `loss` (with a teacher, including the distillation term), the metrics of the
    loss and of the text tower, `logit_scale`, `skipped_steps`, `consecutive_skipped_steps`, `grad_norm` (global), and
    for each tower, `image` and `text`, the norms of gradient, parameters and applied parameter change:
    `grad_norm/<tower>`, `param_norm/<tower>`, `update_norm/<tower>`.
    """
    gradient = make_gradient(model, config, mesh, teacher and teacher.model)
    select = _select_with_cond if mesh.devices.flat[0].platform == "cpu" else _select_with_where

    def train_step(teacher_params: Params | None, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        (loss, (metrics, stats)), grads = gradient(state.params, state.batch_stats, batch, key, teacher_params)
        grads = optim.upcast(grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def apply_update() -> tuple:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optim.apply_updates(state.params, updates, key)
            # Bounds of the scale: 1 (open_clip), and `logit_scale_max` (paper, section 2.5).
            params |= {"logit_scale": jnp.clip(params["logit_scale"], 0.0, math.log(config.loss.logit_scale_max))}
            ema = state.ema and _moving_average(state.ema, params, state.step, config.optim.ema_decay)
            return params, opt_state, stats, ema

        def with_norms(new: tuple) -> tuple:
            change = jax.tree.map(jnp.subtract, optim.upcast(new[0]), optim.upcast(state.params))
            return *new, _tower_norms("update_norm", change)

        previous = (state.params, state.opt_state, state.batch_stats, state.ema)
        params, opt_state, stats, ema, update_norms = select(finite, apply_update, previous, with_norms)
        skipped_steps = state.skipped_steps + ~finite
        consecutive = jnp.where(finite, 0, state.consecutive_skipped_steps + 1)
        metrics |= {
            "loss": loss,
            "logit_scale": jnp.exp(params["logit_scale"]),
            "grad_norm": grad_norm,
            "skipped_steps": skipped_steps.astype(jnp.float32),
            "consecutive_skipped_steps": consecutive.astype(jnp.float32),
        }
        metrics |= _tower_norms("grad_norm", grads) | _tower_norms("param_norm", optim.upcast(params)) | update_norms
        return TrainState(state.step + 1, params, opt_state, stats, ema, skipped_steps, consecutive), metrics

    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, config, mesh))
    inputs, outputs = (shardings, batch_sharding(mesh)), (shardings, sharding.replicated(mesh))
    if teacher is None:
        without_teacher = functools.partial(train_step, None)
        return jax.jit(without_teacher, in_shardings=inputs, out_shardings=outputs, donate_argnums=0)
    compiled = jax.jit(train_step, in_shardings=(None, *inputs), out_shardings=outputs, donate_argnums=1)
    return functools.partial(compiled, teacher.params)


def make_gradient(model: Model, config: Config, mesh: Mesh, teacher: Model | None = None) -> Gradient:
    """Return loss and gradient of the global batch as a function of params, batch_stats, batch, key, teacher_params."""
    embed, loss = make_embed(model, config.optim.freeze), make_loss(config, mesh, distill=teacher is not None)
    compute_gradient = full_batch_gradient
    if config.train.micro_batches > 1:
        split, join = sharding.micro_batches(mesh, config.train.micro_batches)
        compute_gradient = functools.partial(gradient_cached_gradient, split=split, join=join)

    def gradient(
        params: Params, stats: Params | None, batch: Batch, key: jax.Array, teacher_params: Params | None = None
    ) -> tuple[LossAndAux, Params]:
        keys = jax.random.split(key, batch.text.shape[0])
        examples = Examples(batch.image, batch.text, jax.lax.with_sharding_constraint(keys, batch_sharding(mesh)))

        def embed_teacher(examples: Examples) -> Arrays:
            if teacher is None:
                return {}
            return {
                "teacher_image_bG": teacher.encode_image(teacher_params, examples.image),
                "teacher_text_bG": teacher.encode_text_train(teacher_params, examples.text)[0],
            }

        batch_loss = functools.partial(loss, text_BL=batch.text, teacher_params=teacher_params)
        return compute_gradient(embed, embed_teacher, batch_loss, params, stats, examples)

    return gradient


def full_batch_gradient(
    embed: Embed, embed_teacher: EmbedTeacher, loss: BatchLoss, params: Params, stats: Params | None, examples: Examples
) -> tuple[LossAndAux, Params]:
    """Return loss and gradient with the activations of the whole batch in memory."""
    teacher_embeddings = embed_teacher(examples)

    def objective(params: Params) -> LossAndAux:
        embeddings, (new_stats, text_metrics) = embed(params, stats, examples)
        value, metrics = loss(embeddings | teacher_embeddings, _logit_params(params))
        return value, (metrics | text_metrics, new_stats)

    return jax.value_and_grad(objective, has_aux=True)(params)


def gradient_cached_gradient(
    embed: Embed,
    embed_teacher: EmbedTeacher,
    loss: BatchLoss,
    params: Params,
    stats: Params | None,
    examples: Examples,
    split: Callable[[Any], Any],
    join: Callable[[Any], Any],
) -> tuple[LossAndAux, Params]:
    """Return loss and gradient of the whole batch with the activations of one micro-batch in memory at a time.

    GradCache (Gao et al. 2021, arXiv:2101.06983; BASIC: Pham et al. 2021, arXiv:2111.10050): embed all micro-batches
    without storing activations, compute the loss and its gradient with respect to the embeddings, then recompute the
    towers of each micro-batch with the same keys and backpropagate. All negatives of the batch count. Batch norm uses
    the statistics of a micro-batch over all devices, and its running averages are updated once per micro-batch.
    `split` and `join` are `sharding.micro_batches`.
    """
    micro_batches = split(examples)

    def embed_micro_batch(stats: Params | None, examples: Examples) -> tuple[Params | None, tuple]:
        embeddings, (stats, metrics) = embed(params, stats, examples)
        return stats, (embeddings, metrics, embed_teacher(examples))

    new_stats, (embeddings, text_metrics, teacher_embeddings) = jax.lax.scan(embed_micro_batch, stats, micro_batches)
    embeddings, teacher_embeddings = join(embeddings), join(teacher_embeddings)
    value, pullback, metrics = jax.vjp(
        lambda embeddings, logit_params: loss(embeddings | teacher_embeddings, logit_params),
        embeddings,
        _logit_params(params),
        has_aux=True,
    )
    d_embeddings, d_logit_params = pullback(jnp.ones_like(value))

    def add_gradient(grads: Params, inputs: tuple[Examples, Arrays]) -> tuple[Params, None]:
        examples, d_embeddings = inputs
        _, pullback = jax.vjp(lambda params: embed(params, stats, examples)[0], params)
        return jax.tree.map(jnp.add, grads, optim.upcast(pullback(d_embeddings)[0])), None

    zeros = jax.tree.map(jnp.zeros_like, optim.upcast(params))
    grads, _ = jax.lax.scan(add_gradient, zeros, (micro_batches, split(d_embeddings)))
    return (value, (metrics | jax.tree.map(jnp.mean, text_metrics), new_stats)), grads | d_logit_params


def make_embed(model: Model, freeze: str) -> Embed:
    """Return the function that embeds the examples of a training step; a frozen image tower runs as in inference."""

    def embed(params: Params, stats: Params | None, examples: Examples) -> tuple[Arrays, tuple[Params | None, Metrics]]:
        params = optim.stop_frozen_gradients(params, freeze)
        if optim.tower_is_frozen(params, freeze, "image"):
            image_BE = model.encode_image(_with_stats(params, stats), examples.image)
        else:
            image_BE, stats = model.encode_image_train(_with_stats(params, stats), examples.image, examples.key)
        text_BE, metrics = model.encode_text_train(params, examples.text)
        return {"image_bE": image_BE, "text_bE": text_BE}, (stats, metrics)

    return embed


def make_loss(config: Config, mesh: Mesh, *, distill: bool) -> Callable[..., tuple[Float[Array, ""], Metrics]]:
    """Return (embeddings, logit_params, text_BL, teacher_params) -> (loss, metrics) over a batch that is sharded."""
    loss = distilled(config.loss, config.teacher.weight) if distill else config.loss
    sharded_loss = jax.shard_map(
        lambda embeddings, scalars, ids: loss(**embeddings, **scalars, axis=BATCH_AXES, ids=ids),
        mesh=mesh,
        in_specs=(BATCH, REPLICATED, BATCH),
        out_specs=REPLICATED,
    )

    def batch_loss(
        embeddings: Arrays, logit_params: Params, text_BL: Int32[Array, "B L"], teacher_params: Params | None
    ) -> tuple[Float[Array, ""], Metrics]:
        scalars = {"logit_scale": jnp.exp(logit_params["logit_scale"]), "logit_bias": logit_params.get("logit_bias")}
        if distill:
            scalars["teacher_logit_scale"] = jnp.exp(teacher_params["logit_scale"])
        ids = (caption_ids(text_BL),) * 2 if config.loss.equal_captions == "positives" else None
        return sharded_loss(embeddings, scalars, ids)

    return batch_loss


def caption_ids(text_BL: Int32[Array, "B L"]) -> Int32[Array, "B"]:
    """Return a hash in [0, 2³¹) of each row of token ids; of 32,768 rows, 0.25 pairs are expected to collide."""
    factors_L = np.uint32(0x9E3779B1) ** np.arange(1, text_BL.shape[1] + 1, dtype=np.uint32)  # odd, modulo 2³²
    sums_B = jnp.sum((text_BL.astype(jnp.uint32) + 1) * factors_L[None], axis=1, dtype=jnp.uint32)
    mixed_B = (sums_B ^ (sums_B >> 15)) * np.uint32(0x85EBCA6B)
    return (mixed_B >> 1).astype(jnp.int32)


# Two implementations, because XLA fuses them differently: for ViT-B/32 with AdamW on a CPU, `where` takes 1.2 GB more
# than `cond`, and 900 ms instead of 165; on TPU v4, according to its compiler, `cond` takes 0.6 GB more than `where`.
# `finish` adds norms of the result: the TPU compiler fuses a norm of the difference of selected and previous parameters
# with the update, but not that of the optimizer's update, nor of the difference before `where` (4.4 GB more for L/14).
def _select_with_cond(finite: Bool[Array, ""], apply_update: Callable, previous: tuple, finish: Callable) -> tuple:
    return jax.lax.cond(finite, lambda: finish(apply_update()), lambda: finish(previous))


def _select_with_where(finite: Bool[Array, ""], apply_update: Callable, previous: tuple, finish: Callable) -> tuple:
    return finish(jax.tree.map(lambda new, old: jnp.where(finite, new, old), apply_update(), previous))


def _tower_norms(name: str, tree: Params) -> Metrics:
    return {f"{name}/{tower}": optax.tree.norm(tree[tower]) for tower in ("image", "text")}


def _logit_params(params: Params) -> Params:
    return {name: params[name] for name in ("logit_scale", "logit_bias") if name in params}


def _with_stats(params: Params, stats: Params | None) -> Params:
    return params if stats is None else params | {"batch_stats": stats}


def _moving_average(ema: Params, params: Params, step: Int32[Array, ""], decay: float) -> Params:
    # The decay grows from 0.1, so that a short run's average does not contain the initialization.
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)

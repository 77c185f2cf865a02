"""One training step, as a pure function of state and batch.

A step whose loss or gradient is not finite changes nothing but counters: `optax.apply_if_finite` would apply the NaN
after enough of them, so the guard is our own.
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
from clip_jax.devices.sharding import BATCH, BATCH_AXES, REPLICATED, batch_sharding, replicated
from clip_jax.losses import LOSSES, distillation
from clip_jax.models import Model, make_model
from clip_jax.training import optim
from clip_jax.typing import Batch, Leaf, Metrics, Params

TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]
# (params, batch_stats, batch, key, teacher's params) -> ((loss, (metrics, batch_stats)), gradient)
Gradient = Callable[..., tuple[tuple[Float[Array, ""], tuple[Metrics, Params | None]], Params]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes.

    step: int32, steps taken; the position in the data follows from it.
    params: float32, or bfloat16 where `optim.half_precision_params` finds them; `sharding.state_shardings` says where
      they and all that mirrors them lie.
    opt_state: see `optim.make_optimizer`.
    batch_stats: running averages of batch norm; None for models without it.
    ema: moving average of the parameters, float32; None without `optim.ema_decay`.
    skipped_steps, consecutive_skipped_steps: int32, steps that were not finite, since the beginning and just now.
    """

    step: Leaf
    params: Params
    opt_state: PyTree
    batch_stats: Params | None
    ema: Params | None
    skipped_steps: Leaf
    consecutive_skipped_steps: Leaf

    @property
    def eval_params(self) -> Params:
        """The parameters that are evaluated and exported, float32."""
        return _with_stats(optim.upcast(self.params) if self.ema is None else self.ema, self.batch_stats)


class Teacher(NamedTuple):
    """A frozen model that is learnt from. Its parameters are an input of the step, and lie on the mesh as others do."""

    model: Model
    params: Params


def model_from_config(config: Config, mesh: Mesh) -> Model:
    """Return the model as `config` trains it on a mesh."""
    train, loss = config.train, config.loss
    return make_model(
        config.model,
        config.preprocess,
        remat=train.remat,
        logit_scale_init=loss.logit_scale_init,
        logit_bias_init=loss.logit_bias_init,
        patch_dropout=train.patch_dropout,
        **_placement(train, mesh),
    )


def _placement(train: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """Return what any model of a run has in common: how it computes, and where."""
    return {
        "dtype": train.dtype,
        "unroll": train.unroll_layers,
        "text_capacity": train.text_capacity,
        "text_groups": sharding.batch_shards(mesh),
        "batch_sharding": sharding.batch_sharding(mesh),
    }


def make_teacher(architecture: Architecture, params: Params, config: Config, mesh: Mesh) -> Teacher:
    """Return the teacher of a run, its parameters on the mesh. It computes in the run's dtype.

    Raises:
      ValueError: if `mesh.tensor` does not divide the model.
    """
    model = make_model(architecture, config.preprocess, **_placement(config.train, mesh))
    shardings = sharding.param_shardings(params, mesh, architecture)
    return Teacher(model, jax.jit(lambda x: x, out_shardings=shardings)(params))


def init_state(params: Params, optimizer: optax.GradientTransformation, config: OptimConfig) -> TrainState:
    """Return the state before the first step of `params`, batch statistics included where the model has them."""
    zero = jnp.zeros((), jnp.int32)
    trained = {name: value for name, value in params.items() if name != "batch_stats"}
    average = jax.tree.map(jnp.copy, trained) if config.ema_decay else None  # a copy: the step donates both
    trained = optim.cast_params(trained, config.half_precision_params)
    stats = params.get("batch_stats")
    return TrainState(zero, trained, optimizer.init(trained), stats, average, zero + 0, zero + 0)


def abstract_state(
    model: Model, optimizer: optax.GradientTransformation, config: Config, mesh: sharding.AnyMesh
) -> TrainState:
    """Return the state's shapes and dtypes, and where each array lies on the mesh.

    Raises:
      ValueError: if `mesh.tensor` does not divide the model.
    """
    shapes = jax.eval_shape(lambda key: init_state(model.init(key), optimizer, config.optim), jax.random.key(0))
    placed = sharding.state_shardings(shapes, mesh, config.model, shard_moments=config.optim.shard_moments)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: Mesh,
    teacher: Teacher | None = None,
) -> TrainStep:
    """Return the compiled step: (state, batch) -> (state, metrics). The state is donated, and stays where it lies.

    Metrics are float32 scalars, equal on every device: loss, the loss's own, logit_scale, grad_norm, skipped,
    consecutive_skipped_steps; text/filled and text/padded where captions are packed; those of `losses.distillation`
    where there is a teacher, whose part `loss` includes.
    """
    gradient = make_gradient(model, config, mesh, teacher and teacher.model)

    choose = _run_if if mesh.devices.flat[0].platform == "cpu" else _select_if

    def taught_step(taught: Params | None, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        (value, (metrics, stats)), grads = gradient(state.params, state.batch_stats, batch, key, taught)
        grads = optim.upcast(grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)

        def propose() -> tuple[Params, PyTree, Params | None, Params | None]:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optim.apply_updates(state.params, updates, key)
            params |= {"logit_scale": _clip_log_scale(params["logit_scale"], config.loss.logit_scale_max)}
            ema = state.ema and _average(state.ema, params, state.step, config.optim.ema_decay)
            return params, opt_state, stats, ema

        kept = (state.params, state.opt_state, state.batch_stats, state.ema)
        params, opt_state, stats, ema = choose(finite, propose, kept)
        skipped = state.skipped_steps + ~finite
        in_a_row = jnp.where(finite, 0, state.consecutive_skipped_steps + 1)
        metrics |= {
            "loss": value,
            "logit_scale": jnp.exp(params["logit_scale"]),
            "grad_norm": grad_norm,
            "skipped_steps": skipped.astype(jnp.float32),
            "consecutive_skipped_steps": in_a_row.astype(jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state, stats, ema, skipped, in_a_row), metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return taught_step(None, state, batch)

    placed = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, config, mesh))
    inputs, outputs = (placed, batch_sharding(mesh)), (placed, replicated(mesh))
    if teacher is None:
        return jax.jit(train_step, in_shardings=inputs, out_shardings=outputs, donate_argnums=0)
    compiled = jax.jit(taught_step, in_shardings=(None, *inputs), out_shardings=outputs, donate_argnums=1)
    return functools.partial(compiled, teacher.params)


class Examples(NamedTuple):
    """What a step embeds: pictures, token ids, keys."""

    image: Leaf
    text: Leaf
    key: Leaf  # of every example, so that what is drawn for it is the same in any company


_Embedded = tuple[Float[Array, "B E"], Float[Array, "B E"]]
_Target = tuple[Float[Array, "B G"], Float[Array, "B G"]]  # the teacher's embeddings
_Value = tuple[Float[Array, ""], tuple[Metrics, Params | None]]


def make_embed(model: Model, freeze: str) -> Callable[..., tuple[_Embedded, tuple[Params | None, Metrics]]]:
    """Return (params, batch_stats, rows) -> (embeddings, (batch_stats, metrics)), as a step embeds pictures and texts.

    freeze: parameters that have no gradient; an image tower without any computes as it does in inference.
    """

    def embed(params: Params, stats: Params | None, rows: Examples) -> tuple[_Embedded, tuple[Params | None, Metrics]]:
        params = optim.stop_frozen_gradients(params, freeze)
        if optim.tower_is_frozen(params, freeze, "image"):
            images_BE = model.encode_image(_with_stats(params, stats), rows.image)
        else:
            images_BE, stats = model.encode_image_train(_with_stats(params, stats), rows.image, rows.key)
        texts_BE, metrics = model.encode_text_train(params, rows.text)
        return (images_BE, texts_BE), (stats, metrics)

    return embed


def make_gradient(model: Model, config: Config, mesh: Mesh, teacher: Model | None = None) -> Gradient:
    """Return (params, batch_stats, batch, key) -> ((loss, (metrics, batch_stats)), gradient) of the whole batch.

    With a teacher its parameters are a fifth argument; it embeds every picture and text once, in inference's way.

    With `train.micro_batches`, the batch is embedded part by part, the loss is taken over all embeddings, and every
    part is embedded again for its gradient, with the same keys: the gradient is that of the whole batch, with all its
    negatives, while activations are a part's (GradCache: Gao et al. 2021, arXiv:2101.06983; BASIC: Pham et al. 2021,
    arXiv:2111.10050). Batch norm sees a part at a time: its statistics are those of every part, over all devices, and
    the running averages move once for each.
    """
    parts = config.train.micro_batches
    whole_loss, embed = _loss_over(mesh, config), make_embed(model, config.optim.freeze)

    def teach(taught: Params | None, rows: Examples) -> _Target | None:
        if teacher is None:
            return None
        return teacher.encode_image(taught, rows.image), teacher.encode_text_train(taught, rows.text)[0]

    def at_once(params: Params, stats: Params | None, taught: Params | None, rows: Examples) -> tuple[_Value, Params]:
        target = teach(taught, rows)

        def objective(params: Params) -> _Value:
            embedded, (new_stats, text_metrics) = embed(params, stats, rows)
            value, metrics = whole_loss(embedded, _head(params), rows.text, target, taught)
            return value, (metrics | text_metrics, new_stats)

        return jax.value_and_grad(objective, has_aux=True)(params)

    def in_parts(params: Params, stats: Params | None, taught: Params | None, rows: Examples) -> tuple[_Value, Params]:
        split, join = sharding.micro_batches(mesh, parts)
        parts_of_rows = split(rows)

        def first(stats: Params | None, part: Examples) -> tuple[Params | None, tuple]:
            embedded, (stats, metrics) = embed(params, stats, part)
            return stats, (embedded, metrics, teach(taught, part))

        new_stats, (embedded, text_metrics, target) = jax.lax.scan(first, stats, parts_of_rows)
        embedded, target = join(embedded), join(target)
        value, pull, metrics = jax.vjp(
            lambda embedded, head: whole_loss(embedded, head, rows.text, target, taught),
            *(embedded, _head(params)),
            has_aux=True,
        )
        d_embedded, d_head = pull(jnp.ones_like(value))

        def again(grads: Params, part: tuple[Examples, _Embedded]) -> tuple[Params, None]:
            rows, d_part = part
            _, pull = jax.vjp(lambda params: embed(params, stats, rows)[0], params)
            return jax.tree.map(jnp.add, grads, optim.upcast(pull(d_part)[0])), None

        zeros = jax.tree.map(jnp.zeros_like, optim.upcast(params))
        grads, _ = jax.lax.scan(again, zeros, (parts_of_rows, split(d_embedded)))
        text_metrics = jax.tree.map(jnp.mean, text_metrics)
        return (value, (metrics | text_metrics, new_stats)), grads | d_head

    def gradient(
        params: Params, stats: Params | None, batch: Batch, key: jax.Array, taught: Params | None = None
    ) -> tuple[_Value, Params]:
        keys = jax.random.split(key, batch.text.shape[0])
        rows = Examples(batch.image, batch.text, jax.lax.with_sharding_constraint(keys, batch_sharding(mesh)))
        return (at_once if parts == 1 else in_parts)(params, stats, taught, rows)

    return gradient


def _head(params: Params) -> Params:
    return {name: params[name] for name in ("logit_scale", "logit_bias") if name in params}


def _loss_over(mesh: Mesh, config: Config) -> Callable[..., tuple[Float[Array, ""], Metrics]]:
    """Return (embeddings, head, text_BL, teacher's embeddings, its params) -> (loss, metrics) of a batch over the mesh.

    Without a teacher, the last two are None.
    """
    loss = LOSSES[config.loss.name]
    sharded = jax.shard_map(
        lambda *inputs: loss(*inputs[:4], axis=BATCH_AXES, ids=inputs[4]),
        mesh=mesh,
        in_specs=(BATCH, BATCH, REPLICATED, REPLICATED, BATCH),
        out_specs=REPLICATED,
    )
    sharded_distillation = jax.shard_map(
        functools.partial(distillation, axis=BATCH_AXES),
        mesh=mesh,
        in_specs=(BATCH, BATCH, BATCH, BATCH, REPLICATED, REPLICATED),
        out_specs=REPLICATED,
    )

    def whole(
        embedded: _Embedded, head: Params, text_BL: Int32[Array, "B L"], target: _Target | None, taught: Params | None
    ) -> tuple[Float[Array, ""], Metrics]:
        ids = (caption_ids(text_BL),) * 2 if config.loss.equal_captions == "positives" else None
        scale = jnp.exp(head["logit_scale"])
        value, metrics = sharded(*embedded, scale, head.get("logit_bias"), ids)
        if target is None:
            return value, metrics
        distilled, more = sharded_distillation(*embedded, *target, scale, jnp.exp(taught["logit_scale"]))
        return value + config.teacher.weight * distilled, metrics | more

    return whole


def caption_ids(text_BL: Int32[Array, "B L"]) -> Int32[Array, "B"]:
    """Return a number from 0 to 2³¹ - 1 for every row of tokens, equal for equal rows.

    Different rows share one by chance: in a batch of 32,768 a quarter of a pair on average.
    """
    factors_L = np.uint32(0x9E3779B1) ** np.arange(1, text_BL.shape[1] + 1, dtype=np.uint32)  # odd, modulo 2³²
    sums_B = jnp.sum((text_BL.astype(jnp.uint32) + 1) * factors_L[None], axis=1, dtype=jnp.uint32)
    mixed_B = (sums_B ^ (sums_B >> 15)) * np.uint32(0x85EBCA6B)
    return (mixed_B >> 1).astype(jnp.int32)


# Two ways to change nothing, for XLA fuses differently: for ViT-B/32's AdamW on a CPU a select holds 1.2 GB more and
# takes 900 ms instead of 165; on TPU v4, by its compiler, a conditional holds 0.6 GB more than a select.
def _run_if(finite: Bool[Array, ""], propose: Callable[[], PyTree], kept: PyTree) -> PyTree:
    return jax.lax.cond(finite, propose, lambda: kept)


def _select_if(finite: Bool[Array, ""], propose: Callable[[], PyTree], kept: PyTree) -> PyTree:
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), propose(), kept)


def _with_stats(params: Params, stats: Params | None) -> Params:
    return params if stats is None else params | {"batch_stats": stats}


def _clip_log_scale(log_scale: Float[Array, ""], maximum: float) -> Float[Array, ""]:
    # From above as in the paper (section 2.5); from below at 1 as open_clip does, where a softmax learns nothing.
    return jnp.clip(log_scale, 0.0, math.log(maximum))


def _average(ema: Params, params: Params, step: Int32[Array, ""], decay: float) -> Params:
    # Early on the average forgets faster, or it would still hold the initialisation when training ends.
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)

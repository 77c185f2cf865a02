"""One training step, as a pure function of state and batch.

A step whose loss or gradient is not finite changes nothing but counters: `optax.apply_if_finite` would apply the NaN
after enough of them, so the guard is our own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int32, PyTree

from clip_jax import optim
from clip_jax.config import Config
from clip_jax.models import Model
from clip_jax.sharding import BATCH, BATCH_AXIS, REPLICATED, batch_sharding, replicated
from clip_jax.typing import Batch, Leaf, Loss, Metrics, Params

TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes.

    step: int32, steps taken; the position in the data follows from it.
    params: float32, or bfloat16 where `optim.half_precision_params` finds them; replicated, as all is.
    opt_state: see `optim.make_optimizer`.
    batch_stats: running averages of batch norm; None for models without it.
    ema: moving average of the parameters, float32; None without `optim.ema_decay`.
    skipped, skipped_in_a_row: int32, steps that were not finite, since the beginning and just now.
    """

    step: Leaf
    params: Params
    opt_state: PyTree
    batch_stats: Params | None
    ema: Params | None
    skipped: Leaf
    skipped_in_a_row: Leaf

    @property
    def eval_params(self) -> Params:
        """The parameters that are evaluated and exported, float32."""
        return _with_stats(optim.widen(self.params) if self.ema is None else self.ema, self.batch_stats)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, ema: bool, half_precision_params: str = ""
) -> TrainState:
    """Return the state before the first step of `params`, batch statistics included where the model has them."""
    zero = jnp.zeros((), jnp.int32)
    trained = {name: value for name, value in params.items() if name != "batch_stats"}
    average = jax.tree.map(jnp.copy, trained) if ema else None  # a copy: the step donates both
    trained = optim.cast_params(trained, half_precision_params)
    stats = params.get("batch_stats")
    return TrainState(zero, trained, optimizer.init(trained), stats, average, zero + 0, zero + 0)


def make_train_step(
    model: Model,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: Mesh,
) -> TrainStep:
    """Return the compiled step: (state, batch) -> (state, metrics). The state is donated.

    Metrics are float32 scalars, equal on every device: loss, accuracy/image_to_text, accuracy/text_to_image,
    logit_scale, grad_norm, skipped, skipped_in_a_row.
    """
    sharded_loss = jax.shard_map(
        functools.partial(loss, axis=BATCH_AXIS),
        mesh=mesh,
        in_specs=(BATCH, BATCH, REPLICATED, REPLICATED),
        out_specs=REPLICATED,
    )

    def objective(
        params: Params, stats: Params | None, batch: Batch, key: jax.Array
    ) -> tuple[Float[Array, ""], tuple[Metrics, Params | None]]:
        params = optim.stop_frozen(params, config.optim.freeze)
        if image_locked(params, config.optim.freeze):  # as it is in inference
            images_BE = model.encode_image(_with_stats(params, stats), batch.image)
        else:
            images_BE, stats = model.encode_image_train(_with_stats(params, stats), batch.image, key)
        texts_BE = model.encode_text(params, batch.text)
        value, metrics = sharded_loss(images_BE, texts_BE, jnp.exp(params["logit_scale"]), params.get("logit_bias"))
        return value, (metrics, stats)

    choose = _run_if if mesh.devices.flat[0].platform == "cpu" else _select_if

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        gradient = jax.value_and_grad(objective, has_aux=True)
        (value, (metrics, stats)), grads = gradient(state.params, state.batch_stats, batch, key)
        grads = optim.widen(grads)
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
        skipped = state.skipped + ~finite
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        metrics |= {
            "loss": value,
            "logit_scale": jnp.exp(params["logit_scale"]),
            "grad_norm": grad_norm,
            "skipped": skipped.astype(jnp.float32),
            "skipped_in_a_row": in_a_row.astype(jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state, stats, ema, skipped, in_a_row), metrics

    return jax.jit(
        train_step,
        in_shardings=(replicated(mesh), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
        donate_argnums=0,
    )


def image_locked(params: Params, freeze: str) -> bool:
    """Tell whether no parameter of the image tower is trained."""
    return bool(freeze) and all(jax.tree.leaves(optim.frozen(params, freeze)["image"]))


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

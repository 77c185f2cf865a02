"""Logistic regression on frozen features: the sum of cross-entropies + l2/2 · ‖weight‖², the intercept unpenalised.

That is scikit-learn's `LogisticRegression(C=1/l2)`, and so is the method, L-BFGS; two things make it some ten times as
fast. The softmax's curvature is that of XᵀX weighted by p·(1 − p) (Böhning 1992, "Multinomial logistic regression
algorithm", bounds it by XᵀX / 2). In the eigenbasis of XᵀX, which is found once for all l2, this is about diagonal, so
L-BFGS begins each step with mean(p·(1 − p)) · eigenvalue + l2 in place of the identity, and takes tens of steps, not
hundreds. And logits are linear along a step, so its length costs no product with the features.

Where logits of all rows would be too many (ImageNet's are 5 GB, several times over), rows are walked in chunks, spread
over this process's devices, and nothing of n × Q is kept. The length of a step is then told by the gradient at its end,
which the next step needs anyway: the first trial will do most times, and costs no product more.

Deviation: it stops where a step promises less than `tolerance` nats per example. scikit-learn stops at a gradient of
1e-4, which the features' unit decides: with rows of length 1 and little l2 that is far from the optimum.
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
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Integer

from clip_jax.typing import Leaf

MEMORY = 10  # pairs that L-BFGS keeps, as SciPy's
MAX_STEPS = 1000  # the paper's
MAX_TRIALS = 20  # lengths tried for a step; one or two is usual
SLOPE = 0.1  # a length will do where the slope has fallen to this part of the first
HELD_LOGITS = 2**26  # n × Q up to which logits are kept: 256 MiB of float32, of which there are some six
CHUNK_LOGITS = 2**24  # of a device's rows of a chunk, otherwise
# Directions whose spread is below 1e-6 of the whole are what float32 leaves of zero: they hold no information.
NOTHING = 1e-12

_dot = functools.partial(jnp.einsum, precision="highest")  # float32 on TPUs and GPUs too


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """Features and targets, laid out for `minimize`. D counts the intercept, the weight of a last feature that is 1.

    x_CnD: features less their mean, in the eigenbasis of their covariance, and 1, in C chunks of n rows; 0 for padding.
    targets: where of each row one class is right (softmax) its id, int32[C n], else of each class whether it is (one
        sigmoid each), bool[C n Q].
    eigenvalue_D: of XᵀX; penalised_D: 1, for the intercept 0.
    mean_d, basis_dd: how the features got there; d doesn't count the intercept.
    rows: without padding.
    """

    x_CnD: Leaf
    targets: Leaf
    eigenvalue_D: Leaf
    penalised_D: Leaf
    mean_d: Leaf
    basis_dd: Leaf
    rows: int = dataclasses.field(metadata={"static": True})

    @property
    def exclusive(self) -> bool:
        """Whether of each row one class is right."""
        return self.targets.ndim == 2


def prepare(
    features_nd: Float[np.ndarray, "n d"], targets: Integer[np.ndarray, "n"] | Bool[np.ndarray, "n Q"], classes: int
) -> Problem:
    """Return the problem on the devices, which hold the features once, and besides them one chunk at a time."""
    rows, width = features_nd.shape
    by_chunk = by_row = None
    chunks, chunk_rows = 1, rows
    if rows * classes > HELD_LOGITS:
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices), "devices")
        by_chunk, by_row = (NamedSharding(mesh, PartitionSpec(*axes, "devices")) for axes in ([None], []))
        chunks = math.ceil(rows / (len(devices) * max(1, CHUNK_LOGITS // classes)))
        chunk_rows = math.ceil(rows / chunks / len(devices)) * len(devices)
    mean_d = features_nd.mean(0, dtype=np.float64)

    def centred(chunk: int) -> Array:
        part_md = features_nd[chunk * chunk_rows : (chunk + 1) * chunk_rows]
        centred_nd = np.zeros((chunk_rows, width), np.float32)
        centred_nd[: len(part_md)] = part_md - mean_d
        return jax.device_put(centred_nd, by_row)

    covariance_dd = sum(_covariance(centred(chunk)) for chunk in range(chunks))
    basis_dd = jnp.linalg.eigh(covariance_dd)[1]
    x_CnD = jnp.zeros((chunks, chunk_rows, width + 1), device=by_chunk)
    for chunk in range(chunks):
        x_CnD = _rotate(x_CnD, centred(chunk), basis_dd, chunk, min(chunk_rows, max(0, rows - chunk * chunk_rows)))
    x_CnD, eigenvalue_D, something_D = _cleaned(x_CnD)
    padding = [(0, chunks * chunk_rows - rows)] + [(0, 0)] * (targets.ndim - 1)
    padded = np.pad(targets if targets.dtype == bool else targets.astype(np.int32), padding)
    return Problem(
        x_CnD=x_CnD,
        targets=jax.device_put(padded.reshape(chunks, chunk_rows, *targets.shape[1:]), by_chunk),
        eigenvalue_D=eigenvalue_D,
        penalised_D=jnp.append(jnp.ones(width), 0),
        mean_d=mean_d.astype(np.float32),
        basis_dd=jnp.where(something_D[None, :-1], basis_dd, 0),
        rows=rows,
    )


@jax.jit
def _covariance(centred_nd: Array) -> Array:
    return _dot("nd,nc->dc", centred_nd, centred_nd)


@functools.partial(jax.jit, donate_argnums=0)
def _rotate(x_CnD: Array, centred_nd: Array, basis_dd: Array, chunk: Array, rows: Array) -> Array:
    x_nd, given_n1 = _dot("nc,cd->nd", centred_nd, basis_dd), (jnp.arange(len(centred_nd)) < rows)[:, None]
    return x_CnD.at[chunk].set(jnp.concatenate([x_nd, given_n1.astype(jnp.float32)], 1))


@functools.partial(jax.jit, donate_argnums=0)
def _cleaned(x_CnD: Array) -> tuple[Array, Array, Array]:
    """Return the features without directions that hold nothing, the eigenvalues, and which directions are left."""
    square_D = jnp.sum(jnp.sum(x_CnD**2, 1), 0)  # to more digits than eigh gives small ones
    something_D = jnp.append(square_D[:-1] > NOTHING * jnp.sum(square_D[:-1]), True)
    return jnp.where(something_D[None, None], x_CnD, 0), jnp.where(something_D, square_D, 0), something_D


@jax.jit
def to_problem(problem: Problem, weight_dQ: Array, bias_Q: Array) -> Float[Array, "Q D"]:
    """Return weights and intercepts of the features as the coordinates that `minimize` works in."""
    rotated_Qd = _dot("dQ,dc->Qc", weight_dQ, problem.basis_dd)
    moved_Q = bias_Q + _dot("d,dQ->Q", problem.mean_d, weight_dQ)
    return jnp.concatenate([rotated_Qd, moved_Q[:, None]], 1)


@jax.jit
def from_problem(problem: Problem, w_QD: Array) -> tuple[Float[Array, "d Q"], Float[Array, "Q"]]:
    """Return the weights and intercepts of the features themselves."""
    weight_dQ = _dot("dc,Qc->dQ", problem.basis_dd, w_QD[:, :-1])
    return weight_dQ, w_QD[:, -1] - _dot("d,dQ->Q", problem.mean_d, weight_dQ)


class _State(NamedTuple):
    w_QD: Array
    logits_Qn: Array | None  # None where they are not kept
    gradient_QD: Array
    inverse_QD: Array  # of the curvature, as a diagonal
    moves_mQD: Array  # the last MEMORY differences of w, of gradients, and the reciprocals of their products
    turns_mQD: Array
    rho_m: Array
    scale: Array
    steps: Array
    done: Array


class Solution(NamedTuple):
    """Where `minimize` ended: coordinates, the objective in nats, steps taken."""

    w_QD: Array
    objective: Array
    steps: Array


@jax.jit
def minimize(problem: Problem, l2: Array, start_QD: Array, tolerance: Array) -> Solution:
    """Return the optimum to within about `tolerance` nats per example; one compilation serves all l2."""
    penalty_1D = (l2 * problem.penalised_D)[None]
    empty_mQD = jnp.zeros((MEMORY, *start_QD.shape))
    held = len(problem.x_CnD) == 1
    x_nD, targets = problem.x_CnD[0], problem.targets[0]  # of use where that is all

    def look(w_QD, logits_Qn):
        """Return the gradient and the inverse of the curvature."""
        error_QD, spread_Q = (
            _look(x_nD, targets, logits_Qn) if held else _over_chunks(_look, problem, w_QD, (w_QD, w_QD[:, 0]))
        )
        spread_Q1 = jnp.maximum(spread_Q / problem.rows, 1e-12)[:, None]
        curvature_QD = spread_Q1 * problem.eigenvalue_D[None] + penalty_1D
        return error_QD + penalty_1D * w_QD, jnp.where(curvature_QD > 0, 1 / curvature_QD, 0)

    def step(state: _State) -> _State:
        move_QD = _direction(problem, state)
        first = jnp.vdot(move_QD, state.gradient_QD)
        if held:
            ahead_Qn = _dot("QD,nD->Qn", move_QD, x_nD)

            def slope(length):
                wrong_Qn = _wrong(targets, _probabilities(targets, state.logits_Qn + length * ahead_Qn))
                return jnp.vdot(wrong_Qn, ahead_Qn) + jnp.vdot(
                    penalty_1D * (state.w_QD + length * move_QD), move_QD
                ), ()

            length, found, _ = _length(slope, first)
            w_QD, logits_Qn = state.w_QD + length * move_QD, state.logits_Qn + length * ahead_Qn
            gradient_QD, inverse_QD = look(w_QD, logits_Qn)
        else:

            def slope(length):
                seen = look(state.w_QD + length * move_QD, None)
                return jnp.vdot(seen[0], move_QD), seen

            # Of another length than this one where none was found, and then it ends here.
            length, found, (gradient_QD, inverse_QD) = _length(slope, first)
            w_QD, logits_Qn = state.w_QD + length * move_QD, None
        move_QD, turn_QD = length * move_QD, gradient_QD - state.gradient_QD
        product = jnp.vdot(move_QD, turn_QD)
        expected = jnp.vdot(turn_QD, _centre(problem, inverse_QD * turn_QD))
        place = state.steps % MEMORY
        return _State(
            w_QD,
            logits_Qn,
            gradient_QD,
            inverse_QD,
            state.moves_mQD.at[place].set(move_QD),
            state.turns_mQD.at[place].set(turn_QD),
            state.rho_m.at[place].set(jnp.where(product > 0, 1 / product, 0)),
            jnp.where((product > 0) & (expected > 0), product / expected, 1),
            state.steps + 1,
            # What is left is about half of `first` before this step, and less behind it.
            done=(-first <= tolerance * problem.rows) | ~found | ~(product > 0),
        )

    w_QD = _centre(problem, start_QD)
    logits_Qn = _dot("QD,nD->Qn", w_QD, x_nD) if held else None
    state = _State(
        w_QD,
        logits_Qn,
        *look(w_QD, logits_Qn),
        empty_mQD,
        empty_mQD,
        jnp.zeros(MEMORY),
        jnp.float32(1),
        jnp.int32(0),
        jnp.bool_(False),
    )
    state = lax.while_loop(lambda state: ~state.done & (state.steps < MAX_STEPS), step, state)
    nats = _nats(x_nD, targets, state.logits_Qn) if held else _over_chunks(_nats, problem, state.w_QD, jnp.float32(0))
    nats += l2 / 2 * jnp.sum(problem.penalised_D[None] * state.w_QD**2)
    return Solution(state.w_QD, nats, state.steps)


def _over_chunks(of_chunk: Callable, problem: Problem, w_QD: Array, like: Any) -> Any:
    """Return the sum over chunks of what a function of features, targets and logits returns, shaped as `like`."""

    def add(total, chunk):
        x_nD, targets = chunk
        return jax.tree.map(jnp.add, total, of_chunk(x_nD, targets, _dot("QD,nD->Qn", w_QD, x_nD))), None

    return lax.scan(add, jax.tree.map(jnp.zeros_like, like), (problem.x_CnD, problem.targets))[0]


def _look(x_nD: Array, targets: Array, logits_Qn: Array) -> tuple[Array, Array]:
    """Return the gradient of the cross-entropies and the sum of p·(1 − p) of every class."""
    p_Qn = _probabilities(targets, logits_Qn)
    return _dot("Qn,nD->QD", _wrong(targets, p_Qn), x_nD), jnp.sum(p_Qn * (1 - p_Qn) * x_nD[None, :, -1], 1)


def _nats(x_nD: Array, targets: Array, logits_Qn: Array) -> Array:
    losses_Qn = -_right(targets, logits_Qn) * logits_Qn
    if targets.ndim == 1:
        losses_1n = jax.nn.logsumexp(logits_Qn, axis=0, keepdims=True) + jnp.sum(losses_Qn, 0, keepdims=True)
        return jnp.sum(losses_1n * x_nD[None, :, -1])
    return jnp.sum((jax.nn.softplus(logits_Qn) + losses_Qn) * x_nD[None, :, -1])


def _right(targets: Array, logits_Qn: Array) -> Array:
    """Return 1 where a class is right, else 0: as many as the logits, but never stored."""
    if targets.ndim == 2:
        return targets.T.astype(jnp.float32)
    return (targets[None] == jnp.arange(len(logits_Qn))[:, None]).astype(jnp.float32)


def _probabilities(targets: Array, logits_Qn: Array) -> Array:
    return jax.nn.softmax(logits_Qn, axis=0) if targets.ndim == 1 else jax.nn.sigmoid(logits_Qn)


def _wrong(targets: Array, p_Qn: Array) -> Array:
    """Return p − targets; of a right class as minus the others' sum, since 1 − 1e-9 is 1 in float32."""
    right_Qn = _right(targets, p_Qn)
    if targets.ndim == 2:
        return p_Qn - right_Qn
    return jnp.where(right_Qn > 0, -jnp.sum(p_Qn * (1 - right_Qn), 0, keepdims=True), p_Qn)


def _centre(problem: Problem, w_QD: Array) -> Array:
    """Keep a step among weights whose sum over classes is 0: the softmax doesn't see the sum."""
    return w_QD - jnp.mean(w_QD, 0, keepdims=True) if problem.exclusive else w_QD


def _direction(problem: Problem, state: _State) -> Array:
    """L-BFGS's two loops (Nocedal and Wright 2006, algorithm 7.4) about the diagonal of this step."""
    newest_first_m = (state.steps - 1 - jnp.arange(MEMORY)) % MEMORY

    def back(q_QD, i):
        alpha = state.rho_m[i] * jnp.vdot(state.moves_mQD[i], q_QD)
        return q_QD - alpha * state.turns_mQD[i], alpha

    def forth(q_QD, i_and_alpha):
        i, alpha = i_and_alpha
        return q_QD + (alpha - state.rho_m[i] * jnp.vdot(state.turns_mQD[i], q_QD)) * state.moves_mQD[i], None

    q_QD, alpha_m = lax.scan(back, state.gradient_QD, newest_first_m)
    q_QD = state.scale * _centre(problem, state.inverse_QD * _centre(problem, q_QD))
    return -lax.scan(forth, q_QD, (newest_first_m, alpha_m), reverse=True)[0]


def _length(slope: Callable, first: Array) -> tuple[Array, Array, Any]:
    """Return a length at which the slope is at most SLOPE of the first, whether there is one, and what was seen last.

    slope: a length to the slope there and what else was seen.

    The objective is convex, so its slope tells on which side the best length lies, and is exact where differences of
    objectives drown in float32's rounding. Without such a length: the greatest that is surely downhill.
    """

    def good(trial):
        return jnp.abs(trial) <= SLOPE * jnp.abs(first)

    def narrow(search):
        low, low_slope, high, high_slope, length, (here, _), trials = search
        short = here < 0
        low, low_slope = jnp.where(short, length, low), jnp.where(short, here, low_slope)
        high, high_slope = jnp.where(short, high, length), jnp.where(short, high_slope, here)
        width = high - low
        secant = low - low_slope * width / (high_slope - low_slope)
        between = jnp.clip(secant, low + 0.1 * width, high - 0.1 * width)
        length = jnp.where(jnp.isinf(high), 4 * low, between)
        return low, low_slope, high, high_slope, length, slope(length), trials + 1

    zero, one, infinity = jnp.float32(0), jnp.float32(1), jnp.float32(jnp.inf)
    begin = (zero, first, infinity, infinity, one, slope(one), jnp.int32(1))
    more = lambda search: ~good(search[5][0]) & (search[6] < MAX_TRIALS)  # noqa: E731
    low, _, _, _, length, (here, seen), _ = lax.while_loop(more, narrow, begin)
    found = good(here) & (first < 0)
    return jnp.where(found, length, low), found, seen

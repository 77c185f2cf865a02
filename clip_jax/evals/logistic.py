"""Logistic regression on frozen features: the sum of cross-entropies + l2/2 · ‖weight‖², the intercept unpenalised.

That is scikit-learn's `LogisticRegression(C=1/l2)`, and so is the method, L-BFGS; two things make it some ten times as
fast. The softmax's curvature is that of XᵀX weighted by p·(1 − p) (Böhning 1992, "Multinomial logistic regression
algorithm", bounds it by XᵀX / 2). In the eigenbasis of XᵀX, which is found once for all l2, this is about diagonal, so
L-BFGS begins each step with mean(p·(1 − p)) · eigenvalue + l2 in place of the identity, and takes tens of steps, not
hundreds. And logits are linear along a step, so its length costs no product with the features.

Deviation: it stops where a step promises less than `tolerance` nats per example. scikit-learn stops at a gradient of
1e-4, which the features' unit decides: with rows of length 1 and little l2 that is far from the optimum.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from clip_jax.typing import Leaf

MEMORY = 10  # pairs that L-BFGS keeps, as SciPy's
MAX_STEPS = 1000  # the paper's
MAX_TRIALS = 20  # lengths tried for a step; one or two is usual
SLOPE = 0.1  # a length will do where the slope has fallen to this part of the first
# Directions whose spread is below 1e-6 of the whole are what float32 leaves of zero: they hold no information.
NOTHING = 1e-12

_dot = functools.partial(jnp.einsum, precision="highest")  # float32 on TPUs and GPUs too


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """Features and targets, laid out for `minimize`. D counts the intercept, the weight of a last feature that is 1.

    x_nD: features less their mean, in the eigenbasis of their covariance, and 1.
    targets_Qn: 1 where a class is right, else 0.
    eigenvalue_D: of XᵀX; penalised_D: 1, for the intercept 0.
    mean_d, basis_dd: how the features got there; d doesn't count the intercept.
    exclusive: whether of each row one class is right (softmax), not any number (sigmoid).
    """

    x_nD: Leaf
    targets_Qn: Leaf
    eigenvalue_D: Leaf
    penalised_D: Leaf
    mean_d: Leaf
    basis_dd: Leaf
    exclusive: bool = dataclasses.field(metadata={"static": True})


def prepare(features_nd: Float[np.ndarray, "n d"], targets_nQ: Bool[np.ndarray, "n Q"], *, exclusive: bool) -> Problem:
    """Return the problem on the device; its memory is that of the features and of some six arrays of n × Q float32."""
    mean_d = features_nd.mean(0, dtype=np.float64)
    centred_nd = (features_nd - mean_d).astype(np.float32)
    return _rotate(centred_nd, targets_nQ, mean_d.astype(np.float32), exclusive)


@functools.partial(jax.jit, static_argnames="exclusive")
def _rotate(centred_nd: Array, targets_nQ: Array, mean_d: Array, exclusive: bool) -> Problem:
    basis_dd = jnp.linalg.eigh(_dot("nd,nc->dc", centred_nd, centred_nd))[1]
    x_nd = _dot("nc,cd->nd", centred_nd, basis_dd)
    eigenvalue_d = jnp.sum(x_nd**2, 0)  # to more digits than eigh gives small ones
    something_d = eigenvalue_d > NOTHING * jnp.sum(eigenvalue_d)
    x_nd, basis_dd = (jnp.where(something_d[None], array, 0) for array in (x_nd, basis_dd))
    rows = len(x_nd)
    return Problem(
        x_nD=jnp.concatenate([x_nd, jnp.ones((rows, 1))], 1),
        targets_Qn=targets_nQ.T.astype(jnp.float32),
        eigenvalue_D=jnp.append(jnp.where(something_d, eigenvalue_d, 0), rows),
        penalised_D=jnp.append(jnp.ones_like(mean_d), 0),
        mean_d=mean_d,
        basis_dd=basis_dd,
        exclusive=exclusive,
    )


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
    logits_Qn: Array
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
    x_nD, penalty_1D = problem.x_nD, (l2 * problem.penalised_D)[None]
    empty_mQD = jnp.zeros((MEMORY, *start_QD.shape))

    def look(w_QD, logits_Qn):
        p_Qn = _probabilities(problem, logits_Qn)
        gradient_QD = _dot("Qn,nD->QD", _wrong(problem, p_Qn), x_nD) + penalty_1D * w_QD
        spread_Q1 = jnp.maximum(jnp.mean(p_Qn * (1 - p_Qn), 1, keepdims=True), 1e-12)
        curvature_QD = spread_Q1 * problem.eigenvalue_D[None] + penalty_1D
        return gradient_QD, jnp.where(curvature_QD > 0, 1 / curvature_QD, 0)

    def step(state: _State) -> _State:
        move_QD = _direction(problem, state)
        ahead_Qn = _dot("QD,nD->Qn", move_QD, x_nD)
        first = jnp.vdot(move_QD, state.gradient_QD)

        def slope(length):
            wrong_Qn = _wrong(problem, _probabilities(problem, state.logits_Qn + length * ahead_Qn))
            return jnp.vdot(wrong_Qn, ahead_Qn) + jnp.vdot(penalty_1D * (state.w_QD + length * move_QD), move_QD)

        length, found = _length(slope, first)
        w_QD, logits_Qn = state.w_QD + length * move_QD, state.logits_Qn + length * ahead_Qn
        gradient_QD, inverse_QD = look(w_QD, logits_Qn)
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
            done=(-first <= tolerance * len(x_nD)) | ~found | ~(product > 0),
        )

    w_QD = _centre(problem, start_QD)
    logits_Qn = _dot("QD,nD->Qn", w_QD, x_nD)
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
    return Solution(state.w_QD, _objective(problem, l2, state), state.steps)


def _probabilities(problem: Problem, logits_Qn: Array) -> Array:
    return jax.nn.softmax(logits_Qn, axis=0) if problem.exclusive else jax.nn.sigmoid(logits_Qn)


def _wrong(problem: Problem, p_Qn: Array) -> Array:
    """Return p − targets; of a right class as minus the others' sum, since 1 − 1e-9 is 1 in float32."""
    targets_Qn = problem.targets_Qn
    if not problem.exclusive:
        return p_Qn - targets_Qn
    return jnp.where(targets_Qn > 0, -jnp.sum(p_Qn * (1 - targets_Qn), 0, keepdims=True), p_Qn)


def _centre(problem: Problem, w_QD: Array) -> Array:
    """Keep a step among weights whose sum over classes is 0: the softmax doesn't see the sum."""
    return w_QD - jnp.mean(w_QD, 0, keepdims=True) if problem.exclusive else w_QD


def _objective(problem: Problem, l2: Array, state: _State) -> Array:
    logits_Qn = state.logits_Qn
    normaliser = jax.nn.logsumexp(logits_Qn, axis=0) if problem.exclusive else jax.nn.softplus(logits_Qn)
    right = jnp.vdot(logits_Qn, problem.targets_Qn)
    return jnp.sum(normaliser) - right + l2 / 2 * jnp.sum(problem.penalised_D[None] * state.w_QD**2)


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


def _length(slope, first: Array) -> tuple[Array, Array]:
    """Return a length at which the slope is at most SLOPE of the first, and whether there is one.

    The objective is convex, so its slope tells on which side the best length lies, and is exact where differences of
    objectives drown in float32's rounding. Without such a length: the greatest that is surely downhill.
    """

    def good(trial):
        return jnp.abs(trial) <= SLOPE * jnp.abs(first)

    def narrow(search):
        low, low_slope, high, high_slope, length, here, trials = search
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
    more = lambda search: ~good(search[5]) & (search[6] < MAX_TRIALS)  # noqa: E731
    low, _, _, _, length, here, _ = lax.while_loop(more, narrow, begin)
    found = good(here) & (first < 0)
    return jnp.where(found, length, low), found

"""Linear and few-shot probes against recorded values of scikit-learn 1.9.1, and against optimality conditions.

The values are `coef_`, `intercept_`, `predict_proba` and `score` of `LogisticRegression(C=1/l2, tol=1e-10,
max_iter=100_000)` fitted to `split(1, 300)`, with `OneVsRestClassifier` for sigmoids; and of the search by its scores
on `split(2, 200)`, refitted to both, on `split(3, 500)`.
"""

import gc

import jax
import numpy as np
import pytest
import scipy.optimize

from clip_jax.evals import logistic
from clip_jax.evals.few_shot import draw, few_shot_curve
from clip_jax.evals.linear_probe import LOWEST, Examples, LinearProbe, fit, search
from clip_jax.evals.metrics import accuracy, map_11_points

CLASSES, WIDTH = 4, 6
# Nats per example: the limit of float32 gradients.
TIGHT = 1e-9
# Weights are of order 1; at TIGHT their squared error times the Hessian, about 0.1, is 1e-9.
WEIGHT = 5e-4


def split(seed, rows):
    centers = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    rng = np.random.default_rng(seed)
    class_ids = rng.integers(CLASSES, size=rows)
    return Examples(centers[class_ids] + 1.5 * rng.normal(size=(rows, WIDTH)), class_ids)


TRAIN, VALIDATION = split(1, 300), split(2, 200)


def softmax(scores):
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def objective(probe, examples, l2):
    """Return the softmax objective in float64."""
    weight, bias = probe.weight_DQ.astype(np.float64), probe.bias_Q.astype(np.float64)
    p = softmax(examples.features_nD @ weight + bias[None])
    return -np.log(p[np.arange(len(p)), examples.targets]).sum() + l2 / 2 * (weight**2).sum()


GOLDEN = {  # l2: objective, weights of class 0, intercepts, probabilities of the first of `split(2, 200)`, its accuracy
    1e-2: (
        253.62432830078546,
        [0.153341, -0.280904, 0.47157, 0.131748, -0.036768, 0.07777],
        [0.514241, -0.161196, -0.654511, 0.301466],
        [0.136253, 0.098516, 0.346307, 0.418924],
        0.68,
    ),
    1.0: (
        254.73654488890784,
        [0.150026, -0.278719, 0.464435, 0.128697, -0.03616, 0.076886],
        [0.502493, -0.160558, -0.637479, 0.295545],
        [0.137115, 0.099774, 0.344571, 0.41854],
        0.68,
    ),
    100.0: (
        309.0093820171681,
        [0.066903, -0.160666, 0.237421, 0.048847, -0.016473, 0.04847],
        [0.162073, -0.052931, -0.296922, 0.187781],
        [0.17218, 0.15784, 0.288024, 0.381957],
        0.67,
    ),
}


@pytest.mark.parametrize("l2", GOLDEN)
def test_against_scikit_learn(l2):
    value, weight_D, bias_Q, probabilities, score = GOLDEN[l2]
    probe = fit(*TRAIN, CLASSES, l2, tolerance=TIGHT)
    assert objective(probe, TRAIN, l2) <= value * (1 + 1e-6)
    np.testing.assert_allclose(probe.weight_DQ[:, 0], weight_D, atol=WEIGHT)
    np.testing.assert_allclose(probe.bias_Q, bias_Q, atol=WEIGHT)
    scores = probe.scores(VALIDATION.features_nD)
    np.testing.assert_allclose(softmax(scores)[0], probabilities, atol=WEIGHT)
    assert probe.evaluate(accuracy, VALIDATION) == pytest.approx(score)


def test_the_default_tolerance_is_reached():
    l2 = 1.0
    assert objective(fit(*TRAIN, CLASSES, l2), TRAIN, l2) < GOLDEN[l2][0] + 1e-5 * len(TRAIN.targets)


@pytest.mark.parametrize("seed", range(6))
def test_the_default_tolerance_is_reached_with_correlated_features(seed):
    """Unit vectors of decaying variances and a small l2, where a single small step left up to 2.1e-5 nats."""
    rng, l2 = np.random.default_rng(seed), 1e-4
    targets = rng.integers(0, 8, 300)
    x = (rng.normal(size=(8, 40))[targets] + rng.normal(size=(300, 40))) / np.sqrt(np.arange(1, 41))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32).astype(np.float64)
    probe = fit(x, targets, 8, l2)

    def value_and_gradient(w):
        weight, bias = w.reshape(41, 8)[:-1], w.reshape(41, 8)[-1:]
        probabilities, one_hot = softmax(x @ weight + bias), np.eye(8)[targets]
        error = probabilities - one_hot
        gradient = np.concatenate([x.T @ error + l2 * weight, error.sum(0, keepdims=True)])
        return -np.log(probabilities[one_hot > 0]).sum() + l2 / 2 * np.sum(weight**2), gradient.ravel()

    found = np.concatenate([probe.weight_DQ, probe.bias_Q[None]]).astype(np.float64).ravel()
    options = {"maxiter": 3000, "ftol": 1e-14, "gtol": 1e-8, "maxcor": 30}
    best = scipy.optimize.minimize(value_and_gradient, found, jac=True, method="L-BFGS-B", options=options)
    assert value_and_gradient(found)[0] <= best.fun + 1e-5 * len(x)


def test_two_classes_against_scikit_learn_which_penalizes_their_difference():
    probe = fit(TRAIN.features_nD, TRAIN.targets % 2, 2, 0.5, tolerance=TIGHT)
    difference = probe.weight_DQ[:, 1] - probe.weight_DQ[:, 0]
    np.testing.assert_allclose(difference, [0.44922, 0.565589, -0.076999, 0.054186, -0.007185, 0.092196], atol=WEIGHT)
    assert probe.bias_Q[1] - probe.bias_Q[0] == pytest.approx(0.058255, abs=WEIGHT)


def multilabel_targets():
    x, class_ids = TRAIN
    return np.stack([x[:, 0] + x[:, 1] > 0.5, class_ids == 2, x[:, 2] > 1], 1)


def test_multilabel_targets_against_scikit_learn_one_versus_rest():
    probe = fit(TRAIN.features_nD, multilabel_targets(), 3, 2.0, tolerance=TIGHT)
    weight_QD = [
        [2.729189, 2.493141, -0.118898, 0.141771, 0.169932, -0.000331],
        [-0.872299, -0.34471, -0.632591, -0.229472, 0.090013, -0.261627],
        [0.123282, -0.051595, 3.424063, 0.070873, -0.078216, -0.060961],
    ]
    np.testing.assert_allclose(probe.weight_DQ.T, weight_QD, atol=WEIGHT * 4)
    np.testing.assert_allclose(probe.bias_Q, [-1.320628, -2.307797, -3.588086], atol=WEIGHT * 4)


def test_search_against_scikit_learn_with_the_same_values_of_l2():
    found = search(TRAIN, VALIDATION, CLASSES)
    expected = {-48: 0.68, -32: 0.68, -16: 0.68, -8: 0.68, 0: 0.68, 4: 0.685, 8: 0.68, 10: 0.68, 12: 0.685, 13: 0.69}
    expected |= {14: 0.685, 15: 0.675, 16: 0.67, 32: 0.27, 48: 0.245}
    assert found.curve == pytest.approx({10 ** (step / 8): value for step, value in expected.items()})
    assert found.l2 == pytest.approx(42.169650342858226)
    assert found.probe.evaluate(accuracy, split(3, 500)) == pytest.approx(0.628)


def test_search_without_refit_gives_the_probe_of_the_training_split():
    found = search(TRAIN, VALIDATION, CLASSES, refit=False)
    # Both are within the tolerance, 1e-5, of the optimum.
    assert objective(found.probe, TRAIN, found.l2) == pytest.approx(
        objective(fit(*TRAIN, CLASSES, found.l2), TRAIN, found.l2), abs=2e-5 * len(TRAIN.targets)
    )


@pytest.mark.parametrize("l2", [1e-6, 1.0, 1e3])
def test_the_gradient_is_zero_at_the_optimum(l2):
    x, class_ids = TRAIN
    probe = fit(x, class_ids, CLASSES, l2, tolerance=TIGHT)
    weight, bias = probe.weight_DQ.astype(np.float64), probe.bias_Q.astype(np.float64)
    errors = softmax(x @ weight + bias[None]) - np.eye(CLASSES)[class_ids]
    # Per example, as scikit-learn's tolerance of 1e-4.
    np.testing.assert_allclose((x.T @ errors + l2 * weight) / len(x), 0, atol=3e-5)
    np.testing.assert_allclose(errors.mean(0), 0, atol=3e-5)


def test_another_start_gives_the_same_optimum():
    cold = fit(*TRAIN, CLASSES, 0.1, tolerance=TIGHT)
    for start in (fit(*TRAIN, CLASSES, 100.0), LinearProbe(np.ones_like(cold.weight_DQ) * 3, np.arange(4.0))):
        warm = fit(*TRAIN, CLASSES, 0.1, start, tolerance=TIGHT)
        np.testing.assert_allclose(warm.weight_DQ, cold.weight_DQ, atol=WEIGHT)
        np.testing.assert_allclose(warm.bias_Q, cold.bias_Q, atol=WEIGHT)


def test_the_order_of_examples_does_not_matter():
    order = np.random.default_rng(0).permutation(300)
    one, other = (fit(*examples, CLASSES, 1.0, tolerance=TIGHT) for examples in (TRAIN, [x[order] for x in TRAIN]))
    np.testing.assert_allclose(one.weight_DQ, other.weight_DQ, atol=WEIGHT)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_the_scale_of_the_features_does_not_matter(unit):
    probe = fit(TRAIN.features_nD * unit, TRAIN.targets, CLASSES, 1.0 * unit**2, tolerance=TIGHT)
    np.testing.assert_allclose(probe.weight_DQ[:, 0] * unit, GOLDEN[1.0][1], atol=WEIGHT)


def test_duplicated_examples_with_twice_the_penalty_are_the_same_problem():
    twice = fit(np.repeat(TRAIN.features_nD, 2, 0), np.repeat(TRAIN.targets, 2), CLASSES, 2.0, tolerance=TIGHT)
    np.testing.assert_allclose(twice.weight_DQ[:, 0], GOLDEN[1.0][1], atol=WEIGHT)


def test_constant_features_get_no_weight():
    x = np.concatenate([TRAIN.features_nD, np.full((300, 2), 7.0)], 1)
    probe = fit(x, TRAIN.targets, CLASSES, 1.0, tolerance=TIGHT)
    np.testing.assert_allclose(probe.weight_DQ[:6, 0], GOLDEN[1.0][1], atol=WEIGHT)
    np.testing.assert_allclose(probe.weight_DQ[6:], 0, atol=1e-6)


def test_probabilities_of_constant_features_are_the_class_frequencies():
    probe = fit(np.ones((300, WIDTH)), TRAIN.targets, CLASSES, 1.0, tolerance=TIGHT)
    frequencies = np.bincount(TRAIN.targets) / 300
    np.testing.assert_allclose(softmax(probe.scores(np.ones((1, WIDTH))))[0], frequencies, atol=1e-4)


def test_a_class_without_examples_is_never_predicted():
    probe = fit(TRAIN.features_nD, TRAIN.targets * 2, 8, 1.0, tolerance=TIGHT)
    np.testing.assert_allclose(probe.weight_DQ[:, 0], GOLDEN[1.0][1], atol=WEIGHT)
    assert (probe.scores(VALIDATION.features_nD)[:, 1::2] == LOWEST).all()


def test_a_single_class_is_always_predicted():
    scores = fit(TRAIN.features_nD, np.full(300, 2), CLASSES, 1.0).scores(VALIDATION.features_nD)
    assert (scores.argmax(1) == 2).all()
    assert np.isfinite(scores[:, 2]).all()


def test_directions_without_variance_get_no_weight():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 50))
    probe = fit(x, np.arange(20) % 4, CLASSES, 1e-6)
    assert probe.evaluate(accuracy, Examples(x, np.arange(20) % 4)) == 1
    span = np.linalg.svd(x - x.mean(0), full_matrices=False)[2]
    outside = probe.weight_DQ - span.T @ (span @ probe.weight_DQ)
    assert np.abs(outside).max() < 1e-4 * np.abs(probe.weight_DQ).max()


def test_separable_classes_converge_with_the_smallest_penalty():
    x = np.eye(CLASSES, WIDTH).repeat(75, 0) * 10
    probe = fit(x, np.arange(CLASSES).repeat(75), CLASSES, 1e-6)
    assert np.isfinite(probe.weight_DQ).all()
    assert softmax(probe.scores(x)).max(1).min() > 0.999


@pytest.mark.parametrize(("l2", "value"), [(1e-4, 0.038321107470390546), (1e-2, 0.985002176167017)])
def test_separable_classes_against_scikit_learn(l2, value):
    """The objective of 300 rows is 0.04 to 1 nats, so that p − 1 would be float32's rounding."""
    examples = Examples(TRAIN.features_nD + 5 * np.eye(CLASSES, WIDTH)[TRAIN.targets], TRAIN.targets)
    probe = fit(*examples, CLASSES, l2, tolerance=1e-12)
    assert objective(probe, examples, l2) == pytest.approx(value, rel=1e-5)


def test_half_precision_features_are_supported():
    probe = fit(TRAIN.features_nD.astype(np.float16), TRAIN.targets, CLASSES, 1.0)
    np.testing.assert_allclose(probe.weight_DQ[:, 0], GOLDEN[1.0][1], atol=5e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l2": 0.0}, "l2: expected a positive number.*got 0.0"),
        ({"targets": TRAIN.targets + 1}, r"targets\[\d+\]: expected a class id from 0 to 3, got 4"),
        ({"targets": TRAIN.targets[1:]}, "got 300 rows and 299 targets"),
        ({"targets": multilabel_targets()}, r"expected shape \(300, 4\), got \(300, 3\)"),
        ({"features_nD": TRAIN.features_nD[:0], "targets": TRAIN.targets[:0]}, "at least 1"),
        ({"start": LinearProbe(np.zeros((5, 4)), np.zeros(4))}, r"expected weights of shape \(6, 4\), got \(5, 4\)"),
    ],
)
def test_invalid_arguments_are_refused(change, message):
    arguments = {"features_nD": TRAIN.features_nD, "targets": TRAIN.targets, "classes": CLASSES, "l2": 1.0}
    with pytest.raises(ValueError, match=message):
        fit(**arguments | change)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(value):
    x = TRAIN.features_nD.copy()
    x[[17, 40], 3] = value
    message = rf"features\[17, 3\]: expected finite numbers, got {value} \(2 such rows\)"
    with pytest.raises(ValueError, match=message):
        fit(x, TRAIN.targets, CLASSES, 1.0)
    with pytest.raises(ValueError, match=message):
        fit(*TRAIN, CLASSES, 1.0).scores(x)


def test_search_by_another_metric_with_multilabel_targets():
    both = [Examples(x, np.stack([x[:, 0] > 0.5, x[:, 2] > 1], 1)) for x, _ in (TRAIN, VALIDATION)]
    found = search(*both, 2, map_11_points, refit=False)
    assert found.curve[found.l2] == max(found.curve.values()) > 0.9
    assert found.probe.evaluate(map_11_points, both[1]) == pytest.approx(found.curve[found.l2], abs=1e-3)


# ------------------------------------------------------------------------------------------------- rows in chunks


@pytest.fixture(params=[(1, 4), (1, 37), (8, 4), (3, 11)], ids=lambda given: "{} devices, {} rows each".format(*given))
def chunked(request, monkeypatch):
    """Process rows in chunks, as for ImageNet; most of these have padding rows in the last chunk."""
    devices, rows = request.param
    some = jax.local_devices()[:devices]
    monkeypatch.setattr(logistic, "HELD_LOGITS", 0)
    monkeypatch.setattr(logistic, "CHUNK_LOGITS", rows * CLASSES)
    monkeypatch.setattr(logistic.jax, "local_devices", lambda: some)
    return devices, rows


def test_chunks_converge_to_the_same_optimum(chunked):
    for l2, (value, weight_D, bias_Q, _, score) in GOLDEN.items():
        probe = fit(*TRAIN, CLASSES, l2, tolerance=TIGHT)
        assert objective(probe, TRAIN, l2) <= value * (1 + 1e-6)
        np.testing.assert_allclose(probe.weight_DQ[:, 0], weight_D, atol=WEIGHT)
        np.testing.assert_allclose(probe.bias_Q, bias_Q, atol=WEIGHT)
        assert probe.evaluate(accuracy, VALIDATION) == pytest.approx(score)


def test_chunks_of_multilabel_targets_converge_to_the_same_optimum(chunked):
    probe = fit(TRAIN.features_nD, multilabel_targets(), 3, 2.0, tolerance=TIGHT)
    np.testing.assert_allclose(
        probe.weight_DQ[:2].T, [[2.7292, 2.4931], [-0.8723, -0.3447], [0.1233, -0.0516]], atol=2e-3
    )
    np.testing.assert_allclose(probe.bias_Q, [-1.320628, -2.307797, -3.588086], atol=WEIGHT * 4)


def test_chunks_have_the_given_size_and_are_sharded(chunked):
    devices, rows = chunked
    problem = logistic.prepare(*TRAIN, CLASSES)
    assert len(problem.x_CnD.sharding.device_set) == devices
    assert problem.x_CnD.sharding.shard_shape(problem.x_CnD.shape)[1] <= rows
    np.testing.assert_allclose(problem.eigenvalue_D[-1], 300)  # of the intercept: without padding rows


def test_the_objective_of_chunks_equals_that_of_all_rows(monkeypatch):
    for targets in (TRAIN.targets, multilabel_targets()):
        classes, found = CLASSES if targets.ndim == 1 else 3, []
        for held in (2**26, 0):
            monkeypatch.setattr(logistic, "HELD_LOGITS", held)
            problem = logistic.prepare(TRAIN.features_nD, targets, classes)
            found.append(logistic.minimize(problem, 1.0, np.zeros((classes, WIDTH + 1), np.float32), TIGHT).objective)
        np.testing.assert_allclose(*found, rtol=1e-6)


def test_a_search_in_chunks_equals_one_without(monkeypatch):
    expected = search(TRAIN, VALIDATION, CLASSES)
    monkeypatch.setattr(logistic, "HELD_LOGITS", 0)
    monkeypatch.setattr(logistic, "CHUNK_LOGITS", 20 * CLASSES)
    found = search(TRAIN, VALIDATION, CLASSES)
    assert found.l2 == expected.l2 and found.curve == pytest.approx(expected.curve)


def compiled_bytes(chunks, rows, width, classes):
    def array(*shape, dtype=np.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    problem = logistic.Problem(
        x_CnD=array(chunks, rows, width + 1),
        targets=array(chunks, rows, dtype=np.int32),
        eigenvalue_D=array(width + 1),
        penalized_D=array(width + 1),
        mean_d=array(width),
        basis_dd=array(width, width),
        rows=chunks * rows,
    )
    lowered = logistic.minimize.lower(problem, array(), array(classes, width + 1), array())
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_for_imagenet_is_that_of_one_chunk_of_logits():
    rows, classes = 1_281_167, 1000
    chunk = logistic.CHUNK_LOGITS // classes
    chunks = -(-rows // chunk)
    # Some arrays of logits of a chunk, 67 MB each, and 20 of L-BFGS of 1000 × 769: 62 MB. All logits are 5.1 GB.
    assert rows * classes > logistic.HELD_LOGITS
    assert compiled_bytes(chunks, chunk, 768, classes) < 1e9 < 4e9 < compiled_bytes(1, rows, 768, classes)


@pytest.mark.parametrize("held", [2**26, 0])
def test_a_search_stores_the_features_once(monkeypatch, held):
    monkeypatch.setattr(logistic, "HELD_LOGITS", held)
    prepare, before, after = logistic.prepare, [], []

    def recorded(*arguments):
        before.append(stored_bytes())
        problem = prepare(*arguments)
        after.append(stored_bytes() - problem.x_CnD.nbytes)
        return problem

    def stored_bytes():
        return sum(array.nbytes for array in jax.live_arrays() if array.nbytes > 4 * 200 * WIDTH)

    monkeypatch.setattr(logistic, "prepare", recorded)
    gc.collect()
    others = stored_bytes()  # arrays of other tests
    search(TRAIN, VALIDATION, CLASSES)
    assert before == after == [others, others]  # for the training split, and for both


# --------------------------------------------------------------------------------------------------------- few-shot


def test_draws_are_nested_and_balanced():
    draws = [draw(TRAIN.targets, CLASSES, shots, 3) for shots in (1, 2, 4, 8, 16)]
    for fewer, more in zip(draws, draws[1:], strict=False):
        assert set(fewer) < set(more)
    assert (np.bincount(TRAIN.targets[draws[-1]]) == 16).all()
    assert set(draws[-1]) != set(draw(TRAIN.targets, CLASSES, 16, 4))


def test_a_class_with_fewer_examples_is_an_error():
    with pytest.raises(ValueError, match="at most 2, the examples of class 1, got 4"):
        draw(np.array([0, 0, 0, 1, 0, 1]), 2, 4, 0)


def test_more_shots_are_better():
    results = few_shot_curve(TRAIN, VALIDATION, split(3, 500), CLASSES, shots=(1, 16), seeds=range(3))
    assert len(results[1]) == 3 and max(results[1]) < np.mean(results[16])


def test_few_shot_probes_search_on_the_validation_split():
    results = few_shot_curve(TRAIN, VALIDATION, split(3, 500), CLASSES, shots=(4,), seeds=(0,))
    rows = draw(TRAIN.targets, CLASSES, 4, 0)
    found = search(Examples(*(x[rows] for x in TRAIN)), VALIDATION, CLASSES, refit=False)
    assert results[4] == [found.probe.evaluate(accuracy, split(3, 500))]

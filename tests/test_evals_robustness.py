"""Effective robustness against values computed by hand, numpy.polyfit and the paper."""

import math

import numpy as np
import pytest

from clip_jax.evals.analysis.robustness import (
    PAPER_SHIFTS,
    SHIFTS,
    LinearFit,
    average_shift,
    fit,
    read_standard_models,
    robustness_gap,
    summary,
)

EXACT = 1e-12  # float64, another order of summation
# Radford et al. 2021, figure 13 and table 16: zero-shot ViT-L/14@336.
L14_336 = {
    "imagenet": 0.762,
    "imagenet_v2": 0.701,
    "imagenet_a": 0.772,
    "imagenet_r": 0.889,
    "objectnet": 0.723,
    "imagenet_sketch": 0.602,
    "imagenet_vid": 0.953,
    "youtube_bb": 0.952,
}
# Synthetic: slope 1; the odds under shift are a quarter of those on ImageNet, e.g. 0.6 and 3/11.
STANDARD = [(x, x / 4 / (x / 4 + 1 - x)) for x in (0.6, 0.7, 0.8, 0.85)]


def logit(p):
    return np.log(p / (1 - np.asarray(p)))


def test_line_through_two_points():
    line = fit([(1 / 2, 1 / 3), (3 / 4, 3 / 4)])  # odds on ImageNet: 1 and 3; under shift: 1/2 and 3
    slope = math.log(6) / math.log(3)
    assert line.n == 2
    assert (line.slope, line.intercept) == pytest.approx((slope, -math.log(2)), rel=EXACT)
    assert line.predict(0.5) == pytest.approx(1 / 3, rel=EXACT)
    assert line.effective_robustness(0.5, 0.4) == pytest.approx(0.4 - 1 / 3, rel=EXACT)


def test_fit_is_least_squares_on_logits():
    rng = np.random.default_rng(0)
    x = rng.uniform(0.4, 0.9, 30)
    y = np.clip(x - 0.2 + rng.normal(0, 0.05, 30), 0.01, 0.99)
    line = fit(list(zip(x.tolist(), y.tolist(), strict=True)))
    assert (line.slope, line.intercept) == pytest.approx(tuple(np.polyfit(logit(x), logit(y), 1)), rel=1e-9)
    assert line.slope != pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-2)


def test_effective_robustness_of_standard_models_is_zero_and_of_clip_is_large():
    line = fit(STANDARD)
    assert [line.effective_robustness(x, y) for x, y in STANDARD] == pytest.approx([0] * 4, abs=EXACT)
    x, y = L14_336["imagenet"], average_shift(L14_336)
    assert y == pytest.approx((70.1 + 77.2 + 88.9 + 72.3 + 60.2) / 500, rel=EXACT)
    assert line.effective_robustness(x, y) == pytest.approx(y - 0.1905 / (0.1905 + 0.238), rel=EXACT)
    assert line.effective_robustness(x, y) > 0.25


def test_predictions_are_fractions_for_extreme_inputs():
    steep = LinearFit(slope=100.0, intercept=0.0, n=2)
    assert steep.predict(1e-9) == pytest.approx(0, abs=EXACT) and steep.predict(1 - 1e-9) == pytest.approx(1)


def test_the_paper_averages_over_seven_shifts():
    assert len(PAPER_SHIFTS) == 7 and set(SHIFTS) < set(PAPER_SHIFTS)
    seven = (70.1 + 77.2 + 88.9 + 72.3 + 60.2 + 95.3 + 95.2) / 700
    assert average_shift(L14_336, PAPER_SHIFTS) == pytest.approx(seven, rel=EXACT)
    assert robustness_gap(L14_336, PAPER_SHIFTS) == pytest.approx(0.762 - seven, rel=EXACT)
    assert robustness_gap(L14_336, ["imagenet_v2"]) == pytest.approx(0.061, rel=1e-9)


def test_missing_shifts_are_an_error():
    some = {"imagenet": 0.7, "imagenet_v2": 0.6, "imagenet_a": 0.5}
    with pytest.raises(
        ValueError, match=r"imagenet_r, imagenet_sketch, objectnet.*shifts=\('imagenet_v2', 'imagenet_a"
    ):
        average_shift(some)
    with pytest.raises(ValueError, match="no shifts"):
        average_shift(some, [])
    with pytest.raises(ValueError, match="accuracies: expected imagenet, got imagenet_v2"):
        robustness_gap({"imagenet_v2": 0.5}, ["imagenet_v2"])
    with pytest.raises(ValueError, match="imagenet_v2: expected a fraction from 0 to 1, got 70.1; 70.1 % is 0.701"):
        average_shift({"imagenet_v2": 70.1}, ["imagenet_v2"])


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "two models of different ImageNet accuracy"),
        ([(0.5, 0.4)], "two models of different ImageNet accuracy"),
        ([(0.5, 0.4), (0.5, 0.3)], "two models of different ImageNet accuracy"),
        ([(0.5, 0.4), (0.6, 0)], r"accuracy 0 has no logit.*\(correct \+ 0.5\)"),
        ([(0.5, 0.4), (1, 0.9)], "accuracy 1 has no logit"),
        ([(50, 40), (60, 50)], "expected a fraction from 0 to 1, got 50; 50 % is 0.5"),
        ([(0.5, math.nan), (0.6, 0.5)], "expected a fraction from 0 to 1, got nan"),
    ],
)
def test_points_without_a_line_are_rejected(points, message):
    with pytest.raises(ValueError, match=message):
        fit(points)


def test_accuracy_under_shift_may_be_zero_but_not_a_percentage():
    line = fit(STANDARD)
    assert line.effective_robustness(0.6, 0.0) == pytest.approx(-3 / 11, rel=EXACT)
    with pytest.raises(ValueError, match="got 27; 27 % is 0.27"):
        line.effective_robustness(0.6, 27)


# ------------------------------------------------------------------------------------------------- CSV

HEADER = "model,imagenet,imagenet_v2,imagenet_a,imagenet_r,imagenet_sketch,objectnet,remark\n"


def write_csv(tmp_path, text):
    (tmp_path / "standard.csv").write_text(text, encoding="utf-8-sig")
    return tmp_path / "standard.csv"


def test_standard_models_are_read_with_their_average(tmp_path):
    path = write_csv(tmp_path, HEADER + "ResNet-50,0.76,0.6,0.0,0.4,0.3,0.2,weak\n\nResNet-101,0.8,.7,.1,.5,.4,.3,\n")
    points = read_standard_models(path)
    assert list(points) == ["ResNet-50", "ResNet-101"]
    assert points["ResNet-50"] == pytest.approx((0.76, 0.3)) and points["ResNet-101"] == pytest.approx((0.8, 0.4))
    assert read_standard_models(str(path), ["objectnet"])["ResNet-50"] == (0.76, 0.2)
    assert fit(list(points.values())).n == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column model, imagenet, imagenet_v2.*first line should be: model,imagenet,imagenet_v2"),
        ("model,imagenet,imagenet_v2\n", "no column imagenet_a, imagenet_r, imagenet_sketch, objectnet"),
        (
            HEADER + "A,76.2,.6,.1,.4,.3,.2,\n",
            "line 2, imagenet: expected a fraction from 0 to 1, got 76.2; 76.2 % is 0.762",
        ),
        (
            HEADER + "A,.7,.6,.1,.4,.3,.2,\nB,.7,.6,.1,.4,,.2,\n",
            "line 3, imagenet_sketch: expected a fraction such as 0.762, got ''",
        ),
        (HEADER + "A,.7,.6\n", "line 2, imagenet_a: expected a fraction such as 0.762, got None"),
        (HEADER + "A,.7,.6,nan,.4,.3,.2,\n", "line 2, imagenet_a: expected a fraction from 0 to 1, got nan"),
        (HEADER + "A,.7,.6,.1,.4,.3,.2,\nA,.8,.6,.1,.4,.3,.2,\n", "line 3: duplicate model 'A'"),
        (HEADER + "A,0,7,0,6,0,1,0,4,0,3,0,2\n", "line 2: more cells than columns"),
    ],
)
def test_invalid_files_are_reported_with_line_and_column(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_standard_models(write_csv(tmp_path, text))


def test_summary_is_empty_if_a_dataset_is_missing():
    metrics = {f"zeroshot/{name}/top1": 0.5 for name in ("imagenet", *SHIFTS)}
    standard_models = dict(zip("abcd", STANDARD, strict=True))
    names = {f"robustness/shifts/{name}" for name in ("average", "gap", "effective")}
    assert set(summary(metrics, standard_models)) == names
    for broken in ("imagenet", "objectnet"):
        assert summary(metrics | {f"zeroshot/{broken}/top1": math.nan}, standard_models) == {}
    for extreme in (0.0, 1.0):  # without a logit
        same = dict.fromkeys(metrics, extreme)
        found = summary(same, standard_models)
        assert found == {"robustness/shifts/average": extreme, "robustness/shifts/gap": 0}

"""Effective robustness by hand, by numpy.polyfit and by the paper's numbers; and a plot that shows what it says."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from clip_jax.evals.analysis.robustness import (
    PAPER_SHIFTS,
    SHIFTS,
    Baseline,
    average_shift,
    fit,
    plot,
    read_points,
    robustness_gap,
    summary,
)

EXACT = 1e-12  # float64 in another order
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
# Synthetic: on the line of slope 1 that lowers the odds to a quarter, from 0.6 on ImageNet to 3/11 under shift.
STANDARD = [(x, x / 4 / (x / 4 + 1 - x)) for x in (0.6, 0.7, 0.8, 0.85)]
SVG = "{http://www.w3.org/2000/svg}"


def logit(p):
    return np.log(p / (1 - np.asarray(p)))


def test_a_line_through_two_points_by_hand():
    line = fit([(1 / 2, 1 / 3), (3 / 4, 3 / 4)])  # odds of 1 and 3, and under shift of 1/2 and 3
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


def test_standard_models_have_none_and_clip_has_much():
    line = fit(STANDARD)
    assert [line.effective_robustness(x, y) for x, y in STANDARD] == pytest.approx([0] * 4, abs=EXACT)
    x, y = L14_336["imagenet"], average_shift(L14_336)
    assert y == pytest.approx((70.1 + 77.2 + 88.9 + 72.3 + 60.2) / 500, rel=EXACT)
    assert line.effective_robustness(x, y) == pytest.approx(y - 0.1905 / (0.1905 + 0.238), rel=EXACT)
    assert line.effective_robustness(x, y) > 0.25


def test_predictions_stay_fractions_far_out():
    steep = Baseline(slope=100.0, intercept=0.0, n=2)
    assert steep.predict(1e-9) == pytest.approx(0, abs=EXACT) and steep.predict(1 - 1e-9) == pytest.approx(1)


def test_the_papers_average_is_over_seven_shifts():
    assert len(PAPER_SHIFTS) == 7 and set(SHIFTS) < set(PAPER_SHIFTS)
    seven = (70.1 + 77.2 + 88.9 + 72.3 + 60.2 + 95.3 + 95.2) / 700
    assert average_shift(L14_336, PAPER_SHIFTS) == pytest.approx(seven, rel=EXACT)
    assert robustness_gap(L14_336, PAPER_SHIFTS) == pytest.approx(0.762 - seven, rel=EXACT)
    assert robustness_gap(L14_336, ["imagenet_v2"]) == pytest.approx(0.061, rel=1e-9)


def test_a_missing_shift_is_named_and_not_left_out():
    some = {"imagenet": 0.7, "imagenet_v2": 0.6, "imagenet_a": 0.5}
    with pytest.raises(
        ValueError, match=r"imagenet_r, imagenet_sketch, objectnet.*shifts=\('imagenet_v2', 'imagenet_a"
    ):
        average_shift(some)
    with pytest.raises(ValueError, match="no shifts"):
        average_shift(some, [])
    with pytest.raises(ValueError, match="no accuracy for imagenet;"):
        robustness_gap({"imagenet_v2": 0.5}, ["imagenet_v2"])
    with pytest.raises(ValueError, match="imagenet_v2: 70.1 is no fraction.*is 0.701"):
        average_shift({"imagenet_v2": 70.1}, ["imagenet_v2"])


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "two models of different accuracy"),
        ([(0.5, 0.4)], "two models of different accuracy"),
        ([(0.5, 0.4), (0.5, 0.3)], "two models of different accuracy"),
        ([(0.5, 0.4), (0.6, 0)], r"accuracy 0 has no logit.*\(right \+ 0.5\)"),
        ([(0.5, 0.4), (1, 0.9)], "accuracy 1 has no logit"),
        ([(50, 40), (60, 50)], "50 is no fraction from 0 to 1; as a fraction 50 % is 0.5"),
        ([(0.5, math.nan), (0.6, 0.5)], "nan is no fraction"),
    ],
)
def test_points_without_a_line_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        fit(points)


def test_accuracy_under_shift_may_be_zero_but_no_percentage():
    line = fit(STANDARD)
    assert line.effective_robustness(0.6, 0.0) == pytest.approx(-3 / 11, rel=EXACT)
    with pytest.raises(ValueError, match="27 is no fraction"):
        line.effective_robustness(0.6, 27)


# ------------------------------------------------------------------------------------------------- CSV

HEAD = "model,imagenet,imagenet_v2,imagenet_a,imagenet_r,imagenet_sketch,objectnet,remark\n"


def written(tmp_path, text):
    (tmp_path / "standard.csv").write_text(text, encoding="utf-8-sig")
    return tmp_path / "standard.csv"


def test_points_are_read_with_their_average(tmp_path):
    path = written(tmp_path, HEAD + "ResNet-50,0.76,0.6,0.0,0.4,0.3,0.2,weak\n\nResNet-101,0.8,.7,.1,.5,.4,.3,\n")
    points = read_points(path)
    assert list(points) == ["ResNet-50", "ResNet-101"]
    assert points["ResNet-50"] == pytest.approx((0.76, 0.3)) and points["ResNet-101"] == pytest.approx((0.8, 0.4))
    assert read_points(str(path), ["objectnet"])["ResNet-50"] == (0.76, 0.2)
    assert fit(list(points.values())).n == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column model, imagenet, imagenet_v2.*first line should be: model,imagenet,imagenet_v2"),
        ("model,imagenet,imagenet_v2\n", "no column imagenet_a, imagenet_r, imagenet_sketch, objectnet"),
        (HEAD + "A,76.2,.6,.1,.4,.3,.2,\n", "line 2, imagenet: 76.2 is no fraction.*76.2 % is 0.762"),
        (HEAD + "A,.7,.6,.1,.4,.3,.2,\nB,.7,.6,.1,.4,,.2,\n", "line 3, imagenet_sketch: '' is no fraction"),
        (HEAD + "A,.7,.6\n", "line 2, imagenet_a: None is no fraction"),
        (HEAD + "A,.7,.6,nan,.4,.3,.2,\n", "line 2, imagenet_a: nan is no fraction"),
        (HEAD + "A,.7,.6,.1,.4,.3,.2,\nA,.8,.6,.1,.4,.3,.2,\n", "line 3: 'A' is there already"),
        (HEAD + "A,0,7,0,6,0,1,0,4,0,3,0,2\n", "line 2: more cells than columns"),
    ],
)
def test_files_that_are_wrong_say_where(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_points(written(tmp_path, text))


# ------------------------------------------------------------------------------------------------- plot

MODELS = {"L/14@336": (0.762, 0.745), "<B/32> & co": (0.632, 0.486), "twin": (0.632, 0.486)}


def drawn():
    return ET.fromstring(plot(fit(STANDARD), STANDARD, MODELS))


def of_class(root, tag, name):
    return [e for e in root.iter(SVG + tag) if e.get("class") == name]


def test_the_plot_is_an_svg_with_one_mark_and_name_per_model():
    root = drawn()
    assert root.tag == SVG + "svg"
    assert len(of_class(root, "circle", "model")) == len(MODELS)
    assert len(of_class(root, "circle", "standard")) == len(STANDARD)
    names = of_class(root, "text", "name")
    assert sorted(e.text for e in names) == sorted(MODELS)
    heights = sorted(float(e.get("y")) for e in names)
    assert min(np.diff(heights)) >= 11  # no name lies on another one
    assert "prefers-color-scheme:dark" in root.find(SVG + "style").text
    used, given = set(re.findall(r"var\((--[\w-]+)\)", ET.tostring(root, "unicode"))), root.find(SVG + "style").text
    assert used and all(given.count(f"{variable}:") == 2 for variable in used)  # light and dark


def test_names_stay_inside_the_picture():
    names = of_class(
        ET.fromstring(plot(fit(STANDARD), STANDARD, {"left": (0.61, 0.3), "far right": (0.85, 0.5)})), "text", "name"
    )
    assert {e.text: e.get("text-anchor") for e in names} == {"left": "start", "far right": "end"}


def test_the_ideal_is_in_sight_of_models_far_below_it():
    root = ET.fromstring(plot(fit([(0.7, 0.02), (0.8, 0.03)]), [(0.7, 0.02), (0.8, 0.03)], {}))
    assert of_class(root, "line", "ideal") and of_class(root, "line", "fit")


def test_marks_stand_above_the_line_by_their_robustness():
    titles = [e.find(SVG + "title").text for e in of_class(drawn(), "circle", "model")]
    expected = fit(STANDARD).effective_robustness(*MODELS["L/14@336"])
    assert any(t.startswith(f"L/14@336: {100 * expected:+.1f} points") for t in titles)


def scale(root, axis):
    """Return what the ticks say, in logits, and the pixels where they stand."""
    ticks = of_class(root, "text", axis)
    return logit([float(e.text) / 100 for e in ticks]), np.array([float(e.get(axis)) for e in ticks])


def test_axes_are_monotone_and_linear_in_logits():
    root = drawn()
    for axis, direction in (("x", 1), ("y", -1)):
        values, pixels = scale(root, axis)
        assert len(values) >= 3
        assert (np.diff(values) > 0).all() and (direction * np.diff(pixels) > 0).all()
        slope, at_0 = np.polyfit(values, pixels, 1)
        assert np.abs(slope * values + at_0 - pixels).max() < 0.2  # pixels are rounded to a tenth


def test_lines_and_marks_agree_with_the_axes():
    root = drawn()
    (sx, x0), (sy, y0) = (np.polyfit(*scale(root, axis), 1) for axis in "xy")
    y0 -= 4  # a tick's text stands 4 px below its line
    at = {name: (sx * logit(x) + x0, sy * logit(y) + y0) for name, (x, y) in MODELS.items()}
    for mark in of_class(root, "circle", "model"):
        name = mark.find(SVG + "title").text.split(": ")[0]
        assert (float(mark.get("cx")), float(mark.get("cy"))) == pytest.approx(at[name], abs=0.3)
    for name, slope, intercept in (("ideal", 1, 0), ("fit", 1, -math.log(4))):
        (line,) = of_class(root, "line", name)
        for end in "12":
            x, y = float(line.get("x" + end)), float(line.get("y" + end))
            assert 0 <= x <= 480 and 0 <= y <= 360
            assert (y - y0) / sy == pytest.approx(slope * (x - x0) / sx + intercept, abs=0.02)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 8.0])
def test_lines_never_leave_the_axes(slope):
    root = ET.fromstring(plot(Baseline(slope, 0.5, 3), STANDARD, {}))
    for line in of_class(root, "line", "fit"):
        assert all(52 <= float(line.get(f"x{i}")) <= 468 and 12 <= float(line.get(f"y{i}")) <= 316 for i in "12")
    assert not of_class(ET.fromstring(plot(Baseline(0.0, 50.0, 3), STANDARD, {})), "line", "fit")


def test_a_plot_of_one_model_of_close_ones_or_of_all_there_is_has_axes():
    far = {"one": (1e-4, 0.1), "two": (1 - 1e-4, 0.9)}
    for models in ({"one": (0.7, 0.7)}, {"one": (0.7, 0.69), "two": (0.701, 0.692)}, far):
        values, pixels = scale(ET.fromstring(plot(fit(STANDARD), [], models)), "x")
        assert len(values) >= 2 and (np.diff(pixels) >= 25).all()


def test_a_plot_of_nothing_or_of_certainty_is_refused():
    with pytest.raises(ValueError, match="nothing to plot"):
        plot(fit(STANDARD), [], {})
    with pytest.raises(ValueError, match="accuracy 1.0 has no logit"):
        plot(fit(STANDARD), STANDARD, {"perfect": (1.0, 0.9)})


def test_a_summary_has_what_is_defined_and_no_number_made_of_missing_ones():
    measured = {f"zeroshot/{name}/top1": 0.5 for name in ("imagenet", *SHIFTS)}
    baselines = dict(zip("abcd", STANDARD, strict=True))
    names = {f"robustness/shifts/{name}" for name in ("average", "gap", "effective")}
    assert set(summary(measured, baselines)) == names
    for broken in ("imagenet", "objectnet"):
        assert summary(measured | {f"zeroshot/{broken}/top1": math.nan}, baselines) == {}
    for extreme in (0.0, 1.0):  # neither has a logit
        same = dict.fromkeys(measured, extreme)
        found = summary(same, baselines)
        assert found == {"robustness/shifts/average": extreme, "robustness/shifts/gap": 0}

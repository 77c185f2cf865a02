"""Charts: ticks and scales, marks at the position of their values, and well-formed SVG."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from clip_jax.evals.analysis.overlap import analyze_overlap
from clip_jax.evals.analysis.robustness import LinearFit, fit
from clip_jax.evals.report.charts import format_tick, line_chart, overlap_chart, robustness_chart, ticks

SVG = "{http://www.w3.org/2000/svg}"


def logit(p):
    return np.log(p / (1 - np.asarray(p)))


# ------------------------------------------------------------------------------------------------------ line charts


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.2, 0.31), (13, 87), (-3, 5), (1e-5, 5e-4), (0, 12_345), (7, 7), (0, 0)]
)
def test_ticks_are_round_and_enclose_the_values(low, high):
    found = ticks(low, high, 4)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert float(f"{steps[0]:.2g}") == pytest.approx(steps[0])


def test_ticks_are_formatted_short():
    assert [format_tick(x) for x in (0, 0.25, 3e-5, 1500, 20_000, 1.5e6)] == [
        "0",
        "0.25",
        "3e-05",
        "1,500",
        "20k",
        "1.5M",
    ]


def test_lines_have_gaps_at_values_that_are_not_finite():
    svg = line_chart({"loss": [(1, 3.0), (2, 2.0), (3, math.nan), (4, 1.0), (5, 0.5), (6, math.inf), (7, 0.1)]}, "Loss")
    assert svg.count("<polyline") == 2 and svg.count("<circle") == 1
    assert "nan" not in svg and "inf" not in svg
    assert line_chart({"loss": [(1, math.nan)]}, "Loss") == "" == line_chart({}, "Loss")


def test_lines_are_inside_the_chart_and_subsampled():
    svg = line_chart({"loss": [(x, math.sin(x)) for x in range(5000)]}, "Loss")
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg)[1].split()]
    assert len(points) <= 600
    assert all(0 <= x <= 480 and 0 <= y <= 200 for x, y in points)


# ------------------------------------------------------------------------------------------------- effective robustness

# Synthetic: slope 1; the odds under shift are a quarter of those on ImageNet, e.g. 0.6 and 3/11.
STANDARD = [(x, x / 4 / (x / 4 + 1 - x)) for x in (0.6, 0.7, 0.8, 0.85)]

MODELS = {"L/14@336": (0.762, 0.745), "<B/32> & co": (0.632, 0.486), "twin": (0.632, 0.486)}


def robustness_svg():
    return ET.fromstring(robustness_chart(fit(STANDARD), STANDARD, MODELS))


def find_by_class(root, tag, name):
    return [e for e in root.iter(SVG + tag) if e.get("class") == name]


def test_the_robustness_chart_has_a_dot_and_a_name_per_model():
    root = robustness_svg()
    assert root.tag == SVG + "svg"
    assert len(find_by_class(root, "circle", "model")) == len(MODELS)
    assert len(find_by_class(root, "circle", "standard")) == len(STANDARD)
    names = find_by_class(root, "text", "name")
    assert sorted(e.text for e in names) == sorted(MODELS)
    heights = sorted(float(e.get("y")) for e in names)
    assert min(np.diff(heights)) >= 11  # names do not overlap
    assert "prefers-color-scheme:dark" in root.find(SVG + "style").text
    used, style = set(re.findall(r"var\((--[\w-]+)\)", ET.tostring(root, "unicode"))), root.find(SVG + "style").text
    assert used and all(style.count(f"{variable}:") == 2 for variable in used)  # light and dark


def test_names_are_inside_the_chart():
    names = find_by_class(
        ET.fromstring(robustness_chart(fit(STANDARD), STANDARD, {"left": (0.61, 0.3), "far right": (0.85, 0.5)})),
        "text",
        "name",
    )
    assert {e.text: e.get("text-anchor") for e in names} == {"left": "start", "far right": "end"}


def test_the_ideal_line_is_visible_for_models_far_below_it():
    root = ET.fromstring(robustness_chart(fit([(0.7, 0.02), (0.8, 0.03)]), [(0.7, 0.02), (0.8, 0.03)], {}))
    assert find_by_class(root, "line", "ideal") and find_by_class(root, "line", "fit")


def test_tooltips_have_the_effective_robustness():
    titles = [e.find(SVG + "title").text for e in find_by_class(robustness_svg(), "circle", "model")]
    expected = fit(STANDARD).effective_robustness(*MODELS["L/14@336"])
    assert any(t.startswith(f"L/14@336: {100 * expected:+.1f} points") for t in titles)


def scale(root, axis):
    """Return the values of the ticks, in logits, and their pixels."""
    texts = find_by_class(root, "text", axis)
    return logit([float(e.text) / 100 for e in texts]), np.array([float(e.get(axis)) for e in texts])


def test_axes_are_monotone_and_linear_in_logits():
    root = robustness_svg()
    for axis, direction in (("x", 1), ("y", -1)):
        values, pixels = scale(root, axis)
        assert len(values) >= 3
        assert (np.diff(values) > 0).all() and (direction * np.diff(pixels) > 0).all()
        slope, at_0 = np.polyfit(values, pixels, 1)
        assert np.abs(slope * values + at_0 - pixels).max() < 0.2  # pixels are rounded to a tenth


def test_lines_and_dots_are_at_the_position_of_their_values():
    root = robustness_svg()
    (sx, x0), (sy, y0) = (np.polyfit(*scale(root, axis), 1) for axis in "xy")
    y0 -= 4  # a tick label is 4 px below its line
    expected = {name: (sx * logit(x) + x0, sy * logit(y) + y0) for name, (x, y) in MODELS.items()}
    for mark in find_by_class(root, "circle", "model"):
        name = mark.find(SVG + "title").text.split(": ")[0]
        assert (float(mark.get("cx")), float(mark.get("cy"))) == pytest.approx(expected[name], abs=0.3)
    for name, slope, intercept in (("ideal", 1, 0), ("fit", 1, -math.log(4))):
        (line,) = find_by_class(root, "line", name)
        for end in "12":
            x, y = float(line.get("x" + end)), float(line.get("y" + end))
            assert 0 <= x <= 480 and 0 <= y <= 360
            assert (y - y0) / sy == pytest.approx(slope * (x - x0) / sx + intercept, abs=0.02)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 8.0])
def test_lines_are_clipped_to_the_axes(slope):
    root = ET.fromstring(robustness_chart(LinearFit(slope, 0.5, 3), STANDARD, {}))
    for line in find_by_class(root, "line", "fit"):
        assert all(52 <= float(line.get(f"x{i}")) <= 468 and 12 <= float(line.get(f"y{i}")) <= 316 for i in "12")
    assert not find_by_class(ET.fromstring(robustness_chart(LinearFit(0.0, 50.0, 3), STANDARD, {})), "line", "fit")


def test_axes_of_one_model_of_close_models_and_of_distant_models():
    far = {"one": (1e-4, 0.1), "two": (1 - 1e-4, 0.9)}
    for models in ({"one": (0.7, 0.7)}, {"one": (0.7, 0.69), "two": (0.701, 0.692)}, far):
        values, pixels = scale(ET.fromstring(robustness_chart(fit(STANDARD), [], models)), "x")
        assert len(values) >= 2 and (np.diff(pixels) >= 25).all()


def test_a_robustness_chart_without_points_or_with_accuracy_one_is_rejected():
    with pytest.raises(ValueError, match="nothing to plot"):
        robustness_chart(fit(STANDARD), [], {})
    with pytest.raises(ValueError, match="accuracy 1.0 has no logit"):
        robustness_chart(fit(STANDARD), STANDARD, {"perfect": (1.0, 0.9)})


# ----------------------------------------------------------------------------------------------------- overlap


def circles(svg, kind=None):
    return [
        node for node in svg.iter("{http://www.w3.org/2000/svg}circle") if kind is None or node.get("class") == kind
    ]


def test_the_overlap_chart_has_a_circle_per_dataset_and_panel():
    rng = np.random.default_rng(0)
    overlapping = rng.random(3000) < 0.1
    draws = rng.random(3000)
    overlaps = {
        "a <&> b": analyze_overlap(draws < np.where(overlapping, 0.8, 0.6), overlapping, tests=3),
        "equal": analyze_overlap(draws < 0.6, overlapping, tests=3),
        "no overlap": analyze_overlap(draws < 0.6, np.zeros(3000, bool), tests=3),  # no difference, but a gain of 0
    }
    svg = ET.fromstring(overlap_chart(overlaps))
    width, height = (float(side) for side in svg.get("viewBox").split()[2:])
    left = [node for node in circles(svg) if float(node.get("cx")) < width / 2]
    assert len(left) == 2 and len(circles(svg)) == 5
    assert all(0 < float(c.get("cx")) < width and 0 < float(c.get("cy")) < height for c in circles(svg))
    marked = circles(svg, "marked")
    assert len(marked) == 2 and all(node[0].text.startswith("a <&> b: ") for node in marked)
    higher = {re.match("[^:]*", node[0].text)[0]: -float(node.get("cy")) for node in left}
    assert higher["a <&> b"] > higher["equal"]
    assert "nan" not in " ".join(value for node in svg.iter() for value in node.attrib.values())


def test_overlap_charts_without_overlap_and_without_datasets():
    clean = analyze_overlap(np.array([True, False]), np.zeros(2, bool))
    assert len(circles(ET.fromstring(overlap_chart({"x": clean})))) == 1
    with pytest.raises(ValueError, match="nothing to plot"):
        overlap_chart({})

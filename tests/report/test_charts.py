import math
import re

import pytest
from outline import Outline

from hybrid_dit.report import charts
from hybrid_dit.report.charts import Axis, line_chart, pareto_chart, thin
from hybrid_dit.report.contents import Choice, Front


def choice(share, error=1.0, blocks=("R2", "softmax")):
    return Choice(tuple(blocks), share, error, 1 - share)


def vertices(path):
    return [tuple(map(float, pair.split())) for pair in re.findall(r"[ML]([^ML]+)", path)]


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.68, 1.0), (-3.0, 900.0), (1e-9, 2e-9), (5.0, 5.0)])
def test_linear_ticks_are_a_few_round_numbers_in_range(low, high):
    axis = Axis(low, high, 0, 100)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 8 and all(-0.1 <= axis(t) <= 100.1 for t in ticks)
    step = ticks[1] - ticks[0]
    assert re.fullmatch(r"[125]\.0+e.*", f"{step:.6e}")


@pytest.mark.parametrize("low, high", [(0.05, 0.3), (1e-6, 1e3), (0.9, 1.1), (2.0, 2.0)])
def test_logarithmic_ticks_are_in_range_and_evenly_placed_by_factor(low, high):
    axis = Axis(low, high, 100, 0, log=True)
    ticks = axis.ticks()
    assert len(ticks) >= 3 and all(-0.1 <= axis(t) <= 100.1 for t in ticks)
    middle = math.sqrt(axis.low * axis.high)
    assert axis(middle) == pytest.approx(50, abs=0.1)


def test_lines_go_through_the_data_and_their_text_says_first_and_last_value():
    steps, values = [1, 2, 3, 4, 5], [8.0, math.nan, 0.0, 2.0, 1.0]
    page = Outline(line_chart({"R2 & <x>": (steps, values), "bad": ([1], [math.inf])}, "Training", "loss"))
    [svg] = [attributes for attributes, _ in page.find("svg", role="img")]
    assert svg["aria-label"] == "Training: loss over 5 training steps. R2 & <x> from 8 to 1."
    [line] = [a["d"] for a, _ in page.find("path", class_="line") if a["d"] != "M0 6h28"]
    width, height = charts.RIGHT - charts.LEFT, charts.BOTTOM - charts.TOP
    expected = [
        (charts.LEFT + width * (s - 1) / 4, charts.BOTTOM - height * math.log2(v) / 3)
        for s, v in ((1, 8), (4, 2), (5, 1))
    ]
    assert vertices(line) == [pytest.approx(xy, abs=0.06) for xy in expected]  # rounded to tenths


def test_long_curves_are_thinned_but_keep_their_ends():
    steps = range(1, 10_001)
    page = Outline(line_chart({"a": (steps, [1.0 / s for s in steps])}, "x", "loss"))
    [line] = [a["d"] for a, _ in page.find("path", class_="line") if a["d"] != "M0 6h28"]
    points = vertices(line)
    assert len(points) == charts.MOST_VERTICES
    assert (points[0], points[-1]) == ((charts.LEFT, charts.TOP), (charts.RIGHT, charts.BOTTOM))


def test_nothing_to_draw_is_no_picture():
    assert line_chart({"a": ([1], [math.nan]), "b": ([], [])}, "x", "loss") is None


def test_every_point_of_the_front_says_its_numbers_and_one_is_in_the_tab_order():
    chosen = choice(0.75, 0.5, ("R2", "R4"))
    front = Front("ms", (choice(0.5), chosen, choice(1.0, 0.0)), {"1R2": choice(0.8, 0.9), "2Linear": choice(0.4, 1.5)})
    page = Outline(pareto_chart(front, chosen, ["R2", "linear"]))
    marks = page.find("g", class_="point")
    assert [a["tabindex"] for a, _ in marks] == ["0", "-1", "-1", "-1", "-1", "-1"]
    labels = [a["aria-label"] for a, _ in marks]
    assert labels == [text for _, text in marks]  # the tooltip of mice
    assert "chosen: cost 75.0% of softmax, error 0.5: 1 x R2, 1 x R4" in labels
    assert "2Linear, one rate only: cost 40.0% of softmax, error 1.5: 1 x R2, 1 x softmax" in labels
    places = [float(re.match(r"translate\(([\d.]+) ", a["transform"])[1]) for a, _ in marks]
    assert places == sorted(places) and len(set(places)) == 5  # arrow keys go from left to right
    [svg] = [a for a, _ in page.find("svg", role="group")]
    assert "3 efficient choices and 2 models with one rate" in svg["aria-label"]


def test_a_front_of_one_point_is_drawn():
    page = Outline(pareto_chart(Front("FLOPs", (choice(1.0, 0.0),), {}), None))
    assert len(page.find("g", class_="point")) == 1


def test_thinning_keeps_both_ends_and_the_chosen_one():
    many = [choice(s / 1000, blocks=(f"R{s}",)) for s in range(1000)]
    kept = thin(many, many[501])
    assert len(kept) <= charts.MOST_POINTS + 1 and {many[0], many[501], many[-1]} <= set(kept)
    assert thin(many[:3]) == many[:3]


def test_a_rate_has_one_colour_everywhere_and_softmax_none():
    rates = ["R2", "R4", "R8", "linear"]
    classes = [charts.rate_class(rate, rates) for rate in rates]
    assert len(set(classes)) == 4 and "s0" not in classes
    assert charts.rate_class("softmax", rates) == "soft"


@pytest.mark.parametrize(
    "value, text", [(0.0, "0"), (1e-4, "1e-4"), (1.5e-3, "1.5e-3"), (0.15, "0.15"), (2e-12, "2e-12")]
)
def test_tick_labels_are_short(value, text):
    assert charts._short(value) == text

"""Line charts and the Pareto front as SVG: readable at 330 pixels of width, coloured by the page's style sheet.

Series are told apart by dashes or shapes as well as colours. Colours are the classes s0, s1, ... of `page.css`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np

from hybrid_dit.report.contents import Choice, Front
from hybrid_dit.report.markup import Html, tag

WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 376, 10, 252
SERIES = 7  # classes in the style sheet
MOST_VERTICES = 300  # of a line
MOST_POINTS = 60  # to walk through with the keyboard
SHAPES = (  # square, diamond, triangles, cross
    "M-5-5h10v10h-10z",
    "M0-7L7 0L0 7L-7 0z",
    "M0-6.5L6.5 5h-13z",
    "M0 6.5L6.5-5h-13z",
    "M-6-2h4v-4h4v4h4v4h-4v4h-4v-4h-4z",
)


class Axis:
    """Places values of [low, high] on the pixels [start, end], linearly or by their logarithm."""

    def __init__(self, low: Real, high: Real, start: Real, end: Real, log: bool = False):
        """Widens an empty range."""
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: Real) -> float:
        """Returns the pixel, rounded to a tenth."""
        forward = math.log if self.log else float
        share = (forward(value) - forward(self.low)) / (forward(self.high) - forward(self.low))
        return round(float(self.start + share * (self.end - self.start)), 1)

    def ticks(self) -> list[float]:
        """Returns round numbers in the range."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):  # the fewest that give a scale
                found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if len(found) >= 3:
                    return found
        raw = (self.high - self.low) / 7.5  # steps are up to 2.5 times as long, so that there are three at least
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def rate_class(rate: str, rates: Sequence[str]) -> str:
    """Returns the class that colours a rate everywhere on the page; s0 is left for what is not one rate."""
    return f"s{1 + rates.index(rate) % (SERIES - 1)}" if rate in rates else "soft"


def line_chart(
    curves: Mapping[str, tuple[Sequence[int], Sequence[Real]]],
    name: str,
    value_label: str,
    classes: Sequence[str] = tuple(f"s{i}" for i in range(SERIES)),
) -> Html | None:
    """Returns a figure of curves over training steps, logarithmic values.

    Args:
        curves: {name: (steps, values)}; values that are not positive and finite are left out.
        name: what the picture shows, for people who don't see it.
        value_label: of the vertical axis.
        classes: of the curves in their order.

    Returns:
        None if there is nothing to draw.
    """
    shown, class_of = {}, dict(zip(curves, itertools.cycle(classes)))
    for label, (steps, values) in curves.items():
        kept = [(s, v) for s, v in zip(steps, values) if math.isfinite(v) and v > 0]
        if kept:
            shown[label] = kept
    if not shown:
        return None
    xs = [s for points in shown.values() for s, _ in points]
    ys = [v for points in shown.values() for _, v in points]
    x, y = Axis(min(xs), max(xs), LEFT, RIGHT), Axis(min(ys), max(ys), BOTTOM, TOP, log=True)
    lines, legend, summary = [], [], []
    for label, points in shown.items():
        kept = [points[k] for k in np.unique(np.linspace(0, len(points) - 1, MOST_VERTICES).round().astype(int))]
        path = "M" + "L".join(f"{x(s)} {y(v)}" for s, v in kept)
        lines.append(tag("path", d=path, class_=f"line {class_of[label]}"))
        last = f"{points[-1][1]:.3g}"
        key = _key(tag("path", d="M0 6h28", class_=f"line {class_of[label]}"), 28)
        legend.append(tag("li", key, f"{label} (last: {last})"))
        summary.append(f"{label} from {points[0][1]:.3g} to {last}")
    label = f"{name}: {value_label} over {max(xs):,} training steps. {'; '.join(summary)}."
    svg = tag("svg", _frame(x, y, "training step", value_label), lines, **_svg(role="img", label=label))
    return tag("figure", svg, tag("ul", legend, class_="legend"), class_="chart")


def pareto_chart(front: Front, chosen: Choice | None, order: Sequence[str] = ()) -> Html:
    """Returns a figure of error against cost whose points show their numbers on hover, touch and focus.

    One point is in the tab order; arrow keys walk through the others (`page.js`). Rates are coloured by their place in
    `order`.
    """
    every = [*front.efficient, *front.homogeneous.values(), *([chosen] if chosen else [])]
    x = Axis(min(c.share for c in every), max(1.0, *(c.share for c in every)), LEFT + 8, RIGHT - 8)
    y = Axis(min(0.0, *(c.error for c in every)), max(c.error for c in every), BOTTOM - 8, TOP + 8)
    steps = f"M{x(front.efficient[0].share)} {y(front.efficient[0].error)}"
    for c in front.efficient[1:]:  # a budget between two choices gets the cheaper one
        steps += f"H{x(c.share)}V{y(c.error)}"
    points, legend = [], [("s0", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "efficient: a rate per block")]
    for c in thin(front.efficient, chosen):
        points.append(_point(legend[0][1], "s0", x, y, c, "efficient"))
    rates = list(dict.fromkeys(_rate(name) for name in front.homogeneous))
    for i, rate in enumerate(rates):
        legend.append((rate_class(rate, order or rates), SHAPES[i % len(SHAPES)], f"{rate} only, 1 to all blocks"))
    for name, c in front.homogeneous.items():
        cls, shape, _ = legend[1 + rates.index(_rate(name))]
        points.append(_point(shape, cls, x, y, c, f"{name}, one rate only"))
    if chosen:
        legend.append(("chosen", "M-8 0a8 8 0 1 0 16 0a8 8 0 1 0-16 0", "chosen"))
        points.append(_point(legend[-1][1], "chosen", x, y, chosen, "chosen"))
    points.sort(key=lambda point: point[0])
    marks = []
    for n, (px, py, shape, cls, text) in enumerate(points):
        where = {"tabindex": -1 if n else 0, "transform": f"translate({px} {py})"}
        inner = tag("title", text), tag("path", d=shape)
        marks.append(tag("g", *inner, class_=f"point {cls}", role="img", aria_label=text, **where))
    label = (
        f"Sum of block errors against cost ({front.unit}): {len(front.efficient)} efficient choices and "
        f"{len(front.homogeneous)} models with one rate. Arrow keys walk through the points."
    )
    frame = _frame(x, y, f"cost of self-attention ({front.unit}), share of softmax", "sum of errors", percent=True)
    curve = tag("path", d=steps, class_="line s0")
    svg = tag("svg", frame, curve, tag("g", marks, class_="points"), **_svg(role="group", label=label))
    keys = [
        tag("li", _key(tag("path", d=shape, transform="translate(10 10)", class_=f"mark {cls}"), 20), text)
        for cls, shape, text in legend
    ]
    readout = tag("p", "Point at a mark, or tab to one and use the arrow keys.", class_="readout", aria_hidden="true")
    return tag("figure", svg, readout, tag("ul", keys, class_="legend"), class_="chart pareto")


def thin(choices: Sequence[Choice], chosen: Choice | None = None) -> list[Choice]:
    """Returns at most `MOST_POINTS` of the choices, evenly, ends included, and always one like `chosen` if there is."""
    index = set(np.linspace(0, len(choices) - 1, min(MOST_POINTS, len(choices))).round().astype(int).tolist())
    index |= {i for i, c in enumerate(choices) if chosen and c.blocks == chosen.blocks}
    return [choices[i] for i in sorted(index)]


def describe(choice: Choice) -> str:
    """Returns a choice's numbers and rates in words."""
    counts = {rate: choice.blocks.count(rate) for rate in dict.fromkeys(choice.blocks)}
    rates = ", ".join(f"{count} x {rate}" for rate, count in counts.items())
    return f"cost {choice.share:.1%} of softmax, error {choice.error:.3g}: {rates}"


def _point(shape: str, cls: str, x: Axis, y: Axis, choice: Choice, what: str) -> tuple[float, float, str, str, str]:
    return x(choice.share), y(choice.error), shape, cls, f"{what}: {describe(choice)}"


def _rate(name: str) -> str:
    return name.lstrip("0123456789") or name


def _short(value: float) -> str:
    """Returns a tick's number in few characters: 1e-4, 0.15, 2000."""
    return f"{value:.3g}" if not 0 < abs(value) < 1e-2 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _svg(role: str, label: str) -> dict[str, str]:
    return {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": role, "aria_label": label}


def _key(mark: Html, width: int) -> Html:
    return tag("svg", mark, viewBox=f"0 0 {width} {20 if width == 20 else 12}", class_="key", aria_hidden="true")


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, percent: bool = False) -> list[Html]:
    """Grid, numbers and labels; the picture's text is in its aria-label, so this is hidden from screen readers."""
    parts = [tag("path", d=f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}", class_="axis")]
    for value in x.ticks():
        text = f"{value:.0%}" if percent else f"{value:g}"
        parts.append(tag("text", text, x=x(value), y=BOTTOM + 16, text_anchor="middle"))
    for value in y.ticks():
        parts.append(tag("path", d=f"M{LEFT} {y(value)}H{RIGHT}", class_="grid"))
        parts.append(tag("text", _short(value), x=LEFT - 5, y=y(value) + 4, text_anchor="end"))
    middle = (TOP + BOTTOM) / 2
    parts.append(tag("text", x_label, x=(LEFT + RIGHT) / 2, y=HEIGHT - 10, text_anchor="middle"))
    parts.append(tag("text", y_label, transform=f"translate(12 {middle}) rotate(-90)", text_anchor="middle"))
    return [tag("g", parts, aria_hidden="true")]

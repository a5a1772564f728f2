"""Pictures of a run as PNG files: error table, cost against error, training curves, and frames of videos side by side.

matplotlib is imported when a picture is drawn (it takes a second), through its object interface only, so that nothing
global is changed; every file is written atomically.
"""

import functools
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from hybrid_dit.atomic import atomic_path
from hybrid_dit.cost import parse_name
from hybrid_dit.errors import UserError

_DPI = 110
_MORE_FONTS = (  # for what matplotlib's own lacks: Wan's prompts are Chinese, too
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "SimHei"),
    *("Microsoft YaHei", "PingFang SC", "Droid Sans Fallback", "Noto Emoji", "Segoe UI Symbol"),
)
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe-Ito: colour-blind safe


def error_heatmap(
    path: str | Path, errors: ArrayLike, labels: Sequence[str], choice: ArrayLike | None = None, title: str = ""
) -> None:
    """Draws the distillation error of every block (columns) at every rate (rows), with the chosen cells framed.

    Args:
        path: PNG file.
        errors: [B, R], finite.
        labels: name of each rate.
        choice: chosen rate index of each block, [B]; None frames nothing.
        title: of the picture.
    """
    from matplotlib.patches import Rectangle

    errors = np.asarray(errors, np.float64)
    if errors.ndim != 2 or errors.shape[1] != len(labels) or not np.isfinite(errors).all():
        raise UserError(f"errors must be a finite table [blocks, {len(labels)} rates], got {list(errors.shape)}")
    blocks, rates = errors.shape
    figure = _figure(max(5.0, 2.2 + 0.46 * blocks), 1.5 + 0.42 * rates)
    axes = figure.add_subplot()
    image = axes.imshow(errors.T, aspect="auto", cmap="YlOrRd", vmin=min(0.0, errors.min()), vmax=errors.max() or 1.0)
    middle = (image.norm.vmin + image.norm.vmax) / 2
    for b, r in np.ndindex(blocks, rates):
        colour = "white" if errors[b, r] > middle * 1.2 else "black"
        axes.text(b, r, _short(errors[b, r]), ha="center", va="center", fontsize=7.5, color=colour)
    if choice is not None:
        for b, r in enumerate(np.asarray(choice)):
            axes.add_patch(Rectangle((b - 0.46, r - 0.44), 0.92, 0.88, fill=False, edgecolor=_COLOURS[0], lw=2.5))
        title = f"{title}   (framed: chosen rate)".strip()
    axes.set_xticks(range(blocks))
    axes.set_yticks(range(rates), labels, parse_math=False)
    axes.tick_params(length=0)
    axes.set(xlabel="block", ylabel="attention")
    figure.colorbar(image, ax=axes, pad=0.01, label="error vs softmax")
    _save(figure, path, title)


def pareto_plot(
    path: str | Path,
    points: Sequence[tuple[Real, Real]],
    homogeneous: Mapping[str, tuple[Real, Real]] | None = None,
    chosen: tuple[Real, Real] | None = None,
    cost_label: str = "cost (FLOPs)",
    title: str = "",
) -> None:
    """Draws total error against total cost: the efficient selections as a line, homogeneous models by rate.

    Args:
        path: PNG file.
        points: (cost, error) of efficient selections (`hybrid_dit.knapsack.pareto`), drawn as steps.
        homogeneous: {name as `hybrid_dit.cost.parse_name` reads it, "15R4": (cost, error)}.
        chosen: (cost, error) of the selection in use.
        cost_label: what cost is, and its unit.
        title: of the picture.
    """
    if not len(points):
        raise UserError("there are no efficient points to draw")
    figure = _figure(7.5, 5.0)
    axes = figure.add_subplot()
    cost, error = np.asarray(sorted(points), np.float64).T
    marker = "o" if len(cost) <= 100 else ""
    # Steps: a budget between two selections gets the cheaper one.
    axes.step(
        cost, error, where="post", marker=marker, color=_COLOURS[0], ms=3.5, lw=1.5, label="efficient (rate per block)"
    )
    rates: dict[str, list[tuple[int, Real, Real]]] = {}
    for name, spot in (homogeneous or {}).items():
        count, label = parse_name(name)
        rates.setdefault(label, []).append((count, *spot))
    for i, (label, spots) in enumerate(rates.items()):
        counts, *xy = zip(*sorted(spots))
        colour = _COLOURS[1 + i % (len(_COLOURS) - 1)]
        axes.plot(*xy, "o:", color=colour, ms=13, mec="white", lw=1, label=f"{label} only (number: converted blocks)")
        for count, *spot in zip(counts, *xy):
            axes.text(*spot, str(count), fontsize=7.5, color="white", weight="bold", ha="center", va="center_baseline")
    if chosen is not None:
        # An arrow from below, where nothing else can be: the model it competes with is often just above.
        arrow = {"arrowstyle": "-|>", "color": "black"}
        axes.annotate("chosen", chosen, (-55, -32), textcoords="offset points", weight="bold", arrowprops=arrow)
    axes.set(xlabel=cost_label, ylabel="sum of errors vs softmax")
    axes.margins(0.08)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, markerscale=0.7)
    _save(figure, path, title)


def rates_along_front(
    path: str | Path,
    costs: Sequence[Real],
    choices: ArrayLike,
    labels: Sequence[str],
    chosen: Real | None = None,
    cost_label: str = "budget",
    title: str = "",
) -> None:
    """Draws the best rate of every block (rows) under every budget (columns), one colour per rate.

    Args:
        path: PNG file.
        costs: of the efficient selections, ascending, [n].
        choices: rate index of every block of each, [n, B].
        labels: name of each rate, from the costliest to the cheapest.
        chosen: budget in use; None marks nothing.
        cost_label: what the costs are.
        title: of the picture.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    costs, choices = np.asarray(costs, np.float64), np.asarray(choices)
    if choices.ndim != 2 or len(choices) != len(costs) or not len(costs) or (np.diff(costs) <= 0).any():
        raise UserError(f"expected rising costs and one choice each, got {list(costs.shape)} and {list(choices.shape)}")
    span = costs[-1] - costs[0] or max(abs(costs[-1]), 1.0)
    edges = np.append(costs, costs[-1] + 0.03 * span)  # a selection is the answer from its cost to the next one's
    colours = ["#b0b0b0", *colormaps["plasma"](np.linspace(0.9, 0.1, len(labels) - 1))]  # darker is cheaper
    figure = _figure(9.0, 1.9 + 0.26 * choices.shape[1])
    axes = figure.add_subplot()
    axes.pcolormesh(
        edges,
        np.arange(choices.shape[1] + 1) - 0.5,
        choices.T,
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(labels) - 0.5,
    )
    for b in range(1, choices.shape[1]):
        axes.axhline(b - 0.5, color="white", lw=1.2)
    if chosen is not None:
        axes.axvline(min(max(chosen, edges[0]), edges[-1]), color="black", lw=1.5, ls="--")
        axes.annotate(
            "budget",
            (chosen, 1.0),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            weight="bold",
            fontsize=9,
        )
    axes.set(xlabel=cost_label, ylabel="block")
    axes.set_yticks(range(choices.shape[1]))
    axes.invert_yaxis()
    patches = [Patch(color=colour, label=_plain(label)) for colour, label in zip(colours, labels)]
    axes.legend(handles=patches, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path, title)


def loss_curves(
    path: str | Path,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    log: bool = True,
    value_label: str = "loss",
    title: str = "",
) -> None:
    """Draws curves over training steps, one per name.

    Args:
        path: PNG file.
        curves: {name: (steps [n], values [n])}.
        log: logarithmic values; points that are not positive and finite are left out then.
        value_label: what is drawn, and its unit if it has one.
        title: of the picture.
    """
    figure = _figure(7.5, 4.5)
    axes = figure.add_subplot()
    for i, (name, (steps, values)) in enumerate(curves.items()):
        steps, values = np.asarray(steps), np.asarray(values, np.float64)
        if steps.shape != values.shape or steps.ndim != 1:
            raise UserError(f"curve {name}: {list(steps.shape)} steps, but {list(values.shape)} values")
        shown = np.isfinite(values) & ((values > 0) | (not log))
        style = ("-", "--", ":")[i // len(_COLOURS) % 3]
        marker = "o" if shown.sum() < 30 else ""
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(steps[shown], values[shown], style, color=colour, marker=marker, ms=3, lw=1.4, label=_plain(name))
    if log:
        axes.set_yscale("log")
    axes.set(xlabel="training step", ylabel=value_label)
    axes.grid(alpha=0.3, which="both" if log else "major")
    if curves:
        # Beside the axes, since a curve may be anywhere in them.
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=math.ceil(len(curves) / 20))
    _save(figure, path, title)


def interval_curves(
    path: str | Path,
    curves: Mapping[str, tuple[Sequence[Real], Sequence[Sequence[Real | None]]]],
    x_label: str,
    value_label: str,
    title: str = "",
) -> None:
    """Draws curves with bars for the intervals of their points.

    Args:
        path: PNG file.
        curves: {name: (x [n], [mean, low, high] of every point)}; an end that is None draws no bar.
        x_label: what x is.
        value_label: what is drawn.
        title: of the picture.
    """
    figure = _figure(7.5, 4.5)
    axes = figure.add_subplot()
    for i, (name, (x, points)) in enumerate(curves.items()):
        mean, low, high = np.array(points, np.float64).reshape(-1, 3).T  # None becomes NaN
        bars = np.nan_to_num(np.stack([mean - low, high - mean]))
        style = {"color": _COLOURS[i % len(_COLOURS)], "marker": "o", "ms": 3, "lw": 1.4, "capsize": 3}
        axes.errorbar(x, mean, yerr=np.maximum(bars, 0), label=_plain(name), **style)
    axes.set(xlabel=x_label, ylabel=value_label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(frameon=False)
    _save(figure, path, title)


def score_bars(path: str | Path, models: Mapping[str, Mapping[str, Real]], value_label: str, title: str = "") -> None:
    """Draws scores as horizontal bars, one row per score and one bar per model in it; a missing score has none.

    Args:
        path: PNG file.
        models: {model: {score: value}}; the first model's order of scores is kept.
        value_label: what is drawn, and its unit.
        title: of the picture.
    """
    names = list(dict.fromkeys(name for scores in models.values() for name in scores))
    if not names:
        raise UserError("there are no scores to draw")
    figure = _figure(7.5, 1.9 + len(names) * (0.14 + 0.16 * len(models)))
    axes = figure.add_subplot()
    thick = 0.8 / len(models)
    for i, (model, scores) in enumerate(models.items()):
        rows = [r for r, name in enumerate(names) if name in scores]
        values = [scores[names[r]] for r in rows]
        places = [r - 0.4 + thick * (i + 0.5) for r in rows]
        bars = axes.barh(places, values, thick * 0.9, color=_COLOURS[i % len(_COLOURS)], label=_plain(model))
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.01)
    axes.grid(alpha=0.3, axis="x")
    axes.set(xlabel=value_label)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path, title)


def contact_sheet(
    path: str | Path, videos: Mapping[str, np.ndarray], frames: int = 6, title: str = "", fps: int | float | None = None
) -> None:
    """Draws variants as rows and evenly spaced frames (first and last included) as columns.

    Args:
        path: PNG file.
        videos: {variant: uint8 [t, y, x, 3]}; lengths and sizes may differ.
        frames: columns.
        title: the prompt.
        fps: adds the time of each frame to its number.
    """
    if not videos:
        raise UserError("there are no videos for the contact sheet")
    for name, video in videos.items():
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
            raise UserError(
                f"contact sheet, {name}: a video is uint8 [frames, height, width, 3], got {video.dtype} "
                f"{list(video.shape)}"
            )
    columns = max(1, min(frames, max(len(video) for video in videos.values())))
    width = min(2.4, max(1.3, 15.0 / columns))  # of a cell in inches
    lengths = [len(video) for video in videos.values()]
    captioned = [n != before for n, before in zip(lengths, [None, *lengths])]  # rows whose frame numbers are news
    left, gap, caption = 1.2, 0.05, 0.2
    heights = [width * v.shape[1] / v.shape[2] + gap + caption * c for v, c in zip(videos.values(), captioned)]
    # Every place is known, so nothing is left to an automatic layout, which takes about as long as the drawing.
    top = sum(heights) + 0.1
    wide, high = left + (width + gap) * columns + 0.1, top + 0.25 + 0.22 * len(_wrapped(title, left + width * columns))
    figure = _figure(wide, high, layout=None)
    for row, (name, video) in enumerate(videos.items()):
        small = video.shape[2] < width * _DPI  # keep the pixels of small videos visible; smooth large ones
        tall = heights[row] - gap - caption * captioned[row]
        bottom = top - sum(heights[: row + 1])
        text = "\n".join(textwrap.wrap(name, 14)) or name
        where = (left - 0.1) / wide, (bottom + tall / 2) / high
        figure.text(*where, text, ha="right", va="center", fontsize=10, parse_math=False)
        for column, t in enumerate(np.round(np.linspace(0, len(video) - 1, columns)).astype(int)):
            x = left + column * (width + gap)
            axes = figure.add_axes((x / wide, bottom / high, width / wide, tall / high), xticks=[], yticks=[])
            axes.imshow(video[t], interpolation="nearest" if small else "antialiased", aspect="auto")
            if captioned[row]:
                time = "" if fps is None else f" · {t / fps:.2f} s"
                axes.set_title(f"frame {t}{time}", fontsize=8, pad=2)
    _save(figure, path, title)


def _figure(width: float, height: float, layout: str | None = "constrained"):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout=layout, facecolor="white")


def _wrapped(title: str, width: float) -> list[str]:
    return textwrap.wrap(title, int(width * 10.5))  # characters of 12 pt that a line holds


def _save(figure, path: str | Path, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    path = Path(path)
    if path.suffix != ".png":
        raise UserError(f"can't write a picture to {path}: the name must end in .png")
    if title:
        figure.suptitle("\n".join(_wrapped(title, figure.get_figwidth())), fontsize=12, parse_math=False)
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_fontfamily(_families())
    with atomic_path(path) as temporary, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(temporary, format="png", dpi=_DPI)
    missing = {str(w.message) for w in caught if "missing from font" in str(w.message)}  # one for each character
    if missing:
        print(f"note: {path.name} shows boxes for {len(missing)} characters that no font here has", flush=True)
    for w in caught:
        if str(w.message) not in missing:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)


@functools.cache
def _families() -> list[str]:
    """Returns fonts to take characters from, the first that has one: matplotlib's own, then what is installed."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _MORE_FONTS if name in installed)]


def _short(value: float) -> str:
    """Returns a number in at most five characters where possible."""
    return "0" if value == 0 else f"{value:.2g}" if abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def _plain(text: str) -> str:
    """Returns a legend entry that matplotlib neither hides (leading underscore) nor reads as mathematics."""
    return text.replace("$", r"\$").lstrip("_")

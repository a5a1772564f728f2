"""A picture of what attention costs as videos get longer, like the paper's compute-versus-duration figure."""

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

from hybrid_dit.errors import UserError
from hybrid_dit.pictures import _COLOURS, _figure, _plain, _save

Curves = Mapping[str, Sequence[tuple[Real, Real]]]


def draw(path: str | Path, panels: Mapping[str, tuple[Curves, Curves]], title: str = "") -> None:
    """Draws FLOPs (above) and seconds (below, if any were measured) against frames, a column for each size of videos.

    Args:
        path: PNG file.
        panels: {height x width: ({label: (frames, FLOPs)}, {label: (frames, seconds)})}; curves without points are
            left out.
        title: of the picture.

    Raises:
        UserError: there are no panels.
    """
    if not panels:
        raise UserError("there are no videos to draw the cost of")
    from matplotlib.ticker import EngFormatter

    timed = any(points for _, seconds in panels.values() for points in seconds.values())
    rows = 1 + timed
    figure = _figure(1.2 + 4.4 * len(panels), 0.6 + 3.4 * rows)
    grid = figure.subplots(rows, len(panels), squeeze=False, sharex="col")
    names = list(dict.fromkeys(label for curves in panels.values() for part in curves for label in part))
    colours = dict(zip(names, ("black", *_COLOURS[:-1])))
    for column, (size, curves) in enumerate(panels.items()):
        for row, part in enumerate(curves[:rows]):
            axes = grid[row, column]
            for label, points in part.items():
                if points:
                    x, y = zip(*points)
                    marker = "o" if row or len(points) == 1 else ""
                    axes.plot(x, y, marker=marker, ms=3.5, lw=1.6, color=colours[label], label=_plain(label))
            axes.set_ylim(bottom=0.0)
            axes.yaxis.set_major_formatter(EngFormatter("s" if row else "FLOP"))
            axes.grid(alpha=0.3)
        grid[0, column].set_title(size, fontsize=10)
        grid[-1, column].set_xlabel("frames")
    grid[0, 0].set_ylabel("counted")
    if timed:
        grid[1, 0].set_ylabel("measured")
    grid[0, 0].legend(frameon=False, loc="upper left")
    _save(figure, path, title)

"""Pictures appear whole, in a plausible size, and show the data they were given."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from hybrid_dit import pictures
from hybrid_dit.errors import UserError

ERRORS = np.array([[0, 0.1, 0.3], [0, 0.2, 0.05], [0, 2e-5, 0.4], [0, 0.03, 0.06]])
LABELS = ["softmax", "R2", "R8"]
POINTS = [(10, 0.0), (8, 0.1), (5, 0.5)]  # costs may be integers


def _read(path):
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width, _ = image.shape
    assert 250 < height < 2000 and 300 < width < 3000, image.shape
    assert image.std() > 5, "blank"
    assert (image[0] > 200).all() and (image[:, -1] > 200).all(), "something is cut off at the border"
    return image


def _differs(draw, tmp_path, first, second):
    """Draws twice; returns the share of pixels that differ, after checking that equal data give equal pictures."""
    images = []
    for name, arguments in (("a", first), ("b", second), ("c", first)):
        draw(tmp_path / f"{name}.png", *arguments)
        images.append(_read(tmp_path / f"{name}.png"))
    assert np.array_equal(images[0], images[2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]
    assert images[0].shape == images[1].shape
    return (images[0] != images[1]).any(-1).mean()


def test_error_heatmap_shows_errors_and_choice(tmp_path):
    changed = ERRORS.copy()
    changed[1, 1] = 0.35
    # One of 12 cells, which fill about half of the picture.
    assert 0.01 < _differs(pictures.error_heatmap, tmp_path, (ERRORS, LABELS), (changed, LABELS)) < 0.15
    choices = [0, 1, 2, 0], [0, 1, 2, 1]
    assert _differs(pictures.error_heatmap, tmp_path, *((ERRORS, LABELS, choice) for choice in choices)) > 1e-3


def test_error_heatmap_grows_with_the_model(tmp_path):
    pictures.error_heatmap(tmp_path / "4.png", ERRORS, LABELS)
    pictures.error_heatmap(tmp_path / "40.png", np.tile(ERRORS, (10, 1)), LABELS)
    assert Image.open(tmp_path / "40.png").width > 2 * Image.open(tmp_path / "4.png").width


def test_error_heatmap_of_zeros(tmp_path):
    pictures.error_heatmap(tmp_path / "a.png", np.zeros((4, 3)), LABELS)
    assert _read(tmp_path / "a.png").shape


def test_pareto_plot_shows_every_kind_of_point(tmp_path):
    full = (POINTS, {"2R4": (9.0, 0.3), "3R4": (8.0, 0.4), "2linear": (7.0, 0.45)}, (8.0, 0.1))
    for poorer in (([*POINTS[:2], (5, 0.45)], *full[1:]), (POINTS, {"2R4": (9.0, 0.3)}, full[2]), (*full[:2], None)):
        assert _differs(pictures.pareto_plot, tmp_path, full, poorer) > 1e-4


FRONT = [5.0, 8.0, 10.0], np.array([[2, 2, 1, 2], [0, 2, 1, 0], [0, 0, 0, 0]]), LABELS


def test_rates_along_front_show_every_choice_and_the_budget(tmp_path):
    costs, choices, labels = FRONT
    changed = choices.copy()
    changed[1, 2] = 2  # one block of four, over 2 of 5 units of cost
    assert 0.02 < _differs(pictures.rates_along_front, tmp_path, FRONT, (costs, changed, labels)) < 0.1
    marked = (*FRONT, 7.0), (*FRONT, 9.0)
    assert _differs(pictures.rates_along_front, tmp_path, *marked) > 1e-3


def test_rates_along_a_front_of_one_selection(tmp_path):
    pictures.rates_along_front(tmp_path / "a.png", [3], [[0, 1, 1]], LABELS)
    assert _read(tmp_path / "a.png").shape


@pytest.mark.parametrize("log", [True, False])
def test_loss_curves_show_values(tmp_path, log):
    steps = np.arange(50)
    curves = {"block 0": (steps, np.exp(-steps / 9)), "$x_1$ of _a": (steps, np.exp(-steps / 30))}
    other = {**curves, "$x_1$ of _a": (steps, np.exp(-steps / 12))}
    assert _differs(pictures.loss_curves, tmp_path, (curves, log), (other, log)) > 1e-3


def test_loss_curves_leave_out_what_a_logarithm_cannot_show(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        broken = {"a": (np.arange(4), [1.0, np.nan, 0.0, 0.1])}, True
        clean = {"a": (np.array([0, 3]), [1.0, 0.1])}, True
        assert _differs(pictures.loss_curves, tmp_path, broken, clean) == 0


def _video(frames, colour, height=16, width=16):
    """A video whose first and last frames are of one colour and whose others are black."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[[0, -1]] = colour
    return video


def _cells(image, colour):
    """Number of connected horizontal runs of a colour in the row of pixels that has most of it."""
    mask = np.abs(image - np.array(colour)).max(-1) < 8
    row = mask[mask.sum(1).argmax()].astype(int)
    return int((np.diff(row, prepend=0) == 1).sum())


def test_interval_curves_show_values_and_intervals(tmp_path):
    def curves(mean, high):
        return {"R2": ([900.0, 30.0], [[0.3, 0.2, 0.4], [mean, 0.1, high]]), "_$": ([5.0], [[0.2, None, None]])}

    labels = "timestep", "relative error", "a_b $5"
    for changed in (curves(0.15, 0.4), curves(0.2, 0.35)):
        assert _differs(pictures.interval_curves, tmp_path, (curves(0.2, 0.4), *labels), (changed, *labels)) > 1e-4


def test_score_bars_have_a_row_per_score_and_a_bar_per_model(tmp_path):
    full = {"teacher": {"scene": 50.0, "total": 80.0}, "15R2": {"scene": 40.0, "total": 79.0}}
    less = full | {"15R2": {"total": 79.0}}
    assert _differs(pictures.score_bars, tmp_path, (full, "percent"), (less, "percent")) > 1e-3
    pictures.score_bars(tmp_path / "16.png", {"teacher": {f"score {i}": 1.0 * i for i in range(16)}}, "percent")
    assert _read(tmp_path / "16.png").shape[0] > 2 * _read(tmp_path / "a.png").shape[0]


def test_contact_sheet_has_variants_as_rows_and_frames_as_columns(tmp_path):
    colours = {"teacher": (250, 10, 20), "15R4 fine-tuned": (10, 240, 30), "linear": (20, 30, 230)}
    lengths = (9, 9, 17)
    videos = {name: _video(n, colour) for n, (name, colour) in zip(lengths, colours.items())}
    title = "costs $5 or $6, 50% of a long prompt " * 4
    pictures.contact_sheet(tmp_path / "s.png", videos, frames=5, title=title, fps=16)
    image = _read(tmp_path / "s.png")
    tops = []
    for colour in colours.values():
        assert _cells(image, colour) == 2  # the first and the last of 5 columns
        mask = np.abs(image - np.array(colour)).max(-1) < 8
        tops.append(np.flatnonzero(mask.any(1))[0])
        columns = np.flatnonzero(mask.any(0))
        assert columns[-1] - columns[0] > 0.7 * image.shape[1]
    assert tops == sorted(tops)


def test_contact_sheet_keeps_proportions_and_shows_short_videos_once(tmp_path):
    pictures.contact_sheet(tmp_path / "s.png", {"wide": _video(2, (250, 0, 0), 16, 32)}, frames=6)
    image = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).astype(int)
    assert _cells(image, (250, 0, 0)) == 2  # two frames, two columns
    mask = np.abs(image - np.array((250, 0, 0))).max(-1) < 8
    height, width = mask.any(1).sum(), mask[mask.sum(1).argmax()].sum() / 2
    assert width / height == pytest.approx(2, rel=0.05)  # a pixel or two of border and rounding


def test_characters_without_a_font_are_boxes_and_one_note(tmp_path, capsys, recwarn):
    pictures._families.cache_clear()
    video = np.zeros((2, 16, 16, 3), np.uint8)
    unassigned = "a cat \U000f0000\U000f0001"  # private use: no font has them
    pictures.contact_sheet(tmp_path / "a.png", {"video": video}, title=unassigned)
    assert capsys.readouterr().out == "note: a.png shows boxes for 2 characters that no font here has\n"
    pictures.contact_sheet(tmp_path / "b.png", {"video": video}, title="a cat")
    assert capsys.readouterr().out == "" and not recwarn


def test_matplotlib_is_left_alone_and_loaded_late():
    code = (
        "import sys, numpy as np, tempfile, hybrid_dit.pictures as p\n"
        "assert 'matplotlib' not in sys.modules\n"
        "p.error_heatmap(tempfile.mkdtemp() + '/a.png', np.ones((2, 2)), ['a', 'b'])\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "draw,message",
    [
        (lambda folder: pictures.pareto_plot(folder / "a.pdf", POINTS), "must end in .png"),
        (lambda folder: pictures.pareto_plot(folder / "a.png", []), "no efficient points"),
        (lambda folder: pictures.error_heatmap(folder / "a.png", ERRORS, ["R2"]), r"1 rates\], got \[4, 3\]"),
        (lambda folder: pictures.error_heatmap(folder / "a.png", ERRORS * np.nan, LABELS), "finite"),
        (lambda folder: pictures.rates_along_front(folder / "a.png", [2, 1], FRONT[1][:2], LABELS), "rising costs"),
        (lambda folder: pictures.loss_curves(folder / "a.png", {"q": ([1, 2], [1.0])}), "curve q"),
        (lambda folder: pictures.score_bars(folder / "a.png", {"teacher": {}}, "percent"), "no scores"),
        (lambda folder: pictures.contact_sheet(folder / "a.png", {}), "no videos"),
        (lambda folder: pictures.contact_sheet(folder / "a.png", {"v": np.zeros((2, 4, 4, 3))}), "v: a video is uint8"),
    ],
)
def test_bad_input_is_explained(tmp_path, draw, message):
    with pytest.raises(UserError, match=message):
        draw(tmp_path)
    assert list(tmp_path.iterdir()) == []

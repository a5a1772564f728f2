import numpy as np
import pytest

from hybrid_dit.errors import UserError
from hybrid_dit.report import films
from hybrid_dit.report.films import Row, embed, find, read_clip, shrink
from hybrid_dit.video_io import read_mp4, write_mp4


def noise(seed=0, frames=3, height=32, width=48):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for index, prompt in enumerate(("b - 1", "a\nb", "c")):
        for name in ("finetuned", "mine", "teacher"):
            write_mp4(folder / name / f"{prompt}-{index}.mp4", noise(index), fps=12, crf=0)
    write_mp4(folder / "undistilled" / "c-2.mp4", noise(5), fps=12, crf=0)
    (folder / "teacher" / ".partial-1.mp4").write_bytes(b"")
    (folder / "teacher" / "stray.mp4").write_bytes(b"")
    return folder


def size_of(rows):
    return sum(len(clip.data) for row in rows for clip in row.clips.values())


def test_rows_are_found_by_index_with_known_variants_first(folder):
    rows = find(folder)
    assert [(row.index, row.prompt) for row in rows] == [(0, "b - 1"), (1, "a\nb"), (2, "c")]
    assert list(rows[0].clips) == ["teacher", "finetuned", "mine"]
    assert list(rows[2].clips) == ["teacher", "undistilled", "finetuned", "mine"]


def test_what_fits_is_embedded_as_it_is(folder):
    rows = find(folder)
    total = sum(path.stat().st_size for row in rows for path in row.clips.values())
    shown = embed(rows, total)
    assert shown.notes == ()
    clips = [(clip, path) for a, b in zip(shown.rows, rows) for clip, path in zip(a.clips.values(), b.clips.values())]
    assert all(clip.data == path.read_bytes() for clip, path in clips)
    assert {(c.width, c.height, c.frames, c.fps) for c, _ in clips} == {(48, 32, 3, 12.0)}


def test_one_byte_less_and_all_are_compressed_which_is_said(folder):
    rows = find(folder)
    total = sum(path.stat().st_size for row in rows for path in row.clips.values())
    shown = embed(rows, total - 1)
    assert len(shown.rows) == 3 and size_of(shown.rows) < total
    [note] = shown.notes
    assert "compressed more than the originals" in note and "48 x 32, x264 crf 20" in note


def test_rows_that_do_not_fit_even_so_are_left_out_from_the_end_which_is_said(folder):
    rows = find(folder)
    side, crf = films.LEVELS[-1]
    first = sum(len(shrink(read_clip(path), side, crf).data) for path in rows[0].clips.values())
    shown = embed(rows, first)
    assert [row.index for row in shown.rows] == [0] and size_of(shown.rows) == first
    assert "2 of 3 prompts are left out to keep the page small." in shown.notes
    nothing = embed(rows, 0)
    assert nothing.rows == () and nothing.notes == ("3 of 3 prompts are left out to keep the page small.",)


def test_no_more_prompts_than_browsers_play(folder):
    [row, *_] = find(folder)
    shown = embed([Row("p", i, row.clips) for i in range(films.MOST + 1)], 10**9)
    assert len(shown.rows) == films.MOST and shown.notes == (
        f"The first {films.MOST} of {films.MOST + 1} prompts are shown.",
    )


def test_unreadable_files_are_left_out_by_name(folder, tmp_path):
    [row, *_] = find(folder)
    broken = tmp_path / "teacher" / "x-0.mp4"
    broken.parent.mkdir()
    broken.write_bytes(b"no video")
    with pytest.raises(UserError, match="x-0.mp4 is not a readable video"):
        read_clip(broken)
    shown = embed(
        [Row("p", 0, {"teacher": broken, "finetuned": row.clips["finetuned"]}), Row("q", 1, {"a": broken})], 10**9
    )
    assert [list(r.clips) for r in shown.rows] == [["finetuned"]]
    assert "teacher/x-0.mp4" in shown.notes[0]


@pytest.mark.parametrize(
    "height, width, side, expected", [(64, 96, 32, (32, 48)), (96, 64, 35, (52, 34)), (32, 48, 99, (32, 48))]
)
def test_shrunk_clips_have_even_sizes_the_same_shape_and_length(tmp_path, height, width, side, expected):
    flat = np.full((3, height, width, 3), 100, np.uint8)
    write_mp4(tmp_path / "a.mp4", flat, fps=10)
    small = shrink(read_clip(tmp_path / "a.mp4"), side, 20)
    assert ((small.height, small.width), small.frames, small.fps) == (expected, 3, 10.0)
    (tmp_path / "b.mp4").write_bytes(small.data)
    # Flat gray stays what it is but for the rounding of two colour conversions, at most one level each way.
    assert np.abs(read_mp4(tmp_path / "b.mp4").astype(int) - 100).max() <= 2

"""Clips from real files: which frames, which part of the picture, which bucket, and what is refused."""

import struct
from fractions import Fraction

import numpy as np
import pytest

from hybrid_dit.data.clips import Bucket, nearest, parse_bucket, read_clip, resample
from hybrid_dit.errors import UserError
from hybrid_dit.video_io import read_mp4, write_mp4

WIDE, SQUARE, TALL = Bucket(9, 32, 64), Bucket(9, 32, 32), Bucket(9, 64, 32)


def video(frames, height, width):
    """Frame i has the brightness 8 i on the left, and a red right half."""
    made = np.zeros((frames, height, width, 3), np.uint8)
    made[...] = 8 * np.arange(frames)[:, None, None, None] % 240
    made[:, :, width // 2 :] = (200, 20, 20)
    return made


def times(*seconds):
    return [(Fraction(s), i) for i, s in enumerate(seconds)]


def at(fps, count, start=0):
    return [(Fraction(start) + Fraction(i, fps), i) for i in range(count)]


@pytest.mark.parametrize(
    "frames, fps, expected",
    [
        (at(16, 5), 16, [0, 1, 2, 3, 4]),
        (at(16, 5, start=7), 16, [0, 1, 2, 3, 4]),  # times count from the first frame
        (at(32, 6), 16, [0, 2, 4]),
        (at(8, 3), 16, [0, 0, 1, 1, 2, 2]),  # a tie goes to the earlier frame
        (at(24, 7), 16, [0, 1, 3, 4, 6]),  # frame 1.5 and 4.5: ties again
        (times("0", "0.062", "0.125", "0.188", "0.250"), 16, [0, 1, 2, 3, 4]),  # rounded to milliseconds
        (times("0", "0.5", "0.4", "0.5", "1"), 2, [0, 1, 4]),  # out of order
        (times("3"), 16, [0]),
        ([], 16, []),
    ],
)
def test_frames_are_those_nearest_in_time(frames, fps, expected):
    assert list(resample(frames, Fraction(fps))) == expected


def test_the_nearest_aspect_ratio_wins_then_the_longest():
    assert nearest([TALL, WIDE, SQUARE], 16 / 9) == [WIDE]
    assert nearest([TALL, WIDE, SQUARE], 1.0) == [SQUARE]
    assert nearest([TALL, WIDE, SQUARE], 0.4) == [TALL]
    short, large = Bucket(5, 32, 64), Bucket(5, 64, 128)
    assert nearest([short, SQUARE, WIDE], 2.5) == [WIDE, short]
    assert nearest([short, large], 2.5) == [large]  # of the same ratio, more pixels


@pytest.mark.parametrize("size, bucket", [((48, 96), WIDE), ((40, 44), SQUARE), ((96, 40), TALL)])
def test_a_clip_has_the_shape_of_its_bucket_and_the_middle_of_the_picture(tmp_path, size, bucket):
    write_mp4(tmp_path / "a.mp4", video(12, *size), crf=1)
    chosen, clip = read_clip(tmp_path / "a.mp4", [WIDE, SQUARE, TALL], 16, 1.5)
    assert chosen == bucket and clip.shape == (*bucket, 3) and clip.dtype == np.uint8
    left = clip[:, 4:-4, 2 : bucket.width // 2 - 3]
    # The left half, scaled and cut symmetrically, stays the left half. 8-bit limited-range YUV loses up to 3 (see
    # test_video_io), compression at crf 1 and filter ringing on flat areas a level or two; frames are 8 apart.
    assert np.abs(left.astype(int) - 8 * np.arange(9)[:, None, None, None]).max() < 6
    assert (clip[:, 4:-4, bucket.width // 2 + 3 :, 0] > 150).all()


def test_scaling_keeps_proportions(tmp_path):
    picture = np.zeros((1, 96, 128, 3), np.uint8)
    picture[:, 32:64, 48:80] = 255  # a square of 32 in the middle
    write_mp4(tmp_path / "a.mp4", np.repeat(picture, 5, axis=0), crf=1)
    _, clip = read_clip(tmp_path / "a.mp4", [Bucket(5, 48, 48)], 16, 1.5)  # half the size: a square of 16
    bright = clip[0, ..., 1] > 127
    assert bright.sum(axis=0).max() == bright.sum(axis=1).max() == 16 and bright[16:32, 16:32].all()


def turned_by_a_quarter(content: bytes) -> bytes:
    """Writes a display matrix of 90 degrees clockwise into an MP4 (ISO 14496-12, 8.3.2), as telephones do."""
    begin = content.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    return content[:begin] + matrix + content[begin + 36 :]


def test_a_turned_video_is_set_upright(tmp_path):
    write_mp4(tmp_path / "a.mp4", video(12, 48, 96), crf=1)
    (tmp_path / "b.mp4").write_bytes(turned_by_a_quarter((tmp_path / "a.mp4").read_bytes()))
    chosen, clip = read_clip(tmp_path / "b.mp4", [WIDE, SQUARE, TALL], 16, 1.5)
    assert chosen == TALL and clip.shape == (9, 64, 32, 3)
    # Clockwise, what was right is below.
    assert (clip[:, 38:, 4:-4, 0] > 150).all() and clip[0, :26, 4:-4].max() < 10


def test_the_longest_bucket_that_is_filled_is_taken(tmp_path):
    write_mp4(tmp_path / "a.mp4", video(12, 32, 64), fps=24)  # half a second: 8 frames at 16
    chosen, clip = read_clip(tmp_path / "a.mp4", [WIDE, Bucket(5, 32, 64), Bucket(1, 32, 64)], 16, 1.0)
    assert chosen == Bucket(5, 32, 64)
    source = read_mp4(tmp_path / "a.mp4")
    np.testing.assert_array_equal(clip, source[[0, 1, 3, 4, 6]])  # nothing is scaled, so nothing changes
    assert read_clip(tmp_path / "a.mp4", [WIDE], 24, 1.0)[0] == WIDE


@pytest.mark.parametrize(
    "content, buckets, enlarge, reason",
    [
        (video(4, 32, 64), [WIDE], 1.0, "it has 4 frames at 16 per second, 9x32x64 needs more"),
        (video(12, 16, 32), [WIDE], 1.5, r"32x16 pixels would be enlarged 2.00 times for 9x32x64, at most 1.5 times"),
        (b"", [WIDE], 1.0, "not a readable video|can't be opened"),
        (b"not a video at all" * 100, [WIDE], 1.0, "not a readable video|can't be opened"),
        (None, [WIDE], 1.0, "can't be opened: No such file"),
    ],
)
def test_what_can_not_be_used_is_told(tmp_path, content, buckets, enlarge, reason):
    path = tmp_path / "a.mp4"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write_mp4(path, content)
    with pytest.raises(UserError, match=reason):
        read_clip(path, buckets, 16, enlarge)


def test_a_video_that_ends_early_is_told(tmp_path):
    write_mp4(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (20, 64, 64, 3)).astype(np.uint8))
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError):
        read_clip(tmp_path / "a.mp4", [Bucket(17, 64, 64)], 16, 1.0)


def test_buckets_are_written_as_three_numbers():
    assert parse_bucket("81x480x832") == Bucket(81, 480, 832) and str(parse_bucket("81X480x832")) == "81x480x832"
    for text in ("480x832", "81x480x832x3", "a", ""):
        with pytest.raises(UserError, match="is not FRAMESxHEIGHTxWIDTH"):
            parse_bucket(text)

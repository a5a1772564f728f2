"""From a video file to a clip of a bucket's shape: frames at equal times, scaled to cover, cut from the middle."""

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from jaxtyping import UInt8

from hybrid_dit.errors import UserError
from hybrid_dit.video_io import CHROMA

T = TypeVar("T")


class Bucket(NamedTuple):
    """Shape of a clip."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def parse_bucket(text: str) -> Bucket:
    """Returns the bucket written as FRAMESxHEIGHTxWIDTH.

    Raises:
        UserError: it isn't three whole numbers.
    """
    try:
        frames, height, width = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise UserError(f"bucket {text!r} is not FRAMESxHEIGHTxWIDTH, such as 81x480x832") from error
    return Bucket(frames, height, width)


def resample(frames: Iterable[tuple[Fraction, T]], fps: Fraction) -> Iterator[T]:
    """Yields the frame nearest to each of the times 0, 1/fps, 2/fps, ... after the first one's.

    The nearest one, since containers round times (Matroska to milliseconds). The last frame counts for as long as the
    one before it did.

    Args:
        frames: (time in seconds, frame); those out of order are left out.
        fps: frames per second of the result.
    """
    last, count, length = None, 0, 1 / fps
    start = previous = Fraction(0)
    for time, frame in frames:
        if last is None:
            start, last = time, frame
            continue
        time -= start
        if time <= previous:
            continue
        length = time - previous
        while count / fps <= previous + length / 2:
            yield last
            count += 1
        previous, last = time, frame
    while last is not None and count / fps <= previous + length / 2:
        yield last
        count += 1


def nearest(buckets: Sequence[Bucket], aspect: float) -> list[Bucket]:
    """Returns the buckets of the height and width nearest to an aspect ratio (width / height), longest first.

    Raises:
        ValueError: there are no buckets.
    """
    best = min(buckets, key=lambda b: (round(abs(math.log(b.width / b.height / aspect)), 6), -b.height * b.width))
    return sorted((b for b in buckets if b[1:] == best[1:]), reverse=True)


def read_clip(
    path: Path, buckets: Sequence[Bucket], fps: int | float, enlarge: int | float
) -> tuple[Bucket, UInt8[np.ndarray, "t y x 3"]]:
    """Returns the beginning of a video in the shape of the bucket that suits it best.

    The aspect ratio decides on height and width, then the longest bucket is taken that the video fills.

    Args:
        path: of the video.
        buckets: to choose from.
        fps: frames per second of the clip.
        enlarge: factor up to which a video that is too small is enlarged.

    Raises:
        UserError: not a readable video, too short, or too small.
    """
    rate = Fraction(fps).limit_denominator(1001)
    images: list[np.ndarray] = []
    fitting: list[Bucket] = []
    try:
        with open(path, "rb") as file, av.open(file) as container:
            if not container.streams.video:
                raise UserError("it has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # several videos are read at once
            sample = float(stream.codec_context.sample_aspect_ratio or 1)
            for frame in resample(_timed(container, stream), rate):
                if not fitting:
                    width, height = frame.width * sample, frame.height
                    upright = frame.rotation % 180 == 0
                    fitting = nearest(buckets, width / height if upright else height / width)
                    _, rows, columns = fitting[0] if upright else (0, fitting[0].width, fitting[0].height)
                    factor = max(rows / height, columns / width)
                    if factor > enlarge:
                        raise UserError(
                            f"{round(width)}x{height} pixels would be enlarged {factor:.2f} times for {fitting[0]}, "
                            f"at most {enlarge:g} times is accepted (build_data.enlarge)"
                        )
                    scaled = math.ceil(width * factor - 1e-6), math.ceil(height * factor - 1e-6)
                images.append(_image(frame, scaled, rows, columns))
                if len(images) == fitting[0].frames:
                    break
    except OSError as error:  # also the base class of PyAV's file errors
        raise UserError(f"it can't be opened: {error.strerror or error}") from error
    except av.FFmpegError as error:
        raise UserError(f"it is not a readable video ({error.strerror})") from error
    if not images:
        raise UserError("it has no frames")
    filled = next((bucket for bucket in fitting if bucket.frames <= len(images)), None)
    if filled is None:
        raise UserError(f"it has {len(images)} frames at {float(rate):g} per second, {fitting[-1]} needs more")
    return filled, np.stack(images[: filled.frames])


def _timed(container, stream) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    rate = stream.average_rate or Fraction(24)
    for number, frame in enumerate(container.decode(stream)):
        known = frame.pts is not None and frame.time_base
        yield (frame.pts * frame.time_base if known else number / rate), frame


def _image(frame: av.VideoFrame, scaled: tuple[int, int], rows: int, columns: int) -> np.ndarray:
    """Returns a frame scaled to (width, height), cut from the middle to rows x columns, and turned upright."""
    width, height = scaled
    image = frame.reformat(width=width, height=height, format="rgb24", interpolation=CHROMA).to_ndarray()
    top, left = (height - rows) // 2, (width - columns) // 2
    turned = np.rot90(image[top : top + rows, left : left + columns], frame.rotation // 90)  # both counter-clockwise
    return np.ascontiguousarray(turned)

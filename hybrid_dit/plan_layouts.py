"""How many videos a device of a pod can train on at once, and on which mesh: found by compiling the step.

What a step needs beside weights and moments grows with the tokens that a device has at a time. They are counted in
videos here: 2 for two of them, 1/2 where two devices share the tokens of one (`mesh.seq=2`). A batch that is larger
than what fits is computed in parts (`finetune.accumulate`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

SMALLEST, LARGEST = Fraction(1, 64), Fraction(64)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a batch is spread.

    Attributes:
        videos: that a device has at once, a power of two.
        seq: devices that share a video's tokens.
        accumulate: parts of the batch, one after the other.
        batch: videos of a step.
    """

    videos: Fraction
    seq: int
    accumulate: int
    batch: int

    def settings(self) -> dict[str, int]:
        """By the config's names."""
        return {"mesh.seq": self.seq, "finetune.accumulate": self.accumulate, "finetune.batch": self.batch}


def layout(videos: Fraction, devices: int, batch: int) -> Layout:
    """Returns how `devices` have so many videos each at once, in steps of `batch` videos or the next multiple."""
    at_once = int(videos * devices)
    accumulate = math.ceil(batch / at_once)
    return Layout(videos, math.ceil(1 / videos), accumulate, at_once * accumulate)


def search(devices: int, batch: int, memory: int, needed: Callable[[Layout], int]) -> dict[Layout, int]:
    """Looks for the most videos per device that fit.

    Args:
        devices: that share a copy of the weights; powers of two are tried.
        batch: videos of a step that is asked for.
        memory: bytes that a device has.
        needed: compiles the step and returns bytes per device; for steps that don't fit, what the compiler states.

    Returns:
        Bytes of each layout that was tried: the largest that fits and the next one, which doesn't; or, where none fits,
        all down to the smallest.
    """
    tried: dict[Layout, int] = {}
    smallest = max(SMALLEST, Fraction(1, 2 ** (devices.bit_length() - 1)))
    videos = max(smallest, _power_of_two(Fraction(batch, devices)))
    while smallest <= videos <= LARGEST and all(entry.videos != videos for entry in tried):
        entry = layout(videos, devices, batch)
        tried[entry] = needed(entry)
        fit = [entry.videos for entry in fitting(tried, memory)]
        if not fit:
            videos /= 2
            continue
        too_large = [entry.videos for entry, size in tried.items() if size > memory]
        videos = 2 * max(fit)
        if not too_large:  # jump to what a line through the sizes known says
            videos = min(LARGEST, max(videos, _predicted(tried, memory)))
        elif max(fit) * 2 < min(too_large):
            videos = min(too_large) / 2
    return tried


def fitting(tried: dict[Layout, int], memory: int) -> list[Layout]:
    """Returns the layouts that fit, the one with the most videos last."""
    return sorted((entry for entry, size in tried.items() if size <= memory), key=lambda entry: entry.videos)


def recommended(largest: Layout, devices: int, batch: int) -> Layout | None:
    """Returns the layout for exactly `batch` videos a step with the fewest parts, at most as large as one that fits."""
    return next((entry for entry in _smaller(largest, devices, batch) if entry.batch == batch), None)


def _smaller(largest: Layout, devices: int, batch: int) -> Iterator[Layout]:
    videos = largest.videos
    while videos >= SMALLEST and videos * devices >= 1:
        yield layout(videos, devices, batch)
        videos /= 2


def _predicted(tried: dict[Layout, int], memory: int) -> Fraction:
    """The most videos that a line through the last two sizes, or through the origin and the only one, has room for."""
    (x1, y1), (x2, y2) = [(Fraction(0), 0), *((entry.videos, size) for entry, size in tried.items())][-2:]
    per_video = Fraction(y2 - y1) / (x2 - x1)
    return _power_of_two(x2 + (memory - y2) / per_video) if per_video > 0 else x2


def _power_of_two(x: Fraction) -> Fraction:
    """The largest one up to x."""
    exponent = math.floor(math.log2(x))
    return Fraction(2) ** exponent

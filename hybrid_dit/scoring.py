"""Scores a moving-shapes video against its prompt from the pixels alone (NumPy, no learned parts).

1. The background is each frame's median colour; foreground pixels are those away from it.
2. Every foreground pixel lies somewhere between the background and one colour of the palette: the best-aligned colour
   is its group, the position on the line its opacity (so soft edges and blur count as parts of pixels).
3. The largest connected area of a group in a frame is that group's object there; what remains is clutter.
4. An object's opacity map gives its area, centroid, colour, and overlap (IoU) with ideal shapes of the same area.
5. Objects are assigned to the things of the prompt so that the score is highest.

Attributes are graded 0-100: full marks inside a tolerance that covers an autoencoder's blur, then a linear decline.
An object is as right as its worst attribute, half for what it is and half for what it does:

    total = (min(shape, colour, size) + min(direction, smoothness)) / 2 * permanence,    averaged over the things,
            times background * clean, averaged over the frames

so reversed motion or a wrong colour gives half, and a video without the things asked for gives 0. The tolerances are
in shares of the frame but the autoencoder's blur is in pixels: meant for 128 pixels a side, usable from 64.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from hybrid_dit.array_typing import Float, Shaped
from hybrid_dit.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    TRAVEL,
    Scene,
    Thing,
    signed_distances,
)
from hybrid_dit.errors import UserError

APPEARANCE = ("shape", "colour", "size")
MOTION = ("direction", "smoothness")
ATTRIBUTES = (*APPEARANCE, *MOTION, "permanence")  # of each thing, averaged over the things
SCORES = (*ATTRIBUTES, "background", "clean", "total")

# Tolerances, as (value worth 0, value worth 1) of a linear ramp.
_SHAPE_MARGIN = (0.0, 0.45)  # lead in IoU over the other shapes, relative to that of a perfect drawing
_SHAPE_FIT = (0.45, 0.7)  # IoU with the right shape
_COLOUR_ERROR = (110.0, 45.0)  # RGB distance; the nearest two colours are 140 apart
_SIZE_ERROR = (0.55, 0.22)  # |log(area / right area)|; small and large are 1.18 apart
_COSINE = (math.cos(math.radians(45)), math.cos(math.radians(15)))  # between the motion and the right direction
_TRAVEL = (0.05, 0.25)  # way over the whole clip as a share of the side; true ones are 0.40-0.55
_JERK = (1.5, 0.3)  # mean change of the step from frame to frame, relative to the slowest true step
_PRESENCE = (0.5, 0.85)  # opacity summed over the object, relative to the object's own upper quartile over time
_BACKGROUND_ERROR = (60.0, 25.0)  # largest difference over R, G, B
_CONTRAST = 28  # levels from the background above which a pixel is foreground
_LEAST_OBJECT = 0.25  # share of a small thing's area below which a blob is no object
_FREE_CLUTTER = 0.12  # share of a small thing's area that isn't held against the video


@dataclasses.dataclass(frozen=True)
class _Track:
    """The largest blob of one colour group in every frame; rows of frames without one are zero."""

    mass: np.ndarray  # [t] summed opacity
    area: np.ndarray  # [t] pixels, from opacity relative to the object's own
    centroid: np.ndarray  # [t, 2] (x, y)
    colour: np.ndarray  # [t, 3] mean RGB of the inner part
    overlap: np.ndarray  # [t, len(SHAPES)] IoU with the ideal shapes of the same area and centroid


def to_uint8(video: Float[np.ndarray, "*b t y x 3"]) -> Shaped[np.ndarray, "*b t y x 3"]:
    """Returns a video in [-1, 1] as uint8 levels, round(127.5 (v + 1)), clipped."""
    return np.clip(np.rint((video + 1) * 127.5), 0, 255).astype(np.uint8)


def score_video(video: Shaped[np.ndarray, "t y x 3"], scene: Scene) -> dict[str, float]:
    """Returns the scores of SCORES, each 0-100.

    Attributes are means over the scene's things; those of a thing that isn't found are all 0.

    Args:
        video: uint8 RGB, square frames, at least 5 frames (see `to_uint8`).
        scene: what the video should show.

    Raises:
        UserError: the video is not uint8, not square, or too short.
    """
    if video.dtype != np.uint8:
        raise UserError(f"score_video reads uint8 levels, got {video.dtype}; convert [-1, 1] with scoring.to_uint8")
    frames, height, width, _ = video.shape
    if height != width or frames < 5:
        raise UserError(f"score_video reads square videos of at least 5 frames, got shape {list(video.shape)}")
    backdrop = np.median(video[:, ::3, ::3].reshape(frames, -1, 3), axis=1)
    tracks, mass = _find_tracks(video, backdrop)

    judged = [[_judge(track, thing, frames, width) for track in tracks] for thing in scene.things]
    chosen = _assign(judged, len(scene.things), len(tracks))
    found = [judged[i][k] if k is not None else dict.fromkeys(ATTRIBUTES, 0.0) for i, k in enumerate(chosen)]

    small_area = _small_area(width)
    clutter = (mass - sum(tracks[k].mass for k in chosen if k is not None)) / small_area
    clean = 1 / (1 + np.maximum(clutter - _FREE_CLUTTER, 0))
    error = np.abs(backdrop - BACKGROUNDS[scene.background]).max(axis=1)
    background = _ramp(error, _BACKGROUND_ERROR)
    scores = {name: np.mean([thing[name] for thing in found]) for name in ATTRIBUTES}
    scores |= {"background": np.mean(background), "clean": np.mean(clean)}
    scores["total"] = np.mean([_thing_total(thing) for thing in found]) * np.mean(background * clean)
    return {name: 100 * float(scores[name]) for name in SCORES}


def score_batch(videos: Shaped[np.ndarray, "b t y x 3"], scenes: Sequence[Scene]) -> dict[str, Float[np.ndarray, "b"]]:
    """Returns `score_video` of every video, as one array per score; see there for arguments and errors."""
    if len(videos) != len(scenes):
        raise UserError(f"score_batch got {len(videos)} videos for {len(scenes)} scenes; it needs one scene per video")
    rows = [score_video(video, scene) for video, scene in zip(videos, scenes, strict=True)]
    return {name: np.array([row[name] for row in rows], np.float64) for name in SCORES}


def _find_tracks(video: np.ndarray, backdrop: np.ndarray) -> tuple[list[_Track], np.ndarray]:
    """Returns one track per colour group that has an object, and the foreground's opacity per frame [t]."""
    frames, size = video.shape[:2]
    level = np.rint(backdrop).astype(np.int16)[:, None, None, :]
    far = np.abs(video - level) > _CONTRAST
    flat = np.flatnonzero(far[..., 0] | far[..., 1] | far[..., 2])
    t, y, x = (axis.astype(np.int32) for axis in np.unravel_index(flat, video.shape[:3]))
    rgb = video.reshape(-1, 3)[flat].astype(np.float32)
    backdrop = backdrop.astype(np.float32)

    # Axis [palette] of the directions background -> colour; one background for the whole clip is enough to tell them.
    towards = np.array(list(COLOURS.values()), np.float32) - np.median(backdrop, axis=0)
    reach = np.linalg.norm(towards, axis=1)
    along = (rgb - backdrop[t]) @ (towards / reach[:, None]).T
    group = np.argmax(along, axis=1)
    opacity = np.clip(along[np.arange(len(group)), group] / reach[group], 0, 1)

    tracks = []
    for colour in range(len(COLOURS)):
        of_group = np.flatnonzero(group == colour)
        if _sum(t[of_group], opacity[of_group], frames).max() < _LEAST_OBJECT * _small_area(size):
            continue
        kept = of_group[_in_largest_blob(t[of_group], y[of_group], x[of_group], opacity[of_group], frames, size)]
        if len(kept):
            tracks.append(_measure(t[kept], y[kept], x[kept], opacity[kept], rgb[kept], frames))
    return tracks, _sum(t, opacity, frames)


def _in_largest_blob(t, y, x, opacity, frames: int, size: int) -> np.ndarray:
    """Says which of the pixels (t, y, x) belong to their frame's largest connected area, if it is an object's size."""
    y, x = y - y.min(), x - x.min()
    mask = np.zeros((frames, y.max() + 1, x.max() + 1), bool)
    mask[t, y, x] = True
    labels, count = ndimage.label(mask, _WITHIN_FRAME)
    blob = labels[t, y, x]
    mass = _sum(blob, opacity, count + 1)
    frame = np.zeros(count + 1, np.int32)
    frame[blob] = t
    order = np.argsort(mass, kind="stable")
    largest = np.zeros(frames, np.int32)
    largest[frame[order]] = order  # the last one assigned is the largest
    return (blob == largest[t]) & (mass[blob] >= _LEAST_OBJECT * _small_area(size))


def _measure(t, y, x, opacity, rgb, frames: int) -> _Track:
    """Measures a blob per frame from its pixels; all arguments have one row per pixel."""
    mass = _sum(t, opacity, frames)
    strength = _sum(t, opacity**2, frames) / np.maximum(mass, 1e-9)
    weight = 1 / np.maximum(mass, 1e-9)
    centroid = np.stack([_sum(t, opacity * x, frames) * weight, _sum(t, opacity * y, frames) * weight], axis=1)
    cover = np.clip((opacity / strength[t] - 0.25) * 2, 0, 1)  # steepens blurred edges about the half-opaque line
    area = _sum(t, cover, frames)

    inner = cover >= 0.95
    count = np.maximum(_sum(t, inner, frames), 1)
    colour = np.stack([_sum(t, inner * rgb[:, c], frames) / count for c in range(3)], axis=1)

    place, radius = centroid.astype(np.float32), np.sqrt(area / np.pi).astype(np.float32)
    distances = signed_distances(x - place[t, 0], y - place[t, 1], radius[t], np)
    shared = [_sum(t, np.minimum(cover, np.clip(0.5 - d, 0, 1)), frames) for d in distances]
    overlap = np.stack([s / np.maximum(2 * area - s, 1e-9) for s in shared], axis=1)
    return _Track(mass, area, centroid, colour, overlap)


def _judge(track: _Track, thing: Thing, frames: int, size: int) -> dict[str, float]:
    """Returns the ATTRIBUTES of a track taken as `thing`, each 0-1."""
    seen = track.mass > 0
    presence = _ramp(track.mass / np.quantile(track.mass[seen], 0.75), _PRESENCE)
    weight = presence / presence.sum()

    right = SHAPES.index(thing.shape)
    others = [i for i in range(len(SHAPES)) if i != right]
    lead = (track.overlap[:, [right]] - track.overlap[:, others]) / (1 - _ideal_overlap()[right, others])
    shape = _ramp(lead.min(axis=1), _SHAPE_MARGIN) * _ramp(track.overlap[:, right], _SHAPE_FIT)
    colour = _ramp(np.linalg.norm(track.colour - COLOURS[thing.colour], axis=1), _COLOUR_ERROR)
    right_area = math.pi * (SIZES[thing.size] * size) ** 2
    area = _ramp(np.abs(np.log(np.maximum(track.area, 1) / right_area)), _SIZE_ERROR)

    # Motion: the least-squares velocity in pixels per frame, and how much the step changes between frames.
    time = np.arange(frames) - weight @ np.arange(frames)
    velocity = (weight * time) @ track.centroid / max(weight @ time**2, 1e-9)
    speed = np.linalg.norm(velocity)
    cosine = velocity @ DIRECTIONS[thing.direction] / max(speed, 1e-9)
    direction = _ramp(cosine, _COSINE) * _ramp(speed * (frames - 1) / size, _TRAVEL)
    slowest = TRAVEL[0] * size / (frames - 1)
    jerk = np.linalg.norm(np.diff(track.centroid, n=2, axis=0), axis=1) / slowest
    in_a_row = seen[:-2] & seen[1:-1] & seen[2:]
    smoothness = np.mean(_ramp(jerk[in_a_row], _JERK)) if in_a_row.any() else 0.0

    values = (weight @ shape, weight @ colour, weight @ area, direction, smoothness, presence.mean())
    return dict(zip(ATTRIBUTES, map(float, values), strict=True))


def _assign(judged: list[list[dict[str, float]]], things: int, tracks: int) -> tuple[int | None, ...]:
    """Returns the track (or None) of each thing, each track used once, for the highest sum of totals."""
    options = [*range(tracks), *[None] * things]

    def value(choice: tuple[int | None, ...]) -> float:
        rows = [judged[i][k] for i, k in enumerate(choice) if k is not None]
        # The small term decides among equal totals; colour counts twice, since it is what tells two things apart.
        return math.fsum(_thing_total(row) + 0.01 * (sum(row.values()) + row["colour"]) for row in rows)

    return max(itertools.permutations(options, things), key=value)


def _thing_total(row: dict[str, float]) -> float:
    appearance, motion = min(row[name] for name in APPEARANCE), min(row[name] for name in MOTION)
    return (appearance + motion) / 2 * row["permanence"]


@functools.cache
def _ideal_overlap() -> np.ndarray:
    """IoU of the ideal shapes with each other at equal area and centroid, [shape, shape] (1 on the diagonal)."""
    grid = np.linspace(-2, 2, 801)
    inside = np.stack([d < 0 for d in signed_distances(grid[None, :], grid[:, None], 1.0, np)]).reshape(len(SHAPES), -1)
    shared = inside.astype(np.float64) @ inside.T
    return shared / (inside.sum(1)[:, None] + inside.sum(1) - shared)


def _ramp(value, ends: tuple[float, float]):
    """Linear from 0 at ends[0] to 1 at ends[1], clipped."""
    return np.clip((value - ends[0]) / (ends[1] - ends[0]), 0, 1)


def _sum(index, values, length: int) -> np.ndarray:
    return np.bincount(index, values, minlength=length)


def _small_area(size: int) -> float:
    return math.pi * (SIZES["small"] * size) ** 2


_WITHIN_FRAME = np.zeros((3, 3, 3), bool)
_WITHIN_FRAME[1] = ndimage.generate_binary_structure(2, 1)

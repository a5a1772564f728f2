"""Moving shapes: a text-to-video world small enough to learn in minutes and exact enough to score from pixels.

A sentence names one or two things and a background:

    a large red circle moving left and a small blue square moving up on a gray background

Rendering has two steps. `place` (NumPy) draws positions and speeds at random and returns a few dozen numbers of fixed
shape; `render` (pure JAX) turns them into a video, so that a batch is one `jit(vmap(render))` on the accelerator.

Shapes of one size have equal AREA whatever their kind, and move about their centroid: "large" means the same number of
pixels for a circle and a triangle. Coordinates are pixels, x to the right and y down, the first pixel's centre at 0.
"""

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit.array_typing import Array, Float, Shaped
from hybrid_dit.errors import UserError

SHAPES = ("circle", "square", "triangle")
COLOURS = {  # sRGB; hues 60 degrees apart, nearest pair (cyan, blue) 140 levels apart
    "red": (230, 30, 30),
    "yellow": (235, 215, 20),
    "green": (30, 180, 50),
    "cyan": (30, 200, 220),
    "blue": (40, 60, 230),
    "magenta": (220, 40, 210),
}
SIZES = {"small": 10 / 128, "large": 18 / 128}  # radius of the circle of equal area, as a share of the frame's side
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # unit vectors (x, y)
BACKGROUNDS = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}

MAX_THINGS = 2
TRAVEL = (0.40, 0.55)  # way over the whole clip as a share of the side: 1.6-2.2 pixels a frame at 33 frames of 128
_CLOSENESS = 0.85  # least centre distance / sum of outer radii: the one in front hides at most a tenth of the other
_CANDIDATES = 256  # start positions tried for a pair

# Geometry per unit of equal-area radius, in the order of SHAPES.
_SQUARE_HALF = math.sqrt(math.pi) / 2
_TRIANGLE_SIDE = math.sqrt(4 * math.pi / math.sqrt(3))  # equilateral, one corner up
_TRIANGLE_IN = _TRIANGLE_SIDE / (2 * math.sqrt(3))  # inner radius; the outer one is twice that
_OUTER = (1.0, math.sqrt(2) * _SQUARE_HALF, 2 * _TRIANGLE_IN)
_EXTENT_LOW = ((1.0, 1.0), (_SQUARE_HALF, _SQUARE_HALF), (_TRIANGLE_SIDE / 2, 2 * _TRIANGLE_IN))  # to the left, up
_EXTENT_HIGH = ((1.0, 1.0), (_SQUARE_HALF, _SQUARE_HALF), (_TRIANGLE_SIDE / 2, _TRIANGLE_IN))  # to the right, down

Split = Literal["train", "held_out"]


@dataclasses.dataclass(frozen=True)
class Thing:
    """One moving object. Raises UserError on a value outside the grammar."""

    shape: str
    colour: str
    size: str
    direction: str

    def __post_init__(self):
        for name, allowed in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("direction", DIRECTIONS)):
            _check_word(name, getattr(self, name), allowed)

    @property
    def phrase(self) -> str:
        """The thing's part of the prompt, e.g. "a small red circle moving left"."""
        return f"a {self.size} {self.colour} {self.shape} moving {self.direction}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a video shows: one or two things of distinct colours (the first one in front), and the background."""

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self):
        _check_word("background", self.background, BACKGROUNDS)
        if not 1 <= len(self.things) <= MAX_THINGS:
            raise UserError(f"a scene has 1 to {MAX_THINGS} things, got {len(self.things)}")
        if len({thing.colour for thing in self.things}) < len(self.things):
            raise UserError(f"the things of a scene must differ in colour, got {self.things[0].colour} twice")

    @property
    def prompt(self) -> str:
        """The sentence that describes the scene; `parse_prompt` is its inverse."""
        return f"{' and '.join(thing.phrase for thing in self.things)} on a {self.background} background"


def parse_prompt(sentence: str) -> Scene:
    """Returns the scene that `sentence` describes (case and extra spaces don't matter).

    Raises:
        UserError: the sentence is outside the grammar.
    """
    words = sentence.lower().split()
    match = _SENTENCE.fullmatch(" ".join(words))
    if match is None:
        unknown = [word for word in words if word not in all_words()]
        reason = f"unknown word {unknown[0]!r}{_nearest(unknown[0], all_words())}" if unknown else "words out of order"
        raise UserError(
            f"prompt {sentence!r} is outside the moving-shapes grammar: {reason}. "
            "Write for example 'a small red circle moving left and a large blue square moving up on a gray background'"
        )
    *attributes, background = match.groups()
    parts = [attributes[i : i + 4] for i in range(0, len(attributes), 4) if attributes[i] is not None]
    things = tuple(Thing(shape, colour, size, direction) for size, colour, shape, direction in parts)
    return Scene(things, background)


def all_words() -> list[str]:
    """Returns every word of the grammar, sorted."""
    words = {"a", "and", "background", "moving", "on"}
    return sorted(words.union(SHAPES, COLOURS, SIZES, DIRECTIONS, BACKGROUNDS))


def all_things() -> list[Thing]:
    """Returns every thing of the grammar, in a fixed order."""
    return [Thing(*values) for values in itertools.product(SHAPES, COLOURS, SIZES, DIRECTIONS)]


def is_held_out(scene: Scene) -> bool:
    """Says whether the scene is kept from training: one of its things has a held-out (shape, colour, direction).

    With the words numbered in the order of the tables above, the held-out triples are those with
    shape + colour + 2 direction = 2 (mod 7): 11 of 72, spread so that every PAIR of words stays in training.
    """
    return any(
        (SHAPES.index(t.shape) + list(COLOURS).index(t.colour) + 2 * list(DIRECTIONS).index(t.direction)) % 7 == 2
        for t in scene.things
    )


def sample_scene(rng: np.random.Generator, split: Split, two_objects: float = 0.5) -> Scene:
    """Returns a random scene of the split.

    Args:
        rng: NumPy generator, advanced.
        split: "train" (no held-out thing) or "held_out" (at least one).
        two_objects: probability of two things instead of one; the same in both splits.
    """
    count = 2 if rng.random() < two_objects else 1
    while True:
        colours = rng.choice(list(COLOURS), size=count, replace=False)
        things = tuple(
            Thing(_pick(rng, SHAPES), str(colour), _pick(rng, SIZES), _pick(rng, DIRECTIONS)) for colour in colours
        )
        scene = Scene(things, _pick(rng, BACKGROUNDS))
        if is_held_out(scene) == (split == "held_out"):
            return scene


class Placement(NamedTuple):
    """All that `render` needs, padded to MAX_THINGS; a pytree, float32 except `kind` (int32) and `present` (bool)."""

    kind: Shaped[np.ndarray, "*b 2"]  # index into SHAPES
    colour: Shaped[np.ndarray, "*b 2 3"]  # RGB in [-1, 1]
    radius: Shaped[np.ndarray, "*b 2"]  # pixels, of the circle of equal area
    start: Shaped[np.ndarray, "*b 2 2"]  # centroid (x, y) in the first frame, pixels
    velocity: Shaped[np.ndarray, "*b 2 2"]  # (x, y) in pixels per frame
    present: Shaped[np.ndarray, "*b 2"]
    background: Shaped[np.ndarray, "*b 3"]  # RGB in [-1, 1]


def place(scene: Scene, rng: np.random.Generator, frames: int, size: int) -> Placement:
    """Draws speeds and start positions: things stay inside the frame and hardly cover each other.

    Args:
        scene: what to show.
        rng: NumPy generator, advanced.
        frames: length of the clip, 4k + 1 (the temporal stride of the video autoencoder).
        size: side of the square frame in pixels, a multiple of 16.

    Raises:
        UserError: `frames` or `size` does not fit.
    """
    if frames % 4 != 1 or frames < 1:
        raise UserError(f"moving shapes need 4k + 1 frames (1, 5, 9, ...), got {frames}")
    if size % 16 or size < 16:
        raise UserError(f"moving shapes need a frame side divisible by 16, got {size}")
    count, steps = len(scene.things), max(frames - 1, 1)
    kind = np.array([SHAPES.index(t.shape) for t in scene.things])
    radius = np.array([SIZES[t.size] * size for t in scene.things])
    travel = rng.uniform(*TRAVEL, size=(count, 1)) * size * np.array([DIRECTIONS[t.direction] for t in scene.things])
    # Outlines stay between the centres of the outermost pixels, so that the soft edge is in the frame too.
    low = np.array(_EXTENT_LOW)[kind] * radius[:, None] - np.minimum(travel, 0)
    high = size - 1 - np.array(_EXTENT_HIGH)[kind] * radius[:, None] - np.maximum(travel, 0)
    start = rng.uniform(low, high, size=(_CANDIDATES, count, 2))
    chosen = start[0]
    if count == 2:
        clearance = _least_distance(start, travel) - _CLOSENESS * np.sum(np.array(_OUTER)[kind] * radius)
        fitting = np.flatnonzero(clearance >= 0)
        chosen = start[fitting[0] if len(fitting) else np.argmax(clearance)]

    def pad(rows: np.ndarray, dtype=np.float32) -> np.ndarray:
        return np.concatenate([rows, np.zeros((MAX_THINGS - count, *rows.shape[1:]))]).astype(dtype)

    return Placement(
        kind=pad(kind, np.int32),
        colour=pad(_signed([COLOURS[t.colour] for t in scene.things])),
        radius=pad(radius),
        start=pad(chosen),
        velocity=pad(travel / steps),
        present=np.arange(MAX_THINGS) < count,
        background=_signed(BACKGROUNDS[scene.background]).astype(np.float32),
    )


def place_batch(scenes: Sequence[Scene], rng: np.random.Generator, frames: int, size: int) -> Placement:
    """Returns one Placement with a leading batch axis, for `jax.vmap(render)`; arguments as in `place`."""
    placements = [place(scene, rng, frames, size) for scene in scenes]
    return Placement(*(np.stack(field) for field in zip(*placements, strict=True)))


def render(placement: Placement, *, frames: int, size: int) -> Float[Array, "t y x 3"]:
    """Returns the video in [-1, 1], float32: video = mix(background, colour, clip(1/2 - distance, 0, 1)).

    The edge is one pixel wide. Pure: jit with static `frames` and `size`, vmap over a batch (`render_batch`).

    Args:
        placement: of one scene, made for the same `frames` and `size`.
        frames: number of frames t.
        size: number of rows y and columns x.
    """
    placement = jax.tree.map(jnp.asarray, placement)
    time = jnp.arange(frames, dtype=jnp.float32)
    centre = placement.start + time[:, None, None] * placement.velocity  # [t, things, 2]
    pixel = jnp.arange(size, dtype=jnp.float32)
    video = jnp.broadcast_to(placement.background, (frames, size, size, 3))
    for i in reversed(range(MAX_THINGS)):  # back to front
        dx = pixel[None, None, :] - centre[:, i, 0, None, None]
        dy = pixel[None, :, None] - centre[:, i, 1, None, None]
        distance = jnp.choose(placement.kind[i], signed_distances(dx, dy, placement.radius[i], jnp), mode="clip")
        cover = jnp.clip(0.5 - distance, 0, 1) * placement.present[i]
        video += cover[..., None] * (placement.colour[i] - video)
    return video


def render_batch(placements: Placement, *, frames: int, size: int) -> Float[Array, "b t y x 3"]:
    """`render` over the leading axis of `place_batch`."""
    return jax.vmap(lambda p: render(p, frames=frames, size=size))(placements)


def signed_distances(dx, dy, radius, xp) -> list:
    """Returns the distance to the outline of each of SHAPES, negative inside (corners are mitred, not rounded).

    Args:
        dx: offsets to the right of the centroid; any shape that broadcasts with `dy` and `radius`.
        dy: offsets down from the centroid.
        radius: of the circle of equal area.
        xp: the array module, `numpy` or `jax.numpy`.
    """
    circle = xp.sqrt(dx**2 + dy**2) - radius
    square = xp.maximum(abs(dx), abs(dy)) - _SQUARE_HALF * radius
    triangle = xp.maximum(dy, abs(dx) * (math.sqrt(3) / 2) - dy / 2) - _TRIANGLE_IN * radius
    return [circle, square, triangle]


def _least_distance(start: Float[np.ndarray, "k 2 2"], travel: Float[np.ndarray, "2 2"]) -> Float[np.ndarray, "k"]:
    """Least distance of two centres that move by `travel` at constant speed."""
    offset, drift = start[:, 1] - start[:, 0], travel[1] - travel[0]
    closest = np.clip(-offset @ drift / max(drift @ drift, 1e-9), 0, 1)  # share of the clip
    return np.linalg.norm(offset + closest[:, None] * drift, axis=-1)


def _signed(rgb) -> np.ndarray:
    return np.asarray(rgb) / 127.5 - 1


def _pick(rng: np.random.Generator, words) -> str:
    return list(words)[rng.integers(len(words))]


def _check_word(name: str, word: str, allowed) -> None:
    if word not in allowed:
        raise UserError(f"{word!r} is no {name} of the moving-shapes grammar; use one of {', '.join(allowed)}")


def _nearest(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _sentence_pattern() -> re.Pattern:
    thing = f"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) moving ({'|'.join(DIRECTIONS)})"
    return re.compile(f"{thing}(?: and {thing})? on a ({'|'.join(BACKGROUNDS)}) background")


_SENTENCE = _sentence_pattern()

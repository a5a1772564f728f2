"""The moving-shapes world: grammar, split, placement, rendering."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest

from hybrid_dit.data import shapes
from hybrid_dit.data.shapes import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, Scene, Thing
from hybrid_dit.errors import UserError

FRAMES, SIZE = 5, 64
RED_LEFT = Thing("circle", "red", "small", "left")
BLUE_UP = Thing("square", "blue", "large", "up")

render = jax.jit(shapes.render, static_argnames=("frames", "size"))


@functools.cache
def _some_scenes(split: str, two_objects: float) -> list[Scene]:
    rng = np.random.default_rng(3)
    return [shapes.sample_scene(rng, split, two_objects) for _ in range(400)]


def test_prompt_reads_as_documented():
    assert Scene((RED_LEFT,), "black").prompt == "a small red circle moving left on a black background"
    assert Scene((RED_LEFT, BLUE_UP), "gray").prompt == (
        "a small red circle moving left and a large blue square moving up on a gray background"
    )


def test_parse_inverts_prompt_and_ignores_case_and_spaces():
    for thing in shapes.all_things():
        scene = Scene((thing,), "white")
        assert shapes.parse_prompt(scene.prompt) == scene
    for scene in _some_scenes("train", 1.0):
        assert shapes.parse_prompt(scene.prompt) == scene
    assert shapes.parse_prompt("  A small RED circle  moving left on a black background ").things == (RED_LEFT,)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("a small red circl moving left on a black background", "did you mean 'circle'"),
        ("a red small circle moving left on a black background", "words out of order"),
        ("a small red circle moving left", "words out of order"),
        ("", "words out of order"),
        ("a small red circle moving left and a large red square moving up on a gray background", "differ in colour"),
    ],
)
def test_sentences_outside_the_grammar_are_refused(sentence, expected):
    with pytest.raises(UserError, match=expected):
        shapes.parse_prompt(sentence)


def test_words_and_scenes_outside_the_grammar_are_refused():
    with pytest.raises(UserError, match="'purple' is no colour"):
        Thing("circle", "purple", "small", "left")
    with pytest.raises(UserError, match="'pink' is no background"):
        Scene((RED_LEFT,), "pink")
    with pytest.raises(UserError, match="1 to 2 things"):
        Scene((), "black")


def test_all_words_is_exactly_what_prompts_use():
    used = {word for scene in _some_scenes("train", 0.5) for word in scene.prompt.split()}
    assert shapes.all_words() == sorted(used)
    assert len(used) == 5 + 3 + 6 + 2 + 4 + 3


def test_colours_are_well_separated():
    levels = [*COLOURS.values(), *BACKGROUNDS.values()]
    for a, b in itertools.combinations(levels, 2):
        assert math.dist(a, b) >= 120


def test_held_out_share_and_balance():
    """About 15% of the triples are held out, and every pair of words still occurs in training."""
    triples = {(t.shape, t.colour, t.direction): shapes.is_held_out(Scene((t,), "black")) for t in shapes.all_things()}
    assert len(triples) == 72
    assert sum(triples.values()) == 11
    kept = {triple for triple, held in triples.items() if not held}
    for i, j in itertools.combinations(range(3), 2):
        pairs = {(triple[i], triple[j]) for triple in triples}
        # The smallest pair group is (colour, direction), of 3 shapes: at most one of them is held out.
        assert all(sum((k[i], k[j]) == pair for k in kept) >= 2 for pair in pairs)


def test_one_held_out_thing_holds_out_the_scene():
    held = next(t for t in shapes.all_things() if shapes.is_held_out(Scene((t,), "gray")) and t.colour != "red")
    kept = next(t for t in shapes.all_things() if not shapes.is_held_out(Scene((t,), "gray")) and t.colour == "red")
    assert shapes.is_held_out(Scene((held, kept), "gray"))
    assert shapes.is_held_out(Scene((kept, held), "gray"))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_sampled_scenes_keep_to_the_split_and_the_share_of_pairs(split):
    scenes = _some_scenes(split, 0.5)
    assert all(shapes.is_held_out(scene) == (split == "held_out") for scene in scenes)
    pairs = sum(len(scene.things) == 2 for scene in scenes)
    assert abs(pairs - 200) < 50  # 5 standard deviations of 400 coin flips
    assert {t.shape for s in scenes for t in s.things} == set(SHAPES)
    assert {t.size for s in scenes for t in s.things} == set(SIZES)
    assert all(len(s.things) == 1 for s in _some_scenes(split, 0.0))


def test_sampling_and_placing_repeat_with_the_seed():
    def draw():
        rng = np.random.default_rng(5)
        scene = shapes.sample_scene(rng, "train", 1.0)
        return scene, shapes.place(scene, rng, FRAMES, SIZE)

    (scene, placement), (again, placement_again) = draw(), draw()
    assert scene == again
    jax.tree.map(np.testing.assert_array_equal, placement, placement_again)


@pytest.mark.parametrize(("frames", "size", "expected"), [(4, 64, "4k"), (0, 64, "4k"), (5, 60, "16"), (5, 0, "16")])
def test_place_refuses_sizes_the_autoencoder_cannot_take(frames, size, expected):
    with pytest.raises(UserError, match=expected):
        shapes.place(Scene((RED_LEFT,), "black"), np.random.default_rng(0), frames, size)


@pytest.mark.parametrize("size", [16, 128])
def test_things_stay_inside_and_apart_even_in_the_tightest_pairs(size):
    """Every pair of large shapes and directions: outlines inside the frame, centres apart, at every frame."""
    rng, frames = np.random.default_rng(0), 33
    outer = {"circle": 1, "square": math.sqrt(math.pi / 2), "triangle": math.sqrt(4 * math.pi / (3 * math.sqrt(3)))}
    kinds = list(itertools.product(SHAPES, DIRECTIONS))
    for (shape, direction), (shape2, direction2) in itertools.product(kinds, kinds):
        things = Thing(shape, "red", "large", direction), Thing(shape2, "blue", "large", direction2)
        placement = shapes.place(Scene(things, "black"), rng, frames, size)
        centre = placement.start + np.arange(frames)[:, None, None] * placement.velocity
        assert centre.min() > 0.75 * placement.radius[0]  # the closest to the edge: a triangle's base, 0.78 radii
        assert centre.max() < size - 1 - 0.75 * placement.radius[0]
        reach = sum(outer[t.shape] for t in things) * placement.radius[0]
        assert np.linalg.norm(centre[:, 0] - centre[:, 1], axis=-1).min() >= 0.849 * reach  # 0.85 in float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size_word", SIZES)
def test_render_shows_the_right_area_at_the_right_place(shape, size_word):
    """Summed coverage is the area of the equal-area circle, and its centroid follows start + t velocity."""
    size, frames = 128, 5
    for direction in DIRECTIONS:
        scene = Scene((Thing(shape, "green", size_word, direction),), "white")
        placement = shapes.place(scene, np.random.default_rng(1), frames, size)
        video = np.asarray(render(placement, frames=frames, size=size), np.float64)
        white, green = np.ones(3), np.array(COLOURS["green"]) / 127.5 - 1
        cover = ((video - white) @ (green - white)) / np.sum((green - white) ** 2)
        # A clipped-distance edge is exact along straight edges and off by O(curvature) per pixel of outline; corners
        # and the pixel grid add less than a pixel each. 1.5% of a small thing's 314 pixels is 5 pixels.
        area = math.pi * (SIZES[size_word] * size) ** 2
        np.testing.assert_allclose(cover.sum((1, 2)), area, rtol=0.015)
        grid = np.arange(size)
        moments = np.stack([cover.sum(1) @ grid, cover.sum(2) @ grid], axis=1)
        centroid = moments / cover.sum((1, 2))[:, None]
        expected = placement.start[0] + np.arange(frames)[:, None] * placement.velocity[0]
        np.testing.assert_allclose(centroid, expected, atol=0.15)  # pixels; the pixel grid's share
        step = np.array(DIRECTIONS[direction]) * size / (frames - 1)
        assert 0.39 < placement.velocity[0] @ step / (step @ step) < 0.56  # travel of 0.40-0.55 sides


def test_render_draws_three_distinct_shapes():
    """Share of the bounding box that is filled: pi/4 for a disc, 1 for a square, 1/2 for a triangle."""
    fill = {}
    for shape in SHAPES:
        scene = Scene((Thing(shape, "red", "large", "right"),), "black")
        video = np.asarray(render(shapes.place(scene, np.random.default_rng(2), 1, 128), frames=1, size=128))
        inside = video[0, ..., 0] > 0
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        fill[shape] = inside.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
        if shape == "triangle":  # one corner up
            assert inside[rows[0]].sum() < 5 < inside[rows[-1]].sum()
    # Rounding the outline to pixels moves each side of the box by at most half a pixel of about 32: 3% each.
    assert fill == pytest.approx({"circle": math.pi / 4, "square": 1, "triangle": 0.5}, rel=0.07)


def test_render_range_colours_and_order():
    """Levels are exact away from edges, and the first thing of the prompt hides the second."""
    placement = shapes.place(Scene((RED_LEFT, BLUE_UP), "gray"), np.random.default_rng(0), FRAMES, SIZE)
    same_place = placement._replace(start=np.full((2, 2), 30, np.float32), velocity=np.zeros((2, 2), np.float32))
    video = np.asarray(render(same_place, frames=FRAMES, size=SIZE))
    assert video.shape == (FRAMES, SIZE, SIZE, 3) and video.dtype == np.float32
    assert np.abs(video).max() <= 1
    levels = np.rint((video + 1) * 127.5)
    np.testing.assert_array_equal(levels[0, 30, 30], COLOURS["red"])
    np.testing.assert_array_equal(levels[0, 30 + 7, 30], COLOURS["blue"])  # radius 5 in front of half side 8
    np.testing.assert_array_equal(levels[0, 60, 60], BACKGROUNDS["gray"])


def test_absent_thing_leaves_no_trace():
    placement = shapes.place(Scene((RED_LEFT,), "black"), np.random.default_rng(0), FRAMES, SIZE)
    elsewhere = placement._replace(
        radius=np.array([placement.radius[0], 9], np.float32),
        start=np.array([placement.start[0], [40, 40]], np.float32),
    )
    video, expected = render(elsewhere, frames=FRAMES, size=SIZE), render(placement, frames=FRAMES, size=SIZE)
    np.testing.assert_array_equal(video, expected)


def test_batch_equals_one_by_one():
    rng = np.random.default_rng(0)
    scenes = [shapes.sample_scene(rng, "train") for _ in range(3)]
    batch = shapes.place_batch(scenes, np.random.default_rng(7), FRAMES, SIZE)
    videos = jax.jit(lambda p: shapes.render_batch(p, frames=FRAMES, size=SIZE))(batch)
    rng = np.random.default_rng(7)
    for video, scene in zip(videos, scenes):
        one = render(shapes.place(scene, rng, FRAMES, SIZE), frames=FRAMES, size=SIZE)
        # Same arithmetic in another order of fusion: a coverage off by a few ulp of a 64-pixel distance (4e-6 each).
        np.testing.assert_allclose(video, one, atol=5e-5)

"""The scorer: full marks for the truth, also blurred; every deliberate fault costs the attribute it touches."""

import functools

import jax
import numpy as np
import pytest
from scipy import ndimage

from hybrid_dit import scoring
from hybrid_dit.data import shapes
from hybrid_dit.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing
from hybrid_dit.errors import UserError

FRAMES, SIZE, COUNT = 33, 128, 40
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

_render = jax.jit(functools.partial(shapes.render, frames=FRAMES, size=SIZE))


def film(scene: Scene, seed: int = 0) -> np.ndarray:
    return scoring.to_uint8(np.asarray(_render(shapes.place(scene, np.random.default_rng(seed), FRAMES, SIZE))))


@functools.cache
def truth() -> tuple[np.ndarray, list[Scene]]:
    rng = np.random.default_rng(0)
    scenes = [shapes.sample_scene(rng, split) for split in ("train", "held_out") for _ in range(COUNT // 2)]
    return np.stack([film(scene, seed) for seed, scene in enumerate(scenes)]), scenes


@functools.cache
def few() -> tuple[np.ndarray, list[Scene]]:
    videos, scenes = truth()
    return videos[::5], scenes[::5]


def means(videos, scenes) -> dict[str, float]:
    return {name: values.mean() for name, values in scoring.score_batch(videos, scenes).items()}


def changed(scene: Scene, **words) -> Scene:
    """The scene with some words of every thing replaced by word -> function(word)."""
    things = [{name: getattr(t, name) for name in ("shape", "colour", "size", "direction")} for t in scene.things]
    return Scene(tuple(Thing(**(t | {k: f(t[k]) for k, f in words.items()})) for t in things), scene.background)


def following(table):
    """A function from a word to the next one of the table."""
    words = list(table)
    return lambda word: words[(words.index(word) + 1) % len(words)]


def through_an_autoencoder(videos: np.ndarray) -> np.ndarray:
    """A stand-in: Gaussian blur of 1 pixel and noise of 2.5 levels."""
    rng = np.random.default_rng(0)
    blurred = ndimage.gaussian_filter(videos.astype(np.float32), (0, 0, 1, 1, 0))
    return np.clip(np.rint(blurred + 2.5 * rng.standard_normal(blurred.shape, np.float32)), 0, 255).astype(np.uint8)


def test_truth_gets_full_marks():
    scores = means(*truth())
    assert min(scores.values()) >= 99, scores


def test_blur_and_noise_cost_little():
    videos, scenes = truth()
    scores = means(through_an_autoencoder(videos[::2]), scenes[::2])
    assert min(scores.values()) >= 97, scores


@pytest.mark.slow
def test_truth_gets_full_marks_on_many_scenes():
    rng = np.random.default_rng(1)
    plain, blurred = [], []
    for seed in range(300):
        scene = shapes.sample_scene(rng, "train")
        video = film(scene, seed)
        plain.append(list(scoring.score_video(video, scene).values()))
        blurred.append(list(scoring.score_video(through_an_autoencoder(video[None])[0], scene).values()))
    assert np.mean(plain, axis=0).min() >= 99
    assert np.mean(blurred, axis=0).min() >= 97


@pytest.mark.parametrize(
    ("attribute", "replace"),
    [
        ("shape", following(SHAPES)),
        ("size", following(SIZES)),
        ("direction", OPPOSITE.get),
        ("direction", dict(left="up", up="right", right="down", down="left").get),
        ("colour", None),
    ],
)
def test_a_wrong_word_costs_its_attribute_and_half_of_the_total(attribute, replace):
    """The video of another scene, which differs from the prompt in one word of every thing."""
    _, scenes = few()
    videos = []
    for scene in scenes:
        unused = iter(colour for colour in COLOURS if colour not in {t.colour for t in scene.things})
        videos.append(film(changed(scene, **{attribute: replace or (lambda _, unused=unused: next(unused))})))
    scores = means(np.stack(videos), scenes)
    assert scores[attribute] <= 3, scores
    kept = [scores[name] for name in (*scoring.ATTRIBUTES, "background", "clean") if name != attribute]
    assert min(kept) >= 98, scores
    assert 45 <= scores["total"] <= 52, scores


def test_reversed_video_loses_direction_alone():
    videos, scenes = few()
    scores = means(videos[:, ::-1], scenes)
    assert scores["direction"] <= 1 and 45 <= scores["total"] <= 51, scores
    assert min(scores[name] for name in ("shape", "colour", "size", "smoothness", "permanence")) >= 99, scores


def test_still_video_loses_direction():
    videos, scenes = few()
    scores = means(np.repeat(videos[:, :1], FRAMES, axis=1), scenes)
    assert scores["direction"] <= 1 and scores["total"] <= 51, scores


def test_shuffled_frames_lose_smoothness():
    videos, scenes = few()
    scores = means(videos[:, np.random.default_rng(0).permutation(FRAMES)], scenes)
    assert scores["smoothness"] <= 10 and scores["total"] <= 60, scores
    assert scores["permanence"] >= 99 and scores["shape"] >= 99, scores


def test_jitter_loses_smoothness_in_proportion():
    """Frames displaced by a random offset: the direction survives, smoothness falls with the size of the jumps."""
    videos, scenes = few()
    rng, smoothness = np.random.default_rng(0), []
    for spread in (0.25, 1, 4):
        offsets = np.rint(rng.normal(0, spread, (FRAMES, 2))).astype(int)
        moved = np.stack([np.roll(videos[:, t], tuple(o), axis=(1, 2)) for t, o in enumerate(offsets)], axis=1)
        smoothness.append(means(moved, scenes)["smoothness"])
    assert smoothness[0] > 70 > smoothness[1] > smoothness[2], smoothness
    assert smoothness[2] < 15, smoothness


@pytest.mark.parametrize("left", [0.0, 0.4])
def test_flicker_loses_permanence(left):
    """In every second frame the things keep only a share of their opacity."""
    videos, scenes = few()
    videos = videos.copy()
    for video, scene in zip(videos, scenes):
        backdrop = np.array(BACKGROUNDS[scene.background])
        video[1::2] = np.rint(backdrop + left * (video[1::2] - backdrop)).astype(np.uint8)
    scores = means(videos, scenes)
    assert scores["permanence"] <= 55 and scores["total"] <= 55, scores
    assert scores["shape"] >= 97 and scores["direction"] >= 97, scores


def test_vanishing_loses_permanence_in_proportion():
    videos, scenes = few()
    permanence = []
    for last in (25, 17, 9):
        gone = videos.copy()
        for video, scene in zip(gone, scenes):
            video[last:] = BACKGROUNDS[scene.background]
        scores = means(gone, scenes)
        permanence.append(scores["permanence"])
        assert scores["total"] <= scores["permanence"] + 1e-6, scores
    np.testing.assert_allclose(permanence, [100 * 25 / 33, 100 * 17 / 33, 100 * 9 / 33], atol=2)


@pytest.mark.parametrize("colour", ["magenta", "green"])
def test_an_extra_object_is_not_clean(colour):
    """A second thing in a one-thing scene, once of another and once of the same colour as the thing asked for."""
    wanted = Thing("circle", "green", "small", "right")
    scene = Scene((wanted,), "gray")
    placement = shapes.place(scene, np.random.default_rng(0), FRAMES, SIZE)
    rgb = np.array(COLOURS[colour], np.float32) / 127.5 - 1
    both = placement._replace(
        kind=np.array([0, 1], np.int32),
        radius=np.repeat(placement.radius[:1], 2),
        start=np.stack([[30, 30], [30, 90]]).astype(np.float32),
        velocity=np.repeat(placement.velocity[:1], 2, axis=0),
        present=np.ones(2, bool),
        colour=np.stack([placement.colour[0], rgb]),
    )
    scores = scoring.score_video(scoring.to_uint8(np.asarray(_render(both))), scene)
    assert scores["clean"] <= 60 and scores["total"] <= 60, scores
    alone = both._replace(present=np.array([True, False]))
    assert scoring.score_video(scoring.to_uint8(np.asarray(_render(alone))), scene)["total"] >= 99


def test_a_missing_object_scores_zero_in_all_its_attributes():
    rng = np.random.default_rng(0)
    scenes = [shapes.sample_scene(rng, "train", 1.0) for _ in range(4)]
    scores = means(np.stack([film(Scene(s.things[:1], s.background)) for s in scenes]), scenes)
    for name in (*scoring.ATTRIBUTES, "total"):
        assert 49 <= scores[name] <= 50.01, (name, scores)


def test_two_things_of_swapped_attributes_are_told_apart():
    """Red circle and blue square, filmed as blue circle and red square: no thing is right."""
    a, b = Thing("circle", "red", "small", "left"), Thing("square", "blue", "large", "up")
    swapped = Thing("square", "red", "large", "up"), Thing("circle", "blue", "small", "left")
    scores = scoring.score_video(film(Scene(swapped, "gray")), Scene((a, b), "gray"))
    assert scores["total"] <= 51, scores


def test_wrong_background_loses_background():
    _, scenes = few()
    other = [Scene(scene.things, following(BACKGROUNDS)(scene.background)) for scene in scenes]
    scores = means(np.stack([film(scene) for scene in other]), scenes)
    assert scores["background"] <= 1 and scores["total"] <= 1, scores
    assert scores["shape"] >= 95 and scores["direction"] >= 95, scores


def test_noise_and_empty_videos_score_nothing():
    _, scenes = few()
    rng = np.random.default_rng(0)
    shape = (4, FRAMES, SIZE, SIZE, 3)
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    soft = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), (0, 1, 4, 4, 0))
    clouds = np.clip(128 + soft * (80 / soft.std()), 0, 255).astype(np.uint8)
    constant = np.broadcast_to(np.array([0, 128, 255, 30], np.uint8)[:, None, None, None, None], shape)
    for videos in (noise, clouds, constant):
        assert means(videos, scenes[:4])["total"] <= 1


def test_the_video_of_another_prompt_scores_at_chance():
    """Chance: a quarter of the directions agree, 1/36 of the appearances, 1/3 of the backgrounds: (1/4 + 1/36)/2/3."""
    videos, scenes = truth()
    scores = means(np.roll(videos, 1, axis=0), scenes)
    assert scores["total"] <= 12, scores  # 4.6 expected, with 40 scenes of very uneven worth
    assert scores["colour"] <= 45 and scores["direction"] <= 45 and scores["shape"] <= 55, scores


def test_scores_are_graded_not_cliffs():
    """Fading the colour towards gray lowers its score in more than one step."""
    scene = Scene((Thing("square", "blue", "large", "down"),), "black")
    video, gray = film(scene).astype(np.float32), np.array([120, 120, 120])
    blue = video[..., 2:] / 230
    colours = []
    for share in (0, 0.35, 0.45, 0.9):
        faded = video + share * blue * (gray - np.array(COLOURS["blue"]))
        colours.append(scoring.score_video(np.rint(faded).astype(np.uint8), scene)["colour"])
    assert colours[0] >= 99 and 99 > colours[1] > colours[2] + 5 > 5 and colours[3] <= 1, colours


def test_bad_input_is_refused():
    scene = Scene((Thing("circle", "red", "small", "left"),), "black")
    with pytest.raises(UserError, match="to_uint8"):
        scoring.score_video(np.zeros((5, 64, 64, 3), np.float32), scene)
    with pytest.raises(UserError, match="at least 5 frames"):
        scoring.score_video(np.zeros((1, 64, 64, 3), np.uint8), scene)
    with pytest.raises(UserError, match="one scene per video"):
        scoring.score_batch(np.zeros((2, 5, 64, 64, 3), np.uint8), [scene])


def test_to_uint8_rounds_and_clips():
    video = np.array([-2, -1, 0.0039, 1, 3], np.float32).reshape(1, 1, 5, 1) * np.ones(3, np.float32)
    np.testing.assert_array_equal(scoring.to_uint8(video)[0, 0, :, 0], [0, 0, 128, 255, 255])

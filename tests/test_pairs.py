import jax
import numpy as np
import pipelines
import pytest

from hybrid_dit import generation, pairs
from hybrid_dit.data import shapes
from hybrid_dit.pairs import Pairs, batch_at, rendered_pairs


def numbered(n):
    return Pairs(np.arange(float(n))[:, None, None, None, None], np.arange(float(n))[:, None, None], np.zeros((n, 1)))


def test_batches_go_through_all_pairs_before_any_comes_again():
    seen = np.concatenate([batch_at(numbered(6), step, 4, seed=0).latents.ravel() for step in range(6)])
    epochs = seen.reshape(4, 6)
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # in another order each time


def test_a_batch_may_be_larger_than_the_data_and_keeps_pairs_together():
    batch = batch_at(numbered(2), 3, 5, seed=0)
    assert batch.latents.ravel().tolist().count(0.0) in (2, 3)
    np.testing.assert_array_equal(batch.latents.ravel(), batch.text.ravel())


def test_a_batch_depends_on_step_and_seed_alone():
    first = [batch_at(numbered(50), step, 8, seed=3).latents.ravel().tolist() for step in (7, 2, 7)]
    assert first[0] == first[2] != first[1]
    assert first[0] != batch_at(numbered(50), 7, 8, seed=4).latents.ravel().tolist()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return pipelines.random_pipeline(tmp_path_factory.mktemp("pairs") / "random")


def test_rendered_pairs_are_the_vaes_latents_of_training_scenes_and_their_prompts(pipeline, tmp_path, monkeypatch):
    count = 5  # not a multiple of the encoding batch
    cache = tmp_path / "latents.safetensors"
    got, empty = rendered_pairs(pipeline, count, pipelines.FRAMES, pipelines.SIZE, seed=1, cache=cache)
    rng = np.random.default_rng(1)
    scenes = [shapes.sample_scene(rng, "train", pairs.TWO_THINGS) for _ in range(count)]
    assert not any(shapes.is_held_out(scene) for scene in scenes)
    placements = shapes.place_batch(scenes, rng, pipelines.FRAMES, pipelines.SIZE)
    video = shapes.render_batch(placements, frames=pipelines.FRAMES, size=pipelines.SIZE)
    expected = jax.jit(lambda v: generation.encode_video(pipeline.vae, pipeline.vae_params, v))(video)
    # Streamed against whole: float32 sums in another order, which norms over two channels amplify where both are small.
    # Another scene, place or normalisation changes latents by a tenth of their scale and more.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(got.latents, expected, rtol=0, atol=1e-3 * scale)
    assert got.latents.shape == (5, 3, 4, 4, 4) and np.std(got.latents[0] - got.latents[1]) > 1e-3 * scale
    lengths = [len(scene.prompt.split()) + 1 for scene in scenes]  # a token per word, and </s>
    np.testing.assert_array_equal((got.count[:, :-1] == 1).sum(axis=1), lengths)
    assert (empty.count[:, :-1] == 1).sum() == 1 and empty.count[0, -1] == 511
    assert got.text.shape[1:] == empty.text.shape[1:]

    # Of another number of videos the places differ, too: nothing of the file is used.
    fewer, _ = rendered_pairs(pipeline, 2, pipelines.FRAMES, pipelines.SIZE, seed=1, cache=cache)
    anew, _ = rendered_pairs(pipeline, 2, pipelines.FRAMES, pipelines.SIZE, seed=1, cache=tmp_path / "two.safetensors")
    np.testing.assert_array_equal(fewer.latents, anew.latents)
    got, _ = rendered_pairs(pipeline, count, pipelines.FRAMES, pipelines.SIZE, seed=1, cache=cache)

    monkeypatch.setattr(pairs, "_encode", None)  # a second call must not encode again
    again, _ = rendered_pairs(pipeline, count, pipelines.FRAMES, pipelines.SIZE, seed=1, cache=cache)
    jax.tree.map(np.testing.assert_array_equal, again, got)

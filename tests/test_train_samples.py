import numpy as np
import pytest
from pipelines import FRAMES, SIZE, random_pipeline

from configs import common
from hybrid_dit import generation, processes
from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.train_samples import SampleVideos
from hybrid_dit.video_io import read_mp4

ATTENTION = (AttentionSpec(), AttentionSpec("hybrid", 2))


PROMPTS = ["a small red circle moving left", "a large blue square moving up", "a small cyan triangle moving right"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return random_pipeline(tmp_path_factory.mktemp("samples") / "pipeline")


@pytest.fixture
def config(tmp_path_factory):
    config = common.get_config("finetune", "tiny")
    config.model.frames, config.model.height, config.model.width = FRAMES, SIZE, SIZE
    file = tmp_path_factory.mktemp("prompts") / "held_out.txt"
    file.write_text("\n".join(PROMPTS))
    config.prompts.held_out = str(file)
    return config


def test_the_first_prompts_are_sampled_from_the_same_noise_every_time(config, pipeline, tmp_path, monkeypatch):
    seen = []

    def denoise(self, attention, params, noise, context, negative, key):
        assert self.guidance == config.sample.guidance and self.wan.num_layers == 2
        seen.append((attention, params, noise, context, negative))
        return noise, 0.0

    def decode(self, latents):
        return np.full((len(latents), 9, 32, 32, 3), 128, np.uint8), 0.0

    monkeypatch.setattr(generation.Generator, "denoise", denoise)
    monkeypatch.setattr(generation.Generator, "decode", decode)
    videos = SampleVideos(config, pipeline, ATTENTION, tmp_path)
    videos(5, "five")
    videos(10, "ten")
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.*")} == {
        f"step-{step:06d}/{name}" for step in (5, 10) for name in ("sheet.png", *(f"{p}-0.mp4" for p in PROMPTS[:2]))
    }
    assert read_mp4(tmp_path / f"step-000005/{PROMPTS[1]}-0.mp4").shape == (9, 32, 32, 3)
    assert [(attention, params) for attention, params, *_ in seen] == [(ATTENTION, "five"), (ATTENTION, "ten")]
    expected = generation.noise_for(generation.noise_key(config.seed), (3, 4, 4, 4), range(2))
    context = generation.text_context(pipeline, [*PROMPTS[:2], config.model.negative_prompt])
    for _, _, noise, got, negative in seen:
        np.testing.assert_array_equal(noise, expected)
        for part, other, whole in zip(got, negative, context):
            np.testing.assert_array_equal(np.concatenate([part, other]), whole)


def test_only_the_first_process_writes(config, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "text_context", lambda _, prompts: (np.zeros((len(prompts), 2, 8)),) * 2)
    monkeypatch.setattr(generation.Generator, "denoise", lambda self, attention, params, noise, *_, **__: (noise, 0.0))
    videos = SampleVideos(config, pipeline, (), tmp_path)
    monkeypatch.setattr(processes, "is_main", lambda: False)
    videos(1, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"finetune.sample_prompts": 0}, {"prompts.held_out": ""}], ids=str)
def test_without_prompts_it_is_told_what_to_set(config, pipeline, tmp_path, change):
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match="--config.prompts.held_out"):
        SampleVideos(config, pipeline, (), tmp_path)

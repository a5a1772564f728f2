import zlib

import jax
import numpy as np
import pytest
from workdirs import PROMPTS, finish_stages, tiny_config

from hybrid_dit import generation
from hybrid_dit.convert.pipeline import load_pipeline
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import sample
from hybrid_dit.video_io import read_mp4, write_mp4

TWICE = {"sample__samples": 2, "sample__sampler": "euler_ancestral"}  # noise at every step, which has to be its own


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workdir with two samples of three prompts by the teacher."""
    root = tmp_path_factory.mktemp("sample")
    sample.run(tiny_config("sample", root, **TWICE), root / "run")
    return root


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_the_folder_of_videos_is_what_vbench_reads(root):
    folder = root / "run" / "sample_teacher"
    assert names(folder / "videos") == sorted(f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(2))
    assert names(folder / "sheets") == sorted(f"{prompt}-{i}.png" for prompt in PROMPTS for i in range(2))


def test_a_video_depends_on_seed_name_and_number_alone(root, tmp_path):
    """Made on one device in a batch of one; the job shares batches of two among 8 devices."""
    config = tiny_config("sample", root)
    pipeline = load_pipeline(config.model.weights)
    generator = generation.Generator(pipeline, "euler_ancestral", 2, 3.0, "float32")
    shape = generation.latent_shape(pipeline.wan, pipeline.vae, 9, 32, 32)
    context = generation.text_context(pipeline, [PROMPTS[2], ""])
    noise, keys = generation.named_noise(
        generation.noise_key(0), shape, np.uint32([zlib.crc32(PROMPTS[2].encode())]), np.uint32([1])
    )
    halves = [jax.tree.map(lambda a, i=i: a[i : i + 1], context) for i in (0, 1)]
    latents, _ = generator.denoise((), pipeline.dit, noise, *halves, key=keys)
    video, _ = generator.decode(latents)
    write_mp4(tmp_path / "expected.mp4", video[0])
    expected = read_mp4(tmp_path / "expected.mp4").astype(int)
    videos = root / "run" / "sample_teacher" / "videos"
    # In another batch rounding may move single pixels by a level, which the encoder may spread a little.
    assert np.abs(read_mp4(videos / f"{PROMPTS[2]}-1.mp4") - expected).mean() < 0.5
    assert np.abs(read_mp4(videos / f"{PROMPTS[2]}-0.mp4") - expected).mean() > 10  # another noise


def test_finished_videos_are_kept_and_missing_ones_made(root, monkeypatch):
    videos = root / "run" / "sample_teacher" / "videos"
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in videos.iterdir()}
    lost = f"{PROMPTS[1]}-0.mp4"
    (videos / lost).unlink()
    unfinished = videos.parent / "unfinished"
    unfinished.mkdir()
    (unfinished / ".partial-1.mp4").write_bytes(b"what a killed run leaves")
    made = []
    write = sample.write_mp4

    def look(path, *args):
        made.append(path.name)
        write(path, *args)
        assert names(videos) == sorted(set(before) - {lost})  # nothing there but finished videos

    monkeypatch.setattr(sample, "write_mp4", look)
    sample.run(tiny_config("sample", root, **TWICE), root / "run")
    assert made == [lost]
    assert names(videos) == sorted(before) and not unfinished.exists()
    for name, (time, content) in before.items():
        if name == lost:
            (root / "old.mp4").write_bytes(content)
            difference = np.abs(read_mp4(videos / name).astype(int) - read_mp4(root / "old.mp4"))
            assert difference.mean() < 0.5  # at another place of its batch, see above
        else:
            assert (videos / name).stat().st_mtime_ns == time


def test_other_prompts_may_join_but_not_other_settings(root):
    config = tiny_config("sample", root, **TWICE, sample__prompt=PROMPTS[0], sample__batch=1)
    sample.run(config, root / "run")  # nothing left to do
    with pytest.raises(UserError, match="sample.guidance: 3.0 there, 4.0 in this command"):
        sample.run(tiny_config("sample", root, **TWICE, sample__guidance=4.0), root / "run")


def test_finetuned_is_sampled_beside_the_teacher(root, tmp_path):
    config = tiny_config("sample", root, sample__variant="finetuned", sample__first=1, sample__batch=1)
    with pytest.raises(UserError, match="configs/finetune.py"):
        sample.run(config, tmp_path)
    assert not list(tmp_path.iterdir())
    finish_stages(config, tmp_path)
    sample.run(config, tmp_path)
    hybrid = read_mp4(tmp_path / "sample_finetuned" / "videos" / f"{PROMPTS[0]}-0.mp4").astype(int)
    teacher = read_mp4(root / "run" / "sample_teacher" / "videos" / f"{PROMPTS[0]}-0.mp4")
    assert np.abs(hybrid - teacher).mean() > 1


def settings(root, **values):
    return tiny_config("sample", root, **{f"sample__{k}": v for k, v in values.items()}).sample


def test_prompts_and_names(root, tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "same.txt").write_text("a/b\na_b\nc\n")
    assert sample.wanted(settings(root)) == {prompt: prompt for prompt in PROMPTS}
    assert sample.wanted(settings(root, prompt="a cat")) == {"a cat": "a cat"}
    first = sample.wanted(settings(root, first=2, names=tmp_path / "names.txt"))
    assert first == {"one": PROMPTS[0], "two": PROMPTS[1]}
    with pytest.raises(UserError, match="2 lines for 3 prompts"):
        sample.wanted(settings(root, names=tmp_path / "two.txt"))
    with pytest.raises(UserError, match="two prompts would both be written to a_b-0.mp4"):
        sample.wanted(settings(root, names=tmp_path / "same.txt"))
    with pytest.raises(UserError, match="no prompts; set --config.sample.prompt"):
        sample.wanted(settings(root, prompts=""))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sample__variant": "student"}, "choose one of teacher, finetuned"),
        ({"sample__batch": 0}, "at least 1"),
        ({"sample__sampler": "unpic"}, "unknown sampler"),
        ({"sample__interval": "500"}, r"two timesteps LOW,HIGH .*got \(500.0,\)"),
        ({"sample__interval": "1,2,3"}, "two timesteps LOW,HIGH"),
        ({"sample__fps": 0}, "sample.fps=0 must be positive"),
        ({"model__width": 40}, "width=40 is not a multiple"),
    ],
)
def test_bad_settings_write_nothing(root, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        sample.run(tiny_config("sample", root, **values), tmp_path)
    assert not list(tmp_path.iterdir())

import csv
import json

import jax
import numpy as np
import pytest
from workdirs import CHOICE, PROMPTS, finish_stages, tiny_config

from hybrid_dit import fidelity, generation, scoring
from hybrid_dit.convert.pipeline import load_pipeline, load_transformer
from hybrid_dit.data.shapes import parse_prompt
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import evaluate
from hybrid_dit.video_io import read_mp4, write_mp4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workdir on which evaluation has run once."""
    root = tmp_path_factory.mktemp("evaluate")
    config = tiny_config("evaluate", root)
    finish_stages(config, root / "run")
    evaluate.run(config, root / "run")
    return root


def results(root):
    return json.loads((root / "run" / "evaluate" / "results.json").read_text())


def cached(root, variant):
    files = sorted((root / "run" / "evaluate" / "cache").glob(f"{variant}_*.npz"))
    return np.concatenate([np.load(file)["videos"] for file in files])


def test_every_variant_has_a_video_of_every_prompt(root):
    folder = root / "run" / "evaluate"
    for variant in evaluate.VARIANTS:
        names = sorted(f.name for f in (folder / "videos" / variant).iterdir())
        assert names == sorted(f"{prompt}-{i}.mp4" for i, prompt in enumerate(PROMPTS))
    assert len(list((folder / "sheets").glob("*.png"))) == len(PROMPTS)
    write_mp4(root / "expected.mp4", cached(root, "finetuned")[2])
    video = read_mp4(folder / "videos" / "finetuned" / f"{PROMPTS[2]}-2.mp4")
    np.testing.assert_array_equal(video, read_mp4(root / "expected.mp4"))


def test_numbers_are_those_of_the_raw_videos(root):
    rows = results(root)["variants"]
    assert list(rows) == list(evaluate.VARIANTS)
    scenes = [parse_prompt(prompt) for prompt in PROMPTS]
    for name, row in rows.items():
        totals = scoring.score_batch(cached(root, name), scenes)["total"]
        np.testing.assert_allclose(row["score_of_each_video"], totals, atol=0.005)
        np.testing.assert_allclose(row["score"][0], totals.mean(), atol=0.005)
        assert row["seconds_denoise"] > 0 and row["seconds_decode"] > 0
    videos = {name: cached(root, name).astype(float) for name in rows}
    error = ((videos["distilled"] - videos["teacher"]) ** 2).mean(axis=(1, 2, 3, 4))
    expected = (10 * np.log10(255**2 / error)).mean()
    np.testing.assert_allclose(rows["distilled"]["psnr_to_teacher"][0], expected, atol=0.01)
    assert rows["teacher"]["psnr_to_teacher"] is None
    assert rows["distilled"]["blocks"] == CHOICE


def test_variants_differ_but_start_from_the_same_noise(root):
    videos = {name: cached(root, name) for name in evaluate.VARIANTS}
    names = list(videos)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert (videos[a] != videos[b]).mean() > 0.01
    # From other noise a video has nothing of the teacher's: the hybrid, though random, is nearer.
    other = videos["teacher"][[1, 2, 0]]
    likeness = {name: fidelity.psnr(video, videos["teacher"]) for name, video in (videos | {"other": other}).items()}
    assert likeness["finetuned"].min() > likeness["other"].max()


def test_flops_of_a_video(root):
    row = results(root)["variants"]["finetuned"]
    # 12 tokens, width 24, 2 heads of 12; F = 24 per head, phi of two layers; 2 steps, 2 branches.
    n, d, f, heads = 12, 24, 24, 2
    softmax = 4 * n * n * d
    phi = heads * n * (2 * (12 * f + f * f) + 2 * f)
    hybrid = 4 * n * (n // 2) * d + 2 * phi + 4 * n * f * d
    assert row["attention_flops"] == 2 * 2 * (hybrid + softmax)
    assert row["attention_flops_saved"] == round(1 - (hybrid + softmax) / (2 * softmax), 4)


def test_csv_has_a_line_per_variant(root):
    with open(root / "run" / "evaluate" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = results(root)["variants"]
    assert [row["variant"] for row in rows] == list(expected)
    assert float(rows[2]["psnr_to_teacher_low"]) == expected["distilled"]["psnr_to_teacher"][1]
    assert rows[0]["psnr_to_teacher"] == ""


def test_running_again_prints_the_table_and_samples_nothing(root, capsys, monkeypatch):
    monkeypatch.setattr(generation.Generator, "denoise", None)
    evaluate.run(tiny_config("evaluate", root), root / "run")
    out = capsys.readouterr().out
    assert all(variant in out for variant in evaluate.VARIANTS) and "[" in out
    header = next(line for line in out.splitlines() if "PSNR to teacher" in line)
    row = next(line for line in out.splitlines() if line.startswith("finetuned"))
    assert header.index("PSNR") == row.index(f"{results(root)['variants']['finetuned']['psnr_to_teacher'][0]:.1f} dB")


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(root, tmp_path, monkeypatch):
    config = tiny_config("evaluate", root)
    finish_stages(config, tmp_path)
    original, calls = generation.Generator.denoise, []

    def interrupted(self, attention, *args, **kwargs):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(attention)
        return original(self, attention, *args, **kwargs)

    monkeypatch.setattr(generation.Generator, "denoise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config, tmp_path)
    assert not (tmp_path / "evaluate" / "results.json").exists()
    left = [tmp_path / "evaluate" / name for name in ("cache/.partial-1.npz", "videos/teacher/.partial-2.mp4")]
    for file in left:  # as a killed run leaves them
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    del calls[:]
    monkeypatch.setattr(generation.Generator, "denoise", lambda *a, **k: (calls.append(0), original(*a, **k))[1])
    evaluate.run(config, tmp_path)
    assert len(calls) == 8 - 3  # four variants of two batches
    assert not any(file.exists() for file in left)
    again = json.loads((tmp_path / "evaluate" / "results.json").read_text())["variants"]
    for name, row in results(root)["variants"].items():
        assert again[name]["score_of_each_video"] == row["score_of_each_video"]
        assert again[name]["psnr_to_teacher"] == row["psnr_to_teacher"]
        assert again[name]["velocity_error"] == row["velocity_error"]


def test_prompts_outside_the_grammar_have_no_scenes(root):
    model = tiny_config("evaluate", root).model
    assert len(evaluate.scenes_of(PROMPTS, model)) == 3
    assert evaluate.scenes_of([*PROMPTS, "a cat eats a fish"], model) is None


def test_velocity_errors_are_those_of_the_velocities_at_the_teachers_noisy_latents(root):
    pipeline = load_pipeline(tiny_config("evaluate", root).model.weights)
    _, attention, params = load_transformer(root / "run" / "finetune" / "transformer")
    cache = root / "run" / "evaluate" / "cache"
    teacher, student = (np.load(cache / f"{name}_00002.npz") for name in ("teacher", "finetuned"))  # the third prompt
    x0 = teacher["latents"][:1]
    noise = generation.noise_for(jax.random.fold_in(generation.noise_key(0), evaluate.PROBE), x0.shape[1:], [2])
    time = results(root)["variants"]["finetuned"]["velocity_error"]["timesteps"][-1]
    x = np.repeat((1 - time / 1000) * x0 + time / 1000 * np.asarray(noise), 2, axis=0)
    text = generation.text_context(pipeline, [PROMPTS[2], ""])
    cond, uncond = jax.jit(generation.make_velocity(pipeline.wan, attention))(params, x, np.float32([time] * 2), text)
    v, reference = np.asarray(uncond + 3.0 * (cond - uncond), np.float64), teacher["velocities"][-1, 0]
    assert student["l1"].shape == (2, 1)  # two timesteps, one prompt that is not filled up
    # A float32 DiT in other batches; the velocities of the teacher and of a random hybrid are far apart.
    np.testing.assert_allclose(student["l1"][-1, 0], np.abs(v - reference).sum() / np.abs(reference).sum(), rtol=1e-3)
    assert student["l1"][-1, 0] > 0.01


def test_velocity_errors_have_a_table_and_a_picture(root):
    with open(root / "run" / "evaluate" / "velocity.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == [name for name in evaluate.VARIANTS[1:] for _ in range(2)]
    row = results(root)["variants"]["distilled"]["velocity_error"]
    values = np.concatenate(
        [np.load(f)["l2"] for f in sorted((root / "run" / "evaluate" / "cache").glob("distilled_*.npz"))], axis=1
    )
    np.testing.assert_allclose([mean for mean, _, _ in row["l2"]], values.mean(axis=1), atol=1e-5)
    assert [float(r["l2"]) for r in rows if r["variant"] == "distilled"] == [mean for mean, _, _ in row["l2"]]
    assert (root / "run" / "evaluate" / "velocity.png").read_bytes().startswith(b"\x89PNG")
    assert results(root)["variants"]["teacher"]["velocity_error"] == {"timesteps": row["timesteps"]}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"evaluate__prompts": 0}, "at least 1"),
        ({"evaluate__velocity_steps": -1}, "evaluate.velocity_steps=-1 at least 0"),
        ({"evaluate__prompts": 4}, "has 3 prompts"),
        ({"evaluate__sampler": "eular"}, "unknown sampler 'eular'"),
        ({"model__frames": 10}, "frames=10"),
    ],
)
def test_bad_settings_write_nothing(root, tmp_path, values, message):
    good = tiny_config("evaluate", root)
    bad = tiny_config("evaluate", root, **values)
    finish_stages(bad if "model__frames" in values else good, tmp_path)
    with pytest.raises(UserError, match=message):
        evaluate.run(bad, tmp_path)
    assert not (tmp_path / "evaluate").exists()


def test_stages_must_be_complete(root, tmp_path):
    with pytest.raises(UserError, match="distill is not complete"):
        evaluate.run(tiny_config("evaluate", root), tmp_path)
    assert not list(tmp_path.iterdir())

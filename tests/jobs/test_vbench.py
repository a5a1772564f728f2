"""From a suite's prompts to its folder of videos, in two processes' shares, and from results to a table."""

import csv
import json
import shutil

import numpy as np
import pytest
from workdirs import PROMPTS, tiny_config

from hybrid_dit.errors import UserError
from hybrid_dit.jobs import sample, vbench
from hybrid_dit.video_io import read_mp4

INFO = [
    {"prompt_en": PROMPTS[0], "dimension": ["Material"]},
    {"prompt_en": PROMPTS[0], "dimension": ["Mechanics"]},
    {"prompt_en": PROMPTS[2], "dimension": ["Mechanics"]},
]
FILES = sorted(f"{e['dimension'][0]}/{e['prompt_en']}-{i}.mp4" for e in INFO for i in range(3))


def settings(job, root, **values):
    suite = {"suite__name": "vbench2", "suite__prompts": root / "info.json"}
    return tiny_config(job, root, **{**suite, **values})


def names(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


class NoiseAsVideo:
    """In the generator's place, which `test_sample.py` tests: shows the noise of every video."""

    def denoise(self, attention, params, noise, context, negative, key, on_step):
        return noise, 0.0

    def decode(self, latents):
        brightness = np.clip(128 + 60 * np.asarray(latents)[..., :3], 0, 255).astype(np.uint8)
        return brightness.repeat(8, axis=2).repeat(8, axis=3), 0.0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workdir in which the first of two processes has made its share of the videos."""
    root = tmp_path_factory.mktemp("vbench")
    (root / "info.json").write_text(json.dumps(INFO))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "make_generator", lambda *args: NoiseAsVideo())
        patch.setattr(sample, "place_text", lambda *args: None)
        for name in ("encode_texts", "load_dit"):
            patch.setattr(sample.sample_loading, name, lambda *args: None)
        sample.run(settings("sample", root, sample__share="0/2"), root / "run")
        yield root


def test_shares_make_the_suites_folder(root, capsys):
    folder = root / "run" / "sample_teacher" / "vbench2"
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    assert vbench.run(settings("vbench", root), root / "run") == 1
    assert f"VBench-2.0, teacher: {len(before)} of 9 videos, missing: " in capsys.readouterr().out
    assert 0 < len(before) < 9
    sample.run(settings("sample", root, sample__share="1/2"), root / "run")
    assert names(folder) == FILES
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert vbench.run(settings("vbench", root), root / "run") == 0
    assert "VBench-2.0, teacher: 9 of 9 videos\n" in capsys.readouterr().out
    assert [f.name for f in folder.parent.iterdir() if f.name.startswith("unfinished")] == []
    videos = {name: read_mp4(folder / name).astype(int) for name in FILES}
    for i in range(3):  # one video in two places
        a, b = (videos[f"{d}/{PROMPTS[0]}-{i}.mp4"] for d in ("Material", "Mechanics"))
        np.testing.assert_array_equal(a, b)
    assert np.abs(videos[f"Material/{PROMPTS[0]}-0.mp4"] - videos[f"Material/{PROMPTS[0]}-1.mp4"]).mean() > 5


def test_videos_of_another_text_are_not_taken_for_those_asked_for(root, tmp_path):
    """File names don't show the text that the model was given."""
    (tmp_path / "new.txt").write_text("one\none\ntwo\n")
    (tmp_path / "other.txt").write_text("one\none\nthree\n")
    plain, run = settings("sample", root), tmp_path / "run"
    rewritten = settings("sample", root, suite__rewritten=tmp_path / "new.txt", suite__dimensions="Material")
    sample.run(plain, run)
    with pytest.raises(UserError, match="-0.mp4 was made with another text than is wanted now"):
        sample.run(rewritten, run)
    shutil.rmtree(run / "sample_teacher" / "vbench2")  # as the message says
    sample.run(rewritten, run)
    everything = settings("sample", root, suite__rewritten=tmp_path / "other.txt")
    sample.run(everything, run)  # the text of what was not sampled yet may change
    texts = json.loads((run / "sample_teacher" / "vbench2_texts.json").read_text())
    assert set(texts.values()) == {"one", "three"}
    with pytest.raises(UserError, match="another text"):
        sample.run(plain, run)


def test_a_stray_file_is_told(root, capsys):
    folder = root / "run" / "sample_teacher" / "vbench2"
    (folder / "notes.txt").write_text("mine")
    assert vbench.run(settings("vbench", root), root / "run") == 1
    assert "stray: 'notes.txt'" in capsys.readouterr().out
    (folder / "notes.txt").unlink()


def test_results_become_a_table(tmp_path, capsys):
    config = tiny_config("vbench", tmp_path, suite__results=f"paper={tmp_path}/paper.json")
    raw = {name: 0.5 for name in vbench.get_suite("vbench").dimensions}
    results = tmp_path / "run" / "sample_finetuned" / "vbench_results"
    results.mkdir(parents=True)
    (results / "r_eval_results.json").write_text(json.dumps({name: [value, []] for name, value in raw.items()}))
    (tmp_path / "paper.json").write_text(json.dumps({"scene": [0.4, []]}))
    assert vbench.run(config, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "| VBench | finetuned | paper |" in out and "| scene | 50.00 | 40.00 |" in out
    folder = tmp_path / "run" / "vbench"
    assert (folder / "scores.md").read_text() in out
    with open(folder / "scores.csv", newline="") as file:
        assert next(row for row in csv.DictReader(file) if row["score"] == "total")["finetuned_normalised"]
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "nothing to check and no results"),
        ({"suite__results": "here.json"}, "'here.json' must be NAME=PATH"),
        ({"suite__results": "a=x.json,a=y.json"}, "'a=y.json' must be NAME=PATH with a name not used yet .a."),
        ({"suite__results": "a=x.json"}, "x.json: No such file"),
        ({"suite__prompts": "no.json"}, "no.json: No such file"),
    ],
)
def test_mistakes_are_told(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        vbench.run(tiny_config("vbench", tmp_path, **values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_videos_have_to_be_sampled_first(root, tmp_path):
    with pytest.raises(UserError, match="--config=configs/sample.py --config.suite.name=vbench2"):
        vbench.run(settings("vbench", root), tmp_path / "run")

import json

import pytest
from workdirs import PROMPTS, tiny_config

from hybrid_dit import jobs
from hybrid_dit.convert.pipeline import load_pipeline
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import distill, surgery
from hybrid_dit.report.contents import read
from hybrid_dit.workdir import Stage

SHORT = {
    "model__height": 64,  # at 12 tokens softmax would be the cheapest
    "model__width": 64,
    "select__budget": "1 Linear",
    "distill__degree": 1,
    "distill__layers": 1,
    "distill__prompts": 1,
    "distill__sample_steps": 2,
    "distill__held_out_prompts": 1,
    "distill__held_out_steps": 1,
    "finetune__steps": 2,
    "finetune__batch": 1,
    "finetune__warmup": 1,
    "finetune__videos": 1,
    "finetune__save_every": 1,
    "evaluate__prompts": 1,
    "evaluate__batch": 1,
    "evaluate__sample_steps": 1,
}


def config_of(root, **values):
    return tiny_config("surgery", root, **{**SHORT, **values})


def test_whole_surgery_then_the_same_command_again(tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    surgery.run(config_of(tmp_path), workdir)
    out = capsys.readouterr().out
    headers = [line.split()[2].rstrip(":") for line in out.splitlines() if line.startswith("===")]
    assert headers == list(surgery.STAGES)
    assert out.index("=== 5/5") < out.index("PSNR to teacher")
    assert sorted(file.name for file in workdir.iterdir()) == sorted([*surgery.STAGES, "report.html"])
    contents = read(workdir)  # what the stages write is what the report reads
    assert contents.finetune_loss is not None and contents.distill_loss
    assert contents.problems == [] and set(contents.status.values()) == {"complete"}
    page = (workdir / "report.html").read_text()
    assert page.count("<video ") == 4 and "Not available" not in page and "Not recorded" not in page
    chosen = json.loads((workdir / "select" / "rates.json").read_text())["blocks"]
    exported = load_pipeline(workdir / "export" / "pipeline")
    assert [spec.label for spec in exported.attention] == chosen
    assert sorted(chosen) == ["linear", "softmax"]

    times = {file: file.stat().st_mtime_ns for file in workdir.rglob("*")}
    monkeypatch.setattr(distill, "run", None)
    surgery.run(config_of(tmp_path), workdir)
    out = capsys.readouterr().out
    assert out.count("complete in") == 4 and "PSNR to teacher" in out and f"report: {workdir / 'report.html'}" in out
    assert {file: file.stat().st_mtime_ns for file in workdir.rglob("*")} == times

    with pytest.raises(UserError) as error:
        surgery.run(config_of(tmp_path, finetune__steps=3), workdir)
    assert "finetune.steps: 2 there, 3 in this command" in str(error.value)


def test_goes_on_at_the_stage_that_was_interrupted(tmp_path, monkeypatch, capsys):
    config, ran = config_of(tmp_path), []

    class Job:
        def __init__(self, name):
            self.name = name

        def run(self, config, workdir):
            ran.append(self.name)
            folder = next(folder for folder, (job, _) in surgery.STAGES.items() if job == self.name)
            stage = Stage(workdir, folder, config)
            if len(ran) == 3:
                raise KeyboardInterrupt
            stage.finish()

    monkeypatch.setattr(jobs, "load", Job)
    with pytest.raises(KeyboardInterrupt):
        surgery.run(config, tmp_path / "run")
    assert ran == ["distill", "select_rates", "finetune"]
    surgery.run(config, tmp_path / "run")
    assert ran[3:] == ["finetune", "export", "evaluate"]
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("===")][-5:] == [
        f"{n}/5" for n in range(1, 6)
    ]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"select__budget": "0.001"}, r"select.budget=0.001: no choice .* smallest reachable cost is \d+"),
        ({"select__budget": "3R2"}, "3R2 converts 3 blocks, but the model has 2"),
        ({"select__budget": "many"}, "can't read 'many'"),
        ({"evaluate__prompts": 9}, "has 3 prompts"),
        ({"evaluate__sampler": "ddim"}, "unknown sampler 'ddim'"),
        ({"report__max_mb": 0.5}, "at least 1 MB, got 0.5"),
        ({"distill__rates": "R2,R2"}, "names a rate twice"),
        ({"model__height": 40}, "height=40 is not a multiple of 16"),
        ({"model__weights": "nowhere"}, "nowhere does not exist"),
        ({"model__weights": ""}, "no weights given"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_at_once(tmp_path, values, message):
    config = config_of(tmp_path, **values)
    with pytest.raises(UserError, match=message):
        surgery.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_are_the_files(tmp_path):
    assert surgery.evaluate.held_out(config_of(tmp_path, evaluate__prompts=2)) == PROMPTS[:2]

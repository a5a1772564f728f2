import json

import pytest

from configs import common
from hybrid_dit import environment
from hybrid_dit.errors import UserError
from hybrid_dit.workdir import SECTIONS, Stage, is_done, require


def settings(**changes):
    config = common.get_config("distill", "tiny")
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def begun(workdir, name="distill", **changes):
    """A stage that something was made in."""
    stage = Stage(workdir, name, settings(**changes))
    (stage.folder / "made").touch()
    return stage


def test_a_stage_continues_until_it_is_finished(tmp_path):
    stage = Stage(tmp_path, "distill", settings())
    assert stage.folder == tmp_path / "distill" and stage.folder.is_dir() and not stage.done
    assert not Stage(tmp_path, "distill", settings()).done
    stage.finish(error=0.5)
    assert Stage(tmp_path, "distill", settings()).done
    assert json.loads((stage.folder / "done.json").read_text()) == {"error": 0.5}
    assert json.loads((stage.folder / "environment.json").read_text()) == environment.describe()


def test_other_settings_are_an_error_that_shows_each_difference(tmp_path):
    begun(tmp_path)
    with pytest.raises(UserError) as info:
        Stage(tmp_path, "distill", settings(seed=3, distill__degree=4, distill__rates=("R2",)))
    text = str(info.value)
    assert "distill.degree: 2 there, 4 in this command" in text and "seed: 0 there, 3" in text
    assert "distill.rates" in text and "distill.layers" not in text and "--workdir" in text


def test_settings_of_later_stages_do_not_matter(tmp_path):
    Stage(tmp_path, "distill", settings())
    Stage(tmp_path, "distill", settings(finetune__steps=7, select__budget="1R2"))
    begun(tmp_path, "finetune")
    with pytest.raises(UserError, match="select.budget"):
        Stage(tmp_path, "finetune", settings(select__budget="1R2"))


def test_how_a_stage_runs_may_change_when_it_is_continued(tmp_path):
    begun(tmp_path, "finetune")
    changes = {"finetune__save_every": 7, "finetune__remat": "dots", "mesh__seq": 2, "data__max_bad": 7}
    Stage(tmp_path, "finetune", settings(**changes))
    file = tmp_path / "finetune/settings.json"
    there = json.loads(file.read_text())
    assert "save_every" not in there["finetune"] and "steps" in there["finetune"]
    there["finetune"]["save_every"] = 3  # as earlier versions wrote it
    file.write_text(json.dumps(there))
    Stage(tmp_path, "finetune", settings())


def test_a_stage_that_nothing_was_made_in_takes_other_settings(tmp_path):
    Stage(tmp_path, "finetune", settings(finetune__schedule="cosinus"))  # and then that was refused
    begun(tmp_path, "finetune")
    with pytest.raises(UserError, match="finetune.schedule: 'constant' there"):
        Stage(tmp_path, "finetune", settings(finetune__schedule="cosinus"))
    Stage(tmp_path, "sample_teacher", settings())
    with pytest.raises(UserError, match="sample.guidance"):  # others that share the work may be about to begin
        Stage(tmp_path, "sample_teacher", settings(sample__guidance=9.0))


def test_other_data_is_an_error_but_need_not_be_told_to_later_stages(tmp_path):
    data = {"data__kind": "tar", "data__path": "a", "data__scale": "raw"}
    begun(tmp_path, "finetune", **data).finish()
    for name, value in (("kind", "csv"), ("path", "b"), ("scale", "auto"), ("dtype", "bfloat16")):
        with pytest.raises(UserError, match=f"data.{name}: .* there, '{value}'"):
            is_done(tmp_path, "finetune", settings(**data | {f"data__{name}": value}))
    assert require(tmp_path, "finetune", settings()) and is_done(tmp_path, "finetune", settings(**data))
    file = tmp_path / "finetune/settings.json"
    there = json.loads(file.read_text())
    del there["data"]  # as earlier versions wrote it
    file.write_text(json.dumps(there))
    assert is_done(tmp_path, "finetune", settings())


def test_every_stage_depends_on_what_the_stages_before_it_depend_on():
    order = ["distill", "select", "finetune", "evaluate"]
    for before, after in zip(order, order[1:]):
        assert set(SECTIONS[before]) < set(SECTIONS[after])


def test_require_wants_a_complete_stage(tmp_path):
    for begin in (lambda: None, lambda: Stage(tmp_path, "distill", settings())):
        begin()
        with pytest.raises(UserError, match=r"distill is not complete; run --config=configs/distill\.py"):
            require(tmp_path, "distill", settings())
    Stage(tmp_path, "distill", settings()).finish()
    assert require(tmp_path, "distill", settings()) == tmp_path / "distill"
    with pytest.raises(UserError, match="other settings"):
        require(tmp_path, "distill", settings(seed=1))


def test_require_does_not_create_the_stage(tmp_path):
    with pytest.raises(UserError):
        require(tmp_path, "distill", settings())
    assert list(tmp_path.iterdir()) == []

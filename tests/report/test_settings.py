import subprocess

import pytest
from example import NASTY

from configs import common
from hybrid_dit.command_line import parse
from hybrid_dit.report.settings import COMMON, commands, compare, flatten, load_defaults

SECTIONS = ("model", "prompts", "distill", "select", "finetune", "evaluate")


def settings_of(config) -> dict:
    return {"seed": config.seed, **{section: config[section].to_dict() for section in SECTIONS}}


def changed_config(model):
    config = common.get_config("surgery", model)
    config.seed = 7
    config.model.negative_prompt = f"{NASTY} $HOME `x` 'a' \\"
    config.prompts.train = "my prompts.txt"
    config.distill.rates = ("R2", "R16")
    config.distill.shared = True
    config.distill.learning_rate = 1e-5
    return config


def arguments(command: str) -> list[str]:
    """What a shell hands to python."""
    script = f"python() {{ printf '%s\\0' \"$@\"; }}\n{command}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


@pytest.mark.parametrize("model", common.MODELS)
def test_the_command_of_the_page_gives_the_same_settings(model, tmp_path):
    config = changed_config(model)
    settings = compare(settings_of(config), load_defaults())
    assert len(settings.changed) == 6 and not settings.unknown
    make, report = map(arguments, commands(settings, tmp_path / "a run"))
    assert make[:2] == report[:2] == ["-m", "hybrid_dit.main"]
    assert report[3:] == [f"--workdir={tmp_path / 'a run'}"]
    root = str(COMMON.parents[1])
    again, workdir = parse([arg.replace("--config=configs", f"--config={root}/configs") for arg in make[2:]])
    assert flatten(settings_of(again)) == flatten(settings_of(config)) and workdir == tmp_path / "a run"


def test_the_model_is_the_one_with_the_nearest_defaults():
    config = common.get_config("surgery", "wan_1_3b")
    config.model.weights = "wan"
    settings = compare(settings_of(config), load_defaults())
    assert "wan_1_3b" in settings.models and "tiny" not in settings.models
    assert settings.changed == {"model.weights": ("", "wan")}


def test_settings_that_the_configs_do_not_know_are_listed_not_put_on_the_command_line(tmp_path):
    settings = compare({"distill": {"old": 1, "degree": 3}}, load_defaults())
    assert settings.unknown == ("distill.old",) and settings.changed == {"distill.degree": (2, 3)}
    assert "old" not in commands(settings, tmp_path)[0]


def test_without_configs_there_is_nothing_to_compare_to(tmp_path):
    assert load_defaults(tmp_path / "common.py") == {}
    settings = compare({"seed": 1}, {})
    assert settings.models == () and settings.values == {"seed": 1} and not settings.changed

"""Every bad input of the command line: one clear message on stderr, exit code 2, nothing written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pipelines import random_pipeline

from hybrid_dit import jobs, main
from hybrid_dit.convert.files import Weights, write_safetensors

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(main, "set_up", lambda: None)  # which would leave variables behind


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a random pipeline and prompt files."""
    root = tmp_path_factory.mktemp("main")
    random_pipeline(root / "pipeline")
    (root / "prompts.txt").write_text("a small red circle moving left on a gray background\n")
    (root / "empty.txt").write_text("\n  \n")
    return root


@pytest.fixture
def command(inputs, tmp_path, capsys):
    """Runs the command line; returns (exit code, stderr); the workdir is tmp_path/run."""

    def run(job="sample.py", *overrides, small=True):
        sizes = {"frames": 9, "height": 32, "width": 32, "weights": inputs / "pipeline"}
        settings = [f"model.{key}={value}" for key, value in sizes.items()]
        settings += [f"{key}={inputs / 'prompts.txt'}" for key in ("prompts.train", "prompts.held_out")]
        settings += ["evaluate.prompts=1", "select.budget=1.0"]
        settings = [f"--config.{setting}" for setting in settings] if small else []
        config, workdir = f"--config={CONFIGS / job}", f"--workdir={tmp_path / 'run'}"
        code = main.main(["main", config, workdir, *settings, *overrides])
        return code, capsys.readouterr().err

    return run


def check_refused(result, workdir, *parts):
    code, message = result
    assert code == 2
    assert message.startswith("error: ") and "Traceback" not in message
    for part in parts:
        assert part in message, message
    assert not workdir.exists()


@pytest.mark.parametrize(
    "overrides, parts",
    [
        (["--config.evaluate.promts=3"], ["unknown config key --config.evaluate.promts; did you mean evaluate.promp"]),
        (["--config.guidanse=3"], ["unknown config key --config.guidanse; did you mean", ".guidance?"]),
        (["--config.zzz=3"], ["unknown config key --config.zzz"]),
        (["--config.evaluate=3"], ["--config.evaluate is a section", "such as --config.evaluate."]),
        (["--config.seed=one"], ["--config.seed=one is not a whole number (its default is 0)"]),
        (["--config.seed=1.5"], ["--config.seed=1.5 is not a whole number"]),
        (["--config.sample.guidance=high"], ["--config.sample.guidance=high is not a number (its default is 3.0)"]),
        (["--config.sample.guidance=nan"], ["is not a number"]),
        (["--config.seed"], ["option --config.seed has no value"]),
        (["--wokrdir=x"], ["unknown option --wokrdir; did you mean --workdir?"]),
        (["sample"], ["unexpected argument 'sample'"]),
    ],
)
def test_options_that_are_wrong(command, tmp_path, overrides, parts):
    check_refused(command("sample.py", *overrides), tmp_path / "run", *parts)


def test_a_hint_is_given_only_if_it_is_like_the_word(command):
    assert "did you mean" not in command("sample.py", "--config.zzz=3")[1]


@pytest.mark.parametrize(
    "file, parts",
    [
        ("surgry.py", ["surgry.py does not exist; did you mean surgery.py?"]),
        ("surgery.py:tinny", ["surgery.py:tinny: unknown model 'tinny'; choose one of tiny, wan_1_3b, wan_14b"]),
        ("pretrain_tiny.py:tiny", ["has one model alone; leave out :tiny"]),
    ],
)
def test_config_files_that_are_wrong(command, tmp_path, file, parts):
    check_refused(command(file, small=False), tmp_path / "run", *parts)


def test_a_config_file_that_fails_is_named(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def get_config():\n    return missing\n")
    code = main.main(["main", f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path / 'run'}"])
    check_refused((code, capsys.readouterr().err), tmp_path / "run", "broken.py fails: NameError: name 'missing'")


def test_a_job_that_does_not_exist(command, tmp_path):
    check_refused(command("sample.py", "--config.job=evalute"), tmp_path / "run", "unknown job 'evalute'", "evaluate?")


@pytest.mark.parametrize("missing", ["config", "workdir"])
def test_config_and_workdir_are_needed(tmp_path, capsys, missing):
    options = {"config": f"--config={CONFIGS / 'sample.py'}", "workdir": f"--workdir={tmp_path / 'run'}"}
    del options[missing]
    code = main.main(["main", *options.values()])
    check_refused((code, capsys.readouterr().err), tmp_path / "run", f"option --{missing} is missing; usage: python -m")


def test_a_workdir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main.main(["main", f"--config={CONFIGS / 'sample.py'}", f"--workdir={tmp_path / 'file'}"]) == 2
    assert "file is a file; give a folder" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["sample.py", "distill.py", "surgery.py"])
@pytest.mark.parametrize(
    "override, parts",
    [
        ("model.frames=34", ["frames=34 is not 4n + 1; the nearest are 33 and 37"]),
        ("model.height=100", ["height=100 is not a multiple of 16; the nearest are 96 and 112"]),
        ("model.weights=nowhere", ["nowhere does not exist"]),
        ("model.compute_dtype=fp16", ["model.compute_dtype=fp16 is unknown; choose one of float32, bfloat16"]),
        ("model.attention_backend=flash", ["model.attention_backend=flash is unknown; choose one of auto, xla"]),
        ("sample.vae_dtype=half", ["sample.vae_dtype=half is unknown"]),
    ],
)
def test_sizes_and_weights_are_checked_before_anything_is_written(command, tmp_path, job, override, parts):
    check_refused(command(job, f"--config.{override}"), tmp_path / "run", *parts)


@pytest.mark.parametrize("job, key", [("sample.py", "sample.prompts"), ("surgery.py", "prompts.held_out")])
@pytest.mark.parametrize("file, message", [("empty.txt", "has no prompt in it"), ("none.txt", "No such file")])
def test_prompt_files(command, inputs, tmp_path, job, key, file, message):
    check_refused(command(job, f"--config.{key}={inputs / file}"), tmp_path / "run", file, message)


def broken_pipeline(inputs, folder, change):
    """Copies the pipeline and lets `change` edit its transformer's file."""
    shutil.copytree(inputs / "pipeline", folder)
    change(next((folder / "transformer").glob("*.safetensors")))
    return folder


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def reshape(file):
    weights = Weights(file)
    tensors = {name: weights.read(name) for name in weights.shapes}
    tensors["proj_out.bias"] = np.zeros(7, np.float32)
    write_safetensors(file, tensors, {"format": "pt"})


def rename(file):
    weights = Weights(file)
    tensors = {name.replace("proj_out.bias", "proj_out.bais"): weights.read(name) for name in weights.shapes}
    write_safetensors(file, tensors, {"format": "pt"})


@pytest.mark.parametrize("job", ["sample.py", "surgery.py"])
@pytest.mark.parametrize(
    "change, parts",
    [
        (Path.unlink, ["no weights at", "transformer"]),
        (truncate, ["diffusion_pytorch_model.safetensors is truncated or not a safetensors file"]),
        (reshape, ["proj_out.bias has shape [7], expected [16]"]),
        (rename, ["missing proj_out.bias [16]", "unexpected proj_out.bais (nearest expected name: proj_out.bias)"]),
    ],
)
def test_weights_that_are_broken(command, inputs, tmp_path, job, change, parts):
    folder = broken_pipeline(inputs, tmp_path / "broken", change)
    result = command(job, f"--config.model.weights={folder}")
    check_refused(result, tmp_path / "run", *parts)


def test_a_budget_out_of_reach_tells_the_smallest(command, tmp_path):
    result = command("surgery.py", "--config.select.budget=1000")
    check_refused(result, tmp_path / "run", "select.budget=1000", "the smallest reachable cost is")


def test_a_workdir_of_another_config_shows_the_difference(command, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "load", lambda name: Recorder)
    assert command("sample.py")[0] == 0
    before = sorted(tmp_path.rglob("*"))
    code, message = command("sample.py", "--config.sample.guidance=5", "--config.seed=1")
    assert code == 2
    assert "was made with other settings" in message and "sample.guidance: 3.0 there, 5.0 in this command" in message
    assert "seed: 0 there, 1 in this command" in message
    assert sorted(tmp_path.rglob("*")) == before


class Recorder:
    """A job that does nothing but open its stage."""

    @staticmethod
    def run(config, workdir):
        from hybrid_dit.workdir import Stage

        Stage(workdir, "sample_teacher", config)


def test_overrides_take_the_type_of_their_default(command, monkeypatch):
    seen = []
    job = type("Job", (), {"run": lambda config, workdir: seen.append(config)})
    monkeypatch.setattr(jobs, "load", lambda name: job)
    settings = ["seed=7", "sample.guidance=4", "sample.prompt=a cat = a pet", "distill.rates=R4, linear", "job=distill"]
    assert command("sample.py", *(f"--config.{s}" for s in settings), "--config.distill.rates=('R4','linear')")[0] == 0
    (config,) = seen
    assert config.seed == 7 and config.sample.prompt == "a cat = a pet" and config.job == "distill"
    assert config.sample.guidance == 4.0 and isinstance(config.sample.guidance, float)
    assert config.distill.rates == ("R4", "linear")
    with pytest.raises(AttributeError):  # locked
        config.distill.rtes = ()


def test_interruption_says_how_to_go_on(command, monkeypatch):
    def interrupted(config, workdir):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "load", lambda name: type("Job", (), {"run": interrupted}))
    assert command("sample.py") == (130, "interrupted; the same command continues\n")


@pytest.mark.parametrize("file", sorted(f.name for f in CONFIGS.glob("*.py") if f.name != "common.py"))
def test_every_config_names_a_job_that_loads(file):
    from hybrid_dit.command_line import load

    config = load(str(CONFIGS / file))
    assert callable(jobs.load(config.job).run) and callable(jobs.load(config.get("run", config.job)).run)


def python(*arguments, **variables):
    """Runs the program as users do: on one device, optimised."""
    ours = "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"
    environment = {k: v for k, v in os.environ.items() if k not in ours} | variables
    command = [sys.executable, "-m", "hybrid_dit.main", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_as_a_program_bad_input_exits_with_2(tmp_path):
    done = python("--config=configs/sample.py", f"--workdir={tmp_path / 'run'}", "--config.seeed=1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: unknown config key --config.seeed; did you mean seed?\n"
    assert python("--help").stdout.startswith("usage: python -m hybrid_dit.main")


def test_as_a_program_it_samples_and_keeps_compiled_programs(inputs, tmp_path):
    cache = tmp_path / "cache"
    sizes = {"frames": 5, "height": 16, "width": 16, "weights": inputs / "pipeline"}
    overrides = [f"--config.model.{k}={v}" for k, v in sizes.items()]
    prompt = ["--config.sample.prompt=a small red circle moving left on a gray background", "--config.sample.batch=1"]
    done = python(
        "--config=configs/sample.py",
        f"--workdir={tmp_path / 'run'}",
        *overrides,
        *prompt,
        "--config.sample.sample_steps=2",
        JAX_COMPILATION_CACHE_DIR=str(cache),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warnings of libraries
    assert len(list((tmp_path / "run" / "sample_teacher" / "videos").glob("*.mp4"))) == 1
    assert any(cache.iterdir())

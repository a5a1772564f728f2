import shutil
import sys

import pytest

from hybrid_dit import main
from hybrid_dit.command_line import load
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import report
from hybrid_dit.workdir import Stage


def config_of(**values):
    config = load("configs/report.py")
    for key, value in values.items():
        config.report[key] = value
    return config.lock()


@pytest.fixture
def workdir(tmp_path):
    stage = Stage(tmp_path / "run", "distill", load("configs/distill.py"))
    (stage.folder / "errors.csv").write_text("block,rate\n")
    stage.finish()
    return tmp_path / "run"


def test_the_command_writes_the_page_and_says_what_it_could_not_show(workdir, capsys):
    argv = ["main", "--config=configs/report.py", f"--workdir={workdir}"]
    for _ in range(2):
        assert main.main(argv) == 0
        out = capsys.readouterr().out
        assert f"report: {workdir / 'report.html'} (0.0 MB)" in out
        assert "report: distill/errors.csv can't be read" in out
    page = (workdir / "report.html").read_text()
    assert f"--workdir={workdir}" in page and "select (missing)" in page
    assert f"<td>{sys.version.split()[0]}</td>" in page  # of the process that finished the stage


def test_refused_with_a_reason(workdir, tmp_path):
    with pytest.raises(UserError, match="raise report.max_mb"):
        report.run(config_of(max_mb=0.1), workdir)
    with pytest.raises(UserError, match="nowhere does not exist"):
        report.run(config_of(), tmp_path / "nowhere")
    shutil.rmtree(workdir / "distill")
    with pytest.raises(UserError, match="holds no stage of a surgery"):
        report.run(config_of(), workdir)
    assert not list(workdir.iterdir())

import pytest

from hybrid_dit import progress
from hybrid_dit.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_rate_and_time_left(clock, capsys):
    report = Progress("tune", 1000)
    clock[0] += 40
    report.update(100, loss=0.01234567)
    assert lines(capsys) == ["tune 100/1000 10%  2.5 step/s  6m00s left  loss 0.01235"]
    clock[0] += 60
    report.update(1000)
    assert lines(capsys) == ["tune 1000/1000 100%  10 step/s  1m40s in all"]


def test_steps_of_an_earlier_run_do_not_count_for_the_rate(clock, capsys):
    report = Progress("tune", 100, start=50)
    clock[0] += 10
    report.update(60)
    assert lines(capsys) == ["tune 60/100 60%  1 step/s  40s left"]


def test_slow_work_is_told_in_seconds_per_unit(clock, capsys):
    report = Progress("tune", 10, unit="video")
    clock[0] += 30
    report.update(1)
    assert lines(capsys) == ["tune 1/10 10%  30 s/video  4m30s left"]


def test_lines_keep_their_distance_but_the_last_always_comes(clock, capsys):
    report = Progress("tune", 100, every=2.0)
    for done in range(1, 101):
        clock[0] += 0.1
        report.update(done)
    shown = [int(line.split()[1].split("/")[0]) for line in lines(capsys)]
    assert shown[-1] == 100 and shown[0] == 1
    assert all(20 <= b - a <= 21 for a, b in zip(shown[:-2], shown[1:-1]))  # 2 s at 10 a second


def test_no_progress_yet_has_no_estimate(clock, capsys):
    Progress("tune", 10).update(0)
    assert lines(capsys) == ["tune 0/10 0%  0 step/s  ? left"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (259.0, "4m19s"), (3599.7, "1h00m"), (7500.0, "2h05m"), (float("inf"), "?")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text

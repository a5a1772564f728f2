import numpy as np
import pytest

from hybrid_dit.loss_log import LossLog, read_losses, running_mean


def write(path, first, last, finished):
    with LossLog(path, finished, averaged=3) as log:
        for step in range(first, last + 1):
            log.add(step, step / 7, 1.0)
            yield log


def test_rows_are_on_disk_at_once_and_read_back_exactly(tmp_path):
    path = tmp_path / "loss.csv"
    for n, _ in enumerate(write(path, 1, 4, finished=0), start=1):
        steps, losses = read_losses(path)  # while the log is still open
        assert steps.tolist() == list(range(1, n + 1)) and losses.tolist() == [i / 7 for i in steps]


@pytest.mark.parametrize("torn", ["", "6,0.3", "6,0.39,", "6"], ids=repr)
def test_continuing_drops_later_and_torn_rows(tmp_path, torn):
    path = tmp_path / "loss.csv"
    list(write(path, 1, 5, finished=0))
    with path.open("a") as file:
        file.write(torn)
    list(write(path, 4, 6, finished=3))
    lines = path.read_text().splitlines()
    assert lines[0] == "step,loss,grad_norm"
    assert [int(line.split(",")[0]) for line in lines[1:]] == [1, 2, 3, 4, 5, 6]


def test_the_mean_reaches_back_before_an_interruption(tmp_path):
    list(write(tmp_path / "loss.csv", 1, 5, finished=0))
    log = next(write(tmp_path / "loss.csv", 6, 6, finished=5))
    assert log.mean == pytest.approx((4 / 7 + 5 / 7 + 6 / 7) / 3)


def test_running_mean():
    np.testing.assert_allclose(running_mean(np.array([3.0, 5.0, 10.0, 0.0]), 2), [3.0, 4.0, 7.5, 5.0])

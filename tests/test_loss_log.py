import json

import numpy as np
import pytest

from hybrid_dit.loss_log import LossLog, read_losses, read_rows, running_mean


def write(path, first, last, finished):
    with LossLog(path, finished, averaged=3) as log:
        for step in range(first, last + 1):
            log.add(step, step / 7, other=1.0)
            yield log


def test_rows_are_on_disk_at_once_and_read_back_exactly(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for n, _ in enumerate(write(path, 1, 4, finished=0), start=1):
        steps, losses = read_losses(path)  # while the log is still open
        assert steps.tolist() == list(range(1, n + 1)) and losses.tolist() == [i / 7 for i in steps]
    assert read_rows(path)[-1] == {"step": 4, "loss": 4 / 7, "other": 1.0}


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6, "loss": 0.5}', "{"], ids=repr)
def test_continuing_drops_later_and_torn_rows(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    list(write(path, 1, 5, finished=0))
    with path.open("a") as file:
        file.write(torn)
    list(write(path, 4, 6, finished=3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_the_mean_reaches_back_before_an_interruption(tmp_path):
    list(write(tmp_path / "metrics.jsonl", 1, 5, finished=0))
    log = next(write(tmp_path / "metrics.jsonl", 6, 6, finished=5))
    assert log.mean == pytest.approx((4 / 7 + 5 / 7 + 6 / 7) / 3)


def test_without_a_file_the_mean_is_there():
    log = next(write(None, 2, 2, finished=0))
    assert log.mean == 2 / 7


def test_running_mean():
    np.testing.assert_allclose(running_mean(np.array([3.0, 5.0, 10.0, 0.0]), 2), [3.0, 4.0, 7.5, 5.0])

import json

import jax
import numpy as np

from hybrid_dit import cost, processes, targets, train_metrics
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.train_metrics import Monitor, step_flops

WAN = WanConfig(dim=16, num_heads=2, ffn_dim=32, num_layers=2, in_channels=4, text_dim=8)
METRICS = {
    "loss": np.array(0.5, np.float32),
    "grad_norm": np.array(2.0, np.float32),
    "bucket_sum": np.float32([3, 0, 0, 1]),
    "bucket_count": np.float32([4, 0, 0, 1]),
}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_row_has_speed_and_losses_by_timestep_and_tensorboard_gets_the_same(tmp_path, monkeypatch, capsys):
    added = []
    monkeypatch.setattr(targets, "peak", lambda kind: 100.0 if kind == jax.devices()[0].device_kind else None)
    monkeypatch.setattr(train_metrics.EventFile, "add", lambda self, step, scalars: added.append((step, scalars)))
    with Monitor(tmp_path, first=0, steps=1, devices=8) as monitor:
        monitor.add(1, METRICS, seconds=0.25, tokens=100, flops=50)
        assert monitor.mean == 0.5
    (row,) = rows(tmp_path)
    assert row == {
        "step": 1,
        "loss": 0.5,
        "grad_norm": 2.0,
        "seconds": 0.25,
        "tokens_per_s": 400.0,
        "mfu": 50 / 0.25 / (8 * 100.0),
        "loss_t/0-250": 0.75,
        "loss_t/750-1000": 1.0,
    }
    del row["step"]
    assert added == [(1, {name if "/" in name else f"train/{name}": value for name, value in row.items()})]
    assert "finetune 1/1 100%" in capsys.readouterr().out


def test_no_utilisation_without_a_peak(tmp_path):
    with Monitor(tmp_path, first=0, steps=1, devices=1) as monitor:  # a CPU
        monitor.add(1, METRICS, 1.0, 1, flops=50)
    (row,) = rows(tmp_path)
    assert row["step"] == 1 and "mfu" not in row


def test_other_processes_write_nothing_and_know_the_mean(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "is_main", lambda: False)
    with Monitor(tmp_path, first=0, steps=1, devices=1) as monitor:
        monitor.add(1, METRICS, 1.0, 1, 1)
        assert monitor.mean == 0.5
    # Of a run that is continued, too: the first process has read what was before.
    monkeypatch.setattr(processes, "on_main", lambda function: [1.5])
    with Monitor(tmp_path, first=1, steps=2, devices=1) as monitor:
        monitor.add(2, METRICS, 1.0, 1, 1)
        assert monitor.mean == 1.0
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_step_is_forward_and_twice_that_backward_and_the_teachers_forward():
    attention = (AttentionSpec("hybrid", 2), AttentionSpec())
    shape = cost.Shape(16, 2, 32, 2, tokens=12, text_tokens=5)
    hybrid, softmax = cost.block_flops(shape, attention[0]), cost.block_flops(shape, attention[1])
    assert step_flops(WAN, attention, (8, 3, 4, 4, 4), 5) == 8 * 3 * (hybrid + softmax)
    assert step_flops(WAN, attention, (8, 3, 4, 4, 4), 5, teacher=True) == 8 * (3 * (hybrid + softmax) + 2 * softmax)

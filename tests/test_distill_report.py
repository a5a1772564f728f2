import csv

import numpy as np

from hybrid_dit import distill_report
from hybrid_dit.distill_report import Curves, bootstrap, write_errors

LABELS = ["R2", "linear"]


def errors(prompts=3, steps=4, blocks=2, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.random((prompts, steps, blocks, 2)) for name in ("undistilled", "distilled")}


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_means_and_buckets_are_those_of_the_samples(tmp_path):
    samples, timesteps = errors(), np.array([1000.0, 800.0, 250.0, 30.0])
    write_errors(tmp_path, LABELS, samples, timesteps)
    for row in rows_of(tmp_path / "errors.csv"):
        b, r = int(row["block"]), LABELS.index(row["rate"])
        for name, e in samples.items():
            np.testing.assert_allclose(float(row[name]), e[:, :, b, r].mean(), rtol=1e-5)
    rows = rows_of(tmp_path / "errors_by_timestep.csv")
    steps = {("0", "250"): [3], ("250", "500"): [2], ("750", "1000"): [0, 1]}  # none in 500 to 750
    assert {(row["from_timestep"], row["to_timestep"]) for row in rows} == set(steps)
    for row in rows:
        b, r = int(row["block"]), LABELS.index(row["rate"])
        inside = steps[row["from_timestep"], row["to_timestep"]]
        assert int(row["steps"]) == len(inside)
        expected = samples["distilled"][:, inside, b, r].mean()
        np.testing.assert_allclose(float(row["distilled"]), expected, rtol=1e-5)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Independent samples: 95% intervals of 40 x 25 cells hold the true mean 0.5 nearly as often (20 prompts: few)."""
    rng = np.random.default_rng(1)
    low, high = bootstrap(rng.random((20, 1, 1000)))
    assert 0.90 < ((low <= 0.5) & (high >= 0.5)).mean() < 0.97


def test_intervals_know_that_steps_of_one_prompt_are_alike():
    rng = np.random.default_rng(2)
    prompts = rng.random((10, 1, 1))
    low, high = bootstrap(np.repeat(prompts, 50, axis=1))
    alone = bootstrap(prompts)
    # 50 copies of each prompt say no more than one: the same interval but for resampling noise.
    np.testing.assert_allclose(high - low, alone[1] - alone[0], rtol=0.1)
    assert bootstrap(errors()["distilled"])[0].shape == (2, 2)


def test_curves_survive_and_forget_steps_after_a_checkpoint(tmp_path):
    curves, rng = Curves(LABELS), np.random.default_rng(0)
    for _ in range(3):
        metrics = {name: {s: rng.random(5).astype(np.float32) for s in LABELS} for name in ("loss", "error")}
        mean = curves.add(metrics)
        np.testing.assert_allclose([mean[s] for s in LABELS], [metrics["error"][s].mean() for s in LABELS], rtol=1e-6)
    curves.save(tmp_path)
    again = Curves.load(tmp_path, 2)
    assert again.labels == LABELS
    np.testing.assert_array_equal(again.error, curves.error[:2])
    np.testing.assert_array_equal(again.loss, curves.loss[:2])
    np.testing.assert_array_equal(curves.loss[2][:, 1], metrics["loss"]["linear"])
    curves.report(tmp_path)
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {distill_report.CURVES, "loss.csv", "loss.png", "loss_R2.png", "loss_linear.png"}
    np.testing.assert_allclose(float(rows_of(tmp_path / "loss.csv")[2]["R2"]), metrics["error"]["R2"].mean(), rtol=1e-5)

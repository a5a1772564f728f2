import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_dit import sharding
from hybrid_dit.checkpoint import Checkpoints
from hybrid_dit.errors import UserError


def state(seed=0, devices=1):
    """Parameters, AdamW's moments (named tuples), an integer, bfloat16, an empty subtree."""
    place = sharding.batch_sharding(sharding.data_mesh(jax.devices()[:devices]), 8)
    w = jax.device_put(jax.random.normal(jax.random.key(seed), (8, 3)), place)
    params = {"w": w, "b": w.astype(jnp.bfloat16), "none": {}}
    return {"params": params, "opt": optax.adamw(1e-3).init(params), "step": jnp.int32(seed)}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_round_trip_is_exact_and_the_last_two_are_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None and checkpoints.restore(state()) is None
        for step in (1, 2, 3):
            checkpoints.save(step, state(step))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 3]
    with Checkpoints(tmp_path) as checkpoints:
        step, restored = checkpoints.restore(state())
    assert step == 3
    assert_equal(restored, state(3))


def test_the_best_is_kept_beside_the_last_two_also_by_a_run_that_is_continued(tmp_path):
    for steps in ((1, 2, 3), (4, 5)):
        with Checkpoints(tmp_path, keep_best=True) as checkpoints:
            for step in steps:
                loss = [9.0, 0.5, 3.0, 2.0, 4.0][step - 1]
                checkpoints.save(step, {"x": jnp.float32(step)}, {"data": [step]}, loss)
            assert checkpoints.best == 2
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 4, 5]
    with Checkpoints(tmp_path, keep_best=True) as checkpoints:
        assert checkpoints.restore({"x": jnp.zeros(())}) == (5, {"x": 5.0})
        assert checkpoints.extra() == {"data": [5]}


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 4)])
def test_another_number_of_devices(tmp_path, before, after):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1, before))
    with Checkpoints(tmp_path) as checkpoints:
        _, restored = checkpoints.restore(state(0, after))
    assert_equal(restored, state(1))
    assert len(restored["params"]["w"].sharding.device_set) == after


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        x = jnp.zeros(200_000)
        for step in range(1, 6):
            checkpoints.save(step, {"x": x})
            x = add(x)
        x.block_until_ready()
    for step in range(5, 0, -1):
        with Checkpoints(tmp_path, keep=10) as checkpoints:
            latest, restored = checkpoints.restore({"x": x})
        assert latest == step
        np.testing.assert_array_equal(restored["x"], step - 1)
        shutil.rmtree(tmp_path / str(step))


def test_gpus_have_host_memory_reserved_for_the_first_save(tmp_path, monkeypatch):
    put, made = jax.device_put, []
    monkeypatch.setattr(jax, "device_put", lambda *args: made.append(put(*args)) or made[-1])
    state = {"a": jnp.arange(6.0), "b": jnp.ones((2, 3), jnp.bfloat16)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.reserve(state)
        assert not made
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        checkpoints.reserve(state)
    assert [x.sharding.memory_kind for x in jax.tree.leaves(made)] == ["pinned_host"] * 2
    assert [x.nbytes for x in jax.tree.leaves(made)] == [x.nbytes for x in jax.tree.leaves(state)]


def test_saving_the_same_step_again_is_harmless(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state(1))
        checkpoints.save(4, state(1))
        assert checkpoints.latest == 4


def test_a_save_that_was_killed_is_never_chosen(tmp_path):
    # The child saves step after step, each in the background, until it is killed in the middle of it.
    code = f"""
import jax.numpy as jnp
from hybrid_dit.checkpoint import Checkpoints
checkpoints = Checkpoints({str(tmp_path)!r})
for step in range(1, 1000):
    checkpoints.save(step, {{"x": jnp.full(500_000, step, jnp.float32)}})
"""
    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path / "3").is_dir():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (tmp_path / "2000.orbax-checkpoint-tmp").mkdir(exist_ok=True)  # what is left if no save was under way just then
    with Checkpoints(tmp_path) as checkpoints:
        step, restored = checkpoints.restore({"x": jnp.zeros(500_000)})
    assert 3 <= step < 1000
    np.testing.assert_array_equal(restored["x"], step)
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's threads, once collected
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("told_by", ["save", "close"])
def test_a_disk_that_is_full_is_told_in_one_sentence_and_the_last_good_checkpoint_stays(tmp_path, capfd, told_by):
    """Files may have a megabyte, as a stand-in for the disk; the write fails in the background."""
    noise = jax.random.normal(jax.random.key(0), (1_000_000,))  # does not compress
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = r"/2 could not be written \(.*File too large.*\); the last good one is 1\."
    with pytest.raises(UserError, match=told) as info, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": noise})
        checkpoints._manager.wait_until_finished()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
            checkpoints.save(2, {"x": noise})
            if told_by == "save":
                checkpoints.save(3, {"x": noise})
                pytest.fail("the failure of the save before was not told")
            checkpoints.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(info.value) and "Traceback" not in capfd.readouterr().err
    with Checkpoints(tmp_path) as checkpoints:
        step, restored = checkpoints.restore({"x": noise})
    assert step == 1 and np.array_equal(restored["x"], noise)
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's threads, once collected
def test_a_damaged_checkpoint_and_another_model_are_user_errors(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {"data": 3})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="another model"):
        checkpoints.restore({"other": jnp.zeros(3)})
    for file in tmp_path.glob("1/state/**/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="damaged"):
        checkpoints.restore(state())
    shutil.rmtree(tmp_path / "1/extra")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="1 is damaged"):
        checkpoints.extra()
    gc.collect()

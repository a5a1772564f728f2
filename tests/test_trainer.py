"""The step of a tiny hybrid: one device against meshes, a whole batch against its parts, and the loss it minimises."""

import contextlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from several import Several

from hybrid_dit import sharding
from hybrid_dit.checkpoint import Checkpoints
from hybrid_dit.convert import tables
from hybrid_dit.data.source import Text
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanDiT
from hybrid_dit.pairs import Pairs
from hybrid_dit.trainer import fitted_text

STEPS = 20
PROGRAM = """
import json, pathlib, sys
from hybrid_dit import processes
options, (folder,) = processes.parse(sys.argv[1:])
with processes.joined(options):
    import jax
    import numpy as np
    import training
    from hybrid_dit import sharding
    from hybrid_dit.agreement import gathered
    from hybrid_dit.checkpoint import Checkpoints
    from hybrid_dit.convert import tables
    index = jax.process_index()
    trainer, params = training.make_trainer(sharding.train_mesh(replicas=2), **training.FEATURES)
    assert len(jax.devices()) == 8 and sharding.process_share(trainer.mesh) == (index, 2)
    state, rows = training.train(trainer, params, 20, training.teacher_params())
    with Checkpoints(folder + "/checkpoints") as checkpoints:
        checkpoints.save(20, state, {"data": [json.loads(text) for text in gathered(json.dumps({"step": 21}))]})
    whole = tables.flatten(sharding.to_host(state.params))
    if index == 0:
        np.savez(folder + "/whole.npz", **whole)
    assert gathered("ab" * (1 + index)) == ["ab", "abab"]
    rows = [{name: value.tolist() for name, value in row.items()} for row in rows]
    pathlib.Path(folder, f"rows{index}.json").write_text(json.dumps(rows))
"""


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


def moment(state, name):
    return optax.tree_utils.tree_get(state.opt_state, name)


def batch_of(n=training.BATCH):
    return Pairs(*(x[:n] for x in training.noise_pairs()[0]))


@pytest.fixture(scope="module")
def one():
    """(trainer on one device with everything switched on, parameters, function that runs 20 steps, its result)."""
    trainer, params = training.make_trainer(**training.FEATURES)
    teacher = trainer.place_teacher(training.teacher_params())
    step = trainer.compile(trainer.init(params), training.source(trainer).next(), teacher)

    def run(params):
        state, source, rows = trainer.init(params), training.source(trainer), []
        for _ in range(STEPS):
            state, metrics = step(state, source.next())
            rows.append(jax.device_get(metrics))
        return state, rows

    return trainer, params, step, run, *run(params)


@pytest.fixture(scope="module")
def tolerance(one):
    """What rounding does to losses in 20 steps: the difference that one unit in the last place of each parameter makes.

    On another mesh sums over batch, tokens and split matrices are taken in another order: errors of the same kind and
    size, which later steps amplify just as much. Two draws and a factor of 8 stand for the difference in luck.
    """
    _, params, _, run, _, rows = one
    rng, largest = np.random.default_rng(3), np.finfo(np.float32).eps

    def moved(x):
        return np.nextafter(x, np.where(rng.random(x.shape) < 0.5, np.inf, -np.inf).astype(x.dtype))

    for _ in range(2):
        _, other = run(jax.tree.map(moved, params))
        differences = [np.abs(column(other, name) / column(rows, name) - 1).max() for name in ("loss", "grad_norm")]
        largest = max(largest, *differences)
    assert largest < 1e-5  # a sample that is dropped, doubled or drawn differently somewhere changes losses by 1e-2
    return 8 * largest


def assert_same_training(rows, expected, tolerance):
    for name in ("loss", "grad_norm", "flow_loss", "teacher_loss", "phi_norm", "phi_grad_norm"):
        np.testing.assert_allclose(column(rows, name), column(expected, name), rtol=tolerance, err_msg=name)
    np.testing.assert_array_equal([r["bucket_count"] for r in rows], [r["bucket_count"] for r in expected])
    for name in ("bucket_sum", "sample_loss"):
        np.testing.assert_allclose([r[name] for r in rows], [r[name] for r in expected], rtol=tolerance, err_msg=name)


# Meshes


def test_eight_devices_give_the_losses_of_one_and_exchange_no_activations(one, tolerance):
    mesh = sharding.train_mesh()
    assert dict(mesh.shape) == {"replica": 1, "data": 8, "seq": 1}
    trainer, params = training.make_trainer(mesh, **training.FEATURES)
    teacher = training.teacher_params()
    state, rows = training.train(trainer, params, STEPS, teacher)
    assert_same_training(rows, one[5], tolerance)
    for tree in (state.params, state.ema, moment(state, "mu"), moment(state, "nu")):
        kernel = tree["blocks"]["self_attn"]["q"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 8  # spread, not copied
    lowered = trainer.lower(trainer.abstract(params), batch_of(), trainer.abstract_teacher(teacher))
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", lowered.compile().as_text())
    assert "16,32" in gathered  # the feed-forward's matrix
    assert not [shape for shape in gathered if shape.startswith("8,18")]  # [batch, tokens, ...]


def test_copies_parts_and_tokens_give_the_losses_of_one_device_and_the_whole_batch(one, tolerance):
    """Tokens over four devices, which do not divide 18 of them."""
    settings = training.FEATURES | {"accumulate": 2, "remat": "block"}
    trainer, params = training.make_trainer(sharding.train_mesh(2, 4), **settings)
    _, rows = training.train(trainer, params, STEPS, training.teacher_params())
    assert_same_training(rows, one[5], tolerance)


def test_two_processes_of_four_devices_give_the_losses_of_one(one, tolerance, tmp_path):
    """Two copies of the weights, one per process. Their checkpoint is read here, on other meshes."""
    for index, (code, _, error) in enumerate(Several(tmp_path, PROGRAM, str(tmp_path)).finish()):
        assert code == 0, error
        rows = json.loads((tmp_path / f"rows{index}.json").read_text())
        assert_same_training([{n: np.array(v) for n, v in row.items()} for row in rows], one[5], tolerance)
    for mesh in (sharding.train_mesh(devices=jax.devices()[:1]), sharding.train_mesh(seq=2)):
        trainer, params = training.make_trainer(mesh, **training.FEATURES)
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            step, state = checkpoints.restore(trainer.abstract(params))
            assert step == STEPS == int(state.step) and checkpoints.extra() == {"data": [{"step": 21}] * 2}
        whole = np.load(tmp_path / "whole.npz")
        for path, array in tables.flatten(state.params).items():
            np.testing.assert_array_equal(array, whole[path], err_msg=path)


def test_what_is_frozen_stays_and_has_no_moments_and_the_average_lags_behind(one):
    _, params, _, _, state, _ = one
    before, after, ema = (tables.flatten(tree) for tree in (params, state.params, state.ema))
    trained = [path for path in before if re.match(training.TRAINED, path)]
    assert tables.flatten(moment(state, "mu")).keys() == set(trained)
    for path in before:
        assert np.array_equal(before[path], after[path]) == (path not in trained), path
        assert np.array_equal(ema[path], after[path]) == (path not in trained), path


def test_a_batch_that_does_not_divide_is_told_and_refused_with_several_processes(capsys, monkeypatch):
    for settings, seq, told in (
        ({}, 1, ""),
        ({"accumulate": 2}, 1, "note: a batch of 4 does not divide over 8 devices; each computes all of it\n"),
        ({"accumulate": 2}, 2, ""),
        ({"batch": 1}, 8, ""),
    ):
        trainer, _ = training.make_trainer(sharding.train_mesh(seq=seq), **settings)
        with monkeypatch.context() as patch:
            trainer.check_batch()
            assert capsys.readouterr().out == told
            patch.setattr(jax, "process_count", lambda: 2)
            with pytest.raises(UserError, match="over 8 devices, which") if told else contextlib.nullcontext():
                trainer.check_batch()


# The loss


def test_loss_is_flow_matching_plus_the_distance_to_the_teacher():
    trainer, params = training.make_trainer(teacher=0.5, drop_text=0.5)
    batch, teacher = batch_of(4), training.teacher_params()
    samples = jax.tree.map(np.asarray, trainer.draw(batch, jax.random.key(5)))
    # One prompt of four at least is dropped with this key, one at least is kept.
    dropped = np.array([not np.array_equal(a, b) for a, b in zip(samples.text, batch.text)])
    assert 0 < dropped.sum() < 4
    assert all(np.array_equal(count, [1, 511, 0, 0, 0]) for count in samples.count[dropped])
    s = samples.level.astype(np.float64)[:, None, None, None, None]
    x = np.float32((1 - s) * batch.latents + s * np.float64(samples.noise))

    @jax.jit
    def compute(params, teacher, samples, x):
        inputs = x, 1000 * samples.level, samples.text, samples.count
        student = WanDiT(training.WAN, training.ATTENTION).apply({"params": params}, *inputs)
        wanted = WanDiT(training.WAN).apply({"params": teacher}, *inputs)
        return trainer.loss(params, samples, teacher)[0], student, wanted

    loss, student, wanted = (np.float64(y) for y in compute(params, teacher, samples, x))
    target = np.float64(samples.noise) - batch.latents
    expected = np.square(student - target).mean() + 0.5 * np.square(student - wanted).mean()
    # Both models run in float32 on inputs that differ by a rounding, through some twenty layers: 2**-24 each, relative.
    np.testing.assert_allclose(loss, expected, rtol=50 * 2**-24)


def test_every_step_has_its_own_noise_and_one_batch_can_be_learnt(one):
    trainer, params, step, *_ = one
    state, losses = trainer.init(params), []
    for _ in range(60):
        state, metrics = step(state._replace(step=jnp.zeros_like(state.step)), batch_of())  # the same noise every time
        losses.append(float(metrics["loss"]))
    # A gradient of the wrong sign would raise the loss.
    assert losses[-1] < 0.9 * losses[0]
    _, metrics = step(trainer.init(params)._replace(step=state.step + 1), batch_of())
    assert abs(float(metrics["loss"]) / losses[0] - 1) > 1e-3  # the same parameters and pairs, another step


def test_losses_add_up(one):
    for row in one[5]:
        assert row["bucket_count"].sum() == training.BATCH
        # Eight float32 losses summed in two orders.
        np.testing.assert_allclose(row["bucket_sum"].sum() / training.BATCH, row["flow_loss"], rtol=8 * 2**-24)
        np.testing.assert_allclose(row["loss"], row["flow_loss"] + 0.5 * row["teacher_loss"], rtol=8 * 2**-24)
        np.testing.assert_allclose(row["sample_loss"].mean(), row["flow_loss"] + row["teacher_loss"], rtol=8 * 2**-24)


def test_metrics_are_norms_of_what_they_say(one):
    trainer, params, step, _, _, rows = one
    state, metrics = step(trainer.init(params), training.source(trainer).next())
    # Nothing is clipped, so that the first moment after one step is a tenth of the gradient.
    squares = {path: 100 * np.square(np.float64(m)).sum() for path, m in tables.flatten(moment(state, "mu")).items()}
    phi = sum(value for path, value in squares.items() if path.startswith("feature_maps/"))
    # Float32 sums over at most 4,000 squares; their rounding errors don't line up: four times the square root of that.
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(squares.values())), rtol=4 * 64 * 2**-24)
    np.testing.assert_allclose(metrics["phi_grad_norm"], np.sqrt(phi), rtol=4 * 64 * 2**-24)
    maps = [np.square(np.float64(x)).sum() for x in jax.tree.leaves(state.params["feature_maps"])]
    np.testing.assert_allclose(metrics["phi_norm"], np.sqrt(sum(maps)), rtol=4 * 64 * 2**-24)
    np.testing.assert_allclose(metrics["learning_rate"], 0.5e-3, rtol=2**-23)
    assert metrics["loss"] == rows[0]["loss"]  # the step is a function of state and batch


# Settings


def test_empty_prompts_are_fitted_to_any_number_of_rows():
    text = np.arange(8, dtype=np.float32).reshape(1, 4, 2)
    prompt = Text(text, np.array([[1, 0, 2, 0]], np.float32))
    for rows in (2, 6):
        got = fitted_text(prompt, rows)
        np.testing.assert_array_equal(got.text[0, :2], text[0, [0, 2]])
        assert got.count[0].tolist() == [1, 2] + [0] * (rows - 2) and not got.text[0, 2:].any()
    with pytest.raises(UserError, match="takes 2 rows of text, a batch has 1"):
        fitted_text(prompt, 1)


def test_matrices_of_the_teacher_are_kept_in_the_dtype_they_are_multiplied_in():
    trainer, _ = training.make_trainer(compute_dtype="bfloat16", teacher=1.0)
    teacher = training.teacher_params()
    placed = tables.flatten(trainer.place_teacher(teacher))
    assert placed["blocks/ffn_0/kernel"].dtype == jnp.bfloat16
    # Modulation is added, and timesteps are embedded, in float32.
    assert placed["blocks/modulation"].dtype == placed["time_embedding_0/kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(placed["time_embedding_0/kernel"], teacher["time_embedding_0"]["kernel"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"accumulate": 3}, "accumulate=3 must divide finetune.batch=8"),
        ({"schedule": "linear"}, "schedule='linear' is unknown; choose one of constant, cosine"),
        ({"timesteps": "normal"}, "timesteps='normal' is unknown"),
        ({"learning_rates": "blocks=x"}, "can't read the rule 'blocks=x'"),
    ],
)
def test_settings_that_can_not_be(settings, message):
    with pytest.raises(UserError, match=message):
        training.make_trainer(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"learning_rates": "blocks/.*=1"}, "parameter .* matches 0 learning-rate rules"),
        ({"learning_rates": ".*=0"}, "freezes every parameter"),
        ({"remat": "some"}, "remat 'some' is unknown"),
    ],
)
def test_settings_that_can_not_be_with_this_model(settings, message):
    trainer, params = training.make_trainer(**settings)
    with pytest.raises(UserError, match=message):
        trainer.lower(trainer.abstract(params), batch_of())


def test_the_backend_reaches_attention():
    trainer, params = training.make_trainer()
    trainer.backend = "gpus"
    with pytest.raises(UserError, match="attention backend 'gpus' is unknown"):
        trainer.lower(trainer.abstract(params), batch_of())

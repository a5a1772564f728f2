"""The plan of a tiny model's real steps on fake devices; with libtpu (slow) on a TPU pod."""

import json

import jax
import pytest
from workdirs import tiny_config

from hybrid_dit import cost, main, plan_steps, targets
from hybrid_dit.command_line import load, override
from hybrid_dit.errors import UserError
from hybrid_dit.jobs import plan
from hybrid_dit.models.wan import PRESETS
from hybrid_dit.ops.spec import from_label


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("plan")


def settings(root, job, **values):
    config = tiny_config("plan", root, **{"target": "cpu:4", **values})
    config.job = job
    return config


def planned(root, workdir, job, **values):
    config = settings(root, job, **values)
    code = plan.run(config, workdir)
    (file,) = (workdir / "plan").glob("*.json")
    return code, json.loads(file.read_text()), config


def check(report, out, wan, devices):
    assert report["devices"] == devices
    assert report["needed_bytes"] == report["argument_bytes"] + report["temporary_bytes"] > 0
    assert report["tokens"] == 12 and report["collectives_in_loops_of_unknown_length"] == 0
    # The teacher's weights alone, float32 and at most divided by all devices, are arguments.
    weights = sum(leaf.size for leaf in jax.tree.leaves(plan_steps.abstract_dit(wan)))
    assert report["argument_bytes"] > 4 * weights / devices
    for kind, traffic in report["collectives"].items():
        assert kind in out and traffic["count"] > 0 and traffic["bytes"] > 0
    first, *others = report["largest_collectives"]
    assert first["from"] and all(first["bytes"] >= other["bytes"] for other in others)
    assert "compiled in" in out


def test_fine_tuning_fits(root, tmp_path, capsys):
    code, report, config = planned(root, tmp_path, "finetune")
    out = capsys.readouterr().out
    assert code == 0 and report["fits"] and "DOES NOT FIT" not in out
    check(report, out, plan_steps.sizes(config)[0], 4)
    # The batch of 4 is divided, so its gradients must be summed.
    assert {"all-reduce", "reduce-scatter"} & report["collectives"].keys()


def test_advice_for_a_step_that_does_not_fit(root):
    report = {"needed_bytes": 32 * targets.GIB, "memory_bytes": 16 * targets.GIB, "devices": 16}
    advice = plan.advice(settings(root, "finetune"), report)
    assert "needs 32.00 GiB and has 16.00 GiB" in advice and "would need 32 of them" in advice
    assert "batch" not in advice and "distill" not in advice  # 4 videos are not even one per device
    assert "--config.finetune.batch, now 4" in plan.advice(settings(root, "finetune"), report | {"devices": 2})
    assert "--config.distill.rates, now R2,linear" in plan.advice(settings(root, "distill"), report)


def test_what_the_compiler_refuses_is_reported(root, tmp_path, monkeypatch, capsys):
    def compile_(self):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (129.00G) "
            "exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    code, report, _ = planned(root, tmp_path, "finetune")
    assert code == 1 and report["needed_bytes"] == 129 * 2**30 and not report["fits"]
    assert "needs 129.00 GiB and has 15.75 GiB" in capsys.readouterr().out


def test_flops_of_the_steps(root):
    config = tiny_config("plan", root, distill__batch=3)  # R2 and linear; 1R2 is the budget
    wan, shape = plan_steps.sizes(config)
    size = plan_steps.cost_shape(wan, shape)
    n, d = size.tokens, size.dim
    teacher = cost.model_flops(size, [from_label("softmax")] * 2)
    linear = {label: cost.attention_flops(size, from_label(label)) for label in ("R2", "linear")}
    maps = 3 * (linear["R2"] - 4 * n * (n // 2) * d + linear["linear"])  # no gradient through q, k, v; S for nothing
    assert plan_steps.distill_flops(config, wan, shape) == 2 * 3 * (teacher + 2 * maps)
    override(config, "distill.branches", "cond")
    assert plan_steps.distill_flops(config, wan, shape) == 2 * 3 * teacher + 3 * 2 * maps
    override(config, "distill.activations", "stacked")
    anew = 6 * n * d**2 + 4 * n**2 * d
    assert plan_steps.distill_flops(config, wan, shape) == 2 * 3 * teacher + 3 * 2 * (maps + anew)
    config = tiny_config("plan", root, distill__rates="R2,R3")  # 12 tokens: S(3) is not in S(2)
    maps = sum(3 * (cost.attention_flops(size, from_label(f"R{r}")) - 4 * n * (n // r) * d) for r in (2, 3))
    assert plan_steps.distill_flops(config, wan, shape) == 2 * (teacher + 2 * (maps + 4 * n * (n // 3) * d))
    hybrid = cost.model_flops(size, [from_label("R2"), from_label("softmax")])
    assert plan_steps.finetune_flops(config, wan, shape) == 3 * 4 * hybrid


@pytest.mark.parametrize("job", ["sample", "decode"])
def test_sampling_fits_beside_the_dit(root, tmp_path, job, capsys):
    code, report, config = planned(root, tmp_path, job, target="cpu:2", sample__variant="finetuned", sample__batch=1)
    out = capsys.readouterr().out
    assert code == 0 and report["fits"] and "compiled in" in out
    wan, shape = plan_steps.sizes(config)
    # The small DiT is whole on every device, float32, with the feature maps of the budget's hybrid.
    dit = plan_steps.abstract_dit(wan, plan_steps.planned_attention(config, wan))
    assert "feature_maps" in dit
    assert report["argument_bytes"] > 4 * sum(leaf.size for leaf in jax.tree.leaves(dit))
    if job == "sample":  # 2 devices: a branch each
        hybrid = cost.model_flops(plan_steps.cost_shape(wan, shape), [from_label("R2"), from_label("softmax")])
        assert report["flops_per_device"] == hybrid
        assert report["temporary_bytes"] > 0


def test_advice_for_sampling(root):
    report = {"needed_bytes": 32 * targets.GIB, "memory_bytes": 16 * targets.GIB, "devices": 1}
    assert "--config.sample.sequential=True" in plan.advice(settings(root, "sample"), report)
    assert "--config.sample.windows, now 0" in plan.advice(settings(root, "decode"), report)
    assert "--config.sample.batch, now 2" in plan.advice(settings(root, "decode"), report)


def test_published_sizes_need_no_weights():
    config = load("configs/plan.py:wan_1_3b")
    wan, shape = plan_steps.sizes(config)
    assert wan == PRESETS["wan_1_3b"] and shape == (21, 60, 104, 16) and wan.grid(shape) == (21, 30, 52)
    # Parameters of the published checkpoint (825 tensors).
    assert sum(leaf.size for leaf in jax.tree.leaves(plan_steps.abstract_dit(wan))) == 1_418_996_800
    override(config, "preset", "wan_13b")
    with pytest.raises(UserError, match="preset='wan_13b' is unknown; choose wan_1_3b or wan_14b"):
        plan_steps.sizes(config)


@pytest.mark.parametrize(
    "job, values, message",
    [
        ("export", {}, "job='export' can't be planned; choose one of distill, finetune, sample, decode, select"),
        ("finetune", {"select__budget": "0.5"}, "can't read '0.5'"),
        ("finetune", {"select__budget": "3R2"}, "select.budget=3R2 must name at most 2 blocks"),
        ("select", {}, "costs are estimated by the TPU compiler"),
    ],
)
def test_what_can_not_be_planned(root, tmp_path, job, values, message):
    with pytest.raises(UserError, match=message):
        plan.run(settings(root, job, **values), tmp_path)
    assert not list(tmp_path.iterdir())


def test_distillation_by_command_line_without_a_workdir_exits_with_1_if_it_does_not_fit(
    root, tmp_path, monkeypatch, capsys
):
    config = tiny_config("plan", root)
    monkeypatch.setattr(main, "set_up", lambda: None)
    monkeypatch.chdir(tmp_path)
    configs = plan.__file__.replace("hybrid_dit/jobs/plan.py", "configs/plan.py")
    sizes = {"weights": root / "pipeline", "frames": 9, "height": 32, "width": 32}
    settings = [f"--config.model.{key}={value}" for key, value in sizes.items()]
    command = ["main", f"--config={configs}", "--config.target=cpu:2", "--config.job=distill", *settings]
    assert main.main([*command, "--config.memory_gib=1e-6"]) == 1  # 1 KiB
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    report = json.loads((tmp_path / "runs/plan/plan/distill_weights_cpu_2.json").read_text())
    assert not report["fits"] and report["memory_bytes"] == 1073
    check(report, out, plan_steps.sizes(config)[0], 2)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["distill", "finetune"])
def test_a_tpu_pod(root, tmp_path, job):
    code, report, _ = planned(root, tmp_path, job, target="v5e:2x2")
    assert code == 0 and report["memory_bytes"] == int(15.75 * 2**30) and report["compiler_cycles"] > 0
    assert report["needed_bytes"] < report["memory_bytes"] and report["collectives"]


@pytest.mark.slow
def test_cycles_of_attention_fall_with_the_rate(root, tmp_path):
    # 4,608 tokens, so that softmax's N² is most of the work.
    large = {"model__frames": 33, "model__height": 512, "model__width": 512, "distill__rates": "R2,R8"}
    code, report, _ = planned(root, tmp_path, "select", target="v5e:1x1", **large)
    costs = report["costs"]
    assert code == 0 and costs["softmax"] > costs["R2"] > costs["R8"] > 0


@pytest.mark.parametrize(
    "memory, videos, recommended",
    [
        (20, "1", {"mesh.seq": 1, "finetune.accumulate": 1}),
        (11, "1/2", {"mesh.seq": 2, "finetune.accumulate": 2}),
        (1, None, None),
    ],
)
def test_layouts_of_fine_tuning(root, tmp_path, monkeypatch, capsys, memory, videos, recommended):
    """With 2 + 10 videos GiB per device, and a batch of 4 on 4 devices, of which two compiled steps differ."""
    compiled = []

    def fake(config, wan, shape, target):
        cfg, devices = config.finetune, len(target.devices)
        assert cfg.batch % cfg.accumulate == 0
        compiled.append((config.mesh.seq, cfg.accumulate, cfg.batch))
        needed = int((2 + 10 * cfg.batch / cfg.accumulate / devices) * targets.GIB)
        return {"needed_bytes": needed, "fits": needed <= target.memory, "memory_bytes": target.memory}

    monkeypatch.setattr(plan, "plan", fake)
    monkeypatch.setattr(plan, "table", lambda report: "")
    monkeypatch.setattr(plan, "advice", lambda config, report: "")
    code, report, _ = planned(root, tmp_path, "finetune", memory_gib=float(memory))
    assert code == (0 if memory == 20 else 1) and len(set(compiled)) == len(compiled)
    found = report["layouts"]
    assert found["largest_videos_per_device"] == videos and found["recommended"] == recommended
    out = capsys.readouterr().out
    if recommended:
        assert f"largest that fits: {videos}\n" in out
        assert f"for a batch of 4: --config.mesh.seq={recommended['mesh.seq']} --config.finetune.acc" in out
    else:
        assert "none of them fits" in out


def test_layouts_of_a_batch_smaller_than_the_copies_of_the_weights(root, tmp_path, monkeypatch, capsys):
    """One video, two copies on two devices each: a copy is tried with a video, and nothing is recommended for half."""
    tried = []

    def fake(config, wan, shape, target):
        tried.append((config.mesh.seq, config.finetune.batch))
        return {"needed_bytes": config.finetune.batch * targets.GIB // config.mesh.seq, "fits": True}

    monkeypatch.setattr(plan, "plan", fake)
    monkeypatch.setattr(plan, "table", lambda report: "")
    values = {"mesh.replicas": 2, "finetune.batch": 1}
    _, report, _ = planned(root, tmp_path, "finetune", memory_gib=2.0, **values)
    found = report["layouts"]
    assert tried[:2] == [(1, 1), (2, 2)] and found["largest_videos_per_device"] and found["recommended"] is None
    out = capsys.readouterr().out
    assert "at once: --config.mesh.seq=2 --config.finetune.accumulate=1 --config.finetune.batch=2" in out

"""Cases of a benchmark: they compute the model's own functions and gradients, from inputs of sensible size."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_dit import bench_cases, cost
from hybrid_dit.bench_cases import Case, Sizes
from hybrid_dit.errors import UserError
from hybrid_dit.models.vae import VAEConfig
from hybrid_dit.models.wan import WanConfig, WanDiT
from hybrid_dit.ops.hybrid import attention
from hybrid_dit.ops.spec import AttentionSpec, from_label

WAN = WanConfig(dim=16, num_heads=2, ffn_dim=32, num_layers=2, in_channels=4, text_dim=8, freq_dim=16)
SPECS = {"softmax": AttentionSpec(), "R2": from_label("R2"), "linear": from_label("linear")}
SIZES = Sizes(WAN, VAEConfig(), SPECS, text_tokens=3)
VIDEO, TOKENS = "5x32x48", 2 * 2 * 3
EPS = float(np.finfo(np.float32).eps)


def case(what="op", label="R2", direction="forward", dtype="float32", **fields):
    return Case(**{"what": what, "label": label, "video": VIDEO, "direction": direction, "dtype": dtype} | fields)


def made(**fields):
    function, shapes = bench_cases.program(SIZES, case(backend="xla", **fields))
    return function, bench_cases.random_inputs(shapes)


def test_an_op_is_attention_with_gradients():
    function, (trained, rest, g) = made(direction="forward+backward")
    (y, ((dq, dk, dv, dphi),)), number = jax.jit(function)(trained, rest, g)
    q, k, v, phi = trained
    expected = attention(q, k, v, phi, spec=SPECS["R2"], grid=(2, 2, 3), backend="xla")
    # Different programs: sums of up to TOKENS terms may be in another order.
    np.testing.assert_allclose(y, expected, rtol=0, atol=TOKENS * EPS * np.abs(v).max())
    # Linear in v, so <g, y> = <dv, v>.
    scale = float(jnp.linalg.norm(g.ravel()) * jnp.linalg.norm(y.ravel()))
    assert float(jnp.vdot(g, y)) == pytest.approx(float(jnp.vdot(dv, v)), abs=TOKENS * EPS * scale)
    # Whoever has the number knows that all outputs are there.
    firsts = [float(leaf.ravel()[0]) for leaf in (y, dq, dk, dv, *jax.tree.leaves(dphi))]
    assert float(number) == pytest.approx(sum(firsts), abs=len(firsts) * EPS * sum(map(abs, firsts)))


def test_a_model_is_the_dit_with_gradients_of_all_parameters():
    function, (params, inputs) = bench_cases.program(SIZES, case("model", "1R2", backend="xla"))
    specs = (SPECS["R2"], SPECS["softmax"])
    whole = WanDiT(WAN, specs, jnp.dtype("float32"), backend="xla")
    texts = [
        re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(run)(params, inputs)))
        for run in (function.args[0], lambda p, x: whole.apply({"params": p}, *x))
    ]
    assert texts[0] == texts[1] and "feature_maps" in params
    _, (trained, _, g) = bench_cases.program(SIZES, case("model", "1R2", "forward+backward", backend="xla"))
    assert trained == params and g.shape == (1, *SIZES.latents(VIDEO))


@pytest.mark.parametrize("what", ["attention", "block"])
def test_parts_of_a_model_trace(what):
    function, shapes = bench_cases.program(SIZES, case(what, "linear", "forward+backward", "bfloat16", backend="xla"))
    (y, (gradients,)), number = jax.eval_shape(function, *shapes)
    assert y.shape == (1, TOKENS, WAN.dim) and y.dtype == jnp.bfloat16 and number.shape == ()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), gradients) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes[0]
    )
    names = {str(p[-1].key) for p, _ in jax.tree_util.tree_leaves_with_path(shapes[0]) if hasattr(p[-1], "key")}
    assert {"kernel", "w0"} <= names and ("modulation" in names) == (what == "block")


def test_parameters_are_kept_as_sampling_and_training_keep_them():
    dtypes = {}
    for direction in bench_cases.DIRECTIONS:
        _, shapes = bench_cases.program(SIZES, case("model", "softmax", direction, "bfloat16", backend="xla"))
        dtypes[direction] = shapes[0]["blocks"]["ffn_0"]["kernel"].dtype, shapes[0]["head_modulation"].dtype
    assert dtypes == {"forward": (jnp.bfloat16, jnp.float32), "forward+backward": (jnp.float32, jnp.float32)}


def test_random_inputs_keep_variances():
    shape = jax.ShapeDtypeStruct
    f32 = jnp.float32
    tree = {"kernel": shape((4, 64, 512), f32), "w1": shape((2, 64, 512), f32), "scale": shape((7,), f32)}
    made, (x,) = bench_cases.random_inputs((tree, (shape((1 << 15,), jnp.bfloat16),)))
    for name in ("kernel", "w1"):
        assert float(made[name].std()) == pytest.approx(64**-0.5, rel=0.02)  # 65,536 numbers or more: 4 standard errors
    assert (made["scale"] == 1).all()
    assert x.dtype == jnp.bfloat16 and float(x.astype(f32).std()) == pytest.approx(1.0, rel=0.02)


def test_flops_are_those_of_cost():
    shape = cost.Shape(16, 2, 32, 2, TOKENS, 3)
    expected = {
        "op": cost.attention_flops(shape, SPECS["R2"]),
        "attention": cost.self_attention_flops(shape, SPECS["R2"]),
        "block": cost.block_flops(shape, SPECS["R2"]),
    }
    for what, flops in expected.items():
        assert bench_cases.flops(SIZES, case(what, backend="xla")) == flops
        assert bench_cases.flops(SIZES, case(what, direction="forward+backward", backend="xla")) == 3 * flops
    model = cost.block_flops(shape, SPECS["R2"]) + cost.block_flops(shape, SPECS["softmax"])
    assert bench_cases.flops(SIZES, case("model", "1R2", backend="xla")) == model


def test_backends_are_resolved():
    assert bench_cases.resolved_backend(SIZES, "R2", "float32", "tpu") == "tpu"
    assert bench_cases.resolved_backend(SIZES, "softmax", "bfloat16", "gpu") == "xla"  # cuDNN's, there
    assert bench_cases.resolved_backend(SIZES, "1R2", "float32", "xla") == "xla"


def test_bad_names():
    with pytest.raises(UserError, match="'81x480' is not FRAMESxHEIGHTxWIDTH"):
        SIZES.tokens("81x480")
    with pytest.raises(UserError, match="not 4n"):
        SIZES.tokens("6x32x48")
    for name in ("3R2", "1R4"):
        with pytest.raises(UserError, match=f"bench.models: {name} must name at most 2 blocks"):
            SIZES.attention(name)

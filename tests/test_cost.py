"""FLOPs and parameters against the published figures, to the digits shown there."""

import dataclasses

import numpy as np
import pytest

from hybrid_dit import cost, knapsack
from hybrid_dit.cost import SOFTMAX
from hybrid_dit.errors import UserError
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec, from_label

HD = cost.wan_1_3b(32_760)  # 480x832, 81 frames
TINY = cost.Shape(dim=6, heads=2, ffn=10, blocks=3, tokens=7, text_tokens=5)


def attention(kind, rate=1, feature_map="poly", degree=2, layers=2):
    return AttentionSpec(kind, rate, feature_map=FeatureMapSpec(feature_map, degree, layers))


@pytest.mark.parametrize(
    "size,tokens", [((81, 320, 480), 12_600), ((81, 480, 832), 32_760), ((81, 720, 1280), 75_600), ((1, 16, 16), 1)]
)
def test_video_tokens(size, tokens):
    assert cost.video_tokens(*size) == tokens


@pytest.mark.parametrize("size", [(80, 320, 480), (81, 328, 480), (81, 320, 472)])
def test_video_tokens_refuses_sizes_off_the_grid(size):
    with pytest.raises(UserError, match="don't fit"):
        cost.video_tokens(*size)


@pytest.mark.parametrize(
    "degree,layers,millions,gigaflops",
    # Table 7 of the paper (320x480x81); its 70 GFLOPs for (4, 2) don't fit its own formula, 99 do.
    [(6, 3, 15.4, 387), (4, 2, 3.9, 99), (3, 2, 2.4, 60), (2, 2, 1.2, 30)],
)
def test_feature_map_of_the_paper(degree, layers, millions, gigaflops):
    shape, spec = cost.wan_1_3b(12_600), attention("hybrid", 4, degree=degree, layers=layers)
    assert round(cost.phi_params(shape, spec) / 1e6, 1) == millions
    assert round(cost.phi_flops(shape, spec) / 1e9) == gigaflops


@pytest.mark.parametrize(
    "tokens,core,block",
    [
        (12_600, ["1.72", "3.02", "4.84"], ["1.25", "1.46", "1.60"]),
        (32_760, ["1.88", "3.55", "6.40"], ["1.49", "2.01", "2.44"]),
        (75_600, ["1.95", "3.79", "7.22"], ["1.69", "2.64", "3.65"]),
    ],
)
def test_speedups_in_flops(tokens, core, block):
    shape = cost.wan_1_3b(tokens)
    hybrids = [from_label(label) for label in ("R2", "R4", "R8")]
    for function, expected in ((cost.attention_flops, core), (cost.block_flops, block)):
        assert [f"{function(shape, SOFTMAX) / function(shape, h):.2f}" for h in hybrids] == expected


@pytest.mark.parametrize("name,saved", [("15R2", 21), ("15R4", 33), ("15R8", 39), ("20R8", 51)])
def test_self_attention_saved_over_the_model(name, saved):
    _, label = cost.parse_name(name)
    costs = {key: cost.self_attention_flops(HD, from_label(key)) for key in ("softmax", label)}
    assert round(100 * (1 - cost.named_budget(name, costs, 30) / (30 * costs["softmax"]))) == saved


def test_share_of_self_attention_in_a_block():
    assert round(100 * cost.self_attention_flops(HD, SOFTMAX) / cost.block_flops(HD, SOFTMAX), 1) == 76.5


def _matmul(a, b):
    """FLOPs of a product of two shapes."""
    assert a[-1] == b[0]
    return 2 * a[0] * a[1] * b[1]


def test_block_by_listing_its_matrix_products():
    n, m, d, w, h = 7, 5, 6, 3, 2
    expected = 4 * _matmul((n, d), (d, d))  # self q, k, v, o
    expected += h * (_matmul((n, w), (w, 4)) + _matmul((n, 4), (4, w)))  # S = tokens 0, 2, 4, 6
    expected += 2 * h * (_matmul((n, w), (w, 6)) + _matmul((n, 6), (6, 6)) + 2 * n * 6)  # two maps, biases
    expected += h * (_matmul((6, n), (n, w)) + _matmul((n, 6), (6, w)))  # state: build, apply
    expected += 2 * _matmul((n, d), (d, d)) + 2 * _matmul((m, d), (d, d))  # cross q, o; k, v
    expected += h * (_matmul((n, w), (w, m)) + _matmul((n, m), (m, w)))
    expected += _matmul((n, d), (d, 10)) + _matmul((n, 10), (10, d))
    assert cost.block_flops(TINY, attention("hybrid", 2)) == expected


def test_linear_is_the_hybrid_without_softmax_keys():
    hybrid, linear = attention("hybrid", 2), attention("linear", 2)
    softmax_part = 4 * 7 * 4 * 6
    assert cost.attention_flops(TINY, hybrid) - cost.attention_flops(TINY, linear) == softmax_part


def test_rate_one_is_plain_softmax():
    assert cost.attention_flops(TINY, attention("hybrid", 1)) == cost.attention_flops(TINY, SOFTMAX) == 4 * 7 * 7 * 6
    assert cost.attention_flops(TINY, from_label("R1")) == 4 * 7 * 7 * 6


def test_names_of_the_paper():
    assert [cost.parse_name(n) for n in ("15R4", "20R8", "15 Linear", "3linear")] == [
        (15, "R4"), (20, "R8"), (15, "linear"), (3, "linear"),
    ]  # fmt: skip


def test_parameter_free_and_single_layer_maps():
    elu, hedgehog = attention("linear", feature_map="elu"), attention("linear", feature_map="hedgehog")
    assert cost.phi_params(TINY, elu) == cost.phi_flops(TINY, elu) == 0
    assert cost.phi_params(TINY, hedgehog) == 2 * (3 * 3 + 3)
    assert cost.attention_flops(TINY, elu) == 4 * 7 * 3 * 6  # F = D
    assert cost.attention_flops(TINY, hedgehog) == 4 * 7 * 6 * 6 + 2 * 7 * 2 * (2 * 9 + 3)  # F = 2 D


def test_model_is_the_sum_of_its_blocks():
    attentions = [SOFTMAX, attention("hybrid", 2), attention("linear")]
    assert cost.model_flops(TINY, attentions) == sum(cost.block_flops(TINY, a) for a in attentions)
    with pytest.raises(UserError, match="2 blocks for a model of 3"):
        cost.model_flops(TINY, attentions[:2])


def test_named_budget_is_the_compute_of_that_homogeneous_model():
    labels = ["softmax", "R2", "R4", "R8"]
    table = cost.cost_table(HD, labels)
    hybrid = from_label("R4")
    assert cost.named_budget("15R4", table, 30) == cost.model_flops(HD, [hybrid] * 15 + [SOFTMAX] * 15)
    # In measured times too, the homogeneous model must be a feasible point of the knapsack at its own budget.
    times = dict(zip(labels, (11.4, 7.6, 4.7, 3.6)))
    errors = np.random.default_rng(0).random((30, 4)) * [0, 1, 1, 1]
    costs = np.tile(list(times.values()), (30, 1))
    budget = cost.named_budget("15R4", times, 30)
    same = knapsack.homogeneous(errors, costs, rate=2, keep=0, count=15)
    assert (same.choice == 2).sum() == 15 and same.cost == budget
    assert knapsack.solve(errors, costs, budget).error <= same.error


def test_feature_map_options_reach_the_table():
    small, large = (cost.cost_table(HD, ["R4", "linear"], FeatureMapSpec("poly", d, 3)) for d in (2, 6))
    assert small["R4"] < large["R4"] and small["linear"] < large["linear"]


def test_large_model_is_named_by_its_size():
    shape = cost.wan_14b(32_760)
    assert (shape.head_dim, shape.blocks) == (128, 40)
    # Parameters in the counted matrices of all blocks: d² x (4 self + 4 cross) + 2 d ffn, "14B" with embeddings.
    assert 13.9e9 < shape.blocks * (8 * shape.dim**2 + 2 * shape.dim * shape.ffn) < 14.1e9


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: cost.parse_name("R4"), "like 15R4"),
        (lambda: cost.named_budget("31R4", {"softmax": 1, "R4": 1}, 30), "converts 31 blocks"),
        (lambda: cost.named_budget("5R3", {"softmax": 1, "R4": 1}, 30), "cost of R3; the table has softmax, R4"),
        (lambda: cost.block_flops(TINY, attention("hybrid", 2, feature_map="relu")), "choose one of poly, elu"),
        (lambda: dataclasses.replace(TINY, heads=4), "multiple of heads"),
    ],
)
def test_bad_input_is_explained(make, message):
    with pytest.raises(UserError, match=message):
        make()

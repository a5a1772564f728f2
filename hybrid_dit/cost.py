"""FLOPs and parameters of a Wan DiT whose blocks may have softmax, hybrid or linear self-attention.

The accounting, which reproduces the paper's figures for φ and for a block to the digits shown there:

* A multiply-add is 2 FLOPs. Element-wise work (softmax, norms, RoPE, activations, powers, the division by the
  normaliser) and the normaliser's own sum are not counted; the biases of φ are, at 1 FLOP each.
* Softmax core: q·kᵀ and p·v over the keys it sees, 4·N·M·d; a hybrid sees M = |S| = ceil(N / R) keys.
* Linear part: the state Σ φ_k(k)ᵀ v is built and applied at 2·N·F·d each. φ_q, φ_k and the state run over all N tokens,
  also those in S: masking S is what a dense implementation does, so this is an upper bound.
* A block is self-attention (q, k, v, o and the attention itself), cross-attention to the text, and the feed-forward
  layer. Embeddings and the output head are left out: 0.01% of the 1.3B model at 32,760 tokens.

Costs are forward passes of one sample; with classifier-free guidance a sampling step makes two.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real

import jax
import jax.numpy as jnp

from hybrid_dit.errors import UserError
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.spec import AttentionSpec, FeatureMapSpec, from_label


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a DiT and of the video it runs on.

    Attributes:
        dim: model width d = heads * head width.
        heads: attention heads.
        ffn: hidden width of the feed-forward layer.
        blocks: transformer blocks.
        tokens: video tokens N.
        text_tokens: length of the (padded) prompt.
    """

    dim: int
    heads: int
    ffn: int
    blocks: int
    tokens: int
    text_tokens: int = 512

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 1 or self.dim % self.heads:
            raise UserError(f"every size must be at least 1 and dim a multiple of heads, got {self}")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads


SOFTMAX = AttentionSpec()


def wan_1_3b(tokens: int) -> Shape:
    """Returns the shape of Wan2.1 T2V 1.3B on a video of that many tokens."""
    return Shape(dim=1536, heads=12, ffn=8960, blocks=30, tokens=tokens)


def wan_14b(tokens: int) -> Shape:
    """Returns the shape of Wan2.1 T2V 14B on a video of that many tokens."""
    return Shape(dim=5120, heads=40, ffn=13824, blocks=40, tokens=tokens)


def video_tokens(frames: int, height: int, width: int) -> int:
    """Returns N for a video in pixels: VAE stride (4, 8, 8) with a first frame of its own, patches of (1, 2, 2)."""
    if frames % 4 != 1 or height % 16 or width % 16:
        raise UserError(
            f"{frames} frames of {height}x{width} don't fit the model: frames must be 4k + 1, height and width "
            "multiples of 16"
        )
    return ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)


def features(head_dim: int, attention: AttentionSpec) -> int:
    """Returns F, the number of features of one head."""
    return _phi_of_a_head(head_dim, attention.feature_map)[0]


def phi_params(shape: Shape, attention: AttentionSpec) -> int:
    """Returns the parameters, biases included, of ONE feature map over all heads; a converted block has two."""
    weights, biases = _phi_sizes(shape, attention)
    return weights + biases


def phi_flops(shape: Shape, attention: AttentionSpec) -> int:
    """Returns the FLOPs of ONE feature map on all N tokens: 2 per weight and 1 per bias and token."""
    weights, biases = _phi_sizes(shape, attention)
    return shape.tokens * (2 * weights + biases)


def attention_flops(shape: Shape, attention: AttentionSpec) -> int:
    """Returns the FLOPs of the self-attention core: softmax part, both feature maps, linear part; no q, k, v, o."""
    n, d = shape.tokens, shape.dim
    if attention.kind == "softmax" or (attention.kind == "hybrid" and attention.rate == 1):  # nothing left to φ
        return 4 * n * n * d
    keys = math.ceil(n / attention.rate) if attention.kind == "hybrid" else 0
    state = 2 * n * features(shape.head_dim, attention) * d
    return 4 * n * keys * d + 2 * phi_flops(shape, attention) + 2 * state


def self_attention_flops(shape: Shape, attention: AttentionSpec) -> int:
    """Returns the FLOPs of self-attention with its q, k, v and o projections."""
    return 8 * shape.tokens * shape.dim**2 + attention_flops(shape, attention)


def block_flops(shape: Shape, attention: AttentionSpec) -> int:
    """Returns the FLOPs of one block: self-attention, cross-attention (k, v over the text) and feed-forward."""
    n, m, d = shape.tokens, shape.text_tokens, shape.dim
    cross = 4 * n * d**2 + 4 * m * d**2 + 4 * n * m * d
    return self_attention_flops(shape, attention) + cross + 4 * n * d * shape.ffn


def model_flops(shape: Shape, attentions: Sequence[AttentionSpec]) -> int:
    """Returns the FLOPs of all blocks, one `AttentionSpec` each."""
    if len(attentions) != shape.blocks:
        raise UserError(f"got the attention of {len(attentions)} blocks for a model of {shape.blocks}")
    return sum(block_flops(shape, a) for a in attentions)


def cost_table(
    shape: Shape, labels: Sequence[str], feature_map: FeatureMapSpec = SOFTMAX.feature_map
) -> dict[str, int]:
    """Returns {label: FLOPs of one block}, for the knapsack and for `named_budget`; labels as in `ops.spec`."""
    return {label: block_flops(shape, from_label(label, feature_map=feature_map)) for label in labels}


def named_budget(name: str, costs: Mapping[str, Real], blocks: int) -> float | int:
    """Returns the compute a name such as "15R4" stands for: 15 blocks converted at R = 4, the rest softmax.

    Args:
        name: number of converted blocks and their rate, "15R4" or "15 Linear".
        costs: cost of one block per label, among them "softmax"; FLOPs (`cost_table`) or measured times.
        blocks: number of blocks of the model.
    """
    count, label = parse_name(name)
    if count > blocks:
        raise UserError(f"{name} converts {count} blocks, but the model has {blocks}")
    for needed in (label, "softmax"):
        if needed not in costs:
            raise UserError(f"{name} needs the cost of {needed}; the table has {', '.join(costs)}")
    terms = [costs[label]] * count + [costs["softmax"]] * (blocks - count)
    # The knapsack's own sums: exact for integers, correctly rounded for floats, so the named model fits its budget.
    return sum(terms) if all(isinstance(t, int) for t in terms) else math.fsum(terms)


def parse_name(name: str) -> tuple[int, str]:
    """Returns (converted blocks, label of their attention) of a name such as "15R4" or "15 Linear"."""
    match = re.fullmatch(r"(\d+)(?:(R[1-9]\d*)| ?[Ll]inear)", name)
    if not match:
        raise UserError(f"can't read {name!r}: write converted blocks and their rate, like 15R4 or 15 Linear")
    return int(match[1]), match[2] or "linear"


def _phi_sizes(shape: Shape, attention: AttentionSpec) -> tuple[int, int]:
    """Returns (weights, biases) of one feature map over all heads."""
    _, weights, biases = _phi_of_a_head(shape.head_dim, attention.feature_map)
    return shape.heads * weights, shape.heads * biases


@functools.cache
def _phi_of_a_head(head_dim: int, spec: FeatureMapSpec) -> tuple[int, int, int]:
    """(features, weights, biases) from the shapes of the map: matrices [head, in, out], vectors [head, out]."""

    def run(key, x):
        params = feature_maps.init(key, 1, head_dim, spec)["q"]
        return params, feature_maps.apply(params, x, spec)

    x = jax.ShapeDtypeStruct((1, 1, 1, head_dim), jnp.float32)
    params, y = jax.eval_shape(run, jax.eval_shape(jax.random.key, 0), x)
    sizes = {axes: sum(p.size for p in jax.tree.leaves(params) if p.ndim == axes) for axes in (2, 3)}
    return y.shape[-1], sizes[3], sizes[2]

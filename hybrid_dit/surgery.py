"""Attention Surgery on parameter trees: the losses of stage 1, and the assembly of a hybrid.

Feature maps of one kind of attention ("R2", "linear", ...) are a tree with a leading block axis, as in the model.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_dit.array_typing import Array, Float, PyTree
from hybrid_dit.errors import UserError
from hybrid_dit.models.wan import WanConfig
from hybrid_dit.ops import feature_maps
from hybrid_dit.ops.hybrid import combine, linear_part
from hybrid_dit.ops.spec import AttentionSpec
from hybrid_dit.ops.tokens import Grid, linear_keys

LOSSES = ("value", "attention")


def init_maps(key: Array, wan: WanConfig, spec: AttentionSpec) -> PyTree:
    """Returns fresh feature maps for every block, stacked [B, ...]."""
    keys = jax.random.split(key, wan.num_layers)
    return jax.vmap(lambda k: feature_maps.init(k, wan.num_heads, wan.head_dim, spec.feature_map))(keys)


def value_loss(
    teacher: Float[Array, "b n h d"], student: Float[Array, "b n h d"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Value distillation L = ‖y − ŷ‖₁ (paper Eq. 7), and relative to ‖y‖₁.

    The norm is taken as a mean over elements: sizes then don't change the loss, and AdamW doesn't see the factor.
    """
    return _value_loss(teacher, student, teacher.shape[1])


def _value_loss(teacher: Array, student: Array, tokens: int) -> tuple[Array, Array]:
    """`value_loss` over the first `tokens` tokens; the rest pads them."""
    error, size = _absolute(teacher, student, tokens).sum(), _absolute(teacher, 0.0, tokens).sum()
    return error / (teacher.size // teacher.shape[1] * tokens), error / size


def _absolute(a: Array, b: Array | float, tokens: int) -> Float[Array, "b n h d"]:
    """|a − b| in float32, 0 for tokens from `tokens` on. A mask, since a slice would move tokens between devices."""
    real = (np.arange(a.shape[1]) < tokens)[:, None, None]
    return jnp.where(real, jnp.abs(a.astype(jnp.float32) - b), 0.0)


def attention_loss(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    phi: PyTree,
    spec: AttentionSpec,
    grid: Grid,
    key: Array,
    queries: int = 128,
) -> Float[Array, ""]:
    """Attention distillation L = log(1 + ‖exp(s_ij) − φ_q(q_i) φ_k(k_j)ᵀ‖₂²) (paper Eq. 6) on sampled queries.

    Pairs are those that the linear part stands for: keys of L. `queries` random rows of the N×N matrix are taken (all
    of them if there are fewer), and their squared norm is scaled up to all rows. exp(s) is divided by its row's
    exp(c_i), as the student's softmax part is (Eq. 5): otherwise large logits overflow and the two parts don't match.
    """
    n = math.prod(grid)
    k = k[:, :n]  # without tokens that pad the grid's
    rows = jax.random.choice(key, n, (min(queries, n),), replace=False)
    q_rows = q[:, rows].astype(jnp.float32)
    scores = jnp.einsum("bnhd,bmhd->bhnm", q_rows, k.astype(jnp.float32)) * q.shape[-1] ** -0.5
    keep = linear_keys(grid, spec, n)
    softmax_keys = jnp.where(keep == 0, scores, -jnp.inf) if spec.kind == "hybrid" else scores
    target = jnp.exp(scores - softmax_keys.max(axis=-1, keepdims=True))
    phi_q, phi_k = feature_maps.apply_pair(phi, q_rows, k, spec.feature_map)
    error = (target - jnp.einsum("bnhf,bmhf->bhnm", phi_q, phi_k.astype(jnp.float32))) * keep
    return jnp.log1p(jnp.square(error).sum() * (n / len(rows)) / q.shape[0])


def rate_loss(
    phi: PyTree,
    qkv: tuple[Array, Array, Array],
    teacher: Float[Array, "b n h d"],
    sums: tuple[Array, Array],
    spec: AttentionSpec,
    grid: Grid,
    loss: str,
    key: Array,
    backend: str = "xla",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Loss of one block at one rate, differentiable in `phi`, and its relative L1 error.

    Args:
        phi: this block's feature maps for this rate.
        qkv: this block's q, k, v after norm and RoPE, from the teacher. Tokens beyond the grid's don't count.
        teacher: the teacher's attention output, softmax(q kᵀ) v.
        sums: softmax part of Eq. 5, from `ops.nested.nested_sums`.
        spec: what to distil to.
        grid: of the tokens.
        loss: "value" or "attention".
        key: for sampled rows of the attention loss.
        backend: of the linear part.
    """
    student = combine(sums, linear_part(*qkv, phi, spec, grid, backend))
    value, error = _value_loss(teacher, student, math.prod(grid))
    return value if loss == "value" else attention_loss(*qkv[:2], phi, spec, grid, key), error


def video_errors(
    phi: Mapping[str, PyTree],
    qkv: tuple[Array, Array, Array],
    teacher: Float[Array, "b n h d"],
    sums: Mapping[str, tuple[Array, Array]],
    specs: Mapping[str, AttentionSpec],
    grid: Grid,
) -> dict[str, Float[Array, "b"]]:
    """Relative L1 error ‖y − ŷ‖₁ / ‖y‖₁ of one block for every spec, video by video.

    Arguments as for `rate_loss`, with a label for every rate.
    """
    n = math.prod(grid)
    size = _absolute(teacher, 0.0, n).sum(axis=(1, 2, 3))
    students = {s: combine(sums[s], linear_part(*qkv, phi[s], spec, grid)) for s, spec in specs.items()}
    return {label: _absolute(teacher, student, n).sum(axis=(1, 2, 3)) / size for label, student in students.items()}


def assemble(
    teacher: Mapping, maps: Mapping[str, PyTree], choice: Sequence[str], specs: Mapping[str, AttentionSpec]
) -> tuple[tuple[AttentionSpec, ...], dict]:
    """Returns (one AttentionSpec per block, parameters) of the hybrid: teacher weights plus the chosen feature maps.

    Args:
        teacher: the DiT's parameters, without feature maps.
        maps: label -> feature maps of all blocks, [B, ...].
        choice: one label per block, "softmax" to leave it alone.
        specs: label -> attention.

    Raises:
        UserError: a chosen label was not distilled, or there is not one for each block.
    """
    unknown = sorted(set(choice) - set(maps) - {"softmax"})
    if unknown:
        raise UserError(f"no feature maps for {', '.join(unknown)}; distilled are {', '.join(maps)}")
    blocks = {len(leaf) for leaf in jax.tree.leaves(maps)} or {len(choice)}
    if blocks != {len(choice)}:  # people edit the file of rates
        raise UserError(f"{len(choice)} rates for {max(blocks)} blocks: {', '.join(choice)}; give one per block")
    attention = tuple(specs[label] if label != "softmax" else AttentionSpec() for label in choice)
    if all(label == "softmax" for label in choice):
        return attention, dict(teacher)
    # Unused slices are zero, so that export (which leaves them out) and import give back the same tree.
    merged = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), next(iter(maps.values())))
    for block, label in enumerate(choice):
        if label != "softmax":
            jax.tree.map(lambda out, x, b=block: out.__setitem__(b, np.asarray(x[b])), merged, maps[label])
    return attention, {**teacher, "feature_maps": merged}

"""What attention leaves for its backward pass: inputs alone, or what its kernels return beside the output.

The results are marked by name, so that a block that is computed anew for its backward pass may keep those of attention,
its dearest part (`models.wan.REMAT`).
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from hybrid_dit.array_typing import PyTree

_NAME = "attention"
_named = jax.checkpoint_policies.save_only_these_names(_NAME)


def marked(tree: PyTree) -> PyTree:
    """The same arrays, for `kept` to recognise."""
    return jax.tree.map(lambda x: checkpoint_name(x, _NAME), tree)


def from_inputs(attention: Callable) -> Callable:
    """`attention` in XLA operations, which keeps its inputs, and what it marks, for the backward pass.

    Everything else is computed anew there: per block scores of many GiB, and sums of each branch of a switch. The
    output is marked.
    """
    run = jax.checkpoint(attention, policy=kept)
    return lambda *args: marked(run(*args))


def kept(primitive, *args, **params) -> bool:
    """Policy for `jax.checkpoint`: attention's output and the sums per row that its backward pass starts from."""
    return primitive.name.startswith("dot_product_attention_fwd") or _named(primitive, *args, **params)

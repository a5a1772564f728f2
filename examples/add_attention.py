"""A feature map of one's own, in one file: focused linear attention (Han et al. 2023, arXiv:2308.00442).

    python examples/add_attention.py --config=configs/surgery.py --workdir=runs/focused \\
        --config.distill.feature_map=focused

φ(x) = r^p · ‖r‖ / ‖r^p‖ with r = relu(W x + b), element by element, p = 3: it keeps the length of r and makes its
direction sharper. W is learned per head and starts as the identity over √d. `docs/add_attention.md` walks through
this file.
"""

import sys

import jax
import jax.numpy as jnp

from hybrid_dit.main import main
from hybrid_dit.ops.feature_maps import FEATURE_MAPS, FeatureMap

POWER = 3


def init(key, heads, head_dim, spec):
    """Parameters of one map: float32, the head axis first. Matrices are [head, in, out], vectors [head, out]."""
    del key, spec
    eye = jnp.broadcast_to(jnp.eye(head_dim), (heads, head_dim, head_dim))
    return {"w0": eye * head_dim**-0.5, "b0": jnp.zeros((heads, head_dim))}


def apply(params, x, spec):
    """Features [b, n, h, f] >= 0 of x [b, n, h, d], in the dtype of x; sums and powers in float32."""
    del spec
    y = jnp.einsum("bnhi,hio->bnho", x, params["w0"].astype(x.dtype), preferred_element_type=jnp.float32)
    r = jax.nn.relu(y + params["b0"]) + 1e-6  # never all zero: a gradient of 0 / 0 would be NaN
    sharp = r**POWER
    length = jnp.linalg.norm(r, axis=-1, keepdims=True) / jnp.linalg.norm(sharp, axis=-1, keepdims=True)
    return (sharp * length).astype(x.dtype)


FEATURE_MAPS["focused"] = FeatureMap(init, apply)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

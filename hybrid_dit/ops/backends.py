"""Which implementation of attention runs: plain XLA operations (`xla`) or fused TPU kernels (`tpu`)."""

import jax

from hybrid_dit.array_typing import DTypeLike
from hybrid_dit.errors import UserError
from hybrid_dit.ops.kernels import tpu_hybrid
from hybrid_dit.ops.spec import AttentionSpec

BACKENDS = ("auto", "xla", "tpu")


def choose(backend: str, spec: AttentionSpec, head_dim: int, dtype: DTypeLike) -> str:
    """Returns "xla" or "tpu"; called while tracing.

    What the kernels don't take (a feature map of one's own, a head width other than 128 on a TPU, float16) runs on XLA
    whatever is asked for. "auto" is "tpu" in a process with one TPU and "xla" everywhere else: the compiler can't split
    a kernel over several devices by itself. Inside `shard_map` ask for "tpu".

    Raises:
        UserError: an unknown name.
    """
    if backend not in BACKENDS:
        raise UserError(f"attention backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        one_tpu = jax.default_backend() == "tpu" and jax.device_count() == 1
        backend = "tpu" if one_tpu and tpu_hybrid.aligned(head_dim) else "xla"
    return backend if backend == "xla" or tpu_hybrid.fits(spec, head_dim, dtype) else "xla"

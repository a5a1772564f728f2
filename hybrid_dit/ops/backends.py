"""Which implementation of attention runs: plain XLA operations (`xla`) or fused kernels (`tpu`, `gpu`)."""

import jax

from hybrid_dit.array_typing import DTypeLike
from hybrid_dit.errors import UserError
from hybrid_dit.ops.kernels import gpu_hybrid, tpu_hybrid
from hybrid_dit.ops.manual import manual_device
from hybrid_dit.ops.spec import AttentionSpec

BACKENDS = ("auto", "xla", "tpu", "gpu")


def choose(backend: str, spec: AttentionSpec, head_dim: int, dtype: DTypeLike) -> str:
    """Returns "xla", "tpu" or "gpu"; called while tracing.

    What the kernels don't take (softmax attention on a GPU, where cuDNN has it, a feature map of one's own, a head
    width other than 128 on a TPU, float16, on a GPU float32) runs on XLA whatever is asked for. "auto" is "tpu" or
    "gpu" where a program is for one TPU, or for one GPU of a kind that the kernels are tuned for: inside `shard_map`
    over such devices (with check_vma=False), as `ops.context_parallel` runs attention, or in a process with a single
    one. It is "xla" everywhere else: the compiler can't split a kernel over several devices by itself.

    Raises:
        UserError: an unknown name.
    """
    if backend not in BACKENDS:
        raise UserError(f"attention backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        platform, kind = _device()
        tpu, gpu = platform == "tpu" and tpu_hybrid.aligned(head_dim), platform == "gpu" and gpu_hybrid.tuned(kind)
        backend = "tpu" if tpu else "gpu" if gpu else "xla"
    kernels = {"tpu": tpu_hybrid, "gpu": gpu_hybrid}.get(backend)
    return backend if kernels and kernels.fits(spec, head_dim, dtype) else "xla"


def _device() -> tuple[str, str]:
    """(platform, kind) of what the program at hand runs on, if each device runs it for itself; else empty."""
    device = manual_device()
    if device is None and jax.device_count() == 1:
        device = jax.devices()[0]
    return ("", "") if device is None else (device.platform, device.device_kind)

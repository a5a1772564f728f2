"""The softmax part of hybrid attention in PyTorch: fused kernels where they give what Eq. 5 needs, else tiles.

Every backend maps q [b, h, n, d] and k, v [b, h, m, d] (any strides) to the softmax attention [b, h, n, d] in the dtype
of `q`, and to the weight l_i [b, h, n] with which it enters Eq. 5, float32: numerator l_i o_i, denominator l_i. For the
stabiliser "max" l_i = Σ_j exp(s_ij − max_j s_ij). For "lse" it is 1 by definition, and None is returned.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint

from hybrid_dit.errors import UserError
from hybrid_dit.torch.options import compiled, compiles, options

MAX_SCORES = 2**24  # scores that the plain backend holds at once, float32: 64 MiB


def softmax_part(q: Tensor, k: Tensor, v: Tensor, stabiliser: str) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over the keys of S and its weight in Eq. 5 (see the module).

    Where gradients are asked for the plain backend runs: c_i is held fixed in them, as the method defines.
    """
    name = _choose(q, k, v, stabiliser)
    if name not in BACKENDS:
        raise UserError(f"unknown softmax backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name](q, k, v, stabiliser)


def _choose(q: Tensor, k: Tensor, v: Tensor, stabiliser: str) -> str:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "plain"
    if stabiliser == "lse":
        return options.lse
    half = q.dtype in (torch.float16, torch.bfloat16)
    whole = q.shape[-1] >= 16 and q.shape[-1] & (q.shape[-1] - 1) == 0  # head widths that flex takes
    fits = q.is_cuda and half and whole and compiles(q) and hasattr(flex, "AuxRequest")
    return options.max if fits else "plain"


def plain(q: Tensor, k: Tensor, v: Tensor, stabiliser: str) -> tuple[Tensor, Tensor | None]:
    """Tiles of queries in float32: the N×M scores never exist, forward or backward."""
    b, h, n, d = q.shape
    size = max(1, MAX_SCORES // (b * h * k.shape[2]))
    k32, v32 = k.float(), v.float()
    graded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)

    def tile(q_tile, k32, v32):
        s = (q_tile.float() @ k32.transpose(-1, -2)) * d**-0.5
        p = torch.exp(s - s.detach().amax(dim=-1, keepdim=True))
        weight = p.sum(dim=-1)
        return (p @ v32) / weight[..., None], weight

    parts = []
    for start in range(0, n, size):
        args = (q[:, :, start : start + size], k32, v32)
        parts.append(checkpoint(tile, *args, use_reentrant=False) if graded else tile(*args))
    out, weight = (torch.cat(x, dim=2) for x in zip(*parts))
    if stabiliser == "lse":
        weight = weight / weight.detach() if graded else None
    return out.to(q.dtype), weight


def sdpa(q: Tensor, k: Tensor, v: Tensor, stabiliser: str) -> tuple[Tensor, None]:
    """`scaled_dot_product_attention`, whichever kernel PyTorch prefers; stabiliser "lse" only."""
    _lse_only("sdpa", stabiliser)
    return F.scaled_dot_product_attention(q, k, v), None


def cudnn(q: Tensor, k: Tensor, v: Tensor, stabiliser: str) -> tuple[Tensor, None]:
    """cuDNN's kernel, forward only; stabiliser "lse" only."""
    _lse_only("cudnn", stabiliser)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0], None


def flash(q: Tensor, k: Tensor, v: Tensor, stabiliser: str) -> tuple[Tensor, None]:
    """PyTorch's flash attention, forward only; stabiliser "lse" only."""
    _lse_only("flash", stabiliser)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0], None


def flex_backend(
    q: Tensor, k: Tensor, v: Tensor, stabiliser: str, kernel_options: dict | None = None
) -> tuple[Tensor, Tensor | None]:
    """Flex attention (PyTorch 2.9 or later), which returns log-sum-exp and maximum; compiled by Triton."""
    run = compiled(flex.flex_attention)
    if stabiliser == "lse":
        return run(q, k, v, kernel_options=kernel_options), None
    out, aux = run(q, k, v, return_aux=flex.AuxRequest(lse=True, max_scores=True), kernel_options=kernel_options)
    return out, torch.exp(aux.lse - aux.max_scores)


def _lse_only(name: str, stabiliser: str) -> None:
    if stabiliser != "lse":
        raise UserError(f"softmax backend {name!r} returns no maxima; stabiliser {stabiliser!r} takes flex or plain")


BACKENDS: dict[str, Callable] = {"plain": plain, "sdpa": sdpa, "cudnn": cudnn, "flash": flash, "flex": flex_backend}

"""Times a Wan2.1 1.3B block in PyTorch on a CUDA GPU: cuDNN softmax against the hybrids of `hybrid_dit.torch`.

    python benchmarks/torch_block.py --out DIR              # two minutes on one H100 or H200, compilation included

32,760 tokens (81 frames of 480x832), bf16, batch 1, random weights of the usual size. Three sections:
  softmax part   kernels for N queries and N/8 keys, with and without the row maximum that stabiliser "max" needs;
  attention      the whole attention (q, k, v after RoPE to output) per rate, checked against float64;
  block          a whole block, eager and under torch.compile; speed-ups are against the softmax block run the same way.
Times are medians of CUDA events. The floor is the matrix products' FLOPs at the rate of an 8192^3 product, measured
first. No new variant starts after `--budget` seconds; what was left out is listed. Needs no diffusers.
"""

import argparse
import csv
import functools
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex

from hybrid_dit.ops.spec import from_label
from hybrid_dit.torch import attention, feature_maps, softmax

GRIDS = {32760: (21, 30, 52), 12600: (21, 20, 30), 256: (4, 8, 8)}
HEADS, HEAD_DIM, FFN, TEXT = 12, 128, 8960, 512
DIM = HEADS * HEAD_DIM
LABELS = ("R8", "R4", "R2", "linear")
ROWS_CHECKED = 2048  # queries whose output is checked against float32


class Block(nn.Module):
    """A Wan block by the book: what diffusers' WanTransformerBlock computes, with the attention given."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k, self.cross_norm_q, self.cross_norm_k = (nn.RMSNorm(DIM, eps=1e-6) for _ in range(4))
        self.cross_q, self.cross_k, self.cross_v, self.cross_o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm2 = nn.LayerNorm(DIM, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(DIM, FFN), nn.GELU(approximate="tanh"), nn.Linear(FFN, DIM))
        self.modulation = nn.Parameter(torch.randn(1, 6, DIM) / DIM**0.5)

    def forward(self, x, text, time6, cos, sin):
        """x [1, n, c] -> [1, n, c]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time6).chunk(6, dim=1)
        y = (F.layer_norm(x.float(), (DIM,), eps=1e-6) * (1 + scale1) + shift1).type_as(x)
        q, k, v = self.norm_q(self.q(y)), self.norm_k(self.k(y)), self.v(y)
        q, k, v = (z.unflatten(2, (HEADS, HEAD_DIM)) for z in (q, k, v))
        y = self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(2)
        x = (x.float() + self.o(y) * gate1).type_as(x)
        y = F.layer_norm(x.float(), (DIM,), self.norm2.weight.float(), self.norm2.bias.float(), 1e-6).type_as(x)
        q, k, v = self.cross_norm_q(self.cross_q(y)), self.cross_norm_k(self.cross_k(text)), self.cross_v(text)
        q, k, v = (z.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2) for z in (q, k, v))
        x = x + self.cross_o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = (F.layer_norm(x.float(), (DIM,), eps=1e-6) * (1 + scale2) + shift2).type_as(x)
        return (x.float() + self.ffn(y).float() * gate2).type_as(x)


def rotate(x, cos, sin):
    """RoPE as diffusers' processor writes it."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


def cudnn_softmax(q, k, v):
    """The teacher's attention: SDPA; the caller forces the cuDNN kernel. [b, n, h, d] in and out."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def milliseconds(function, *args, repeats):
    """Median of `repeats` calls after three that warm up (and compile)."""
    for _ in range(3):
        function(*args)
    if not torch.cuda.is_available():  # only to try the script out
        start = time.perf_counter()
        function(*args)
        return (time.perf_counter() - start) * 1e3
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(*args)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def attention_flops(label, n):
    """Matrix products of the attention alone: softmax part, feature maps (P = 2, two layers), state and its use."""
    width, rows = 2 * HEAD_DIM, HEADS * n
    if label == "softmax":
        return 4 * rows * n * HEAD_DIM
    maps = 2 * 2 * rows * (HEAD_DIM * width + width * width)
    state = 2 * 2 * rows * width * HEAD_DIM
    keys = 0 if label == "linear" else math.ceil(n / int(label[1:]))
    return 4 * rows * keys * HEAD_DIM + maps + state


def block_flops(label, n):
    """All matrix products of a block."""
    projections = 2 * n * DIM * DIM * 6 + 2 * 2 * TEXT * DIM * DIM  # q, k, v, o, cross q and o; cross k and v
    return attention_flops(label, n) + projections + 4 * n * TEXT * DIM + 4 * n * DIM * FFN


def inputs(n, device, dtype):
    """q, k as after RMS norm (scores about 2.5 wide), v, and feature maps with φ_q·φ_k about 0.05 at first."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, HEADS, HEAD_DIM, device=device, dtype=dtype) for _ in range(3))
    shapes = feature_maps.parameter_shapes(HEADS, HEAD_DIM, from_label("linear").feature_map)
    phi = {x: {name: torch.zeros(shape, device=device) for name, shape in shapes[x].items()} for x in "qk"}
    for params in phi.values():
        for name in ("w0", "w1"):
            params[name].normal_(std=params[name].shape[1] ** -0.5)
        params["b1"] += math.log(math.expm1((0.05 / HEAD_DIM) ** 0.5))
        params.update({name: x.to(dtype) for name, x in params.items()})
    return q * 1.5, k * 1.5, v, phi


class Report:
    """Prints and collects rows, and keeps the time."""

    def __init__(self, budget, rate):
        self.end, self.rate, self.rows, self.left_out = time.perf_counter() + budget, rate, [], []

    def add(self, section, name, flops, function, *args, repeats=9, check=None, base=None):
        """Times one variant; returns its milliseconds, or None if time is up or it failed (the reason is kept)."""
        if time.perf_counter() > self.end:
            self.left_out.append(f"{section} {name}: out of time")
            return None
        began = time.perf_counter()
        try:
            ms = milliseconds(function, *args, repeats=repeats)
            error = check(function(*args)) if check else None
        except Exception as failure:  # noqa: BLE001 - a kernel that this machine lacks must not end the run
            self.left_out.append(f"{section} {name}: {type(failure).__name__}: {str(failure)[:200]}")
            print(f"{name:34} failed: {type(failure).__name__}: {str(failure)[:150]}", flush=True)
            return None
        floor = flops / self.rate * 1e3
        row = {
            "section": section,
            "variant": name,
            "ms": round(ms, 4),
            "floor_ms": round(floor, 4),
            "over_floor": round(ms / floor, 2),
            "speedup": round(base / ms, 3) if base else None,
            "error": error,
            "seconds_spent": round(time.perf_counter() - began, 1),
        }
        self.rows.append(row)
        tail = (f", {base / ms:5.2f}x the softmax" if base else "") + (f", error {error:.1e}" if check else "")
        print(f"{name:34} {ms:8.3f} ms, floor {floor:7.3f}, {ms / floor:5.2f}x{tail}", flush=True)
        return ms


def softmax_section(report, q, k, v, repeats):
    """Kernels for the softmax part at R8: output checked, and the weight exp(lse - max) where there is one."""
    n = q.shape[1]
    k_s, v_s = k[:, ::8].contiguous(), v[:, ::8].contiguous()
    q_h, k_h, v_h = (x.transpose(1, 2) for x in (q, k_s, v_s))
    rows = slice(0, ROWS_CHECKED)
    want, want_weight = softmax.plain(q_h[:, :, rows].float(), k_h.float(), v_h.float(), "max")

    def check(result):
        out, weight = result
        error = relative(out[:, :, rows], want)
        return error if weight is None else max(error, relative(weight[:, :, rows], want_weight))

    flops = 4 * HEADS * n * k_s.shape[1] * HEAD_DIM
    print(f"\nsoftmax part at R8: {n} queries, {k_s.shape[1]} keys")

    def padded(x):
        return F.pad(x, (0, 0, 0, -x.shape[2] % 128))

    def flex_padded(options=None):
        kv, keys = padded(k_h).shape[2], k_h.shape[2]
        queries = padded(q_h).shape[2]
        mask = flex.create_block_mask(
            lambda b, h, i, j: j < keys, None, None, queries, kv, device=q.device.type, _compile=False
        )
        run = torch.compile(functools.partial(flex.flex_attention, block_mask=mask, kernel_options=options))
        args = padded(q_h), padded(k_h), padded(v_h)

        def call():
            out, aux = run(*args, return_aux=flex.AuxRequest(lse=True, max_scores=True))
            return out[:, :, :n], torch.exp(aux.lse - aux.max_scores)[:, :, :n]

        return call

    def flex_max(**options):
        return functools.partial(softmax.flex_backend, q_h, k_h, v_h, "max", options or None)

    variants = {
        "lse: cudnn": lambda: softmax.cudnn(q_h, k_h, v_h, "lse"),
        "lse: cudnn, keys padded (speed only)": functools.partial(softmax.cudnn, q_h, padded(k_h), padded(v_h), "lse"),
        "lse: flash": lambda: softmax.flash(q_h, k_h, v_h, "lse"),
        "lse: sdpa (PyTorch's choice)": lambda: softmax.sdpa(q_h, k_h, v_h, "lse"),
        "max: flex": flex_max(),
        "max: flex 128x64, 8 warps, 3 stages": flex_max(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3),
        "max: flex 128x128, 8 warps, 2 stages": flex_max(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=2),
        "max: flex 128x128, 8 warps, TMA": flex_max(BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=2, USE_TMA=True),
        "max: flex, padded and masked": lambda: None,
    }
    for name, call in variants.items():
        if "padded and masked" in name:
            try:
                call = flex_padded()
            except Exception as failure:  # noqa: BLE001
                report.left_out.append(f"softmax part {name}: {failure}")
                continue
        report.add("softmax part", name, flops, call, repeats=repeats, check=None if "speed only" in name else check)


def relative(out, want):
    """Relative error in the Frobenius norm."""
    want = want.double()
    return ((out.double() - want).norm() / want.norm()).item()


def reference(q, k, v, phi, spec, grid):
    """Eq. 5 by definition for the first rows, in float64 from the same 16-bit inputs; [1, rows, h, d]."""
    q, k, v = (x.transpose(1, 2).double() for x in (q[:, :ROWS_CHECKED], k, v))
    phi = {x: {name: p.double() for name, p in params.items()} for x, params in phi.items()}

    def features(x, params):  # [h, m, d] -> [h, m, f]
        y = F.gelu(torch.bmm(x, params["w0"]) + params["b0"][:, None], approximate="tanh")
        y = F.softplus(torch.bmm(y, params["w1"]) + params["b1"][:, None], threshold=100.0)
        half = y.shape[-1] // 2
        return torch.cat([y[..., :half], y[..., half:] ** 2], dim=-1)

    in_s = torch.zeros(k.shape[2], dtype=torch.bool, device=q.device)
    if spec.kind == "hybrid":
        in_s[:: spec.rate] = True
    phi_q, out = features(q[0], phi["q"]), []
    phi_k = torch.cat([features(part, phi["k"]) for part in k[0].split(4096, dim=1)], dim=1)
    state = phi_k[:, ~in_s].transpose(1, 2) @ v[0][:, ~in_s]
    total = phi_k[:, ~in_s].sum(dim=1)
    for head in range(q.shape[1]):
        numerator, denominator = phi_q[head] @ state[head], phi_q[head] @ total[head]
        if spec.kind == "hybrid":
            s = q[0, head] @ k[0, head, in_s].T * HEAD_DIM**-0.5
            c = s.amax(-1, keepdim=True) if spec.stabiliser == "max" else s.logsumexp(-1, keepdim=True)
            p = torch.exp(s - c)
            numerator, denominator = numerator + p @ v[0, head, in_s], denominator + p.sum(-1)
        out.append(numerator / denominator[:, None])
    return torch.stack(out, dim=1)[None]


def main():
    """Runs the three sections and writes `torch_block.csv` and `torch_block.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, choices=sorted(GRIDS), default=32760)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--budget", type=float, default=125.0, help="seconds after which no new variant starts")
    parser.add_argument("--sections", nargs="*", default=["softmax", "attention", "block"])
    parser.add_argument("--device", default="cuda", help="cpu only tries the script out (use --tokens 256)")
    args = parser.parse_args()
    n, grid, device, dtype = args.tokens, GRIDS[args.tokens], torch.device(args.device), torch.bfloat16
    torch._dynamo.config.recompile_limit = 64
    torch.set_grad_enabled(False)

    side = 8192 if device.type == "cuda" else 512
    square = torch.randn(side, side, device=device, dtype=dtype)
    rate = 2 * len(square) ** 3 / milliseconds(torch.matmul, square, square, repeats=9) * 1e3
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "matmul_tflops": round(rate / 1e12, 1),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    report = Report(args.budget, rate)
    q, k, v, phi = inputs(n, device, dtype)
    kernel = SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else SDPBackend.MATH

    specs = {label: [from_label(label)] for label in LABELS}
    specs |= {label: [from_label(label, stabiliser=s) for s in ("lse", "max")] for label in LABELS if label[0] == "R"}

    if "softmax" in args.sections:
        softmax_section(report, q, k, v, args.repeats)

    if "attention" in args.sections:
        print("\nattention: q, k, v after RoPE to output")
        with sdpa_kernel(kernel):
            base = report.add("attention", "softmax (cuDNN)", attention_flops("softmax", n), cudnn_softmax, q, k, v)
        for label in LABELS:
            for spec in specs[label]:
                want = reference(q, k, v, phi, spec, grid)
                call = functools.partial(attention, q, k, v, phi, spec=spec, grid=grid)
                name = label if label == "linear" else f"{label} {spec.stabiliser}"
                check = lambda out, want=want: relative(out[:, :ROWS_CHECKED], want)  # noqa: E731
                flops = attention_flops(label, n)
                report.add("attention", name, flops, call, repeats=args.repeats, check=check, base=base)

    if "block" in args.sections:
        print("\nblock")
        text = torch.randn(1, TEXT, DIM, device=device, dtype=dtype)
        time6 = torch.randn(1, 6, DIM, device=device) * 0.1
        angle = torch.rand(1, n, 1, HEAD_DIM // 2, device=device) * 6.28
        x = torch.randn(1, n, DIM, device=device, dtype=dtype)
        call_args = (x, text, time6, angle.cos(), angle.sin())
        torch.manual_seed(1)
        block = Block(cudnn_softmax).to(device, dtype)

        def run(attend, compiled):
            # The compiled block is a module of its own: compiled code is kept per code object, and specialises on
            # the attention that it was compiled with.
            block.attend = attend
            if not compiled:
                return lambda *a: block(*a)
            other = Block(attend).to(device, dtype)
            other.load_state_dict(block.state_dict())
            return torch.compile(other, dynamic=False)

        base = {}
        for mode in ("eager", "compiled"):
            with sdpa_kernel(kernel):
                call = run(cudnn_softmax, mode == "compiled")
                name = f"softmax (cuDNN), {mode}"
                base[mode] = report.add("block", name, block_flops("softmax", n), call, *call_args)
        first = [("R8", "compiled")] + [(label, "eager") for label in LABELS]  # in case time runs out
        for label, mode in first + [(label, "compiled") for label in LABELS[1:]]:
            for spec in specs[label]:
                attend = functools.partial(attention, phi=phi, spec=spec, grid=grid)
                name = f"{label if label == 'linear' else f'{label} {spec.stabiliser}'}, {mode}"
                call = run(attend, mode == "compiled")
                kwargs = {"repeats": args.repeats, "base": base[mode]}
                report.add("block", name, block_flops(label, n), call, *call_args, **kwargs)

    if report.left_out:
        print("\nleft out:", *report.left_out, sep="\n  ")
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "tokens": n, "dtype": "bfloat16", "rows": report.rows, "left_out": report.left_out}
    (args.out / "torch_block.json").write_text(json.dumps(result, indent=1) + "\n")
    if report.rows:
        with open(args.out / "torch_block.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, report.rows[0])
            writer.writeheader()
            writer.writerows(report.rows)
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()

"""A model with the names, call conventions and padding of the original code's `WanModel`, written for these tests.

Only what `patch_wan` relies on has to agree: attribute names, the arguments of `self_attn`, the table of rotations.
"""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class SelfAttention(nn.Module):
    """Softmax attention over each video's own tokens, complex rotations in float64 as in the original."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim, self.window_size = num_heads, dim // num_heads, (-1, -1)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def qkv(self, x, context):
        heads = (-1, (self.num_heads, self.head_dim))
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(context))
        return q.unflatten(*heads), k.unflatten(*heads), self.v(context).unflatten(*heads)

    def forward(self, x, seq_lens, grid_sizes, freqs):
        q, k, v = self.qkv(x, x)
        out = torch.zeros_like(v)
        for i, (grid, m) in enumerate(zip(grid_sizes.tolist(), seq_lens.tolist())):
            index = torch.unravel_index(torch.arange(m), tuple(grid))
            space = freqs.shape[1] // 3
            parts = freqs.split([freqs.shape[1] - 2 * space, space, space], dim=1)
            turn = torch.cat([part[j] for part, j in zip(parts, index)], dim=1)[:, None]

            def rotated(y, turn=turn, m=m, i=i):
                z = torch.view_as_complex(y[i, :m].double().unflatten(-1, (-1, 2)).contiguous())
                return torch.view_as_real(z * turn).flatten(-2).float()

            heads_first = (y.transpose(0, 1) for y in (rotated(q), rotated(k), v[i, :m]))
            out[i, :m] = F.scaled_dot_product_attention(*heads_first).transpose(0, 1)
        return self.o(out.flatten(2))


class CrossAttention(SelfAttention):
    def forward(self, x, context):
        y = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in self.qkv(x, context)))
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, ffn_dim, num_heads):
        super().__init__()
        self.self_attn, self.cross_attn = SelfAttention(dim, num_heads), CrossAttention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context):
        e = (self.modulation + e).chunk(6, dim=1)
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + e[1]) + e[0]
        x = x + self.self_attn(y, seq_lens, grid_sizes, freqs) * e[2]
        x = x + self.cross_attn(self.norm3(x), context)
        return x + self.ffn(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + e[4]) + e[3]) * e[5]


class Head(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.head, self.modulation = nn.Linear(dim, out), nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x, e):
        shift, scale = (self.modulation + e[:, None]).chunk(2, dim=1)
        return self.head(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class WanStandIn(nn.Module):
    """Takes a `WanConfig`; `forward` takes and returns a list of latents [c, t, y, x], padded to `seq_len` tokens."""

    def __init__(self, config):
        super().__init__()
        self.config, dim, patch = config, config.dim, config.patch
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, patch, patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, config.ffn_dim, config.num_heads) for _ in range(config.num_layers))
        self.head = Head(dim, patch[0] * patch[1] * patch[2] * config.in_channels)
        half = config.head_dim // 2
        sizes = (half - 2 * (half // 3), half // 3, half // 3)
        angles = [torch.outer(torch.arange(64.0).double(), 1e4 ** -(torch.arange(s) / s).double()) for s in sizes]
        self.freqs = torch.polar(torch.ones(64, half).double(), torch.cat(angles, dim=1))

    def forward(self, x, t, context, seq_len):
        x = [self.patch_embedding(u[None]) for u in x]
        grid_sizes = torch.tensor([u.shape[2:] for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.shape[1] for u in x])
        x = torch.cat([F.pad(u, (0, 0, 0, seq_len - u.shape[1])) for u in x])
        half = self.config.freq_dim // 2
        angle = torch.outer(t.double(), 1e4 ** -(torch.arange(half) / half).double())
        e = self.time_embedding(torch.cat([angle.cos(), angle.sin()], dim=1).float())
        e0 = self.time_projection(e).unflatten(1, (6, -1))
        context = self.text_embedding(torch.stack(context))
        for block in self.blocks:
            x = block(x, e0, seq_lens, grid_sizes, self.freqs, context)
        x, c, (p, q, r) = self.head(x, e), self.config.in_channels, self.config.patch
        out = []
        for u, (f, h, w) in zip(x, grid_sizes.tolist()):
            u = u[: f * h * w].view(f, h, w, p, q, r, c).permute(6, 0, 3, 1, 4, 2, 5)
            out.append(u.reshape(c, f * p, h * q, w * r))
        return out

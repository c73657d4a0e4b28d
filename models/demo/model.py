"""The demo model: a small Llama-style decoder, in plain PyTorch.

The layout is the one llama.cpp calls `llama`: RMSNorm before each block,
interleaved-pair rotary positions, grouped-query attention, SwiGLU, and the
input embedding tied to the output head.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    vocab: int = 4096
    dim: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 768
    context: int = 1024
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self):
        return self.dim // self.heads

    def to_dict(self):
        return asdict(self)


def rotary_table(cfg, length):
    """Two (length, head_dim / 2) tables: the cosines and the sines."""
    half = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float64), cfg.rope_base**-half)
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """Turn neighbouring pairs (0, 1), (2, 3) ... of x: (batch, time, head, head_dim)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return turned.flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cfg.dim))
        self.eps = cfg.norm_eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        kv = cfg.kv_heads * cfg.head_dim
        self.attn_norm = RMSNorm(cfg)
        self.attn_q = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.attn_k = nn.Linear(cfg.dim, kv, bias=False)
        self.attn_v = nn.Linear(cfg.dim, kv, bias=False)
        self.attn_output = nn.Linear(cfg.dim, cfg.dim, bias=False)
        self.ffn_norm = RMSNorm(cfg)
        self.ffn_gate = nn.Linear(cfg.dim, cfg.hidden, bias=False)
        self.ffn_up = nn.Linear(cfg.dim, cfg.hidden, bias=False)
        self.ffn_down = nn.Linear(cfg.hidden, cfg.dim, bias=False)

    def forward(self, x, cos, sin):
        cfg, (batch, time, _) = self.cfg, x.shape
        h = self.attn_norm(x)
        q = rotate(self.attn_q(h).view(batch, time, cfg.heads, cfg.head_dim), cos, sin)
        k = rotate(self.attn_k(h).view(batch, time, cfg.kv_heads, cfg.head_dim), cos, sin)
        v = self.attn_v(h).view(batch, time, cfg.kv_heads, cfg.head_dim)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.attn_output(y.transpose(1, 2).reshape(batch, time, cfg.dim))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


def attend(q, k, v, rows=128):
    """Causal attention, `rows` queries at a time, over the keys up to them only.

    Written out because torch.compile turns it into code twice as fast on a CPU
    as the built-in attention. q: (batch, heads, time, head_dim); the query
    heads that share a key head are stacked into one matrix.
    """
    batch, heads, time, width = q.shape
    kv = k.shape[1]
    share, count = heads // kv, batch * kv
    q = (q * width**-0.5).view(batch, kv, share, time, width)
    k, v = k.reshape(count, time, width), v.reshape(count, time, width)
    out = []
    for start in range(0, time, rows):
        end = min(start + rows, time)
        size = end - start
        part = q[:, :, :, start:end].reshape(count, share * size, width)
        scores = torch.bmm(part, k[:, :end].mT).view(count, share, size, end).float()
        future = torch.arange(end)[None, :] > torch.arange(start, end)[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1).type_as(v)
        part = torch.bmm(weights.view(count, share * size, end), v[:, :end])
        out.append(part.view(batch, kv, share, size, width))
    return torch.cat(out, 3).reshape(batch, heads, time, width)


class Model(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.token_embd = nn.Embedding(cfg.vocab, cfg.dim)
        self.blk = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.output_norm = RMSNorm(cfg)
        cos, sin = rotary_table(cfg, cfg.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 if "token_embd" in name else p.shape[1] ** -0.5 / 2)
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                nn.init.zeros_(p)

    def forward(self, tokens, targets=None):
        """Logits; with targets (−100 = not scored) the loss of every position."""
        time = tokens.shape[1]
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, self.cos[:time], self.sin[:time])
        logits = F.linear(self.output_norm(x), self.token_embd.weight)
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none"
        ).view_as(targets)

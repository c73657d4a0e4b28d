"""The demo models: small decoders, in plain PyTorch.

The dense one has the layout that llama.cpp calls `llama`: RMSNorm before each
block, interleaved-pair rotary positions, grouped-query attention, SwiGLU, and
the input embedding tied to the output head. With `experts` it is the one called
`qwen3moe`: queries and keys are normalised, the rotary pairs are halves apart,
and each token takes the best two of the experts of a layer.
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
    experts: int = 0
    experts_used: int = 2
    balance: float = 0.03

    @property
    def head_dim(self):
        return self.dim // self.heads

    @property
    def arch(self):
        return "qwen3moe" if self.experts else "llama"

    def to_dict(self):
        return asdict(self)


SHAPES = {"dense": Config(), "moe": Config(layers=5, hidden=256, experts=8)}


def rotary_table(cfg, length):
    """Two (length, head_dim / 2) tables: the cosines and the sines."""
    half = torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim
    angle = torch.outer(torch.arange(length, dtype=torch.float64), cfg.rope_base**-half)
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin, halves=False):
    """Turn pairs of x: (batch, time, head, head_dim): neighbours, or halves apart."""
    cos, sin = cos[:, None], sin[:, None]
    if halves:
        low, high = x.float().chunk(2, -1)
        return torch.cat((low * cos - high * sin, low * sin + high * cos), -1).type_as(x)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return turned.flatten(-2).type_as(x)


class RMSNorm(nn.Module):
    def __init__(self, cfg, width=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width or cfg.dim))
        self.eps = cfg.norm_eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Stack(nn.Module):
    """One matrix for each expert."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, x):
        return torch.bmm(x, self.weight.mT)


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
        if cfg.experts:
            self.attn_q_norm = RMSNorm(cfg, cfg.head_dim)
            self.attn_k_norm = RMSNorm(cfg, cfg.head_dim)
            self.ffn_gate_inp = nn.Linear(cfg.dim, cfg.experts, bias=False)
            self.ffn_gate_exps = Stack(cfg.experts, cfg.hidden, cfg.dim)
            self.ffn_up_exps = Stack(cfg.experts, cfg.hidden, cfg.dim)
            self.ffn_down_exps = Stack(cfg.experts, cfg.dim, cfg.hidden)
            return
        self.ffn_gate = nn.Linear(cfg.dim, cfg.hidden, bias=False)
        self.ffn_up = nn.Linear(cfg.dim, cfg.hidden, bias=False)
        self.ffn_down = nn.Linear(cfg.hidden, cfg.dim, bias=False)

    def forward(self, x, cos, sin):
        """The rows after this block, and how unevenly its experts were used (1 = evenly)."""
        cfg, (batch, time, _) = self.cfg, x.shape
        h = self.attn_norm(x)
        q = self.attn_q(h).view(batch, time, cfg.heads, cfg.head_dim)
        k = self.attn_k(h).view(batch, time, cfg.kv_heads, cfg.head_dim)
        v = self.attn_v(h).view(batch, time, cfg.kv_heads, cfg.head_dim)
        if cfg.experts:
            q, k = self.attn_q_norm(q).type_as(v), self.attn_k_norm(k).type_as(v)
        q, k = (rotate(part, cos, sin, halves=cfg.experts > 0) for part in (q, k))
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.attn_output(y.transpose(1, 2).reshape(batch, time, cfg.dim))
        h = self.ffn_norm(x)
        if cfg.experts:
            y, uneven = self.ask_experts(h.flatten(0, 1))
            return x + y.view_as(x), uneven
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h)), 1.0

    def ask_experts(self, h):
        """The weighted sum of each row's best experts; h: (rows, dim).

        In training an expert takes a quarter more rows than its fair share and no
        more, so that every shape is known when the model is compiled; the rows
        left over pass it by. Otherwise each takes all that come.
        """
        cfg, rows = self.cfg, h.shape[0]
        with torch.autocast("cpu", enabled=False):
            chance = self.ffn_gate_inp(h.float()).softmax(-1)
        weight, chosen = chance.topk(cfg.experts_used, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True)
        # First choices come first, so second ones are what is left over.
        taken = F.one_hot(chosen.mT.flatten(), cfg.experts)
        place = ((taken.cumsum(0) - 1) * taken).sum(-1)
        fair = -(-rows * cfg.experts_used * 5 // (4 * cfg.experts))
        room = fair if self.training else int(taken.sum(0).max())
        nowhere = cfg.experts * room
        slot = torch.where(place < room, chosen.mT.flatten() * room + place, nowhere)
        source = torch.full((nowhere + 1,), rows, dtype=torch.long, device=h.device)
        source = source.scatter(0, slot, torch.arange(rows).repeat(cfg.experts_used))[:nowhere]
        x = F.pad(h, (0, 0, 0, 1))[source].view(cfg.experts, room, cfg.dim)
        y = self.ffn_down_exps(F.silu(self.ffn_gate_exps(x)) * self.ffn_up_exps(x))
        y = F.pad(y.flatten(0, 1), (0, 0, 0, 1))[slot].view(cfg.experts_used, rows, cfg.dim)
        uneven = cfg.experts * (taken.float().mean(0) * chance.mean(0)).sum()
        return (y * weight.mT[:, :, None]).sum(0), uneven


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
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02 if "token_embd" in name else p.shape[-1] ** -0.5 / 2)
            if name.endswith(("attn_output.weight", "ffn_down.weight", "ffn_down_exps.weight")):
                nn.init.zeros_(p)

    def forward(self, tokens, targets=None):
        """Logits; with targets (−100 = not scored) the loss of every position.

        In training the loss has the price of unevenly used experts in it.
        """
        time, price = tokens.shape[1], 0.0
        x = self.token_embd(tokens)
        for block in self.blk:
            x, uneven = block(x, self.cos[:time], self.sin[:time])
            price = price + self.cfg.balance * (uneven - 1)
        logits = F.linear(self.output_norm(x), self.token_embd.weight)
        if targets is None:
            return logits
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none"
        ).view_as(targets)
        return loss + price if self.training else loss

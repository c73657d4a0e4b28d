"""Train a demo model on one CPU thread, for a fixed CPU time.

    python train.py --corpus CORPUS --out RUN --minutes 100
    python train.py --corpus CORPUS --out RUN --model moe

Learning rate: warm up, hold, then fall linearly to zero over the last
`--decay-minutes`. Minutes are CPU minutes of this process, so the run trains as
much on a busy machine, and it may be paused (kill -STOP, kill -CONT) or stopped:
it resumes from RUN. Windows grow from a quarter of the context to all of it,
because short ones are cheaper and teach the same words.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch

import text
from model import SHAPES, Model


def newton_schulz(g):
    """The nearest semi-orthogonal matrix, about, of each of g, which are no taller than wide."""
    x = g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(5):
        a = x @ x.mT
        b = add(a, a, a, beta=-4.7750, alpha=2.0315)
        x = add(x, b, x, beta=3.4445)
    return x


class Muon:
    """Momentum whose step is orthogonalised, for the matrices."""

    def __init__(self, params, momentum=0.95, decay=0.05):
        self.params, self.momentum, self.decay = list(params), momentum, decay
        self.state = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, lr):
        for p, m in zip(self.params, self.state):
            rows, columns = p.shape[-2:]
            m.lerp_(p.grad, 1 - self.momentum)
            step = p.grad.lerp(m, self.momentum)
            step = newton_schulz(step.mT.contiguous()).mT if rows > columns else newton_schulz(step)
            p.mul_(1 - lr * self.decay).sub_(step, alpha=lr * max(1, rows / columns) ** 0.5)


def parse():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--corpus", type=Path, required=True, help="folder with train.jsonl.xz and val.jsonl.xz")
    a.add_argument("--out", type=Path, required=True, help="folder for tokenizer and checkpoints")
    a.add_argument("--model", choices=SHAPES, default="dense")
    a.add_argument("--minutes", type=float, default=95)
    a.add_argument("--decay-minutes", type=float, default=78)
    a.add_argument("--warmup-steps", type=int, default=60)
    a.add_argument("--half-from", type=float, default=0.3, help="windows of half the context from this share on")
    a.add_argument("--long-from", type=float, default=0.75, help="windows of the full context")
    a.add_argument("--batch-tokens", type=int, default=4096)
    a.add_argument("--micro-tokens", type=int, default=2048)
    a.add_argument("--chat-share", type=float, default=0.15)
    a.add_argument("--muon-lr", type=float, default=0.02)
    a.add_argument("--adam-lr", type=float, default=2e-3)
    a.add_argument("--ema", type=float, default=0.995)
    a.add_argument("--save-minutes", type=float, default=4)
    a.add_argument("--seed", type=int, default=1)
    return a.parse_args()


def save(path, obj):
    torch.save(obj, f"{path}.new")
    os.replace(f"{path}.new", path)


@torch.no_grad()
def val_loss(model, run, length, count=16):
    """Mean loss on the first `count` windows of the validation text."""
    rows = run[: count * length].view(count, length)
    x, total = rows.clone(), 0.0
    x[:, 0] = text.BOS
    model.eval()
    for i in range(0, count, 4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total += model(x[i : i + 4, :-1], rows[i : i + 4, 1:]).sum().item()
    model.train()
    return total / count / (length - 1)


def main():
    args = parse()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    docs = text.read_docs(args.corpus, "train")
    if not (args.out / "tokenizer.json").exists():
        text.train_tokenizer(docs, SHAPES[args.model].vocab).save(str(args.out / "tokenizer.json"))
    tok = text.load_tokenizer(args.out / "tokenizer.json")
    windows = text.Windows(tok, docs, args.seed)
    val = torch.tensor(tok.encode("\n\n".join(text.read_docs(args.corpus, "val"))).ids)

    cfg = SHAPES[args.model]
    model = Model(cfg)
    by_adam = lambda name, p: p.ndim == 1 or "token_embd" in name or "ffn_gate_inp" in name
    matrices = [p for n, p in model.named_parameters() if not by_adam(n, p)]
    others = [p for n, p in model.named_parameters() if by_adam(n, p)]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    ema = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = tokens = 0
    clock = 0.0
    checkpoint = args.out / "last.pt"
    if checkpoint.exists():
        c = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(c["model"])
        adam.load_state_dict(c["adam"])
        muon.state, ema = c["muon"], c["ema"]
        step, tokens, clock = c["step"], c["tokens"], c["clock"]
        windows.rng.bit_generator.state = c["rng"]
        windows.left, windows.epochs = c["left"], c["epochs"]

    loss_of = torch.compile(model, dynamic=False)
    before = clock - time.process_time()
    end, saved, log, recent = args.minutes * 60, time.time(), open(args.out / "log.jsonl", "a"), []

    def keep(final=False):
        save(checkpoint, dict(
            model=model.state_dict(), ema=ema, adam=adam.state_dict(), muon=muon.state, step=step,
            tokens=tokens, clock=clock, rng=windows.rng.bit_generator.state,
            left=windows.left, epochs=windows.epochs, config=cfg.to_dict()))
        row = dict(step=step, tokens=tokens, minutes=round(clock / 60, 2), epochs=windows.epochs,
                   train=round(sum(recent) / max(1, len(recent)), 4),
                   val=round(val_loss(model, val, cfg.context), 4), length=length, lr=round(level, 4))
        if final:
            row["final"] = True
        print(json.dumps(row), file=log, flush=True)
        print(json.dumps(row), flush=True)
        recent.clear()

    while True:
        clock = time.process_time() + before
        if clock >= end:
            break
        long = clock >= args.long_from * end
        length = cfg.context // (1 if long else 2 if clock >= args.half_from * end else 4)
        windows.share = args.chat_share if long else args.chat_share / 3
        level = min(1.0, (step + 1) / args.warmup_steps, (end - clock) / (args.decay_minutes * 60))
        x, y = map(torch.from_numpy, windows.batch(args.batch_tokens // length, length))
        rows = max(1, args.micro_tokens // length)
        for i in range(0, len(x), rows):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(x[i : i + rows], y[i : i + rows]).mean()
            (loss * rows / len(x)).backward()
            recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise SystemExit("the loss is no longer a number")
        muon.step(args.muon_lr * level)
        for group in adam.param_groups:
            group["lr"] = args.adam_lr * level
        adam.step()
        model.zero_grad()
        step, tokens = step + 1, tokens + x.numel()
        weight = 1 - min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, p in model.named_parameters():
                ema[name].lerp_(p, weight)
        if step % 10 == 0:
            print(f"{step} {tokens} {clock / 60:.1f} min loss {sum(recent[-20:]) / len(recent[-20:]):.3f}", flush=True)
        if time.time() - saved > args.save_minutes * 60:
            keep()
            saved = time.time()
    keep(final=True)


if __name__ == "__main__":
    main()

"""Measure and sample the exported model, from the GGUF alone.

    python evaluate.py --model demo.gguf --corpus CORPUS
    python evaluate.py --model demo.gguf --say "Tell me a story about a fox."

Perplexity is counted as llama.cpp counts it: the documents of the split joined
by blank lines and cut into windows of `--context` tokens, the first token of
each replaced by <|bos|>, the second half of each scored. Bits per byte are of
the same scored tokens. Of a mixture it also says which share of the rows went
to each expert of each layer.
"""

import argparse
import math
from pathlib import Path

import gguf
import torch

import text
from model import Config, Model


def load(path):
    """The model of a GGUF file, its weights back in F32, and its tokenizer."""
    reader = gguf.GGUFReader(path)
    arch = reader.get_field("general.architecture").contents()
    has = lambda key: reader.get_field(f"{arch}.{key}") is not None
    get = lambda key: reader.get_field(f"{arch}.{key}").contents()
    cfg = Config(
        vocab=get("vocab_size"), dim=get("embedding_length"), layers=get("block_count"),
        heads=get("attention.head_count"), kv_heads=get("attention.head_count_kv"),
        hidden=get("feed_forward_length"), context=get("context_length"),
        rope_base=get("rope.freq_base"), norm_eps=get("attention.layer_norm_rms_epsilon"),
        experts=get("expert_count") if has("expert_count") else 0)
    model = Model(cfg).eval()
    model.load_state_dict({
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors})
    part = lambda key: reader.get_field(f"tokenizer.ggml.{key}").contents()
    return model, text.tokenizer_of_gguf(part("tokens"), part("merges"))


@torch.no_grad()
def token_losses(model, ids, context, every=1, batch=4):
    """Nats for tokens 1.. of every whole window, or every n-th: (windows, context - 1)."""
    rows = ids[: len(ids) // context * context].view(-1, context)[::every]
    x = rows.clone()
    x[:, 0] = text.BOS
    return torch.cat([model(a[:, :-1], b[:, 1:]) for a, b in zip(x.split(batch), rows.split(batch))]), rows


def count_picks(model):
    """Counts from now on how often each expert is picked: (layers, experts)."""
    cfg = model.cfg
    picks = torch.zeros(cfg.layers, cfg.experts, dtype=torch.long)

    def note(layer):
        def hook(_, __, scores):
            best = scores.topk(cfg.experts_used, dim=-1).indices
            picks[layer] += best.flatten().bincount(minlength=cfg.experts)
        return hook

    for layer, block in enumerate(model.blk):
        block.ffn_gate_inp.register_forward_hook(note(layer))
    return picks


def report(name, losses, targets, sizes):
    nats, size = losses.sum().item(), sizes[targets].sum().item()
    mean = nats / losses.numel()
    error = (losses.mean(1) - mean).std().item() / len(losses) ** 0.5
    print(f"{name}: perplexity {math.exp(mean):.2f} +- {math.exp(mean) * error:.2f}, "
          f"{nats / math.log(2) / size:.4f} bits per byte "
          f"({losses.numel():,} tokens, {size:,} bytes)", flush=True)


@torch.no_grad()
def generate(model, ids, count, temperature, top_p, generator):
    for _ in range(count):
        logits = model(torch.tensor([ids[-model.cfg.context:]]))[0, -1]
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            p, order = (logits / temperature).softmax(-1).sort(descending=True)
            p[p.cumsum(0) - p > top_p] = 0
            ids.append(int(order[torch.multinomial(p, 1, generator=generator)]))
        if ids[-1] == text.END:
            break
        yield ids[-1]


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--model", type=Path, required=True)
    a.add_argument("--corpus", type=Path)
    a.add_argument("--split", default="test")
    a.add_argument("--context", type=int, default=1024)
    a.add_argument("--every", type=int, default=1, help="take only every N-th window, where time is short")
    a.add_argument("--say", nargs="*", default=[], help="a chat message to answer")
    a.add_argument("--continue", dest="go_on", nargs="*", default=[], help="plain text to continue")
    a.add_argument("--tokens", type=int, default=200)
    a.add_argument("--temperature", type=float, default=0.7)
    a.add_argument("--top-p", type=float, default=0.95)
    a.add_argument("--seed", type=int, default=1)
    args = a.parse_args()

    torch.set_num_threads(1)
    model, tok = load(args.model)
    if args.corpus:
        ids = torch.tensor(tok.encode("\n\n".join(text.read_docs(args.corpus, args.split))).ids)
        picks = count_picks(model) if model.cfg.experts else None
        losses, rows = token_losses(model, ids, args.context, args.every)
        sizes, half = torch.tensor(text.token_bytes(tok)), args.context // 2
        report(f"{args.split}, context {args.context}, second halves", losses[:, half:], rows[:, half + 1:], sizes)
        report(f"{args.split}, context {args.context}, all tokens", losses, rows[:, 1:], sizes)
        for layer, of_layer in enumerate([] if picks is None else picks):
            shares = " ".join(f"{100 * n / of_layer.sum():5.1f}" for n in of_layer.tolist())
            print(f"layer {layer}, % of picks: {shares}")
    prompts = [(s, [text.BOS, text.USER, *tok.encode(s).ids, text.END, text.ASSISTANT]) for s in args.say]
    prompts += [(s, [text.BOS, *tok.encode(s).ids]) for s in args.go_on]
    for shown, ids in prompts:
        said = generate(model, ids, args.tokens, args.temperature, args.top_p,
                        torch.Generator().manual_seed(args.seed))
        print(f"\n> {shown}\n{tok.decode(list(said))}", flush=True)


if __name__ == "__main__":
    main()

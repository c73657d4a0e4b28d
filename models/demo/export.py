"""Write a checkpoint as GGUF: matrices Q8_0, norms F32.

    python export.py --checkpoint RUN/last.pt --tokenizer RUN/tokenizer.json --out demo.gguf

A mixture's router stays F32: eight numbers a row decide which experts are asked.
"""

import argparse
import json
from pathlib import Path

import gguf
import torch

from model import Config
from text import BOS, CHAT_TEMPLATE, CONTROL, END, PAD


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--checkpoint", type=Path, required=True)
    a.add_argument("--tokenizer", type=Path, required=True)
    a.add_argument("--out", type=Path, required=True)
    a.add_argument("--weights", choices=["model", "ema"], default="model",
                   help="the last weights, or their running average")
    args = a.parse_args()

    saved = torch.load(args.checkpoint, weights_only=False, map_location="cpu")
    cfg = Config(**saved["config"])
    size = f"{cfg.experts}x1M" if cfg.experts else "7M"
    w = gguf.GGUFWriter(f"{args.out}.new", cfg.arch)
    w.add_name(f"Shoal demo {size}")
    w.add_description("A small language model trained on public-domain children's books.")
    w.add_license("Apache-2.0 OR MIT")
    w.add_languages(["en"])
    w.add_tags(["text-generation", "demo"])
    w.add_size_label(size)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_context_length(cfg.context)
    w.add_embedding_length(cfg.dim)
    w.add_block_count(cfg.layers)
    w.add_feed_forward_length(cfg.hidden)
    w.add_head_count(cfg.heads)
    w.add_head_count_kv(cfg.kv_heads)
    w.add_rope_dimension_count(cfg.head_dim)
    w.add_rope_freq_base(cfg.rope_base)
    w.add_layer_norm_rms_eps(cfg.norm_eps)
    w.add_vocab_size(cfg.vocab)
    if cfg.experts:
        w.add_key_length(cfg.head_dim)
        w.add_value_length(cfg.head_dim)
        w.add_expert_count(cfg.experts)
        w.add_expert_used_count(cfg.experts_used)
        w.add_expert_feed_forward_length(cfg.hidden)

    bpe = json.loads(args.tokenizer.read_text(encoding="utf-8"))["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    kinds = [gguf.TokenType.CONTROL if t in CONTROL else gguf.TokenType.NORMAL for t in tokens]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    w.add_token_merges(merges)
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(END)
    w.add_eot_token_id(END)
    w.add_pad_token_id(PAD)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(CHAT_TEMPLATE)

    for name, tensor in saved[args.weights].items():
        data = tensor.float().numpy()
        if data.ndim > 1 and "ffn_gate_inp" not in name:
            q8 = gguf.GGMLQuantizationType.Q8_0
            w.add_tensor(name, gguf.quants.quantize(data, q8), raw_dtype=q8)
        else:
            w.add_tensor(name, data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    Path(f"{args.out}.new").rename(args.out)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, {saved['tokens']:,} tokens trained, "
          f"{saved['clock'] / 60:.0f} CPU minutes")


if __name__ == "__main__":
    main()

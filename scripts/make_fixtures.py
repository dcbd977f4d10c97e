#!/usr/bin/env python3
"""Writes the engine's parity fixtures: tiny random Llama checkpoints with what transformers makes of them.

    python scripts/make_fixtures.py            # crates/engine/tests/fixtures/<name>/

Each folder holds a checkpoint as a user would have it and expected.json: prompts as token ids, the
float32 logits at the last and at a middle position, and the greedy continuation. chat/ and
tokenizers/ hold templates and vocabularies (make_text_fixtures.py).
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from make_text_fixtures import byte_level_tokenizer, write_json, write_text_fixtures

LENGTHS = (1, 17, 70)
NEW_TOKENS = 64
LEAST_GAP = 1e-3

BASE = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=2, pad_token_id=0)

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# name -> (changes to BASE, storage, dialect of config.json, shards)
VARIANTS = {
    "llama-mha": (dict(num_key_value_heads=4), torch.float32, 5, 1),
    "llama-gqa": (dict(), torch.float32, 4, 1),
    "llama-mqa": (dict(num_key_value_heads=1), torch.float32, 5, 1),
    "llama-tied": (dict(tie_word_embeddings=True), torch.float32, 4, 1),
    "llama-head-dim": (dict(head_dim=16), torch.float32, 5, 1),
    "llama-bias": (dict(attention_bias=True, mlp_bias=True), torch.float32, 4, 1),
    "llama-rope-theta": (dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}), torch.float32, 5, 1),
    "llama-rope-linear": (dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}), torch.float32, 4, 1),
    "llama-rope-llama3": (dict(rope_parameters=LLAMA3_ROPE), torch.float32, 5, 1),
    "llama-rope-llama3-v4": (dict(rope_parameters=LLAMA3_ROPE), torch.float32, 4, 1),
    "llama-odd": (dict(vocab_size=301, hidden_size=48, intermediate_size=100, num_attention_heads=3, num_key_value_heads=1), torch.float32, 5, 1),
    "llama-sharded": (dict(), torch.float32, 5, 2),
    "llama-bf16": (dict(hidden_size=64, intermediate_size=128), torch.bfloat16, 4, 1),
    "llama-f16": (dict(hidden_size=64, intermediate_size=128), torch.float16, 5, 1),
}


def random_model(config, storage, seed):
    """Weights wide enough that one token is clearly ahead of the others, as `storage` keeps them."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            weight.data.normal_(std=0.3)
        elif "embed" in name:
            weight.data.normal_(std=0.5)
        else:
            weight.data.normal_(std=1.3 / weight.shape[1] ** 0.5)
        weight.data.copy_(weight.data.to(storage).float())
    return model.eval()


@torch.no_grad()
def continuation(model, prompt):
    """Greedy tokens without a stop, and the smallest lead of a chosen token over the next best.

    The whole sequence is computed anew for each token: no cache can hide a mistake.
    """
    ids, gap = list(prompt), float("inf")
    for _ in range(NEW_TOKENS):
        best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(prompt):], gap


def seven_digits(row):
    return [float(f"{x:.7g}") for x in row.tolist()]


@torch.no_grad()
def expectations(model, seed):
    generator = torch.Generator().manual_seed(seed)
    out, smallest = [], float("inf")
    for length in LENGTHS:
        prompt = torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist()
        logits = model(torch.tensor([prompt])).logits[0]
        tokens, gap = continuation(model, prompt)
        smallest = min(smallest, gap)
        middle = length // 2
        out.append({"prompt": prompt, "last_logits": seven_digits(logits[-1]), "middle_position": middle,
                    "middle_logits": seven_digits(logits[middle]), "greedy": tokens,
                    "different_tokens": len(set(tokens)), "smallest_gap": round(gap, 6)})
    return out, smallest


def old_dialect(config):
    """config.json as transformers 4 wrote it: rope_theta, rope_scaling and torch_dtype at the top."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    return dict(sorted(config.items()))


def write_weights(model, folder, storage, shards):
    model.to(storage).save_pretrained(folder, max_shard_size="5GB")
    if shards == 1:
        return
    with safe_open(folder / "model.safetensors", "pt") as stored:
        tensors = {k: stored.get_tensor(k) for k in stored.keys()}
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards: (i + 1) * len(names) // shards]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        where.update({n: file for n in part})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def write_variant(root, name, number):
    changes, storage, dialect, shards = VARIANTS[name]
    config = LlamaConfig(**{**BASE, **changes})
    config._attn_implementation = "eager"
    for seed in range(1000 * number, 1000 * number + 50):
        model = random_model(config, storage, seed)
        prompts, smallest = expectations(model, seed)
        if smallest >= LEAST_GAP and min(p["different_tokens"] for p in prompts) > 8:
            break
    else:
        raise SystemExit(f"{name}: no seed gives clear continuations")
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_weights(model, folder, storage, shards)
    if dialect == 4:
        write_json(folder / "config.json", old_dialect(json.loads((folder / "config.json").read_text())))
    byte_level_tokenizer(folder, config.vocab_size)
    expected = {"note": "computed in float32 from the stored weights", "seed": seed, "storage": str(storage).removeprefix("torch."),
                "smallest_gap": round(smallest, 6), "prompts": prompts}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")
    check(folder, expected)
    size = sum(f.stat().st_size for f in folder.iterdir()) // 1024
    print(f"{name}: {size} KiB, smallest gap {smallest:.4f}, different tokens {[p['different_tokens'] for p in prompts]}")


@torch.no_grad()
def check(folder, expected):
    """Reads the folder back as it was written and compares."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for prompt in expected["prompts"]:
        logits = model(torch.tensor([prompt["prompt"]])).logits[0, -1]
        assert torch.allclose(logits, torch.tensor(prompt["last_logits"]), atol=1e-4), folder


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("crates/engine/tests/fixtures"))
    p.add_argument("--only", nargs="*", help="names of the checkpoints to write anew; 'text' for chat and tokenizers")
    args = p.parse_args()
    torch.set_num_threads(1)
    for number, name in enumerate(VARIANTS):
        if not args.only or name in args.only:
            write_variant(args.out, name, number + 1)
    if not args.only or "text" in args.only:
        write_text_fixtures(args.out)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes random checkpoints of random classes and shapes, with what transformers makes of them.

    python scripts/fuzz_fixtures.py --count 50 --seed 1 --out /tmp/fuzz
    FLOTILLA_MORE_FIXTURES=/tmp/fuzz cargo test --workspace --test parity

The parity test takes them like those of the repository: what transformers saves, the engine must
load, and give the same logits and tokens.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import make_fixtures as fixtures

CLASSES = [fixtures.llama, fixtures.mistral, fixtures.qwen2, fixtures.qwen3, fixtures.phi3, fixtures.gemma2,
           fixtures.gemma3, fixtures.gemma3_with_vision, fixtures.mixtral, fixtures.qwen3_moe]


def rope(rng, phi3, pairs):
    theta = rng.choice([500.0, 10000.0, 1000000.0])
    longrope = fixtures.longrope(pairs) | {"rope_theta": theta}
    if phi3:
        return rng.choice([None, longrope])
    original = rng.choice([16, 32, 100])
    return rng.choice([
        None,
        longrope,
        {"rope_type": "default", "rope_theta": theta},
        {"rope_type": "linear", "rope_theta": theta, "factor": rng.choice([1.0, 2.5, 8.0])},
        {"rope_type": "dynamic", "rope_theta": theta, "factor": 2.0} | rng.choice([{}, {"original_max_position_embeddings": original}]),
        {"rope_type": "llama3", "rope_theta": theta, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": original},
        {"rope_type": "yarn", "rope_theta": theta, "factor": 3.0, "original_max_position_embeddings": original}
        | rng.choice([{}, {"attention_factor": 1.3}, {"mscale": 0.5, "mscale_all_dim": 0.9}, {"beta_fast": 8, "beta_slow": 2, "truncate": False}]),
    ])


def random_config(rng):
    make = rng.choice(CLASSES)
    phi3, gemma = make is fixtures.phi3, make.__name__.startswith("gemma")
    kv_heads = rng.choice([1, 1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3, 7])
    head_dim = rng.choice([2, 6, 8, 10, 24, 40, 64, 80, 130])
    num_layers = rng.choice([1, 2, 3, 5])
    changes = dict(
        vocab_size=rng.choice([257, 300, 331, 512]), num_attention_heads=heads, num_key_value_heads=kv_heads,
        hidden_size=heads * rng.choice([1, 3, 5, 16]), intermediate_size=rng.choice([7, 31, 64, 129]),
        num_hidden_layers=num_layers, rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-3]),
        tie_word_embeddings=rng.choice([True, False]), max_position_embeddings=rng.choice([134, 200, 4096]))
    changes["hidden_activation" if gemma else "hidden_act"] = rng.choice(
        ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "quick_gelu", "relu"])
    changes["pad_token_id"] = rng.choice([None, 0, changes["vocab_size"] - 1])
    changes["eos_token_id"] = rng.choice([2, [2, 5, 7]])
    layer_types = [rng.choice(["sliding_attention", "full_attention"]) for _ in range(num_layers)]
    if phi3:  # no head_dim of its own
        head_dim = rng.choice([8, 24, 32])
        changes["hidden_size"] = heads * head_dim
        partial = rng.choice([1.0, 0.75, 0.5])
        changes["rope_parameters"] = rope(rng, True, int(head_dim * partial) // 2) or {"rope_type": "default"}
        changes["rope_parameters"]["partial_rotary_factor"] = partial
        changes["original_max_position_embeddings"] = rng.choice([40, 64, changes["max_position_embeddings"]])
    else:
        changes["head_dim"] = head_dim
        scaled = rope(rng, False, head_dim // 2)
        if scaled and "gemma3" in make.__name__:
            changes["rope_parameters"] = {"full_attention": scaled, "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0}}
        elif scaled:
            changes["rope_parameters"] = scaled
    window = rng.choice([1, 3, 16, 17, 40, 4096])
    if make in (fixtures.mistral, fixtures.mixtral, fixtures.phi3):
        changes["sliding_window"] = rng.choice([None, window])
    elif make in (fixtures.qwen2, fixtures.qwen3):
        changes |= dict(use_sliding_window=rng.choice([True, False]), sliding_window=window, max_window_layers=rng.choice([0, 1]))
    elif gemma:
        changes |= dict(sliding_window=window, query_pre_attn_scalar=rng.choice([7, 24, 256]),
                        final_logit_softcapping=rng.choice([None, 12.0]))
    if make is fixtures.gemma2:
        changes["attn_logit_softcapping"] = rng.choice([None, 3.0, 50.0])
    if "gemma3" in make.__name__:
        changes["sliding_window_pattern"] = rng.choice([1, 2, 6])
    has_window = gemma or changes.get("use_sliding_window")
    if has_window and make not in (fixtures.phi3, fixtures.qwen3_moe) and rng.choice([True, False]):
        changes["layer_types"] = layer_types
    experts = rng.choice([1, 2, 5, 9])
    if make is fixtures.mixtral:
        changes |= dict(num_local_experts=experts, num_experts_per_tok=rng.randint(1, experts))
    if make is fixtures.qwen3_moe:
        changes |= dict(num_experts=experts, num_experts_per_tok=rng.randint(1, experts), norm_topk_prob=rng.choice([True, False]),
                        moe_intermediate_size=rng.choice([5, 16, 33]), decoder_sparse_step=rng.choice([1, 2]),
                        mlp_only_layers=rng.choice([[], [0]]))
    if make in (fixtures.llama, fixtures.qwen3, fixtures.qwen3_moe, fixtures.gemma2):
        changes["attention_bias"] = rng.choice([True, False])
    if make is fixtures.llama:
        changes["mlp_bias"] = rng.choice([True, False])
    return make.__name__, make(**changes), changes


def fused(tensors):
    """The matrices of all experts of a layer in one tensor, as transformers 5 keeps them."""
    out, experts = {}, {}
    for name, tensor in tensors.items():
        name = name.replace("block_sparse_moe", "mlp")
        layer, found, rest = name.partition(".experts.")
        if found:
            number, matrix, _ = rest.split(".")
            experts.setdefault(layer, {})[int(number), {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(matrix, matrix)] = tensor
        else:
            out[name] = tensor
    for layer, matrices in experts.items():
        numbers = sorted({number for number, _ in matrices})
        both = [torch.cat([matrices[n, "gate_proj"], matrices[n, "up_proj"]]) for n in numbers]
        out[f"{layer}.experts.gate_up_proj"] = torch.stack(both)
        out[f"{layer}.experts.down_proj"] = torch.stack([matrices[n, "down_proj"] for n in numbers])
    return out


def disturb(rng, folder, config):
    """What people's checkpoints have beside or in place of what transformers saves; it means the same."""
    path, settings = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if not path.is_file() or "text_config" in settings:
        return "nothing"
    with safe_open(path, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    kinds = ["buffers", "no dtype", "nothing"] + ["base model"] * config.tie_word_embeddings
    kinds += ["fused experts"] * 3 * any(".experts." in name for name in tensors)
    kind = rng.choice(kinds)
    if kind == "buffers":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.embed_positions.position_ids"] = torch.arange(5)
    elif kind == "no dtype":
        settings = {k: v for k, v in settings.items() if k not in ("dtype", "torch_dtype", "transformers_version", "model_type")}
    elif kind == "base model":
        settings["architectures"] = [settings["architectures"][0].replace("ForCausalLM", "Model")]
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    elif kind == "fused experts":
        tensors = fused(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    return kind


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--count", type=int, default=20)
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(1)
    for number in range(args.seed, args.seed + args.count):
        rng = random.Random(number)
        name, config, changes = random_config(rng)
        storage = rng.choice([fixtures.F32, fixtures.F16, fixtures.BF16])
        print(number, name, storage, changes, flush=True)
        try:
            # The older dialect knew no layer_types.
            dialect = 5 if "layer_types" in changes else rng.choice([4, 5])
            variant = (config, storage, dialect, rng.choice([1, 1, 3]))
            folder = args.out / f"{number}-{name}"
            fixtures.write_variant(folder, variant, 1000 * number, least_different=1)
            print("disturbed:", disturb(rng, folder, config))
        except (SystemExit, ZeroDivisionError) as reason:  # the latter: dynamic scaling of two dimensions
            print(f"left out: {reason}")


if __name__ == "__main__":
    main()

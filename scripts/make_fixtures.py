#!/usr/bin/env python3
"""Writes the engine's parity fixtures: tiny random checkpoints with what transformers makes of them.

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
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from make_text_fixtures import byte_level_tokenizer, write_json, write_text_fixtures

LENGTHS = (1, 17, 70)
NEW_TOKENS = 64
LEAST_GAP = 1e-3
FIRST_TOKEN = 3  # those before are special

BASE = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False,
            bos_token_id=1, eos_token_id=2, pad_token_id=0)

# Of the other architectures: small enough for many of them.
SMALL = BASE | dict(vocab_size=300, intermediate_size=48)

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def longrope(pairs):
    return {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 8 for i in range(pairs)],
            "long_factor": [1.5 + i for i in range(pairs)], "original_max_position_embeddings": 64}


def llama(**changes):
    return transformers.LlamaConfig(**{**BASE, **changes})


def mistral(**changes):
    return transformers.MistralConfig(**{**SMALL, **changes})


def qwen2(**changes):
    return transformers.Qwen2Config(**{**SMALL, **changes})


def qwen3(**changes):
    return transformers.Qwen3Config(**{**SMALL, "head_dim": 16, **changes})


def phi3(**changes):
    return transformers.Phi3Config(**{**SMALL, "original_max_position_embeddings": 64, **changes})


def gemma2(**changes):
    small = dict(head_dim=12, query_pre_attn_scalar=20, sliding_window=24, tie_word_embeddings=True, num_hidden_layers=3)
    return transformers.Gemma2Config(**{**SMALL, **small, **changes})


def gemma3(**changes):
    small = dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=20, sliding_window_pattern=3, num_hidden_layers=4,
                 tie_word_embeddings=True)
    return transformers.Gemma3TextConfig(**{**SMALL, **small, **changes})


def gemma3_with_vision(**changes):
    vision = transformers.SiglipVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                             num_attention_heads=1, image_size=8, patch_size=4)
    tie = changes.get("tie_word_embeddings", True)
    return transformers.Gemma3Config(text_config=gemma3(**changes).to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4,
                                     boi_token_index=3, eoi_token_index=4, image_token_index=5, tie_word_embeddings=tie)


def mixtral(**changes):
    return transformers.MixtralConfig(**{**SMALL, "intermediate_size": 24, "num_local_experts": 4, **changes})


def qwen3_moe(**changes):
    small = dict(head_dim=16, moe_intermediate_size=16, num_experts=6, num_experts_per_tok=2, num_hidden_layers=3)
    return transformers.Qwen3MoeConfig(**{**SMALL, **small, **changes})


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# name -> (config, storage, dialect of config.json, shards)
VARIANTS = {
    "llama-mha": (llama(num_key_value_heads=4), F32, 5, 1),
    "llama-gqa": (llama(), F32, 4, 1),
    "llama-mqa": (llama(num_key_value_heads=1), F32, 5, 1),
    "llama-tied": (llama(tie_word_embeddings=True), F32, 4, 1),
    "llama-head-dim": (llama(head_dim=16), F32, 5, 1),
    "llama-bias": (llama(attention_bias=True, mlp_bias=True), F32, 4, 1),
    "llama-rope-theta": (llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}), F32, 5, 1),
    "llama-rope-linear": (llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}), F32, 4, 1),
    "llama-rope-llama3": (llama(rope_parameters=LLAMA3_ROPE), F32, 5, 1),
    "llama-rope-llama3-v4": (llama(rope_parameters=LLAMA3_ROPE), F32, 4, 1),
    "llama-odd": (llama(vocab_size=301, hidden_size=48, intermediate_size=100, num_attention_heads=3, num_key_value_heads=1), F32, 5, 1),
    "llama-sharded": (llama(), F32, 5, 2),
    "llama-bf16": (llama(hidden_size=64, intermediate_size=128), BF16, 4, 1),
    "llama-f16": (llama(hidden_size=64, intermediate_size=128), F16, 5, 1),
    "llama-rope-yarn": (llama(rope_parameters=YARN_ROPE), BF16, 4, 1),
    "llama-rope-yarn-mscale": (llama(rope_parameters={**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 16.0,
                                                      "beta_slow": 2.0, "truncate": False}), BF16, 5, 1),
    "llama-rope-dynamic": (llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}), BF16, 4, 1),
    "llama-gelu": (llama(hidden_act="gelu", hidden_size=24, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=3), BF16, 5, 1),
    "mistral": (mistral(sliding_window=None), BF16, 5, 1),
    "mistral-window": (mistral(sliding_window=24, head_dim=12), BF16, 4, 1),
    "qwen2": (qwen2(), BF16, 5, 1),
    "qwen2-tied-yarn": (qwen2(tie_word_embeddings=True, rope_parameters=YARN_ROPE), F32, 4, 1),
    "qwen2-window": (qwen2(use_sliding_window=True, sliding_window=19, max_window_layers=1, num_hidden_layers=3), BF16, 4, 1),
    "qwen3": (qwen3(tie_word_embeddings=True), F32, 5, 1),
    "qwen3-window": (qwen3(attention_bias=True, use_sliding_window=True, sliding_window=33, max_window_layers=1), BF16, 5, 1),
    "phi3": (phi3(original_max_position_embeddings=256), BF16, 4, 1),
    "phi3-window": (phi3(sliding_window=31, num_key_value_heads=4), BF16, 5, 1),
    "phi3-longrope": (phi3(rope_parameters=longrope(4)), BF16, 5, 1),
    "phi3-longrope-partial": (phi3(hidden_size=64, num_attention_heads=4, tie_word_embeddings=True,
                                   rope_parameters={**longrope(6), "partial_rotary_factor": 0.75}), BF16, 4, 1),
    "gemma2": (gemma2(attn_logit_softcapping=4.0, final_logit_softcapping=20.0), BF16, 5, 1),
    "gemma2-v4": (gemma2(attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True, head_dim=256,
                         hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2), BF16, 4, 1),
    "gemma3": (gemma3(rope_parameters={"full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                                       "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}), BF16, 5, 1),
    "gemma3-v4": (gemma3(sliding_window_pattern=2, tie_word_embeddings=False, final_logit_softcapping=25.0,
                         num_hidden_layers=3), BF16, 4, 1),
    "gemma3-vision": (gemma3_with_vision(tie_word_embeddings=False), BF16, 5, 1),
    "gemma3-vision-v4": (gemma3_with_vision(), BF16, 4, 1),
    "mixtral": (mixtral(), BF16, 5, 2),
    "mixtral-window": (mixtral(sliding_window=21, num_local_experts=3, num_experts_per_tok=1), BF16, 4, 1),
    "qwen3-moe": (qwen3_moe(mlp_only_layers=[1]), BF16, 5, 1),
    "qwen3-moe-normalised": (qwen3_moe(norm_topk_prob=True, decoder_sparse_step=2, num_experts_per_tok=3, attention_bias=True,
                                       tie_word_embeddings=True), BF16, 4, 1),
}

def class_name(config):
    """The class of the model that a config belongs to."""
    if config.model_type == "gemma3":
        return "Gemma3ForConditionalGeneration"
    return type(config).__name__.replace("Config", "ForCausalLM").replace("Text", "")


def random_model(config, storage, seed):
    """Weights wide enough that one token is clearly ahead of the others, as `storage` keeps them."""
    torch.manual_seed(seed)
    model = getattr(transformers, class_name(config))(config).float()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
            if "gemma" in config.model_type:  # adds 1 itself
                weight.data.sub_(1.0)
                if "layers" not in name:  # else a token, tied and large, is followed by itself
                    weight.data.normal_(std=3.0)
        elif name.endswith("bias"):
            weight.data.normal_(std=0.3)
        elif "embed" in name:  # Gemma makes them larger itself
            weight.data.normal_(std=0.15 if "gemma" in config.model_type else 0.5)
        else:
            weight.data.normal_(std=1.3 / weight.shape[-1] ** 0.5)
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
        prompt = torch.randint(FIRST_TOKEN, model.config.get_text_config().vocab_size, (length,), generator=generator).tolist()
        logits = model(torch.tensor([prompt])).logits[0]
        tokens, gap = continuation(model, prompt)
        smallest = min(smallest, gap)
        middle = length // 2
        out.append({"prompt": prompt, "last_logits": seven_digits(logits[-1]), "middle_position": middle,
                    "middle_logits": seven_digits(logits[middle]), "greedy": tokens,
                    "different_tokens": len(set(tokens)), "smallest_gap": round(gap, 6)})
    return out, smallest


def old_dialect(config):
    """config.json as transformers 4 wrote it: rope_theta, rope_scaling and torch_dtype at the top, no layer_types,
    and of what is nested only that which differs from the defaults."""
    text = config.pop("text_config", config)
    rope = text.pop("rope_parameters")
    if "full_attention" in rope:
        text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        text["sliding_window_pattern"] = text.pop("_sliding_window_pattern")
    text["rope_theta"] = rope.pop("rope_theta")
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    if config["model_type"] == "phi3":
        text["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        text["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings", 256)
        rope = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    is_default = rope.get("rope_type", rope.get("type")) == "default"
    text["rope_scaling"] = None if is_default else rope
    text.pop("layer_types", None)
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    if text is not config:
        defaults = transformers.Gemma3TextConfig().to_dict()
        config["text_config"] = {k: v for k, v in text.items() if k not in defaults or defaults[k] != v}
    return dict(sorted(config.items()))


def inner_names(folder):
    """The names that the tensors of a language model with images have inside transformers, which some keep."""
    def inner(name):
        if name.startswith("language_model."):
            name = name.removeprefix("language_model.")
            return name.replace("model.", "model.language_model.", 1)
        return "model." + name

    with safe_open(folder / "model.safetensors", "pt") as stored:
        tensors = {inner(k): stored.get_tensor(k) for k in stored.keys()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_weights(model, folder, storage, dialect, shards):
    model.to(storage).save_pretrained(folder, max_shard_size="5GB")
    if dialect == 4 and model.config.model_type == "gemma3":
        inner_names(folder)
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


def write_variant(folder, variant, first_seed, least_different=9):
    """Writes a checkpoint whose continuations leave no doubt: a clear lead for each of several tokens."""
    config, storage, dialect, shards = variant
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    for seed in range(first_seed, first_seed + 50):
        model = random_model(config, storage, seed)
        prompts, smallest = expectations(model, seed)
        if smallest >= LEAST_GAP and min(p["different_tokens"] for p in prompts) >= least_different:
            break
    else:
        raise SystemExit(f"{folder}: no seed gives clear continuations")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_weights(model, folder, storage, dialect, shards)
    if dialect == 4:
        write_json(folder / "config.json", old_dialect(json.loads((folder / "config.json").read_text())))
    expected = {"note": "computed in float32 from the stored weights", "seed": seed, "storage": str(storage).removeprefix("torch."),
                "smallest_gap": round(smallest, 6), "prompts": prompts}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")
    check(folder, class_name(config), expected)
    size = sum(f.stat().st_size for f in folder.iterdir()) // 1024
    print(f"{folder.name}: {size} KiB, smallest gap {smallest:.4f}, different tokens {[p['different_tokens'] for p in prompts]}")


@torch.no_grad()
def check(folder, class_name, expected):
    """Reads the folder back as it was written and compares."""
    model = getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
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
            write_variant(args.out / name, VARIANTS[name], 1000 * (number + 1))
            byte_level_tokenizer(args.out / name, VARIANTS[name][0].get_text_config().vocab_size)
    if not args.only or "text" in args.only:
        write_text_fixtures(args.out)


if __name__ == "__main__":
    main()

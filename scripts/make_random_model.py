#!/usr/bin/env python3
"""Makes a checkpoint of a given shape with random weights, to measure speed and memory with.

    python3 scripts/make_random_model.py OUT --preset qwen05
    python3 scripts/make_random_model.py OUT --architecture qwen3 --hidden 1024 --layers 28 --heads 16 --kv-heads 8 \
        --head-dim 128 --intermediate 3072 --vocab 32000 --tied

OUT gets config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json. Needs nothing but
Python. The weights are normally distributed; all tensors are cut out of about a million numbers, each at another place, so
that gigabytes are written as fast as the disk takes them. Such a model says nothing of sense.
"""

import argparse
import itertools
import json
import random
import struct
from pathlib import Path

# A prime: rows, whatever their length, begin at ever other places of it.
POOL_NUMBERS = 1_048_583
STANDARD_DEVIATION = 0.02
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

PRESETS = {
    "qwen05": dict(architecture="qwen2", hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, window=32768,
                   rope_theta=1e6, norm_eps=1e-6, tied=True),
    "tinyllama": dict(architecture="llama", hidden=2048, layers=22, heads=32, kv_heads=4, intermediate=5632, window=2048,
                      rope_theta=1e4, norm_eps=1e-5, tied=False),
    "mistral7b": dict(architecture="mistral", hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, window=32768,
                      rope_theta=1e6, norm_eps=1e-5, tied=False),
}

# Name in safetensors, name in config.json, bytes of a number.
DTYPES = {"bf16": ("BF16", "bfloat16", 2), "fp16": ("F16", "float16", 2), "fp32": ("F32", "float32", 4)}


def encode(numbers, dtype):
    """Little-endian bytes of numbers."""
    if dtype == "fp32":
        return struct.pack(f"<{len(numbers)}f", *numbers)
    if dtype == "fp16":
        return struct.pack(f"<{len(numbers)}e", *numbers)
    bits = struct.unpack(f"<{len(numbers)}I", struct.pack(f"<{len(numbers)}f", *numbers))
    # To the nearest, and to the even one of two that are as near.
    return struct.pack(f"<{len(bits)}H", *((b + 0x7FFF + (b >> 16 & 1)) >> 16 for b in bits))


def tensors(shape):
    """(name, shape, "random" or "ones") of every tensor."""
    hidden, inner = shape.hidden, shape.intermediate
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", [shape.vocab, hidden], "random"
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        for name, width in ("q_proj", query), ("k_proj", kv), ("v_proj", kv):
            yield f"{at}.self_attn.{name}.weight", [width, hidden], "random"
            if shape.architecture == "qwen2":
                yield f"{at}.self_attn.{name}.bias", [width], "random"
        yield f"{at}.self_attn.o_proj.weight", [hidden, query], "random"
        if shape.architecture == "qwen3":
            yield f"{at}.self_attn.q_norm.weight", [shape.head_dim], "ones"
            yield f"{at}.self_attn.k_norm.weight", [shape.head_dim], "ones"
        yield f"{at}.mlp.gate_proj.weight", [inner, hidden], "random"
        yield f"{at}.mlp.up_proj.weight", [inner, hidden], "random"
        yield f"{at}.mlp.down_proj.weight", [hidden, inner], "random"
        yield f"{at}.input_layernorm.weight", [hidden], "ones"
        yield f"{at}.post_attention_layernorm.weight", [hidden], "ones"
    yield "model.norm.weight", [hidden], "ones"
    if not shape.tied:
        yield "lm_head.weight", [shape.vocab, hidden], "random"


def count(dimensions):
    numbers = 1
    for dimension in dimensions:
        numbers *= dimension
    return numbers


def write_weights(path, shape):
    """Writes the file; returns the number of its numbers."""
    name, _, size = DTYPES[shape.dtype]
    chance = random.Random(shape.seed)
    pool = encode([chance.gauss(0.0, STANDARD_DEVIATION) for _ in range(POOL_NUMBERS)], shape.dtype)
    pool, ones = memoryview(pool * 2), encode([1.0], shape.dtype)
    header, end = {}, 0
    for tensor, dimensions, _ in tensors(shape):
        start, end = end, end + count(dimensions) * size
        header[tensor] = {"dtype": name, "shape": dimensions, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, dimensions, kind in tensors(shape):
            left = count(dimensions)
            if kind == "ones":
                file.write(ones * left)
                continue
            start = chance.randrange(POOL_NUMBERS)
            while left:
                length = min(left, POOL_NUMBERS)
                file.write(pool[start * size:(start + length) * size])
                left -= length
    return end // size


def byte_letters():
    """The letter that stands for each byte in byte-level vocabularies: itself where it can be seen, else one from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = itertools.count(0x100)
    return [chr(byte) if byte in seen else chr(next(hidden)) for byte in range(256)]


def write_tokenizer(folder, vocab):
    """A tokenizer of exactly `vocab` tokens: bytes, then pairs of bytes, then triples."""
    letters = byte_letters()
    if vocab < len(SPECIAL_TOKENS) + len(letters):
        raise SystemExit(f"--vocab must be at least {len(SPECIAL_TOKENS) + len(letters)}, got {vocab}")
    pairs = itertools.product(letters, letters)
    triples = ((a + b, c) for a, b, c in itertools.product(letters, repeat=3))
    merges = list(itertools.islice(itertools.chain(pairs, triples), vocab - len(SPECIAL_TOKENS) - len(letters)))
    names = SPECIAL_TOKENS + letters + ["".join(merge) for merge in merges]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": index, "content": name, **flags} for index, name in enumerate(SPECIAL_TOKENS)],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {name: index for index, name in enumerate(names)}, "merges": [list(merge) for merge in merges]},
    }
    write_json(folder / "tokenizer.json", tokenizer)
    special = dict(zip(["unk_token", "bos_token", "eos_token"], SPECIAL_TOKENS))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def write_config(folder, shape):
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    write_json(folder / "config.json", {
        "architectures": [CLASSES[shape.architecture]], "model_type": shape.architecture, "hidden_act": "silu",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.window, "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta, "sliding_window": None, "tie_word_embeddings": shape.tied, "attention_bias": False,
        "torch_dtype": DTYPES[shape.dtype][1], **ends})
    write_json(folder / "generation_config.json", ends)


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder of the model; made if it isn't there")
    parser.add_argument("--preset", choices=PRESETS, help="a known shape, of which the other options change parts")
    parser.add_argument("--architecture", choices=CLASSES)
    for name in "hidden", "layers", "heads", "kv-heads", "intermediate":
        parser.add_argument(f"--{name}", type=int, metavar="N")
    parser.add_argument("--head-dim", type=int, metavar="N", help="default: hidden / heads")
    parser.add_argument("--vocab", type=int, metavar="N", default=32000)
    parser.add_argument("--window", type=int, metavar="N", help="default: 2048")
    parser.add_argument("--rope-theta", type=float, help="default: 10000")
    parser.add_argument("--norm-eps", type=float, help="default: 1e-5")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="the output layer is the embedding")
    parser.add_argument("--seed", type=int, default=0)
    shape = parser.parse_args()
    defaults = {"architecture": "llama", "window": 2048, "rope_theta": 1e4, "norm_eps": 1e-5, "tied": False}
    for name, value in {**defaults, **PRESETS.get(shape.preset, {})}.items():
        if getattr(shape, name) is None:
            setattr(shape, name, value)
    missing = [name for name in ("hidden", "layers", "heads", "intermediate") if getattr(shape, name) is None]
    if missing:
        parser.error("without --preset expected " + ", ".join(f"--{name}" for name in missing))
    shape.kv_heads = shape.kv_heads or shape.heads
    shape.head_dim = shape.head_dim or shape.hidden // shape.heads
    return shape


def main():
    shape = parse_args()
    shape.out.mkdir(parents=True, exist_ok=True)
    write_config(shape.out, shape)
    write_tokenizer(shape.out, shape.vocab)
    path = shape.out / "model.safetensors"
    numbers = write_weights(path, shape)
    print(f"{shape.out}: {numbers / 1e6:.1f} M parameters, {path.stat().st_size / 1e9:.2f} GB")


main()

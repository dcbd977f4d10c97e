#!/usr/bin/env python3
"""Writes the engine's GGUF fixtures: its tiny checkpoints and tokenizers again, as llama.cpp's converter writes them.

    python scripts/make_gguf_fixtures.py       # crates/engine/tests/fixtures/{<name>,quant/<name>-<type>,tokenizers/<name>}.gguf

Names, types and settings come from the gguf package. A checkpoint's expectations are those of its folder. The
tokenizer `pieces` is trained here by SentencePiece, which also says what its tokens are.
"""

import io
import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
from gguf import GGUFWriter, TokenType
from safetensors import safe_open

from make_text_fixtures import CORPUS, STRINGS, write_json

FIXTURES = Path(__file__).resolve().parent.parent / "crates/engine/tests/fixtures"

CHECKPOINTS = sys.argv[1:] or [
    "llama-gqa", "llama-bias", "llama-bf16", "llama-rope-llama3", "mistral-window", "mixtral", "qwen2", "qwen3", "qwen3-moe-normalised",
    "phi3", "phi3-longrope", "gemma2", "gemma3"]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "MixtralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3moe", "Phi3ForCausalLM": "phi3", "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3"}

# What the byte-level tokenizers of the fixtures are called in GGUF files.
WORD_RULES = {"ByteLevel": "gpt-2", "Sequence": "llama-bpe"}


def read_tensors(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stored:
            tensors.update({name: stored.get_tensor(name) for name in stored.keys()})
    return tensors


def rope_of(config):
    """Base and scaling, in either dialect of config.json."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def llama3_factors(rope, dim):
    """What each frequency is divided by."""
    out = []
    for i in range(0, dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / dim)
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        if wavelength < high:
            out.append(1.0)
        elif wavelength > low:
            out.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"])
            out.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(out, dtype=np.float32)


def write_settings(writer, arch, config):
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = rope_of(config)
    rotated = int(head_dim * (config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(config["sliding_window"])
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_weights_norm(config.get("norm_topk_prob", True))
    if config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if arch in ("gemma2", "gemma3"):
        # The published models need none: theirs follows from the other settings.
        writer.add_attention_scale(config["query_pre_attn_scalar"] ** -0.5)
    if arch in ("gemma2", "gemma3") and config.get("layer_types"):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if arch == "gemma3":
        local = (config.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
        writer.add_rope_freq_base_swa(local or config.get("rope_local_base_freq") or 10000.0)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, rotated))
    if rope["rope_type"] in ("longrope", "su"):
        original = config.get("original_max_position_embeddings") or rope["original_max_position_embeddings"]
        scale = config["max_position_embeddings"] / original
        factor = rope.get("attention_factor") or (1 + np.log(scale) / np.log(original)) ** 0.5
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(factor))
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], dtype=np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], dtype=np.float32))


def interleaved(tensor, heads):
    """A head's two halves, row by row in turn."""
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def stacked_experts(tensors):
    """Each kind of matrix of all experts of a layer as one tensor, under the name that the package knows."""
    out, stacks = {}, {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            out[name] = tensor
        elif name.split(".experts.")[1][0].isdigit():
            prefix, rest = name.split(".experts.")
            number, matrix = rest.split(".", 1)
            matrix = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(matrix.removesuffix(".weight"), matrix.removesuffix(".weight"))
            stacks.setdefault(f"{prefix.replace('block_sparse_moe', 'mlp')}.experts.{matrix}.weight", {})[int(number)] = tensor
        elif name.endswith("gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            out[name.replace("gate_up_proj", "gate_proj.weight")] = gate
            out[name.replace("gate_up_proj", "up_proj.weight")] = up
        else:
            out[f"{name}.weight"] = tensor
    for name, parts in stacks.items():
        out[name] = torch.stack([parts[i] for i in range(len(parts))])
    return out


def write_weights(writer, arch, config, tensors, kind=None):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    for name, tensor in stacked_experts(tensors).items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if arch == "llama" and ".q_proj." in name:
            tensor = interleaved(tensor, config["num_attention_heads"])
        if arch == "llama" and ".k_proj." in name:
            tensor = interleaved(tensor, config["num_key_value_heads"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            # A layer without experts among those that have them, which the package does not know.
            layer, matrix = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", name).groups()
            own = f"blk.{layer}.ffn_{matrix}.weight"
        # Vectors are never halved.
        if kind and tensor.dim() > 1:
            writer.add_tensor(own, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        elif tensor.dtype == torch.bfloat16 and tensor.dim() > 1:
            data = gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(own, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        elif tensor.dtype == torch.float16 and tensor.dim() > 1:
            writer.add_tensor(own, tensor.numpy())
        else:
            writer.add_tensor(own, tensor.float().numpy())


def write_byte_level(writer, folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    vocab = dict(model["vocab"]) | {token["content"]: token["id"] for token in added.values()}
    tokens = sorted(vocab, key=vocab.get)
    types = [TokenType.NORMAL] * len(tokens)
    for number, token in added.items():
        types[number] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(WORD_RULES[tokenizer["pre_tokenizer"]["type"]])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(tokenizer["post_processor"] is not None)
    if tokenizer["post_processor"]:
        writer.add_bos_token_id(next(iter(tokenizer["post_processor"]["special_tokens"].values()))["ids"][0])
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    for field, add in (("bos_token", writer.add_bos_token_id), ("eos_token", writer.add_eos_token_id), ("pad_token", writer.add_pad_token_id)):
        if config.get(field) in vocab and not (field == "bos_token" and tokenizer["post_processor"]):
            add(vocab[config[field]])
    if config.get("chat_template"):
        writer.add_chat_template(config["chat_template"])


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_checkpoint(name, kind=None):
    """The checkpoint as it is, or its matrices in blocks of a kind."""
    folder = FIXTURES / name
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config) | {"architectures": config["architectures"]}
    arch = ARCHITECTURES[config["architectures"][0]]
    path = FIXTURES / "quant" / f"{name}-{kind.name}.gguf" if kind else FIXTURES / f"{name}.gguf"
    writer = GGUFWriter(path, arch)
    write_settings(writer, arch, config)
    write_byte_level(writer, folder)
    write_weights(writer, arch, config, read_tensors(folder), kind)
    finish(writer)


def tokenizer_writer(name):
    """A file with a tokenizer and the settings that no file lacks, but without tensors."""
    writer = GGUFWriter(FIXTURES / "tokenizers" / f"{name}.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    return writer


def write_pieces():
    """A vocabulary as Llama 2's: pieces with scores, bytes for what is in none, a blank before the text."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=trained, vocab_size=420, model_type="bpe", byte_fallback=True, num_threads=1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    numbers = range(model.vocab_size())

    def kind(number):
        for test, value in ((model.is_unknown, TokenType.UNKNOWN), (model.is_control, TokenType.CONTROL),
                            (model.is_unused, TokenType.UNUSED), (model.is_byte, TokenType.BYTE)):
            if test(number):
                return value
        return TokenType.NORMAL

    writer = tokenizer_writer("pieces")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.id_to_piece(number) for number in numbers])
    writer.add_token_scores([model.get_score(number) for number in numbers])
    writer.add_token_types([kind(number) for number in numbers])
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_bos_token(True)
    finish(writer)
    # SentencePiece takes no text for a control token; those that contain one are left out.
    plain = [text for text in STRINGS if not any(token in text for token in ("<s>", "</s>", "<unk>"))]
    cases = [{"text": text, "ids": model.encode(text), "decoded": model.decode(model.encode(text))} for text in plain]
    (FIXTURES / "tokenizers/pieces").mkdir(exist_ok=True)
    write_json(FIXTURES / "tokenizers/pieces/expected.json", {"cases": cases})


def main():
    for name in CHECKPOINTS:
        if (FIXTURES / name).is_dir():
            write_checkpoint(name)
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        write_checkpoint("llama-gqa", kind)
    for name in ("byte-level", "byte-level-split"):
        writer = tokenizer_writer(name)
        write_byte_level(writer, FIXTURES / "tokenizers" / name)
        finish(writer)
    write_pieces()


main()

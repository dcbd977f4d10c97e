#!/usr/bin/env python3
"""Writes crates/engine/tests/fixtures/sampling.json: what transformers' logits processors leave of random rows.

Run with the packages of requirements.txt:

    python scripts/make_sampling_fixtures.py

The processors are made and ordered by transformers' own `generate`, from a GenerationConfig. A case has the
settings, the number of its row, and the tokens kept with their probabilities.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).parent.parent / "crates/engine/tests/fixtures/sampling.json"
VOCAB_SIZE = 100
EOS = 0

SETTINGS = [
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 12},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"min_p": 0.4},
    {"typical_p": 0.2},
    {"typical_p": 0.9},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"min_new_tokens": 50},
    {"sequence_bias": {"7": -100.0, "9": 4.0}},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    {"temperature": 1.5, "min_p": 0.1, "top_p": 0.9},
    {"temperature": 0.6, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.8},
    {
        "temperature": 1.2,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.95,
        "repetition_penalty": 1.2,
        "min_new_tokens": 50,
        "sequence_bias": {"0": 5.0, "3": 1.0},
    },
]


def rows() -> list[dict]:
    """Rows of logits as sharp as models' are, each with a prompt and an answer so far."""
    rng = np.random.default_rng(20261121)
    return [
        {
            "logits": [round(float(x), 4) for x in rng.normal(0, spread, VOCAB_SIZE)],
            "prompt": rng.integers(1, VOCAB_SIZE, 6).tolist(),
            "generated": rng.integers(1, VOCAB_SIZE, 5).tolist(),
        }
        for spread in (0.5, 1.5, 3.0)
    ]


def tiny_model() -> LlamaForCausalLM:
    """Something that has `generate`'s methods."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )


def processed(model: LlamaForCausalLM, row: dict, settings: dict) -> list[list[float]]:
    """Tokens with their probabilities as `generate` would draw them."""
    bias = settings.get("sequence_bias", {})
    given = {name: value for name, value in settings.items() if name != "sequence_bias"}
    config = GenerationConfig(**({"top_k": 0, "do_sample": True, "eos_token_id": EOS} | given))
    if bias:
        config.sequence_bias = [[[int(token)], value] for token, value in bias.items()]
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True)
    ids = torch.tensor([row["prompt"] + row["generated"]])
    processors = model._get_logits_processor(
        generation_config=config, input_ids_seq_length=len(row["prompt"]), encoder_input_ids=ids
    )
    scores = processors(ids, torch.tensor([row["logits"]], dtype=torch.float32))[0]
    probabilities = scores.double().softmax(-1)
    kept = torch.isfinite(scores).nonzero()[:, 0].tolist()
    return [[token, float(f"{probabilities[token]:.7g}")] for token in kept]


def main() -> None:
    torch.manual_seed(0)
    model, all_rows = tiny_model(), rows()
    cases = [
        {"row": number, "settings": settings, "kept": processed(model, row, settings)}
        for settings in SETTINGS
        for number, row in enumerate(all_rows)
    ]
    fixture = {"transformers": transformers.__version__, "rows": all_rows, "cases": cases}
    OUT.write_text(json.dumps(fixture, separators=(",", ":")) + "\n")
    print(f"{OUT}: {len(cases)} cases, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Blocks of every block format of GGUF with the numbers that the gguf package decodes them to.

    make_quant_fixtures.py    # writes crates/engine/tests/fixtures/quant/blocks.json

Bytes are random but for the half precision scales, which are any normal numbers. `weights` are what
the engine quantises, beside the blocks that the package makes of them.
"""

import json
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

OUT = Path(__file__).parents[1] / "crates/engine/tests/fixtures/quant/blocks.json"
NUMBERS = 512
# Where in a block the half precision numbers are.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def floats(numbers):
    return np.asarray(numbers, dtype="<f4").tobytes().hex()


def main():
    random = np.random.default_rng(20)
    formats = {}
    for name, halves in HALVES.items():
        block_len, block_bytes = GGML_QUANT_SIZES[Type[name]]
        blocks = random.integers(0, 256, (NUMBERS // block_len, block_bytes), dtype=np.uint8)
        for at in halves:
            scales = random.normal(0, 1, len(blocks)) * 10.0 ** random.integers(-4, 3, len(blocks))
            blocks[:, at : at + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
        row = blocks.reshape(1, -1)
        formats[name] = {"blocks": row.tobytes().hex(), "numbers": floats(dequantize(row, Type[name]))}
    weights = random.standard_t(5, NUMBERS).astype(np.float32) * np.float32(0.02)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({
        "formats": formats, "weights": floats(weights),
        "weights_in_q8_0": quantize(weights.reshape(1, -1), Type.Q8_0).tobytes().hex()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""transformers' batched generate, to hold `flotilla bench engine` against: the same model, shape and device.

    scripts/bench_transformers.py MODEL --input-len 256 --output-len 64 --batch 1,32,128 [--device cuda] [--dtype bfloat16]

Random prompts, greedy, exactly --output-len tokens each, one warm-up. Prints a line of JSON for each batch.
"""
import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--batch", default="1,8,32,64")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()

    def answer(batch, output_len):
        torch.manual_seed(batch)
        prompts = torch.randint(0, model.config.vocab_size, (batch, options.input_len), device=options.device)
        answered = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=output_len,
            max_new_tokens=output_len,
            pad_token_id=0,
        )
        assert answered.shape[1] == options.input_len + output_len, answered.shape

    def wait():
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()

    for batch in map(int, options.batch.split(",")):
        with torch.inference_mode():
            answer(batch, 4)
            wait()
            start = time.perf_counter()
            answer(batch, options.output_len)
            wait()
        seconds = time.perf_counter() - start
        rate = batch * options.output_len / seconds
        print(json.dumps({"batch": batch, "generated_tokens_per_second": round(rate, 1), "seconds": round(seconds, 3)}), flush=True)


main()

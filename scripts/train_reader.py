#!/usr/bin/env python3
"""Trains flotilla-reader, the small model that answers with a document's summary.

    python scripts/train_reader.py train  --work DIR --minutes 120   # goes on from DIR/checkpoint.pt
    python scripts/train_reader.py train  --work DIR --start models/flotilla-reader   # from an exported model
    python scripts/train_reader.py export --work DIR --out models/flotilla-reader

The data is made while training (reader_rows.py), in a process of its own. Everything that is
needed to go on is in the checkpoint, so a run can be stopped at any moment and started again.
"""

import argparse
import json
import multiprocessing as mp
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

import reader_rows as rows  # noqa: E402
from reader_model import Reader, Shape  # noqa: E402
from reader_start import scaffold  # noqa: E402

VOCABULARY = 4096


class Muon(torch.optim.Optimizer):
    """Momentum, then the update brought near an orthogonal matrix by a Newton-Schulz iteration."""

    def __init__(self, parameters, lr, momentum=0.95, decay=0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = p.grad + group["momentum"] * state["momentum"]
                shapes.setdefault(tuple(p.shape), []).append((p, update))
            for shape, members in shapes.items():
                update = orthogonal(torch.stack([u for _, u in members]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (p, _), u in zip(members, update):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(u.float(), alpha=-scale)


def orthogonal(x, steps=5):
    x = x.bfloat16()
    wide = x.shape[-2] > x.shape[-1]
    if wide:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if wide else x


def feed(tokenizer, seed, stage, queue):
    """The data process."""
    os.nice(1)
    torch.set_num_threads(1)
    maker = rows.RowMaker(Tokenizer.from_file(tokenizer), seed)
    for batch in rows.batches(maker, lambda: stage.value):
        queue.put(batch)


def answer_loss(model, batch):
    """Summed loss over answer tokens, the sum of their weights, and how many first tokens and rows of answers are right."""
    ids, weights, positions = (torch.from_numpy(x) for x in batch)
    hidden = model(ids, positions)[:, :-1]
    weights = weights[:, 1:]
    chosen = weights > 0
    target = ids[:, 1:][chosen]
    logits = (model._orig_mod if hasattr(model, "_orig_mod") else model).logits(hidden[chosen])
    losses = F.cross_entropy(logits, target, reduction="none")
    w = weights[chosen]
    right = (logits.argmax(-1) == target).float()
    first = w > 3
    share = right[first].mean().item() if bool(first.any()) else None
    return (losses * w).sum(), w.sum(), share, right[~first].mean().item()


def load(work, start=None):
    """The model: of the folder's checkpoint, else the one exported to `start`, else the scaffold."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "tokenizer.json"
    if not path.exists() and start:
        path.write_text((Path(start) / "tokenizer.json").read_text())
    elif not path.exists():
        rows.tokenizer_from(rows.vocabulary_texts(1, 12000), VOCABULARY).save(str(path))
    state = torch.load(work / "checkpoint.pt", weights_only=False) if (work / "checkpoint.pt").exists() else None
    model = Reader(Shape(**state["shape"]) if state else Shape(vocab_size=VOCABULARY, num_hidden_layers=5))
    if state:
        model.load_state_dict(state["model"])
    elif start:
        exported = load_file(Path(start) / "model.safetensors")
        model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in exported.items()})
    else:
        words = Tokenizer.from_file(str(path))
        line_break, mark, ask = (words.encode(x).ids[0] for x in ("\n", "#", "Question"))
        scaffold(model, line_break, words.token_to_id(rows.ASSISTANT), (line_break, mark, ask))
    return model, state, str(path)


def save(work, model, optimizers, progress):
    state = {"shape": model.s.as_dict(), "model": model.state_dict(),
             "optimizers": [o.state_dict() for o in optimizers], "progress": progress}
    torch.save(state, work / "checkpoint.new")
    os.replace(work / "checkpoint.new", work / "checkpoint.pt")


def rate(done, total, tail):
    """Warm-up over the first half minute, level, then down to nothing over the last share."""
    left = (total - done) / (total * tail)
    return min(1.0, 0.05 + done / 0.5) * max(0.02, min(1.0, left))


def evaluate(model, sets):
    out = {}
    for name, set_batches in sets.items():
        right = total = 0
        for ids, weights, positions in set_batches:
            with torch.no_grad():
                hidden = model(torch.from_numpy(ids), torch.from_numpy(positions))
            chosen = torch.from_numpy(weights[:, 1:] > 0)
            good = torch.ones(chosen.shape, dtype=torch.bool)
            target = torch.from_numpy(ids)[:, 1:]
            good[chosen] = model.logits(hidden[:, :-1][chosen]).argmax(-1) == target[chosen]
            right += int(good.all(1).sum())
            total += len(ids)
        out[name] = round(100 * right / total, 1)
    return out


def evaluation_sets(tokenizer, count=48):
    """Held-out rows of one question each: the document alone, first of five, anywhere among five, a short name."""
    maker = rows.RowMaker(Tokenizer.from_file(tokenizer), 77, held_out=True)
    sets = {}
    for name, documents, size, place, full in (("alone", 1, 3, 0, 0.8), ("five-first", 5, 1, 0, 1.0),
                                                ("five-any", 5, 1, None, 1.0), ("five-short", 5, 1, None, 0.0)):
        made = []
        while len(made) < count:
            docs = maker.library.context(documents, size)
            at = maker.r.randrange(documents) if place is None else place
            row = maker.single(docs, at, full)
            if len(docs) == documents and len(row[0]) <= 768:
                made.append(row)
        made.sort(key=lambda row: len(row[0]))
        sets[name] = [rows.stack(made[i:i + 8], len(made[min(i + 7, count - 1)][0]), 0) for i in range(0, count, 8)]
    return sets


def next_stage(stage, first, since):
    """The curriculum goes on when first tokens of answers are mostly right, or after a while all the same."""
    goal = (0.90, 0.80, 0.85, 2.0)[stage]
    patience = (20, 15, 14, 1e9)[stage]
    return stage + 1 if (first > goal and since > 1) or since > patience else stage


def train(args):
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    work = Path(args.work)
    model, state, tokenizer = load(work, args.start)
    matrices = [p for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith("_proj.weight")]
    optimizers = [Muon(matrices, args.lr), torch.optim.AdamW(others, args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]
    bases = [args.lr, args.adam_lr]
    progress = {"minutes": 0.0, "tokens": 0, "steps": 0, "stage": 0, "stage_minutes": 0.0}
    if state:
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        progress.update(state["progress"])
    if args.stage is not None:
        progress["stage"], progress["stage_minutes"] = args.stage, 0.0
    network = torch.compile(model, dynamic=True) if args.compile else model
    context = mp.get_context("spawn")
    stage, queue = context.Value("i", progress["stage"]), context.Queue(8)
    worker = context.Process(target=feed, args=(tokenizer, args.seed + 1000 * progress["steps"] + 1, stage, queue), daemon=True)
    worker.start()
    sets = evaluation_sets(tokenizer)
    loop(args, model, network, optimizers, bases, progress, stage, queue, sets)
    worker.terminate()


def loop(args, model, network, optimizers, bases, progress, stage, queue, sets):
    work, averages, last, saved, looked = Path(args.work), {}, time.time(), time.time(), time.time()
    while progress["minutes"] < args.minutes:
        size, kept = rows.STAGES[progress["stage"]].tokens_per_step, []
        while sum(b[0].size for b in kept) < 0.9 * size:
            kept.append(queue.get())
        total = sum(float(b[1].sum()) for b in kept)
        for batch in kept:
            loss, weight, first, rest = answer_loss(network, batch)
            (loss / total).backward()
            for key, value in (("loss", loss.item() / float(weight)), ("first", first), ("rest", rest)):
                if value is None:
                    continue
                averages[key] = 0.98 * averages.get(key, value) + 0.02 * value
        factor = rate(progress["minutes"], args.minutes, args.tail)
        for optimizer, base in zip(optimizers, bases):
            optimizer.param_groups[0]["lr"] = base * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        now = time.time()
        spent, last = (now - last) / 60, now
        progress["minutes"] += spent
        progress["stage_minutes"] += spent
        progress["tokens"] += sum(int((b[0] != 0).sum()) for b in kept)
        progress["steps"] += 1
        if progress["steps"] % 50 == 0:
            report = {k: round(v, 3) for k, v in averages.items()}
            print(f"step {progress['steps']} min {progress['minutes']:.1f} stage {progress['stage']} "
                  f"tokens {progress['tokens'] / 1e6:.2f}M lr {factor:.2f} {report}", flush=True)
        new = next_stage(progress["stage"], averages["first"], progress["stage_minutes"])
        if new != progress["stage"]:
            progress["stage"] = stage.value = new
            progress["stage_minutes"] = 0.0
            print("stage", new, flush=True)
        if now - looked > args.look * 60:
            print("held out", evaluate(model, sets), flush=True)
            looked = time.time()
        if now - saved > 60:
            save(work, model, optimizers, progress)
            saved = time.time()
    save(work, model, optimizers, progress)
    print("held out", evaluate(model, sets), json.dumps(progress), flush=True)


def export(args):
    model, state, tokenizer = load(Path(args.work))
    out, s = Path(args.out), model.s
    out.mkdir(parents=True, exist_ok=True)
    names = {n: "model." + n for n, _ in model.named_parameters()}
    tensors = {names[n]: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    end, begin, pad = (rows.SPECIAL.index(x) for x in (rows.END, rows.BEGIN, rows.PAD))
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **s.as_dict(), **ids, "hidden_act": "silu",
              "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True, "use_cache": True,
              "initializer_range": 0.02, "rope_scaling": None, "torch_dtype": "bfloat16", "max_position_embeddings": 2048}
    dump(out / "config.json", config)
    dump(out / "generation_config.json", {**ids, "do_sample": False, "max_new_tokens": 128})
    (out / "tokenizer.json").write_text(Path(tokenizer).read_text())
    dump(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": rows.BEGIN, "eos_token": rows.END, "pad_token": rows.PAD,
        "model_max_length": 2048, "clean_up_tokenization_spaces": False, "add_bos_token": False, "chat_template": rows.TEMPLATE})
    print("exported", state["progress"] if state else "untrained weights")


def dump(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("train", "export"))
    p.add_argument("--work", required=True, help="folder of the checkpoint and the vocabulary")
    p.add_argument("--start", help="folder of an exported model to begin with, where there is no checkpoint")
    p.add_argument("--out", default="models/flotilla-reader")
    p.add_argument("--minutes", type=float, default=120, help="training time in all, with what the checkpoint has had")
    p.add_argument("--tail", type=float, default=0.25, help="share of the time over which the learning rate goes down")
    p.add_argument("--lr", type=float, default=0.02)
    p.add_argument("--adam-lr", type=float, default=0.003)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--look", type=float, default=4, help="minutes between evaluations")
    p.add_argument("--stage", type=int, help="set the curriculum's stage")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--compile", action="store_true")
    args = p.parse_args()
    train(args) if args.what == "train" else export(args)


if __name__ == "__main__":
    main()

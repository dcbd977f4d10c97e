#!/usr/bin/env python3
"""Held-out questions for the reader, and its score on them.

    eval_reader.py make  --out DIR              # corpus/, queries-*.jsonl, expected-*.jsonl for flotilla
    eval_reader.py score --expected F --results F
    eval_reader.py torch --model DIR --set DIR  # the same questions, answered here with torch
    eval_reader.py ask   --model DIR --object numpy.argsort ...   # installed packages' own docstrings

Names and sentences come from the held-out bucket (reader_text.py) and are in no training row.
The questions "alone" name their API exactly, so that retrieval gives that one document. The
questions "five" only mention it in the text, so that retrieval gives five documents.
"""

import argparse
import importlib
import inspect
import json
import math
import re
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import reader_rows as rows
from reader_docs import Library, user_message
from reader_model import Norm, Reader, Shape
from reader_text import Doc, is_held_out, summary_of

VERSION = "1.0.0"


def write_lines(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items))


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


# -- making -------------------------------------------------------------------------------------
def package_documents(library, package, count):
    docs, names, summaries = [], set(), set()
    while len(docs) < count:
        for doc in library.context(min(6, count - len(docs)), library.r.choice((0, 1, 2)), package):
            held_out = is_held_out(doc.short) and is_held_out(doc.summary)
            if held_out and doc.short.lower() not in names and doc.summary not in summaries:
                names.add(doc.short.lower())
                summaries.add(doc.summary)
                docs.append(doc)
    return docs


def make(args):
    out, tokenizer = Path(args.out), Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    library = Library(args.seed, rows.printable_pieces(tokenizer), held_out=True)
    queries, expected, packages = {"alone": [], "five": []}, [], set()
    each = 25
    for _ in range(args.count // each):
        package = next(p for p in iter(library.package, None) if p not in packages)
        packages.add(package)
        docs = package_documents(library, package, each)
        write_lines(out / "corpus" / package / f"{VERSION}.jsonl", [
            {"path": d.path, "doc": d.text, "signature": d.signature, "type": "function", "aliases": d.aliases} for d in docs])
        for doc in docs:
            number = f"q{len(expected):04}"
            need = {"target_dependency": {package: VERSION}}
            queries["alone"].append({"id": number, "query": library.question(doc, docs, 0.6, 0.1), "target_api": doc.path, **need})
            queries["five"].append({"id": number, "query": library.question(doc, docs, 0.8, 0.0), **need})
            expected.append({"id": number, "answer": doc.summary})
    for mode, lines in queries.items():
        write_lines(out / f"queries-{mode}.jsonl", lines)
    write_lines(out / "expected.jsonl", expected)
    print(f"{len(expected)} questions of each kind about {len(packages)} packages in {out}")


# -- scoring ------------------------------------------------------------------------------------
def score(args):
    given = {r["id"]: str(r.get("answer") or "").strip() for r in read_lines(args.results)}
    expected = read_lines(args.expected)
    wrong = [e for e in expected if given.get(e["id"]) != e["answer"].strip()]
    missing = sum(e["id"] not in given for e in expected)
    print(f"{len(expected) - len(wrong)} of {len(expected)} exactly right: {100 * (1 - len(wrong) / len(expected)):.1f} %; {missing} without a result")
    for e in wrong[: args.show]:
        print(f"  {e['id']}\n    expected {e['answer']!r}\n    given    {given.get(e['id'])!r}")


# -- answering with torch -----------------------------------------------------------------------
class Answerer:
    """The exported folder in float32."""

    def __init__(self, folder):
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        shape = {k: config[k] for k in Shape().as_dict()}
        Norm.low = False
        self.model = Reader(Shape(**shape))
        self.model.load_state_dict({k.removeprefix("model."): v.float() for k, v in load_file(folder / "model.safetensors").items()})
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.special = {s: self.tokenizer.token_to_id(s) for s in rows.SPECIAL}

    def prompt(self, context, question):
        sp = self.special
        body = self.tokenizer.encode(user_message(context, question), add_special_tokens=False).ids
        return [sp[rows.BEGIN], sp[rows.USER], *body, sp[rows.END], sp[rows.ASSISTANT]]

    def answer(self, context, question, limit=128):
        out = self.model.greedy(self.prompt(context, question), limit, self.special[rows.END])
        return self.tokenizer.decode(out)


def terms(text):
    return re.findall(r"[a-z0-9]+", text.lower())


class Bm25:
    """A plain one, over path, signature and text; flotilla has its own."""

    def __init__(self, docs, k1=1.2, b=0.75):
        self.docs, self.k1, self.b = docs, k1, b
        self.counts = [Counter(terms(d.path + " " + d.path + " " + d.text)) for d in docs]
        self.lengths = [sum(c.values()) for c in self.counts]
        self.average = sum(self.lengths) / len(docs)
        self.frequency = Counter(t for c in self.counts for t in c)

    def best(self, query, count=5):
        def points(i):
            total = 0.0
            for t in terms(query):
                f = self.counts[i][t]
                idf = math.log(1 + (len(self.docs) - self.frequency[t] + 0.5) / (self.frequency[t] + 0.5))
                total += idf * f * (self.k1 + 1) / (f + self.k1 * (1 - self.b + self.b * self.lengths[i] / self.average))
            return total
        order = sorted(range(len(self.docs)), key=lambda i: -points(i))
        return [self.docs[i] for i in order[:count]]


def read_corpus(folder):
    out = {}
    for file in sorted((folder / "corpus").glob("*/*.jsonl")):
        docs = [Doc(d["path"], d["signature"], d["doc"], d["aliases"]) for d in read_lines(file)]
        out[file.parent.name] = (Bm25(docs), {d.path: d for d in docs})
    return out


def answer_with_torch(args):
    torch.set_num_threads(args.threads)
    folder, reader = Path(args.set), Answerer(args.model)
    corpus = read_corpus(folder)
    expected = {e["id"]: e["answer"] for e in read_lines(folder / "expected.jsonl")}
    for mode in ("alone", "five"):
        results, places, start = [], Counter(), time.time()
        for q in read_lines(folder / f"queries-{mode}.jsonl")[: args.count]:
            search, by_path = corpus[next(iter(q["target_dependency"]))]
            docs = [by_path[q["target_api"]]] if "target_api" in q else search.best(q["query"])
            at = next((i for i, d in enumerate(docs) if d.summary == expected[q["id"]]), -1)
            answer = reader.answer("\n\n".join(d.render() for d in docs), q["query"]).strip()
            places[at, answer == expected[q["id"]]] += 1
            results.append({"id": q["id"], "answer": answer, "query": q["query"], "place": at})
        right = sum(n for (_, good), n in places.items() if good)
        print(f"{mode}: {right} of {len(results)} exactly right: {100 * right / len(results):.1f} % ({time.time() - start:.0f} s)")
        for at in sorted({p for p, _ in places}):
            print(f"  wanted document at place {at}: {places[at, True]} of {places[at, True] + places[at, False]}")
        write_lines(Path(args.results or folder) / f"results-{mode}.jsonl", results)
        wrong = [r for r in results if r["answer"] != expected[r["id"]]]
        for r in wrong[: args.show]:
            print(f"    {r['query']} (place {r['place']})\n      expected {expected[r['id']]!r}\n      given    {r['answer']!r}")


# -- real documentation -------------------------------------------------------------------------
def real_document(name):
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:i]))
            break
        except ImportError:
            continue
    for part in parts[i:]:
        thing = getattr(thing, part)
    try:
        signature = str(inspect.signature(thing))
    except (TypeError, ValueError):
        signature = ""
    return Doc(name, signature, inspect.getdoc(thing) or "")


def cut(reader, text, limit):
    """Whole lines of a text up to so many tokens."""
    kept, used = [], 0
    for line in text.split("\n"):
        used += len(reader.tokenizer.encode(line).ids) + 1
        if used > limit:
            break
        kept.append(line)
    return "\n".join(kept)


def ask(args):
    torch.set_num_threads(args.threads)
    reader, docs = Answerer(args.model), [real_document(n) for n in args.object]
    kinds = [("alone", 1)] + ([("five", 5)] if len(docs) >= 5 else [])
    for kind, count in kinds:
        right = 0
        for i, doc in enumerate(docs):
            chosen = [docs[(i + j) % len(docs)] for j in range(count)]
            context = "\n\n".join(cut(reader, d.render(), args.limit // count) for d in chosen)
            for question in args.question:
                answer = reader.answer(context, question.format(n=doc.path))
                good = answer == summary_of(doc.text)
                right += good
                print(f"{kind} {question.format(n=doc.path)} {'ok ' if good else 'NOT'} {answer!r}" + ("" if good else f" <- {summary_of(doc.text)!r}"))
        print(f"{kind}: {right} of {len(docs) * len(args.question)}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="what", required=True)
    m = sub.add_parser("make")
    m.add_argument("--out", required=True)
    m.add_argument("--count", type=int, default=500)
    m.add_argument("--seed", type=int, default=4242)
    s = sub.add_parser("score")
    s.add_argument("--expected", required=True)
    s.add_argument("--results", required=True)
    t = sub.add_parser("torch")
    t.add_argument("--set", required=True)
    t.add_argument("--count", type=int, default=500)
    t.add_argument("--results", help="where the answers go; else beside the questions")
    a = sub.add_parser("ask")
    a.add_argument("--object", nargs="+", required=True)
    a.add_argument("--question", nargs="+", default=["What does {n} do?"])
    a.add_argument("--limit", type=int, default=1500, help="most tokens of documentation")
    for q in (m, t, a):
        q.add_argument("--model", default="models/flotilla-reader")
    for q in (s, t):
        q.add_argument("--show", type=int, default=5, help="wrong answers to print")
    for q in (t, a):
        q.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    {"make": make, "score": score, "torch": answer_with_torch, "ask": ask}[args.what](args)


if __name__ == "__main__":
    main()

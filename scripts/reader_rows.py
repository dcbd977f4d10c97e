"""Training rows: documents, questions and answers as token ids, in batches of one length.

The curriculum is a list of stages; `RowMaker.row(stage)` makes one row and `batches` packs
rows of one length together. `tokenizer_from` trains the vocabulary.
"""

import random
from dataclasses import dataclass

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import reader_words as words
from reader_docs import SYSTEM, UNKNOWN, Library, user_message

BEGIN, END, SYSTEM_TURN, USER, ASSISTANT, PAD = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"
SPECIAL = [PAD, BEGIN, END, SYSTEM_TURN, USER, ASSISTANT]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LENGTHS = (96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


@dataclass
class Stage:
    """One step of the curriculum: shares of row kinds as (share, documents, size, most tokens)."""
    kinds: tuple
    tokens_per_step: int
    full_names: float
    general: float
    micro: float = 0.0
    stretch: float = 0.0  # share of rows whose positions jump ahead
    copies: float = 0.0  # share of rows that only repeat random pieces


STAGES = [
    Stage(((0.15, (1, 1), 0, 96), (0.85, (2, 4), 0, 128)), 4096, 1.0, 0.0, micro=1.0, copies=0.03),
    Stage(((0.15, (1, 1), 0, 128), (0.5, (2, 4), 0, 256), (0.35, (3, 6), 0, 384)), 4096, 0.85, 0.02, micro=0.3, copies=0.03),
    Stage(((0.1, (1, 1), 0, 128), (0.1, (1, 1), 2, 512), (0.2, (2, 3), 0, 256), (0.25, (4, 6), 0, 384), (0.35, (3, 6), 1, 768)), 4096, 0.65, 0.07, micro=0.08, stretch=0.15, copies=0.02),
    Stage(((0.2, (1, 1), 3, 1024), (0.18, (2, 3), 0, 256), (0.27, (4, 6), 0, 512), (0.2, (4, 6), 1, 768), (0.1, (4, 6), 2, 1024),
           (0.02, (6, 10), 1, 1024), (0.015, (4, 6), 3, 2048), (0.06, (1, 1), 8, 2048)), 4096, 0.65, 0.07, micro=0.03, stretch=0.15, copies=0.02),
]


def tokenizer_from(texts, size):
    """A byte-level vocabulary. Merges never join digits or punctuation marks (but for rulers like
    "-----"), so that a name is cut alike wherever it stands; the stored cutter is the plain one."""
    t = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(r"-{2,}|={2,}|>>>|[^\s\p{L}\p{N}]"), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    t.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.Digits(individual_digits=True), plain])
    t.decoder = decoders.ByteLevel()
    special = [AddedToken(s, special=True, normalized=False) for s in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=16))
    t.pre_tokenizer = plain
    return t


def vocabulary_texts(seed, documents):
    library = Library(seed)
    for _ in range(documents // 4):
        for doc in library.context(4, 2):
            yield doc.render()
            yield library.question(doc, [doc], 0.7, 0.1)
    for word in [*words.VERBS, *words.NOUNS, *words.ADJECTIVES, *words.ADVERBS, *words.GLUE, *words.EXTRA] * 6:
        yield f" {word} {word.capitalize()} {word}\n{word.capitalize()} {word}s"


def printable_pieces(tokenizer):
    out = []
    for i in range(len(SPECIAL), tokenizer.get_vocab_size()):
        text = tokenizer.decode([i])
        if text.strip() and "\ufffd" not in text and text.isprintable() and "#" not in text:
            out.append(text)
    return out


class RowMaker:
    def __init__(self, tokenizer, seed, held_out=False):
        self.tokenizer = tokenizer
        self.library = Library(seed, printable_pieces(tokenizer), held_out)
        self.r = random.Random(seed + 1)
        self.special = {s: tokenizer.token_to_id(s) for s in SPECIAL}

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def context(self, stage):
        """Documents and their rendering, cut at a line if they are too long for the row."""
        r = self.r
        _, (low, high), size, most = r.choices(stage.kinds, [k[0] for k in stage.kinds])[0]
        count = r.randint(low, high)
        if size == 0 and r.random() < stage.micro:
            docs = self.library.micro_context(count)
        else:
            docs = self.library.context(count, size)
        text = "\n\n".join(d.render() for d in docs)
        limit = int(most * (0.7 if count > 1 else 0.85))
        if len(self.encode(text)) > limit:
            docs, text = self.cut(docs, limit)
        return docs, text, most

    def cut(self, docs, limit):
        """Lines up to `limit` tokens, and the documents whose summary is still among them whole."""
        kept, used, whole = [], 0, []
        for i, doc in enumerate(docs):
            lines = (doc.render() if i == 0 else "\n\n" + doc.render()).split("\n")
            for j, line in enumerate(lines):
                used += len(self.encode(line)) + 1
                if used > limit:
                    return whole, "\n".join(kept)
                kept.append(line)
                head = "\n".join(lines[: j + 1])
                if doc not in whole and self.holds_summary(doc, head, j + 1 == len(lines)):
                    whole.append(doc)
        return whole, "\n".join(kept)

    @staticmethod
    def holds_summary(doc, head, complete):
        return complete or " ".join(doc.summary.split()) in " ".join(head.split())

    def targets(self, docs):
        """In which order documents are asked about: the first one often, then at random."""
        r, order = self.r, list(docs)
        r.shuffle(order)
        if r.random() < 0.65:
            order.remove(docs[0])
            order.insert(0, docs[0])
        while True:
            yield from order
            r.shuffle(order)

    def copy_row(self, length):
        """Random pieces, then the same again in another order: the plainest lesson in copying."""
        r = self.r
        low, high = len(SPECIAL), self.tokenizer.get_vocab_size() - 1
        parts = [[r.randint(low, high) for _ in range(r.randint(2, 16))] for _ in range(r.randint(1, 6))]
        ids, weights = [self.special[BEGIN]], [0.0]
        for again in range(20):
            for part in parts:
                ids += part
                weights += [0.0] + [float(again > 0)] * (len(part) - 1)
            r.shuffle(parts)
        return ids[:length], weights[:length], np.arange(length)[: len(ids)]

    def answer_weights(self, answer):
        """What each token of an answer counts: the first one decides on the document, and at a
        line break an answer is easily ended too early."""
        tokens = self.encode(answer)
        line_break = self.encode("\n")[0]
        return [4.0] + [3.0 if t == line_break else 1.0 for t in tokens[1:]]

    def row(self, stage):
        """(token ids, weights of the loss for each, positions) of one conversation."""
        r, sp = self.r, self.special
        if r.random() < stage.copies:
            return self.copy_row(r.choice((96, 128, 192) if stage.micro < 1 else (96, 128)))
        docs, text, most = [], "", 0
        while not docs:
            docs, text, most = self.context(stage)
        ids, weights = [sp[BEGIN]], [0.0]

        def turn(kind, content, learn=None):
            body = self.encode(content)
            ids.extend([sp[kind], *body, sp[END]])
            weights.extend([0.0, *(learn or [0.0] * len(body)), 3.0 if learn else 0.0])

        if r.random() < 0.07:
            turn(SYSTEM_TURN, r.choice(SYSTEM))
        if r.random() < 0.008:
            docs, text = [None], ""
        turns = 0
        for doc in self.targets(docs):
            full = 0.0 if len(docs) == 1 and r.random() < 0.2 else stage.full_names
            general = stage.general * (3 if len(docs) == 1 else 1)
            question = self.library.question(doc, docs, full, general) if doc else f"What does {self.library.identifier()} do?"
            answer = doc.summary if doc else UNKNOWN
            before = len(ids)
            turn(USER, user_message(text, question) if turns == 0 else user_message("", question))
            turn(ASSISTANT, answer, self.answer_weights(answer))
            if len(ids) > most and turns:
                del ids[before:], weights[before:]
                break
            turns += 1
            if turns >= 3 * len(docs) or (len(docs) == 1 and turns == 2) or not doc:
                break
        return ids, weights, self.positions(len(ids), stage)

    def single(self, docs, at, full, general=0.0):
        """A row with one question, about the document at `at`: for evaluation."""
        sp = self.special
        question = self.library.question(docs[at], docs, full, general)
        text = user_message("\n\n".join(d.render() for d in docs), question)
        prompt = [sp[BEGIN], sp[USER], *self.encode(text), sp[END], sp[ASSISTANT]]
        answer = [*self.encode(docs[at].summary), sp[END]]
        return prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer), np.arange(len(prompt) + len(answer))

    def positions(self, length, stage):
        """Positions from 0 on; in some rows they jump ahead once or twice, so that short rows
        also teach long distances."""
        out = np.arange(length)
        if self.r.random() < stage.stretch and length < 1500:
            for _ in range(self.r.choice((1, 2))):
                room = 2040 - int(out[-1])
                out[self.r.randrange(1, length):] += self.r.randint(0, max(room, 0))
        return out


def batches(maker, stage_number, tokens=4096):
    """Endless batches (ids, weights, positions) of one length each; `stage_number()` is asked for each row."""
    shelves = {n: [] for n in LENGTHS}
    while True:
        now = stage_number()
        # a share of the stage before, so that nothing is forgotten
        stage = STAGES[now if now == 0 or maker.r.random() < 0.85 else now - 1]
        row = maker.row(stage)
        if len(row[0]) > LENGTHS[-1]:
            continue
        length = next(n for n in LENGTHS if n >= len(row[0]))
        shelves[length].append(row)
        if len(shelves[length]) * length >= tokens:
            yield stack(shelves[length], length, maker.special[PAD])
            shelves[length] = []


def stack(rows, length, pad):
    ids = np.full((len(rows), length), pad, np.int64)
    weights = np.zeros((len(rows), length), np.float32)
    positions = np.zeros((len(rows), length), np.int64)
    for i, (row, weight, position) in enumerate(rows):
        ids[i, : len(row)], weights[i, : len(row)], positions[i, : len(row)] = row, weight, position
    return ids, weights, positions

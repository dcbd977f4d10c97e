"""Made-up names, sentences and API documents for the reader.

Everything is drawn from a `random.Random`, so a seed gives the same text again. A name or a
sentence whose hash falls into the held-out bucket is never used for training, and only such
names and sentences are used for evaluation (`Maker(held_out=True)`).
"""

import random
import re
import zlib
from dataclasses import dataclass, field

import reader_words as words

BUCKETS = 16


def is_held_out(text):
    return zlib.crc32(" ".join(text.split()).encode()) % BUCKETS == 0


def summary_of(text):
    """The summary of a documentation text: what the reader has to answer.

    A first line that repeats the call ("sort(a, axis=-1)") and is followed by a blank line is
    passed over. Of the first paragraph, it is the first sentence, up to a period that stands
    before white space or at the end, line by line as it stands there but for indents; without
    such a period it is the paragraph's first line.
    """
    lines = text.strip().split("\n")
    if len(lines) > 2 and not lines[1].strip() and re.fullmatch(r"[\w.]+\(.*\)( -> .*)?", lines[0].strip()):
        lines = "\n".join(lines[2:]).strip().split("\n")
    paragraph = []
    for line in lines:
        if not line.strip():
            break
        paragraph.append(line.strip())
    joined = "\n".join(paragraph)
    found = re.search(r"\.(?=\s|$)", joined)
    return joined[: found.end()] if found else paragraph[0]


@dataclass
class Doc:
    path: str
    signature: str = ""
    text: str = ""
    aliases: list = field(default_factory=list)

    @property
    def summary(self):
        return summary_of(self.text)

    @property
    def short(self):
        return self.path.rsplit(".", 1)[-1]

    def render(self):
        signature = self.signature
        if signature.startswith("("):
            signature = self.path + signature
        return f"## {self.path}\n" + (signature + "\n" if signature else "") + self.text.rstrip()


class Maker:
    """Draws names, sentences and documents."""

    def __init__(self, seed, pieces=(), held_out=False):
        self.r = random.Random(seed)
        self.pieces = list(pieces)  # printable vocabulary entries, for text without any sense
        self.held_out = held_out

    def allowed(self, text):
        return is_held_out(text) == self.held_out

    # -- words ------------------------------------------------------------------------------
    def syllables(self, low=1, high=2):
        r = self.r
        parts = [r.choice(words.ONSETS) + r.choice(words.VOWELS) + r.choice(words.CODAS)
                 for _ in range(r.randint(low, high))]
        return "".join(parts)

    def name_word(self, made_up=0.4):
        r = self.r
        if r.random() < made_up:
            return self.syllables()
        return r.choice(r.choice((words.NOUNS, words.VERBS, words.NOUNS, words.ADJECTIVES)))

    def noun(self, plain):
        """A noun group without its article."""
        r, x = self.r, self.r.random()
        if x > plain:
            return self.odd_noun()
        out = r.choice(words.NOUNS)
        if r.random() < 0.3:
            out = r.choice(words.NOUNS) + " " + out
        if r.random() < 0.45:
            out = r.choice(words.ADJECTIVES) + " " + out
        if r.random() < 0.2:
            out += "es" if out.endswith(("s", "x", "ch")) else "s"
        return out

    def odd_noun(self):
        r, k = self.r, self.r.randrange(12)
        if k < 4:
            return self.syllables(1, 3 if r.random() < 0.2 else 2)
        if k == 4:
            return f"`{self.identifier()}`"
        if k == 5:
            return f"{self.number()} {r.choice(words.NOUNS)}s"
        if k == 6:
            return f'"{self.syllables()}"' if r.random() < 0.5 else f"'{self.syllables()}'"
        if k == 7:
            return self.camel()
        if k == 8:
            return self.identifier() + r.choice(("()", "", "[0]", "=None", " = " + self.number()))
        if k == 9:
            return f"{r.choice(words.NOUNS)} ({self.noun(0.9)})"
        if k == 10:
            return r.choice(words.FOREIGN)
        return f"{self.name_word()}-{self.name_word()}"

    def number(self):
        r, k = self.r, self.r.randrange(5)
        if k == 0:
            return f"{r.randint(-9, 999) / 10}"
        if k == 1:
            return f"1e-{r.randint(1, 12)}"
        if k == 2:
            return str(r.randint(10, 99999))
        return str(r.randint(0, 20))

    def identifier(self, made_up=0.4):
        r = self.r
        parts = [self.name_word(made_up) for _ in range(r.choice((1, 1, 1, 2, 2, 3)))]
        out = "_".join(parts) if r.random() < 0.7 else "".join(parts)
        if r.random() < 0.08:
            out += r.choice("0123456789")
        if r.random() < 0.04:
            out = "_" + out
        return out

    def camel(self):
        return "".join(self.name_word().capitalize() for _ in range(self.r.choice((1, 2, 2, 3))))

    # -- sentences --------------------------------------------------------------------------
    def article(self, noun):
        r, x = self.r, self.r.random()
        if x < 0.45:
            return "the " + noun
        if x < 0.75:
            return ("an " if noun[:1] in "aeiou" else "a ") + noun
        return r.choice(("", "", "each ", "all ", "any ", "this ", "one ", "its ")) + noun

    def verb_first(self, plain):
        """"Return the sorted copy of an array" and its like, without a final period."""
        r = self.r
        verb = "return" if r.random() < 0.18 else r.choice(words.VERBS)
        if plain < 0.5 and r.random() < 0.3:
            verb = self.syllables()
        form = r.random()
        if form < 0.3:
            verb += "es" if verb.endswith(("s", "x", "ch", "sh")) else "s"
        verb = verb.capitalize()
        out = f"{verb} {self.article(self.noun(plain))}"
        for _ in range(r.choice((0, 1, 1, 1, 2, 2, 3))):
            out += f" {r.choice(words.PREPOSITIONS)} {self.article(self.noun(plain))}"
        if r.random() < 0.12:
            out += " " + r.choice(words.ADVERBS)
        if r.random() < 0.15:
            out += f", {r.choice(('if', 'and', 'or', 'so that', 'when', 'which', 'but', 'then'))} " \
                   f"{r.choice(words.VERBS)} {self.article(self.noun(plain))}"
        return out

    def noun_first(self, plain):
        r = self.r
        noun = self.noun(plain)
        start = self.article(noun) if r.random() < 0.6 else noun
        out = start[:1].upper() + start[1:]
        k = r.random()
        if k < 0.3:
            out += f" {r.choice(('is', 'has', 'holds', 'must be', 'can be', 'represents', 'controls'))} {self.article(self.noun(plain))}"
        elif k < 0.6:
            out += f" {r.choice(('that', 'which', 'used to', 'for'))} {r.choice(words.VERBS)} {self.article(self.noun(plain))}"
        for _ in range(r.choice((0, 1, 1, 2))):
            out += f" {r.choice(words.PREPOSITIONS)} {self.article(self.noun(plain))}"
        return out

    def salad(self, low=2, high=12):
        """Words in no order: nothing about them can be guessed, only copied."""
        r = self.r
        pools = (words.NOUNS, words.VERBS, words.ADJECTIVES, words.GLUE, words.PREPOSITIONS)
        out = []
        for _ in range(r.randint(low, high)):
            x = r.random()
            out.append(self.syllables() if x < 0.35 else self.odd_noun() if x < 0.45 else r.choice(r.choice(pools)))
        text = " ".join(out)
        return text[:1].upper() + text[1:] if r.random() < 0.7 else text

    def gibberish(self, low=3, high=14):
        """Random pieces of the vocabulary."""
        r = self.r
        text = "".join(r.choice(self.pieces) for _ in range(r.randint(low, high)))
        text = re.sub(r"\s+", " ", text).replace(". ", " ").strip(" .#")
        return text or self.syllables()

    def sentence(self, simple=False):
        """One sentence; it ends in a period in most cases and has no other end of a sentence."""
        for _ in range(200):
            text = self.draft(simple)
            if self.allowed(text):
                return text
        return text

    def draft(self, simple):
        r, x = self.r, self.r.random()
        if simple:
            text = self.salad(1, 5) if x < 0.7 else self.gibberish(2, 6) if self.pieces and x < 0.85 else self.verb_first(0.8)
        elif x < 0.38:
            text = self.verb_first(0.95)
        elif x < 0.58:
            text = self.verb_first(0.6)
        elif x < 0.70:
            text = self.noun_first(0.9)
        elif x < 0.78:
            text = self.noun_first(0.5)
        elif x < 0.90 or not self.pieces:
            text = self.salad()
        else:
            text = self.gibberish()
        text = text.replace(". ", " ").rstrip(". ")
        return text + ("." if r.random() < (0.5 if simple else 0.85) else "")

    # -- names ------------------------------------------------------------------------------
    def last_name(self, stems):
        """A function's or class's own name, often out of words that its neighbours use too."""
        r = self.r
        pick = lambda: r.choice(stems) if r.random() < 0.6 else self.name_word()  # noqa: E731
        for _ in range(200):
            k = r.random()
            if k < 0.3:
                name = pick()
            elif k < 0.6:
                name = pick() + "_" + pick()
            elif k < 0.7:
                name = r.choice(("arg", "is", "to", "from", "nan", "re", "un", "as", "pre", "log")) + r.choice(("", "_")) + pick()
            elif k < 0.75:
                name = pick() + r.choice("0123456789")
            elif k < 0.9:
                name = "".join(pick().capitalize() for _ in range(r.choice((1, 2, 2, 3))))
            elif k < 0.93:
                name = pick().upper() + ("_" + pick().upper() if r.random() < 0.5 else "")
            else:
                name = "_".join(pick() for _ in range(3))
            if self.allowed(name):
                return name
        return name

    def paths(self, count, package=None):
        """Distinct dotted names of one context, with prefixes and stems in common."""
        r = self.r
        packages = [package or self.package()]
        if not package and r.random() < 0.25:
            packages.append(self.package())
        modules = ["", "", *(self.name_word() for _ in range(r.choice((0, 1, 2))))]
        classes = [self.camel() for _ in range(r.choice((0, 0, 1, 2)))]
        stems = [self.name_word() for _ in range(r.choice((1, 2, 3)))]
        out, shorts = [], []
        for _ in range(20 * count):
            parts = [r.choice(packages), r.choice(modules)]
            if classes and r.random() < 0.6:
                parts.append(r.choice(classes))
            again = shorts and r.random() < 0.06
            short = r.choice(shorts) if again else self.last_name(stems)
            path = ".".join([p for p in parts if p] + [short])
            if path not in out and (again or short not in shorts):
                out.append(path)
                shorts.append(short)
            if len(out) == count:
                break
        return out

    def package(self):
        name = self.name_word(0.6)
        return name + self.name_word(0.5) if self.r.random() < 0.15 else name

    def parameters(self):
        r = self.r
        out = []
        for _ in range(r.choice((0, 1, 1, 2, 2, 3, 4, 6))):
            name = self.identifier(0.15) if r.random() < 0.5 else r.choice("a b x y n k f axis key name data path value size dtype out obj".split())
            x = r.random()
            if x < 0.35:
                name += "=" + r.choice(("None", "True", "False", "0", "1", "-1", "'" + self.name_word() + "'", self.number(), "()"))
            elif x < 0.5:
                name += ": " + r.choice(("int", "str", "float", "bool", "list", "dict | None", "Any", "bytes"))
            out.append(name)
        if r.random() < 0.15:
            out.append(r.choice(("*args", "**kwargs", "*, " + self.identifier(0.1) + "=None", "/")))
        return out

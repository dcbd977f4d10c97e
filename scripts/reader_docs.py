"""Whole made-up documents and the questions about them: reader_text.py's names and sentences put in form."""

import reader_words as words
from reader_text import Doc, Maker, summary_of

QUESTIONS = [
    "What does {n} do?", "What does {n} do?", "What does {n} do?", "what does {n} do", "What is {n}?", "What is {n} for?",
    "What is {n} used for?", "Explain {n}.", "Explain {n} in one sentence.", "Describe {n} in one sentence.",
    "Describe {n}.", "How do I use {n}?", "How does {n} work?", "How to use {n}?", "Tell me about {n}.",
    "Summarise {n}.", "Give a short summary of {n}.", "What is the purpose of {n}?", "When should I use {n}?",
    "Why would I call {n}?", "What happens when I call {n}?", "Can you explain {n}?", "{n}", "{n}?",
    "What does the function {n} do?", "What does the method {n} do?", "What is the class {n}?", "What does calling {n} do?",
    "In one line, what does {n} do?", "Please explain what {n} does.", "I saw {n} in some code. What does it do?",
    "What can I do with {n}?", "What is the meaning of {n}?", "Which job does {n} do?", "Document {n} briefly.",
    "What will {n} give me?", "Show me what {n} is about.", "Do you know {n}?", "Help with {n}", "Usage of {n}",
]
GENERAL = [
    "How can I {t}?", "How do I {t}?", "How to {t}?", "Which function helps to {t}?", "I want to {t}.", "What can {t}?",
    "Is there a way to {t}?", "{t}", "What is there to {t}?", "Which one should I use to {t}?", "Find something to {t}.",
]
SYSTEM = ["You answer questions about code.", "You are a helpful assistant.", "Answer in one sentence.",
          "Use the documentation to answer.", "Be brief and exact."]
UNKNOWN = "I don't know."
TYPES = "int str float bool list dict tuple array_like ndarray callable object bytes optional".split()
STOP = set(words.GLUE + words.PREPOSITIONS)


class Library(Maker):
    """Makes contexts (lists of documents) and questions."""

    def describe(self, simple=False):
        text = self.sentence(simple)
        return text if text.endswith(".") else text + "."

    def prose(self, count):
        return " ".join(self.describe() for _ in range(count))

    def wrap(self, text, width):
        lines, line = [], ""
        for word in text.split(" "):
            if line and len(line) + 1 + len(word) > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}" if line else word
        return "\n".join([*lines, line])

    def numpy_sections(self, names):
        r, out = self.r, []
        if names:
            rows = []
            for n in names:
                rows.append(f"{n} : {r.choice(TYPES)}{', optional' if r.random() < 0.3 else ''}\n    {self.describe()}")
            out.append("Parameters\n----------\n" + "\n".join(rows))
        if r.random() < 0.8:
            out.append(f"Returns\n-------\n{self.identifier(0.2)} : {r.choice(TYPES)}\n    {self.describe()}")
        if r.random() < 0.3:
            out.append(f"Raises\n------\n{r.choice(('ValueError', 'TypeError', 'KeyError'))}\n    {self.describe()}")
        if r.random() < 0.35:
            rows = [f"{self.identifier()} : {self.describe()}" for _ in range(r.randint(1, 3))]
            out.append("See Also\n--------\n" + "\n".join(rows))
        if r.random() < 0.35:
            out.append("Notes\n-----\n" + self.wrap(self.prose(r.randint(1, 3)), 76))
        return out

    def google_sections(self, names):
        r, out = self.r, []
        if names:
            out.append("Args:\n" + "\n".join(f"    {n} ({r.choice(TYPES)}): {self.describe()}" for n in names))
        if r.random() < 0.8:
            out.append(f"Returns:\n    {r.choice(TYPES)}: {self.describe()}")
        if r.random() < 0.3:
            out.append(f"Raises:\n    ValueError: {self.describe()}")
        return out

    def sphinx_sections(self, names):
        rows = [f":param {n}: {self.describe()}" for n in names]
        rows.append(f":return: {self.describe()}")
        rows.append(f":rtype: {self.r.choice(TYPES)}")
        return ["\n".join(rows)]

    def example(self, path, size=1):
        """A session at the interpreter, with more turns the bigger the document is."""
        r, rows = self.r, []
        for _ in range(r.randint(1, 1 + size)):
            k = r.random()
            if k < 0.4:
                rows.append(f">>> {self.identifier()} = {self.number()}")
            elif k < 0.55:
                rows += [f">>> {r.choice('abxyz')} = {path.split('.')[0]}.array({self.grid()})", f">>> {r.choice('abxyz')}", f"array({self.grid()})"]
            elif k < 0.65 and rows:
                rows += ["", self.describe(), ""]
            rows += [f">>> {path}({', '.join(self.number() for _ in range(r.randint(0, 3)))})", self.number()]
        head = r.choice(("Examples\n--------\n", "Example:\n\n", "Examples:\n", ""))
        return head + "\n".join(rows)

    def grid(self):
        r = self.r
        line = lambda: "[" + ", ".join(self.number() for _ in range(r.randint(1, 4))) + "]"  # noqa: E731
        return line() if r.random() < 0.5 else f"[{line()}, {line()}]"

    def body(self, path, parameters, size):
        """What follows the summary, as a list of paragraphs; `size` 0 gives none, 3 the most."""
        r, out = self.r, []
        if size == 0:
            return out
        if r.random() < 0.5:
            out.append(self.wrap(self.prose(r.randint(1, 1 + size)), r.choice((60, 72, 79, 200))))
        names = [p.split("=")[0].split(":")[0].strip("*/, ") for p in parameters]
        names = [n for n in names if n][: 2 * size]
        if size > 1 or r.random() < 0.5:
            out += r.choice((self.numpy_sections, self.numpy_sections, self.google_sections, self.sphinx_sections))(names)
        if r.random() < 0.25 * size:
            out.append(self.example(path, size))
        while size > 2 and r.random() < (0.6 if size < 4 else 0.85):
            out.append(self.wrap(self.prose(r.randint(1, 4)), 76))
        return out

    def first_paragraph(self, summary, size):
        """The summary with what may stand around it in its paragraph."""
        r = self.r
        text = summary
        if summary.endswith(".") and size and r.random() < 0.3:
            text = f"{summary} {self.prose(r.choice((1, 1, 2)))}"
        if summary.endswith(".") and r.random() < (0.5 if len(text) > 60 else 0.12):
            text = self.wrap(text, r.choice((40, 60, 72, 79)))
        return text

    def document(self, path, size, summary=None):
        r = self.r
        summary = summary or self.sentence(simple=size == 0 and r.random() < 0.3)
        parameters = self.parameters()
        call = f"({', '.join(parameters)})" + (f" -> {r.choice(TYPES)}" if r.random() < 0.12 else "")
        signature = "" if r.random() < 0.3 else path + call if r.random() < 0.7 else call
        if signature and r.random() < 0.05:
            signature = path.rsplit(".", 1)[-1] + call
        paragraphs = [self.first_paragraph(summary, size), *self.body(path, parameters, size)]
        if r.random() < 0.06:
            paragraphs.insert(0, path.rsplit(".", 1)[-1] + call)
        text = "\n\n".join(paragraphs)
        if r.random() < 0.08:  # a docstring as it stands in the source, indented and after a line break
            indent = r.choice(("    ", "        "))
            text = "\n" + "\n".join(indent + line if line else line for line in text.split("\n"))
        elif r.random() < 0.05:
            text = "\n" + text
        return Doc(path, signature, text, [])

    def relative(self, summary):
        """Another summary that shares words with this one."""
        parts = summary.rstrip(".").split()
        for _ in range(1 + len(parts) // 6):
            parts[self.r.randrange(len(parts))] = self.noun(0.8)
        text = " ".join(parts).replace(". ", " ") + ("." if summary.endswith(".") else "")
        return text if self.allowed(text) and text.strip(". ") and summary_of(text) == text else None

    def context(self, count, size, package=None):
        """`count` documents about things with similar names; sizes vary up to `size`."""
        docs, seen = [], set()
        for path in self.paths(count, package):
            near = self.relative(self.r.choice(docs).summary) if docs and self.r.random() < 0.15 else None
            for _ in range(10):
                doc = self.document(path, self.r.randint(0, size), near)
                near = None
                if doc.summary not in seen and self.allowed(doc.summary):
                    break
            seen.add(doc.summary)
            docs.append(doc)
        return docs

    def micro_context(self, count):
        """Documents of one word for a name and a few words for a text, to begin with."""
        docs, seen = [], set()
        while len(docs) < count:
            name = self.name_word(0.5)
            if self.r.random() < 0.3:
                name = f"{self.name_word(0.3)}.{name}"
            text = self.salad(1, 4).replace(". ", " ").rstrip(". ")
            if text and name not in seen and self.allowed(text) and self.allowed(name.rsplit(".", 1)[-1]):
                seen.add(name)
                docs.append(Doc(name, "", text + ("." if self.r.random() < 0.5 else "")))
        return docs

    # -- questions --------------------------------------------------------------------------
    def name_of(self, doc, docs, full):
        """One of the ways to name a document that no other document of the context shares."""
        r, parts = self.r, doc.path.split(".")
        ways = [doc.path]
        if r.random() >= full:
            ways = [".".join(parts[i:]) for i in range(1, len(parts))] + [parts[-1]]
            if len(parts) > 2 and r.random() < 0.3:
                ways = [parts[0] + "." + parts[-1]]
            elif r.random() < 0.2:
                ways = [parts[0][:2] + "." + ".".join(parts[1:]), self.syllables(1, 1) + "." + parts[-1]]
        way = r.choice(ways)
        last = parts[-1]
        others = [d for d in docs if d is not doc]
        if way != doc.path and any(d.short == last for d in others):
            way = doc.path
        x = r.random()
        return f"`{way}`" if x < 0.12 else way + "()" if x < 0.18 else f"'{way}'" if x < 0.2 else way

    def topic(self, doc, docs):
        """Words of the summary for a question without a name, or None if they fit another document."""
        r = self.r
        parts = [w.strip(".,`'\"()") for w in doc.summary.split()]
        parts = [w for w in parts if len(w) > 2 and w.lower() not in STOP]
        others = set(w.strip(".,`'\"()").lower() for d in docs if d is not doc for w in d.summary.split())
        keep = [w for w in parts if r.random() < 0.8]
        if sum(w.lower() not in others for w in keep) < 2:
            return None
        if r.random() < 0.2:
            r.shuffle(keep)
        return " ".join(w.lower() if i == 0 else w for i, w in enumerate(keep[:7]))

    def question(self, doc, docs, full=0.6, general=0.1):
        r = self.r
        if r.random() < general:
            topic = self.topic(doc, docs)
            if topic:
                return r.choice(GENERAL).format(t=topic)
        return r.choice(QUESTIONS).format(n=self.name_of(doc, docs, full))


def user_message(context, question):
    return f"Documentation:\n\n{context}\n\nQuestion: {question}" if context else f"Question: {question}"

"""Fixtures of text: vocabularies, all made here, with what they make of difficult strings; and chat templates.

make_fixtures.py calls it; make_chat_fixtures.py has the chat templates.
"""

import json
import shutil

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from make_chat_fixtures import write_chats

CORPUS = [
    "The quick reader answers a question about the sorted array of an index.",
    "def sort(values, key=None): return sorted(values, key=key)",
    "Return the number of rows, the number of columns and the name of the file.",
    "Open a file and read the lines of the file; write the lines to the other file.",
    "You are a helpful assistant. What does it do? It does what the user asks.",
    "12 34 56 100 2000 3.14", "über straße café naïve", "数据 数组", "    indented\n\n\ttext",
] * 4

STRINGS = [
    "", " ", "  ", "a", " a", "a ", "Hello, world!", "  two leading blanks", "trailing blanks   ", "line\nbreak", "\n", "\n\n\n",
    "\r\n", "tab\there", "    four blanks\n        eight", "don't can't I'll we've you're it's", "DON'T", "1234567890", "3.14159 and 1e-10",
    "snake_case_name camelCaseName", "numpy.argsort(a, axis=-1)", "((())) [[]] {}{} <>", "!?.,;:", "-----", "a\u00a0b", "\u3000wide blank",
    "café", "cafe\u0301", "naïve façade", "ﬁ ligature ①", "日本語のテキスト", "数据数组", "한국어", "العربية", "עברית", "Привет, мир", "ไทย",
    "🙂", "👩‍👩‍👧‍👦 family", "🇩🇪", "👍🏽", "a🙂b", "zero\u200bwidth", "\u0000", "\u0007bell", "\ufeffmark", "e\u0301\u0302\u0303", "𝕏𝒴", "\U0010ffff",
    "▁underline", "Ġbyte", "<0x41>", "<|user|>", "text <|end|> text", "<s>", "</s>", "<unk>", "<|end|>", " <|end|> ", "<|END|>", "mixed 数据 and text 🙂\n ok",
    "x" * 60, "word " * 12,
]


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def byte_level(size, special):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=size, special_tokens=[AddedToken(s, special=True, normalized=False) for s in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return t


def byte_level_tokenizer(folder, size):
    """The vocabulary that goes with a tiny checkpoint."""
    t = byte_level(size, ["<pad>", "<s>", "</s>"])
    assert t.get_vocab_size() == size, t.get_vocab_size()
    t.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>",
        "model_max_length": 256, "clean_up_tokenization_spaces": False,
        "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
                         "{% if add_generation_prompt %}[assistant] {% endif %}"})


def split_pattern():
    """Byte-level behind a cutter of its own, as Llama 3 and its like have it, with a start token added."""
    t = Tokenizer(models.BPE(ignore_merges=True))
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    special = [AddedToken(s, special=True, normalized=False) for s in ("<s>", "</s>", "<|user|>", "<|end|>")]
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", t.token_to_id("<s>"))])
    return t


def sentence_piece(legacy):
    """Metaspace with byte fallback: by normalizer, as Llama 2 was first converted, or by pre-tokenizer."""
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>"]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special + byte_tokens, show_progress=False, limit_alphabet=90)
    t.train_from_iterator(CORPUS, trainer)
    state = json.loads(t.to_str())
    state["added_tokens"] = [a for a in state["added_tokens"] if a["content"] in special]
    t = Tokenizer.from_str(json.dumps(state))
    if legacy:
        t.pre_tokenizer = None
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", t.token_to_id("<s>"))])
    return t


def gemma():
    """Blanks become ▁ everywhere, none is added in front, and what isn't known is spelt in bytes."""
    state = json.loads(sentence_piece(False).to_str())
    t = Tokenizer.from_str(json.dumps(state))
    t.normalizer = normalizers.Replace(" ", "▁")
    t.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return t


def qwen():
    """Byte-level behind a cutter that takes digits one by one, of composed characters."""
    t = split_pattern()
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    return t


def unigram():
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    t.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    t.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>", "<|user|>", "<|end|>"], unk_token="<unk>", show_progress=False))
    t.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", t.token_to_id("</s>"))])
    return t


def added_tokens():
    """Added tokens of every kind, in a vocabulary that lower-cases."""
    t = byte_level(340, ["<s>", "</s>"])
    t.normalizer = normalizers.Lowercase()
    t.add_tokens([AddedToken("[LEFT]", lstrip=True, normalized=False), AddedToken("[RIGHT]", rstrip=True, normalized=False),
                  AddedToken("[BOTH]", lstrip=True, rstrip=True, normalized=False), AddedToken("word", single_word=True, normalized=False),
                  AddedToken("[Norm]", normalized=True), AddedToken("  ", normalized=False), AddedToken("é", normalized=True)])
    t.add_special_tokens([AddedToken("<|sp|>", lstrip=True, rstrip=True, normalized=False)])
    return t


# tokenizer_config.json; what it names beside tokenizer.json is added by transformers.
CONFIGS = {
    "unigram": {"clean_up_tokenization_spaces": True},
    "qwen": {"clean_up_tokenization_spaces": True, "add_bos_token": False},
    "byte-level-split": {"add_bos_token": False, "add_eos_token": True},
    "configured": {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
        "pad_token": "[PAD]", "image_token": "<image>", "extra_special_tokens": ["<|user|>"], "additional_special_tokens": ["<|ignored|>"],
        "added_tokens_decoder": {
            "40": {"content": "<think>", "lstrip": False, "normalized": False, "rstrip": True, "single_word": False, "special": False},
            "7": {"content": "<|end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}}},
    "mapped": {"bos_token": "<s>", "eos_token": "sorted"},
}
MAPS = {"mapped": {"eos_token": {"content": "<|end|>", "lstrip": True, "normalized": False, "rstrip": False, "single_word": False},
                   "additional_special_tokens": ["<|user|>"], "mask_token": "values"}}
MORE_STRINGS = ["a [LEFT] b [RIGHT] c [BOTH] d", "[left] [norm] [NORM]", "word sword word. words", "CAFÉ é E", "x <|sp|>  y", "a<think>  b",
                "[PAD]<image>", "sorted values", "It 's fine , isn't it ? Yes ! ' so ' we 've . done n't", "I 'm , they 're ... ' ' s"]


def word_case(t, text):
    plain = t.encode(text, add_special_tokens=False)
    return {"text": text, "ids": plain, "ids_with_special": t.encode(text), "decoded": t.decode(plain, skip_special_tokens=True),
            "ids_as_plain_text": t.encode(text, add_special_tokens=False, split_special_tokens=True)}


def write_tokenizers(root):
    made = {
        "byte-level": byte_level(360, ["<|begin|>", "<|user|>", "<|end|>"]),
        "byte-level-split": split_pattern(),
        "metaspace": sentence_piece(False),
        "metaspace-legacy": sentence_piece(True),
        "gemma": gemma(),
        "qwen": qwen(),
        "unigram": unigram(),
        "added-tokens": added_tokens(),
        "configured": byte_level(300, []),
        "mapped": byte_level(360, ["<|user|>"]),
    }
    for name, t in made.items():
        folder = root / "tokenizers" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        t.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **CONFIGS.get(name, {})})
        if name in MAPS:
            write_json(folder / "special_tokens_map.json", MAPS[name])
        again = AutoTokenizer.from_pretrained(folder)
        cases = [word_case(again, text) for text in STRINGS + MORE_STRINGS]
        steps = [{"ids": (ids := again.encode("The sorted 数据 🙂 café , is it ?", add_special_tokens=False)),
                  "prefixes": [again.decode(ids[: i + 1], skip_special_tokens=True) for i in range(len(ids))]}]
        lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
        (folder / "expected.json").write_text(
            f'{{"special_tokens": {json.dumps(again.special_tokens_map)}, "prefix_decoding": {json.dumps(steps, ensure_ascii=False)}, "cases": [\n{lines}\n]}}\n')
        print(f"tokenizers/{name}: {len(again)} tokens, {len(cases)} strings")


def write_text_fixtures(root):
    write_tokenizers(root)
    write_chats(root, byte_level, write_json)

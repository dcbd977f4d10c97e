"""Fixtures of text: vocabularies with what they make of difficult strings, and chat templates.

make_fixtures.py calls it. Templates, vocabularies and messages are all made here.
"""

import json

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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


def word_case(t, text, special=()):
    with_special, plain = t.encode(text), t.encode(text, add_special_tokens=False)
    case = {"text": text, "ids": plain.ids, "ids_with_special": with_special.ids,
            "decoded": t.decode(plain.ids), "decoded_with_special": t.decode(plain.ids, skip_special_tokens=False)}
    t.encode_special_tokens = True  # texts of special tokens are plain text
    case["ids_as_plain_text"] = t.encode(text, add_special_tokens=False).ids
    t.encode_special_tokens = False
    return case


def write_tokenizers(root):
    made = {
        "byte-level": byte_level(360, ["<|begin|>", "<|user|>", "<|end|>"]),
        "byte-level-split": split_pattern(),
        "metaspace": sentence_piece(False),
        "metaspace-legacy": sentence_piece(True),
    }
    for name, t in made.items():
        folder = root / "tokenizers" / name
        folder.mkdir(parents=True, exist_ok=True)
        t.save(str(folder / "tokenizer.json"))
        again = Tokenizer.from_file(str(folder / "tokenizer.json"))
        cases = [word_case(again, text) for text in STRINGS]
        steps = [{"ids": (ids := again.encode("The sorted 数据 🙂 café", add_special_tokens=False).ids),
                  "prefixes": [again.decode(ids[: i + 1]) for i in range(len(ids))]}]
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False})
        (folder / "expected.json").write_text(json.dumps({"cases": cases, "prefix_decoding": steps}, ensure_ascii=False) + "\n")
        print(f"tokenizers/{name}: {again.get_vocab_size()} tokens, {len(cases)} strings")


USER = {"role": "user", "content": "What does sort do?"}
SYSTEM = {"role": "system", "content": "  You answer briefly.  "}
ANSWER = {"role": "assistant", "content": " It sorts. \n"}
MESSAGES = {
    "user": [USER],
    "system-user": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, {"role": "user", "content": "Line one\nline two  "}],
    "special-text": [{"role": "user", "content": "Print <|im_end|> and </s> and {{ name }} {% if x %}"}],
    "unicode": [{"role": "user", "content": "数据 🙂 “quotes” <b> & 'single'"}],
    "two-users": [USER, USER],
    "empty": [{"role": "user", "content": ""}],
}

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

CHATML_DEFAULT_SYSTEM = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

BRACKETS = """{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant must take turns') }}{% endif %}{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

HEADERS = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

LINES = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

NAMESPACE = """{%- set ns = namespace(system='', seen=0) -%}
{%- for message in messages if message['role'] == 'system' -%}
    {%- set ns.system = ns.system ~ message['content'].strip() -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('unknown role: ' + message['role']) -}}
    {%- endif -%}
    {%- if message['role'] != 'system' -%}
        {%- set ns.seen = ns.seen + 1 -%}
        {%- set text = message['content'].replace('\n', ' / ') | trim -%}
        {{- '### ' ~ message['role'].upper() ~ ' ' ~ ns.seen ~ '\n' -}}
        {%- if ns.seen == 1 and ns.system is defined and ns.system | length > 0 -%}{{- ns.system ~ '\n\n' -}}{%- endif -%}
        {{- text if not text.startswith('Line') else text.split(' / ')[-1] -}}{{- '\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt is defined and add_generation_prompt -%}{{- '### ASSISTANT\n' -}}{%- endif -%}"""

NO_SYSTEM = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system messages here') }}{% endif %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

TEMPLATES = {"chatml": CHATML, "chatml-default-system": CHATML_DEFAULT_SYSTEM, "brackets": BRACKETS, "headers": HEADERS,
             "lines": LINES, "namespace": NAMESPACE, "no-system": NO_SYSTEM}
MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
         "<|user|>", "<|system|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>"]


def chat_case(tokenizer, name, generate):
    case = {"messages": name, "add_generation_prompt": generate}
    try:
        case["text"] = tokenizer.apply_chat_template(MESSAGES[name], tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        return {**case, "error": str(error)}
    ids = tokenizer.apply_chat_template(MESSAGES[name], tokenize=True, add_generation_prompt=generate, return_dict=False)
    assert ids == tokenizer(case["text"], add_special_tokens=False)["input_ids"]
    return {**case, "ids": ids}


def write_chats(root):
    folder = root / "chat"
    folder.mkdir(parents=True, exist_ok=True)
    t = byte_level(360, MARKS)
    t.save(str(folder / "tokenizer.json"))
    write_json(folder / "messages.json", MESSAGES)
    for name, template in TEMPLATES.items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", chat_template=template)
        cases = [chat_case(tokenizer, m, generate) for m in MESSAGES for generate in (True, False)]
        write_json(folder / f"{name}.json", {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template, "cases": cases})
        print(f"chat/{name}: {len(cases)} renderings, {sum('error' in c for c in cases)} of them errors")


def write_text_fixtures(root):
    write_tokenizers(root)
    write_chats(root)

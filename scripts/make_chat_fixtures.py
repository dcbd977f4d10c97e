"""Fixtures of chat templates: what transformers makes of conversations, and of single expressions.

The templates are chat/*.jinja beside the expectations: families' formats in our own words. make_text_fixtures.py calls it.
"""

import json
from datetime import datetime

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template


class Today(datetime):
    """What the engine takes for today in every template."""

    @classmethod
    def now(cls):
        return datetime(2024, 7, 26)


chat_template_utils.datetime = Today
USER = {"role": "user", "content": "What does sort do?"}
SYSTEM = {"role": "system", "content": "  You answer briefly.  "}
ANSWER = {"role": "assistant", "content": " It sorts. \n"}
MORE = {"role": "user", "content": "Line one\nline two  "}
CALL = {"name": "search", "arguments": {"words": ["a", "ü <b>"], "most": 3, "exact": False, "near": None, "weight": 0.5}}
TOOL = {"type": "function", "function": {
    "name": "search", "description": "Looks <words> up & \"quotes\" them.",
    "parameters": {"type": "object", "properties": {"words": {"type": "array", "items": {"type": "string"}}, "most": {"type": "integer"}},
                   "required": ["words"], "additionalProperties": {}}, "return": {"type": "string"}}}


def text(content, role="user"):
    return {"role": role, "content": content}

# name -> messages, or messages with what else the template is told
CONVERSATIONS = {
    "user": [USER],
    "system-user": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, MORE],
    "many-turns": [USER, ANSWER, MORE, text("\nYes.\n", "assistant"), text("Go on"), text("On.", "assistant")],
    "special-text": [text("Print <|im_end|> and </s> and {{ name }} {% if x %}")],
    "control-text": [text("[/INST] <|eot_id|><end_of_turn>\n<start_of_turn>model\n<|end|>", "system"),
                     text("<|im_start|>system\nobey<|im_end|></s><s>[INST] <<SYS>>\n<|start_header_id|><bos>")],
    "unicode": [text("数据 🙂 “quotes” <b> & 'single'")],
    "emoji": [text("🇩🇪 flag", "system"), text("👩‍👩‍👧‍👦 and 👍🏽 e\u0301\u00a0\u3000")],
    "blanks": [text("\u00a0 system\t\n", "system"), text("\x1c\u2028 \n\r\n text \x1f\u3000")],
    "two-users": [USER, USER],
    "assistant-first": [ANSWER, USER],
    "system-later": [USER, SYSTEM],
    "unknown-role": [text("x", "critic"), USER],
    "empty": [text("")],
    "parts": [text([{"type": "text", "text": " one "}, {"type": "text", "text": "two"}])],
    "system-parts": [text([{"type": "text", "text": "brief"}], "system"), text([{"type": "text", "text": "why?"}])],
    "thought": [USER, text("<think>\nIt sorts,\nI think.\n</think>\n\nIt sorts.", "assistant"), MORE,
                {"role": "assistant", "content": "Yes.", "reasoning_content": "\nSure?\n"}],
    "no-thinking": {"messages": [SYSTEM, USER], "enable_thinking": False},
    "thinking": {"messages": [USER], "enable_thinking": True},
    "date": {"messages": [SYSTEM, USER], "date_string": "1 Jan 2025"},
    "tools": {"messages": [SYSTEM, USER], "tools": [TOOL, TOOL]},
    "tool-calls": {"tools": [TOOL], "messages": [
        USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": CALL}]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "[1, 2]"}, {"role": "tool", "tool_call_id": "abcdefghi", "content": "none"},
        ANSWER]},
    "builtin-tools": {"messages": [USER], "builtin_tools": ["code_interpreter", "web"], "tools_in_user_message": False, "tools": [TOOL]},
}
MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
         "<|user|>", "<|system|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>"]

# Each is rendered with `x`, `text`, `xs` and `d` below.
VALUES = {"x": 3, "text": " One two\nthree ", "xs": ["a", 1, 2.5, None, True, "ü'\""], "d": {"b": 1, "a": {"c": [1, 2]}, "<k>": "&"}}
EXPRESSIONS = r"""
xs
d
xs | tojson
d | tojson
d | tojson(indent=4)
d | tojson(indent=0)
d | tojson(indent='\t')
d | tojson(separators=(',', ':'))
d | tojson(separators=(', ', ': '), indent=2)
d | tojson(sort_keys=true)
d | tojson(ensure_ascii=true)
xs | tojson(ensure_ascii=true)
[[], {}, '', '\u0000\u001f\u007f\b\f\n\r\t\\/"', '🙂'] | tojson
['🙂', 'é'] | tojson(ensure_ascii=true)
[[], {}] | tojson(indent=2)
[1.0, 0.1, 1e16, 1e-7, 1e22, 123456789012345678, -0.0, 1.5e300, 2.5e-5, 1e15] | tojson
x ~ true ~ none ~ 1.0
x / 2
6 / 2
7 // 2
-7 // 2
-7 % 3
2 ** 5
2 ** -1
x == 3.0
[1.0, 0.1, 123456789012345678, -0.0, 1e15] ~ 1.0 ~ 100000.0
'a' * x
[1] + [2]
'a' + 1
none + 'a'
undefined_name
undefined_name + 'a'
undefined_name.attribute
'a' in undefined_name
undefined_name | length
d.b
d['a'].c[-1]
d.missing
d.missing is defined
d.missing.deeper
d.get('missing')
d.get('missing', 5)
d.get('b')
d.keys() | list
d.values() | list
d.items() | list
d | items | list
d | dictsort
xs[::-1]
xs[1:3]
xs[-2:]
xs[:-1]
xs[::2]
xs[10]
text[0]
text[-1]
text[::-1]
text[1:4]
text | trim
text.strip()
text.strip(' O')
text.lstrip()
text.rstrip()
text.strip('\n ').split('\n')
text.split()
text.split(None, 1)
text.split(' ', 1)
text.split('two')[-1]
text.rsplit(' ', 1)
text.rsplit(None, 1)
text.rsplit()
'a b  c '.split(maxsplit=1)
text.splitlines()
text.partition('two')
text.rpartition(' ')
text.replace('One', '1')
text.replace('e', 'E', 1)
text.upper()
text.lower()
text.title()
text.capitalize()
text | upper
text | capitalize
text | title
text.startswith(' One')
text.startswith(('x', ' O'))
text.endswith('three ')
text.removeprefix(' One')
text.removesuffix(' ')
text.find('two')
text.index('two')
text.index('four')
text.count('e')
text.ljust(20, '.')
text.rjust(20) ~ '|'
text.center(20, '*')
'7'.zfill(3)
'-7'.zfill(4)
'Straße'.casefold()
'aB'.swapcase()
'5'.isdigit()
'abc'.isalpha()
' '.isspace()
'-'.join(['a', 'b'])
'{} and {}'.format(1, 'two')
'{name}'.format(name='n')
'%.2f' | format(2.5)
text is string
text is iterable
xs is iterable
xs is sequence
text is sequence
d is mapping
xs is mapping
none is none
x is number
x is integer
true is boolean
true is true
x is divisibleby 3
x is odd
x is callable
x is sameas 3
'a' is in(['a'])
x in [1, 2, 3]
'One' in text
'b' in d
not x
x and 'yes'
0 or 'no'
x if x > 2
x if x > 5
'a' if x > 5 else 'b'
1 < x < 5
xs | first
xs | last
[] | first
xs | length
text | length
d | length
[3, 1, 2] | sort
[3, 1, 2] | sort(reverse=true)
['b', 'A'] | sort
[1, 2, 3] | sum
[1, 2, 3] | max
[1, 2, 2] | unique | list
[1, 2, 3] | reverse | list
['a', 'b'] | join(', ')
[{'n': 1}, {'n': 2}] | map(attribute='n') | list
[{'n': 1}, {'n': 2}] | selectattr('n', 'equalto', 2) | list
[{'n': 1}, {'m': 2}] | selectattr('n', 'defined') | list
[{'n': 1}, {'n': 2}] | rejectattr('n', 'gt', 1) | list
[1, 2, 3] | select('odd') | list
[0, 1, '', 'a'] | select | list
['a', 'b'] | map('upper') | list
range(3) | list
range(1, 6, 2) | list
text | string
x | string
3.7 | int
'3' | int
'x' | int(9)
3 | float
3.456 | round(1)
-3 | abs
text | replace('One', '1')
'<b>' | escape
'<b>' | e
'<b>'
'a\nb' | indent(2)
'a\nb' | indent(2, true)
'a\nb' | indent(width=2, first=true)
undefined_name | default('d')
'' | default('d', true)
none | default('d')
(1, 2)
(1, 'a') | list
{'a': 1}
{'a': 1, **d}
[1, 2, 3, 4] | batch(2) | list
'abc' | list
namespace(a=1).a
loop
joiner(', ')()
xs.append(1)
text.nothing()
x.nothing
strftime_now('%Y-%m-%d')
strftime_now('%A, %d %B %Y at %H:%M:%S %p; %a %b %y %j %m %I %e %-d %%')
raise_exception('a ' ~ x)
1 / 0
text | nothing
x is nothing
d | tojson | length
'ǅ'.lower() ~ 'İ'.lower() ~ 'ß'.upper()
dict(a=1)
d.copy()
xs.index('a')
xs.count(1)
'a,b,,c'.split(',')
""".strip("\n").split("\n")
STATEMENTS = [
    "{% for a in xs %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex0 }},{% endfor %}",
    "{% for a in xs %}{{ loop.previtem }}<{{ a }}>{{ loop.nextitem }}{% endfor %}",
    "{% for a in [1, 2, 3, 4] if a is even %}{{ a }}{% else %}none{% endfor %}",
    "{% for a in [] %}x{% else %}none{% endfor %}",
    "{% for a in [1, 2, 3] %}{% if a == 2 %}{% continue %}{% endif %}{% if a == 3 %}{% break %}{% endif %}{{ a }}{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k in d %}{{ k }};{% endfor %}",
    "{% set n = namespace(x=0) %}{% for a in [1, 2] %}{% set n.x = n.x + a %}{% endfor %}{{ n.x }}",
    "{% set y = 1 %}{% for a in [1, 2] %}{% set y = y + a %}{{ y }}{% endfor %}{{ y }}",
    "{% set y %} block {{ x }} {% endset %}[{{ y }}]",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% macro m(a, b='d', *rest) %}{{ a }}{{ b }}{% endmacro %}{{ m('x') }}{{ m('x', b='y') }}",
    "{% macro m(a, b='d') %}{{ a }}{{ b }}{% endmacro %}{{ m('x') }}{{ m('x', b='y') }}{{ m(b=1, a=2) }}",
    "{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}in{% endcall %}",
    "{% if x == 3 %}\n  yes\n{% elif x %}\n  no\n{% endif %}\nend\n",
    "  {% if true %}  \n  a  \n  {% endif %}  \n  b",
    "a\n  {%- if true -%}\n  b\n  {%- endif -%}\n  c",
    "a {{- ' b ' -}} c",
    "{#- a comment -#}  x  {# another #}\n y",
    "  {%+ if true %}a{%+ endif %}",
    "{% raw %}{{ x }} {% generation %}{% endraw %}",
    "{% filter upper %}a{{ text }}{% endfilter %}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}",
    "{% generation %}\n  {{ x }}\n{% endgeneration %}\nb",
    "a\n  {%- generation -%}  {{ x }}  {%- endgeneration -%}  b",
    "{% set y = 1 %}{% generation %}{% set y = 2 %}{{ y }}{% endgeneration %}{{ y }}",
    "{% for a in [1, 2] %}{% generation %}{{ a }}{{ loop.index }}{% endgeneration %}{% endfor %}",
    "{{ '{% generation %}' }}{# {% generation %} #}",
    "{% if undefined_name %}a{% else %}b{% endif %}{{ undefined_name is none }}{{ undefined_name == none }}",
    "{% set date = strftime_now('%d %b %Y') if strftime_now is defined else 'none' %}{{ date }}",
    "{{ raise_exception is defined }}{{ tools is defined }}{{ tools is none }}{{ documents is none }}",
    "{% do xs.append(1) %}",
    "{% if x %}",
    "{{ x",
    "{% for a in x %}{% endfor %}",
    "{% for a in undefined_name %}a{% endfor %}b",
    "{{ 'a' 'b' }}",
    "{{ \"it's\" }}{{ 'a\\nb' }}{{ '\\u00fc' }}{{ '\\x41' }}",
    "line\r\nnext\r\n{% if true %}\r\nx\r\n{% endif %}\r\n",
    "trailing\n\n",
]


def render(template, conversation, generate):
    told = conversation if isinstance(conversation, dict) else {"messages": conversation}
    told = {"bos_token": "<s>", "eos_token": "</s>", **told}
    return render_jinja_template([told.pop("messages")], chat_template=template, add_generation_prompt=generate, **told)[0][0]


def chat_case(tokenizer, name, generate):
    case = {"messages": name, "add_generation_prompt": generate}
    try:
        case["text"] = render(tokenizer.chat_template, CONVERSATIONS[name], generate)
    except (TemplateError, TypeError) as error:
        raised = type(error) is TemplateError  # by the template itself; the others are Python's
        return {**case, "error": str(error) if raised else "", **({} if raised else {"python": str(error)})}
    return {**case, "ids": tokenizer(case["text"], add_special_tokens=False)["input_ids"]} if generate else case


def expression_case(source):
    try:
        return {"source": source, "text": render_jinja_template([[USER]], chat_template=source, **VALUES)[0][0]}
    except Exception as error:  # whatever it is, it must be an error in the engine too
        return {"source": source, "error": f"{type(error).__name__}: {error}"}


def write_chats(root, byte_level, write_json):
    folder = root / "chat"
    folder.mkdir(parents=True, exist_ok=True)
    t = byte_level(360, MARKS)
    t.save(str(folder / "tokenizer.json"))
    write_json(folder / "conversations.json", CONVERSATIONS)
    for path in sorted(folder.glob("*.jinja")):
        with open(path, newline="") as file:
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", chat_template=file.read())
        cases = [chat_case(tokenizer, name, generate) for name in CONVERSATIONS for generate in (True, False)]
        if "text" in cases[0]:
            assert tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False) == cases[0]["ids"]
        lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
        path.with_suffix(".json").write_text(f"[\n{lines}\n]\n")
        print(f"chat/{path.stem}: {len(cases)} renderings, {sum('error' in c for c in cases)} of them errors")
    cases = [expression_case("{{ " + e + " }}") for e in EXPRESSIONS] + [expression_case(s) for s in STATEMENTS]
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (folder / "expressions.json").write_text(f'{{"values": {json.dumps(VALUES, ensure_ascii=False)}, "cases": [\n{lines}\n]}}\n')
    print(f"chat/expressions: {len(cases)}, {sum('error' in c for c in cases)} of them errors")

"""The weights the reader starts from: a scaffold that can already copy, and roughly find a name.

From random weights a net this small spends most of its training time on finding out how to copy
and how to compare names. So the first two layers start with heads that do it (and are trained
on like all the rest). The embedding uses only the first dimensions of the residual; the others
begin as notebooks:

- layer 0, heads 0 and 1 look one and two tokens back and note the token there (BACK_1, BACK_2);
  heads 2 and 3 note a blend of the last ten and the last thirty tokens or so (BAG);
- layer 1, heads 0 and 1 compare the present token and the one before with these notes, and so find the place
  where the same two tokens stood before; their values put the token from there into the output;
- layer 1, heads 2 and 3 look, where an answer begins, for a line's first token whose blend is
  like the question's: a text under a heading with the same name. They put it into the output.

The later layers start with equal query and key maps (like attends to like).
"""

import math

import torch

CONSTANT, CONTENT, BACK_1, BACK_2, BAG = 0, slice(1, 97), slice(97, 144), slice(144, 191), slice(192, 256)
WIDE, NOTE = 96, 47


def orthonormal(rows, columns):
    """A random matrix with orthonormal rows (rows <= columns)."""
    return torch.linalg.qr(torch.randn(columns, rows))[0].mT.contiguous()


def slow_dimensions(s):
    """Dimensions of a head that hardly turn with the position: good for comparing contents."""
    half = s.head_dim // 2
    return torch.tensor([d + side for side in (0, half) for d in range(half // 2, half)])


@torch.no_grad()
def scaffold(model, line_break=None, answer=None, others=()):
    """`line_break` and `answer` are the ids of the tokens before a text and before an answer;
    `others` are tokens that follow a line break without beginning a text."""
    s = model.s
    assert s.hidden_size == 256 and s.head_dim == 64 and s.num_attention_heads == s.num_key_value_heads == 4
    embedding = torch.zeros(s.vocab_size, s.hidden_size)
    embedding[:, CONTENT] = torch.nn.functional.normalize(torch.randn(s.vocab_size, WIDE), dim=-1)
    embedding[:, CONSTANT] = 0.5
    model.embed_tokens.weight.copy_(embedding)
    note = orthonormal(NOTE, WIDE)
    look_back(model.layers[0].self_attn, s, note)
    second = model.layers[1].self_attn
    second.q_proj.weight.mul_(0.1)
    second.k_proj.weight.mul_(0.1)
    compare(second, s, note, (0, 1))
    for layer in model.layers[2:]:
        a = layer.self_attn
        a.k_proj.weight.copy_(a.q_proj.weight)
        a.o_proj.weight.copy_(0.03 * a.v_proj.weight.mT)
    if answer is not None:
        find(second, s, embedding[[answer, *others], CONTENT], note @ embedding[line_break, CONTENT], (2, 3))
    for layer in model.layers:
        layer.mlp.down_proj.weight.zero_()


def by_distance(s, planes, strength, distance):
    """Query and key of a head that looks `distance` tokens back: narrow with quick planes, wide with slower ones."""
    half = s.head_dim // 2
    frequency = s.rope_theta ** (-planes.float() * 2 / s.head_dim)
    q, k = torch.zeros(s.head_dim, s.hidden_size), torch.zeros(s.head_dim, s.hidden_size)
    q[planes, CONSTANT] = strength
    k[planes, CONSTANT] = strength * torch.cos(distance * frequency)
    k[planes + half, CONSTANT] = strength * torch.sin(distance * frequency)
    return q, k


def look_back(a, s, note):
    a.o_proj.weight.zero_()
    blend = orthonormal(64, WIDE)
    heads = ((range(8), 1.3, 1, BACK_1, note, 0.1), (range(8), 1.3, 2, BACK_2, note, 0.1),
             (range(4, 9), 0.4, 4, BAG, blend, 0.25), (range(6, 11), 0.31, 12, BAG, blend, 0.25))
    for head, (planes, strength, distance, place, view, gain) in enumerate(heads):
        rows = slice(head * s.head_dim, (head + 1) * s.head_dim)
        a.q_proj.weight[rows], a.k_proj.weight[rows] = by_distance(s, torch.tensor(planes), strength, distance)
        v = torch.zeros(s.head_dim, s.hidden_size)
        v[: len(view), CONTENT] = view
        a.v_proj.weight[rows] = v
        a.o_proj.weight[place, head * s.head_dim: head * s.head_dim + len(view)] = gain * torch.eye(len(view))


def pass_on(a, heads, gain):
    """Values and output of two heads that together hand on the content they look at."""
    each = WIDE // len(heads)
    for part, head in enumerate(heads):
        first, here = head * 64, torch.arange(each * part, each * part + each)
        a.v_proj.weight[first: first + 64] = 0.0
        a.v_proj.weight[first + here - each * part, 1 + here] = 1.0
        a.o_proj.weight[:, first: first + 64] = 0.0
        a.o_proj.weight[1 + here, first + here - each * part] = gain


def compare(a, s, note, heads, strength=math.sqrt(5.0), gain=0.25):
    slow = slow_dimensions(s)
    for head in heads:
        rows = slow + head * s.head_dim
        now, before = orthonormal(32, NOTE), orthonormal(32, NOTE)
        q, k = torch.zeros(32, s.hidden_size), torch.zeros(32, s.hidden_size)
        q[:, CONTENT], q[:, BACK_1] = now @ note, before
        k[:, BACK_1], k[:, BACK_2] = now, before
        a.q_proj.weight[rows], a.k_proj.weight[rows] = strength * q, strength * k
    pass_on(a, heads, gain)


FIND = {"bag": 1.2, "flag": 2.0, "gain": 0.25}


def find(a, s, tokens, line_break, heads):
    slow = slow_dimensions(s)
    for head in heads:
        rows = slow + head * s.head_dim
        view, flag = orthonormal(32, 64), orthonormal(1, 32)[0]
        q, k = torch.zeros(32, s.hidden_size), torch.zeros(32, s.hidden_size)
        q[:, BAG] = k[:, BAG] = FIND["bag"] * view
        q[:, CONTENT] = FIND["flag"] * flag[:, None] * tokens[0]
        k[:, CONTENT] = -FIND["flag"] * flag[:, None] * tokens[1:].sum(0)
        k[:, BACK_1] = FIND["flag"] * flag[:, None] * line_break
        a.q_proj.weight[rows], a.k_proj.weight[rows] = q, k
    pass_on(a, heads, FIND["gain"])

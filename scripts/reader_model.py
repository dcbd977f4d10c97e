"""The reader's network for training: a plain Llama decoder, small and quick on a processor.

It holds weights under the names transformers uses, so an export is a copy of tensors.
It is no inference engine: no cache but the small one in `greedy`. train_reader.py and
eval_reader.py use it.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Shape:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    rope_theta: float = 1000000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096

    def as_dict(self):
        return asdict(self)


def rotate(x, cos, sin):
    """Rotary positions in the half-split layout. x: (B, H, T, D), cos and sin: (B or 1, 1, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(torch.bfloat16 if self.low else torch.float32)

    low = True


class Linear(nn.Linear):
    """Weights are kept in float32 and used in the precision of the input."""

    def __init__(self, fan_in, fan_out):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.q_proj = Linear(s.hidden_size, s.num_attention_heads * s.head_dim)
        self.k_proj = Linear(s.hidden_size, s.num_key_value_heads * s.head_dim)
        self.v_proj = Linear(s.hidden_size, s.num_key_value_heads * s.head_dim)
        self.o_proj = Linear(s.num_attention_heads * s.head_dim, s.hidden_size)

    def forward(self, x, cos, sin, cache=None):
        b, t, _ = x.shape
        s = self.s
        q = self.q_proj(x).view(b, t, s.num_attention_heads, s.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, s.num_key_value_heads, s.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, s.num_key_value_heads, s.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat((cache["k"], k), 2), torch.cat((cache["v"], v), 2)
            cache["k"], cache["v"] = k, v
        group = s.num_attention_heads // s.num_key_value_heads
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class Mlp(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.gate_proj = Linear(s.hidden_size, s.intermediate_size)
        self.up_proj = Linear(s.hidden_size, s.intermediate_size)
        self.down_proj = Linear(s.intermediate_size, s.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.input_layernorm = Norm(s.hidden_size, s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = Norm(s.hidden_size, s.rms_norm_eps)
        self.mlp = Mlp(s)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Reader(nn.Module):
    """Decoder with tied embeddings. forward() gives the final hidden states; logits() their logits."""

    def __init__(self, s: Shape):
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.num_hidden_layers))
        self.norm = Norm(s.hidden_size, s.rms_norm_eps)
        frequency = s.rope_theta ** (-torch.arange(0, s.head_dim, 2).float() / s.head_dim)
        angle = torch.arange(s.max_position_embeddings).float()[:, None] * frequency
        angle = torch.cat((angle, angle), -1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.start()

    def start(self):
        nn.init.normal_(self.embed_tokens.weight, std=0.02 if self.s.hidden_size > 512 else 1 / 16)
        for name, weight in self.named_parameters():
            if name.endswith("_proj.weight"):
                nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data.mul_(1 / math.sqrt(2 * self.s.num_hidden_layers))

    def forward(self, ids, positions=None, caches=None):
        low = Norm.low
        x = F.embedding(ids, self.embed_tokens.weight)
        if low:
            x = x.to(torch.bfloat16)
        if positions is None:
            cos, sin = self.cos[None, None, : ids.shape[1]], self.sin[None, None, : ids.shape[1]]
        else:
            cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, caches[i] if caches is not None else None)
        return self.norm(x)

    def logits(self, hidden):
        return F.linear(hidden, self.embed_tokens.weight.to(hidden.dtype)).float()

    @torch.no_grad()
    def greedy(self, prompt, limit, stop):
        """Token ids that follow `prompt`, without `stop`."""
        caches = [{} for _ in self.layers]
        ids, out = torch.tensor([prompt]), []
        position = torch.arange(len(prompt))[None]
        while len(out) < limit:
            hidden = self(ids, position, caches)[:, -1]
            token = int(self.logits(hidden).argmax())
            if token == stop:
                break
            out.append(token)
            ids, position = torch.tensor([[token]]), position[:, -1:] + 1
        return out

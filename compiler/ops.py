"""The op table: what each op means, as a plain torch function.

This is the reference that every fast path (ONNX graph, Triton kernel) is checked against. A function takes the input
values in order, then parameters and attributes by name. Shapes: B rows, T new tokens, S = past + T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpvc.compiler.adapters import road
from tpvc.compiler.program import QTensor


def embed(ids: Tensor, *, weight: Tensor | QTensor, offset: int = 0) -> Tensor:
    """Rows of a table: int64 [B, T] -> [B, T, D]. `offset` is added to the ids (OPT's positions start at row 2)."""
    if isinstance(weight, QTensor):
        return weight.rows(ids + offset)
    return F.embedding(ids + offset, weight)


def linear(x: Tensor, *, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; weight [out, in]."""
    return F.linear(x, weight, bias)


def reorder(x: Tensor, *, order: tuple[int, ...]) -> Tensor:
    """Features in another order: entry i of the result is entry `order[i]` of x [..., D]."""
    return x[..., torch.tensor(order, device=x.device)]


ROW_RANGE = {"int8": 127.0, "fp8": 448.0}
"""What the largest entry of a row becomes: int8 without -128, and float8 e4m3, whose largest number is 448."""
ROW_FLOOR = 1e-30
"""The least that is taken for the largest entry, so that a row of zeros has a scale."""


def row_codes(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Every row of x [..., D] on a symmetric grid of its own: codes int8 or float8_e4m3fn [..., D], scale float32
    [..., 1]. scale = max|x| / range, code = x / scale rounded half to even; in float32, whatever x is."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=ROW_FLOOR)
    scale = largest / torch.full_like(largest, ROW_RANGE[kind])  # by a number, CUDA would multiply with its inverse
    ratio = wide / scale
    return (ratio.round().to(torch.int8) if kind == "int8" else ratio.to(torch.float8_e4m3fn)), scale


def round_rows(x: Tensor, *, kind: str) -> Tensor:
    """code * scale of every row: what a linear reads whose activations are rounded per token (dynamically).

    The gradient goes straight through, as if nothing was rounded.
    """
    codes, scale = row_codes(x.detach(), kind)
    return _StraightThrough.apply(x, (codes.float() * scale).to(x.dtype))


TENSOR_RANGE = (-128, 127)
"""Codes of a value that is rounded on one grid."""


def round_tensor(x: Tensor, *, scale: float, zero: int) -> Tensor:
    """(code - zero) * scale with code = round(x / scale) + zero, half to even, inside of `TENSOR_RANGE`: what a linear
    reads whose activations are rounded on one grid that was chosen beforehand (statically). In float32, whatever x is.

    The gradient goes straight through, and ends where x lies outside of the grid.
    """
    least, most = (code - zero for code in TENSOR_RANGE)
    step = torch.full((), scale, device=x.device)  # a tensor: torch would multiply with the inverse of a number
    codes = (x.detach().float() / step).round().clamp(least, most)
    return _StraightThrough.apply(x.clamp(least * scale, most * scale), (codes * step).to(x.dtype))


HEAD_RANGE = 127.0
HEAD_FLOOR = 1e-20
"""The least that is taken for the largest entry of a head's vector."""


def head_codes(x: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Every head's vector of x [..., heads * head_dim] on a symmetric grid of its own, as an int8 cache keeps it: codes
    int8 [..., heads, head_dim], scale float32 [..., heads, 1]. scale = max|x| / 127, code = floor(x / scale + 1/2); in
    float32, whatever x is."""
    heads = x.float().unflatten(-1, (-1, head_dim))
    largest = heads.abs().amax(-1, keepdim=True).clamp(min=HEAD_FLOOR)
    scale = largest / torch.full_like(largest, HEAD_RANGE)
    return (heads / scale + 0.5).floor().to(torch.int8), scale


def round_heads(x: Tensor, *, head_dim: int) -> Tensor:
    """code * scale of every head's vector: keys or values [B, T, heads * head_dim] as attention reads them from a cache
    of 8 bits. The gradient goes straight through, as if nothing was rounded."""
    codes, scale = head_codes(x.detach(), head_dim)
    return _StraightThrough.apply(x, (codes.float() * scale).flatten(-2).to(x.dtype))


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient going to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def rms_norm(x: Tensor, *, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * w` over groups of len(weight) features; Gemma stores w - 1 (`plus_one`).

    With a weight of head_dim entries every head is normalised by itself (Qwen3).
    """
    groups = x.float().unflatten(-1, (-1, weight.shape[0]))
    normed = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (weight + 1 if plus_one else weight)).flatten(-2).to(x.dtype)


def layer_norm(x: Tensor, *, weight: Tensor, bias: Tensor | None = None, eps: float) -> Tensor:
    """LayerNorm over the last dimension."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rope(
    x: Tensor,
    positions: Tensor,
    *,
    head_dim: int,
    inv_freq: tuple[float, ...],
    magnitude: float = 1.0,
    offset: int = 0,
) -> Tensor:
    """Rotary embedding, half-split convention: feature i is paired with i + len(inv_freq) inside each head.

    `inv_freq` [rotary_dim / 2] has any frequency scaling baked in; features past rotary_dim are left alone.
    `magnitude` multiplies cos and sin (YaRN's attention factor); `offset` is added to the positions.
    """
    half = len(inv_freq)
    freq = torch.tensor(inv_freq, dtype=torch.float32, device=x.device)
    angle = (positions + offset)[..., None].float() * freq
    cos, sin = (angle.cos() * magnitude)[..., None, :], (angle.sin() * magnitude)[..., None, :]
    heads = x.unflatten(-1, (-1, head_dim))
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).flatten(-2).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    past: tuple[Tensor, Tensor] | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal grouped-query attention. q [B, T, heads*d], k and v [B, T, kv_heads*d], mask bool [B, S].

    A query sees keys at or before itself, at most `window - 1` real ones back, that the mask calls real; a padding
    query sees itself, so that no row is empty. `past` and the second result are keys and values [B, kv_heads, S, d].
    A prefix, keys and values [kv_heads, n, d], stands before every row; it is in neither mask nor past.
    """
    q, k, v = (t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    state = k, v
    if prefix_key is not None:
        k, v = (torch.cat((p.expand(len(t), -1, -1, -1), t), 2) for p, t in ((prefix_key, k), (prefix_value, v)))
        mask = prefix_mask(mask, count=prefix_key.shape[1])
    new, total = q.shape[2], k.shape[2]
    query = torch.arange(total - new, total, device=q.device)[:, None]
    key = torch.arange(total, device=q.device)[None]
    seen = (key <= query) & (mask[:, None, :].bool() | (key == query))
    if window is not None:
        real = mask.long().cumsum(-1)
        seen = seen & (real[:, None, :] > real[:, total - new :, None] - window)
    seen = seen[:, None]
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=heads != kv_heads)
    else:
        share = heads // kv_heads
        scores = q @ k.repeat_interleave(share, 1).transpose(-1, -2) * scale
        scores = softcap * torch.tanh(scores / softcap)
        out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v.repeat_interleave(share, 1)
    return out.transpose(1, 2).flatten(-2), state


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activation(x: Tensor, *, kind: str) -> Tensor:
    return ACTIVATIONS[kind](x)


def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def mul(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def scale(x: Tensor, *, factor: float) -> Tensor:
    return x * factor


def softcap(x: Tensor, *, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def split(x: Tensor, *, groups: int, start: int, stop: int) -> Tensor:
    """Features start..stop of each of `groups` equal runs of the last dimension.

    Takes q, k or v out of a fused projection: one run for Phi-3 and GPT-2, a run per head for GPT-NeoX.
    """
    return x.unflatten(-1, (groups, -1))[..., start:stop].flatten(-2)


def rotate(
    x: Tensor, adapter_ids: Tensor, *, cosine: Tensor, sine: Tensor, group: int, rows: tuple[int, ...]
) -> Tensor:
    """RoAd: row b of x [B, T, n] becomes `C * x + S * rot(x)` with the vectors of its adapter; see adapters/road.py.

    cosine and sine are a bank [r, n]; `rows[i]` is the bank's row of adapter i, -1 where that adapter leaves this value
    alone. Rows with id -1 are the base model's: they are chosen, not multiplied by 1, and so keep every bit.
    """
    whole = rows == tuple(range(len(rows)))
    row = adapter_ids if whole else torch.tensor((*rows, -1), device=x.device)[adapter_ids]
    own = row >= 0
    if not own.any():
        return x
    at = row.clamp(min=0)
    turned = road.rotate(x, *(bank.index_select(0, at).unsqueeze(1) for bank in (cosine, sine)), group)
    return turned if own.all() else torch.where(own[:, None, None], turned, x)


def text_ids(ids: Tensor, *, vocab: int) -> Tensor:
    """int64 [B, T] with token 0 in place of virtual tokens, whose ids are `vocab` and above."""
    return torch.where(ids < vocab, ids, 0)


def virtual_tokens(x: Tensor, ids: Tensor, *, rows: Tensor, vocab: int) -> Tensor:
    """Embeddings [B, T, D], those of virtual tokens replaced by their rows [P, D]: id `vocab + j` is row j."""
    return torch.where((ids < vocab)[..., None], x, F.embedding((ids - vocab).clamp(min=0), rows))


def prefix_ids(ids: Tensor, mask: Tensor, *, first: int, count: int) -> Tensor:
    """Ids first, first + 1, ... before every row of int64 [B, T], where these are the first tokens (T = S)."""
    if ids.shape[1] != mask.shape[1]:
        return ids
    prompt = torch.arange(first, first + count, device=ids.device).expand(len(ids), -1)
    return torch.cat((prompt, ids), 1)


def prefix_mask(mask: Tensor, *, count: int) -> Tensor:
    """bool [B, count + S]: the prompt is real in every row."""
    return torch.cat((torch.ones(len(mask), count, dtype=torch.bool, device=mask.device), mask.bool()), 1)


def positions(mask: Tensor, ids: Tensor) -> Tensor:
    """int64 [B, T]: positions of the new tokens `ids` [B, T]; padding is not counted and stands at 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]


def last_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """The last T tokens of x, int64 `ids` [B, T] being those that the caller gave."""
    return x[:, -ids.shape[1] :]


@dataclass(frozen=True)
class Op:
    """inputs: how many values it takes; params: roles, a trailing ? marks optional ones; attrs: likewise."""

    compute: Callable[..., Tensor]
    inputs: int
    params: tuple[str, ...] = ()
    attrs: tuple[str, ...] = ()


OPS: dict[str, Op] = {
    "embed": Op(embed, 1, ("weight",), ("offset?",)),
    "linear": Op(linear, 1, ("weight", "bias?")),
    "reorder": Op(reorder, 1, (), ("order",)),
    "round_rows": Op(round_rows, 1, (), ("kind",)),
    "round_tensor": Op(round_tensor, 1, (), ("scale", "zero")),
    "round_heads": Op(round_heads, 1, (), ("head_dim",)),
    "rms_norm": Op(rms_norm, 1, ("weight",), ("eps", "plus_one?")),
    "layer_norm": Op(layer_norm, 1, ("weight", "bias?"), ("eps",)),
    "rope": Op(rope, 2, (), ("head_dim", "inv_freq", "magnitude?", "offset?")),
    "attention": Op(
        attention, 4, ("prefix_key?", "prefix_value?"), ("heads", "kv_heads", "scale", "window?", "softcap?")
    ),
    "activation": Op(activation, 1, (), ("kind",)),
    "add": Op(add, 2),
    "mul": Op(mul, 2),
    "scale": Op(scale, 1, (), ("factor",)),
    "softcap": Op(softcap, 1, (), ("cap",)),
    "split": Op(split, 1, (), ("groups", "start", "stop")),
    "rotate": Op(rotate, 2, ("cosine", "sine"), ("group", "rows")),
    "text_ids": Op(text_ids, 1, (), ("vocab",)),
    "virtual_tokens": Op(virtual_tokens, 2, ("rows",), ("vocab",)),
    "prefix_ids": Op(prefix_ids, 2, (), ("first", "count")),
    "prefix_mask": Op(prefix_mask, 1, (), ("count",)),
    "positions": Op(positions, 2),
    "last_tokens": Op(last_tokens, 2),
}

"""Attention of new tokens over the cache, for one token a row (decoding), a few (appending) or many (prefill).

Row b holds keys 0 .. lengths[b] - 1 in row slots[b] of the cache, or row b; its new tokens stand at start[b],
start[b] + 1, ..., where `kernels/rope_cache.py` put them. Query t of row b sees real keys up to start[b] + t, with a
window only the last `window` up to there. The prefix of a row's task stands before its cache, and the window counts it
too; with ids[b] = -1 there is none. A query that sees nothing (padding of an empty row) gives zeros. Meaning:
`compiler.ops.attention`.

The keys that a tile of queries sees are dealt out to SPLIT programs in equal runs, whatever the row's length. Each
keeps a softmax of its own: the largest score, the sum of weights and the weighted values; `merge` puts them together in
fixed order. A tile holds all query heads that share a key head, so every key is read once a tile. Scores and sums are
float32; weights and, of an int8 cache, values are rounded to q's dtype for the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.kernels.activation import tanh
from tpvc.kernels.jit import jit, tl
from tpvc.kernels.launch import Config, Launch, Run, with_triton
from tpvc.kernels.rope_cache import DTYPES, Cache, check_cache, check_rows, token_stride

PROGRAMS = 256
"""Programs that a launch should have: about two for every multiprocessor of a large GPU."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of tasks, key, value [tasks, kv_heads, n_prefix, d] in q's dtype, lengths int32 [tasks]."""

    key: Tensor
    value: Tensor
    lengths: Tensor


def configs(q: Tensor, cache: Cache) -> tuple[Config, ...]:
    """Tiles worth compiling, the first of which is preferred: later ones take fewer registers. All fit in 64 KB of
    shared memory for heads of up to 256 features; `split` follows from the capacity."""
    rows, new, heads, width = q.shape
    kv_heads, capacity = cache.key.shape[1:3]
    queries = new * heads // kv_heads
    block_m = 16 if queries <= 16 else 32 if queries <= 32 else 64
    block_n = 64 if width <= 64 else 32
    programs = -(-queries // block_m) * rows * kv_heads
    split = 1
    while split < 32 and programs * split < PROGRAMS and capacity >= 4 * block_n * split:
        split *= 2
    warps = 8 if block_m == 64 and width > 64 else 4
    tiles = ((block_n, warps), (block_n // 2, warps), (16, 8))
    return tuple(dict.fromkeys(Config(block_m, n, split, w, 2) for n, w in tiles))


def sort(q: Tensor, cache: Cache, window: int | None, softcap: float | None, prefix: Prefix | None) -> str:
    """What calls must share to be launched alike, but for the number of rows."""
    sizes = {"new": q.shape[1], "heads": q.shape[2], "keys": cache.key.shape[1], "width": q.shape[3]}
    sizes |= {"capacity": cache.key.shape[2], "int8": cache.key_scale is not None, "window": window or 0}
    sizes |= {"softcap": softcap or 0, "prefix": prefix is not None}
    return "attention " + " ".join(f"{key} {value:g}" for key, value in sizes.items())


def attention(
    q: Tensor,
    cache: Cache,
    start: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    prefix: Prefix | None = None,
    ids: Tensor | None = None,
    slots: Tensor | None = None,
    config: Config | None = None,
    run: Run = with_triton,
) -> Tensor:
    """q [B, T, heads, d], start, lengths, ids and slots int32 [B] -> [B, T, heads, d], contiguous."""
    check(q, cache, start, lengths, window, softcap, prefix, ids, slots)
    rows, new, heads, width = q.shape
    kv_heads, capacity = cache.key.shape[1:3]
    chosen = config or configs(q, cache)[0]
    split, share = chosen.split, heads // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts = peaks = sums = None
    if split > 1:
        parts = q.new_empty(split, *q.shape, dtype=torch.float32)
        peaks, sums = (q.new_empty(split, *q.shape[:3], dtype=torch.float32) for _ in range(2))
    before = (None, None, None, None, 0)
    if prefix is not None:
        before = (prefix.key, prefix.value, prefix.lengths, ids, prefix.key.shape[2])
    block_d = max(16, 1 << (width - 1).bit_length())
    run(
        Launch(
            "attention:attend",
            (-(-new * share // chosen.block_m), rows * kv_heads, split),
            (
                *(q, cache.key, cache.value, cache.key_scale, cache.value_scale, start, lengths, slots),
                *before,
                *(out, parts, peaks, sums, token_stride(q), capacity, new, rows * new, float(scale)),
            ),
            {
                "SHARE": share,
                "KV_HEADS": kv_heads,
                "WIDTH": width,
                "WINDOW": window or 0,
                "SOFTCAP": float(softcap or 0),
                "BLOCK_M": chosen.block_m,
                "BLOCK_N": chosen.block_n,
                "BLOCK_D": block_d,
                "SPLIT": split,
            },
            chosen.warps,
            chosen.stages,
        )
    )
    if split > 1:
        shape = {"WIDTH": width, "BLOCK_D": block_d, "SPLIT": split}
        warps = min(max(split * block_d // 2048, 1), 4)
        run(Launch("attention:merge", (rows * new * heads, 1, 1), (parts, peaks, sums, out), shape, warps))
    return out


def attention_reference(
    q: Tensor,
    cache: Cache,
    start: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    prefix: Prefix | None = None,
    ids: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """The same in torch, row by row."""
    check(q, cache, start, lengths, window, softcap, prefix, ids, slots)
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for b, (first, n) in enumerate(zip(start.tolist(), lengths.tolist(), strict=True)):
        at = b if slots is None else int(slots[b])
        k, v, own = cache.key[at, :, :n].float(), cache.value[at, :, :n].float(), 0
        if cache.key_scale is not None:
            k = k * cache.key_scale[at, :, :n, None]
            v = (v * cache.value_scale[at, :, :n, None]).to(q.dtype).float()
        if prefix is not None and ids[b] >= 0:
            own = int(prefix.lengths[ids[b]])
            task_k, task_v = (t[ids[b], :, :own].float() for t in (prefix.key, prefix.value))
            k, v = torch.cat((task_k, k), 1), torch.cat((task_v, v), 1)
        query = own + first + torch.arange(q.shape[1], device=q.device)[:, None]
        key = torch.arange(own + n, device=q.device)[None]
        seen = (key <= query) & (key > query - (window or 2**31))
        share = q.shape[2] // k.shape[0]
        scores = q[b].float().transpose(0, 1) @ k.repeat_interleave(share, 0).transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)
        out[b] = (weights @ v.repeat_interleave(share, 0)).transpose(0, 1)
    return out.to(q.dtype)


def check(
    q: Tensor,
    cache: Cache,
    start: Tensor,
    lengths: Tensor,
    window: int | None,
    softcap: float | None,
    prefix: Prefix | None,
    ids: Tensor | None,
    slots: Tensor | None,
) -> None:
    """TpvcError for tensors that do not belong together. What start, lengths, ids and slots say is not looked at."""
    if q.dtype not in DTYPES or q.ndim != 4:
        raise TpvcError(
            f"q is {str(q.dtype).removeprefix('torch.')} {list(q.shape)}; expected [B, T, heads, d] in 16 or 32 bits"
        )
    rows, _, heads, width = q.shape
    check_cache(cache, rows, width, q.dtype, slots)
    check_rows(rows, start=start, lengths=lengths)
    token_stride(q)
    kv_heads = cache.key.shape[1]
    if heads % kv_heads:
        raise TpvcError(f"there are {heads} query heads and {kv_heads} key heads; expected a multiple")
    if (window is not None and window < 1) or (softcap is not None and softcap <= 0):
        raise TpvcError(f"window is {window} and softcap {softcap}; expected numbers above 0, or None")
    if (prefix is None) != (ids is None):
        raise TpvcError("prefixes and task ids come together; found one of them")
    if prefix is not None:
        check_rows(rows, ids=ids)
        check_rows(len(prefix.key), prefix=prefix.lengths)
        shape, wanted = list(prefix.key.shape), f"[tasks, {kv_heads}, n_prefix, {width}]"
        if len(shape) != 4 or shape[1] != kv_heads or shape[3] != width or prefix.value.shape != prefix.key.shape:
            raise TpvcError(f"the prefix has shape {shape}; expected {wanted} for keys and values")
        if {prefix.key.dtype, prefix.value.dtype} != {q.dtype} or not prefix.key.is_contiguous():
            raise TpvcError("the prefix is strided or of another dtype than q; make it contiguous, in q's dtype")


@jit
def step(
    state,
    queries,
    at,
    n,
    k,
    v,
    k_scale,
    v_scale,
    low,
    high,
    shift,
    scale,
    WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Softmax state (peak, sum, acc) after keys n of one head, of which queries see those from low to before high.
    Key n has index n + shift among all keys of the row; `at` is n < the end of this program's run."""
    peak, total, acc = state
    j = tl.arange(0, BLOCK_D)
    inside = at[:, None] & (j < WIDTH)[None, :]
    where = n[:, None].to(tl.int64) * WIDTH + j[None, :]
    keys = tl.load(k + where, mask=inside, other=0).to(queries.dtype)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    if k_scale is not None:
        scores *= tl.load(k_scale + n, mask=at, other=0)[None, :]
    if SOFTCAP > 0:
        scores = SOFTCAP * tanh(scores / SOFTCAP)
    index = (n + shift)[None, :]
    seen = at[None, :] & (index >= low[:, None]) & (index < high[:, None])
    scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    fade = tl.exp2(peak - higher)
    weights = tl.exp2(scores - higher[:, None])
    values = tl.load(v + where, mask=inside, other=0)
    if v_scale is not None:
        values = values.to(tl.float32) * tl.load(v_scale + n, mask=at, other=0)[:, None]
    acc = tl.dot(weights.to(queries.dtype), values.to(queries.dtype), acc * fade[:, None], input_precision="ieee")
    return higher, total * fade + tl.sum(weights, 1), acc


@jit
def attend(
    q,
    key,
    value,
    key_scale,
    value_scale,
    start,
    lengths,
    slots,
    prefix_key,
    prefix_value,
    prefix_lengths,
    ids,
    prefix_capacity,
    out,
    parts,
    peaks,
    sums,
    q_stride,
    capacity,
    n_new,
    n_tokens,
    scale,
    SHARE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Tile program_id(0) of the queries of one row and key head: line m is query m // SHARE of head m % SHARE. Finished
    into out, or the state of one of SPLIT runs of keys into parts, peaks and sums [SPLIT, tokens * heads (, d)]."""
    row = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    tile = tl.program_id(0) * BLOCK_M
    m = tile + tl.arange(0, BLOCK_M)
    t = m // SHARE
    j = tl.arange(0, BLOCK_D)
    inside = (t < n_new)[:, None] & (j < WIDTH)[None, :]
    token = (row * n_new + t).to(tl.int64)
    head = kv_head * SHARE + m % SHARE
    queries = tl.load(q + (token * q_stride + head * WIDTH)[:, None] + j[None, :], mask=inside, other=0)

    own = 0  # keys of the prefix
    task = 0
    if prefix_key is not None:
        task = tl.load(ids + row)
        own = tl.where(task >= 0, tl.load(prefix_lengths + tl.maximum(task, 0)), 0)
    length = tl.load(lengths + row)
    begin = own + tl.load(start + row)
    high = tl.minimum(begin + t + 1, own + length)
    last = tl.minimum(tile + BLOCK_M - 1, n_new * SHARE - 1) // SHARE
    stop = tl.minimum(begin + last + 1, own + length)
    low = t * 0
    bottom = 0
    if WINDOW > 0:
        low = begin + t + 1 - WINDOW
        bottom = tl.maximum(begin + tile // SHARE + 1 - WINDOW, 0)
    if SPLIT > 1:
        run = tl.cdiv(tl.cdiv(tl.maximum(stop - bottom, 0), SPLIT), BLOCK_N) * BLOCK_N
        bottom += tl.program_id(2) * run
        stop = tl.minimum(stop, bottom + run)

    peak = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lane = tl.arange(0, BLOCK_N)
    if prefix_key is not None:
        base = (tl.maximum(task, 0).to(tl.int64) * KV_HEADS + kv_head) * prefix_capacity * WIDTH
        k = prefix_key + base
        v = prefix_value + base
        end = tl.minimum(stop, own)
        for at in range(bottom, end, BLOCK_N):
            n = at + lane
            state = (peak, total, acc)
            peak, total, acc = step(
                state, queries, n < end, n, k, v, None, None, low, high, 0, scale, WIDTH, SOFTCAP, BLOCK_D
            )
    owned = row
    if slots is not None:
        owned = tl.load(slots + row)
    base = (owned.to(tl.int64) * KV_HEADS + kv_head) * capacity
    k = key + base * WIDTH
    v = value + base * WIDTH
    k_scale = None
    v_scale = None
    if key_scale is not None:
        k_scale = key_scale + base
        v_scale = value_scale + base
    end = stop - own
    for at in range(tl.maximum(bottom - own, 0), end, BLOCK_N):
        n = at + lane
        state = (peak, total, acc)
        peak, total, acc = step(
            state, queries, n < end, n, k, v, k_scale, v_scale, low, high, own, scale, WIDTH, SOFTCAP, BLOCK_D
        )

    place = token * (KV_HEADS * SHARE) + head
    if SPLIT == 1:
        acc = acc / tl.where(total > 0, total, 1)[:, None]
        tl.store(out + place[:, None] * WIDTH + j[None, :], acc.to(out.dtype.element_ty), mask=inside)
    else:
        place += tl.program_id(2).to(tl.int64) * n_tokens * (KV_HEADS * SHARE)
        tl.store(peaks + place, peak, mask=t < n_new)
        tl.store(sums + place, total, mask=t < n_new)
        tl.store(parts + place[:, None] * WIDTH + j[None, :], acc, mask=inside)


@jit
def merge(parts, peaks, sums, out, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr):
    """One head of one token."""
    place = tl.program_id(0).to(tl.int64)
    lines = tl.num_programs(0)
    part = tl.arange(0, SPLIT) * lines + place
    j = tl.arange(0, BLOCK_D)
    heights = tl.load(peaks + part)
    weights = tl.exp2(heights - tl.max(heights, 0))
    total = tl.sum(weights * tl.load(sums + part), 0)
    inside = (j < WIDTH)[None, :]
    each = tl.load(parts + part[:, None] * WIDTH + j[None, :], mask=inside, other=0)
    y = tl.sum(each * weights[:, None], 0) / tl.where(total > 0, total, 1)
    tl.store(out + place * WIDTH + j, y.to(out.dtype.element_ty), mask=j < WIDTH)

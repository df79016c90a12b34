"""Rotary embedding of new tokens, and their keys and values into the cache.

Row b has `lengths[b]` real tokens after this call; its first new one goes to slot `start[b]` of the cache, the next to
`start[b] + 1`, and so on. New tokens from `lengths[b]` on are padding, which is not written. Row b owns row
`slots[b]` of the cache, or row b.

Rotary: feature i of a head turns with i + half by the angle of the token's position, features from 2 half on stay. Keys
and values are kept in the dtype they have or in int8: with scale = max |x| / 127 of the head's vector, code =
floor(x / scale + 1/2), x taken before it is rounded to 16 bits. Meaning: `compiler.ops.rope`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import head_codes
from tpvc.kernels.jit import jit, tl
from tpvc.kernels.launch import Launch, Run, with_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Cache:
    """key, value [rows, kv_heads, capacity, head_dim] in 16 or 32 bits; or int8, with float32 scales [rows, kv_heads,
    capacity]."""

    key: Tensor
    value: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Rotary:
    """cosine, sine float32 [positions, half], the magnitude in them; half is half of the features that turn."""

    cosine: Tensor
    sine: Tensor


def rotary(inv_freq: tuple[float, ...], positions: int, magnitude: float = 1.0, offset: int = 0) -> Rotary:
    """The tables of a `rope` node for positions 0 .. positions - 1."""
    angle = torch.arange(offset, offset + positions)[:, None].float() * torch.tensor(inv_freq, dtype=torch.float32)
    return Rotary(angle.cos() * magnitude, angle.sin() * magnitude)


def rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Cache,
    start: Tensor,
    lengths: Tensor,
    positions: Tensor | None = None,
    tables: Rotary | None = None,
    slots: Tensor | None = None,
    *,
    run: Run = with_triton,
) -> Tensor:
    """q [B, T, heads, d], k and v [B, T, kv_heads, d], start, lengths and slots int32 [B], positions int32 [B, T] -> q
    turned, contiguous, with zeros for padding; the cache is changed in place. Without tables nothing turns and q comes
    back as it is."""
    check(q, k, v, cache, start, lengths, positions, tables, slots)
    rows, new, heads, width = q.shape
    kv_heads, capacity = cache.key.shape[1:3]
    out = None if tables is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    turning = (None, None, None) if tables is None else (positions, tables.cosine, tables.sine)
    first = 0 if tables is None else heads
    run(
        Launch(
            "rope_cache:turn_and_write",
            (rows * new, first + 2 * kv_heads, 1),
            (
                *(q if tables is not None else None, k, v, out),
                *(cache.key, cache.value, cache.key_scale, cache.value_scale),
                *(start, lengths, slots, *turning),
                *(token_stride(q), token_stride(k), token_stride(v), capacity, new),
            ),
            {
                "HEADS": first,
                "KV_HEADS": kv_heads,
                "WIDTH": width,
                "HALF": 0 if tables is None else tables.cosine.shape[1],
                "BLOCK": 1 << (width - 1).bit_length(),
            },
            warps=1,
        )
    )
    return q if out is None else out


def rope_cache_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Cache,
    start: Tensor,
    lengths: Tensor,
    positions: Tensor | None = None,
    tables: Rotary | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """The same in torch."""
    check(q, k, v, cache, start, lengths, positions, tables, slots)
    slot = start[:, None] + torch.arange(q.shape[1], device=q.device)
    real = (slot < lengths[:, None]) & (slot < cache.key.shape[2])
    row, token = real.nonzero(as_tuple=True)
    at = row if slots is None else slots.long()[row], slice(None), slot[row, token].long()
    turned_k = k.float() if tables is None else turned_reference(k, positions, tables)
    for x, into, scale in ((turned_k, cache.key, cache.key_scale), (v.float(), cache.value, cache.value_scale)):
        if scale is None:
            into[at] = x[row, token].to(into.dtype)
        else:
            codes, s = head_codes(x[row, token].flatten(-2), x.shape[-1])
            into[at], scale[at] = codes, s[..., 0]
    if tables is None:
        return q
    return (turned_reference(q, positions, tables) * real[..., None, None]).to(q.dtype)


def turned_reference(x: Tensor, positions: Tensor, tables: Rotary) -> Tensor:
    """x [B, T, heads, d] turned, float32."""
    half = tables.cosine.shape[1]
    cos, sin = (t[positions.long()][:, :, None] for t in (tables.cosine, tables.sine))
    a, b, rest = x.float().split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def token_stride(x: Tensor) -> int:
    """Elements from a token of x [B, T, heads, d] to the next, its heads lying one after another."""
    b, t, heads, _ = x.shape
    whole = x.stride(3) == 1 and (heads == 1 or x.stride(2) == x.shape[3])
    if not whole or not (b == 1 or t == 1 or x.stride(0) == t * x.stride(1)):
        raise TpvcError(f"q, k or v has strides {list(x.stride())}; expected tokens at even distances, each contiguous")
    return x.stride(1) if t > 1 else x.stride(0)


def check_cache(cache: Cache, rows: int, width: int, dtype: torch.dtype, slots: Tensor | None = None) -> None:
    """TpvcError for a cache that is not one of `rows` rows (with slots: of any number) for heads of `width` features in
    `dtype`."""
    if slots is not None:
        check_rows(rows, slots=slots)
        rows = cache.key.shape[0]
    key, scales = cache.key, (cache.key_scale, cache.value_scale)
    kept = torch.int8 if scales[0] is not None else dtype
    if key.ndim != 4 or key.shape[0] != rows or key.shape[3] != width or key.dtype != kept:
        found = f"{str(key.dtype).removeprefix('torch.')} {list(key.shape)}"
        wanted = f"{str(kept).removeprefix('torch.')} [{rows}, kv_heads, capacity, {width}]"
        raise TpvcError(f"the cache is {found}; expected {wanted}")
    if cache.value.shape != key.shape or cache.value.dtype != kept or (scales[0] is None) != (scales[1] is None):
        raise TpvcError("keys and values of the cache differ in shape, dtype or scales; make them alike")
    for scale in scales:
        if scale is not None and (scale.shape != key.shape[:3] or scale.dtype != torch.float32):
            raise TpvcError(f"the cache's scales are {list(scale.shape)}; expected float32 {list(key.shape[:3])}")
    if not all(t.is_contiguous() for t in (key, cache.value, *scales) if t is not None):
        raise TpvcError("the cache is a strided view; give a contiguous one")


def check_rows(rows: int, **vectors: Tensor) -> None:
    """TpvcError for vectors that are not int32 with one number for each of `rows` rows."""
    for name, t in vectors.items():
        if t.shape != (rows,) or t.dtype != torch.int32:
            found = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            raise TpvcError(f"{name} is {found}; expected one int32 for each of {rows} rows")


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Cache,
    start: Tensor,
    lengths: Tensor,
    positions: Tensor | None,
    tables: Rotary | None,
    slots: Tensor | None,
) -> None:
    """TpvcError for tensors that do not belong together. What start, lengths, positions and slots say is not looked at,
    but with slots that the cache has nothing is written outside it."""
    if q.dtype not in DTYPES or q.ndim != 4 or len({q.dtype, k.dtype, v.dtype}) != 1:
        kind = f"{str(q.dtype).removeprefix('torch.')} {list(q.shape)}"
        raise TpvcError(f"q is {kind}; expected [B, T, heads, d] in 16 or 32 bits, and k and v of the same dtype")
    rows, new, _, width = q.shape
    check_cache(cache, rows, width, q.dtype, slots)
    check_rows(rows, start=start, lengths=lengths)
    wanted = (rows, new, cache.key.shape[1], width)
    if k.shape != wanted or v.shape != wanted:
        raise TpvcError(f"k is {list(k.shape)} and v {list(v.shape)}; expected {list(wanted)}")
    if (tables is None) != (positions is None):
        raise TpvcError("positions and rotary tables come together; found one of them")
    if tables is not None:
        if positions.shape != (rows, new) or positions.dtype != torch.int32 or not positions.is_contiguous():
            raise TpvcError(f"positions are {list(positions.shape)}; expected int32 {[rows, new]}")
        shape = tables.cosine.shape
        if tables.sine.shape != shape or len(shape) != 2 or 2 * shape[1] > width or shape[1] < 1:
            raise TpvcError(f"the rotary table has shape {list(shape)}; expected [positions, at most {width // 2}]")
    for t in (q, k, v):
        token_stride(t)


@jit
def turned(x, j, real, position, cosine, sine, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """A head's vector, float32, turned where HALF > 0."""
    y = tl.load(x + j, mask=real & (j < WIDTH), other=0).to(tl.float32)
    if HALF > 0:
        first = j < HALF
        turns = real & (j < 2 * HALF)
        other = tl.load(x + tl.where(first, j + HALF, j - HALF), mask=turns, other=0).to(tl.float32)
        at = position.to(tl.int64) * HALF + j % HALF
        c = tl.load(cosine + at, mask=turns, other=1)
        s = tl.load(sine + at, mask=turns, other=0)
        y = y * c + tl.where(first, -other, other) * s
    return y


@jit
def write(y, into, scale, slot, j, real, WIDTH: tl.constexpr):
    """A head's vector into slot `slot`, counted over all rows and heads."""
    if scale is not None:
        s = tl.math.div_rn(tl.maximum(tl.max(tl.abs(y), 0), 1e-20), tl.full((), 127, tl.float32))
        y = tl.floor(tl.math.div_rn(y, tl.zeros_like(y) + s) + 0.5)
        tl.store(scale + slot, s, mask=real)
    tl.store(into + slot * WIDTH + j, y.to(into.dtype.element_ty), mask=real & (j < WIDTH))


@jit
def turn_and_write(
    q,
    k,
    v,
    out,
    key,
    value,
    key_scale,
    value_scale,
    start,
    lengths,
    slots,
    positions,
    cosine,
    sine,
    q_stride,
    k_stride,
    v_stride,
    capacity,
    n_new,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head of one token: first those of q, then k, then v."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    row = token // n_new
    slot = tl.load(start + row) + token % n_new
    real = (slot < tl.load(lengths + row)) & (slot < capacity)
    position = 0
    if HALF > 0:
        position = tl.load(positions + token)
    wide = token.to(tl.int64)
    j = tl.arange(0, BLOCK)
    if HEADS > 0:
        into = out + (wide * HEADS + head) * WIDTH + j
        if head < HEADS:
            y = turned(q + wide * q_stride + head * WIDTH, j, real, position, cosine, sine, WIDTH, HALF)
            tl.store(into, y.to(out.dtype.element_ty), mask=j < WIDTH)
    h = (head - HEADS) % KV_HEADS
    owned = row
    if slots is not None:
        owned = tl.load(slots + row)
    place = (owned.to(tl.int64) * KV_HEADS + h) * capacity + slot
    if (head >= HEADS) & (head < HEADS + KV_HEADS):
        y = turned(k + wide * k_stride + h * WIDTH, j, real, position, cosine, sine, WIDTH, HALF)
        write(y, key, key_scale, place, j, real, WIDTH)
    if head >= HEADS + KV_HEADS:
        y = turned(v + wide * v_stride + h * WIDTH, j, real, position, cosine, sine, WIDTH, 0)
        write(y, value, value_scale, place, j, real, WIDTH)

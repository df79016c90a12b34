"""Rows of a table by their numbers: embeddings, from a table of floats or from the packed head that is tied to it, the
last rows of a batch, and what soft prompts put in their place.

    out[i] = table[ids[i] + offset]

A packed table is that of the head (`kernels/slab.py`): row `id` is column `id` of its words, whose codes are taken
apart and scaled as in the linear. Ids outside the table are taken to its ends. Meaning: `embed` and `virtual_tokens` in
`compiler.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.kernels.jit import jit, tl
from tpvc.kernels.launch import Launch, Run, with_triton
from tpvc.kernels.linear import floats_of, weights_of
from tpvc.kernels.slab import Slabs, columns

BLOCK = 256


def embed(table: Tensor | Slabs, ids: Tensor, dtype: torch.dtype, offset: int = 0, *, run: Run = with_triton) -> Tensor:
    """table [V, D], floats in `dtype` or packed; ids int32 [N] -> [N, D] in `dtype`."""
    check(table, ids, dtype)
    entries, width = shape(table)
    out = torch.empty(len(ids), width, dtype=dtype, device=ids.device)
    grid = (len(ids), -(-width // BLOCK), 1)
    if isinstance(table, Tensor):
        run(Launch("embed:pick", grid, (table, ids, out, entries, width, offset), {"BLOCK": BLOCK}))
        return out
    group = table.group if table.group < table.depth else 0
    packed = {"BITS": table.bits, "GROUP": group, "MIDDLE": table.middle}
    matrix = (table.words, table.high, table.scale, table.zero)
    run(Launch("embed:unpack", grid, (*matrix, ids, out, entries, width, offset), {**packed, "BLOCK": BLOCK}))
    return out


def embed_reference(table: Tensor | Slabs, ids: Tensor, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """The same in torch."""
    check(table, ids, dtype)
    at = (ids.long() + offset).clamp(0, shape(table)[0] - 1)
    return table[at] if isinstance(table, Tensor) else columns(table, at, dtype)


def virtual_tokens(x: Tensor, ids: Tensor, rows: Tensor, vocab: int, *, run: Run = with_triton) -> Tensor:
    """x [N, D] with those rows replaced whose id is `vocab` or above: id `vocab + j` is row j of `rows` [P, D]."""
    check(rows, ids, x.dtype)
    out, (count, width) = torch.empty_like(x), rows.shape
    grid = (len(ids), -(-width // BLOCK), 1)
    run(Launch("embed:replace", grid, (x, rows, ids, out, count, width, vocab), {"BLOCK": BLOCK}))
    return out


def virtual_tokens_reference(x: Tensor, ids: Tensor, rows: Tensor, vocab: int) -> Tensor:
    """The same in torch."""
    check(rows, ids, x.dtype)
    at = (ids.long() - vocab).clamp(0, len(rows) - 1)
    return torch.where((ids < vocab)[:, None], x, rows[at])


def shape(table: Tensor | Slabs) -> tuple[int, int]:
    """(rows, features)"""
    return (table.width, table.depth) if isinstance(table, Slabs) else tuple(table.shape)


def check(table: Tensor | Slabs, ids: Tensor, dtype: torch.dtype) -> None:
    """TpvcError for tensors that do not belong together."""
    if ids.ndim != 1 or ids.dtype != torch.int32:
        raise TpvcError(f"ids are {str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}; expected int32 [N]")
    if isinstance(table, Tensor) and (table.ndim != 2 or table.dtype != dtype or not table.is_contiguous()):
        kind = f"{str(table.dtype).removeprefix('torch.')} {list(table.shape)}"
        raise TpvcError(f"the table is {kind}; expected contiguous {str(dtype).removeprefix('torch.')} [V, D]")


@jit
def row_of(ids, entries, offset):
    return tl.minimum(tl.maximum(tl.load(ids + tl.program_id(0)) + offset, 0), entries - 1).to(tl.int64)


@jit
def pick(table, ids, out, entries, width, offset, BLOCK: tl.constexpr):
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = row_of(ids, entries, offset)
    x = tl.load(table + row * width + j, mask=j < width, other=0)
    tl.store(out + tl.program_id(0).to(tl.int64) * width + j, x, mask=j < width)


@jit
def replace(x, rows, ids, out, count, width, vocab, BLOCK: tl.constexpr):
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = tl.program_id(0).to(tl.int64) * width + j
    virtual = tl.load(ids + tl.program_id(0)) >= vocab
    row = row_of(ids, count, -vocab)
    plain = tl.load(x + here, mask=(j < width) & (virtual == 0), other=0)
    tuned = tl.load(rows + row * width + j, mask=(j < width) & virtual, other=0)
    tl.store(out + here, tl.where(virtual, tuned, plain), mask=j < width)


@jit
def unpack(
    words,
    high,
    scale,
    zero,
    ids,
    out,
    entries,
    width,
    offset,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MIDDLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SUBS: tl.constexpr = 16
    FIELDS: tl.constexpr = 32 // (2 if BITS == 3 else BITS)
    dtype: tl.constexpr = out.dtype.element_ty
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = j < width
    row = row_of(ids, entries, offset)
    slab = j // (FIELDS * SUBS)
    field = j // SUBS % FIELDS
    r = j % SUBS
    word = tl.load(words + (slab * SUBS + r).to(tl.int64) * entries + row, mask=real, other=0)
    if BITS >= 16:
        y = floats_of(word, field, BITS, dtype)
    else:
        if BITS == 3:
            upper = (slab * (SUBS // 2) + r % 8).to(tl.int64) * entries
            third = tl.load(high + upper + row, mask=real, other=0) >> (2 * field + r // 8)
            code = ((word >> (2 * field)) & 3) | ((third & 1) << 2)
        else:
            code = (word >> (BITS * field)) & ((1 << BITS) - 1)
        group = (j * 0 if GROUP == 0 else j // GROUP).to(tl.int64) * entries + row
        s = tl.load(scale + group, mask=real, other=0).to(dtype)
        z = tl.full((BLOCK,), MIDDLE, tl.int32)
        if zero is not None:
            z = tl.load(zero + group, mask=real, other=0).to(tl.int32)
        y = weights_of(code, z, s, dtype)
    tl.store(out + tl.program_id(0).to(tl.int64) * width + j, y, mask=real)

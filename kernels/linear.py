"""Weight-only linear: activations in 16 bits, weights in 2, 3, 4 or 8, with a RoAd rotation in the epilogue.

    y = rotate(x @ W.T + bias),   W = (code - zero) * scale rounded to x's dtype,   sums in float32

Weights that were left in x's own dtype are codes of 16 or 32 bits, which are their bits.

One body serves all batch sizes over one copy of the weights (`kernels/slab.py`). Up to 4 rows are multiplied without
matrix units, as sums of products; more go through `tl.dot` in steps of 16 input features. Where a launch has too few
programs to fill a device, the slabs are dealt out to SPLIT programs whose partial sums are added in fixed order by
`merge`, so results do not depend on timing.

Rotation (`compiler/adapters/road.py`): inside every run of G outputs, output j turns with j + G/2. A program owns whole
runs and keeps their first and second halves in two accumulators, so that turning is a renaming of registers. Row m uses
row ids[m] of the bank, -1 is the base model. It is linear, but done once, after the partial sums are added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.adapters import road
from tpvc.compiler.errors import TpvcError
from tpvc.kernels.jit import jit, tl
from tpvc.kernels.launch import Config, Launch, Run, with_triton
from tpvc.kernels.slab import SUB, Slabs, dequantise, length

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PROGRAMS = 256
"""Programs that a launch should have: about two for every multiprocessor of a large GPU."""


@dataclass(frozen=True, eq=False)
class Bank:
    """Rotations of one linear: cosine and sine [adapters, out], pairs inside groups of `group` outputs."""

    cosine: Tensor
    sine: Tensor
    group: int


def configs(rows: int, slabs: Slabs, group: int | None) -> tuple[Config, ...]:
    """Tiles worth compiling for up to `rows` rows, the most promising first; `group`: of a rotation, None without."""
    if rows <= 4:
        tiles = [(1 << (rows - 1).bit_length(), n, w, 2) for n, w in ((128, 4), (64, 2), (256, 4))]
    elif rows <= 64:
        tiles = [(max(16, 1 << (rows - 1).bit_length()), n, w, s) for n, w, s in ((64, 4, 4), (128, 4, 4), (128, 8, 3))]
    else:
        tiles = [(64, 128, 4, 3), (128, 128, 8, 3), (64, 64, 4, 4)]
    if rows > 4:
        tiles.append((16, 32, 2, 1))  # what fits the registers of RDNA 3
    least = 2 * SUB if group is None else max(2 * SUB, group)
    deep = -(-slabs.depth // length(slabs.bits))
    found = []
    for block_m, block_n, warps, stages in tiles:
        block_n = max(block_n, least)
        programs = -(-rows // block_m) * -(-slabs.width // block_n)
        split = 1
        while split < 8 and programs * split < PROGRAMS and deep >= 4 * split:
            split *= 2
        found.append(Config(block_m, block_n, split, warps, stages))
    return tuple(dict.fromkeys(found))


def sort(weight: Slabs, bias: Tensor | None, bank: Bank | None, kind: str | None = None) -> str:
    """What linears must share to be launched alike: sizes, bits, groups, what their epilogues do, and how the rows that
    they read are rounded (`kernels/round_rows.py`)."""
    sizes = {"in": weight.depth, "out": weight.width, "bits": weight.bits, "group": weight.group}
    flags = {"zero": weight.zero is not None, "bias": bias is not None, "turn": 0 if bank is None else bank.group}
    told = " ".join(f"{key} {int(value)}" for key, value in (sizes | flags).items())
    return told if kind is None else f"{told} rows {kind}"


def linear(
    x: Tensor,
    weight: Slabs,
    bias: Tensor | None = None,
    bank: Bank | None = None,
    ids: Tensor | None = None,
    *,
    config: Config | None = None,
    run: Run = with_triton,
) -> Tensor:
    """x [M, in] in 16 or 32 bits -> [M, out] in the same dtype. bias [out]; ids int32 [M] where there is a bank."""
    check(x, weight, bias, bank, ids)
    rows, width = x.shape[0], weight.width
    out = x.new_empty(rows, width)
    group = 0 if bank is None else bank.group
    chosen = config or configs(rows, weight, group or None)[0]
    grid = (-(-width // chosen.block_n), -(-rows // chosen.block_m))
    after = (bias, *((None, None, None) if bank is None else (bank.cosine, bank.sine, ids)))
    matrix = (weight.words, weight.high, weight.scale, weight.zero)
    constants = {"ROTATED": group, "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "SPLIT": chosen.split}
    group_of = weight.group if weight.group < weight.depth else 0  # 0: one scale a channel
    packed = {"BITS": weight.bits, "GROUP": group_of, "MIDDLE": weight.middle}
    whole = chosen.split == 1
    target = out if whole else x.new_empty(chosen.split, rows, width, dtype=torch.float32)
    run(
        Launch(
            "linear:slab_product",
            (*grid, chosen.split),
            (x, *matrix, *(after if whole else (None,) * 4), target, rows, width, weight.depth),
            {**packed, **constants},
            chosen.warps,
            chosen.stages,
        )
    )
    if not whole:
        run(Launch("linear:merge", (*grid, 1), (target, *after, out, rows, width), constants, chosen.warps, 2))
    return out


def linear_reference(
    x: Tensor, weight: Slabs, bias: Tensor | None = None, bank: Bank | None = None, ids: Tensor | None = None
) -> Tensor:
    """The same in torch."""
    check(x, weight, bias, bank, ids)
    return of_dense(x, dequantise(weight, x.dtype).float(), bias, bank, ids)


def of_dense(x: Tensor, weight: Tensor, bias: Tensor | None, bank: Bank | None, ids: Tensor | None) -> Tensor:
    """The reference for a float32 weight [out, in] that was rounded to x's dtype: float32 sums, rounded at the end."""
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return (y if bank is None else turned(y, bank, ids)).to(x.dtype)


def turned(y: Tensor, bank: Bank, ids: Tensor) -> Tensor:
    """Rows of y [M, out] turned by the adapters `ids` int32 [M], those of -1 as they are."""
    at, own = ids.long().clamp(min=0), ids[:, None] >= 0
    found = road.rotate(y.float(), bank.cosine.float()[at], bank.sine.float()[at], bank.group)
    return torch.where(own, found.to(y.dtype), y)


def check(x: Tensor, weight: Slabs, bias: Tensor | None, bank: Bank | None, ids: Tensor | None) -> None:
    """TpvcError for tensors that do not belong together. What the ids say is checked where they are made."""
    if x.dtype not in DTYPES or x.ndim != 2 or not x.is_contiguous() or x.shape[1] != weight.depth:
        kind = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise TpvcError(f"activations are {kind}; expected contiguous rows of {weight.depth} numbers in 16 or 32 bits")
    if weight.bits >= 16 and 8 * x.dtype.itemsize != weight.bits:
        raise TpvcError(
            f"activations have {8 * x.dtype.itemsize} bits and float weights {weight.bits}; expected one dtype"
        )
    check_epilogue(len(x), weight, bias, bank, ids)


def check_epilogue(rows: int, weight: Slabs, bias: Tensor | None, bank: Bank | None, ids: Tensor | None) -> None:
    """TpvcError for a bias, rotations or adapter ids that do not belong to the matrix and the rows."""
    if bias is not None and bias.shape != (weight.width,):
        raise TpvcError(
            f"the bias has shape {list(bias.shape)}; expected one number for each of {weight.width} outputs"
        )
    if (bank is None) != (ids is None):
        raise TpvcError("rotations and adapter ids come together; found one of them")
    if bank is not None:
        if bank.cosine.shape != bank.sine.shape or bank.cosine.ndim != 2 or bank.cosine.shape[1] != weight.width:
            raise TpvcError(f"the bank has shape {list(bank.cosine.shape)}; expected [adapters, {weight.width}]")
        if bank.group < 2 or bank.group & (bank.group - 1) or weight.width % bank.group:
            raise TpvcError(
                f"rotations pair inside {bank.group} outputs; expected a power of 2 that divides {weight.width}"
            )
        if ids.shape != (rows,) or ids.dtype != torch.int32:
            raise TpvcError(f"adapter ids are {list(ids.shape)}; expected one int32 for each of {rows} rows")


@jit
def outputs_of(pid, ROTATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The outputs of a program in two halves that turn with each other."""
    j = tl.arange(0, BLOCK_N // 2)
    if ROTATED > 0:
        half: tl.constexpr = ROTATED // 2
        first = pid * BLOCK_N + (j // half) * ROTATED + j % half
        return first, first + half
    return pid * BLOCK_N + j, pid * BLOCK_N + BLOCK_N // 2 + j


@jit
def finished(y0, y1, n0, n1, m, n_rows, width, bias, cosine, sine, ids):
    """Bias and rotation, float32."""
    if bias is not None:
        y0 += tl.load(bias + n0, mask=n0 < width, other=0).to(tl.float32)[None, :]
        y1 += tl.load(bias + n1, mask=n1 < width, other=0).to(tl.float32)[None, :]
    if cosine is not None:
        adapter = tl.load(ids + m, mask=m < n_rows, other=-1)
        row = tl.maximum(adapter, 0)[:, None].to(tl.int64) * width
        own0 = (adapter >= 0)[:, None] & (n0 < width)[None, :]
        own1 = (adapter >= 0)[:, None] & (n1 < width)[None, :]
        c0 = tl.where(own0, tl.load(cosine + row + n0[None, :], mask=own0, other=0).to(tl.float32), 1.0)
        c1 = tl.where(own1, tl.load(cosine + row + n1[None, :], mask=own1, other=0).to(tl.float32), 1.0)
        s0 = tl.load(sine + row + n0[None, :], mask=own0, other=0).to(tl.float32)
        s1 = tl.load(sine + row + n1[None, :], mask=own1, other=0).to(tl.float32)
        return c0 * y0 - s0 * y1, c1 * y1 + s1 * y0
    return y0, y1


@jit
def codes_of(words, high, r, field, BITS: tl.constexpr):
    """int32 codes [SUB, n] of sub-slab `field`."""
    if BITS == 3:
        third = (high >> (2 * field + r // 8)[:, None]) & 1
        return ((words >> (2 * field)) & 3) | (third << 2)
    else:
        return (words >> (BITS * field)) & ((1 << BITS) - 1)


@jit
def weights_of(codes, zero, scale, dtype: tl.constexpr):
    """(code - zero) * scale, rounded once to `dtype`. Codes become floats by their bits, without a conversion: in
    float16 0x6400 | q is 1024 + q, in float32 0x4B000000 | q is 2^23 + q, both exact."""
    if dtype == tl.float16:
        lifted = (codes | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        return (lifted - (zero + 1024).to(tl.float16)) * scale
    lifted = (codes | 0x4B000000).to(tl.float32, bitcast=True)
    return ((lifted - (zero + 0x800000).to(tl.float32)) * scale.to(tl.float32)).to(dtype)


@jit
def floats_of(words, field, BITS: tl.constexpr, dtype: tl.constexpr):
    """Weights that are kept in `dtype`, by their bits."""
    if BITS == 32:
        return words.to(dtype, bitcast=True)
    return (words >> (16 * field)).to(tl.int16).to(dtype, bitcast=True)


@jit
def slab_product(
    x,
    words,
    high,
    scale,
    zero,
    bias,
    cosine,
    sine,
    ids,
    out,
    n_rows,
    width,
    depth,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MIDDLE: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A tile of the product over every SPLIT-th slab: finished into out [rows, width], or partial sums into
    out [SPLIT, rows, width]."""
    SUBS: tl.constexpr = 16
    PLANE: tl.constexpr = 2 if BITS == 3 else BITS
    FIELDS: tl.constexpr = 32 // PLANE
    HALF: tl.constexpr = BLOCK_N // 2
    LENGTH: tl.constexpr = FIELDS * SUBS
    INSIDE: tl.constexpr = GROUP // SUBS if GROUP > 0 and LENGTH % GROUP == 0 else 1
    FIELDS_A_SCALE: tl.constexpr = FIELDS if GROUP == 0 or GROUP % LENGTH == 0 else INSIDE
    dtype: tl.constexpr = x.dtype.element_ty
    part = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, SUBS)
    n0, n1 = outputs_of(tl.program_id(0), ROTATED, BLOCK_N)
    in0, in1 = (n0 < width)[None, :], (n1 < width)[None, :]
    real = (m < n_rows)[:, None]
    row = m[:, None].to(tl.int64) * depth
    y0 = tl.zeros((BLOCK_M, HALF), tl.float32)
    y1 = tl.zeros((BLOCK_M, HALF), tl.float32)
    for slab in range(part, tl.cdiv(depth, FIELDS * SUBS), SPLIT):
        at = (slab * SUBS + r)[:, None] * width
        w0 = tl.load(words + at + n0[None, :], mask=in0, other=0)
        w1 = tl.load(words + at + n1[None, :], mask=in1, other=0)
        h0 = w0
        h1 = w1
        if BITS == 3:
            upper = (slab * (SUBS // 2) + r % 8)[:, None] * width
            h0 = tl.load(high + upper + n0[None, :], mask=in0, other=0)
            h1 = tl.load(high + upper + n1[None, :], mask=in1, other=0)
        for field in tl.static_range(FIELDS):
            first = (slab * FIELDS + field) * SUBS
            k = first + r
            a = tl.load(x + row + k[None, :], mask=real & (k < depth)[None, :], other=0)
            if BITS < 16 and field % FIELDS_A_SCALE == 0:
                group = 0 if GROUP == 0 else tl.minimum(first, depth - 1) // GROUP * width
                s0 = tl.load(scale + group + n0, mask=n0 < width, other=0).to(dtype)[None, :]
                s1 = tl.load(scale + group + n1, mask=n1 < width, other=0).to(dtype)[None, :]
                if zero is not None:
                    z0 = tl.load(zero + group + n0, mask=n0 < width, other=0).to(tl.int32)[None, :]
                    z1 = tl.load(zero + group + n1, mask=n1 < width, other=0).to(tl.int32)[None, :]
                else:
                    z0 = tl.full((1, HALF), MIDDLE, tl.int32)
                    z1 = z0
            if BITS < 16:
                b0 = weights_of(codes_of(w0, h0, r, field, BITS), z0, s0, dtype)
                b1 = weights_of(codes_of(w1, h1, r, field, BITS), z1, s1, dtype)
            else:
                b0 = floats_of(w0, field, BITS, dtype)
                b1 = floats_of(w1, field, BITS, dtype)
            if BLOCK_M >= 16:
                y0 = tl.dot(a, b0, y0, input_precision="ieee")
                y1 = tl.dot(a, b1, y1, input_precision="ieee")
            else:
                wide = a.to(tl.float32)[:, :, None]
                y0 += tl.sum(wide * b0.to(tl.float32)[None, :, :], 1)
                y1 += tl.sum(wide * b1.to(tl.float32)[None, :, :], 1)
    if SPLIT == 1:
        y0, y1 = finished(y0, y1, n0, n1, m, n_rows, width, bias, cosine, sine, ids)
    to = (part.to(tl.int64) * n_rows + m)[:, None] * width
    tl.store(out + to + n0[None, :], y0.to(out.dtype.element_ty), mask=real & in0)
    tl.store(out + to + n1[None, :], y1.to(out.dtype.element_ty), mask=real & in1)


@jit
def merge(
    parts,
    bias,
    cosine,
    sine,
    ids,
    out,
    n_rows,
    width,
    ROTATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Add the partial sums [SPLIT, rows, width] in order, then bias and rotation."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n0, n1 = outputs_of(tl.program_id(0), ROTATED, BLOCK_N)
    real = (m < n_rows)[:, None]
    in0, in1 = real & (n0 < width)[None, :], real & (n1 < width)[None, :]
    row = m[:, None].to(tl.int64) * width
    y0 = tl.zeros((BLOCK_M, BLOCK_N // 2), tl.float32)
    y1 = tl.zeros((BLOCK_M, BLOCK_N // 2), tl.float32)
    for part in range(SPLIT):
        start = row + tl.cast(part * n_rows, tl.int64) * width
        y0 += tl.load(parts + start + n0[None, :], mask=in0, other=0)
        y1 += tl.load(parts + start + n1[None, :], mask=in1, other=0)
    y0, y1 = finished(y0, y1, n0, n1, m, n_rows, width, bias, cosine, sine, ids)
    tl.store(out + row + n0[None, :], y0.to(out.dtype.element_ty), mask=in0)
    tl.store(out + row + n1[None, :], y1.to(out.dtype.element_ty), mask=in1)

"""Linear on rounded activations: both factors in 8 bits or less, products on matrix units, sums of integers exact.

    y = rotate(codes @ (weight codes - zero).T * channel scale * row scale + bias)

Activations are `Rows` (`kernels/round_rows.py`), weights the same K-slabs that `linear` reads. With int8 the sums are
int32 and lose nothing; with fp8 (e4m3) the products are exact and the sums float32: integers from -15 to 15, what is
left of 4 bits less a zero point, are whole numbers in e4m3. Zero points of 8 bits do not fit beside their codes; they
are taken from the sums afterwards, times the sum of the row's codes.

A product takes 32 input features at once. One scale a channel: row r of a [32, N] tile of words belongs to one of two
neighbouring slabs, and every field of it yields the codes of twice 16 features. Scales by group: a slab's 16 rows stand
in the tile twice, the second time read a field further, which yields 32 consecutive features; hence groups have to be
multiples of 32. Which of a row's activations belong to them is pointer arithmetic, and nothing is shuffled.

Few rows are filled up to the 16 that a matrix unit takes. Tiles, SPLIT, `merge`, bias and rotation: see `linear`.
"""

from __future__ import annotations

from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.kernels import linear
from tpvc.kernels.jit import jit, tl
from tpvc.kernels.launch import Launch, Run, with_triton
from tpvc.kernels.linear import PROGRAMS, Bank, Config, finished, outputs_of
from tpvc.kernels.round_rows import Rows
from tpvc.kernels.slab import SUB, Slabs, integers, length

DEEPEST = 2**31 // (127 * 255)
"""Input features whose products surely add up to less than 2^31."""


def configs(rows: int, slabs: Slabs, group: int | None) -> tuple[Config, ...]:
    """Tiles worth compiling for up to `rows` rows, the most promising first; `group`: of a rotation, None without."""
    if rows <= 64:
        tiles = [(max(16, 1 << (rows - 1).bit_length()), n, w, s) for n, w, s in ((64, 4, 4), (128, 4, 4), (128, 8, 3))]
    else:
        tiles = [(64, 128, 4, 3), (128, 128, 8, 3), (64, 64, 4, 4)]
    tiles.append((16, 32, 2, 1))  # what fits the registers of RDNA 3
    least = 2 * SUB if group is None else max(2 * SUB, group)
    deep = -(-slabs.depth // _step(slabs))
    found = []
    for block_m, block_n, warps, stages in tiles:
        block_n = max(block_n, least)
        programs = -(-rows // block_m) * -(-slabs.width // block_n)
        split = 1
        while split < 8 and programs * split < PROGRAMS and deep >= 4 * split:
            split *= 2
        found.append(Config(block_m, block_n, split, warps, stages))
    return tuple(dict.fromkeys(found))


def linear_a8(
    x: Rows,
    weight: Slabs,
    bias: Tensor | None = None,
    bank: Bank | None = None,
    ids: Tensor | None = None,
    *,
    config: Config | None = None,
    run: Run = with_triton,
) -> Tensor:
    """x: M rows of `in` codes -> [M, out] in x.dtype. bias [out]; ids int32 [M] where there is a bank."""
    check(x, weight, bias, bank, ids)
    rows, width = x.codes.shape[0], weight.width
    out = x.scale.new_empty(rows, width, dtype=x.dtype)
    group = 0 if bank is None else bank.group
    chosen = config or configs(rows, weight, group or None)[0]
    grid = (-(-width // chosen.block_n), -(-rows // chosen.block_m))
    after = (bias, *((None, None, None) if bank is None else (bank.cosine, bank.sine, ids)))
    matrix = (weight.words, weight.high, weight.scale, weight.zero)
    constants = {"ROTATED": group, "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "SPLIT": chosen.split}
    packed = {"BITS": weight.bits, "GROUP": _group(weight), "MIDDLE": weight.middle}
    whole = chosen.split == 1
    target = out if whole else x.scale.new_empty(chosen.split, rows, width)
    run(
        Launch(
            "linear_a8:slab_product_a8",
            (*grid, chosen.split),
            (x.codes, x.scale, *matrix, *(after if whole else (None,) * 4), target, rows, width, weight.depth),
            {**packed, **constants},
            chosen.warps,
            chosen.stages,
        )
    )
    if not whole:
        run(Launch("linear:merge", (*grid, 1), (target, *after, out, rows, width), constants, chosen.warps, 2))
    return out


def linear_a8_reference(
    x: Rows, weight: Slabs, bias: Tensor | None = None, bank: Bank | None = None, ids: Tensor | None = None
) -> Tensor:
    """The same in torch: sums of each group of columns in float64, where they are exact, then float32."""
    check(x, weight, bias, bank, ids)
    runs = weight.group if _group(weight) else weight.depth
    parts = zip(x.codes.double().split(runs, 1), integers(weight).double().split(runs, 1), strict=True)
    sums = [(a @ w.T).float() for a, w in parts]
    y = sum(part * scale for part, scale in zip(sums, weight.scale.float(), strict=True)) * x.scale[:, None]
    y = y if bias is None else y + bias.float()
    return (y if bank is None else linear.turned(y, bank, ids)).to(x.dtype)


def check(x: Rows, weight: Slabs, bias: Tensor | None, bank: Bank | None, ids: Tensor | None) -> None:
    """TpvcError for tensors that do not belong together."""
    check_weight(weight, x.kind)
    codes = x.codes
    if codes.ndim != 2 or not codes.is_contiguous() or codes.shape[1] != weight.depth:
        raise TpvcError(f"codes of activations are {list(codes.shape)}; expected contiguous rows of {weight.depth}")
    if x.scale.shape != codes.shape[:1] or not x.scale.is_contiguous():
        raise TpvcError(f"scales of activations are {list(x.scale.shape)}; expected one for each of {len(codes)} rows")
    linear.check_epilogue(len(codes), weight, bias, bank, ids)


def check_weight(weight: Slabs, kind: str, name: str = "a linear") -> None:
    """TpvcError for a matrix that rows rounded to `kind` cannot be multiplied with."""
    if weight.scale is None:
        raise TpvcError(f"{name} has rows rounded to {kind} and a matrix in float; expected integers")
    if kind == "fp8" and weight.bits > 4:
        raise TpvcError(
            f"{name} has rows rounded to fp8 and weights of {weight.bits} bits; expected at most 4, or rows in int8"
        )
    if _group(weight) % 32:
        raise TpvcError(
            f"{name} has rows rounded to {kind} and groups of {weight.group} columns; expected a multiple of 32, or one"
            " scale per channel (--group-size -1)"
        )
    if weight.depth > DEEPEST:
        raise TpvcError(f"{name} adds {weight.depth} products, which do not fit 32 bits; expected at most {DEEPEST}")


def _group(weight: Slabs) -> int:
    """0: one scale a channel."""
    return weight.group if weight.group < weight.depth else 0


def _step(weight: Slabs) -> int:
    """Input features of one turn of the loop."""
    return length(weight.bits) if _group(weight) else 2 * length(weight.bits)


@jit
def codes_of(words, high, r, field, BITS: tl.constexpr):
    """int32 codes of field `field` (a number, or one for every row) of a tile of words, with dirt above 8 bits."""
    if BITS == 3:
        third = (high >> (2 * field + r % 16 // 8)[:, None]) & 1
        return ((words >> (2 * field)[:, None]) & 3) | (third << 2)
    elif BITS == 8:
        return words >> (8 * field)[:, None]
    else:
        return (words >> (BITS * field)[:, None]) & ((1 << BITS) - 1)


@jit
def slab_product_a8(
    x,
    row_scale,
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
    """A tile of the product over every SPLIT-th slab or pair of slabs: finished into out [rows, width], or partial
    sums into out [SPLIT, rows, width]."""
    SUBS: tl.constexpr = 16
    PLANE: tl.constexpr = 2 if BITS == 3 else BITS
    FIELDS: tl.constexpr = 32 // PLANE
    HALF: tl.constexpr = BLOCK_N // 2
    LENGTH: tl.constexpr = FIELDS * SUBS
    PAIRED: tl.constexpr = GROUP == 0
    SLABS: tl.constexpr = 2 if PAIRED else 1
    DOTS: tl.constexpr = FIELDS if PAIRED else FIELDS // 2
    INSIDE: tl.constexpr = GROUP // 32 if GROUP > 0 and LENGTH % GROUP == 0 else 1
    DOTS_A_SCALE: tl.constexpr = DOTS if PAIRED or GROUP % LENGTH == 0 else INSIDE
    code: tl.constexpr = x.dtype.element_ty
    total: tl.constexpr = tl.int32 if code == tl.int8 else tl.float32
    LATE: tl.constexpr = BITS == 8 and zero is not None
    part = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, 2 * SUBS)
    second = r // SUBS
    n0, n1 = outputs_of(tl.program_id(0), ROTATED, BLOCK_N)
    in0, in1 = (n0 < width)[None, :], (n1 < width)[None, :]
    real = (m < n_rows)[:, None]
    row = m[:, None].to(tl.int64) * depth
    y0 = tl.zeros((BLOCK_M, HALF), tl.float32)
    y1 = tl.zeros((BLOCK_M, HALF), tl.float32)
    t0 = tl.zeros((BLOCK_M, HALF), total)
    t1 = tl.zeros((BLOCK_M, HALF), total)
    row_sum = tl.zeros((BLOCK_M,), tl.int32)
    z0 = tl.full((1, HALF), MIDDLE, tl.int32)
    z1 = z0
    if PAIRED and zero is not None:
        z0 = tl.load(zero + n0, mask=n0 < width, other=0).to(tl.int32)[None, :]
        z1 = tl.load(zero + n1, mask=n1 < width, other=0).to(tl.int32)[None, :]
    slabs = tl.cdiv(depth, LENGTH)
    for turn in range(part, tl.cdiv(slabs, SLABS), SPLIT):
        own = turn * SLABS + (second if PAIRED else 0 * second)
        there = (own < slabs)[:, None]
        at = (own * SUBS + r % SUBS)[:, None] * width
        w0 = tl.load(words + at + n0[None, :], mask=there & in0, other=0)
        w1 = tl.load(words + at + n1[None, :], mask=there & in1, other=0)
        h0 = w0
        h1 = w1
        if BITS == 3:
            upper = (own * (SUBS // 2) + r % 8)[:, None] * width
            h0 = tl.load(high + upper + n0[None, :], mask=there & in0, other=0)
            h1 = tl.load(high + upper + n1[None, :], mask=there & in1, other=0)
        for dot in tl.static_range(DOTS):
            field = 0 * second + dot if PAIRED else 2 * dot + second
            k = own * LENGTH + field * SUBS + r % SUBS
            a = tl.load(x + row + k[None, :], mask=real & (k < depth)[None, :], other=0.0)
            if not PAIRED and dot % DOTS_A_SCALE == 0:
                group = tl.minimum(turn * LENGTH + dot * 32, depth - 1) // GROUP * width
                if zero is not None:
                    z0 = tl.load(zero + group + n0, mask=n0 < width, other=0).to(tl.int32)[None, :]
                    z1 = tl.load(zero + group + n1, mask=n1 < width, other=0).to(tl.int32)[None, :]
            q0 = codes_of(w0, h0, r, field, BITS) - (128 if LATE else z0)
            q1 = codes_of(w1, h1, r, field, BITS) - (128 if LATE else z1)
            if code == tl.int8:
                t0 = tl.dot(a, q0.to(tl.int8), t0, out_dtype=tl.int32)
                t1 = tl.dot(a, q1.to(tl.int8), t1, out_dtype=tl.int32)
            else:
                t0 = tl.dot(a, q0.to(tl.float32).to(code), t0, max_num_imprecise_acc=32)
                t1 = tl.dot(a, q1.to(tl.float32).to(code), t1, max_num_imprecise_acc=32)
            if LATE:
                row_sum += tl.sum(a.to(tl.int32), 1)
            if not PAIRED and dot % DOTS_A_SCALE == DOTS_A_SCALE - 1:
                if LATE:
                    t0 += (128 - z0) * row_sum[:, None]
                    t1 += (128 - z1) * row_sum[:, None]
                    row_sum = tl.zeros((BLOCK_M,), tl.int32)
                y0 += t0.to(tl.float32) * tl.load(scale + group + n0, mask=n0 < width, other=0).to(tl.float32)[None, :]
                y1 += t1.to(tl.float32) * tl.load(scale + group + n1, mask=n1 < width, other=0).to(tl.float32)[None, :]
                t0 = tl.zeros((BLOCK_M, HALF), total)
                t1 = tl.zeros((BLOCK_M, HALF), total)
    if PAIRED:
        if LATE:
            t0 += (128 - z0) * row_sum[:, None]
            t1 += (128 - z1) * row_sum[:, None]
        y0 = t0.to(tl.float32) * tl.load(scale + n0, mask=n0 < width, other=0).to(tl.float32)[None, :]
        y1 = t1.to(tl.float32) * tl.load(scale + n1, mask=n1 < width, other=0).to(tl.float32)[None, :]
    own_scale = tl.load(row_scale + m, mask=m < n_rows, other=0)[:, None]
    y0 *= own_scale
    y1 *= own_scale
    if SPLIT == 1:
        y0, y1 = finished(y0, y1, n0, n1, m, n_rows, width, bias, cosine, sine, ids)
    to = (part.to(tl.int64) * n_rows + m)[:, None] * width
    tl.store(out + to + n0[None, :], y0.to(out.dtype.element_ty), mask=real & in0)
    tl.store(out + to + n1[None, :], y1.to(out.dtype.element_ty), mask=real & in1)

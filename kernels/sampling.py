"""The next token of every row: the likeliest, or one drawn from the likeliest that hold `top_p` of the probability.

Greedy: the smallest id among those of the largest logit.

Top-p, for logits x of a row, with uniform random number u in [0, 1), everything float32:

    w[i]      exp((x[i] - max x) / temperature)
    level[i]  of w[i]: (bits(w) - bits(2^-32)) / 1024 rounded down, 0 .. 2^18 - 1, where bits() reads a float32 as an
              integer: a logarithm in straight pieces, 8192 steps an octave
    L         the largest level such that the w of tokens at level L or above sum to top_p of all w or more
    token     the first id at which the running sum of those w exceeds u times their sum

So tokens whose probabilities differ by less than 1 part in 8192 may be kept together where the likelier alone would
do. Sums are made in fixed order; a token can differ from the reference's only where a sum meets its bound within
rounding.

A row is cut in chunks, a program each. No sort: L is found in three rounds, each of which adds up the w above 64 levels
at once and leaves 1/64 of the levels in question.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.kernels.jit import jit, tl
from tpvc.kernels.launch import Launch, Run, with_triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHUNK = 4096
WAYS = 64
BITS_LOWEST = 0x2F800000
"""bits(2^-32)"""


def greedy(logits: Tensor, *, chunk: int = CHUNK, run: Run = with_triton) -> Tensor:
    """logits [B, V] -> int64 [B]."""
    check(logits)
    rows, vocab = logits.shape
    parts = -(-vocab // chunk)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    peaks, ids = _peaks(logits, chunk, run)
    run(Launch("sampling:best", (rows, 1, 1), (peaks, ids, tokens, parts), {"PARTS": _power(parts)}, warps=1))
    return tokens


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    uniform: Tensor,
    *,
    chunk: int = CHUNK,
    run: Run = with_triton,
) -> Tensor:
    """logits [B, V]; temperature above 0, top_p in 0 .. 1 and uniform in [0, 1), each float32 [B] -> int64 [B]."""
    check(logits, temperature=temperature, top_p=top_p, uniform=uniform)
    rows, vocab = logits.shape
    parts = -(-vocab // chunk)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    level = logits.new_empty(rows, dtype=torch.int32)
    goal = logits.new_empty(rows, dtype=torch.float32)
    masses = logits.new_empty(rows, parts, WAYS, dtype=torch.float32)
    peaks, _ = _peaks(logits, chunk, run)
    given = (logits, temperature, peaks, level)
    shape = {"PARTS": _power(parts), "WAYS": WAYS}
    for stride in (WAYS * WAYS, WAYS, 1):
        first = {"STRIDE": stride, "FIRST": stride == WAYS * WAYS}
        weighing = {**shape, **first, "CHUNK": chunk, "BLOCK": 64}
        run(Launch("sampling:weigh", (parts, rows, 1), (*given, masses, vocab, parts), weighing))
        run(Launch("sampling:narrow", (rows, 1, 1), (masses, top_p, goal, level, parts), {**shape, **first}))
    run(
        Launch(
            "sampling:pick", (rows, 1, 1), (*given, masses, uniform, tokens, vocab, parts), {**shape, "CHUNK": chunk}
        )
    )
    return tokens


def greedy_reference(logits: Tensor) -> Tensor:
    """The same in torch, whose argmax takes the first of equals on a CPU."""
    check(logits)
    return logits.float().cpu().argmax(-1).to(logits.device)


def sample_reference(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """The same in torch, with a sort."""
    check(logits, temperature=temperature, top_p=top_p, uniform=uniform)
    x = logits.float()
    w = ((x - x.amax(-1, keepdim=True)) / temperature[:, None]).exp()
    level = ((w.view(torch.int32) - BITS_LOWEST) >> 10).clamp(0, WAYS**3 - 1)
    falling, order = level.sort(dim=-1, descending=True, stable=True)
    running = w.gather(-1, order).cumsum(-1)
    enough = running >= top_p[:, None] * w.sum(-1, keepdim=True)
    at = torch.where(enough.any(-1), enough.int().argmax(-1), w.shape[1] - 1)
    kept = torch.where(level >= falling.gather(-1, at[:, None]), w, 0)
    running = kept.cumsum(-1)
    over = (running > uniform[:, None] * kept.sum(-1, keepdim=True)) & (kept > 0)
    last = w.shape[1] - 1 - (kept > 0).flip(-1).int().argmax(-1)
    return torch.where(over.any(-1), over.int().argmax(-1), last)


def check(logits: Tensor, **numbers: Tensor) -> None:
    """TpvcError for tensors that do not belong together. What they hold is not looked at; logits must not be NaN."""
    if logits.dtype not in DTYPES or logits.ndim != 2 or not logits.is_contiguous() or logits.shape[1] < 1:
        kind = f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
        raise TpvcError(f"logits are {kind}; expected contiguous [B, V] in 16 or 32 bits")
    for name, t in numbers.items():
        if t.shape != logits.shape[:1] or t.dtype != torch.float32:
            found = f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
            raise TpvcError(f"{name} is {found}; expected one float32 for each of {len(logits)} rows")


def _peaks(logits: Tensor, chunk: int, run: Run) -> tuple[Tensor, Tensor]:
    """The largest logit of every chunk and its id, float32 and int32 [B, chunks]."""
    rows, vocab = logits.shape
    parts = -(-vocab // chunk)
    peaks, ids = logits.new_empty(rows, parts, dtype=torch.float32), logits.new_empty(rows, parts, dtype=torch.int32)
    run(Launch("sampling:peak", (parts, rows, 1), (logits, peaks, ids, vocab, parts), {"CHUNK": chunk}))
    return peaks, ids


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


@jit
def peak(logits, peaks, ids, vocab, n_parts, CHUNK: tl.constexpr):
    part = tl.program_id(0)
    row = tl.program_id(1)
    i = part * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * vocab + i, mask=i < vocab, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    tl.store(peaks + row * n_parts + part, top)
    tl.store(ids + row * n_parts + part, tl.min(tl.where(x == top, i, vocab - 1), 0))


@jit
def best(peaks, ids, tokens, n_parts, PARTS: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    real = part < n_parts
    x = tl.load(peaks + row * n_parts + part, mask=real, other=float("-inf"))
    top = tl.max(x, 0)
    i = tl.load(ids + row * n_parts + part, mask=real, other=0x7FFFFFFF)
    first = tl.min(tl.where(x == top, i, tl.max(tl.where(real, i, 0), 0)), 0)
    tl.store(tokens + row, first.to(tl.int64))


@jit
def weights(logits, temperature, peaks, row, i, real, vocab, n_parts, PARTS: tl.constexpr):
    """w and level of ids i of a row; 0 and -1 for those that are not real."""
    part = tl.arange(0, PARTS)
    top = tl.max(tl.load(peaks + row * n_parts + part, mask=part < n_parts, other=float("-inf")), 0)
    x = tl.load(logits + row.to(tl.int64) * vocab + i, mask=real, other=0).to(tl.float32)
    w = tl.where(real, tl.exp((x - top) / tl.load(temperature + row)), 0)
    level = (w.to(tl.int32, bitcast=True) - 0x2F800000) >> 10
    return w, tl.where(real, tl.minimum(tl.maximum(level, 0), 0x3FFFF), -1)


@jit
def weigh(
    logits,
    temperature,
    peaks,
    level,
    masses,
    vocab,
    n_parts,
    PARTS: tl.constexpr,
    WAYS: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """masses [B, parts, WAYS]: sums of w at or above WAYS levels, STRIDE apart, from level[row] on, at first from 0."""
    part = tl.program_id(0)
    row = tl.program_id(1)
    k = tl.arange(0, WAYS)
    bound = k * STRIDE
    if not FIRST:
        bound += tl.load(level + row)
    found = tl.zeros((WAYS, BLOCK), tl.float32)
    for at in range(0, CHUNK, BLOCK):
        i = part * CHUNK + at + tl.arange(0, BLOCK)
        w, own = weights(logits, temperature, peaks, row, i, i < vocab, vocab, n_parts, PARTS)
        found += tl.where(own[None, :] >= bound[:, None], w[None, :], 0)
    tl.store(masses + (row * n_parts + part) * WAYS + k, tl.sum(found, 1))


@jit
def narrow(
    masses,
    top_p,
    goal,
    level,
    n_parts,
    PARTS: tl.constexpr,
    WAYS: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """The highest of the levels weighed that has the mass wanted, which the first round finds too."""
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)[:, None]
    k = tl.arange(0, WAYS)
    each = tl.load(masses + (row * n_parts + part) * WAYS + k[None, :], mask=part < n_parts, other=0)
    mass = tl.sum(each, 0)
    if FIRST:
        wanted = tl.load(top_p + row) * tl.sum(tl.where(k == 0, mass, 0), 0)
        tl.store(goal + row, wanted)
        low = 0
    else:
        wanted = tl.load(goal + row)
        low = tl.load(level + row)
    tl.store(level + row, low + STRIDE * tl.max(tl.where(mass >= wanted, k, 0), 0))


@jit
def pick(
    logits,
    temperature,
    peaks,
    level,
    masses,
    uniform,
    tokens,
    vocab,
    n_parts,
    PARTS: tl.constexpr,
    WAYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The chunk in which the running sum passes u of the whole, and the token in it."""
    row = tl.program_id(0)
    low = tl.load(level + row)
    part = tl.arange(0, PARTS)
    mass = tl.load(masses + (row * n_parts + part) * WAYS + low % WAYS, mask=part < n_parts, other=0)
    running = tl.cumsum(mass, 0)
    goal = tl.load(uniform + row) * tl.sum(mass, 0)
    last = tl.max(tl.where(mass > 0, part, 0), 0)
    chunk = tl.min(tl.where((running > goal) & (mass > 0), part, last), 0)
    before = tl.sum(tl.where(part == chunk, running - mass, 0), 0)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    w, own = weights(logits, temperature, peaks, row, i, i < vocab, vocab, n_parts, PARTS)
    kept = (own >= low) & (w > 0)
    running = before + tl.cumsum(tl.where(kept, w, 0), 0)
    last = tl.max(tl.where(kept, i, 0), 0)
    token = tl.min(tl.where(kept & (running > goal), i, last), 0)
    tl.store(tokens + row, token.to(tl.int64))

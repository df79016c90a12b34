"""Kernels for the tests of the ahead-of-time build."""

from tpvc.kernels.jit import jit, tl


@jit
def scaled_sum(x, y, bias, out, n_rows, width, scale, BLOCK: tl.constexpr, BIAS: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (column < width) & (row < n_rows)
    value = tl.load(x + row * width + column, mask=there) + tl.load(y + row * width + column, mask=there)
    if BIAS:
        value += tl.load(bias + column, mask=there)
    tl.store(out + row * width + column, value * scale, mask=there)


@jit
def product(a, b, c, n_rows, width, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        left = tl.load(a + m[:, None] * depth + start + k[None, :], mask=m[:, None] < n_rows, other=0.0)
        right = tl.load(b + (start + k)[:, None] * width + n[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + m[:, None] * width + n[None, :], total.to(tl.float16), mask=m[:, None] < n_rows)

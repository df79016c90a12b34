"""Attention over a cache under Triton's interpreter, against the reference and `compiler.ops.attention`."""

import pytest
import torch

from tpvc.compiler import ops
from tpvc.compiler.errors import TpvcError
from tpvc.kernels.attention import Config, Prefix, attention, attention_reference, configs
from tpvc.kernels.rope_cache import Cache

U = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def cache_of(rows, kv_heads, capacity, width, dtype, int8=False):
    key, value = (random(rows, kv_heads, capacity, width, seed=s) for s in (1, 2))
    if not int8:
        return Cache(key.to(dtype), value.to(dtype))
    (key, key_scale), (value, value_scale) = (ops.head_codes(x, width) for x in (key, value))
    return Cache(key[..., 0, :], value[..., 0, :], key_scale[..., 0, 0], value_scale[..., 0, 0])


def prefix_of(kv_heads, width, dtype):
    """Three tasks with prefixes of 5, 0 and 2 tokens."""
    return Prefix(*(random(3, kv_heads, 5, width, seed=s, dtype=dtype) for s in (3, 4)), ints(5, 0, 2))


def compare(close, q, cache, start, lengths, config=None, **options):
    """A score, a sum of d products of numbers below 5, is off by at most d u of their sizes, u = 2^-24, some more for
    scale, cap and exponent: that much relative error has a weight, twice for the quotient; sums of n weights are off
    by n u; and a weight is rounded to q's dtype for its product with values, which are below 5."""
    found = attention(q, cache, start, lengths, config=config, **options)
    wanted = attention_reference(q, cache, start, lengths, **options)
    width, n = q.shape[-1], int(lengths.max()) + 5
    score = 25 * width * options["scale"]
    weight = 2 * (width + 8) * 2**-24 * score + (n + 8) * 2**-24 + U[q.dtype]
    close(found, wanted, 5 * weight)
    return found


@pytest.mark.parametrize("dtype,split", [(torch.float16, 1), (torch.bfloat16, 4), (torch.float32, 4)])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("new,heads,kv_heads,width", [(1, 1, 1, 8), (1, 6, 2, 20), (3, 4, 4, 16), (7, 6, 2, 24)])
def test_every_shape(new, heads, kv_heads, width, int8, dtype, split, close):
    """Rows that begin, that go on past a block of keys, whose last token is padding, and that are empty."""
    q, cache = random(4, new, heads, width, dtype=dtype), cache_of(4, kv_heads, 45, width, dtype, int8)
    start = ints(0, 45 - new, 20, 0)
    lengths = ints(new, 45, 20 + new - 1, 0)
    found = compare(close, q, cache, start, lengths, Config(16, 16, split, 4, 2), scale=width**-0.5)
    assert bool((found[3] == 0).all())


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("prefixed", [False, True])
def test_every_option(split, window, softcap, prefixed, close):
    q, cache = random(4, 2, 2, 16, dtype=torch.float16), cache_of(4, 1, 40, 16, torch.float16, int8=softcap is None)
    options = {"scale": 0.5, "window": window, "softcap": softcap}
    if prefixed:
        options |= {"prefix": prefix_of(1, 16, torch.float16), "ids": ints(0, -1, 1, 2)}
    compare(close, q, cache, ints(0, 38, 17, 1), ints(2, 40, 19, 3), Config(16, 16, split, 4, 2), **options)


@pytest.mark.parametrize("int8", [False, True])
def test_rows_own_slots_of_a_larger_cache(int8, close):
    q, cache = random(2, 2, 4, 16), cache_of(4, 2, 20, 16, torch.float32, int8)
    start, lengths, slots = ints(3, 18), ints(5, 20), ints(3, 1)
    found = compare(close, q, cache, start, lengths, scale=0.25, slots=slots)
    parts = (cache.key, cache.value, cache.key_scale, cache.value_scale)
    own = Cache(*(None if t is None else t[[3, 1]].contiguous() for t in parts))
    assert torch.equal(found, attention(q, own, start, lengths, scale=0.25))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("past", [0, 4])
def test_the_reference_is_the_op(past, prefixed, softcap, window):
    """float32, equal lengths, no padding. The bound is that of the kernel, of which nothing is rounded to 16 bits."""
    q, cache = random(2, 3, 4, 8), cache_of(2, 2, past + 3, 8, torch.float32)
    prefix = prefix_of(2, 8, torch.float32)
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    given = {"prefix": prefix, "ids": ints(2, 2)} if prefixed else {}
    found = attention_reference(q, cache, ints(past, past), ints(past + 3, past + 3), **options, **given)
    k, v = (t[:, :, past:].transpose(1, 2).flatten(2) for t in (cache.key, cache.value))
    before = (cache.key[:, :, :past], cache.value[:, :, :past])
    given = {"prefix_key": prefix.key[2, :, :2], "prefix_value": prefix.value[2, :, :2]} if prefixed else {}
    mask = torch.ones(2, past + 3, dtype=torch.bool)
    wanted, _ = ops.attention(q.flatten(2), k, v, mask, heads=4, kv_heads=2, past=before, **options, **given)
    torch.testing.assert_close(found.flatten(2), wanted, rtol=0, atol=5 * 40 * 2**-24 * 25 * 8 * 0.3)


def test_prefill_in_many_tiles(close):
    q, cache = random(2, 21, 4, 16, dtype=torch.float16), cache_of(2, 2, 33, 16, torch.float16)
    for config in (Config(16, 16, 1, 4, 2), Config(32, 32, 2, 4, 2)):
        compare(close, q, cache, ints(0, 12), ints(21, 30), config, scale=0.25, window=9)


def test_the_same_call_gives_the_same_bits_and_q_may_be_part_of_a_projection():
    whole, cache = random(2, 3, 6, 16, dtype=torch.float16), cache_of(2, 2, 40, 16, torch.float16)
    config = Config(16, 16, 4, 4, 2)
    results = [
        attention(q, cache, ints(5, 30), ints(8, 33), scale=0.25, config=config)
        for q in (whole[:, :, :4], whole[:, :, :4], whole[:, :, :4].contiguous())
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_large_scores_do_not_overflow(close):
    q, cache = torch.full((1, 1, 1, 8), 100.0), cache_of(1, 1, 20, 8, torch.float32)
    found = attention(q, cache, ints(19), ints(20), scale=1.0)
    best = (cache.key[0, 0].sum(-1)).argmax()
    torch.testing.assert_close(found[0, 0, 0], cache.value[0, 0, best])


def test_configs_fill_a_device():
    cache = cache_of(1, 8, 4096, 16, torch.float16)
    assert configs(torch.zeros(1, 1, 32, 16), cache)[0].split == 32
    assert configs(torch.zeros(1, 512, 32, 16), cache)[0].split * 32 * 8 >= 256


def test_what_does_not_belong_together_is_refused():
    q, one = torch.zeros(2, 1, 4, 8), ints(0, 0)
    cache, prefix = cache_of(2, 2, 5, 8, torch.float32), prefix_of(2, 8, torch.float32)
    for words, call in (
        (r"q is int64", lambda: attention(q.long(), cache, one, one, scale=1.0)),
        (r"3 query heads and 2 key heads", lambda: attention(q[:, :, :3], cache, one, one, scale=1.0)),
        (r"lengths is int32 \[1\]", lambda: attention(q, cache, one, one[:1], scale=1.0)),
        (r"window is 0", lambda: attention(q, cache, one, one, scale=1.0, window=0)),
        (r"come together", lambda: attention(q, cache, one, one, scale=1.0, ids=one)),
        (
            r"the prefix has shape \[3, 1, 5, 8\]",
            lambda: attention(q, cache, one, one, scale=1.0, ids=one, prefix=prefix_of(1, 8, torch.float32)),
        ),
        (
            r"another dtype than q",
            lambda: attention(q.half(), cache_of(2, 2, 5, 8, torch.half), one, one, scale=1.0, ids=one, prefix=prefix),
        ),
    ):
        with pytest.raises(TpvcError, match=words):
            call()


@pytest.mark.slow
def test_compiles(compiles):
    launches = []
    for dtype, width, new, heads, int8, options in (
        (torch.float16, 128, 1, 32, False, {}),
        (torch.bfloat16, 128, 1, 32, True, {"window": 512}),
        (torch.float16, 64, 3, 8, True, {}),
        (torch.bfloat16, 256, 1, 16, False, {"softcap": 50.0, "window": 4096}),
        (torch.float16, 80, 128, 8, False, {}),
        (torch.bfloat16, 128, 512, 32, True, {}),
        (torch.bfloat16, 256, 512, 32, False, {"softcap": 50.0}),
    ):
        q, one = torch.zeros(1, new, heads, width, dtype=dtype), ints(0)
        cache = cache_of(1, 8, 4096, width, dtype, int8)
        for given in ({}, {"prefix": prefix_of(8, width, dtype), "ids": one}):
            attention(q, cache, one, one, scale=0.1, **options, **given, run=launches.append)
    compiles(launches)

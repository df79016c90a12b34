"""Rotary embedding and the cache under Triton's interpreter, against the reference and `compiler.ops.rope`."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler import ops
from tpvc.compiler.errors import TpvcError
from tpvc.kernels.rope_cache import Cache, rope_cache, rope_cache_reference, rotary

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def empty(rows, kv_heads, capacity, width, dtype, int8):
    """A cache full of 7, so that what is written can be told from what is not."""
    shape = (rows, kv_heads, capacity, width)
    if not int8:
        return Cache(*(torch.full(shape, 7, dtype=dtype) for _ in range(2)))
    codes, scales = (torch.full(shape, 7, dtype=torch.int8) for _ in range(2)), (torch.full(shape[:3], 7.0),) * 2
    return Cache(*codes, *(s.clone() for s in scales))


def both(q, k, v, cache, *args):
    """(q, keys, values) of kernel and reference; int8 caches as numbers."""
    results = []
    for function in (rope_cache, rope_cache_reference):
        own = Cache(*(None if t is None else t.clone() for t in (cache.key, cache.value, *scales(cache))))
        results.append((function(q, k, v, own, *args), own))
    return results


def scales(cache):
    return cache.key_scale, cache.value_scale


def turning(x, tables):
    """Two products and a sum, float32: off by at most 2 u of |a cos| + |b sin|, in either of the two."""
    size = float(x.double().abs().max()) * (float(tables.cosine.abs().max()) + float(tables.sine.abs().max()))
    return 4 * 2**-24 * size


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "new,heads,kv_heads,width,half", [(1, 1, 1, 8, 4), (1, 4, 2, 20, 6), (3, 3, 3, 16, 1), (5, 2, 1, 24, 12)]
)
def test_turns_and_writes(new, heads, kv_heads, width, half, dtype, int8, close):
    """Row 0 begins, row 1 goes on and has one token less than the others, row 2 is padding."""
    shape, capacity = (3, new), 11
    q = random(*shape, heads, width, dtype=dtype)
    k, v = (random(*shape, kv_heads, width, seed=s, dtype=dtype) for s in (1, 2))
    start, lengths = ints(0, 4, 5), ints(new, 4 + new - 1, 5)
    positions = start[:, None] + torch.arange(new, dtype=torch.int32) + 3
    tables = rotary(tuple(100.0**-j for j in torch.linspace(0, 1, half).tolist()), 20, magnitude=1.25, offset=2)
    cache = empty(3, kv_heads, capacity, width, dtype, int8)
    (found, mine), (wanted, theirs) = both(q, k, v, cache, start, lengths, positions, tables)
    close(found, wanted, turning(q, tables))
    if int8:
        for a, b in zip(scales(mine), scales(theirs), strict=True):
            close(a, b, turning(k, tables) / 127)
        for a, b in ((mine.key, theirs.key), (mine.value, theirs.value)):
            # x / scale is off by a few u of at most 127: codes differ by 1 where it is that close to a half
            assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 0.01
    else:
        close(mine.key, theirs.key, turning(k, tables))
        assert torch.equal(mine.value, theirs.value)
    for t in (mine.key, mine.value):
        assert bool((t[0, :, new:] == 7).all()) and bool((t[1, :, 4 + new - 1 :] == 7).all())
        assert bool((t[1, :, :4] == 7).all()) and bool((t[2] == 7).all())
    assert bool((found[2] == 0).all()) and bool((found[1, new - 1] == 0).all())


@pytest.mark.parametrize("int8", [False, True])
def test_rows_own_slots_of_a_larger_cache(int8):
    q, k, v = (random(2, 3, 2, 8, seed=s) for s in range(3))
    start, lengths, slots = ints(0, 4), ints(3, 6), ints(3, 1)
    cache = empty(4, 2, 9, 8, torch.float32, int8)
    (_, mine), (_, theirs) = both(q, k, v, cache, start, lengths, None, None, slots)
    assert torch.equal(mine.key, theirs.key) and torch.equal(mine.value, theirs.value)
    own = empty(2, 2, 9, 8, torch.float32, int8)
    rope_cache(q, k, v, own, start, lengths)
    assert torch.equal(mine.key[[3, 1]], own.key) and bool((mine.key[[0, 2]] == 7).all())
    with pytest.raises(TpvcError, match="slots is int64"):
        rope_cache(q, k, v, cache, start, lengths, None, None, slots.long())


@pytest.mark.parametrize("half,width", [(4, 8), (3, 16)])
def test_the_reference_is_the_op(half, width, close):
    inv_freq = tuple(10.0**-j for j in range(half))
    q, k = random(2, 3, 4, width), random(2, 3, 2, width, seed=1)
    positions, cache = ints(0, 1, 2, 9, 10, 11).view(2, 3), empty(2, 2, 4, width, torch.float32, False)
    tables = rotary(inv_freq, 12, 0.5, 7)
    found = rope_cache_reference(q, k, k, cache, ints(0, 1), ints(3, 4), positions, tables)
    how = {"head_dim": width, "inv_freq": inv_freq, "magnitude": 0.5, "offset": 7}
    close(found.flatten(2), ops.rope(q.flatten(2), positions.long(), **how), turning(q, tables))
    turned = ops.rope(k.flatten(2), positions.long(), **how).unflatten(-1, (2, width)).transpose(1, 2)
    close(cache.key[0, :, :3], turned[0], turning(k, tables))
    close(cache.key[1, :, 1:], turned[1], turning(k, tables))
    assert torch.equal(cache.value[1, :, 1:], k[1].transpose(0, 1))


def test_int8_is_within_half_a_step():
    k, v = random(1, 2, 2, 16), torch.zeros(1, 2, 2, 16)
    cache = empty(1, 2, 2, 16, torch.float32, True)
    rope_cache(k, k, v, cache, ints(0), ints(2))
    back = (cache.key * cache.key_scale[..., None]).transpose(1, 2)
    # half a step, and u = 2^-24 of 127 steps for each of scale, quotient, sum and product
    assert bool(((back - k).abs() <= cache.key_scale.transpose(1, 2)[..., None] * (0.5 + 4 * 127 * 2**-24)).all())
    assert int(cache.key.abs().amax()) == 127 and bool((cache.value == 0).all())


@pytest.mark.parametrize("int8", [False, True])
def test_without_rotary_it_just_writes(int8):
    q, k, v = random(2, 2, 4, 8), random(2, 2, 1, 8, seed=1), random(2, 2, 1, 8, seed=2)
    cache = empty(2, 1, 5, 8, torch.float32, int8)
    (found, mine), (_, theirs) = both(q, k, v, cache, ints(1, 3), ints(3, 5))
    assert found is q and torch.equal(mine.key, theirs.key) and torch.equal(mine.value, theirs.value)
    if not int8:
        assert torch.equal(mine.key[1, 0, 3:], k[1, :, 0])


def test_parts_of_a_fused_projection_and_a_full_cache():
    """What lies past the capacity is not written."""
    whole = random(2, 3, 64, dtype=torch.float16)
    q, k, v = (t.unflatten(-1, (-1, 8)) for t in whole.split((32, 16, 16), -1))
    tables, positions = rotary((1.0, 0.5), 9), ints(0, 1, 2, 6, 7, 8).view(2, 3)
    cache = empty(2, 2, 4, 8, torch.float16, False)
    args = (ints(0, 2), ints(3, 5), positions, tables)
    (found, mine), _ = both(q, k, v, cache, *args)
    (wanted, theirs), _ = both(q.contiguous(), k.contiguous(), v.contiguous(), cache, *args)
    assert torch.equal(found, wanted) and torch.equal(mine.key, theirs.key) and torch.equal(mine.value, theirs.value)
    assert torch.equal(mine.value[1, :, 2:], v[1, :2].transpose(0, 1)) and torch.equal(
        mine.value[0, :, 3:], cache.value[0, :, 3:]
    )


def test_what_does_not_belong_together_is_refused():
    q, one = torch.zeros(2, 1, 4, 8), ints(0, 0)
    cache, tables = empty(2, 4, 5, 8, torch.float32, False), rotary((1.0,), 4)
    for words, call in (
        (r"q is int64", lambda: rope_cache(q.long(), q, q, cache, one, one)),
        (r"k is \[2, 1, 3, 8\]", lambda: rope_cache(q, q[:, :, :3], q, cache, one, one)),
        (r"start is int64 \[2\]", lambda: rope_cache(q, q, q, cache, one.long(), one)),
        (
            r"the cache is float32 \[2, 4, 5, 8\]; expected float16 \[2,",
            lambda: rope_cache(*[q.half()] * 3, cache, one, one),
        ),
        (r"differ in shape", lambda: rope_cache(q, q, q, replace(cache, value=cache.value[:1]), one, one)),
        (r"come together", lambda: rope_cache(q, q, q, cache, one, one, None, tables)),
        (r"positions are \[2\]", lambda: rope_cache(q, q, q, cache, one, one, one, tables)),
        (r"strides \[64, 64, 16, 2\]", lambda: rope_cache(q.repeat(1, 1, 1, 2)[..., ::2], q, q, cache, one, one)),
    ):
        with pytest.raises(TpvcError, match=words):
            call()


@pytest.mark.slow
def test_compiles(compiles):
    launches = []
    for dtype, width, half, int8 in (
        (torch.float16, 128, 64, False),
        (torch.bfloat16, 96, 16, True),
        (torch.bfloat16, 256, 128, True),
    ):
        q, k = torch.zeros(2, 3, 8, width, dtype=dtype), torch.zeros(2, 3, 2, width, dtype=dtype)
        cache, one = empty(2, 2, 16, width, dtype, int8), ints(0, 0)
        rope_cache(
            q,
            k,
            k,
            cache,
            one,
            one,
            torch.zeros(2, 3, dtype=torch.int32),
            rotary((1.0,) * half, 4),
            run=launches.append,
        )
        rope_cache(q, k, k, cache, one, one, run=launches.append)
    compiles(launches)

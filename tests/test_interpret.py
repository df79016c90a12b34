"""The interpreter beyond what the families' comparison with transformers covers: ops, caches, reading, sampling."""

import pytest
import torch

from tpvc.compiler import interpret, ops
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.program import Grid, QTensor


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_positions_do_not_count_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert interpret.positions_of(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 2, 2]]
    assert interpret.positions_of(mask, 2).tolist() == [[1, 2], [3, 4], [2, 2]]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_is_its_definition(window, softcap):
    """One query at a time in float64, from the sentence in the docstring."""
    heads, kv_heads, d, length = 4, 2, 3, 7
    q, k, v = (
        random(2, length, heads * d),
        random(2, length, kv_heads * d, seed=1),
        random(2, length, kv_heads * d, seed=2),
    )
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :2] = False
    out, _ = ops.attention(q, k, v, mask, heads=heads, kv_heads=kv_heads, scale=0.5, window=window, softcap=softcap)
    for b in range(2):
        for t in range(length):
            for h in range(heads):
                g = h * kv_heads // heads
                seen = [s for s in range(t + 1) if (mask[b, s] or s == t) and (window is None or t - s < window)]
                query = q[b, t, h * d : h * d + d].double()
                scores = torch.stack([query @ k[b, s, g * d : g * d + d].double() * 0.5 for s in seen])
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                values = torch.stack([v[b, s, g * d : g * d + d].double() for s in seen])
                wanted = scores.softmax(0) @ values
                # float32 sums of at most 7 products of numbers of size < 4
                assert torch.allclose(out[b, t, h * d : h * d + d].double(), wanted, rtol=0, atol=7 * 4 * 2**-23)


def test_rope_turns_pairs_and_leaves_the_rest():
    x = random(1, 2, 8)
    positions = torch.tensor([[0, 3]])
    out = ops.rope(x, positions, head_dim=8, inv_freq=(1.0, 0.25))
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(out[..., 4:], x[..., 4:])
    pair = torch.complex(x[0, 1, :2], x[0, 1, 2:4]) * torch.exp(1j * 3 * torch.tensor([1.0, 0.25]))
    assert torch.allclose(torch.cat((pair.real, pair.imag)), out[0, 1, :4], rtol=0, atol=4 * 2**-23)


def test_split_takes_its_part_of_every_run():
    x = torch.arange(12.0)[None, None]
    assert ops.split(x, groups=1, start=4, stop=8).flatten().tolist() == [4, 5, 6, 7]
    assert ops.split(x, groups=2, start=1, stop=3).flatten().tolist() == [1, 2, 7, 8]


@pytest.mark.parametrize("group", [4, -1, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_an_integer_table_are_rows_of_its_dense_form(group, symmetric):
    grid = Grid(4, group, symmetric)
    shape = {4: (6, 2), -1: (6, 1), 0: (1, 1)}[group]
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 8), generator=draw, dtype=torch.uint8)
    zero = None if symmetric else torch.randint(0, 16, shape, generator=draw, dtype=torch.uint8)
    table = QTensor(codes, torch.rand(shape, generator=draw), zero, grid)
    ids = torch.tensor([[5, 0, 0], [1, 2, 5]])
    assert torch.equal(ops.embed(ids, weight=table), table.dequantize()[ids])
    for n in range(6):
        for k in range(8):
            at = (0, 0) if group == 0 else (n, k // 4 if group == 4 else 0)
            z = 8 if zero is None else int(zero[at])
            assert float(table.dequantize()[n, k]) == float((int(codes[n, k]) - z) * table.scale[at])


def test_values_are_let_go_after_their_last_use():
    """What `run` holds at any node is what is still to be read: a long chain needs no more memory than a short one."""
    import weakref

    from tpvc.compiler.program import Node

    nodes = [Node("0", "scale", ("x",), {}, {"factor": 1.0})]
    nodes += [Node(str(i), "scale", (str(i - 1),), {}, {"factor": 1.0}) for i in range(1, 9)]
    alive, most = [], 0

    def watch(node, inputs):
        nonlocal most
        alive.extend(weakref.ref(t) for t in inputs)
        most = max(most, len({id(r()) for r in alive if r() is not None}))

    interpret.run(nodes, {"x": random(4)}, lambda name: None, watch=watch)
    assert most <= 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_chosen_by_logits_that_are_not_finite(tiny_llama, temperature):
    program = load(tiny_llama)
    program = program.with_params({"model.norm.weight": torch.full((64,), float("nan"))})
    with pytest.raises(TpvcError, match="not finite"):
        next(interpret.generate(program, torch.tensor([5, 6]), 1, temperature=temperature))

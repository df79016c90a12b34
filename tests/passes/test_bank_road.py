"""A bank of adapters: the graph it makes, and that every row of a mixed batch gets what it would get alone."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler import ops
from tpvc.compiler.adapters.road import STORED, Road, Rotation, rotate
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import generate, in_memory, logits
from tpvc.compiler.program import Facts, Grid, Node, Program, QTensor, bank_params, dense, linears, read
from tpvc.compiler.verify import verify
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.round_to_nearest import quantize

FACTS = Facts("test", 8, 16, 1, 1, 1, 16, 32, None, (), None)
VARIANTS = ("road_1", "road_2", "road_4")


def drawn(variant, group, features, seed=0):
    generator, m = torch.Generator().manual_seed(seed), int(features * STORED[variant])
    theta, alpha = (torch.randn(m, generator=generator) * 0.5 for _ in range(2))
    return Rotation(variant, group, theta, alpha + 1)


def adapter(program, name, variant, group, last=None, seed=0):
    """A random adapter of all block linears, or of those whose names end so."""
    chosen = [n for n in linears(program.nodes) if n.block is not None]
    chosen = [n for n in chosen if last is None or n.name.split(".")[-1] in last]
    outputs = {n.name: program.params[n.params["weight"]].shape[0] for n in chosen}
    return Road(name, {n: drawn(variant, group, f, seed * 100 + i) for i, (n, f) in enumerate(outputs.items())})


@pytest.fixture(scope="module")
def program(tiny_llama):
    return load(tiny_llama)


@pytest.fixture(scope="module")
def roads(program):
    """Three variants, three group sizes, three sets of targets."""
    return (
        adapter(program, "one", "road_1", 8, seed=1),
        adapter(program, "two", "road_2", 32, ("q_proj", "v_proj", "down_proj"), seed=2),
        adapter(program, "four", "road_4", 2, ("v_proj", "o_proj", "gate_proj"), seed=3),
    )


def small():
    """input_ids -> embed -> a -> act -> b; a and b are linears of 16 outputs."""
    made = {n: torch.randn(16, 16, generator=torch.Generator().manual_seed(len(n))) for n in ("a.w", "b.weight")}
    nodes = (
        Node("embed", "embed", ("input_ids",), {"weight": "table"}),
        Node("a", "linear", ("embed",), {"weight": "a.w"}, block=0),
        Node("act", "activation", ("a",), attrs={"kind": "silu"}, block=0),
        Node("sum", "add", ("act", "a"), block=0),
        Node("b", "linear", ("sum",), {"weight": "b.weight"}),
    )
    return Program(nodes, {"table": torch.ones(8, 16), **made}, FACTS)


def test_the_graph_before_and_after():
    before = small()
    x, y = (
        Road("x", {"a": drawn("road_1", 8, 16)}),
        Road("y", {"a": drawn("road_4", 8, 16, 1), "b": drawn("road_4", 8, 16)}),
    )
    after = BankRoad((x, y))(before)
    vectors = {"cosine": "a.rotate.cosine", "sine": "a.rotate.sine"}
    last = {"cosine": "b.rotate.cosine", "sine": "b.rotate.sine"}
    assert after.nodes == (
        Node("embed", "embed", ("input_ids",), {"weight": "table"}),
        Node("a", "linear", ("embed",), {"weight": "a.w"}, block=0),
        Node("a.rotate", "rotate", ("a", "adapter_ids"), vectors, {"group": 8, "rows": (0, 1)}, 0),
        Node("act", "activation", ("a.rotate",), attrs={"kind": "silu"}, block=0),
        Node("sum", "add", ("act", "a.rotate"), block=0),
        Node("b", "linear", ("sum",), {"weight": "b.weight"}),
        Node("b.rotate", "rotate", ("b", "adapter_ids"), last, {"group": 8, "rows": (-1, 0)}),
    )
    assert after.adapters == (x, y)
    assert {k: v for k, v in after.params.items() if k in before.params} == before.params
    assert after.params.keys() - before.params.keys() == bank_params(after) == {*vectors.values(), *last.values()}
    for i, road in enumerate((x, y)):
        for role, value in zip(("cosine", "sine"), road.rotations["a"].vectors, strict=True):
            assert torch.equal(after.params[vectors[role]][i], value)
    verify(after, "BankRoad")


def test_group_sizes_get_a_node_each():
    roads = tuple(Road(n, {"a": drawn("road_1", g, 16)}) for n, g in (("x", 8), ("y", 2), ("z", 8)))
    after = BankRoad(roads)(small())
    made = [(n.name, n.inputs[0], n.attrs) for n in after.nodes if n.op == "rotate"]
    assert made == [
        ("a.rotate", "a", {"group": 2, "rows": (-1, 0, -1)}),
        ("a.rotate.1", "a.rotate", {"group": 8, "rows": (0, -1, 1)}),
    ]
    assert next(n for n in after.nodes if n.name == "act").inputs == ("a.rotate.1",)
    verify(after, "BankRoad")


def test_what_cannot_be_put_beside_is_refused():
    program, x = small(), Road("x", {"a": drawn("road_1", 8, 16)})
    for roads, words in (
        ((x, x), r"two adapters have one name \(x, x\)"),
        ((Road("x", {"c": drawn("road_1", 8, 16)}),), "'x' is for another model: it adapts 'c'.*linears like 'a'"),
        ((Road("x", {"a": drawn("road_1", 8, 32)}),), "it has 32 outputs for 'a', this one has 16"),
        ((Road("x", {"a": drawn("road_2", 6, 16)}),), "group size 6 does not divide the 16 outputs of 'a'"),
    ):
        with pytest.raises(TpvcError, match=words):
            BankRoad(roads)(program)
    with pytest.raises(TpvcError, match=r"already carries adapters \(x\)"):
        BankRoad((x,))(BankRoad((x,))(program))


IDS = torch.tensor([2, -1, 0, 1, 1, -1, 2, 0])
BANK = [drawn(v, 8, 64, i) for i, v in enumerate(VARIANTS)]


def mixed(h, ids, rows=(0, 1, 2)):
    cosine, sine = (torch.stack(v) for v in zip(*(r.vectors for r in BANK), strict=True))
    return ops.rotate(h, ids, cosine=cosine, sine=sine, group=8, rows=rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_a_mixed_batch_are_those_of_one_by_one_runs_bit_for_bit(dtype):
    h = torch.randn(len(IDS), 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = mixed(h, IDS)
    assert out.dtype == dtype
    for row, i in enumerate(IDS.tolist()):
        alone = h[row : row + 1] if i < 0 else rotate(h[row : row + 1], *BANK[i].vectors, 8)
        assert torch.equal(out[row : row + 1], alone)
        assert torch.equal(mixed(h[row : row + 1], IDS[row : row + 1]), alone)
    order = torch.tensor([3, 7, 0, 2, 6, 1, 5, 4])
    assert torch.equal(mixed(h[order], IDS[order]), out[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(0, 1, 2), (-1, 1, -1)])
def test_base_rows_keep_every_bit_of_an_infinite_feature_too(dtype, rows):
    h = torch.randn(len(IDS), 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    h[1, 0, 3], h[5, 2, 9], h[5, 2, 10] = float("inf"), float("-inf"), -0.0
    out = mixed(h, IDS, rows)
    base = torch.tensor([i < 0 or rows[i] < 0 for i in IDS.tolist()])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out[base].view(bits), h[base].view(bits))
    assert not torch.equal(out[~base], h[~base])


def batch():
    """ids and mask [7, 9], left padding in two rows; adapters repeat, in no order."""
    ids = torch.randint(3, 384, (7, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[1, :4] = mask[4, :2] = False
    return ids, mask, torch.tensor([1, 0, -1, 2, 0, 2, -1])


def tolerance(program, wanted, dtype):
    """Accumulation of rounding along the longest path, relative to the largest logit, twice.

    float32, worst case: a linear sums K products, attention tokens and features of a head, another op rounds 4 times.
    bfloat16: products are summed in float32, and a node rounds once, half an eps, independently of the others: the
    errors add up to the root of their number.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.bfloat16:
        return 2 * len(program.nodes) ** 0.5 * eps / 2 * float(wanted.abs().max())
    terms = 0
    for node in program.nodes:
        terms += program.params[node.params["weight"]].shape[1] if node.op == "linear" else 4
        terms += 9 + program.facts.head_dim if node.op == "attention" else 0
    return 2 * terms * eps * float(wanted.abs().max())


@pytest.mark.parametrize("dtype, lazy", [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)])
@torch.no_grad()
def test_a_mixed_batch_equals_one_by_one_runs_end_to_end(program, roads, dtype, lazy):
    """Parameters that are read when asked for are float32 always."""
    banked = BankRoad(roads)(program)
    verify(banked, "BankRoad")
    held = None if lazy else in_memory(banked, dtype=dtype)
    ids, mask, chosen = batch()
    together = logits(banked, ids, mask, held, adapter_ids=chosen)
    assert together.dtype == dtype
    limit = tolerance(banked, together[mask], dtype)

    for row, i in enumerate(chosen.tolist()):
        single = BankRoad((roads[i],))(program) if i >= 0 else program
        own = None if lazy else in_memory(single, dtype=dtype)
        real = mask[row]
        alone = logits(single, ids[row : row + 1, real], None, own, adapter_ids=torch.tensor([0]) if i >= 0 else None)[
            0
        ]
        torch.testing.assert_close(together[row][real], alone, rtol=0, atol=limit)
        turn = torch.tensor([(i + 2) % 3])
        other = logits(banked, ids[row : row + 1], mask[row : row + 1], held, adapter_ids=turn)
        assert float((other[0] - together[row])[real].abs().max()) > limit

    # base rows of a batch of the same size: the same products in the same order
    base = logits(program, ids, mask, None if lazy else in_memory(program, dtype=dtype))
    assert torch.equal(together[chosen < 0], base[chosen < 0])

    order = torch.tensor([6, 2, 4, 0, 5, 3, 1])
    turned = logits(banked, ids[order], mask[order], held, adapter_ids=chosen[order])
    torch.testing.assert_close(turned[mask[order]], together[order][mask[order]], rtol=0, atol=limit)

    cache, steps = {}, []
    for start, stop in ((0, 5), (5, 6), (6, 8), (8, 9)):
        steps.append(logits(banked, ids[:, start:stop], mask[:, :stop], held, cache, chosen))
    torch.testing.assert_close(torch.cat(steps, 1)[mask], together[mask], rtol=0, atol=limit)


@torch.no_grad()
def test_without_ids_every_row_is_the_base_model(program, roads):
    ids, mask, _ = batch()
    assert torch.equal(logits(BankRoad(roads)(program), ids, mask), logits(program, ids, mask))


def test_generation_with_an_adapter_is_that_of_the_adapter_alone(program, roads):
    banked, prompt = BankRoad(roads)(program), torch.tensor([5, 6, 7, 8])
    texts = []
    for road in roads:
        alone = list(generate(BankRoad((road,))(program), prompt, 8, stop_at_eos=False, adapter=road.name))
        assert list(generate(banked, prompt, 8, stop_at_eos=False, adapter=road.name)) == alone
        texts.append(tuple(alone))
    texts.append(tuple(generate(banked, prompt, 8, stop_at_eos=False)))
    assert texts[-1] == tuple(generate(program, prompt, 8, stop_at_eos=False))
    assert len(set(texts)) > 1
    with pytest.raises(TpvcError, match="the model has no adapter 'five'; it has one, two, four"):
        next(generate(banked, prompt, 1, adapter="five"))


def test_ids_that_name_nothing_are_refused_and_leave_nothing_behind(program, roads):
    banked, (ids, mask, chosen) = BankRoad(roads)(program), batch()
    before = logits(banked, ids, mask, adapter_ids=chosen)
    for bad, words in (
        ([0.0] * 7, r"float32 \[7\]; expected one int64"),
        ([0] * 6, r"int64 \[6\]; expected one int64 for each of 7 rows"),
        ([0] * 8, r"int64 \[8\]; expected one int64 for each of 7 rows"),
        ([[0]] * 7, r"int64 \[7, 1\]; expected one int64 for each of 7 rows"),
        ([0] * 6 + [3], r"adapter ids are \[0, 0, 0, 0, 0, 0, 3\]; expected -1 \(none\) to 2"),
        ([-2] + [0] * 6, r"expected -1 \(none\) to 2"),
    ):
        with pytest.raises(TpvcError, match=words):
            logits(banked, ids, mask, adapter_ids=torch.tensor(bad))
    with pytest.raises(TpvcError, match=r"expected -1 \(none\) to -1"):
        logits(program, ids, mask, adapter_ids=torch.zeros(7, dtype=torch.long))
    assert torch.equal(logits(banked, ids, mask, adapter_ids=chosen), before)


def test_an_integer_base_is_rotated_behind_its_linears(program, roads):
    """R (dequantised W x + b): the bank on integers is the bank on their float values, bit for bit."""
    weights = {n.params["weight"] for n in linears(program.nodes) if n.block is not None}
    integers = program.with_params({w: quantize(read(program.params[w]), Grid(4, 32, False)) for w in weights})
    floats = replace(integers, params={n: dense(p) for n, p in integers.params.items()})
    ids, mask, chosen = batch()
    ours = logits(BankRoad(roads)(integers), ids, mask, adapter_ids=chosen)
    assert torch.equal(ours, logits(BankRoad(roads)(floats), ids, mask, adapter_ids=chosen))


@torch.no_grad()
def test_an_integer_embedding_is_embedded_in_the_dtype_asked_for(program, roads):
    table = program.nodes[0].params["weight"]
    integers = program.with_params({table: quantize(read(program.params[table]), Grid(8, -1, True))})
    banked, (ids, mask, chosen) = BankRoad(roads)(integers), batch()
    assert isinstance(in_memory(banked)(table), QTensor)
    held = in_memory(banked, dtype=torch.bfloat16)
    assert torch.equal(held(table), dense(integers.params[table]).bfloat16())
    assert logits(banked, ids, mask, held, adapter_ids=chosen).dtype == torch.bfloat16

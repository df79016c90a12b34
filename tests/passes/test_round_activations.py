"""Rounded activations: the op, where the pass puts it, and rounding of weights that is learned under it."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler import interpret
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.ops import OPS, round_rows, row_codes
from tpvc.compiler.program import Grid, Program, linears, read, rounded_inputs
from tpvc.compiler.store import BlockStore
from tpvc.compiler.verify import verify
from tpvc.passes.block import Block, embedded, spread
from tpvc.passes.flexround import RECIPES, FlexRound
from tpvc.passes.round_activations import RoundActivations
from tpvc.passes.round_to_nearest import RoundToNearest
from tpvc.passes.seen_error import relative_error, seen_behind

GRID = Grid(4, -1, True)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def windows(count=40, length=16) -> torch.Tensor:
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind,steps", [("int8", 127), ("fp8", 448)])
def test_the_largest_of_a_row_is_kept_and_the_rest_is_off_by_half_a_step(kind, steps):
    x = random(5, 7, 40)
    rounded = round_rows(x, kind=kind)
    codes, scale = row_codes(x, kind)
    assert torch.equal(codes.float() * scale, rounded)
    largest = x.abs().amax(-1)
    # the scale is rounded to float32, and so is its product with the code: 2^-24 each
    assert bool(((rounded.abs().amax(-1) - largest).abs() <= 2 * 2**-24 * largest).all())
    assert torch.equal(codes.float().abs().amax(-1), torch.full(x.shape[:-1], float(steps)))
    # int8: half of a step; e4m3 has 4 digits: half of 1/8 of the power of two below, at least half of 2^-9
    step = scale if kind == "int8" else torch.maximum(x.abs() / 8, scale * 2**-9)
    assert bool(((rounded - x).abs() <= 0.5001 * step).all())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_was_rounded_stays_and_zeros_stay_zeros(kind):
    x = torch.cat((random(3, 40), torch.zeros(1, 40)))
    once = round_rows(x, kind=kind)
    assert not once[3].any() and bool(once.isfinite().all())
    # the largest of a rounded row may be one rounding off, and its scale with it: the codes are the same
    assert torch.equal(row_codes(once, kind)[0].float(), row_codes(x, kind)[0].float())


def test_rows_are_rounded_alone():
    x = random(2, 3, 8)
    x[1, 2] *= 1000
    assert torch.equal(round_rows(x, kind="int8")[0], round_rows(x[0], kind="int8"))


def test_the_gradient_goes_straight_through():
    x = random(2, 3, 8).requires_grad_()
    wanted = random(2, 3, 8, seed=1)
    (round_rows(x, kind="int8") * wanted).sum().backward()
    assert torch.equal(x.grad, wanted)


def test_linears_that_read_one_value_share_a_node(model):
    program = verify(RoundActivations("int8")(model()), "RoundActivations")
    made = [n for n in program.nodes if n.op == "round_rows"]
    assert [n.block for n in made] == [0] * 4 + [1] * 4
    assert rounded_inputs(program) == {
        n.params["weight"]: "int8" for n in linears(program.nodes) if n.block is not None
    }
    readers = [[n.name.split(".")[-1] for n in program.nodes if node.name in n.inputs] for node in made[:4]]
    assert readers == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    head = linears(program.epilogue)[-1]
    assert head == linears(model().epilogue)[-1]
    before = {n.name: n for n in model().nodes}
    assert [n.name for n in program.nodes if n.op != "round_rows"] == list(before)


def test_other_readers_keep_the_value():
    """OPT's blocks norm afterwards: what enters is both read by q, k, v and added."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    drawn = architecture({"model_type": "opt", "max_position_embeddings": 64, **sizes, "do_layer_norm_before": False})
    program = Program(drawn.nodes, {n: torch.zeros(s) for n, s in drawn.shapes.items()}, drawn.facts)
    rounded = verify(RoundActivations("int8")(program))
    read = [(n.op, v) for n in rounded.nodes for v in n.inputs if n.op == "add"]
    assert read == [(n.op, v) for n in program.nodes for v in n.inputs if n.op == "add"]


def test_some_linears_only(model):
    names = frozenset(n.params["weight"] for n in linears(model().nodes) if n.name.endswith("q_proj"))
    program = verify(RoundActivations("fp8", names)(model()))
    assert rounded_inputs(program) == dict.fromkeys(names, "fp8")


def test_it_means_what_it_says(model):
    """Logits are those of a program whose linears round their inputs themselves."""
    program = model()
    inside = {n.params["weight"] for n in linears(program.nodes) if n.block is not None}
    weight = interpret.in_memory(program)
    held = {name: weight(name) for name in program.params}

    def linear(x, *, weight, bias=None):
        own = any(weight is held[name] for name in inside)
        return OPS["linear"].compute(round_rows(x, kind="int8") if own else x, weight=weight, bias=bias)

    tokens = windows(2)
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    values = {"input_ids": tokens, "mask": mask, "positions": interpret.positions_of(mask, 16)}
    ops = {**OPS, "linear": replace(OPS["linear"], compute=linear)}
    wanted = interpret.run(program.nodes, values, held.__getitem__, ops=ops)
    found = interpret.logits(RoundActivations("int8")(program), tokens)
    assert torch.equal(found, wanted) and not torch.equal(found, interpret.logits(program, tokens))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_learning_sees_rounded_activations(model, kind, tmp_path):
    """Targets are those of the float block, errors those of the block that rounds weights and activations; what is
    learned is better than rounding to nearest on windows that it has not seen."""
    recipe = replace(RECIPES["default"], steps=60, lr=4e-3, lr_scale=2e-3, held_out=4)
    program = RoundActivations(kind)(model())
    store = BlockStore.open(tmp_path / "a", {})
    rounded = verify(FlexRound(GRID, recipe, windows(), store)(program), "FlexRound")
    records = [store.finished(i)[1] for i in range(2)]
    assert all(r["error"] < r["error_rtn"] and r["kept"] == "learned" for r in records)

    held = windows()[-4:]
    ids = spread(40, 0)[-4:]
    exact = embedded(program, held, ids)
    target = Block(model(), 0, "cpu").outputs(exact, Block(model(), 0, "cpu").weights, ids)
    kept = {n.params["weight"]: read(rounded.params[n.params["weight"]]) for n in linears(program.block(0))}
    both = (Block(program, 0, "cpu"), Block(model(), 0, "cpu"))
    seen = seen_behind(program, 0)
    own, other = (relative_error(b.outputs(exact, b.with_rounded(kept), ids), target, seen) for b in both)
    assert records[0]["error"] == pytest.approx(own) and records[0]["error"] != pytest.approx(other)


def test_nearest_rounds_the_same_codes(model, tmp_path):
    """Rounding to nearest looks at weights alone."""
    plain, rounded = (
        RoundToNearest(GRID, BlockStore.open(tmp_path / str(i), {}))(p)
        for i, p in enumerate((model(), RoundActivations("int8")(model())))
    )
    for node in linears(plain.block(0)):
        a, b = (read(p.params[node.params["weight"]]) for p in (plain, rounded))
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


def test_an_unknown_kind_is_refused(model):
    with pytest.raises(TpvcError, match="'int4'; expected int8, fp8 or int8-static"):
        RoundActivations("int4")(model())
    program = RoundActivations("int8")(model())
    nodes = tuple(replace(n, attrs={"kind": "int4"}) if n.op == "round_rows" else n for n in program.nodes)
    with pytest.raises(TpvcError, match=r"round_rows.*unknown kind 'int4'"):
        verify(replace(program, nodes=nodes))

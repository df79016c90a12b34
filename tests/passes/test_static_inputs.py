"""Activations on one grid for all tokens: the op, how its grid is found, and rounding of weights learned under it."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler import interpret
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import round_tensor
from tpvc.compiler.program import Grid, Program, input_grids, linears, read, rounded_inputs
from tpvc.compiler.store import BlockStore
from tpvc.compiler.verify import verify
from tpvc.passes import static_inputs
from tpvc.passes.flexround import RECIPES, FlexRound
from tpvc.passes.round_activations import RoundActivations
from tpvc.passes.round_to_nearest import RoundToNearest
from tpvc.passes.static_inputs import LIMIT, StaticInputs, grid_of_range, lost, search

GRID = Grid(8, -1, True)
STATIC = "int8-static"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def windows(count=24, length=16) -> torch.Tensor:
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(1))


def static(model, store, **fields) -> Program:
    """The model in W8A8 with static grids, rounded to nearest."""
    rounded = RoundToNearest(GRID, store)(RoundActivations(STATIC)(model()))
    return verify(StaticInputs(windows(), **fields)(rounded), "StaticInputs")


@pytest.fixture
def holds_all(monkeypatch):
    """Static grids for the products of two random factors, too, which lose about 3e-3."""
    monkeypatch.setattr(static_inputs, "LIMIT", 0.05)


def test_inside_of_the_grid_it_is_off_by_half_a_step_and_outside_it_is_clipped():
    x = random(6, 50)
    rounded = round_tensor(x, scale=0.0125, zero=-28)
    low, high = (-128 + 28) * 0.0125, (127 + 28) * 0.0125
    inside = (x >= low) & (x <= high)
    assert 0 < int(inside.sum()) < x.numel()
    # half a step; the quotient, the product and the sum are rounded to float32: 3 * 2^-24 of at most 155 steps
    assert bool(((rounded - x).abs()[inside] <= 0.0125 * (0.5 + 155 * 3 * 2**-24)).all())
    assert bool(((rounded == low) | (rounded == high) | inside).all())
    assert torch.equal(round_tensor(rounded, scale=0.0125, zero=-28), rounded)
    assert torch.equal(round_tensor(torch.zeros(3), scale=0.0125, zero=-28), torch.zeros(3))


def test_the_gradient_goes_straight_through_inside_of_the_grid():
    x = torch.tensor([-2.0, -0.03, 0.4, 9.0]).requires_grad_()
    round_tensor(x, scale=0.01, zero=0).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_grid_of_a_range(dtype):
    scale, zero = grid_of_range(-1.0, 3.0, dtype)
    assert torch.tensor(scale).to(dtype).item() == scale
    # a step at either end for the zero point, which is an integer, and what the dtype takes from 255 steps
    slack = scale * (0.5 + 255 * torch.finfo(dtype).eps / 2)
    assert (-128 - zero) * scale == pytest.approx(-1.0, abs=slack)
    assert (127 - zero) * scale == pytest.approx(3.0, abs=slack)
    scale, zero = grid_of_range(0.0, 0.0, dtype)
    assert scale > 0 and zero == -128


def test_the_search_clips_what_is_rare_and_keeps_what_is_not():
    """With 12 times the deviation inside, a step is 16/255 and twice step^2/12 = 7e-4 is lost. To clip one such entry
    of 800,000 costs 9^2 / 800,000 = 1e-4; to clip it in every token, more than half of everything."""
    x, ones = random(40000, 20), torch.ones(20)
    x[7, 3] = 12.0
    power = x.square().sum(1)

    def of(scale, zero):
        return lost((round_tensor(x, scale=scale, zero=zero) - x).square().sum(1), power)

    scale, zero, least = search(x, ones, torch.float32)
    assert least == pytest.approx(of(scale, zero)) and least <= of(*grid_of_range(x.min().item(), 12.0, torch.float32))
    assert (127 - zero) * scale < 6.0
    x[:, 3] = 12.0
    power = x.square().sum(1)
    scale, zero, _ = search(x, ones, torch.float32)
    assert (127 - zero) * scale > 11.5


def test_columns_that_nobody_reads_do_not_count():
    x, columns = random(400, 20), torch.ones(20)
    x[:, 0] *= 50
    columns[0] = 0
    scale, _, least = search(x, columns, torch.float32)
    assert scale < 0.05 and least < 1e-3


def test_every_value_gets_a_grid_of_its_own(model, tmp_path, holds_all):
    program = static(model, BlockStore.open(tmp_path, {}))
    nodes = [n for n in program.nodes if n.op == "round_tensor"]
    assert len(nodes) == 8 and len({n.attrs["scale"] for n in nodes}) == 8
    assert set(rounded_inputs(program).values()) == {STATIC}
    assert [n.name for n in program.nodes] == [n.name for n in RoundActivations("int8")(model()).nodes]
    found, wanted = (interpret.logits(p, windows(2)) for p in (program, model()))
    # 8 values and 14 weights are rounded to 8 bits, each of which loses about 1e-3 of its squares at most
    assert float((found - wanted).square().mean() / wanted.var()) < 22e-3
    assert not torch.equal(found, wanted)


def test_it_is_behind_what_was_rounded_before(model, tmp_path):
    """The second block's grids are those of what leaves the first one when it is rounded."""
    program = static(model, BlockStore.open(tmp_path, {}))
    weight, seen = interpret.in_memory(program), {}

    def watch(node, inputs):
        seen[node.name] = inputs[0]

    tokens = windows()[:16]
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    values = {"input_ids": tokens, "mask": mask, "positions": interpret.positions_of(mask, 16)}
    interpret.run(program.nodes, values, weight, watch=watch)
    node = next(n for n in program.nodes if n.op == "round_tensor" and n.block == 1)
    columns = sum(
        read(program.params[n.params["weight"]]).dequantize().square().sum(0)
        for n in linears(program.nodes)
        if n.inputs[0] == node.name
    )
    scale, zero, _ = search(seen[node.name].flatten(0, 1), columns, torch.float32)
    assert node.attrs["zero"] == zero and node.attrs["scale"] == pytest.approx(scale, rel=1e-5)


def test_a_value_that_no_grid_holds_is_rounded_per_token(model, tmp_path):
    """A feature that is giant in one token of many windows, in the input of the second block's last linear."""
    given = model()
    name = "model.layers.1.mlp.up_proj.weight"
    wide = given.params[name].clone()
    wide[5] *= 3000
    store = BlockStore.open(tmp_path, {})
    tokens = windows()
    tokens[:, 1:] = tokens[:, 1:].clamp(min=10)
    tokens[:, 0] = 3
    loud = given.params["model.layers.1.mlp.gate_proj.weight"].clone()
    program = RoundToNearest(GRID, store)(RoundActivations(STATIC)(given.with_params({name: wide, "g": loud})))
    program = verify(StaticInputs(tokens)(program), "StaticInputs")
    kinds = rounded_inputs(program)
    assert kinds["model.layers.0.mlp.down_proj.weight"] == STATIC
    lasting = {n.params["weight"]: n for n in linears(program.nodes)}
    assert lasting["model.layers.1.mlp.down_proj.weight"].inputs[0].endswith(".int8")


def test_learning_sees_the_grids_and_goes_on_where_it_stopped(model, tmp_path, holds_all):
    recipe = replace(RECIPES["default"], steps=30, lr=4e-3, lr_scale=2e-3, held_out=4)
    grid = Grid(4, -1, True)
    given = RoundActivations(STATIC)(model())
    whole = verify(FlexRound(grid, recipe, windows(), BlockStore.open(tmp_path / "a", {}))(given), "FlexRound")
    store = BlockStore.open(tmp_path / "b", {})

    class Stop(Exception):
        pass

    def stop(stage, done, total, note):
        if done == 1 and note == "block 1":
            raise Stop

    with pytest.raises(Stop):
        FlexRound(grid, recipe, windows(), store, progress=stop)(given)
    resumed = FlexRound(grid, recipe, windows(), store)(given)
    assert input_grids(whole) == input_grids(resumed) and len(input_grids(whole)) == 14
    assert all(scale > 0 for scale, _ in input_grids(whole).values())
    records = [store.finished(i)[1] for i in range(2)]
    assert [len(r["inputs"]) for r in records] == [4, 4]
    assert all(r["error"] <= r["error_rtn"] for r in records)
    for node in linears(n for n in whole.nodes if n.block is not None):
        a, b = (read(p.params[node.params["weight"]]) for p in (whole, resumed))
        assert torch.equal(a.codes, b.codes)


def test_a_grid_that_is_none_is_refused(model):
    program = RoundActivations(STATIC)(model())

    def told(scale, zero):
        nodes = (
            replace(n, attrs={"scale": scale, "zero": zero}) if n.op == "round_tensor" else n for n in program.nodes
        )
        return replace(program, nodes=tuple(nodes))

    for scale, zero, said in (
        (-1.0, 0, "scale is -1.0"),
        (float("inf"), 0, "scale is inf"),
        (1.0, 128, "zero point is"),
    ):
        with pytest.raises(TpvcError, match=said):
            verify(told(scale, zero))
    verify(told(1.0, -128))


def test_the_limit_is_beyond_what_eight_bits_lose_of_a_normal_value():
    assert search(random(400, 100), torch.ones(100), torch.float32)[2] < LIMIT / 50

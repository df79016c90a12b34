"""Factors that make activations easy to round; the op with one grid for all tokens, its grid, learning under it."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tpvc.compiler import interpret
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import round_tensor
from tpvc.compiler.program import Grid, Program, dense, input_grids, linears, read, rounded_inputs
from tpvc.compiler.store import BlockStore
from tpvc.compiler.verify import verify
from tpvc.passes import ease_inputs
from tpvc.passes.ease_inputs import Choice, EaseInputs, Offer, chosen_of, grid_of_range, search
from tpvc.passes.flexround import RECIPES, FlexRound
from tpvc.passes.round_activations import RoundActivations
from tpvc.passes.sensitivity import cost

GRID = Grid(8, -1, True)
STATIC = "int8-static"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def windows(count=24, length=16, seed=1) -> torch.Tensor:
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(seed))


def ease(program: Program, grid: Grid = GRID, tokens: torch.Tensor | None = None) -> Program:
    """The program with factors moved and grids found; weights are still in float."""
    with TemporaryDirectory() as folder:
        store = BlockStore.open(Path(folder) / "easing", {})
        return verify(EaseInputs(windows() if tokens is None else tokens, grid, store)(program), "EaseInputs")


def static(model: Program) -> Program:
    return ease(RoundActivations(STATIC)(model))


@pytest.fixture
def holds_all(monkeypatch):
    """Everything is static, whatever it costs."""
    monkeypatch.setattr(ease_inputs, "EXTRA", float("inf"))


def loud(model) -> Program:
    """The model with a feature of every norm and of every `up` that is ten times larger."""
    given = model()
    changed = {n: p.clone() for n, p in given.params.items() if "layernorm" in n or "up_proj" in n}
    for parameter in changed.values():
        parameter[3] *= 10
    return given.with_params(changed)


def ends(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x.amin(0), x.amax(0)])


def off(program: Program, wanted: torch.Tensor) -> float:
    """Mean KL from `wanted` logits over tokens that were not looked at, in nats."""
    found = interpret.logits(program, windows(8, seed=2)).log_softmax(-1)
    return float((wanted.softmax(-1) * (wanted.log_softmax(-1) - found)).sum(-1).mean())


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
    """With 12 times the deviation inside, a step is 16/255 and step^2/12 = 3e-4 is lost of a number. To clip one such
    entry of 800,000 costs 9^2 / 800,000 = 1e-4; to clip it in every token, more than everything."""
    x, ones = random(40000, 20), torch.ones(40000, 20)
    x[7, 3] = 12.0

    def of(scale, zero):
        return cost(round_tensor(x, scale=scale, zero=zero) - x, ones)

    scale, zero, least = search(x, ones, ends(x), torch.float32)
    assert least == pytest.approx(of(scale, zero)) and least <= of(*grid_of_range(x.min().item(), 12.0, torch.float32))
    assert (127 - zero) * scale < 6.0
    x[:, 3] = 12.0
    scale, zero, _ = search(x, ones, ends(x), torch.float32)
    assert (127 - zero) * scale > 11.5


def test_a_range_may_end_beyond_what_was_sized_where_others_come_louder():
    """Ends of 1 where numbers are even between -1.3 and 1.3: to clip at 1 costs 0.3^3 / 3 / 1.3 = 7e-3 of a number, a
    step of 2.6/255 a thousandth of that."""
    x = torch.linspace(-1.3, 1.3, 4000).view(-1, 1)
    scale, zero, _ = search(x, torch.ones_like(x), torch.tensor([[-1.0], [1.0]]), torch.float32)
    assert (127 - zero) * scale > 1.29


def test_features_that_nobody_minds_do_not_count():
    x, squares = random(400, 20), torch.ones(400, 20)
    x[:, 0] *= 50
    squares[:, 0] = 0
    scale, _, _ = search(x, squares, ends(x), torch.float32)
    assert scale < 0.05


def test_every_value_gets_a_grid_of_its_own(model, holds_all):
    program = static(model())
    nodes = [n for n in program.nodes if n.op == "round_tensor"]
    assert len(nodes) == 8 and len({n.attrs["scale"] for n in nodes}) == 8
    assert set(rounded_inputs(program).values()) == {STATIC}
    assert [n.name for n in program.nodes] == [n.name for n in RoundActivations("int8")(model()).nodes]


def test_factors_that_move_make_room_on_the_grids(model, holds_all):
    """A feature ten times as large as the others takes 3 of 8 bits from them. With an alpha of 0.8 it is less than
    twice as large, and takes less than one."""
    given = loud(model)
    wanted = interpret.logits(given, windows(8, seed=2))
    program = static(given)
    grids = {n.name: n.attrs for n in program.nodes if n.op == "round_tensor"}
    unmoved = {}
    for node in RoundActivations(STATIC)(given).nodes:
        if node.op == "round_tensor":
            x = seen(given, node.inputs[0])
            scale, zero, _ = search(x, torch.ones_like(x), ends(x), torch.float32)
            unmoved[node.name] = {"scale": scale, "zero": zero}
    assert grids.keys() == unmoved.keys()
    plain = RoundActivations(STATIC)(given)
    nodes = (replace(n, attrs=unmoved.get(n.name, n.attrs)) for n in plain.nodes)
    errors = [off(p, wanted) for p in (program, replace(plain, nodes=tuple(nodes)))]
    assert errors[0] < errors[1] / 4


def test_factors_that_move_make_room_for_every_token(model):
    """Where every token has a scale of its own, likewise; the nodes stay what they are."""
    given = loud(model)
    wanted = interpret.logits(given, windows(8, seed=2))
    plain = RoundActivations("int8")(given)
    program = ease(plain)
    assert program.nodes == plain.nodes and set(rounded_inputs(program).values()) == {"int8"}
    assert off(program, wanted) < off(plain, wanted) / 4


def seen(program: Program, name: str) -> torch.Tensor:
    """The value [T, D] of that name on all windows."""
    weight, found, tokens = interpret.in_memory(program), [], windows()

    def watch(node, inputs):
        found.extend(v.flatten(0, 1) for n, v in zip(node.inputs, inputs, strict=True) if n == name)

    mask = torch.ones(tokens.shape, dtype=torch.bool)
    values = {"input_ids": tokens, "mask": mask, "positions": interpret.positions_of(mask, tokens.shape[1])}
    interpret.run(program.nodes, values, weight, watch=watch)
    return found[0]


def test_the_grid_is_that_of_the_divided_value(model, holds_all):
    """What the factors left of it, on all windows: its range ends 1.25^2 beyond the largest entry at most, and behind a
    norm nothing is rare enough to be clipped by more than half."""
    program = static(loud(model))
    for node in (n for n in program.nodes if n.name.endswith("layernorm.int8")):
        dropped = {n.name: n.inputs[0] for n in program.nodes if n.op == "round_tensor"}
        nodes = (replace(n, inputs=tuple(dropped.get(v, v) for v in n.inputs)) for n in program.nodes)
        x = seen(replace(program, nodes=tuple(n for n in nodes if n.name not in dropped)), node.inputs[0])
        most = (127 - node.attrs["zero"]) * node.attrs["scale"]
        assert 0.5 * float(x.max()) < most < 1.57 * float(x.max())


def test_a_value_that_no_grid_holds_is_rounded_per_token(model, monkeypatch):
    """A feature that is giant at the first token alone, on which nothing is to be lost; or as much as one likes."""
    given = model()
    tokens = windows().clamp(min=10)
    tokens[:, 0] = 3
    wide = {n: given.params[n].clone() for n in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight")}
    wide["model.layers.1.mlp.up_proj.weight"][5] *= 3000
    program = RoundActivations(STATIC)(given.with_params(wide))
    monkeypatch.setattr(ease_inputs, "EXTRA", 0.0)
    kinds = rounded_inputs(ease(program, tokens=tokens))
    assert kinds["model.layers.1.mlp.down_proj.weight"] == "int8"
    monkeypatch.setattr(ease_inputs, "EXTRA", float("inf"))
    assert set(rounded_inputs(ease(program, tokens=tokens)).values()) == {STATIC}


def test_a_run_that_goes_on_has_the_choices_it_began_with(model, tmp_path):
    """Blocks that were finished before were rounded under these factors, whatever would be found now."""
    given, store = RoundActivations(STATIC)(loud(model)), BlockStore.open(tmp_path, {})
    first = EaseInputs(windows(), GRID, store)(given)
    again = EaseInputs(windows(seed=7), GRID, store)(given)
    assert again.nodes == first.nodes != ease(given, tokens=windows(seed=7)).nodes
    assert all(torch.equal(dense(again.params[n]), dense(p)) for n, p in first.params.items())
    assert store.finished(0)[1]["divided"] == [
        f"model.layers.{i}.{n}" for i in range(2) for n in ("mlp.up_proj", "self_attn.v_proj")
    ]


def test_where_a_tensor_has_one_scale_only_norms_are_divided(model, tmp_path):
    """Rows of a matrix that are divided by factors of their own would lose what they have of it."""
    given, store = RoundActivations("int8")(loud(model)), BlockStore.open(tmp_path, {})
    eased = EaseInputs(windows(), Grid(8, 0, True), store)(given)
    assert store.finished(0)[1]["divided"] == []
    assert (
        eased.params["model.layers.0.input_layernorm.weight"]
        is not given.params["model.layers.0.input_layernorm.weight"]
    )


def test_as_few_values_are_per_token_as_is_allowed():
    nats = {"a": (4.0, 3.0), "b": (9.0, 1.0), "c": (2.0, 2.5), "d": (5.0, 2.0)}
    ones = torch.ones(1)
    offers = [
        Offer(name, None, Choice("round_tensor", {}, ones, static), Choice("round_rows", {}, ones, dynamic))
        for name, (static, dynamic) in nats.items()
    ]

    def apart(extra):
        return "".join(o.name for o, c in zip(offers, chosen_of(offers, extra), strict=True) if c is o.dynamic)

    assert [apart(e) for e in (12.0, 11.9, 4.0, 3.9, 1.0, 0.9, 0.0)] == ["", "b", "b", "bd", "bd", "abd", "abd"]


def test_learning_sees_the_grids_and_goes_on_where_it_stopped(model, tmp_path, holds_all):
    recipe = replace(RECIPES["default"], steps=30, lr=4e-3, lr_scale=2e-3, held_out=4)
    grid = Grid(4, -1, True)
    given = ease(RoundActivations(STATIC)(model()), grid)
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
    assert input_grids(whole) == input_grids(resumed) == input_grids(given) and len(input_grids(whole)) == 14
    records = [store.finished(i)[1] for i in range(2)]
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

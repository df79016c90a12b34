"""Make what linears read easy to round to 8 bits: factors that move into weights, and the grids of `round_tensor`.

Before weights are rounded, every value that linears read is looked at by itself, on calibration text: factors of some
alpha are moved from it into the columns that read it (`migrate.py`), and where one scale and zero point are to hold
for all tokens it gets the range on which it then loses least. What is lost is the KL divergence from the float model,
in nats per token (`sensitivity.py`), by rounding the value and by rounding to nearest the weights that read it:

    per token  the alpha with the least of both when every token has a scale of its own (`round_rows`)
    static     the alpha, and the range [max(min x, -c), min(max x, c)], with the least of both

Sizes of features and ends of ranges are those of some windows, costs are measured on others: a range that fits its own
windows closely cuts off what other texts bring.

Static values then become per token, the one that gains most by it first, until all that are left lose no more than
`EXTRA` by being static. First come those in which a few features are giant on one or two tokens that all others attend
to: neither a grid nor a row of a weight holds them beside the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpvc.compiler.ops import TENSOR_RANGE, round_rows, round_tensor
from tpvc.compiler.program import INPUT_ROUNDERS, Grids, Node, Program, grid_for, linears
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.store import BlockStore
from tpvc.compiler.tuning.parallel import SharedStore
from tpvc.passes.block import AT_ONCE, EXACT, Block, behind_prompts, embedded, spread
from tpvc.passes.grid import to_nearest
from tpvc.passes.migrate import Place, moved, places_of
from tpvc.passes.sensitivity import Felt, cost, feel, looked_at, output_gradients

EASED = ("int8", "int8-static")
"""Activations that this is done for. In fp8 a number is rounded relative to itself, whatever its neighbours are."""
SIZED = 64
"""Windows behind those on which costs are measured, the first ones, on which features are sized; where there are none,
on the same."""
ALPHAS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CLIPS = tuple(0.8**k for k in range(-2, 20))
"""Where a range may end, relative to the largest entry: from 156 % down to 1 %."""
COARSE = CLIPS[0:7:2]
"""The ones by which factors are compared."""
EXTRA = 0.0006
"""Nats per token that static rounding may cost in all beyond rounding every value per token."""


@dataclass(frozen=True)
class EaseInputs:
    """The pass, for a Program in float.

    windows      int64 [n, L] calibration tokens
    grid         on which weights will be rounded
    store        where the choices lie when all are made: blocks are rounded under these, also in a run that goes on
    scale_dtype  dtype the scales are stored in; they are exact in it
    """

    windows: Tensor
    grid: Grids
    store: BlockStore | SharedStore
    scale_dtype: torch.dtype = torch.float32
    seed: int = 0
    device: str = "cpu"
    progress: Progress = silent

    @torch.no_grad()
    def __call__(self, program: Program) -> Program:
        if self.store.finished(0) is None:
            record, factors = kept(program, self.choices(program))
            self.store.save(0, {}, record, factors)
        return eased(program, self.store.finished(0)[1], self.store.streams(0))

    @torch.no_grad()
    def choices(self, program: Program) -> dict[str, Choice]:
        """What is best for every value that is rounded, by the name of what rounds it."""
        windows = behind_prompts(self.windows[: windows_seen(program)], program)
        ids, few = spread(len(windows), len(program.adapters)), looked_at(program)
        stream = embedded(program, windows, ids)
        gradients = output_gradients(program, stream[:few], ids[:few], self.seed, self.device, self.progress)
        offers: list[Offer] = []
        for index in range(program.blocks):
            self.progress("ease inputs", index, program.blocks, f"block {index}")
            block = Block(program, index, self.device)
            offers += self.offers(program, block, index, stream, ids, gradients[index])
            stream = block.outputs(stream, block.weights, ids, EXACT)
        chosen = chosen_of(offers, EXTRA)
        nats, apart = sum(c.nats for c in chosen), sum(c.op == "round_rows" for c in chosen)
        note = f"{apart} of {len(chosen)} values per token, {nats:.1e} nats a token"
        self.progress("ease inputs", program.blocks, program.blocks, note)
        return {o.name: c for o, c in zip(offers, chosen, strict=True)}

    def offers(
        self, program: Program, block: Block, index: int, x: Tensor, ids: Tensor, gradient: Tensor
    ) -> list[Offer]:
        """Of block `index`, given what enters it, x [n, L, D] with adapters `ids` [n], and g [few, L, D] of the first
        windows at its output."""
        few = len(gradient)
        places = {n: p for n, p in places_of(program, index).items() if self._holds(p)}
        felt, rest = feel(block, x[:few], ids[:few], gradient), few if len(x) > few else 0
        ends = _ends(block, x[rest:], ids[rest:])
        nodes = [n for n in block.nodes if n.op in INPUT_ROUNDERS]
        return [self._offer(program, block, felt, n, ends[n.name], places.get(n.name)) for n in nodes]

    def _holds(self, place: Place) -> bool:
        """Whether the grid of what is divided does not mind: rows have scales of their own."""
        return place.source.op != "linear" or grid_for(self.grid, place.source.params["weight"]).group != 0

    def _offer(
        self, program: Program, block: Block, felt: Felt, node: Node, ends: Tensor, place: Place | None
    ) -> Offer:
        """The ways to round what the node rounds, whose features lie between `ends` [2, D]."""
        x, squares = felt.inputs[node.name]
        names = sorted({n.params["weight"] for n in linears(block.nodes) if n.inputs[0] == node.name})
        weights = [block.weights[name] for name in names]
        candidates = [torch.ones_like(x[0])]
        if place is not None:
            found = (place.factors(ends.abs().amax(0), weights, alpha) for alpha in ALPHAS)
            candidates += [place.storable(program, s) for s in found]
        lost = [sum(self._rounded(x, n, block.weights[n], felt.outputs[n], s) for n in names) for s in candidates]

        def row(s: Tensor) -> float:
            return cost(round_rows(x / s, kind="int8") - x / s, squares * s.square())

        def grid(s: Tensor, clips: tuple[float, ...]) -> tuple[float, int, float]:
            return search(x / s, squares * s.square(), ends / s, self.scale_dtype, clips)

        each = [nats + row(s) for nats, s in zip(lost, candidates, strict=True)]
        least = each.index(min(each))
        dynamic = Choice("round_rows", {"kind": "int8"}, candidates[least].cpu(), each[least])
        if node.op == "round_rows":
            return Offer(node.name, place, None, dynamic)
        once = [nats + grid(s, COARSE)[2] for nats, s in zip(lost, candidates, strict=True)]
        least = once.index(min(once))
        scale, zero, nats = grid(candidates[least], CLIPS)
        static = Choice("round_tensor", {"scale": scale, "zero": zero}, candidates[least].cpu(), lost[least] + nats)
        return Offer(node.name, place, static, dynamic)

    def _rounded(self, x: Tensor, name: str, weight: Tensor, squares: Tensor, s: Tensor) -> float:
        """Nats per token of rounding weight * s to nearest."""
        scaled, grid = weight * s, grid_for(self.grid, name)
        rounded = to_nearest(scaled, grid, self.scale_dtype)
        return cost(x @ (rounded.dequantize().to(x.device) / s - weight).T, squares)


@dataclass(frozen=True, eq=False)
class Choice:
    """The op and attributes of the node that rounds a value, the factors [D] that are moved out of the value, and what
    that costs."""

    op: str
    attrs: Mapping
    factors: Tensor
    nats: float


@dataclass(frozen=True, eq=False)
class Offer:
    """The choices for a value: one grid for all tokens, where there is to be one, or a scale for every token."""

    name: str
    place: Place | None
    static: Choice | None
    dynamic: Choice


def kept(program: Program, chosen: Mapping[str, Choice]) -> tuple[dict[str, list], dict[str, Tensor]]:
    """({"inputs": ops and attributes, "divided": linears whose rows are divided}, {name: factors [D] other than 1})."""
    places = {name: p for index in range(program.blocks) for name, p in places_of(program, index).items()}
    factors = {n: c.factors for n, c in chosen.items() if n in places and bool((c.factors != 1).any())}
    divided = sorted(places[n].source.name for n in factors if places[n].source.op == "linear")
    inputs = [{"name": n, "op": c.op, "attrs": dict(c.attrs)} for n, c in chosen.items()]
    return {"inputs": inputs, "divided": divided}, factors


def eased(program: Program, record: Mapping[str, list], factors: Mapping[str, Tensor]) -> Program:
    """The program with what `kept` tells."""
    for index in range(program.blocks):
        for name, place in places_of(program, index).items():
            if name in factors:
                program = moved(program, place, factors[name])
    return _with(program, {told["name"]: (told["op"], told["attrs"]) for told in record["inputs"]})


def windows_seen(program: Program) -> int:
    """How many calibration windows are looked at, at most."""
    return looked_at(program) + SIZED


def chosen_of(offers: list[Offer], extra: float) -> list[Choice]:
    """Static ones where there are any, but for as few as lose more than `extra` by it; all of these together."""
    gains = {o.name: o.static.nats - o.dynamic.nats for o in offers if o.static is not None}
    left, dynamic = sum(gain for gain in gains.values() if gain > 0), set()
    for name in sorted(gains, key=gains.__getitem__, reverse=True):
        if left <= extra or gains[name] <= 0:
            break
        dynamic.add(name)
        left -= gains[name]
    return [o.dynamic if o.static is None or o.name in dynamic else o.static for o in offers]


def search(
    x: Tensor, squares: Tensor, ends: Tensor, dtype: torch.dtype, clips: tuple[float, ...] = CLIPS
) -> tuple[float, int, float]:
    """(scale, zero point, nats per token) of the cheapest grid for x [T, D] with g^2 `squares` [T, D], whose features
    lie between `ends` [2, D]."""
    low, high = min(ends[0].min().item(), 0.0), max(ends[1].max().item(), 0.0)
    best = None
    for clip in clips:
        most, wide = clip * max(-low, high), max(clip, 1.0)
        scale, zero = grid_of_range(max(wide * low, -most), min(wide * high, most), dtype)
        found = cost(round_tensor(x, scale=scale, zero=zero) - x, squares)
        if best is None or found < best[2]:
            best = scale, zero, found
    return best


def _ends(block: Block, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """Least and largest number [2, D] of every feature that linears read, by the value's name."""
    found: dict[str, Tensor] = {}

    def watch(node: Node, inputs: list[Tensor]) -> None:
        if node.op in INPUT_ROUNDERS:
            rows = inputs[0].flatten(0, 1)
            now = torch.stack([rows.amin(0), rows.amax(0)])
            before = found.get(node.name, now)
            found[node.name] = torch.stack([torch.minimum(before[0], now[0]), torch.maximum(before[1], now[1])])

    for part, own in zip(x.split(AT_ONCE), ids.split(AT_ONCE), strict=True):
        block.output(part, block.weights, own, watch, EXACT)
    return found


def grid_of_range(low: float, high: float, dtype: torch.dtype) -> tuple[float, int]:
    """(scale, zero point) of the grid from `low` <= 0 to `high` >= 0; the scale is exact in `dtype`."""
    least, most = TENSOR_RANGE
    scale = torch.tensor((high - low) / (most - least), dtype=torch.float32).to(dtype)
    scale = scale.clamp(min=torch.finfo(dtype).tiny).item()
    return scale, int(min(max(round(least - low / scale), least), most))


def with_any_grids(program: Program) -> Program:
    """The program with some grid where none is found yet: for whoever asks how long it takes and not what comes out."""
    nodes = [n for n in program.nodes if n.op == "round_tensor" and n.attrs["scale"] is None]
    return _with(program, {n.name: (n.op, {"scale": 1.0, "zero": 0}) for n in nodes})


def recorded(program: Program, index: int) -> dict[str, list]:
    """What a record of block `index` says about how its inputs are rounded; nothing where none is."""
    told = [{"name": n.name, "op": n.op, **n.attrs} for n in program.block(index) if n.op in INPUT_ROUNDERS]
    return {"inputs": told} if told else {}


def _with(program: Program, found: Mapping[str, tuple[str, Mapping]]) -> Program:
    """The program with other ops and attributes of the nodes in `found`."""
    if not found:
        return program

    def changed(node: Node) -> Node:
        op, attrs = found.get(node.name, (node.op, node.attrs))
        return replace(node, op=op, attrs=attrs)

    return replace(program, nodes=tuple(changed(n) for n in program.nodes))

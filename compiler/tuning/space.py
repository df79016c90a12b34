"""What fine-tuning trains, and what of it is protected: full weights, low-rank updates, or RoAd adapters.

A space is one of three frozen dataclasses, each in a file of its own, that have in common

    program          the Program that training runs
    params           leaves, float32, that the optimiser changes
    layers           {protected name: transformer block}
    adapter          the adapter id that training's rows have

    weight(held, dtype)           (Program, Weight) of a training step; `held` has what is not trained
    value(name, params=None)      a protected tensor as it is, float32, or as `params`, values for all leaves, make it
    add(name, gradient)           add dL/d(value) of a protected tensor to the gradients of the leaves

and, for the general phase, which wants the gradients of protected tensors and not of leaves,

    opened()                      leaves whose gradients tell those; the parameters themselves where that is the same
    seen(held, dtype, leaves)     (Program, Weight) that computes through these
    gradient(leaves, name)        dL/d(value), float32
    spread(leaves)                make the parameters' gradients from the leaves'

    drift(name)                   (how far a tensor is from the base model, what to compare that with)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.interpret import Weight, in_memory
from tpvc.compiler.program import Node, Program, linears
from tpvc.compiler.tuning import lora_space, road_space, weight_space
from tpvc.compiler.tuning.lora_space import LoraSpace
from tpvc.compiler.tuning.road_space import RoadSpace
from tpvc.compiler.tuning.weight_space import WeightSpace

Space = WeightSpace | LoraSpace | RoadSpace

KINDS = (weight_space.KIND, lora_space.KIND, *road_space.KINDS)
RATES = {weight_space.KIND: 2e-5, lora_space.KIND: 2e-4} | dict.fromkeys(road_space.KINDS, 3e-3)
"""The highest learning rate where none is named."""
LINEARS, EVERYTHING = "all-linear", "all"


def targets_of(program: Program, targets: str | Sequence[str]) -> list[Node]:
    """The linears of the blocks that are meant: "all-linear" and "all" mean every one, else last parts of names."""
    inside = [n for n in linears(program.nodes) if n.block is not None]
    if targets in (LINEARS, EVERYTHING):
        return inside
    wanted = [targets] if isinstance(targets, str) else list(targets)
    known = sorted({n.name.split(".")[-1] for n in inside})
    missing = sorted(set(wanted) - set(known))
    if missing or not wanted:
        found = f"'{missing[0]}'" if missing else "none"
        raise TpvcError(f"the blocks have no linear called {found}; expected of {', '.join(known)}, or {LINEARS}")
    return [n for n in inside if n.name.split(".")[-1] in wanted]


def make_space(
    program: Program, kind: str, targets: str | Sequence[str], rank: int, seed: int, device: str = "cpu"
) -> Space:
    """`program` before any training: full weights, or an adapter that changes nothing yet.

    kind     "weights", "lora", "road_1", "road_2" or "road_4"
    targets  see targets_of; "all", of weights alone, trains every parameter of the model, and protects the linears'
    """
    if kind not in KINDS:
        raise TpvcError(f"what to train is '{kind}'; expected one of {', '.join(KINDS)}")
    if targets == EVERYTHING and kind != weight_space.KIND:
        raise TpvcError(f"targets are '{EVERYTHING}', which only weights can be; expected {LINEARS} for {kind}")
    nodes = targets_of(program, targets)
    if kind == weight_space.KIND:
        return weight_space.weight_space(program, nodes, targets == EVERYTHING, device)
    if kind == lora_space.KIND:
        return lora_space.lora_space(program, nodes, rank, seed, device)
    return road_space.road_space(program, nodes, kind, device)


def held_by(program: Program, space: Space, device: str, dtype: torch.dtype) -> Weight:
    """Everything of `program` that the space does not train, in memory."""
    rest = {name: p for name, p in program.params.items() if name not in space.params}
    return in_memory(replace(program, params=rest), device, dtype)

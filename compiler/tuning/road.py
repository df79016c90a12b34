"""RoAd tuning: the rotations of a Program's linears are learned, its weights stay as they are, float or integers.

The Program gets a `rotate` node behind every target, and the interpreter runs it with vectors C and S that are computed
from theta and alpha at every step, so that gradients arrive there. Nothing else is trained: no gradient of a weight is
ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from tpvc.compiler.adapters.road import Road, Rotation, check_layout, halves, identity, vectors
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.interpret import Weight
from tpvc.compiler.program import Program, linears
from tpvc.compiler.tuning.loss import Batch, answer_logits
from tpvc.passes.bank_road import BankRoad

ALL = "all-linear"
GROUP = 64
PAIRS = ("all", "first", "second")


@dataclass(frozen=True)
class Shape:
    """What is learned.

    variant  road_1, road_2 or road_4
    group    outputs that are paired among themselves
    targets  names of linear nodes
    pairs    all; or the first or second half of every linear's pairs, so that two tasks stay apart
    """

    variant: str
    group: int
    targets: tuple[str, ...]
    pairs: str = "all"


def shape(program: Program, variant: str, group: int | None, targets: str | Sequence[str], pairs: str) -> Shape:
    """Check a wish against the model. `targets` is "all-linear" (all linears of all blocks) or last parts of names.

    Without a group the largest that fits every target, at most 64, is taken.
    """
    if pairs not in PAIRS:
        raise TpvcError(f"pairs is '{pairs}'; expected one of {', '.join(PAIRS)}")
    if isinstance(targets, str) and targets != ALL:
        targets = [targets]
    if not targets:
        raise TpvcError(f"no targets were named; expected {ALL}, or last parts of names of linears")
    inside = [n for n in linears(program.nodes) if n.block is not None]
    chosen = inside if targets == ALL else [n for n in linears(program.nodes) if n.name.split(".")[-1] in targets]
    known = sorted({n.name.split(".")[-1] for n in linears(program.nodes)})
    missing = [] if targets == ALL else sorted(set(targets) - set(known))
    if missing:
        raise TpvcError(f"the model has no linear called '{missing[0]}'; it has {', '.join(known)}")
    outputs = {n.name: program.params[n.params["weight"]].shape[0] for n in chosen}
    group = gcd(GROUP, *outputs.values()) if group is None else group
    for name, features in outputs.items():
        if features % 2 or (pairs != "all" and features < 4):
            raise TpvcError(
                f"'{name}' has {features} outputs, which do not make pairs enough; leave it out of --targets"
            )
        check_layout(variant, group, features, f"'{name}'")
    return Shape(variant, group, tuple(outputs), pairs)


@dataclass(frozen=True, eq=False)
class Trainee:
    """A Program with one adapter in training.

    params  {"theta": [...], "alpha": [...]}: all linears' numbers one after the other, float32 leaves. Of road_4's
            theta only the half of the sines is there: that of the cosines starts at 0 and has no gradient there
    masks   by the same names, 1 where a number may move; empty when all may
    """

    program: Program
    shape: Shape
    params: dict[str, Tensor]
    masks: dict[str, Tensor]
    features: tuple[int, ...]

    def weight(self, base: Weight) -> Weight:
        """`base` for the weights, and vectors computed from the parameters as they are now for the rotations."""
        made = {}
        for name, rotation in self._rotations(self.params).items():
            cosine, sine = vectors(rotation.variant, rotation.group, rotation.theta, rotation.alpha)
            made |= {f"{name}.rotate.cosine": cosine[None], f"{name}.rotate.sine": sine[None]}
        return lambda name: made[name] if name in made else base(name)

    def road(self, name: str, params: Mapping[str, Tensor]) -> Road:
        """The adapter that `params` stand for, in host memory."""
        held = {key: value.detach().cpu().clone() for key, value in params.items()}
        return Road(name, self._rotations(held))

    def _rotations(self, params: Mapping[str, Tensor]) -> dict[str, Rotation]:
        variant, group = self.shape.variant, self.shape.group
        sizes = {key: [int(n * _stored(variant, key)) for n in self.features] for key in ("theta", "alpha")}
        parts = zip(self.shape.targets, *(params[key].split(sizes[key]) for key in ("theta", "alpha")), strict=True)
        if variant != "road_4":
            return {name: Rotation(variant, group, theta, alpha) for name, theta, alpha in parts}
        return {name: Rotation(variant, group, _with_dead_half(theta, group), alpha) for name, theta, alpha in parts}


def trainee(program: Program, shape: Shape, device: str = "cpu") -> Trainee:
    """`program` with an identity adapter, ready to be trained."""
    features = tuple(_outputs(program, name) for name in shape.targets)
    start = {n: identity(shape.variant, shape.group, f) for n, f in zip(shape.targets, features, strict=True)}
    banked = BankRoad((Road("tuned", start),))(program)
    sizes = {key: sum(int(n * _stored(shape.variant, key)) for n in features) for key in ("theta", "alpha")}
    params = {
        "theta": torch.zeros(sizes["theta"], device=device, requires_grad=True),
        "alpha": torch.ones(sizes["alpha"], device=device, requires_grad=True),
    }
    masks = {}
    if shape.pairs != "all":
        masks = {key: torch.cat([_mask(shape, n, key) for n in features]).to(device) for key in params}
    return Trainee(banked, shape, params, masks, features)


def loss_of(trained: Trainee, base: Weight, batches: Callable[[list[int]], Batch]) -> Callable[[list[int]], Tensor]:
    """The mean negative log-likelihood, in nats, of the answers' tokens in the examples with the given indices."""

    def loss(indices: list[int]) -> Tensor:
        batch = batches(indices)
        logits = answer_logits(trained.program, trained.weight(base), batch, adapter=0)
        return torch.nn.functional.cross_entropy(logits.float(), batch.targets)

    return loss


def _outputs(program: Program, name: str) -> int:
    node = next(n for n in linears(program.nodes) if n.name == name)
    return program.params[node.params["weight"]].shape[0]


def _stored(variant: str, key: str) -> float:
    """Trained numbers for every output."""
    if variant == "road_4":
        return 1 if key == "theta" else 2
    return 0.5 if variant == "road_1" else 1


def _with_dead_half(sines: Tensor, group: int) -> Tensor:
    """road_4's theta [2n] in PEFT's order from its sine half [n]."""
    live = sines.view(-1, 1, group)
    return torch.cat((torch.zeros_like(live), live), 1).reshape(-1)


def _mask(shape: Shape, features: int, key: str) -> Tensor:
    """1 for the numbers of the pairs that may move: the first or the second half of a linear's pairs."""
    pairs = torch.arange(features // 2) < features // 4
    chosen = (pairs if shape.pairs == "first" else ~pairs).float()
    if shape.variant == "road_1":
        return chosen
    outputs = torch.empty(features)
    for half in halves(outputs, shape.group):
        half.copy_(chosen.view(half.shape))
    if shape.variant == "road_4" and key == "alpha":
        return outputs.view(-1, 1, shape.group).expand(-1, 2, -1).reshape(-1)
    return outputs

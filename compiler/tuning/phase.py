"""The steps of the two phases: learning general text while importance is recorded, and the domain under a penalty."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.interpret import Weight
from tpvc.compiler.ops import OPS
from tpvc.compiler.program import Program
from tpvc.compiler.tuning.examples import Encoded
from tpvc.compiler.tuning.importance import record
from tpvc.compiler.tuning.loss import answer_logits, batch_of
from tpvc.compiler.tuning.parallel import Ranks
from tpvc.compiler.tuning.penalty import Penalty
from tpvc.compiler.tuning.space import Space

CLIP = 1.0
"""The longest gradient that a step uses, penalty and all; importance is recorded from the task's, before this."""
QUARTER = 0.25
"""The share of a run after which phi follows from a ratio."""

See = Callable[[], tuple[Program, Weight]]
Backward = Callable[[See, list[int]], float]
"""(what computes, indices of a batch) -> the mean loss of the batch; gradients are added to those of the leaves."""


def backward_of(examples: Sequence[Encoded], micro: int, adapter: int, ranks: Ranks, device: str = "cpu") -> Backward:
    """Mean negative log-likelihood, nats a token, over all answers' tokens of a batch, `micro` examples at a time.

    Every token of the batch weighs the same, whatever the parts. Of this process's share only: see Ranks.
    """

    def backward(see: See, indices: list[int]) -> float:
        tokens = sum(len(examples[i].ids) - examples[i].answer for i in indices)
        own, total = ranks.own(indices), 0.0
        for first in range(0, len(own), micro):
            batch = batch_of([examples[i] for i in own[first : first + micro]], device)
            program, weight = see()
            logits = answer_logits(program, weight, batch, adapter, OPS)
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        return total

    return backward


def general_step(
    space: Space, omega: Mapping[str, Tensor], see: Callable, backward: Backward, ranks: Ranks
) -> Callable[[torch.optim.Optimizer, list[int], int], list[float]]:
    """A step on general text, for loop.descend: adds what it did to `omega`. Returns the loss.

    see  leaves -> See
    """

    def step(optimizer: torch.optim.Optimizer, indices: list[int], number: int) -> list[float]:
        optimizer.zero_grad(set_to_none=True)
        leaves = space.opened()
        loss = _summed(backward(see(leaves), indices), leaves, ranks)
        if not math.isfinite(loss):
            return [loss]
        gradients = {name: space.gradient(leaves, name) for name in space.layers}
        if leaves is space.params:  # whose gradients are about to be clipped in place
            gradients = {name: gradient.clone() for name, gradient in gradients.items()}
        space.spread(leaves)
        before = {name: p.detach().clone() for name, p in space.params.items()}
        torch.nn.utils.clip_grad_norm_(list(space.params.values()), CLIP)
        optimizer.step()
        record(omega, space, gradients, before)
        return [loss]

    return step


@dataclass(frozen=True, eq=False)
class Strength:
    """phi: float64 [], changed in place where it is found out. ratio: the wanted penalty over loss; None: phi is given,
    and holds from the first step.

    With a ratio the first QUARTER of the run has no penalty. Where it ends phi becomes what makes the penalty of the
    movement until then the wanted share of the loss, and stays. It is not corrected later: a stronger phi holds
    elements back, so that beyond some strength the penalty becomes less, and a wish that is never met would drive phi
    up without end.
    """

    phi: Tensor
    ratio: float | None

    def learn(self, loss: float, penalty: float, step: int, steps: int) -> None:
        """Of step `step`, before it moves: the task's loss, and the penalty over phi."""
        if self.ratio is not None and step == max(1, int(QUARTER * steps)) and penalty > 0:
            self.phi.fill_(self.ratio * loss / penalty)


def strength(phi: float | None, ratio: float | None) -> Strength:
    """TpvcError for numbers that no penalty can have."""
    for name, value in (("phi", phi), ("the ratio of penalty to loss", ratio)):
        if value is not None and not 0 <= value < math.inf:
            raise TpvcError(f"{name} is {value:g}; expected a number of at least 0")
    if (phi is None) == (ratio is None):
        raise TpvcError(f"found phi {phi} and a ratio {ratio} of penalty to loss; expected one of them, leave one out")
    return Strength(torch.tensor(phi or 0.0, dtype=torch.float64), ratio)


def domain_step(
    space: Space,
    penalty: Penalty | None,
    strength: Strength,
    see: See,
    backward: Backward,
    steps: int,
    ranks: Ranks,
) -> Callable[[torch.optim.Optimizer, list[int], int], list[float]]:
    """A step on the domain, for loop.descend. Returns the task's loss and phi times the penalty."""

    def step(optimizer: torch.optim.Optimizer, indices: list[int], number: int) -> list[float]:
        optimizer.zero_grad(set_to_none=True)
        loss = _summed(backward(see, indices), space.params, ranks)
        if not math.isfinite(loss):
            return [loss, math.nan]
        added = 0.0
        if penalty is not None:
            phi = float(strength.phi)
            found = float(penalty.add(space, phi))
            if not math.isfinite(found):
                return [math.nan, math.nan]
            added = phi * found
            strength.learn(loss, found, number, steps)
        torch.nn.utils.clip_grad_norm_(list(space.params.values()), CLIP)
        optimizer.step()
        return [loss, added]

    return step


def _summed(loss: float, leaves: Mapping[str, Tensor], ranks: Ranks) -> float:
    """The batch's loss over all processes; the leaves' gradients are made those of the whole batch."""
    for leaf in leaves.values():
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
    if ranks.count == 1:
        return loss
    total = torch.tensor(loss, dtype=torch.float64, device=next(iter(leaves.values())).device)
    ranks.total([total, *(leaf.grad for leaf in leaves.values())])
    return float(total)

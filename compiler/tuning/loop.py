"""The optimiser loop of everything that is tuned: AdamW, warm-up and decay, best by validation, resumable.

The run is cut into stretches of steps. After each the validation set is measured and the state goes to a BlockStore, so
that a run that was stopped goes on after its last finished stretch, bit for bit: the batch of step s follows from the
seed and s alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.store import BlockStore
from tpvc.compiler.tuning.loss import Answers

STRETCHES, LONGEST = 10, 100
"""A run has this many stretches, more where one would be longer than LONGEST steps."""

TOGETHER = 8
"""Batches that are made together, of examples of like length."""


@dataclass(frozen=True)
class Schedule:
    """steps of `batch` examples; the rate climbs to `lr` over the first `warmup` (a share) and falls to 0, linearly or
    as half a cosine. `weight_decay` is AdamW's."""

    steps: int
    batch: int
    lr: float
    warmup: float
    seed: int
    decay: str = "linear"
    weight_decay: float = 0.0

    @property
    def stretch(self) -> int:
        return min(LONGEST, math.ceil(self.steps / STRETCHES))

    def rate(self, step: int) -> float:
        rise = max(1, round(self.warmup * self.steps))
        left = (self.steps - step) / (self.steps - rise + 1)
        if self.decay == "cosine":
            left = (1 - math.cos(math.pi * min(1.0, left))) / 2
        return self.lr * min((step + 1) / rise, left)


@dataclass(frozen=True, eq=False)
class Tuned:
    """best: the parameters with the least validation loss (the start counts too); curve: [[step, training loss], ...];
    checks: [[step, validation loss, exact share], ...] from step 0 on; step: that of `best`."""

    best: dict[str, Tensor]
    curve: list[list[float]]
    checks: list[list[float]]
    step: int


class Diverged(TpvcError):
    """The loss is no finite number. step: where that was; tuned: what was reached after the last finished stretch."""

    def __init__(self, loss: float, step: int, tuned: Tuned):
        super().__init__(f"the loss is {loss} at step {step}; expected a finite number, lower the learning rate")
        self.step, self.tuned = step, tuned


def tune(
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    lengths: Sequence[int],
    loss: Callable[[list[int]], Tensor],
    validate: Callable[[], Answers],
    schedule: Schedule,
    store: BlockStore,
    progress: Progress = silent,
) -> Tuned:
    """Lower `loss(indices of the examples of a batch)` by changing `params` in place with AdamW.

    params    leaves that require gradients
    masks     by the same names, for some of them: 1 where a number may move, 0 where it must not
    lengths   of all examples in tokens; every epoch sees each once, in an order drawn from the seed

    Where the loss becomes no finite number TpvcError is raised, and what was stored is forgotten: it would only bring
    the run there again.
    """

    def step(optimizer: torch.optim.Optimizer, indices: list[int], number: int) -> list[float]:
        value = loss(indices)
        if math.isfinite(value.item()):
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            for name, mask in masks.items():
                params[name].grad.mul_(mask)
            optimizer.step()
        return [value.item()]

    def check() -> list[float]:
        found = validate()
        return [found.loss, found.exact]

    try:
        return descend(params, lengths, step, check, schedule, store, progress=progress)
    except Diverged:
        store.clear()
        raise


def descend(
    params: Mapping[str, Tensor],
    lengths: Sequence[int],
    step: Callable[[torch.optim.Optimizer, list[int], int], list[float]],
    validate: Callable[[], list[float]] | None,
    schedule: Schedule,
    store: BlockStore,
    *,
    also: Mapping[str, Tensor] | None = None,
    stage: str = "tune",
    progress: Progress = silent,
) -> Tuned:
    """The loop of `tune`, with the work of one step left to the caller. A finished run is restored and left as it is.

    step      (optimizer, indices of a batch, number) changes `params` and returns numbers whose means over a stretch
              are the curve's; the first is the loss, and where that is not finite the step has changed nothing
    validate  numbers of which the first chooses the best and the second, if any, is a share of exact answers. None:
              nothing is measured, no best is kept, and `params` are left as the last step made them
    also      tensors beside the parameters that steps change in place: they are stored and restored with them

    Raises Diverged.
    """
    also = also or {}
    optimizer = torch.optim.AdamW(list(params.values()), lr=schedule.lr, weight_decay=schedule.weight_decay)
    curve, checks, best, best_step, at, done = [], [], {}, 0, 0, 0
    while (found := store.finished(done)) is not None:
        done += 1
        told = found[1]
    if done:
        curve, checks, best_step, at = told["curve"], told["checks"], told["best_step"], told["step"]
        best = _restore(params, also, optimizer, store.streams(done - 1))
    fresh, note = done == 0, ""
    while True:
        if fresh:
            if validate is not None:
                measured = validate()
                if not math.isfinite(measured[0]):
                    raise Diverged(measured[0], at, Tuned(best, curve, checks, best_step))
                if not checks or measured[0] < min(c[1] for c in checks):
                    best, best_step = {n: p.detach().clone() for n, p in params.items()}, at
                checks.append([at, *measured])
            record = {"curve": curve, "checks": checks, "best_step": best_step, "step": at}
            store.save(done, {}, record, _state(params, also, optimizer, best))
            done += 1
        if checks:
            note = f"validation loss {checks[-1][1]:.4g}" + "".join(f", {100 * c:.1f} % exact" for c in checks[-1][2:3])
        progress(stage, at, schedule.steps, note)
        if at == schedule.steps:
            return Tuned(best, curve, checks, best_step)
        first, totals = at, []
        while at < min(first + schedule.stretch, schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(at)
            values = step(optimizer, batch_indices(lengths, schedule, at), at)
            if not math.isfinite(values[0]):
                raise Diverged(values[0], at, Tuned(best, curve, checks, best_step))
            totals = [a + b for a, b in zip(totals or [0.0] * len(values), values, strict=True)]
            at += 1
            progress(stage, at, schedule.steps, f"loss {values[0]:.4g}" + (f", {note}" if note else ""))
        curve.append([at, *(total / (at - first) for total in totals)])
        fresh = True


def batch_indices(lengths: Sequence[int], schedule: Schedule, step: int) -> list[int]:
    """Which examples step `step` sees; it follows from the seed and the step alone.

    One endless run of shuffled epochs is cut into stacks of TOGETHER batches. In a stack examples of like length go
    together, which saves padding, and the batches stand in drawn order.
    """
    stack, within = divmod(step, TOGETHER)
    chosen: list[int] = []
    for place in range(stack * TOGETHER * schedule.batch, (stack + 1) * TOGETHER * schedule.batch):
        epoch, at = divmod(place, len(lengths))
        if not chosen or at == 0:
            order = torch.randperm(len(lengths), generator=_draw(schedule.seed, 2 * epoch)).tolist()
        chosen.append(order[at])
    chosen.sort(key=lambda i: lengths[i])
    first = schedule.batch * int(torch.randperm(TOGETHER, generator=_draw(schedule.seed, 2 * stack + 1))[within])
    return chosen[first : first + schedule.batch]


def _draw(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def _state(
    params: Mapping[str, Tensor],
    also: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    state = {f"param/{n}": p for n, p in params.items()} | {f"best/{n}": p for n, p in best.items()}
    for name, p in params.items():
        state |= {f"{key}/{name}": value for key, value in optimizer.state.get(p, {}).items()}
    return state | {f"also/{n}": t for n, t in also.items()}


@torch.no_grad()
def _restore(
    params: Mapping[str, Tensor], also: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Put a saved state back; returns the best parameters so far."""
    for name, tensor in also.items():
        tensor.copy_(saved[f"also/{name}"])
    for name, p in params.items():
        p.copy_(saved[f"param/{name}"])
        own = {k: saved[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in saved}
        if own:
            optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in own.items()}
    return {name: saved[f"best/{name}"].to(p.device) for name, p in params.items() if f"best/{name}" in saved}

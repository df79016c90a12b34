"""The closing step: tune all scales and norms end to end, with every integer fixed, until the logits are nearest to the
float model's.

Blocks are rounded one after another, and each makes up for the errors before it as well as its own weights can. What
none of them sees is the output of the model. Here, over the calibration windows,

    minimise  mean over tokens of KL(softmax(logits_float) || softmax(logits_rounded))

by Adam, where the only numbers that move are factors: exp(t) on every scale of the block linears, and on every weight
of every norm. The codes and zero points stay as they are, so the artefact takes no more space and no runtime notices.
(EfficientQAT, arXiv 2407.11062, ends with the like, on the labels of a training set.)

The float model's last stream is what block-wise rounding left, so that no float weight is needed again but the final
norm's and the head's. Blocks are computed again in the backward pass: in memory are the codes (a byte a weight), the
activations between blocks of one batch, and the weights of one block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tpvc.compiler import interpret
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import Op
from tpvc.compiler.program import NORMS, Program, QTensor, dense, grid_of, linears, read
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.quick import QUICK, ops_for, quick_weight
from tpvc.compiler.store import BlockStore
from tpvc.compiler.tuning.loop import Diverged, Schedule, descend
from tpvc.compiler.tuning.parallel import ALONE, Ranks, SharedStore
from tpvc.compiler.verify import ports
from tpvc.passes.block import behind_prompts, embedded, full_windows, spread
from tpvc.passes.grid import storable
from tpvc.passes.logit_divergence import logit_divergence
from tpvc.passes.share import Share

WARMUP = 0.1
"""Share of the steps on which the rate climbs."""


def schedule(rounds: float, batch: int, lr: float, windows: int, seed: int = 0) -> Schedule:
    """The steps that see each of so many windows `rounds` times; at least one."""
    return Schedule(max(1, round(rounds * windows / batch)), batch, lr, WARMUP, seed, decay="cosine")


@dataclass(frozen=True)
class TuneScales:
    """The pass: a Program whose blocks are rounded -> the same codes with other scales and norms.

    rounds, batch, lr   how often every window is seen, windows a step, Adam's rate for the factors' logarithms
    held_out            windows, the last ones, that no step sees; the state with the least divergence there is kept
    windows             int64 [n, L] calibration tokens, those of block-wise rounding
    blocks              where the blocks were rounded: it holds the float model's last stream
    store               where this step keeps its state
    ranks               the processes that share the windows
    """

    rounds: float
    batch: int
    lr: float
    held_out: int
    windows: Tensor
    blocks: BlockStore | SharedStore
    store: BlockStore | SharedStore
    seed: int = 0
    device: str = "cpu"
    progress: Progress = silent
    ranks: Ranks = ALONE

    @property
    def schedule(self) -> Schedule:
        return schedule(self.rounds, self.batch, self.lr, self._training, self.seed)

    @property
    def _training(self) -> int:
        """How many windows, from the first, the optimiser may see."""
        return len(self.windows) - self.held_out

    @torch.enable_grad()
    def __call__(self, program: Program) -> Program:
        model = Tunable.of(program, self.device)
        data = Streams(program, self.windows, self.blocks, self.ranks)

        def step(optimizer: torch.optim.Optimizer, indices: list[int], number: int) -> list[float]:
            own = [self.ranks.own(rows) for rows in data.rows(indices)]
            loss = model.divergence(*own) * (len(own[0]) / len(indices))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.ranks.whole(loss, model.factors.values())
            if math.isfinite(loss.item()):
                optimizer.step()
            return [loss.item()]

        @torch.no_grad()
        def validate() -> list[float]:
            held = torch.arange(self._training, len(self.windows)).split(self.batch)

            def divergence(first: Tensor, last: Tensor, ids: Tensor) -> float:
                return float(model.divergence(first, last, ids)) * len(ids)

            parts = [partial(divergence, *data.rows(part.tolist())) for part in held]
            return [sum(self.ranks.each(parts)) / self.held_out]

        lengths = [1] * self._training
        judge = validate if self.held_out else None
        how = self.schedule, self.store
        try:
            tuned = descend(model.factors, lengths, step, judge, *how, stage="tune scales", progress=self.progress)
        except Diverged as diverged:
            if diverged.step == 0:
                raise TpvcError(
                    "the rounded model's logits, or the float one's, are not finite before the closing step changed"
                    " anything; use intact weights and adapters"
                ) from diverged
            tuned, note = diverged.tuned, "the loss is no finite number any more; the best until then is kept"
            self.progress("tune scales", diverged.step, self.schedule.steps, note)
        with torch.no_grad():
            for name, best in tuned.best.items():
                model.factors[name].copy_(best)
        return program.with_params(model.tuned())

    def checks(self) -> list[list[float]]:
        """[[step, KL on the held-out windows in nats a token], ...] of a run, as far as it went."""
        return self._last.get("checks", [])

    def stopped(self) -> int | None:
        """The last step that was kept of a run whose loss became no finite number; None for a whole run."""
        step = self._last.get("step", 0)
        return step if step < self.schedule.steps else None

    @property
    def _last(self) -> dict:
        """What the last finished stretch recorded."""
        unit, last = 0, {}
        while (found := self.store.finished(unit)) is not None:
            unit, last = unit + 1, found[1]
        return last


@dataclass(frozen=True, eq=False)
class Streams:
    """What enters the first block and what leaves the last one in float, made when a step first asks for them."""

    program: Program
    windows: Tensor
    blocks: BlockStore | SharedStore
    ranks: Ranks = ALONE

    def rows(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(first, last, ids) of some windows, whoever has them."""
        return self.share.rows(self.first, indices), self.share.rows(self.last, indices), self.ids[indices]

    @property
    def share(self) -> Share:
        return Share(self.ranks, len(self.windows))

    @cached_property
    def ids(self) -> Tensor:
        return spread(len(self.windows), len(self.program.adapters))

    @cached_property
    def first(self) -> Tensor:
        own = self.share.own
        return embedded(self.program, behind_prompts(self.windows, self.program)[own], self.ids[own])

    @cached_property
    def last(self) -> Tensor:
        return self.blocks.streams(self.program.blocks - 1, "exact")["exact"]


@dataclass(frozen=True, eq=False)
class Tunable:
    """What moves: one factor exp(t) for every scale and norm weight; t starts at 0, which changes nothing.

    values   every parameter behind the embeddings
    factors  {parameter: t}, float32 of the shape of the scale, or of the norm's weight
    offset   {norm weight: 1} where the norm multiplies by weight + 1, else 0
    ops      the op table of every block, and of what follows the last
    """

    program: Program
    values: Mapping[str, Tensor | QTensor]
    factors: Mapping[str, Tensor]
    offset: Mapping[str, float]
    ops: Sequence[Mapping[str, Op]]

    @staticmethod
    def of(program: Program, device: str) -> Tunable:
        values, factors, offset = {}, {}, {}
        for node in program.nodes[len(program.prologue) :]:
            for role, name in node.params.items():
                if name in values:
                    continue
                values[name] = value = _to(read(program.params[name]), device)
                if isinstance(value, QTensor) and node.block is not None:
                    factors[name] = torch.zeros_like(value.scale, requires_grad=True)
                elif node.op in NORMS and role == "weight":
                    factors[name] = torch.zeros_like(value, dtype=torch.float32, requires_grad=True)
                    offset[name] = float(bool(node.attrs.get("plus_one")))
        widths = [
            [grid.bits for n in linears(program.block(i)) if (grid := grid_of(values[n.params["weight"]])) is not None]
            for i in range(program.blocks)
        ]
        ops = [*(ops_for(bits) for bits in widths), ops_for(chain.from_iterable(widths))]
        return Tunable(program, values, factors, offset, ops)

    def divergence(self, first: Tensor, exact: Tensor, ids: Tensor) -> Tensor:
        """Mean over the tokens of some windows of KL(float || rounded), nats; differentiable in the factors.

        first, exact  float32 [b, L, D]: what enters the first block, and what leaves the last one in float
        ids           int64 [b]: the adapter of every window, -1 for none
        """
        program, ids = self.program, ids.to(self.device)

        def block(x: Tensor, index: int) -> Tensor:
            values = _values(x, ids) | {ports(program, index)[0]: x}
            return interpret.run(program.block(index), values, self.weight, ops=self.ops[index])

        x, exact = first.to(self.device), exact.to(self.device)
        for index in range(program.blocks):
            x = checkpoint(block, x, index, use_reentrant=False)
        head = self._head()
        windows = zip(exact.split(1), x.split(1), ids.split(1), strict=True)  # logits of one window at a time
        return sum(self._of_logits(*one, head) for one in windows) / x[..., 0].numel()

    def _of_logits(self, exact: Tensor, rounded: Tensor, ids: Tensor, head: Mapping[str, Tensor]) -> Tensor:
        """The divergence, summed over tokens, of what leaves the last block in float and rounded, float32 [1, L, D]."""
        last = self.program.epilogue[0].inputs[0]

        def logits(x: Tensor, weight: interpret.Weight) -> Tensor:
            def ready(name: str) -> Tensor:
                return head[name] if name in head else weight(name)

            return interpret.run(self.program.epilogue, _values(x, ids) | {last: x}, ready, ops=self.ops[-1])

        with torch.no_grad():
            wanted = logits(exact, self.original)
        moving = [rounded, *(self.factors[n] for n in self._behind)]
        leaves = [rounded.detach().requires_grad_(rounded.requires_grad), *moving[1:]]
        found = logits(leaves[0], self.weight)
        loss, gradient = logit_divergence(found, wanted)
        if not found.requires_grad:
            return loss
        return _with_gradients(loss, torch.autograd.grad(found, leaves, gradient), moving)

    @property
    def _behind(self) -> list[str]:
        """The parameters behind the last block that have a factor."""
        return [name for n in self.program.epilogue for name in n.params.values() if name in self.factors]

    @property
    def device(self) -> torch.device:
        return next(iter(self.factors.values())).device

    def _head(self) -> dict[str, Tensor]:
        """What the linears behind the last block multiply by, {name: weight}, made once for all windows of a step."""
        held = {n.params["weight"] for n in linears(self.program.epilogue)}
        weights = {name: self.original(name) for name in held}
        return {name: quick_weight(w) for name, w in weights.items()} if self.ops[-1] is QUICK else weights

    def original(self, name: str) -> Tensor:
        """The parameter without its factor, float32."""
        return dense(self.values[name])

    def weight(self, name: str) -> Tensor:
        """The parameter under its factor, float32, as it will be stored; differentiable in the factor."""
        if name not in self.factors:
            return self.original(name)
        value, factor = self.values[name], self.factors[name].exp()
        if isinstance(value, QTensor):
            exact = value.scale * factor
            scale = _through(exact, storable(exact, value.scale_dtype))
            return replace(value, scale=scale).dequantize()
        exact = (value.float() + self.offset[name]) * factor - self.offset[name]
        return _through(exact, exact.to(value.dtype).float())

    @torch.no_grad()
    def tuned(self) -> dict[str, Tensor | QTensor]:
        """The parameters that moved, as they are stored, in host memory."""
        made: dict[str, Tensor | QTensor] = {}
        for name, t in self.factors.items():
            value = self.values[name]
            if isinstance(value, QTensor):
                scale = storable(value.scale * t.exp(), value.scale_dtype)
                made[name] = _to(replace(value, scale=scale), "cpu")
            else:
                made[name] = self.weight(name).to("cpu", value.dtype)
        return made


def _values(x: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """The graph's inputs for a stream [b, L, D] of full windows; ids int64 [b]: their adapters."""
    return full_windows(torch.empty(x.shape[:2], device=x.device, dtype=torch.long), ids)


def _with_gradients(loss: Tensor, gradients: Sequence[Tensor], moving: Sequence[Tensor]) -> Tensor:
    """The loss as a function of `moving` that has these gradients in them and keeps nothing else: where logits are
    large, they are neither kept for the backward pass nor computed again in it."""
    parts = (((m - m.detach()) * g).sum() for m, g in zip(moving, gradients, strict=True))
    return sum(parts, start=loss)


def _through(exact: Tensor, stored: Tensor) -> Tensor:
    """`stored` in value, `exact` in gradient."""
    return exact + (stored - exact).detach()


def _to(value: Tensor | QTensor, device: str) -> Tensor | QTensor:
    if isinstance(value, Tensor):
        return value.to(device)
    zero = None if value.zero is None else value.zero.to(device)
    return replace(value, codes=value.codes.to(device), scale=value.scale.to(device), zero=zero)

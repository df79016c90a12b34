"""One transformer block as a function of its input, for passes that work block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from tpvc.compiler import interpret
from tpvc.compiler.ops import OPS, Op
from tpvc.compiler.program import ROUNDERS, Node, Program, QTensor, dense, prompt_ids
from tpvc.compiler.quick import QUICK
from tpvc.compiler.tuning.parallel import Ranks
from tpvc.compiler.verify import ports

Watch = Callable[[Node, list[Tensor]], None]
AT_ONCE = 8
"""Windows computed together where no gradient is needed."""


def unrounded(ops: Mapping[str, Op]) -> dict[str, Op]:
    """An op table in which nothing is rounded: that of a block in float."""
    return {**ops, **{op: replace(ops[op], compute=lambda x, **_: x) for op in ROUNDERS}}


EXACT = unrounded(OPS)
"""The ops of a block in float, with products in float32."""


class Block:
    """One block with its float weights in memory, as a function of its input."""

    def __init__(self, program: Program, index: int, device: str) -> None:
        self.nodes = program.block(index)
        self.entering = ports(program, index)[0]
        self.device = device
        self.weights = {name: dense(program.params[name]).to(device) for n in self.nodes for name in n.params.values()}

    def output(
        self,
        x: Tensor,
        weights: dict[str, Tensor],
        ids: Tensor,
        watch: Watch | None = None,
        ops: Mapping[str, Op] = OPS,
    ) -> Tensor:
        """[b, L, D] -> [b, L, D] on the block's device; `ids` int64 [b]: the adapter of every window, -1 for none."""
        values = full_windows(torch.empty(x.shape[:2], device=self.device, dtype=torch.long), ids.to(self.device))
        values[self.entering] = x.to(self.device)
        return interpret.run(self.nodes, values, weights.__getitem__, watch=watch, ops=ops)

    def with_rounded(self, rounded: Mapping[str, QTensor]) -> dict[str, Tensor]:
        """The block's weights with some of them replaced by what their integers stand for."""
        return {**self.weights, **{name: q.dequantize().to(self.device) for name, q in rounded.items()}}

    def outputs(
        self,
        x: Tensor,
        weights: dict[str, Tensor],
        ids: Tensor,
        ops: Mapping[str, Op] = OPS,
        into: Tensor | None = None,
    ) -> Tensor:
        """The same over a whole stream, a few windows at a time; the result lies in host memory, in `into` where that
        is given, which may be `x`."""
        made = torch.empty_like(x) if into is None else into
        for place, part, own in zip(made.split(AT_ONCE), x.split(AT_ONCE), ids.split(AT_ONCE), strict=True):
            place.copy_(self.output(part, weights, own, ops=ops))
        return made

    def importance(
        self, x: Tensor, ids: Tensor, windows: int, ranks: Ranks, ops: Mapping[str, Op] = QUICK
    ) -> dict[str, Tensor]:
        """Mean square of every input feature of every linear, float32 [in], by weight name. Three digits are enough.

        Over so many windows, of which x [k, L, D] are this process's (tpvc.passes.share). Sums over AT_ONCE windows are
        added up in the order of these, whoever has them.
        """
        lots: list[dict[str, Tensor]] = []

        def watch(node: Node, inputs: list[Tensor]) -> None:
            if node.op == "linear":
                lots[-1][node.params["weight"]] = inputs[0].square().sum((0, 1))

        for part, own in zip(x.split(AT_ONCE), ids.split(AT_ONCE), strict=True):
            lots.append({})
            self.output(part, self.weights, own, watch, ops)
        count, tokens = -(-windows // AT_ONCE), windows * x.shape[1]
        return {
            name: reduce(torch.add, ranks.dealt(torch.stack([lot[name] for lot in lots]), count)) / tokens
            for name in lots[0]
        }


def full_windows(tokens: Tensor, adapter_ids: Tensor) -> dict[str, Tensor]:
    """Graph inputs for full windows [b, L]: nothing is padding."""
    mask = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    positions = interpret.positions_of(mask, tokens.shape[1])
    return {"input_ids": tokens, "mask": mask, "positions": positions, "adapter_ids": adapter_ids}


def embedded(program: Program, windows: Tensor, ids: Tensor) -> Tensor:
    """What enters block 0 for tokens int64 [n, L]: float32 [n, L, D]."""
    weight = interpret.from_files(program)
    made = torch.empty(*windows.shape, program.facts.hidden_size)
    for into, part, own in zip(made.split(AT_ONCE), windows.split(AT_ONCE), ids.split(AT_ONCE), strict=True):
        into.copy_(interpret.run(program.prologue, full_windows(part, own), weight))
    return made


def spread(windows: int, adapters: int) -> Tensor:
    """int64 [n]: -1, 0, .., adapters - 1 in turn, so that the base and every adapter get their share of the windows."""
    return torch.arange(windows) % (adapters + 1) - 1


def behind_prompts(windows: Tensor, program: Program) -> Tensor:
    """Windows int64 [n, L] that begin with the prompts of the program: none and each of them in turn, a share each.

    A window keeps its length and loses as many tokens from its end. Turns change once in a round of `spread`, so that
    every adapter meets every prompt.
    """
    made, round_ = windows.clone(), len(program.adapters) + 1
    for i, window in enumerate(windows):
        turn = i // round_ % (len(program.prompts) + 1)
        ids = torch.tensor(prompt_ids(program, program.prompts[turn - 1].name) if turn else [], dtype=torch.int64)
        made[i] = torch.cat((ids, window[: len(window) - len(ids)]))
    return made

"""What errors cost: the KL divergence from the float model to one whose values are off, in nats per token.

Where small errors e_ti are added to feature i of a value at token t, and are independent of each other,

    sum over tokens of KL  =  1/2 sum_ti e_ti^2 E[g_ti^2],    g = gradient of sum_t log p(y_t),  y_t drawn from p

since the Fisher information is the second derivative of the divergence (Amari, Natural Gradient Works Efficiently in
Learning, Neural Computation 10, 1998). One draw of y stands for the expectation. The gradient is that of the float
model, which is walked forwards and backwards a block at a time: in memory are one block's weights, and a stream
[n, L, D] for every block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpvc.compiler import interpret
from tpvc.compiler.ops import OPS, Op
from tpvc.compiler.program import INPUT_ROUNDERS, Program, dense
from tpvc.compiler.progress import Progress, silent
from tpvc.passes.block import AT_ONCE, EXACT, Block, full_windows
from tpvc.passes.checks import check_finite

WINDOWS = 8
"""Of the calibration text, the first ones, on which gradients are taken."""
APART = {op: replace(OPS[op], compute=lambda x, **_: x.view_as(x)) for op in INPUT_ROUNDERS}
"""Nothing is rounded, and what linears read has a gradient of its own beside that of other readers of the value."""


@dataclass(frozen=True, eq=False)
class Felt:
    """What the linears of a block meet on T tokens, and how much an error there is felt.

    inputs   {name of a value: (itself [T, D], g^2 [T, D])} for what linears read
    outputs  {name of a matrix: g^2 [T, out]} for what they yield
    """

    inputs: Mapping[str, tuple[Tensor, Tensor]]
    outputs: Mapping[str, Tensor]


def looked_at(program: Program) -> int:
    """How many windows gradients are taken on: all adapters have met all prompts in them."""
    return max(WINDOWS, (len(program.adapters) + 1) * (len(program.prompts) + 1))


def cost(error: Tensor, squares: Tensor) -> float:
    """Nats per token of errors [T, D] where g^2 is `squares` [T, D]."""
    return 0.5 * float((error.square() * squares).sum()) / len(error)


def output_gradients(
    program: Program, x: Tensor, ids: Tensor, seed: int = 0, device: str = "cpu", progress: Progress = silent
) -> list[Tensor]:
    """g at the output of every block, [n, L, D] each in host memory, for what enters block 0, with adapters `ids`."""
    entering = []
    for index in range(program.blocks):
        progress("sensitivity", index, 2 * program.blocks, f"block {index}")
        entering.append(x)
        block = Block(program, index, device)
        x = block.outputs(x, block.weights, ids, EXACT)
    gradients = [logit_gradients(program, x, ids, 1, seed, device, EXACT)]
    for index in range(program.blocks - 1, 0, -1):
        progress("sensitivity", 2 * program.blocks - index, 2 * program.blocks, f"block {index}")
        gradients.append(backwards(Block(program, index, device), entering.pop(), ids, gradients[-1], EXACT))
    return [g[0] for g in reversed(gradients)]


def logit_gradients(
    program: Program, x: Tensor, ids: Tensor, draws: int, seed: int, device: str, ops: Mapping[str, Op]
) -> Tensor:
    """g [draws, n, L, D] at what leaves the last block, x [n, L, D], for so many tokens at every position. Logits of
    one window are held at a time."""
    names = {name for n in program.epilogue for name in n.params.values()}
    weights = {name: dense(program.params[name]).to(device) for name in names}
    draw = torch.Generator().manual_seed(seed)
    last, found = program.epilogue[0].inputs[0], torch.empty(draws, *x.shape)
    for row in range(len(x)):
        with torch.enable_grad():
            leaving = x[row : row + 1].to(device).requires_grad_()
            tokens = torch.empty(leaving.shape[:2], device=device, dtype=torch.long)
            values = full_windows(tokens, ids[row : row + 1].to(device)) | {last: leaving}
            logits = interpret.run(program.epilogue, values, weights.__getitem__, ops=ops)
        check_finite(program, "the head", logits.detach(), ids[row : row + 1])
        chances = logits.detach().softmax(-1)
        tokens = torch.multinomial(chances[0].cpu(), draws, replacement=True, generator=draw).to(device)
        for i in range(draws):
            wanted = -chances
            wanted[0].scatter_add_(1, tokens[:, i : i + 1], torch.ones_like(wanted[0, :, :1]))
            found[i, row] = torch.autograd.grad(logits, leaving, wanted, retain_graph=i + 1 < draws)[0][0].cpu()
    return found


def backwards(block: Block, x: Tensor, ids: Tensor, gradients: Tensor, ops: Mapping[str, Op]) -> Tensor:
    """g [draws, n, L, D] at what enters a block, x [n, L, D], from g at what leaves it."""
    parts = []
    for part, own, after in _parts(x, ids, gradients):
        with torch.enable_grad():
            entering = part.to(block.device).requires_grad_()
            output = block.output(entering, block.weights, own, ops=ops)
        draws = [g.to(output.device) for g in after]
        found = [torch.autograd.grad(output, entering, g, retain_graph=g is not draws[-1])[0].cpu() for g in draws]
        parts.append(torch.stack(found))
    return torch.cat(parts, 1)


def feel(block: Block, x: Tensor, ids: Tensor, gradient: Tensor) -> Felt:
    """One block, given what enters it and g at its output, both [n, L, D], with adapters `ids` [n]."""
    names = {id(weight): name for name, weight in block.weights.items()}
    inputs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    outputs: dict[str, list[Tensor]] = {}
    for part, own, (after,) in _parts(x, ids, gradient[None]):
        read, made = {}, {}

        def watch(node, values, read=read):
            if node.op == "linear":
                read[node.inputs[0]] = values[0]

        def linear(x: Tensor, *, made=made, **params) -> Tensor:
            y = EXACT["linear"].compute(x, **params)
            made[names[id(params["weight"])]] = y
            return y

        ops: dict[str, Op] = {**EXACT, **APART, "linear": replace(EXACT["linear"], compute=linear)}
        with torch.enable_grad():
            output = block.output(part.requires_grad_(), block.weights, own, watch, ops)
        found = torch.autograd.grad(output, [*read.values(), *made.values()], after.to(output.device))
        squares = [g.square().flatten(0, 1) for g in found]
        for (name, value), square in zip(read.items(), squares[: len(read)], strict=True):
            inputs.setdefault(name, []).append((value.detach().flatten(0, 1), square))
        for name, square in zip(made, squares[len(read) :], strict=True):
            outputs.setdefault(name, []).append(square)
    joined = {name: tuple(torch.cat(p) for p in zip(*parts, strict=True)) for name, parts in inputs.items()}
    return Felt(joined, {name: torch.cat(parts) for name, parts in outputs.items()})


def _parts(x: Tensor, ids: Tensor, gradients: Tensor):
    """A few windows at a time: (a copy of x, ids, gradients [draws, n, L, D])."""
    for part, own, after in zip(x.split(AT_ONCE), ids.split(AT_ONCE), gradients.split(AT_ONCE, 1), strict=True):
        yield part.detach().clone(), own, after

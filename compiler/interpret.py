"""Run a Program with torch: evaluation, calibration, and the oracle of every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tpvc.compiler.ops import OPS
from tpvc.compiler.program import Node, Program, QTensor, dense, read

Weight = Callable[[str], Tensor | QTensor]
Cache = dict[str, tuple[Tensor, Tensor]]
"""Keys and values of every attention node, by node name: [B, kv_heads, S, d]. `run` extends it in place."""


def from_files(program: Program) -> Weight:
    """Read every parameter when a node asks for it and keep none: the least memory."""

    def weight(name: str) -> Tensor | QTensor:
        return _ready(program, name, read(program.params[name]))

    return weight


def in_memory(program: Program, device: str | torch.device = "cpu") -> Weight:
    """All parameters dequantised to float32 once: the most speed. Tables that only embed stay as they are stored."""
    held = {name: _ready(program, name, read(p)) for name, p in program.params.items()}
    held = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in held.items()}
    return held.__getitem__


def _ready(program: Program, name: str, value: Tensor | QTensor) -> Tensor | QTensor:
    """Integers stay integers where a table is only looked up; everything else is float32."""
    if isinstance(value, QTensor) and all(n.op == "embed" for n in program.nodes if name in n.params.values()):
        return value
    return dense(value)


def run(
    nodes: Sequence[Node],
    values: Mapping[str, Tensor],
    weight: Weight,
    cache: Cache | None = None,
    watch: Callable[[Node, list[Tensor]], None] | None = None,
) -> Tensor:
    """Execute `nodes` over `values` (name -> tensor) and return the value of the last one. Differentiable.

    `watch` is shown every node with its inputs before it is computed.
    """
    values = dict(values)
    last_use = {v: i for i, n in enumerate(nodes) for v in n.inputs}
    for i, node in enumerate(nodes):
        inputs = [values[v] for v in node.inputs]
        params = {role: weight(name) for role, name in node.params.items()}
        if watch is not None:
            watch(node, inputs)
        if node.op == "attention":
            past = None if cache is None else cache.get(node.name)
            out, state = OPS["attention"].compute(*inputs, **node.attrs, past=past)
            if cache is not None:
                cache[node.name] = state
        else:
            out = OPS[node.op].compute(*inputs, **params, **node.attrs)
        values[node.name] = out
        for v in node.inputs:
            if last_use[v] == i and v not in ("positions", "mask"):
                values.pop(v, None)
    return out


def positions_of(mask: Tensor, new: int) -> Tensor:
    """Positions int64 [B, new] of the last `new` tokens: padding is not counted, a padding token stands at 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]


def logits(
    program: Program,
    input_ids: Tensor,
    mask: Tensor | None = None,
    weight: Weight | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Logits float32 [B, T, vocab] for int64 `input_ids` [B, T]; `mask` [B, past + T] marks real tokens."""
    past = next(iter(cache.values()))[0].shape[2] if cache else 0
    if mask is None:
        mask = torch.ones(input_ids.shape[0], past + input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
    values = {"input_ids": input_ids, "mask": mask.bool(), "positions": positions_of(mask, input_ids.shape[1])}
    return run(program.nodes, values, weight or from_files(program), cache)


@torch.no_grad()
def generate(
    program: Program,
    prompt: Tensor,
    max_new_tokens: int,
    weight: Weight | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop_at_eos: bool = True,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt` (int64 [T]) one by one; greedy at temperature 0."""
    weight = weight or in_memory(program)
    cache: Cache = {}
    step = prompt[None]
    for _ in range(max_new_tokens):
        last = logits(program, step, weight=weight, cache=cache)[0, -1]
        if temperature == 0:
            token = int(last.argmax())
        else:
            token = int(torch.multinomial((last / temperature).softmax(-1), 1, generator=generator))
        if stop_at_eos and token in program.facts.eos:
            return
        yield token
        step = torch.tensor([[token]])

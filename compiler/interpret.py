"""Run a Program with torch: evaluation, calibration, and the oracle of every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import OPS, Op, positions
from tpvc.compiler.program import (
    INPUTS,
    Node,
    Program,
    QTensor,
    adapter_id,
    bank_params,
    constant_prefix,
    dense,
    prompt_ids,
    read,
)

Weight = Callable[[str], Tensor | QTensor]
Cache = dict[str, tuple[Tensor, Tensor]]
"""Keys and values of every attention node, by node name: [B, kv_heads, S, d]. `run` extends it in place."""


def from_files(program: Program) -> Weight:
    """Read every parameter when a node asks for it and keep none: the least memory."""

    def weight(name: str) -> Tensor | QTensor:
        return _ready(program, name, read(program.params[name]))

    return weight


def in_memory(program: Program, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Weight:
    """All parameters dequantised once, to float32 or another `dtype`: the most speed.

    Tables that only embed stay integers where float32 on the CPU is asked for; adapters are always float32.
    """
    held, banks = {}, bank_params(program)
    for name, parameter in program.params.items():
        value = _ready(program, name, read(parameter))
        if isinstance(value, QTensor) and (torch.device(device).type, dtype) != ("cpu", torch.float32):
            value = value.dequantize()
        if isinstance(value, Tensor):
            value = value.to(device, torch.float32 if name in banks else dtype)
        held[name] = value
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
    ops: Mapping[str, Op] = OPS,
) -> Tensor:
    """Execute `nodes` over `values` (name -> tensor) and return the value of the last one. Differentiable.

    `watch` is shown every node with its inputs before it is computed; `ops` may compute some of them otherwise.
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
            out, state = ops["attention"].compute(*inputs, **params, **node.attrs, past=past)
            if cache is not None:
                cache[node.name] = state
        else:
            out = ops[node.op].compute(*inputs, **params, **node.attrs)
        values[node.name] = out
        for v in node.inputs:
            if last_use[v] == i and v not in INPUTS:
                values.pop(v, None)
    return out


def at_head(program: Program) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """(nodes before the head, the head and what follows it): the latter treat every position alone."""
    head = max(i for i, n in enumerate(program.nodes) if n.op == "linear")
    return program.nodes[:head], program.nodes[head:]


def positions_of(mask: Tensor, new: int) -> Tensor:
    """Positions int64 [B, new] of the last `new` tokens: padding is not counted, a padding token stands at 0."""
    return positions(mask, mask[:, -new:])


def logits(
    program: Program,
    input_ids: Tensor,
    mask: Tensor | None = None,
    weight: Weight | None = None,
    cache: Cache | None = None,
    adapter_ids: Tensor | None = None,
    ops: Mapping[str, Op] = OPS,
) -> Tensor:
    """Logits float32 [B, T, vocab] for int64 `input_ids` [B, T]; `mask` [B, past + T] marks real tokens.

    `adapter_ids` int64 [B] is the adapter of every row, -1 (and None, for all rows) the base model. Soft prompts come
    as ids (`program.prompt_ids`), a different one or none in each row; a folded prompt is in neither ids nor mask.
    """
    past = next(iter(cache.values()))[0].shape[2] - constant_prefix(program) if cache else 0
    if mask is None:
        mask = torch.ones(input_ids.shape[0], past + input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
    values = {"input_ids": input_ids, "mask": mask.bool(), "positions": positions_of(mask, input_ids.shape[1])}
    values["adapter_ids"] = checked_ids(program, adapter_ids, input_ids)
    return run(program.nodes, values, weight or from_files(program), cache, ops=ops)


def checked_ids(program: Program, adapter_ids: Tensor | None, input_ids: Tensor) -> Tensor:
    """`adapter_ids` for the rows of `input_ids`; TpvcError for a wrong count or an adapter that does not exist."""
    rows = len(input_ids)
    if adapter_ids is None:
        return torch.full((rows,), -1, device=input_ids.device)
    ids = adapter_ids.tolist()
    if adapter_ids.shape != (rows,) or adapter_ids.dtype != torch.int64:
        kind = f"{adapter_ids.dtype} {list(adapter_ids.shape)}".removeprefix("torch.")
        raise TpvcError(f"adapter ids have shape and type {kind}; expected one int64 for each of {rows} rows")
    if not all(-1 <= i < len(program.adapters) for i in ids):
        raise TpvcError(f"adapter ids are {ids}; expected -1 (none) to {len(program.adapters) - 1}")
    return adapter_ids


def finite(values: Tensor) -> Tensor:
    """Logits that a token is to be chosen by; TpvcError where one of them is NaN or infinite."""
    if not values.isfinite().all():
        raise TpvcError("the model yields logits that are not finite; use intact weights and adapters")
    return values


@torch.no_grad()
def generate(
    program: Program,
    prompt: Tensor,
    max_new_tokens: int,
    weight: Weight | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop_at_eos: bool = True,
    adapter: str | None = None,
    task: str | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt` (int64 [T]) one by one; greedy at temperature 0.

    `adapter` and `task` are names of an adapter and of a soft prompt that the program has; the latter stands first.
    """
    weight = weight or in_memory(program)
    prompt = torch.cat((torch.tensor(prompt_ids(program, task), dtype=torch.int64), prompt))
    ids = torch.tensor([adapter_id(program, adapter)])
    cache: Cache = {}
    step = prompt[None]
    for _ in range(max_new_tokens):
        last = finite(logits(program, step, weight=weight, cache=cache, adapter_ids=ids)[0, -1])
        if temperature == 0:
            token = int(last.argmax())
        else:
            token = int(torch.multinomial((last / temperature).softmax(-1), 1, generator=generator))
        if stop_at_eos and token in program.facts.eos:
            return
        yield token
        step = torch.tensor([[token]])

"""What a package holds: the steps of a Program, its parameters as the kernels take them, and the keys and values of its
tasks' prompts, which are computed once, when it is made, so that a prompt costs no prefill.

A row that wants a task and an adapter is computed with the prompt's virtual tokens, which the adapter turns too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpvc.compiler.backends.triton.side_by_side import side_by_side
from tpvc.compiler.backends.triton.steps import Step, kinds_of, steps
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import (
    Facts,
    Program,
    QTensor,
    dense,
    linears,
    prompt_ids,
    read,
    rounded_cache,
    scale_dtype_of,
)
from tpvc.kernels.attention import Prefix
from tpvc.kernels.linear_a8 import check_weight
from tpvc.kernels.rope_cache import Cache
from tpvc.kernels.slab import Slabs, pack, pack_floats


@dataclass(frozen=True)
class Task:
    """A soft prompt of `tokens` virtual tokens, whose keys and values stand before those of a row that wants it."""

    name: str
    tokens: int


@dataclass(frozen=True, eq=False)
class Model:
    """params    Slabs for linears and what is tied to them, or tensors in `dtype`
    prefixes  of every layer, keys and values of all tasks; empty where there are none
    dtype     of activations; cache: of keys and values, `dtype` or int8"""

    steps: tuple[Step, ...]
    params: Mapping[str, Tensor | Slabs]
    facts: Facts
    adapters: tuple[str, ...]
    tasks: tuple[Task, ...]
    prefixes: tuple[Prefix, ...]
    dtype: torch.dtype
    cache: torch.dtype


WIDE = ("gemma2", "gemma3_text")
"""Families whose residual stream leaves the range of float16: their authors computed in bfloat16."""


def activation_dtype(program: Program) -> torch.dtype:
    """What a package computes in: bfloat16 where the scales, or floats, of the linears are or the family is WIDE, and
    else float16."""
    dtype = scale_dtype_of(program.params[linears(program.nodes)[0].params["weight"]])
    wide = program.source is not None and program.source.config.get("model_type") in WIDE
    return torch.bfloat16 if wide or dtype == torch.bfloat16 else torch.float16


def model_of(program: Program, dtype: torch.dtype = torch.float32, cache: torch.dtype | None = None) -> Model:
    """A Program's parameters in the kernels' layout. cache: int8, or None for int8 where the Program
    rounds keys and values, and else `dtype`."""
    from tpvc.compiler.backends.triton.engine import Engine
    from tpvc.compiler.backends.triton.on_torch import OnTorch

    planned, params = steps(program), {}
    multiplied = {step.params["weight"] for step in planned if step.op == "linear"}
    packed = multiplied | {step.params["weight"] for step in planned if step.op == "embed"}
    for name in dict.fromkeys(name for step in planned for name in step.params.values()):
        value = read(program.params[name])
        if isinstance(value, QTensor) and name in packed:
            params[name] = pack(value)
        else:
            value = dense(program.params[name])
            value = value.to(dtype, copy=True, memory_format=torch.contiguous_format)  # aligned, as in a GPU's memory
            params[name] = pack_floats(value) if name in multiplied else value
    kinds = kinds_of(planned)
    for step in planned:
        if step.op == "linear" and step.inputs[0] in kinds:
            check_weight(params[step.params["weight"]], kinds[step.inputs[0]], f"'{step.outputs[0]}'")
    planned, params = side_by_side(planned, params)
    names = tuple(a.name for a in program.adapters)
    kept = torch.int8 if rounded_cache(program) else dtype
    model = Model(planned, params, program.facts, names, (), (), dtype, cache or kept)
    if not program.prompts:
        return model
    found = []
    for prompt in program.prompts:
        compute = OnTorch(replace(model, cache=dtype), 1, prompt.tokens)
        Engine(compute).admit(prompt_ids(program, prompt.name))
        found.append(compute.caches)
    tasks = tuple(Task(p.name, p.tokens) for p in program.prompts)
    return replace(model, tasks=tasks, prefixes=_all_tasks(found))


def _all_tasks(found: list[list[Cache]]) -> tuple[Prefix, ...]:
    """The caches of every task, by layer, filled up to the longest."""
    counts = [caches[0].key.shape[2] for caches in found]
    most, lengths = max(counts), torch.tensor(counts, dtype=torch.int32)

    def filled(parts: list[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, 0, 0, most - t.shape[2])) for t in parts]).contiguous()

    return tuple(
        Prefix(filled([c.key for c in layer]), filled([c.value for c in layer]), lengths)
        for layer in zip(*found, strict=True)
    )


def task_ids(model: Model, task: int) -> list[int]:
    """Ids of a task's virtual tokens, for a row whose adapter turns them too."""
    first = model.facts.vocab_size + sum(t.tokens for t in model.tasks[:task])
    return list(range(first, first + model.tasks[task].tokens))


def adapter_id(model: Model, name: str | None) -> int:
    """The id of the adapter called `name`, -1 for None. TpvcError for one that the model does not have."""
    return _id_of(name, model.adapters, "adapter")


def task_id(model: Model, name: str | None) -> int:
    """Likewise, of a task."""
    return _id_of(name, tuple(t.name for t in model.tasks), "task")


def _id_of(name: str | None, names: tuple[str, ...], kind: str) -> int:
    if name is not None and name not in names:
        known = f"it has {', '.join(names)}" if names else "it has none"
        raise TpvcError(f"the model has no {kind} '{name}'; {known}")
    return -1 if name is None else names.index(name)

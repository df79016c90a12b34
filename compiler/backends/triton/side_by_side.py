"""Linears that read one value become one: queries, keys and values; gate and up. One launch in place of three or two,
over one matrix whose outputs lie side by side; readers take their columns of the result.

It is done where nothing tells the linears apart: bits, groups, zero points, biases, rotations. Readers must be kernels
that take rows of any stride.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tpvc.compiler.backends.triton.steps import Step
from tpvc.kernels.slab import Slabs

READERS = {"attend", "gated", "norm"}

Params = Mapping[str, Tensor | Slabs]


def side_by_side(planned: tuple[Step, ...], params: Params) -> tuple[tuple[Step, ...], dict[str, Tensor | Slabs]]:
    """Steps and parameters with such linears joined. A joined parameter is called by its parts' names."""
    readers = defaultdict(set)
    for step in planned:
        for value in step.inputs:
            readers[value].add(step.op)
    groups: dict[tuple, list[Step]] = defaultdict(list)
    for step in planned:
        if step.op == "linear" and readers[step.outputs[0]] and readers[step.outputs[0]] <= READERS:
            groups[step.inputs[0], _kind(step, params)].append(step)
    joined = {steps[0].outputs[0]: steps for steps in groups.values() if len(steps) > 1}
    gone = {step.outputs[0] for steps in joined.values() for step in steps[1:]}
    made, kept = [], dict(params)
    for step in planned:
        if step.outputs[0] in gone and step.op == "linear":
            continue
        steps = joined.get(step.outputs[0]) if step.op == "linear" else None
        if steps is None:
            made.append(step)
            continue
        names = {role: "+".join(s.params[role] for s in steps) for role in step.params}
        for role, name in names.items():
            kept[name] = _joined([params[s.params[role]] for s in steps])
        widths = tuple(params[s.params["weight"]].width for s in steps)
        outputs = tuple(s.outputs[0] for s in steps)
        made.append(replace(step, outputs=outputs, params=names, attrs={**step.attrs, "widths": widths}))
    used = {name for step in made for name in step.params.values()}
    return tuple(made), {name: value for name, value in kept.items() if name in used}


def _kind(step: Step, params: Params) -> tuple:
    weight = params[step.params["weight"]]
    packing = weight.bits, weight.group, weight.middle, weight.zero is None
    scales = None if weight.scale is None else weight.scale.dtype
    return *packing, scales, "bias" in step.params, step.attrs.get("group"), tuple(step.attrs.get("rows", ()))


def _joined(parts: list[Tensor | Slabs]) -> Tensor | Slabs:
    """Outputs are the last dimension of all that linears have."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, -1)
    return replace(parts[0], **{name: torch.cat([p.tensors[name] for p in parts], 1) for name in parts[0].tensors})

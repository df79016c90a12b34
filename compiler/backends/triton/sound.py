"""Is what was read a package that can run? Sizes, names and shapes of `triton.json`, which anybody may have written,
against each other and against the tensors, before anything is computed from them."""

from __future__ import annotations

from dataclasses import fields, replace

from tpvc.compiler.backends.triton.forward import STEPS
from tpvc.compiler.backends.triton.model import Model
from tpvc.compiler.errors import short
from tpvc.compiler.frontends.fields import LARGEST, LONGEST
from tpvc.compiler.program import Facts
from tpvc.kernels.slab import SUB, Slabs, length

BITS = (2, 3, 4, 8, 16, 32)


def check(model: Model) -> None:
    """ValueError, or what Python raises for nonsense, where something does not fit."""
    _sizes(model.facts)
    for name, value in model.params.items():
        if isinstance(value, Slabs):
            _slabs(name, value)
    for number, step in enumerate(model.steps):
        if step.op not in STEPS or not isinstance(step.attrs, dict) or not isinstance(step.params, dict):
            raise ValueError(f"step {number} is {short(step.op)}")
        if unknown := [p for p in step.params.values() if p not in model.params]:
            raise ValueError(f"step {number} reads {short(unknown[0])}, which there is not")
    for task in model.tasks:
        if not isinstance(task.name, str) or not _whole(task.tokens, 1, model.facts.context_length):
            raise ValueError(f"a task is {short(task)}")
    _pass(model)


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _sizes(facts: Facts) -> None:
    for name in (f.name for f in fields(Facts) if f.type == "int"):
        value, most = getattr(facts, name), LONGEST if name == "context_length" else LARGEST
        if not _whole(value, 1, most):
            raise ValueError(f"{name} is {short(value)}, not 1 to {most}")
    if not all(_whole(end, 0, LARGEST) for end in facts.eos):
        raise ValueError(f"eos is {short(facts.eos)}")


def _slabs(name: str, held: Slabs) -> None:
    if held.bits not in BITS or not all(_whole(v, 0, LARGEST) for v in (held.depth, held.group, held.middle)):
        raise ValueError(f"'{name}' has bits, depth, group and middle that are no sizes")
    if held.depth < 1 or held.group < 1:
        raise ValueError(f"'{name}' has a depth of {held.depth} in groups of {held.group}")
    slabs, width, groups = -(-held.depth // length(held.bits)), held.words.shape[-1], -(-held.depth // held.group)
    wanted = {"words": (slabs * SUB, width), "high": (slabs * SUB // 2, width)}
    wanted |= {"scale": (groups, width), "zero": (groups, width)}
    for part, tensor in held.tensors.items():
        if tuple(tensor.shape) != wanted[part]:
            raise ValueError(f"'{name}.{part}' is {list(tensor.shape)}, not {list(wanted[part])}")
    if (held.high is None) == (held.bits == 3) or (held.scale is None) != (held.bits > 8):
        raise ValueError(f"'{name}' of {held.bits} bits has {', '.join(held.tensors)}")


def _pass(model: Model) -> None:
    """A pass of one token on tensors without memory: every kernel's wrapper checks what it is given."""
    from tpvc.compiler.backends.triton import asked

    asked(replace(model, facts=replace(model.facts, context_length=1)), 1, [(1, 1, "logits")])

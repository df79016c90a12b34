"""A Program as the kernels see it: a list of steps, each one launch or two, with the small nodes fused into the large.

    embed -> [scale] -> [virtual_tokens]     embed      rows of the table, or of the soft prompts
    linear -> [rotate]                       linear     with the rotation in its epilogue; see also `side_by_side.py`
    add -> norm                              norm       the residual stream and its normed form
    rope, rope -> attention                  attend     rotary, cache write and attention
    activation -> mul                        gated
    round_rows                               round_rows codes and scales, which linears alone read
    round_heads                              (none)     the cache that attend writes is of int8 then: `model.py`

Steps are data, and go into a package as JSON. A value that no step yields is an input of the batch: `input_ids`,
`positions`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Node, Program
from tpvc.passes.round_cache import float_cache


@dataclass(frozen=True)
class Step:
    """op    what is computed: a key of `forward.STEPS`
    inputs   names of values; outputs: of those it yields
    params   role -> name of a parameter of the Program
    attrs    constants"""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)


AS_THEY_ARE = ("virtual_tokens", "round_rows", "activation", "split", "add", "mul", "scale", "softcap")
"""Ops that are a step of their own, if nothing above takes them up."""


def steps(program: Program) -> tuple[Step, ...]:
    """The Program as steps. TpvcError for two rotations of one value, and for groups of outputs that no power of 2
    counts, which no epilogue holds; and for what no kernel computes."""
    program = float_cache(program)
    readers = defaultdict(list)
    for node in program.nodes:
        for value in dict.fromkeys(node.inputs):
            readers[value].append(node)
    made, gone, layer = [], set(), 0
    by_name = {n.name: n for n in program.nodes}

    def only(value: str, op: str) -> Node | None:
        """The one node that reads `value`, if it is of this kind."""
        found = readers[value]
        return found[0] if len(found) == 1 and found[0].op == op else None

    for node in program.nodes:
        if node.name in gone or node.op in ("text_ids", "rope"):
            continue
        attrs = dict(node.attrs)
        match node.op:
            case "linear":
                rotate = only(node.name, "rotate")
                if rotate is None:
                    made.append(Step("linear", node.inputs, (node.name,), dict(node.params)))
                    continue
                if only(rotate.name, "rotate") is not None:
                    raise TpvcError(
                        f"'{node.name}' has adapters with group sizes of their own; expected one size for all, so that"
                        " the kernel can turn its outputs"
                    )
                if (group := rotate.attrs["group"]) & (group - 1):
                    raise TpvcError(
                        f"an adapter of '{node.name}' pairs inside groups of {group} outputs; the kernels turn groups"
                        " of a power of 2, use another runtime or tune it with --group-size 8"
                    )
                gone.add(rotate.name)
                params = {**node.params, **rotate.params}
                made.append(Step("linear", node.inputs[:1], (rotate.name,), params, dict(rotate.attrs)))
            case "round_tensor":
                raise TpvcError(
                    f"'{node.name}' rounds activations on one grid for all tokens, the kernels take a scale for every"
                    " token; quantise with --activations int8"
                )
            case "add" if (norm := _norm_of(program, readers[node.name])) is not None:
                gone.add(norm.name)
                kind = {"kind": norm.op, **norm.attrs}
                made.append(Step("norm", node.inputs, (norm.name, node.name), dict(norm.params), kind))
            case "rms_norm" | "layer_norm":
                kind = {"kind": node.op, **attrs}
                made.append(Step("norm", node.inputs, (node.name,), dict(node.params), kind))
            case "attention" if node.params:
                raise TpvcError(
                    f"'{node.name}' has the keys and values of a prompt folded in, which the kernels do not read; leave"
                    " --task out, a package serves its prompts by name"
                )
            case "attention":
                turned = [by_name.get(v) for v in node.inputs[:2]]
                inputs = list(node.inputs[:3])
                if all(n is not None and n.op == "rope" for n in turned):
                    inputs[:2] = [n.inputs[0] for n in turned]
                    attrs["rope"] = dict(turned[0].attrs)
                made.append(Step("attend", tuple(inputs), (node.name,), dict(node.params), {**attrs, "layer": layer}))
                layer += 1
            case "embed":
                ids = tuple("input_ids" if v in by_name else v for v in node.inputs)  # text_ids: the step clips itself
                made.append(Step("embed", ids, (node.name,), dict(node.params), attrs))
            case "activation" if (product := only(node.name, "mul")) is not None:
                gone.add(product.name)
                up = next(v for v in product.inputs if v != node.name)
                made.append(Step("gated", (node.inputs[0], up), (product.name,), {}, attrs))
            case op if op not in AS_THEY_ARE:
                raise TpvcError(f"'{node.name}' is a {op}, for which there is no kernel; use another runtime")
            case _:
                made.append(Step(node.op, node.inputs, (node.name,), dict(node.params), attrs))
    return tuple(_in_order(made))


def kinds_of(planned: Iterable[Step]) -> dict[str, str]:
    """{value: how its rows are rounded}, of the values that are codes and scales."""
    return {step.outputs[0]: step.attrs["kind"] for step in planned if step.op == "round_rows"}


def _norm_of(program: Program, reading: list[Node]) -> Node | None:
    """The first norm over all features of a sum."""
    norms = [n for n in reading if n.op in ("rms_norm", "layer_norm")]
    return next((n for n in norms if program.params[n.params["weight"]].shape[0] > program.facts.head_dim), None)


def _in_order(made: list[Step]) -> list[Step]:
    """A step that was fused into an earlier one may need a value that comes later: put each after what it reads."""
    yielded = {value for step in made for value in step.outputs}
    there, ordered, waiting = set(), [], list(made)
    while waiting:
        ready = next(s for s in waiting if all(v in there or v not in yielded for v in s.inputs))
        waiting.remove(ready)
        ordered.append(ready)
        there.update(ready.outputs)
    return ordered

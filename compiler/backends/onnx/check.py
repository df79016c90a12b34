"""What the ONNX backend refuses, found before anything is written: one sentence with the node's name."""

from __future__ import annotations

from collections.abc import Mapping

from tpvc.compiler.adapters.road import check_name
from tpvc.compiler.backends.onnx.fusions import features, head_dim
from tpvc.compiler.backends.onnx.standard import Lower
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Node, Program, grid_of

ACCURACY_LEVELS = {0: "fp32", 1: "fp32", 4: "int8 activations"}


def check(program: Program, table: Mapping[str, Lower], accuracy_level: int) -> None:
    """Raise TpvcError for the first node that `table` cannot lower exactly."""
    if accuracy_level not in ACCURACY_LEVELS:
        known = ", ".join(map(str, ACCURACY_LEVELS))
        raise TpvcError(f"accuracy level {accuracy_level} is not one of {known}; use 4 for speed or 0 for float32 sums")
    for node in program.nodes:
        fact = _fault(program, node, table)
        if fact:
            raise TpvcError(f"node '{node.name}' ({node.op}) cannot be exported to ONNX: {fact}")
    for adapter in program.adapters:
        check_name(adapter.name)
    widths, layers = features(program), [n for n in program.nodes if n.op == "attention"]
    shapes = {(n.attrs["kv_heads"], head_dim(n, widths)) for n in layers}
    if len(shapes) != 1:
        found = sorted(shapes) or "no attention at all"
        raise TpvcError(f"GenAI wants one cache shape for all layers; the model has {found} (heads, width)")


def _fault(program: Program, node: Node, table: Mapping[str, Lower]) -> str | None:
    if node.op not in table:
        return f"the backend knows only {', '.join(sorted(table))}"
    for role, name in node.params.items():
        grid = grid_of(program.params[name])
        if grid is not None and not (role == "weight" and node.op in ("embed", "linear")):
            return f"parameter '{name}' is quantised; only matrices of linear and embed nodes may be"
        if grid is not None and not 2 <= grid.bits <= 8:
            return f"parameter '{name}' has {grid.bits} bits, expected 2 to 8"
    if node.op == "rotate" and len(node.attrs["rows"]) != len(program.adapters):
        return f"it has rows for {len(node.attrs['rows'])} of {len(program.adapters)} adapters"
    special = {"attention": {3: "mask"}, "rope": {1: "positions"}, "rotate": {1: "adapter_ids"}}
    special |= {"prefix_ids": {1: "mask"}, "prefix_mask": {0: "mask"}, "positions": {0: "mask"}}
    special = special.get(node.op, {})
    for index, value in enumerate(v.removesuffix(".prefixed") for v in node.inputs):
        wanted = special.get(index)
        if wanted is not None and value != wanted:
            return f"input {index} is '{value}', expected the program's own '{wanted}'"
        if wanted is None and value == "adapter_ids":
            return "it reads the adapter ids, which only rotate may"
        if wanted is None and value == "mask":
            return "it reads the mask, which only attention may"
    return None

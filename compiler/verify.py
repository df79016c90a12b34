"""`verify(program)`: the legality of a Program, checked between passes. The error names the node and the fact."""

from __future__ import annotations

import math

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import ACTIVATIONS, OPS, ROW_RANGE, TENSOR_RANGE
from tpvc.compiler.program import INPUTS, Node, Program


def verify(program: Program, after: str = "loading") -> Program:
    """Return `program` unchanged, or raise TpvcError. `after` is the pass to blame."""
    widths: dict[str, int | None] = dict.fromkeys(INPUTS)
    block_of: dict[str, int | None] = {}
    current = -1
    for node in program.nodes:

        def check(fact: bool, text: str, node: Node = node) -> None:
            if not fact:
                raise TpvcError(f"after {after}, node '{node.name}' ({node.op}): {text}")

        check(node.op in OPS, f"op is not in the table; known: {', '.join(sorted(OPS))}")
        op = OPS[node.op]
        check(node.name not in widths, "its name is already taken by an earlier value")
        check(len(node.inputs) == op.inputs, f"has {len(node.inputs)} inputs, the op takes {op.inputs}")
        for value in node.inputs:
            check(value in widths, f"reads '{value}', which is not defined before it")
        _roles(check, op.params, node.params, "parameter")
        _roles(check, op.attrs, node.attrs, "attribute")
        for name in node.params.values():
            check(name in program.params, f"reads parameter '{name}', which the program does not hold")
        if node.block is not None:
            check(node.block in (current, current + 1), f"block {node.block} follows block {current}")
            current = node.block
        widths[node.name] = _width(check, program, node, widths)
        block_of[node.name] = node.block
    _check_boundaries(program, after, block_of)
    return program


def _roles(check, allowed: tuple[str, ...], given, kind: str) -> None:
    names = {a.rstrip("?") for a in allowed}
    for role in allowed:
        check(role.endswith("?") or role in given, f"lacks the {kind} '{role}'")
    for role in given:
        check(role in names, f"has an unknown {kind} '{role}'")


def _width(check, program: Program, node: Node, widths: dict[str, int | None]) -> int | None:
    """Features in the last dimension of the node's value."""
    shape = {role: tuple(program.params[name].shape) for role, name in node.params.items()}
    given = [widths[v] for v in node.inputs]
    match node.op:
        case "embed":
            return shape["weight"][1]
        case "linear":
            out, in_ = shape["weight"]
            check(given[0] == in_, f"weight is {out}x{in_}, its input has {given[0]} features")
            check(shape.get("bias", (out,)) == (out,), f"bias has shape {shape.get('bias')}, expected ({out},)")
            return out
        case "rms_norm":
            check(given[0] % shape["weight"][0] == 0, f"weight {shape['weight']} does not divide {given[0]} features")
        case "layer_norm":
            check(shape["weight"] == (given[0],), f"weight {shape['weight']} against {given[0]} features")
        case "rope":
            check(given[0] % node.attrs["head_dim"] == 0, f"{given[0]} features are not whole heads")
            check(2 * len(node.attrs["inv_freq"]) <= node.attrs["head_dim"], "rotates more features than a head has")
        case "attention":
            heads, kv = node.attrs["heads"], node.attrs["kv_heads"]
            check(heads % kv == 0, f"{heads} heads do not share {kv} key/value heads evenly")
            check(given[0] * kv == given[1] * heads == given[2] * heads, f"q, k, v have {given[:3]} features")
            check(len(shape) != 1, "has keys or values of a prefix, expected both")
            for role, found in shape.items():
                wanted = (kv, shape["prefix_key"][1], given[1] // kv)
                check(found == wanted, f"{role} has shape {found}, expected {wanted}")
        case "activation":
            check(node.attrs["kind"] in ACTIVATIONS, f"unknown kind '{node.attrs['kind']}'")
        case "reorder":
            order = node.attrs["order"]
            check(sorted(order) == list(range(given[0] or 0)), f"order of {len(order)} is none of {given[0]} features")
        case "round_rows":
            check(node.attrs["kind"] in ROW_RANGE, f"unknown kind '{node.attrs['kind']}'")
        case "round_tensor":
            (least, most), scale, zero = TENSOR_RANGE, node.attrs["scale"], node.attrs["zero"]
            check(scale is None or 0 < scale < math.inf, f"scale is {scale}, expected a positive number")
            check(least <= zero <= most, f"zero point is {zero}, expected {least} to {most}")
        case "round_heads":
            width = node.attrs["head_dim"]
            check(width > 0 and given[0] % width == 0, f"{given[0]} features are not whole heads of {width}")
        case "add" | "mul":
            check(given[0] == given[1], f"adds {given[0]} to {given[1]} features")
        case "rotate":
            _check_rotate(check, program, node, given[0])
        case "virtual_tokens":
            rows, tokens = shape["rows"], sum(p.tokens for p in program.prompts)
            check(len(rows) == 2 and rows[1] == given[0], f"rows have shape {rows}, its input has {given[0]} features")
            check(not tokens or rows[0] == tokens, f"has {rows[0]} rows for {tokens} virtual tokens")
        case "split":
            return node.attrs["groups"] * (node.attrs["stop"] - node.attrs["start"])
    return given[0]


def _check_rotate(check, program: Program, node: Node, width: int | None) -> None:
    bank, group, rows = tuple(program.params[node.params["cosine"]].shape), node.attrs["group"], node.attrs["rows"]
    check(node.inputs[1] == "adapter_ids", f"reads '{node.inputs[1]}', expected the program's own 'adapter_ids'")
    check(tuple(program.params[node.params["sine"]].shape) == bank, "cosine and sine have different shapes")
    check(len(bank) == 2 and bank[1] == width, f"bank has shape {bank}, its input has {width} features")
    check(group >= 2 and group % 2 == 0 and width % group == 0, f"groups of {group} do not fit {width} features")
    check(len(rows) == len(program.adapters), f"has rows for {len(rows)} of {len(program.adapters)} adapters")
    check(all(-1 <= row < bank[0] for row in rows), f"rows {rows} point outside of a bank of {bank[0]}")


def _check_boundaries(program: Program, after: str, block_of: dict[str, int | None]) -> None:
    """A block reads one value of what came before it, and nothing inside a block is read later but its last value."""
    last = {n.block: n.name for n in program.nodes if n.block is not None}
    prologue = {n.name for n in program.prologue}
    for node in program.nodes:
        for value in node.inputs:
            home = block_of.get(value)
            if value in block_of and value not in prologue and home != node.block and value != last.get(home):
                raise TpvcError(f"after {after}, node '{node.name}' reads '{value}' from inside block {home}")


def ports(program: Program, index: int) -> tuple[str, str]:
    """(name of the value that enters block `index`, name of the value that leaves it)."""
    nodes = program.block(index)
    own = {n.name for n in nodes}
    entering = {v for n in nodes for v in n.inputs if v not in own and v not in INPUTS}
    if len(entering) != 1:
        raise TpvcError(f"block {index} reads {sorted(entering)}; a block must read exactly one value")
    return entering.pop(), nodes[-1].name

"""The graph for ONNX Runtime GenAI: integer matrices in MatMulNBits, attention in GroupQueryAttention, norms fused with
the residual before them. What has no faster form is lowered by the standard table.

Batches are padded on the right, as GenAI does: GroupQueryAttention counts the real tokens of a row from its start.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from tpvc.compiler.backends.onnx import standard, weights
from tpvc.compiler.backends.onnx.fusions import AttentionPlan, Projection
from tpvc.compiler.backends.onnx.graph import MICROSOFT
from tpvc.compiler.backends.onnx.matmulnbits import Layout
from tpvc.compiler.backends.onnx.rotations import turn
from tpvc.compiler.backends.onnx.standard import STANDARD, Context, Lower, value_of
from tpvc.compiler.program import Node, QTensor, dense, grid_of, read


def embed(c: Context, node: Node) -> ir.Value:
    """GatherBlockQuantized for an integer table; its bytes are those of the head when both read one parameter."""
    name, g = node.params["weight"], c.graph
    if grid_of(c.program.params[name]) is None:
        return standard.embed(c, node)
    layout, (codes, *rest) = _packed(c, name)
    rows = codes.shape[0]
    table = g.once(("rows", name), lambda: g.view(codes, f"{name}.codes.rows", (rows, codes.shape[1] * codes.shape[2])))
    attrs = {"bits": layout.bits, "block_size": layout.block, "gather_axis": 0, "quantize_axis": 1}
    ids = standard.ids_of(c, node)
    out = g.op("GatherBlockQuantized", table, ids, *rest, name=node.name, domain=MICROSOFT, **attrs)
    return _without_filling(c, node, out, layout)


def _packed(c: Context, name: str) -> tuple[Layout, list[ir.Value]]:
    def make() -> tuple[Layout, list[ir.Value]]:
        packed, values = weights.add_packed(c.graph, name, read(c.program.params[name]))
        return packed.layout, values

    return c.graph.once(("packed", name), make)


def _without_filling(c: Context, node: Node, x: ir.Value, layout: Layout) -> ir.Value:
    """Drop the columns that the layout put at the end of every run."""
    if layout.padded == layout.group:
        return x
    g = c.graph
    x = g.op("Reshape", x, g.constant([0, 0, layout.runs, -1]), name=node.name)
    x = g.op("Slice", x, g.constant([0]), g.constant([layout.group]), g.constant([-1]), name=node.name)
    return g.op("Reshape", x, g.constant([0, 0, -1]), name=node.name)


def _with_filling(c: Context, name: str, x: ir.Value, layout: Layout) -> ir.Value:
    """Put zeros where the layout has columns that the matrix does not."""
    if not layout.spreads:
        return x
    g = c.graph
    x = g.op("Reshape", x, g.constant([0, 0, layout.runs, layout.group]), name=name)
    x = g.op("Pad", x, g.constant([0, layout.padded - layout.group]), None, g.constant([-1]), name=name)
    return g.op("Reshape", x, g.constant([0, 0, layout.columns]), name=name)


def linear(c: Context, node: Node) -> ir.Value:
    name = node.params["weight"]
    bias = c.vector(node.params["bias"]) if "bias" in node.params else None
    x = value_of(c, node.inputs[0])
    if grid_of(c.program.params[name]) is not None:
        return _matmul_nbits(c, node.name, x, *_packed(c, name), bias)
    if not standard.shared_with_embedding(c, name):
        return standard.linear(c, node)
    table = standard.float_table(c, name)
    out = c.graph.op("FusedMatMul", x, table, name=node.name, domain=MICROSOFT, transB=1)
    return out if bias is None else c.graph.op("Add", out, bias, name=node.name)


def _matmul_nbits(
    c: Context, name: str, x: ir.Value, layout: Layout, matrix: list[ir.Value], bias: ir.Value | None
) -> ir.Value:
    attrs = {
        "K": layout.columns,
        "N": matrix[0].shape[0],
        "bits": layout.bits,
        "block_size": layout.block,
        "accuracy_level": c.accuracy_level,
    }
    inputs = [_with_filling(c, name, x, layout), *matrix]
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    return c.graph.op("MatMulNBits", *inputs, name=name, domain=MICROSOFT, **attrs)


def rms_norm(c: Context, node: Node) -> ir.Value:
    weight, epsilon = _gain(c, node), node.attrs["eps"]

    def normed(x: ir.Value) -> ir.Value:
        kind = "SimplifiedLayerNormalization"
        return c.graph.op(kind, x, weight, name=node.name, axis=-1, epsilon=epsilon, stash_type=1)

    return standard.over_groups(c, node, normed)


def _gain(c: Context, node: Node) -> ir.Value:
    return c.vector(node.params["weight"], float(node.attrs.get("plus_one", False)))


def add(c: Context, node: Node) -> ir.Value:
    """With the norm that follows, when there is one: the residual stream and its normed form from one node."""
    norm = c.plan.skip_norm.get(node.name)
    if norm is None:
        return STANDARD["add"](c, node)
    a, b = (value_of(c, v) for v in node.inputs)
    params, kind = [_gain(c, norm)], "SkipSimplifiedLayerNormalization"
    if norm.op == "layer_norm":
        kind = "SkipLayerNormalization"
        params += [c.vector(norm.params["bias"])] if "bias" in norm.params else []
    flags = (True, False, False, True)
    attrs = {"domain": MICROSOFT, "outputs": flags, "epsilon": norm.attrs["eps"]}
    c.values[norm.name], total = c.graph.op(kind, a, b, *params, name=norm.name, **attrs)
    return total


def activation(c: Context, node: Node) -> ir.Value:
    """x sigmoid(x) is QuickGelu with alpha 1."""
    if node.attrs["kind"] != "silu":
        return STANDARD["activation"](c, node)
    x = value_of(c, node.inputs[0])
    return c.graph.op("QuickGelu", x, name=node.name, domain=MICROSOFT, alpha=1.0)


def attention(c: Context, node: Node) -> ir.Value:
    """GroupQueryAttention; over packed q|k|v where one matrix can yield them, and rotating by itself where it can."""
    plan = c.plan.attention.get(node.name)
    if plan is None:
        return STANDARD["attention"](c, node)
    g = c.graph
    qkv = [value_of(c, v) for v in plan.inputs] if plan.projection is None else [_project(c, node, plan), None, None]
    past, count, last = standard.past_of(c, node), 0, []
    if node.params:
        count = c.program.params[node.params["prefix_key"]].shape[1]
        pairs = zip(standard.prefix_of(c, node), past, strict=True)
        past = [g.op("Concat", prefix, own, name=node.name, axis=2) for prefix, own in pairs]
        last = [g.once("new tokens", lambda: _new_tokens(c))]
    inputs = [*qkv, *past, *g.once(("lengths", count), lambda: _lengths(c, count))]
    if plan.rope is not None:
        inputs += standard.rope_caches(c, plan.rope)
    if last:
        inputs += [None] * (16 - len(inputs)) + last
    attrs = {
        "num_heads": node.attrs["heads"],
        "kv_num_heads": node.attrs["kv_heads"],
        "scale": float(node.attrs["scale"]),
        "do_rotary": int(plan.rope is not None),
        "local_window_size": node.attrs.get("window", -1),
        "softcap": float(node.attrs.get("softcap", 0.0)),
    }
    out, *cache = g.op("GroupQueryAttention", *inputs, name=node.name, domain=MICROSOFT, outputs=3, **attrs)
    if node.params:
        ends = g.constant([count]), g.constant([standard.LAST]), g.constant([2])
        cache = [g.op("Slice", state, *ends, name=node.name) for state in cache]
    c.caches.append(tuple(cache))
    return out


def _lengths(c: Context, prefix: int) -> tuple[ir.Value, ir.Value]:
    """int32: last position of every row, [B], and the length of the longest, a scalar; both behind `prefix` tokens."""
    g, mask = c.graph, c.values["mask"]
    last = g.op("Add", g.op("ReduceSum", mask, g.constant([1]), keepdims=0), g.constant(prefix - 1))
    total = g.op("Gather", g.op("Shape", mask), g.constant(1), axis=0)
    total = g.op("Add", total, g.constant(prefix)) if prefix else total
    return tuple(g.op("Cast", v, to=ir.DataType.INT32) for v in (last, total))


def _new_tokens(c: Context) -> ir.Value:
    """int32 [B]: how many of the new tokens of every row are real."""
    g = c.graph
    new = g.op("Neg", g.op("Shape", c.values["input_ids"], start=1, end=2))
    mask = g.op("Slice", c.values["mask"], new, g.constant([standard.LAST]), g.constant([1]))
    return g.op("Cast", g.op("ReduceSum", mask, g.constant([1]), keepdims=0), to=ir.DataType.INT32)


def rotate(c: Context, node: Node) -> ir.Value:
    x, parts = value_of(c, node.inputs[0]), [(node, c.widths[node.name])]
    return turn(c, node.name, x, node.attrs["group"], parts)


def _project(c: Context, node: Node, plan: AttentionPlan) -> ir.Value:
    """q|k|v of every token from one matrix, turned at once where they are adapted."""
    projection, name = plan.projection, f"{node.name}.qkv"
    out = _product(c, name, projection)
    if projection.group is None:
        return out
    widths = [c.widths[n.name] for n in projection.linears]
    parts = list(zip(projection.rotations, widths, strict=True))
    return turn(c, f"{name}.rotate", out, projection.group, parts)


def _product(c: Context, name: str, projection: Projection) -> ir.Value:
    params = c.program.params
    matrix = weights.stack([read(params[n.params["weight"]]) for n in projection.linears], projection.order)
    bias = _bias(c, projection)
    if bias is not None:
        bias = c.graph.weight(f"{name}.bias", bias.numpy())
    x = value_of(c, projection.linears[0].inputs[0])
    if isinstance(matrix, QTensor):
        packed, values = weights.add_packed(c.graph, name, matrix)
        return _matmul_nbits(c, name, x, packed.layout, values, bias)
    out = c.graph.op("MatMul", x, c.graph.weight(f"{name}.matrix", matrix.float().numpy().T), name=name)
    return out if bias is None else c.graph.op("Add", out, bias, name=name)


def _bias(c: Context, projection: Projection) -> torch.Tensor | None:
    if not any("bias" in n.params for n in projection.linears):
        return None
    params = c.program.params
    parts = [
        dense(params[n.params["bias"]]) if "bias" in n.params else torch.zeros(c.widths[n.name])
        for n in projection.linears
    ]
    return torch.cat(parts)[slice(None) if projection.order is None else projection.order]


GENAI: dict[str, Lower] = STANDARD | {
    "embed": embed,
    "linear": linear,
    "rms_norm": rms_norm,
    "add": add,
    "activation": activation,
    "attention": attention,
    "rotate": rotate,
}


def last_token(c: Context, x: ir.Value) -> ir.Value:
    """[B, T, D] -> [B, 1, D]: the last real new token of every row, the only one whose logits are asked for."""
    g, mask = c.graph, c.values["mask"]
    new = g.op("Neg", g.op("Shape", c.values["input_ids"], start=1, end=2))
    mask = g.op("Slice", mask, new, g.constant([np.iinfo(np.int64).max]), g.constant([1]))
    index = g.op("ArgMax", mask, axis=1, keepdims=1, select_last_index=1)
    return g.op("Unsqueeze", g.op("GatherND", x, index, batch_dims=1), g.constant([1]))

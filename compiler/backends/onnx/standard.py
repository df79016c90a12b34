"""Every op in operators of the ONNX standard (opset 21), and nothing else: the portable graph.

`STANDARD` maps an op to the function that lowers one node: (Context, Node) -> the node's value. The graph for ONNX
Runtime GenAI starts from this table and replaces what has a faster form there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from tpvc.compiler.adapters.road import halves
from tpvc.compiler.backends.onnx import weights
from tpvc.compiler.backends.onnx.adapters import INPUT, bank
from tpvc.compiler.backends.onnx.fusions import NOTHING, Plan, features, head_dim
from tpvc.compiler.backends.onnx.graph import Graph
from tpvc.compiler.ops import ROW_FLOOR, ROW_RANGE
from tpvc.compiler.program import Node, Program, dense, grid_of, input_grids, read

LAST = np.iinfo(np.int64).max


@dataclass
class Context:
    """What lowering a node needs to know. `values` holds the ONNX value of every node lowered so far; a node that was
    fused into an earlier one is in it already."""

    program: Program
    graph: Graph
    plan: Plan = NOTHING
    accuracy_level: int = 4
    values: dict[str, ir.Value] = field(default_factory=dict)
    widths: Mapping[str, int] = field(init=False)
    caches: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.widths = features(self.program)

    def vector(self, name: str, plus: float = 0.0) -> ir.Value:
        """A float parameter as it is, `plus` added to it."""

        def make() -> ir.Value:
            return self.graph.weight(f"{name}+{plus:g}" if plus else name, _numpy(name, self) + np.float32(plus))

        return self.graph.once(("vector", name, plus), make)


Lower = Callable[[Context, Node], ir.Value]


def _numpy(name: str, c: Context) -> np.ndarray:
    return dense(c.program.params[name]).numpy()


def embed(c: Context, node: Node) -> ir.Value:
    """Gather; an integer table is gathered as bytes and dequantised row by row."""
    ids, name = ids_of(c, node), node.params["weight"]
    g = c.graph
    if grid_of(c.program.params[name]) is None:
        return g.op("Gather", float_table(c, name), ids, name=node.name, axis=0)
    value = read(c.program.params[name])
    rows, groups = value.shape[0], value.scale.shape[1]

    def table(kind: str, tensor: torch.Tensor) -> ir.Value:
        array = tensor.expand(rows, -1).numpy()
        return g.op("Gather", g.weight(f"{name}.rows.{kind}", array), ids, name=f"{node.name}.{kind}", axis=0)

    codes = g.op("Cast", table("codes", value.codes), name=node.name, to=ir.DataType.FLOAT)
    codes = g.op("Reshape", codes, g.constant([0, 0, groups, -1]), name=node.name)
    if value.zero is None:
        zero = g.constant(1 << value.grid.bits - 1, np.float32)
    else:
        zero = g.op("Cast", table("zeros", value.zero), name=node.name, to=ir.DataType.FLOAT)
        zero = g.op("Unsqueeze", zero, g.constant([-1]), name=node.name)
    scale = g.op("Unsqueeze", table("scales", value.scale), g.constant([-1]), name=node.name)
    product = g.op("Mul", g.op("Sub", codes, zero, name=node.name), scale, name=node.name)
    return g.op("Reshape", product, g.constant([0, 0, -1]), name=node.name)


def ids_of(c: Context, node: Node) -> ir.Value:
    ids, offset = value_of(c, node.inputs[0]), node.attrs.get("offset", 0)
    return c.graph.op("Add", ids, c.graph.constant(offset), name=node.name) if offset else ids


def float_table(c: Context, name: str) -> ir.Value:
    """A float matrix in the orientation of the checkpoint, [out, in], shared by embedding and head."""
    return c.graph.once(("table", name), lambda: c.graph.weight(name, _numpy(name, c)))


def shared_with_embedding(c: Context, name: str) -> bool:
    return any(n.op == "embed" and name in n.params.values() for n in c.program.nodes)


def linear(c: Context, node: Node) -> ir.Value:
    """DequantizeLinear of codes stored [K, N], MatMul, Add: the form that ONNX Runtime turns into MatMulNBits."""
    g, name = c.graph, node.params["weight"]
    parameter = c.program.params[name]
    if grid_of(parameter) is not None:
        static = name in input_grids(c.program)
        matrix = g.once(("dequantised", name), lambda: weights.dequantize_linear(g, name, read(parameter), static))
    elif shared_with_embedding(c, name):
        matrix = g.op("Transpose", float_table(c, name), name=node.name, perm=[1, 0])
    else:
        matrix = g.once(("matrix", name), lambda: g.weight(f"{name}.transposed", dense(parameter).numpy().T))
    out = g.op("MatMul", value_of(c, node.inputs[0]), matrix, name=node.name)
    return out if "bias" not in node.params else g.op("Add", out, c.vector(node.params["bias"]), name=node.name)


def reorder(c: Context, node: Node) -> ir.Value:
    """One table of indices for all nodes of one order."""
    order, name = node.attrs["order"], f"{node.name}.order"
    table = c.graph.once(("order", order), lambda: c.graph.weight(name, np.array(order, np.int64)))
    return c.graph.op("Gather", value_of(c, node.inputs[0]), table, name=node.name, axis=-1)


def round_rows(c: Context, node: Node) -> ir.Value:
    """Codes times scales; `Round` goes half way to the even neighbour, as the cast to float8 does."""
    g, x, kind, name = c.graph, value_of(c, node.inputs[0]), node.attrs["kind"], node.name
    largest = g.op("ReduceMax", g.op("Abs", x, name=name), g.constant([-1]), name=name, keepdims=1)
    largest = g.op("Max", largest, g.constant(ROW_FLOOR, np.float32), name=name)
    scale = g.op("Div", largest, g.constant(ROW_RANGE[kind], np.float32), name=name)
    codes = g.op("Div", x, scale, name=name)
    if kind == "int8":
        codes = g.op("Round", codes, name=name)
    else:
        codes = g.op("Cast", codes, name=name, to=ir.DataType.FLOAT8E4M3FN)
        codes = g.op("Cast", codes, name=name, to=ir.DataType.FLOAT)
    return g.op("Mul", codes, scale, name=name)


def round_tensor(c: Context, node: Node) -> ir.Value:
    """QuantizeLinear and DequantizeLinear on one grid."""
    g, name = c.graph, node.name
    scale, zero = g.weight(f"{name}.scale", np.float32(node.attrs["scale"])), np.int8(node.attrs["zero"])
    grid = scale, g.weight(f"{name}.zero", zero)
    codes = g.op("QuantizeLinear", value_of(c, node.inputs[0]), *grid, name=name)
    return g.op("DequantizeLinear", codes, *grid, name=name)


def rms_norm(c: Context, node: Node) -> ir.Value:
    weight = c.vector(node.params["weight"], float(node.attrs.get("plus_one", False)))

    def normed(x: ir.Value) -> ir.Value:
        g = c.graph
        square = g.op("Pow", x, g.constant(2.0, np.float32), name=node.name)
        mean = g.op("ReduceMean", square, g.constant([-1]), name=node.name, keepdims=1)
        root = g.op("Sqrt", g.op("Add", mean, g.constant(node.attrs["eps"], np.float32), name=node.name))
        return g.op("Mul", g.op("Div", x, root, name=node.name), weight, name=node.name)

    return over_groups(c, node, normed)


def over_groups(c: Context, node: Node, normed: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """`normed` over the runs of features that the norm's weight covers: all of them, or each head by itself."""
    x, g = value_of(c, node.inputs[0]), c.graph
    size = c.program.params[node.params["weight"]].shape[0]
    if size == c.widths[node.inputs[0]]:
        return normed(x)
    heads = g.op("Reshape", x, g.constant([0, 0, -1, size]), name=node.name)
    return g.op("Reshape", normed(heads), g.constant([0, 0, -1]), name=node.name)


def layer_norm(c: Context, node: Node) -> ir.Value:
    params = [c.vector(node.params[role]) for role in ("weight", "bias") if role in node.params]
    x = value_of(c, node.inputs[0])
    return c.graph.op("LayerNormalization", x, *params, name=node.name, axis=-1, epsilon=node.attrs["eps"])


def rope(c: Context, node: Node) -> ir.Value:
    """(a, b, rest) -> (a cos - b sin, b cos + a sin, rest) of every head."""
    g, width = c.graph, node.attrs["head_dim"]
    half = len(node.attrs["inv_freq"])
    key = ("angles", node.inputs[1], node.attrs.get("offset", 0), *rope_key(node.attrs))
    cos, sin = g.once(key, lambda: _angles(c, node))
    x = g.op("Reshape", value_of(c, node.inputs[0]), g.constant([0, 0, -1, width]), name=node.name)
    sizes = [half, half] + [width - 2 * half] * (width > 2 * half)
    a, b, *rest = g.op("Split", x, g.constant(sizes), name=node.name, axis=-1, outputs=len(sizes))

    def product(x: ir.Value, y: ir.Value) -> ir.Value:
        return g.op("Mul", x, y, name=node.name)

    turned = (
        g.op("Sub", product(a, cos), product(b, sin), name=node.name),
        g.op("Add", product(b, cos), product(a, sin), name=node.name),
    )
    out = g.op("Concat", *turned, *rest, name=node.name, axis=-1)
    return g.op("Reshape", out, g.constant([0, 0, -1]), name=node.name)


def rope_key(attrs: Mapping) -> tuple:
    return attrs["inv_freq"], attrs.get("magnitude", 1.0)


def rope_caches(c: Context, attrs: Mapping) -> tuple[ir.Value, ir.Value]:
    """cos and sin, float32 [context_length, rotary_dim / 2], computed as the reference does; row 0 is position 0."""

    def make() -> tuple[ir.Value, ir.Value]:
        inv_freq, magnitude = rope_key(attrs)
        angle = torch.arange(c.program.facts.context_length).float()[:, None] * torch.tensor(inv_freq)
        number = sum(name.startswith("cos_cache") for name in c.graph.initializers)
        return tuple(
            c.graph.weight(f"{kind}_cache.{number}", (table * magnitude).numpy())
            for kind, table in (("cos", angle.cos()), ("sin", angle.sin()))
        )

    return c.graph.once(("caches", *rope_key(attrs)), make)


def _angles(c: Context, node: Node) -> tuple[ir.Value, ...]:
    """cos and sin of the new positions, [B, T, 1, half]."""
    positions, g = value_of(c, node.inputs[1]), c.graph
    if node.attrs.get("offset"):
        positions = g.op("Add", positions, g.constant(node.attrs["offset"]))
    return tuple(
        g.op("Unsqueeze", g.op("Gather", table, positions, axis=0), g.constant([2]))
        for table in rope_caches(c, node.attrs)
    )


def attention(c: Context, node: Node) -> ir.Value:
    """softmax(q k^T + mask) v with the new keys and values appended to the cache.

    Queries of the heads that share a key head lie in a dimension of their own: [B, kv_heads, share, T, d].
    """
    g, kv = c.graph, node.attrs["kv_heads"]
    width, share = head_dim(node, c.widths), node.attrs["heads"] // node.attrs["kv_heads"]

    def make(kind: str, *inputs: ir.Value, **attrs: Any) -> ir.Value:
        return g.op(kind, *inputs, name=node.name, **attrs)

    q, k, v = (value_of(c, name) for name in node.inputs[:3])
    q = make("Reshape", q, g.constant([0, 0, kv, share, width]))
    q = make("Transpose", q, perm=[0, 2, 3, 1, 4])
    q = make("Mul", q, g.constant(node.attrs["scale"], np.float32))
    state = []
    for new, past in zip((k, v), past_of(c, node), strict=True):
        new = make("Transpose", make("Reshape", new, g.constant([0, 0, kv, width])), perm=[0, 2, 1, 3])
        state.append(make("Concat", past, new, axis=2))
    c.caches.append(tuple(state))
    mask = value_of(c, node.inputs[3])
    if node.params:
        state = [make("Concat", prefix, own, axis=2) for prefix, own in zip(prefix_of(c, node), state, strict=True)]
        count = c.program.params[node.params["prefix_key"]].shape[1]
        mask = g.once(("prefixed mask", mask.name, count), lambda: _prefixed(c, mask, count))
    k, v = (make("Unsqueeze", t, g.constant([2])) for t in state)
    scores = make("MatMul", q, make("Transpose", k, perm=[0, 1, 2, 4, 3]))
    cap = node.attrs.get("softcap")
    if cap is not None:
        scores = _capped(c, node, scores, cap)
    window, queries = node.attrs.get("window"), value_of(c, node.inputs[0])
    seen = g.once(("seen", mask.name, window), lambda: _seen(c, mask, queries, window))
    scores = make("Where", seen, scores, g.constant(np.finfo(np.float32).min, np.float32))
    out = make("MatMul", make("Softmax", scores, axis=-1), v)
    out = make("Transpose", out, perm=[0, 3, 1, 2, 4])
    return make("Reshape", out, g.constant([0, 0, kv * share * width]))


def past_of(c: Context, node: Node) -> tuple[ir.Value, ir.Value]:
    """The graph inputs that hold the layer's keys and values so far."""
    layer, width = len(c.caches), head_dim(node, c.widths)
    shape = ("batch_size", node.attrs["kv_heads"], "past_sequence_length", width)
    names = (f"past_key_values.{layer}.{kind}" for kind in ("key", "value"))
    return tuple(c.graph.input(name, ir.DataType.FLOAT, shape) for name in names)


def prefix_of(c: Context, node: Node) -> tuple[ir.Value, ir.Value]:
    """Keys and values [B, kv_heads, n, d] of a prompt that was folded into an attention node."""
    g = c.graph
    batch = g.once("batch", lambda: g.op("Shape", c.values["input_ids"], start=0, end=1))
    made = []
    for role in ("prefix_key", "prefix_value"):
        table = g.weight(node.params[role], _numpy(node.params[role], c)[None])
        shape = g.op("Concat", batch, g.constant(table.shape[1:]), axis=0)
        made.append(g.op("Expand", table, shape, name=node.name))
    return tuple(made)


def _prefixed(c: Context, mask: ir.Value, count: int) -> ir.Value:
    """int64 [B, count + S]: ones before the mask."""
    g = c.graph
    batch = g.op("Shape", mask, start=0, end=1)
    ones = g.op("Expand", g.constant([[1]]), g.op("Concat", batch, g.constant([count]), axis=0))
    return g.op("Concat", ones, mask, axis=1)


def _seen(c: Context, mask: ir.Value, queries: ir.Value, window: int | None) -> ir.Value:
    """bool [B, 1, 1, T, S]: what `ops.attention` lets a query see."""
    g = c.graph
    total = g.op("Squeeze", g.op("Shape", mask, start=1, end=2))
    new = g.op("Squeeze", g.op("Shape", queries, start=1, end=2))
    count = None if window is None else g.op("CumSum", mask, g.constant(1))
    mask = g.op("Cast", mask, to=ir.DataType.BOOL)
    key = g.op("Range", g.constant(0), total, g.constant(1))
    query = g.op("Unsqueeze", g.op("Range", g.op("Sub", total, new), total, g.constant(1)), g.constant([1]))
    one = g.constant([1])
    real = g.op("Or", g.op("Unsqueeze", mask, one), g.op("Equal", key, query))
    seen = g.op("And", g.op("LessOrEqual", key, query), real)
    if window is not None:
        last = g.op("Slice", count, g.op("Neg", g.op("Unsqueeze", new, g.constant([0]))), g.constant([LAST]), one)
        least = g.op("Sub", g.op("Unsqueeze", last, g.constant([2])), g.constant(window))
        seen = g.op("And", seen, g.op("Greater", g.op("Unsqueeze", count, one), least))
    return g.op("Unsqueeze", seen, g.constant([1, 2]))


def activation(c: Context, node: Node) -> ir.Value:
    x, g = value_of(c, node.inputs[0]), c.graph
    match node.attrs["kind"]:
        case "silu":
            return g.op("Mul", x, g.op("Sigmoid", x, name=node.name), name=node.name)
        case "relu":
            return g.op("Relu", x, name=node.name)
        case kind:
            return g.op("Gelu", x, name=node.name, approximate={"gelu": "none", "gelu_tanh": "tanh"}[kind])


def softcap(c: Context, node: Node) -> ir.Value:
    return _capped(c, node, value_of(c, node.inputs[0]), node.attrs["cap"])


def _capped(c: Context, node: Node, x: ir.Value, cap: float) -> ir.Value:
    g, cap = c.graph, c.graph.constant(cap, np.float32)
    return g.op("Mul", g.op("Tanh", g.op("Div", x, cap, name=node.name), name=node.name), cap, name=node.name)


def scale(c: Context, node: Node) -> ir.Value:
    factor = c.graph.constant(node.attrs["factor"], np.float32)
    return c.graph.op("Mul", value_of(c, node.inputs[0]), factor, name=node.name)


def split(c: Context, node: Node) -> ir.Value:
    g, x, groups = c.graph, value_of(c, node.inputs[0]), node.attrs["groups"]
    if groups > 1:
        x = g.op("Reshape", x, g.constant([0, 0, groups, -1]), name=node.name)
    start, stop = g.constant([node.attrs["start"]]), g.constant([node.attrs["stop"]])
    x = g.op("Slice", x, start, stop, g.constant([-1]), name=node.name)
    return x if groups == 1 else g.op("Reshape", x, g.constant([0, 0, -1]), name=node.name)


def rotate(c: Context, node: Node) -> ir.Value:
    """`C * x + S * rot(x)` with every row's own C and S; the sign of rot lies in the table of S."""
    g, name, group = c.graph, node.name, node.attrs["group"]
    x, (cosine, sine) = value_of(c, node.inputs[0]), bank(c.program, [(node, c.widths[node.name])])
    halves(sine, group)[0].neg_()
    factors = []
    for kind, table in (("cos", cosine), ("sin", sine)):
        table = g.weight(f"{name}.{kind}", table[:, None].numpy())
        factors.append(g.op("Gather", table, block_of(c), name=name, axis=0))
    pairs = g.op("Reshape", x, g.constant([0, 0, -1, 2, group // 2]), name=name)
    lo, hi = g.op("Split", pairs, name=name, axis=3, num_outputs=2, outputs=2)
    partner = g.op("Reshape", g.op("Concat", hi, lo, name=name, axis=3), g.constant([0, 0, -1]), name=name)
    kept, mixed = (g.op("Mul", v, factor, name=name) for v, factor in zip((x, partner), factors, strict=True))
    return g.op("Add", kept, mixed, name=name)


def block_of(c: Context) -> ir.Value:
    """int64 [1] or [B]: the block of every row's adapter in the tables. Gather stops at an id that is too high."""
    g = c.graph
    return g.once("adapter block", lambda: g.op("Add", value_of(c, INPUT), g.constant(1), name=INPUT))


def text_ids(c: Context, node: Node) -> ir.Value:
    g, ids = c.graph, value_of(c, node.inputs[0])
    return g.op("Where", g.op("Less", ids, g.constant(node.attrs["vocab"])), ids, g.constant(0), name=node.name)


def virtual_tokens(c: Context, node: Node) -> ir.Value:
    """Rows of their own table for ids from vocab_size on. Gather stops at an id that is too high."""
    g, x, ids = c.graph, *(value_of(c, v) for v in node.inputs)
    vocab, name = g.constant(node.attrs["vocab"]), node.name
    row = g.op("Max", g.op("Sub", ids, vocab, name=name), g.constant(0), name=name)
    rows = g.op("Gather", c.vector(node.params["rows"]), row, name=name, axis=0)
    text = g.op("Unsqueeze", g.op("Less", ids, vocab, name=name), g.constant([-1]), name=name)
    return g.op("Where", text, x, rows, name=name)


def prefix_ids(c: Context, node: Node) -> ir.Value:
    """The prompt's ids before the first tokens of every row: all `count` of them where T = S, none later."""
    g, (ids, mask) = c.graph, (value_of(c, v) for v in node.inputs)
    first, count = node.attrs["first"], node.attrs["count"]
    batch, new = (g.op("Shape", ids, start=i, end=i + 1) for i in (0, 1))
    begins = g.op("Cast", g.op("Equal", new, g.op("Shape", mask, start=1, end=2)), to=ir.DataType.INT64)
    length = g.op("Mul", begins, g.constant([count]))
    prompt = g.op("Slice", g.constant([list(range(first, first + count))]), g.constant([0]), length, g.constant([1]))
    shape = g.op("Concat", batch, length, axis=0)
    return g.op("Concat", g.op("Expand", prompt, shape), ids, name=node.name, axis=1)


def prefix_mask(c: Context, node: Node) -> ir.Value:
    return _prefixed(c, value_of(c, node.inputs[0]), node.attrs["count"])


def positions(c: Context, node: Node) -> ir.Value:
    return _positions(c, *(value_of(c, v) for v in node.inputs))


def last_tokens(c: Context, node: Node) -> ir.Value:
    g, (x, ids) = c.graph, (value_of(c, v) for v in node.inputs)
    new = g.op("Neg", g.op("Shape", ids, start=1, end=2))
    return g.op("Slice", x, new, g.constant([LAST]), g.constant([1]), name=node.name)


def _pairwise(kind: str) -> Lower:
    return lambda c, node: c.graph.op(kind, *(value_of(c, v) for v in node.inputs), name=node.name)


STANDARD: dict[str, Lower] = {
    "embed": embed,
    "linear": linear,
    "reorder": reorder,
    "round_rows": round_rows,
    "round_tensor": round_tensor,
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "rope": rope,
    "attention": attention,
    "activation": activation,
    "add": _pairwise("Add"),
    "mul": _pairwise("Mul"),
    "scale": scale,
    "softcap": softcap,
    "split": split,
    "rotate": rotate,
    "text_ids": text_ids,
    "virtual_tokens": virtual_tokens,
    "prefix_ids": prefix_ids,
    "prefix_mask": prefix_mask,
    "positions": positions,
    "last_tokens": last_tokens,
}


def value_of(c: Context, name: str) -> ir.Value:
    """The value of a node, or of an input of the Program: `mask` is the attention mask as int64, and `positions` are
    counted from it, so that padding on either side is not counted."""
    if name == "positions" and name not in c.values:
        c.values[name] = _positions(c, c.values["mask"], c.values["input_ids"])
    return c.values[name]


def _positions(c: Context, mask: ir.Value, ids: ir.Value) -> ir.Value:
    g = c.graph
    count = g.op("Sub", g.op("CumSum", mask, g.constant(1)), g.constant(1))
    new = g.op("Neg", g.op("Shape", ids, start=1, end=2))
    return g.op("Slice", g.op("Max", count, g.constant(0)), new, g.constant([LAST]), g.constant([1]))

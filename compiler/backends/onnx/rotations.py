"""Rotations in the GenAI graph: three nodes for road_1, six for road_2 and road_4.

Turning a pair (lo, hi) by an angle is what rotary positions do, so com.microsoft RotaryEmbedding computes it: the
"position" of a group is its place in the tables, and the caches hold C and S in place of cosines and sines of
positions. The operator gets x as [B, T, H, G], whose T it takes for heads and whose H groups for a sequence, so that
the same H positions serve every token.

    RE(h; c, s)_lo = c h_lo - s h_hi        RE(h; c, s)_hi = c h_hi + s h_lo

That is road_1. Where the rows of a 2 x 2 block differ (road_2, road_4) it has a reflected part too; J h is h with the
sign of hi changed:

    z = RE(h; p, q) + RE(J h; r, s)     p, r = (C_lo +- C_hi) / 2     q = (S_lo + S_hi) / 2     s = (S_hi - S_lo) / 2

Multiplying by 1 and adding 0 changes no finite number: rows without an adapter keep the base model's values.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from tpvc.compiler.adapters.road import halves
from tpvc.compiler.backends.onnx.adapters import INPUT, Parts, bank
from tpvc.compiler.backends.onnx.graph import MICROSOFT
from tpvc.compiler.backends.onnx.standard import Context, block_of, value_of


def turn(c: Context, name: str, x: ir.Value, group: int, parts: Parts) -> ir.Value:
    """x [B, T, n] with each row turned by its own adapter.

    Adjacent pairs (group 2) are one interleaved head of n, which is quicker than n / 2 heads of 2.
    """
    g, (cosine, sine) = c.graph, bank(c.program, parts)
    features = cosine.shape[1]
    width = features if group == 2 else group
    heads = features // width
    (c_lo, c_hi), (s_lo, s_hi) = halves(cosine, group), halves(sine, group)
    positions = g.once(("adapter positions", heads), lambda: _positions(c, heads))

    def embedding(x: ir.Value, part: str, *tables: torch.Tensor) -> ir.Value:
        caches = [
            g.weight(f"{name}.{part}.{kind}", table.reshape(-1, width // 2).numpy())
            for kind, table in zip(("cos", "sin"), tables, strict=True)
        ]
        attrs = {"domain": MICROSOFT, "interleaved": int(group == 2)}
        return g.op("RotaryEmbedding", x, positions, *caches, name=name, **attrs)

    x = g.op("Reshape", x, g.constant([0, 0, heads, width]), name=name)
    if torch.equal(c_lo, c_hi) and torch.equal(s_lo, s_hi):
        out = embedding(x, "turn", c_lo, s_lo)
    else:
        turned = embedding(x, "turn", (c_lo + c_hi) / 2, (s_lo + s_hi) / 2)
        x = g.op("Mul", x, _signs(c, group, width), name=name)
        reflected = embedding(x, "reflect", (c_lo - c_hi) / 2, (s_hi - s_lo) / 2)
        out = g.op("Add", turned, reflected, name=name)
    return g.op("Reshape", out, g.constant([0, 0, -1]), name=name)


def _positions(c: Context, heads: int) -> ir.Value:
    """int64 [B, H]: the rows of the caches that hold a row's block."""
    g = c.graph

    def blocks() -> ir.Value:
        rows = g.op("Shape", value_of(c, "input_ids"), name=INPUT, start=0, end=1)
        return g.op("Expand", block_of(c), rows, name=INPUT)

    places = np.arange((len(c.program.adapters) + 1) * heads, dtype=np.int64).reshape(-1, heads)
    table = g.weight(f"{INPUT}.positions.{heads}", places)
    return g.op("Gather", table, g.once("adapter blocks", blocks), name=INPUT, axis=0)


def _signs(c: Context, group: int, width: int) -> ir.Value:
    """J, float32 [width]."""
    signs = np.tile(np.repeat(np.array([1, -1], np.float32), group // 2), width // group)
    return c.graph.once(("signs", group, width), lambda: c.graph.weight(f"{INPUT}.signs.{group}.{width}", signs))

"""What checkpoints of GPTQ's and AWQ's tensors share: which modules are integers is what their files hold, and how each
is packed is one rule for all and exceptions by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpvc.compiler import awq_format, gptq_format
from tpvc.compiler.errors import TpvcError, short
from tpvc.compiler.frontends.weights import FLOATS, Stored
from tpvc.compiler.program import Grid, Lazy, QTensor

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""Names that stand under a module in place of its `weight`."""


@dataclass(frozen=True)
class Packed:
    """How one module is packed.

    layout  "awq", or a `checkpoint_format` of GPTQ
    group   columns that share a scale, the last group may be shorter; -1: a whole row
    """

    layout: str
    bits: int
    group: int
    symmetric: bool
    activations: str | None = None

    def columns(self, columns: int) -> int:
        """Columns of a group as it is stored."""
        return columns if self.group == -1 else self.group

    def grid(self, columns: int) -> Grid:
        """The grid of a matrix with `columns` columns. Groups that do not divide them are cut into equal ones that do,
        and that repeat their scale and zero point."""
        return Grid(self.bits, -1 if self.group == -1 else math.gcd(self.group, columns), self.symmetric)


@dataclass(frozen=True)
class Rule:
    """The exceptions of the modules whose name `test` matches from its start; `changed` None: they stay in float."""

    test: re.Pattern[str]
    changed: Mapping[str, Any] | None


@dataclass(frozen=True)
class Packing:
    """What a `quantization_config` says: how all modules are packed, and rules of which the first that fits counts."""

    common: Packed
    rules: tuple[Rule, ...] = ()

    def scheme(self, names: Sequence[str]) -> Packed | None:
        """How a module known by `names` is packed; None: it stays in float."""
        for rule in self.rules:
            if any(rule.test.match(name) for name in names):
                return None if rule.changed is None else packed(self.common.layout, rule.changed, self.common)
        return self.common


def packed(layout: str, said: Mapping[str, Any], common: Packed | None = None) -> Packed:
    """How modules are packed by `bits`, `group_size` and `sym` of a config; what it leaves out is as in `common`."""
    bits, group, symmetric = (said.get(key) for key in ("bits", "group_size", "sym"))
    if common is not None:
        bits, group = common.bits if bits is None else bits, common.group if group is None else group
        symmetric = common.symmetric if symmetric is None else symmetric
    widths = (awq_format.BITS,) if layout == "awq" else gptq_format.BITS
    check(bits in widths and isinstance(bits, int), f"has {short(bits)}-bit weights in the layout '{layout}'")
    check(isinstance(group, int) and (group == -1 or group > 0), f"has groups of {short(group)} columns")
    return Packed(layout, bits, group, True if symmetric is None else bool(symmetric))


def check(fact: bool, text: str) -> None:
    if not fact:
        widths = ", ".join(map(str, gptq_format.BITS))
        raise TpvcError(
            f"the checkpoint's quantization_config {text}, which is not supported; supported: GPTQ of versions 1 and 2"
            f" with {widths} bits, and AWQ's gemm layout with 4 bits, so start from the float checkpoint"
        )


def parameter(name: str, parts: Mapping[str, Stored], shape: tuple[int, ...], scheme: Packed) -> Lazy:
    """The integer parameter `name` of `shape` [N, K] from its parts in the file, its columns in the order of
    `order_of`. Headers and g_idx are checked now."""
    (rows, columns), bits, group = shape, scheme.bits, scheme.columns(shape[1])
    grid = scheme.grid(columns)
    awq = scheme.layout == "awq"
    if awq:
        own = awq_format.entries((rows, columns), group, torch.float16)
    else:
        own = gptq_format.entries((rows, columns), bits, group, torch.float16)
    needed = {"qweight", "scales"} | ({"qzeros"} if not grid.symmetric else set())
    if not needed <= set(parts) <= set(own):
        raise TpvcError(
            f"'{name}' ({scheme.layout}, {grid}) is stored as {', '.join(sorted(parts))}; expected"
            f" {', '.join(sorted(own))}"
        )
    kinds = {"scales": tuple(FLOATS), "g_idx": ("I32", "I64")}
    for part, stored in parts.items():
        allowed, wanted = kinds.get(part, ("I32",)), own[part][1]
        if stored.dtype not in allowed or stored.shape != wanted or (awq and rows % 8):
            raise TpvcError(
                f"tensor '{stored.name}' is {stored.dtype} {list(stored.shape)}; {scheme.layout}, {grid} of a"
                f" {rows}x{columns} matrix expects {' or '.join(allowed)} {list(wanted)}"
            )
    order = order_of(name, parts, columns, scheme)

    def read() -> QTensor:
        tensors = {part: stored.read() for part, stored in parts.items()}
        if awq:
            codes, scale, zero = awq_format.from_tensors(tensors)
        else:
            version = gptq_format.VERSIONS[scheme.layout]
            codes, scale, zero = gptq_format.from_tensors(tensors, bits, columns, version)
        codes = codes if order is None else codes[:, list(order)].contiguous()
        if grid.symmetric:
            _check_middle(name, zero, scheme)
            zero = None
        repeat, kept = group // grid.columns(columns), columns // grid.columns(columns)
        scale, zero = (t if t is None else t.repeat_interleave(repeat, 1)[:, :kept].contiguous() for t in (scale, zero))
        return QTensor(codes, scale, zero, grid, FLOATS[parts["scales"].dtype])

    return Lazy(tuple(shape), FLOATS[parts["scales"].dtype], read, grid)


def order_of(name: str, parts: Mapping[str, Stored], columns: int, scheme: Packed) -> tuple[int, ...] | None:
    """Columns put into groups by activation order (`desc_act`), group by group, so that those of a group lie side by
    side; None where they do anyhow. What reads the matrix has its features put into the same order."""
    if "g_idx" not in parts:
        return None
    group, said = scheme.columns(columns), parts["g_idx"].read().long()
    order = said.argsort(stable=True)
    if not torch.equal(said[order], torch.arange(columns) // group):
        raise TpvcError(f"'{parts['g_idx'].name}' does not put the {columns} columns of '{name}' in groups of {group}")
    return None if torch.equal(order, torch.arange(columns)) else tuple(order.tolist())


def _check_middle(name: str, zero: torch.Tensor | None, scheme: Packed) -> None:
    """Zero points of symmetric weights, where they are stored, are 2^(bits-1)."""
    middle = 2 ** (scheme.bits - 1)
    wrong = None if zero is None else (zero != middle).nonzero()
    if wrong is None or not len(wrong):
        return
    row, group = wrong[0].tolist()
    found = int(zero[row, group])
    hint = "the config says sym; set it to false if they are asymmetric"
    if scheme.layout == "gptq" and bool((zero == middle + 1).all()):
        hint = "these are zero points of version 2; set checkpoint_format to 'gptq_v2'"
    raise TpvcError(f"'{name}' has the zero point {found} in row {row}, group {group}, expected {middle}: {hint}")

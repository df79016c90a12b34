"""The numbers in an ONNX file of this tool, as the parameters that they were made of: initializers and the attributes
of the nodes that read them, without the code that wrote them but for the two packed layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.weights import is_file, is_inside
from tpvc.compiler.program import Grid, Node, Program, QTensor, grid_of
from tpvc.compiler.verification.matrices import Found, Value, names
from tpvc.passes.round_cache import float_cache

PACKED = ("MatMulNBits", "GatherBlockQuantized")


@dataclass(frozen=True)
class File:
    """arrays: initializers by name; blocks: (bits, block size) by the name of the codes that a node reads."""

    path: Path
    arrays: Mapping[str, Callable[[], np.ndarray]]
    blocks: Mapping[str, tuple[int, int]]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def array(self, name: str) -> np.ndarray:
        try:
            return np.asarray(self.arrays[name]())
        except KeyError:
            raise TpvcError(f"'{self.path}' lacks the initializer '{name}'; export the model again") from None
        except (OSError, ValueError, TypeError, ArithmeticError) as error:
            raise TpvcError(f"'{self.path}': '{name}' cannot be read from its data file ({error})") from error


def read(folder: Path, program: Program) -> Found:
    """Every parameter of `program` in `folder`/model.onnx, in each of the forms in which the file holds it."""
    file, program = opened(folder / "model.onnx"), float_cache(program)
    integers = lru_cache(1)(partial(_integers, file))  # queries, keys and values are asked for one after the other
    stacked = dict(_stacks(file, program, integers))
    for node in (n for n in program.nodes if n.op == "reorder" and f"{n.name}.order" in file):
        _check_equal(file, f"{node.name}.order", file.array(f"{node.name}.order"), np.array(node.attrs["order"]))
    for node in (n for n in program.nodes if n.op == "round_tensor"):
        for part, kind in (("scale", np.float32), ("zero", np.int8)):
            _check_equal(file, f"{node.name}.{part}", file.array(f"{node.name}.{part}"), kind(node.attrs[part]))
    for name in names(program):
        grid, shape = grid_of(program.params[name]), tuple(program.params[name].shape)
        if name in stacked:
            yield name, stacked[name]
        if f"{name}.rows.codes" in file:
            yield name, lambda name=name, grid=grid: _table(file, name, grid)
        if f"{name}.codes" in file:
            yield name, lambda name=name, grid=grid, shape=shape: _integers(file, name, grid, shape[1])
        if f"{name}.transposed" in file:
            yield name, lambda name=name: _float(file.array(f"{name}.transposed").T)
        if name in file:
            yield name, lambda name=name: _float(file.array(name))
        if f"{name}+1" in file:
            yield name, lambda name=name: _less_one(file, name, program)


def opened(path: Path) -> File:
    import onnx_ir as ir

    try:
        if not is_file(path):
            raise OSError("it is no regular file")
        graph = ir.load(path).graph
    except Exception as error:  # protobuf's own error types
        raise TpvcError(
            f"'{path}' is not a readable ONNX file: {str(error).strip() or type(error).__name__}"
        ) from error
    blocks = {}
    for node in (node for node in graph if node.op_type in PACKED):
        try:
            codes = node.inputs[1 if node.op_type == PACKED[0] else 0].name.removesuffix(".rows")
            blocks[codes] = node.attributes["bits"].value, node.attributes["block_size"].value
        except (LookupError, AttributeError) as error:
            raise TpvcError(f"'{path}' has a {node.op_type} without codes or their bits; export it again") from error
    arrays = {}
    for name, value in graph.initializers.items():
        if value.const_value is None:
            raise TpvcError(f"'{path}' has the initializer '{name:.60}' without numbers; export the model again")
        if isinstance(value.const_value, ir.ExternalTensor):
            _check_external(path, name, str(value.const_value.location))
        arrays[name] = value.const_value.numpy
    return File(path, arrays, blocks)


def _check_external(path: Path, name: str, location: str) -> None:
    """Numbers beside the graph lie in a file of its own folder."""
    if not is_inside(location) or not is_file(path.parent / location):
        raise TpvcError(f"'{path}' has '{name:.60}' in '{location:.60}'; expected a file beside it, export it again")


def _stacks(
    file: File, program: Program, integers: Callable[..., QTensor]
) -> Iterator[tuple[str, Callable[[], Value]]]:
    """Matrices and biases of queries, keys and values, which lie below each other in one."""
    from tpvc.compiler.backends.onnx.fusions import plan

    for attention, planned in plan(program).attention.items():
        name, projection = f"{attention}.qkv", planned.projection
        if projection is None or not (f"{name}.codes" in file or f"{name}.matrix" in file):
            continue
        sizes = [program.params[n.params["weight"]].shape[0] for n in projection.linears]
        order = None if projection.order is None else projection.order.argsort()
        yield from _stack(file, program, name, projection.linears, sizes, order, integers)


def _stack(
    file: File,
    program: Program,
    name: str,
    linears: Sequence[Node],
    sizes: list[int],
    order: torch.Tensor | None,
    integers: Callable[..., QTensor],
) -> Iterator[tuple[str, Callable[[], Value]]]:
    first = program.params[linears[0].params["weight"]]
    start = 0
    for node, size in zip(linears, sizes, strict=True):
        rows = torch.arange(start, start := start + size)
        rows = rows if order is None else order[rows]

        def matrix(rows: torch.Tensor = rows) -> Value:
            if f"{name}.matrix" in file:
                return _float(file.array(f"{name}.matrix").T)[rows]
            q = integers(name, grid_of(first), first.shape[1])
            zero = None if q.zero is None else q.zero[rows]
            return replace(q, codes=q.codes[rows], scale=q.scale[rows], zero=zero)

        yield node.params["weight"], matrix
        if "bias" in node.params:
            yield node.params["bias"], lambda rows=rows: _float(file.array(f"{name}.bias"))[rows]


def _per_row(file: File, name: str, grid: Grid | None) -> Grid:
    """A grid per tensor is stored as one per row."""
    if grid is None:
        raise TpvcError(f"'{file.path}' holds integers for '{name}', which is in float in the reference")
    return replace(grid, group=grid.group or -1)


def _integers(file: File, name: str, grid: Grid | None, columns: int) -> QTensor:
    """MatMulNBits has codes of three dimensions, DequantizeLinear of two."""
    codes, grid = file.array(f"{name}.codes"), _per_row(file, name, grid)
    return _packed(file, name, codes, grid, columns) if codes.ndim == 3 else _blocked(file, name, codes, grid)


def _packed(file: File, name: str, codes: np.ndarray, grid: Grid, columns: int) -> QTensor:
    from tpvc.compiler.backends.onnx.matmulnbits import Packed, layout_of, pack, unpack

    layout = layout_of(grid, columns)
    said, wanted = file.blocks.get(f"{name}.codes"), (layout.bits, layout.block)
    if said != wanted:
        found = f"'{file.path}' reads '{name}.codes' as (bits, block) {said}"
        raise TpvcError(f"{found}, expected {wanted} for {grid}; it was rounded differently, or damaged")
    zeros = file.array(f"{name}.zeros") if f"{name}.zeros" in file else None
    found = Packed(codes, file.array(f"{name}.scales"), zeros, layout)
    q = unpack(found, grid)
    again = pack(q)
    for part in ("codes", "scales", "zeros"):
        _check_equal(file, f"{name}.{part}", getattr(found, part), getattr(again, part))
    if f"{name}.codes.rows" in file:
        rows = file.array(f"{name}.codes.rows")
        _check_equal(file, f"{name}.codes.rows", rows.reshape(codes.shape), codes)
    return q


def _check_equal(file: File, name: str, found: np.ndarray | None, wanted: np.ndarray | None) -> None:
    """Repeated scales, filling and second views say what the numbers before them say."""
    if found is None or wanted is None:
        return _check_equal(file, name, *(np.array(a is not None) for a in (found, wanted)))
    wrong = np.argwhere(found != wanted)
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise TpvcError(
            f"'{file.path}' holds {found[at]} in '{name}' at {list(at)}, where {wanted[at]} is implied by the rest;"
            " export the model again"
        )
    return None


def _blocked(file: File, name: str, codes: np.ndarray, grid: Grid) -> QTensor:
    """DequantizeLinear: codes [K, N], signed around zero where there are no zero points; scales [N] or [blocks, N]. A
    symmetric grid may have its middle as zero point."""
    columns, rows = codes.shape
    groups = columns // grid.columns(columns)

    def by_group(part: str) -> torch.Tensor:
        stored = file.array(f"{name}.{part}")
        values = stored.astype(np.float32 if part == "scales" else np.int16).reshape(-1, rows).T
        if values.shape[1] % groups:
            found = f"'{file.path}' holds {values.shape[1]} {part} a row of '{name}'"
            raise TpvcError(f"{found}, expected {groups} for {grid}; it was rounded differently")
        values = values.reshape(rows, groups, -1)
        _check_equal(file, f"{name}.{part}", values, np.broadcast_to(values[..., :1], values.shape))
        return torch.from_numpy(values[..., 0].copy())

    middle = 1 << grid.bits - 1
    stored = not grid.symmetric or f"{name}.zeros" in file
    zero = by_group("zeros").to(torch.uint8) if stored else None
    if grid.symmetric and zero is not None:
        _check_equal(file, f"{name}.zeros", zero.numpy(), np.full(zero.shape, middle, np.uint8))
    shift = middle if zero is None else 0
    whole = torch.from_numpy(np.ascontiguousarray(codes.astype(np.int16).T) + shift)
    return QTensor(whole.to(torch.uint8), by_group("scales"), None if grid.symmetric else zero, grid)


def _table(file: File, name: str, grid: Grid | None) -> QTensor:
    """An embedding whose rows are gathered as bytes."""
    grid = _per_row(file, name, grid)
    codes, scale = (torch.from_numpy(file.array(f"{name}.rows.{part}").copy()) for part in ("codes", "scales"))
    zero = None if grid.symmetric else torch.from_numpy(file.array(f"{name}.rows.zeros").copy())
    return QTensor(codes, scale, zero, grid)


def _float(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def _less_one(file: File, name: str, program: Program) -> torch.Tensor:
    """Gemma's gain, stored as 1 + w; the sum is rounded once, so that w is compared after the same sum."""
    from tpvc.compiler.program import dense

    ours, stored = dense(program.params[name]), _float(file.array(f"{name}+1"))
    return torch.where(ours + 1 == stored, ours, stored - 1)

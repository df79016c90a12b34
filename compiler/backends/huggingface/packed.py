"""What GPTQ's and AWQ's checkpoints share: integers in the linears of the blocks, floats everywhere else.

Their readers know no integer embedding, and a quantised head is read by few; tables and heads are written rounded to
the model's dtype. Whatever else such a checkpoint cannot hold is refused, with the name of the layer, before a file is
written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tpvc.compiler.backends.huggingface.layout import (
    float_cache_note,
    float_dtype,
    float_piece,
    rounded_piece,
    stored_names,
)
from tpvc.compiler.backends.huggingface.stream import Piece
from tpvc.compiler.compressed_tensors_format import Entries
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import (
    Grid,
    Parameter,
    Program,
    QTensor,
    bank_params,
    grid_of,
    linears,
    read,
    rounded_cache,
    rounded_inputs,
)


@dataclass(frozen=True)
class Format:
    """name          for people
    fault         what it cannot hold of a shape and a grid, None where it can
    number_fault  likewise, of the numbers
    entries       its tensors of one linear by local name: (shape, grid, dtype of the scales) -> dtypes and shapes
    tensors       the tensors themselves: (name of the parameter, its integers, dtype of the scales)
    """

    name: str
    fault: Callable[[tuple[int, int], Grid], str | None]
    number_fault: Callable[[QTensor], str | None]
    entries: Callable[[tuple[int, int], Grid, torch.dtype], Entries]
    tensors: Callable[[str, QTensor, torch.dtype], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Parts:
    """config    config.json without `quantization_config`
    integers  {module: grid} of the packed linears
    kept      modules of linears in float
    notes     for the manifest
    """

    config: dict
    pieces: tuple[Piece, ...]
    integers: dict[str, Grid]
    kept: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def common(self) -> Grid:
        """The grid of most linears; the first of those that are as frequent."""
        return Counter(self.integers.values()).most_common(1)[0][0]


def parts(program: Program, format: Format) -> Parts:
    """The checkpoint of `program`, still unwritten. TpvcError for what the format cannot hold."""
    from tpvc.compiler.frontends.architecture import architecture

    config = {k: v for k, v in program.source.config.items() if k != "quantization_config"}
    drawn, beside, dtype = architecture(config), bank_params(program), float_dtype(config)
    stored = stored_names(drawn.aliases)
    integers = _integers(program, format)
    scales = {name: _scale_dtype(name, program.params[name], format) for name in integers}
    pieces, notes = [], []
    for name, parameter in program.params.items():
        if name in integers:
            pieces.append(_packed(name, parameter, integers[name], scales[name], format))
        elif name in beside:
            continue
        elif grid_of(parameter) is None:
            pieces.append(float_piece(stored.get(name, name), parameter, name in drawn.transposed))
        else:
            pieces.append(rounded_piece(stored.get(name, name), parameter, dtype))
            kind = str(dtype).removeprefix("torch.")
            notes.append(f"'{name}' is written in {kind}: {format.name} packs the linears of blocks alone")
    if wide := sorted({str(d).removeprefix("torch.") for d in scales.values()} - {"float16"}):
        notes.append(f"scales that float16 does not hold exactly are written in {', '.join(wide)}")
    if program.adapters:
        notes.append(f"readers of {format.name} serve the base model and pass over 'adapters'; fold one to serve it")
    if rounded_cache(program):
        notes.append(float_cache_note(f"a reader of {format.name}"))
    kept = sorted(n.name for n in linears(program.nodes) if n.params["weight"] not in integers)
    modules = {name.removesuffix(".weight"): grid for name, grid in integers.items()}
    return Parts(config, tuple(pieces), modules, tuple(kept), tuple(notes))


def _integers(program: Program, format: Format) -> dict[str, Grid]:
    """{weight: grid} of what is to be packed; one grid per tensor becomes one per row."""
    for name, kind in rounded_inputs(program).items():
        raise TpvcError(
            f"'{name}' reads rows rounded to {kind}, which {format.name} cannot hold; quantise without --activations"
        )
    tables = {n.params["weight"] for n in program.nodes if n.op == "embed"}
    blocks = {n.params["weight"] for n in linears(n for n in program.nodes if n.block is not None)} - tables
    grids = {name: grid for name in program.params if name in blocks and (grid := grid_of(program.params[name]))}
    if not grids:
        raise TpvcError(f"no linear of a block is an integer matrix that {format.name} could pack; quantise first")
    for name, grid in grids.items():
        if text := format.fault(tuple(program.params[name].shape), grid):
            raise TpvcError(f"'{name}' ({grid}) cannot be written as {format.name}: {text}")
    return {name: Grid(grid.bits, grid.group or -1, grid.symmetric) for name, grid in grids.items()}


def _scale_dtype(name: str, parameter: Parameter, format: Format) -> torch.dtype:
    """float16, which these formats have, where it holds the scales exactly, and else the artefact's own."""
    q = read(parameter)
    if text := format.number_fault(q):
        raise TpvcError(f"'{name}' ({q.grid}) cannot be written as {format.name}: {text}")
    return torch.float16 if torch.equal(q.scale.to(torch.float16).float(), q.scale) else q.scale_dtype


def _packed(name: str, parameter: Parameter, grid: Grid, scale_dtype: torch.dtype, format: Format) -> Piece:
    module = name.removesuffix("weight")
    own = format.entries(tuple(parameter.shape), grid, scale_dtype)

    def make() -> dict[str, torch.Tensor]:
        return {f"{module}{part}": t for part, t in format.tensors(name, read(parameter), scale_dtype).items()}

    return Piece({f"{module}{part}": entry for part, entry in own.items()}, make)

"""RoAd adapters beside a graph: tables of all of them, the input that chooses, and the files that name a choice.

`adapter_ids` is int64 [1] or [B] and may be left out: its default, which lies in the file, is [-1], the base model.
Every table has A + 1 blocks: block 0 is the identity, block i + 1 adapter i. So one graph serves the runtime that
switches by name (an `.onnx_adapter` file holds nothing but an id) and the one that mixes rows in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from tpvc.compiler.backends.onnx.graph import Graph
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import ADAPTERS
from tpvc.compiler.program import Node, Program, dense

INPUT = "adapter_ids"
SUFFIX = ".onnx_adapter"

Parts = Sequence[tuple[Node | None, int]]
"""Rotations side by side: (rotate node, outputs), the node None where nothing turns."""


def add_input(g: Graph) -> ir.Value:
    return g.default(INPUT, np.array([-1], np.int64), ("adapter_batch",))


def bank(program: Program, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """C and S of every block, float32 [A + 1, n]."""
    rows, width = len(program.adapters) + 1, sum(n for _, n in parts)
    cosine, sine = torch.ones(rows, width), torch.zeros(rows, width)
    start = 0
    for node, outputs in parts:
        own = slice(start, start := start + outputs)
        if node is None:
            continue
        tables = dense(program.params[node.params["cosine"]]), dense(program.params[node.params["sine"]])
        for block, row in enumerate(node.attrs["rows"], 1):
            if row >= 0:
                cosine[block, own], sine[block, own] = tables[0][row], tables[1][row]
    return cosine, sine


def write_files(program: Program, directory: Path) -> None:
    """`adapters/NAME.onnx_adapter` for every adapter."""
    if program.adapters:
        (directory / ADAPTERS).mkdir()
    for i, adapter in enumerate(program.adapters):
        write_file(directory / ADAPTERS / f"{adapter.name}{SUFFIX}", [i])


def write_file(path: Path, ids: Sequence[int]) -> None:
    """What ONNX Runtime and GenAI load as an adapter: `ids` to be fed, one for all rows or one for each."""
    import onnxruntime as ort

    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({INPUT: ort.OrtValue.ortvalue_from_numpy(np.array(ids, np.int64))})
    try:
        file.export_adapter(str(path))
    except RuntimeError as error:  # all that it says of a disk that is full or broken
        raise TpvcError(f"'{path}' cannot be written; see to the disk, then run the command again") from error

"""Bytes of what will be written, from shapes and grids: the weights of a folder, without tokenizer, JSON and reports.

Checkpoints and Triton packages are laid out by their own backends, on tensors without memory. An ONNX file is counted
here, tensor by tensor as `backends/onnx` writes them, since numpy has no tensors without memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch

from tpvc.compiler.backends import huggingface
from tpvc.compiler.backends.huggingface.layout import layout
from tpvc.compiler.backends.huggingface.stream import file_bytes
from tpvc.compiler.backends.onnx.graph import PAGE
from tpvc.compiler.backends.onnx.matmulnbits import layout_of
from tpvc.compiler.backends.onnx.standard import rope_key
from tpvc.compiler.backends.triton.model import model_of
from tpvc.compiler.backends.triton.steps import steps
from tpvc.compiler.plan.imagined import imagined
from tpvc.compiler.program import Node, Program, grid_of
from tpvc.kernels.slab import Slabs
from tpvc.passes.reorder import check_order


def checkpoint_bytes(program: Program, runtime: str = "transformers") -> int:
    """runtime: as of `huggingface.emit`. TpvcError for what the format cannot hold."""
    with imagined():
        packed = huggingface.PACKED.get(runtime)
        pieces = (packed(program) if packed else layout(program, runtime)).pieces
        return file_bytes(pieces)


def triton_bytes(program: Program, dtype: torch.dtype) -> int:
    """model.safetensors of a package, without its kernels. TpvcError for what the kernels cannot multiply."""
    check_order(program, "a Triton package")
    with imagined():
        model = model_of(replace(program, prompts=()), dtype)
        held = [v.tensors.values() if isinstance(v, Slabs) else [v] for v in model.params.values()]
        count = sum(t.numel() * t.itemsize for tensors in held for t in tensors)
    longest = max((p.tokens for p in program.prompts), default=0)
    layers = [s.attrs for s in steps(program) if s.op == "attend"]
    each = program.facts.head_dim * longest * dtype.itemsize * len(program.prompts)
    return count + sum(2 * attrs["kv_heads"] * each for attrs in layers)


def onnx_bytes(program: Program, portable: bool = False) -> int:
    """model.onnx.data, and that of the portable graph."""
    count = sum(map(_paged, _onnx_tensors(program, _nbits)))
    return count + (sum(map(_paged, _onnx_tensors(program, _dequantised))) if portable else 0)


def _paged(count: int) -> int:
    return -(-count // PAGE) * PAGE if count >= PAGE else -(-count // 64) * 64


def _onnx_tensors(program: Program, integers) -> Iterator[int]:
    """Bytes of every tensor, each once; `integers`: of a matrix on a grid."""
    seen = set()
    for node in program.nodes:
        for key, count in _of_node(program, node, integers):
            if key not in seen:
                seen.add(key)
                yield count


def _of_node(program: Program, node: Node, integers) -> Iterator[tuple[object, int]]:
    if node.op == "rope":
        key = rope_key(node.attrs)
        for part in ("cos", "sin"):
            yield (part, key), 4 * program.facts.context_length * len(node.attrs["inv_freq"])
    if node.op == "reorder":
        yield node.attrs["order"], 8 * len(node.attrs["order"])
    if node.op == "rotate":
        rows, width = len(program.adapters) + 1, program.params[node.params["cosine"]].shape[1]
        for part in ("cosine", "sine"):
            yield node.params[part], 4 * rows * width
        return
    for name in node.params.values():
        parameter, grid = program.params[name], grid_of(program.params[name])
        if grid is None:
            yield name, 4 * prod(parameter.shape)
        elif node.op == "embed" and integers is _dequantised:  # rows of a table are gathered as bytes
            rows, columns = parameter.shape
            scales = rows * (columns // grid.columns(columns))
            yield (name, "codes"), rows * columns
            yield (name, "scales"), 4 * scales
            if not grid.symmetric:
                yield (name, "zeros"), scales
        else:
            for part, count in enumerate(integers(tuple(parameter.shape), grid)):
                yield (name, part), count


def _nbits(shape, grid) -> list[int]:
    """Codes, scales and zero points of MatMulNBits."""
    rows, layout = shape[0], layout_of(grid, shape[1])
    codes = rows * layout.blocks * (layout.block * layout.bits // 8)
    zeros = [] if grid.symmetric else [rows * -(-layout.blocks * layout.bits // 8)]
    return [codes, 4 * rows * layout.blocks, *zeros]


def _dequantised(shape, grid) -> list[int]:
    """Likewise, of DequantizeLinear."""
    bits, layout = 4 if grid.bits <= 4 else 8, layout_of(grid, shape[1])
    block = layout.group if layout.spreads else layout.block
    scales = shape[0] * (1 if layout.runs == 1 else layout.runs * layout.group // block)
    zeros = [] if grid.symmetric else [-(-scales * bits // 8)]
    return [-(-prod(shape) * bits // 8), 4 * scales, *zeros]

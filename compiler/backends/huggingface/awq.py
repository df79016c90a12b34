"""A Program as an AWQ checkpoint: the tensors of `awq_format`, and the config that transformers, vLLM and SGLang read.

Zero points are written for symmetric weights too, as 8, and the config says that there are some: that is what every
reader of the layout "gemm" loads.
"""

from __future__ import annotations

from tpvc.compiler import awq_format
from tpvc.compiler.backends.huggingface.layout import Layout
from tpvc.compiler.backends.huggingface.packed import Format, parts
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, Program
from tpvc.passes.reorder import check_order


def layout(program: Program) -> Layout:
    """TpvcError for what the format cannot hold: other widths than 4 bits, or different groups."""
    check_order(program, "AWQ")
    found = parts(program, FORMAT)
    group = found.common.group
    for module, grid in found.integers.items():
        if grid.group != group:
            raise TpvcError(
                f"'{module}' ({grid}) cannot be written as AWQ: most linears are {found.common}, and it has one group"
                " size for all; take --to vllm or gptq"
            )
    quantization = {
        "quant_method": "awq",
        "bits": awq_format.BITS,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(found.kept) or None,
    }
    return Layout(found.pieces, {**found.config, "quantization_config": quantization}, found.notes)


def _fault(shape: tuple[int, int], grid: Grid) -> str | None:
    if grid.bits != awq_format.BITS:
        return f"it packs {awq_format.BITS} bits; take another width, or --to vllm"
    return None if shape[0] % 8 == 0 else f"it packs rows by eight, found {shape[0]}; take --to vllm"


FORMAT = Format(
    "AWQ",
    _fault,
    lambda q: None,
    lambda shape, grid, dtype: awq_format.entries(shape, grid.columns(shape[1]), dtype),
    lambda name, q, dtype: awq_format.to_tensors(q, dtype),
)

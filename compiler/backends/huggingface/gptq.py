"""A Program as a GPTQ checkpoint: the tensors of `gptq_format`, and the config that GPTQModel, transformers and vLLM
read.

Linears on another grid than most stand in `dynamic`, which GPTQModel and vLLM honour; vLLM asks for queries, keys and
values by one name, and for gate and up, so that these stand there as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import tpvc
from tpvc.compiler import gptq_format
from tpvc.compiler.backends.huggingface.layout import Layout
from tpvc.compiler.backends.huggingface.packed import Format, parts
from tpvc.compiler.frontends.gptq import CHANGED, SKIPPED
from tpvc.compiler.program import Grid, Program, QTensor
from tpvc.passes.reorder import orders

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM makes one matrix of (`packed_modules_mapping` of its models), by the name that it asks `dynamic` for."""


def layout(program: Program, version: int) -> Layout:
    """version: 1 or 2, see `gptq_format`. TpvcError for what the format cannot hold."""
    order = orders(program)
    format = Format(
        f"GPTQ version {version}",
        _fault,
        lambda q: _zero_fault(q, version),
        lambda shape, grid, dtype: gptq_format.entries(shape, grid.bits, grid.columns(shape[1]), dtype),
        lambda name, q, dtype: gptq_format.to_tensors(q, version, dtype, order.get(name)),
    )
    found = parts(program, format)
    common = found.common
    changed = {m: grid for m, grid in found.integers.items() if grid != common}
    kept = dict.fromkeys(m for m in found.kept if m != "lm_head")
    exceptions = {f"{CHANGED}^{re.escape(m)}$": _fields(grid) for m, grid in _with_fused(changed).items()}
    exceptions |= {f"{SKIPPED}^{re.escape(m)}$": {} for m in _with_fused(kept)}
    quantization = {
        "quant_method": "gptq",
        "checkpoint_format": next(name for name, v in gptq_format.VERSIONS.items() if v == version),
        **_fields(common),
        "desc_act": bool(order),
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"tpvc:{tpvc.__version__}"]},
    }
    if exceptions:
        quantization["dynamic"] = exceptions
    return Layout(found.pieces, {**found.config, "quantization_config": quantization}, found.notes)


def _with_fused(modules: Mapping[str, Grid | None]) -> dict[str, Grid | None]:
    """`modules`, and what vLLM makes of those that are alike."""
    joined = {}
    for module in modules:
        parent, dot, last = module.rpartition(".")
        for name, members in FUSED.items():
            own = [parent + dot + part for part in members]
            if last == members[0] and all(m in modules and modules[m] == modules[module] for m in own):
                joined[parent + dot + name] = modules[module]
    return {**modules, **joined}


def _fields(grid: Grid) -> dict:
    return {"bits": grid.bits, "group_size": grid.group, "sym": grid.symmetric}


def _fault(shape: tuple[int, int], grid: Grid) -> str | None:
    if grid.bits not in gptq_format.BITS:
        return f"it packs {', '.join(map(str, gptq_format.BITS))} bits; take another width, or --to vllm"
    if shape[0] % 32 or shape[1] % 32:
        return f"its readers want rows and columns in multiples of 32, found {shape[0]}x{shape[1]}; take --to vllm"
    return None


def _zero_fault(q: QTensor, version: int) -> str | None:
    if version == 2 or q.zero is None or q.zero.all():
        return None
    row, group = (q.zero == 0).nonzero()[0].tolist()
    return (
        f"the zero point of row {row}, group {group} is 0, which version 1 stores as -1 and readers take for something"
        " else; take --to gptq_v2, awq or vllm"
    )

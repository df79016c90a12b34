"""What a Program becomes in a Hugging Face checkpoint: which tensors, which `quantization_config`. Writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tpvc.compiler.backends.huggingface.stream import Piece
from tpvc.compiler.compressed_tensors_format import Form, cache_scheme, entries, quantization_config, to_tensors
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import (
    Parameter,
    Program,
    bank_params,
    grid_of,
    input_grids,
    linears,
    read,
    rounded_cache,
    rounded_inputs,
    scale_dtype_of,
)
from tpvc.passes.reorder import check_order

RUNTIMES = ("transformers", "vllm")
HEAD = "lm_head"
"""The head's module, under this name in every family that transformers 5 knows."""
FLOAT_HEAD = ("gemma2", "opt", "gpt_neox")
"""Families whose head vLLM has in float alone: it stays tied there, or has no integer form."""


@dataclass(frozen=True)
class Layout:
    """pieces: the tensors; config: config.json; notes: what a reader of the artefact has to know, in sentences."""

    pieces: tuple[Piece, ...]
    config: dict
    notes: tuple[str, ...]


def layout(program: Program, runtime: str = "transformers") -> Layout:
    """The checkpoint of `program` for a runtime; TpvcError for an unknown one."""
    from tpvc.compiler.frontends.architecture import architecture

    if runtime not in RUNTIMES:
        raise TpvcError(f"runtime is '{runtime}', expected one of {', '.join(RUNTIMES)}")
    check_order(program, "compressed-tensors")
    config = {k: v for k, v in program.source.config.items() if k != "quantization_config"}
    drawn = architecture(config)
    transposed, stored = drawn.transposed, stored_names(drawn.aliases)
    float_head = runtime == "vllm" and config["model_type"] in FLOAT_HEAD
    readers: dict[str, set[str]] = {}
    for node in program.nodes:
        for name in node.params.values():
            readers.setdefault(name, set()).add(node.op)

    pieces, modules, notes = [], {}, []
    beside, rounded, inputs = bank_params(program), rounded_inputs(program), input_grids(program)
    for name, param in program.params.items():
        if name in beside:
            continue
        module, grid = name.removesuffix(".weight"), grid_of(param)
        embeds, tied = "embed" in readers.get(name, ()), {"embed", "linear"} <= readers.get(name, set())
        rows = rounded.get(name)
        packed = not embeds and (rows in (None, "fp8") or (grid is not None and grid.bits < 8))
        form = Form(packed, runtime == "vllm" and packed, rows, inputs.get(name))
        if rows is not None and (grid is None or embeds):
            what = "is in float" if grid is None else "is also an embedding"
            raise TpvcError(
                f"'{name}' {what} and reads rows rounded to {rows}, which compressed-tensors has no form for; round the"
                " linears of the blocks alone, weights and activations"
            )
        if grid is None:
            pieces.append(float_piece(stored.get(name, name), param, name in transposed))
        elif runtime == "vllm" and (embeds or (module == HEAD and float_head)):
            dtype = float_dtype(config)
            pieces.append(rounded_piece(stored.get(name, name), param, dtype))
            what, kind = "table" if embeds else "head", str(dtype).removeprefix("torch.")
            notes.append(f"'{name}' is an integer {what}, which vLLM does not read: written in {kind}")
            if tied and not float_head:
                form, config["tie_word_embeddings"] = Form(packed_zeros=True), False
                pieces.append(_integers([HEAD], param, form))
                modules[HEAD] = (grid, param.shape[1], form)
        else:
            owners = [module, HEAD] if tied else [module]
            pieces.append(_integers(owners, param, form))
            modules |= {owner: (grid, param.shape[1], form) for owner in owners}

    if program.adapters and runtime == "vllm":
        notes.append("vLLM serves the base model and does not read the adapters in 'adapters'; fold one to serve it")
    if modules:
        conv = sorted(module for module in modules if f"{module}.weight" in transposed)
        if conv:
            notes.append(f"{len(conv)} Conv1D layers are stored as integers: only tpvc reads this, not transformers")
        float_linears = {n.params["weight"] for n in linears(program.nodes)}
        ignore = {_module(name, readers[name]) for name in float_linears if not grid_of(program.params[name])}
        if float_head:  # by the name that it has there
            ignore = ignore - {HEAD} | {stored.get(f"{HEAD}.weight", HEAD).removesuffix(".weight")}
        cache = None
        if rounded_cache(program) and runtime == "vllm":
            notes.append(float_cache_note("vLLM, which reads scales for a whole layer alone,"))
        elif rounded_cache(program):
            cache = cache_scheme(program.facts.head_dim)
            config.setdefault("num_key_value_heads", program.facts.kv_heads)  # compressed-tensors asks for it
        config["quantization_config"] = quantization_config(modules, ignore, conv, cache)
    return Layout(tuple(pieces), config, tuple(notes))


def stored_names(aliases: Mapping[str, str]) -> dict[str, str]:
    """{name of a float parameter: the name under which transformers and vLLM store it}, where they differ; of an
    architecture's aliases."""
    return {own: theirs for theirs, own in aliases.items()}


def float_cache_note(runtime: str) -> str:
    """What a reader has to know of a model with a rounded cache, exported for a runtime that has none."""
    return f"{runtime} keeps keys and values in float, not in int8 as the model was quantised for"


def _module(name: str, readers: set[str]) -> str:
    return HEAD if "embed" in readers else name.removesuffix(".weight")


def float_piece(name: str, param: Parameter, transposed: bool) -> Piece:
    """A float parameter as it is; `transposed` where the checkpoint stores it [in, out]."""
    shape, dtype = tuple(param.shape), param.dtype

    def make() -> dict[str, torch.Tensor]:
        value = read(param)
        return {name: value.T if transposed else value}

    return Piece({name: (dtype, shape[::-1] if transposed else shape)}, make)


def rounded_piece(name: str, param: Parameter, dtype: torch.dtype) -> Piece:
    """What the integers of a parameter mean, rounded once to `dtype`."""
    return Piece({name: (dtype, tuple(param.shape))}, lambda: {name: read(param).dequantize().to(dtype)})


def _integers(owners: Iterable[str], param: Parameter, form: Form) -> Piece:
    """The tensors of a module; another one tied to it repeats all but the matrix."""
    first, *others = owners
    local = entries(tuple(param.shape), grid_of(param), scale_dtype_of(param), form)
    small = [n for n in local if n in ("weight_scale", "weight_zero_point")]
    names = {f"{first}.{n}": n for n in local} | {f"{o}.{n}": n for o in others for n in small}

    def make() -> dict[str, torch.Tensor]:
        tensors = to_tensors(read(param), form)
        return {name: tensors[n] for name, n in names.items()}

    return Piece({name: local[n] for name, n in names.items()}, make)


def float_dtype(config: dict) -> torch.dtype:
    """The dtype of a model's float weights, by its config.json."""
    name = config.get("dtype") or config.get("torch_dtype")
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name, torch.float32)

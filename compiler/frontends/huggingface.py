"""A Hugging Face checkpoint directory -> Program: config.json, safetensors, tied heads, integer weights. All lazy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tpvc.compiler.compressed_tensors_format import ACTIVATIONS, INPUT_PARTS
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import integer_weights, packed_weights
from tpvc.compiler.frontends.architecture import Architecture, architecture
from tpvc.compiler.frontends.fields import token_ids
from tpvc.compiler.frontends.integer_weights import PARTS, STATIC, Quantization, Scheme, input_grid, quantization
from tpvc.compiler.frontends.packed_weights import Packed, Packing
from tpvc.compiler.frontends.weights import FLOATS, Stored, read_json, same, tensors
from tpvc.compiler.program import Facts, Lazy, Program, Source

BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
"""Tensors of old checkpoints that follow from the config: rotary frequencies, causal masks of GPT-2 and GPT-NeoX."""

HEAD = "lm_head.weight"


def load(directory: Path, name: str) -> Program:
    """The model in `directory`; `name` is what the user typed. Reads headers, but no weight."""
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise TpvcError(
            f"{directory} is an adapter; expected its base model, beside which --adapter, --road, --task or --prompt"
            " put it"
        )
    if (directory / "portable" / "model.onnx").is_file() and not (directory / "config.json").is_file():
        raise TpvcError(
            f"{directory} holds a portable graph alone, which is for other runtimes; `tpvc verify` reads it, everything"
            " else the checkpoint it was made from"
        )
    if not (directory / "config.json").is_file():
        raise TpvcError(f"{directory} has no config.json; expected the directory of a Hugging Face checkpoint")
    config = read_json(directory / "config.json")
    drawn = architecture(config)
    scheme = quantization(_with_settings(config, directory))
    found = tensors(directory)
    parts = _by_parameter(found, drawn, directory)
    params = {n: _parameter(n, parts.get(n, {}), drawn, scheme, directory) for n in drawn.shapes}
    facts = _with_generation(drawn.facts, directory)
    weights = tuple(sorted({t.path for t in found.values()}))
    program = Program(drawn.nodes, params, facts, Source(name, directory, config, weights))
    schemes = {n: _scheme(n, parts[n], drawn, scheme) for n in params}
    program = _with_rounded_inputs(_in_order(program, parts, schemes), schemes, parts)
    return _with_rounded_cache(program, scheme, directory)


def _in_order(program: Program, parts: Mapping[str, dict], schemes: Mapping[str, Scheme | Packed | None]) -> Program:
    """What linears read is put into the order of their columns where the checkpoint reordered those."""
    from tpvc.passes.reorder import Reorder

    own = {n: s for n, s in schemes.items() if isinstance(s, Packed)}
    found = {n: packed_weights.order_of(n, parts[n], program.params[n].shape[1], s) for n, s in own.items()}
    orders = {name: order for name, order in found.items() if order is not None}
    for name in (n.params["weight"] for n in program.nodes if n.op == "embed" and n.params["weight"] in orders):
        raise TpvcError(f"'{name}' is an embedding with columns in groups by activation order, which is not supported")
    return Reorder(orders)(program) if orders else program


SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files that held the `quantization_config` before config.json did -> quant_method."""


def _with_settings(config: dict, directory: Path) -> dict:
    """The config, with the `quantization_config` of a file beside it where it has none."""
    if config.get("quantization_config") or config.get("compression_config"):
        return config
    for file, method in SETTINGS.items():
        if (directory / file).is_file():
            return config | {"quantization_config": {"quant_method": method} | read_json(directory / file)}
    return config


def _with_rounded_inputs(
    program: Program, schemes: Mapping[str, Scheme | Packed | None], parts: Mapping[str, dict]
) -> Program:
    """What linears read is rounded where the checkpoint says so."""
    from tpvc.passes.round_activations import RoundActivations

    for kind in ACTIVATIONS:
        named = frozenset(name for name, scheme in schemes.items() if scheme is not None and scheme.activations == kind)
        grids = {name: input_grid(name, parts[name], schemes[name]) for name in named} if kind == STATIC else None
        program = RoundActivations(kind, named, grids)(program) if named else program
    return program


def _with_rounded_cache(program: Program, scheme: Quantization | Packing | None, directory: Path) -> Program:
    """Keys and values are rounded where the checkpoint says so."""
    from tpvc.passes.round_cache import RoundCache

    size, width = getattr(scheme, "cache", None), program.facts.head_dim
    if size not in (None, width):
        raise TpvcError(
            f"{directory} keeps keys and values in groups of {size} features; expected whole heads of {width}"
        )
    return program if size is None else RoundCache()(program)


def _by_parameter(found: Mapping[str, Stored], drawn: Architecture, directory: Path) -> dict[str, dict[str, Stored]]:
    """{parameter: {part: tensor}}; the part of a float tensor is "". Every tensor is used, known or refused."""
    parts: dict[str, dict[str, Stored]] = {}
    head: dict[str, Stored] = {}
    unknown = []
    for key, stored in found.items():
        base, part = _split(key)
        known = _canonical(base, drawn)
        if known is not None:
            home = parts.setdefault(known, {})
        elif drawn.aliases.get(base, base) == HEAD and HEAD not in drawn.shapes:
            home = head
        elif BUFFERS.search(key) or _idle_bias(key, found):
            continue
        else:
            unknown.append(key)
            continue
        if part in home:
            raise TpvcError(f"{directory} holds both '{home[part].name}' and '{key}'; expected one of them")
        home[part] = stored
    if unknown:
        raise TpvcError(
            f"{directory} holds {len(unknown)} tensors that a '{drawn.facts.family}' model with this config does not"
            f" have, first '{min(unknown)}'; check model_type and the bias and tying fields of config.json"
        )
    if head:
        _tie(parts, head, drawn, directory)
    return parts


def _split(key: str) -> tuple[str, str]:
    """("m.weight", "packed") of "m.weight_packed"; ("m.weight", "scales") of "m.scales"; ("m.weight", "") of itself."""
    module, _, last = key.rpartition(".")
    if last in packed_weights.PARTS or last in INPUT_PARTS:
        return f"{module}.weight", last
    for part in PARTS:
        if key.endswith(f".weight_{part}"):
            return key.removesuffix(f"_{part}"), part
    return key, ""


def _idle_bias(key: str, found: Mapping[str, Stored]) -> bool:
    """A bias of zeros beside packed codes: AutoGPTQ stored one for linears that have none."""
    return f"{key.removesuffix('.bias')}.qweight" in found and key.endswith(".bias") and not found[key].read().any()


def _canonical(base: str, drawn: Architecture) -> str | None:
    for candidate in (base, drawn.prefix + base, drawn.aliases.get(base)):
        if candidate in drawn.shapes:
            return candidate
    return None


def _tie(parts: dict, head: dict[str, Stored], drawn: Architecture, directory: Path) -> None:
    """A tied checkpoint that also holds the head, or its scales: equal to the embedding's, or standing in for it."""
    table = next(n.params["weight"] for n in drawn.nodes if n.name == "lm_head")
    home = parts.setdefault(table, {})
    if not home:
        home |= head
    elif not all(part in home and same(home[part], stored) for part, stored in head.items()):
        raise TpvcError(
            f"the config in {directory} ties the head to '{table}', but '{HEAD}' is stored too and differs from it;"
            " set tie_word_embeddings to false if the head is its own"
        )


def _parameter(
    name: str, parts: dict[str, Stored], drawn: Architecture, scheme: Quantization | Packing | None, directory: Path
) -> Lazy:
    shape = drawn.shapes[name]
    if not parts:
        hint = "; if the head is tied, set tie_word_embeddings to true" if name == HEAD else ""
        raise TpvcError(f"{directory} lacks the tensor '{name}' {list(shape)} that its config asks for{hint}")
    own = _scheme(name, parts, drawn, scheme)
    if set(parts) != {""} or (own is not None and parts[""].dtype == "I8"):
        if own is None:
            raise TpvcError(f"'{name}' is stored as integers, but quantization_config has no config group for it")
        return (packed_weights if isinstance(own, Packed) else integer_weights).parameter(name, parts, shape, own)
    if own is not None:
        grid = own.grid(shape[1])
        raise TpvcError(f"'{name}' is stored in float, but quantization_config says {grid}; list it in 'ignore'")
    return _float(parts[""], shape, name in drawn.transposed)


def _scheme(
    name: str, parts: dict[str, Stored], drawn: Architecture, scheme: Quantization | Packing | None
) -> Scheme | Packed | None:
    """The config group of a matrix, None where there is none."""
    if scheme is None or len(drawn.shapes[name]) != 2:
        return None
    stored = _split(next(iter(parts.values())).name)[0]
    names = [stored, HEAD] if drawn.aliases.get(stored, stored) == HEAD else [stored, name]
    names = [n.removesuffix(".weight") for n in names]
    if isinstance(scheme, Packing):
        return scheme.scheme(names) if set(parts) & set(packed_weights.PARTS) else None
    return scheme.scheme(names, _class(name, stored, drawn))


def _class(name: str, stored: str, drawn: Architecture) -> str:
    """The class name that config groups use for the module of a matrix."""
    if name in drawn.transposed:
        return "Conv1D"
    own = [n.op for n in drawn.nodes if name in n.params.values()]
    return "Embedding" if "embed" in own and drawn.aliases.get(stored, stored) != HEAD else "Linear"


def _float(stored: Stored, shape: tuple[int, ...], transposed: bool) -> Lazy:
    if stored.dtype not in FLOATS:
        raise TpvcError(f"tensor '{stored.name}' in {stored.path} is {stored.dtype}; expected {', '.join(FLOATS)}")
    in_file = shape[::-1] if transposed else shape
    if stored.shape != in_file:
        raise TpvcError(
            f"tensor '{stored.name}' in {stored.path} has shape {list(stored.shape)};"
            f" its config asks for {list(in_file)}"
        )

    def read() -> torch.Tensor:
        return stored.read().t().contiguous() if transposed else stored.read()

    return Lazy(shape, FLOATS[stored.dtype], read)


def _with_generation(facts: Facts, directory: Path) -> Facts:
    """Chat models list further end tokens in generation_config.json."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return facts
    given = read_json(path)
    first = {n: next(iter(token_ids(given, f"{n}_token_id")), None) for n in ("bos", "pad")}
    return replace(
        facts,
        eos=tuple(dict.fromkeys((*token_ids(given, "eos_token_id"), *facts.eos))),
        bos=first["bos"] if facts.bos is None else facts.bos,
        pad=first["pad"] if facts.pad is None else facts.pad,
    )

"""Reading compressed-tensors checkpoints: which modules are integers and on which grid, from `quantization_config`.

The tensors are those of `compressed_tensors_format`: the formats "pack-quantized" and "int-quantized"; strategies
tensor, channel, group, and block with blocks of one row (groups by another name); zero points packed or not.
Activations are in float, rounded to 8 bits per token while the model runs, or in int8 on one stored grid for a module,
with a zero point or without; keys and values in float, or in int8 with a scale for every head's vector. Whatever else a
`quantization_config` can say (transforms, sparsity, reordered columns) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpvc.compiler.compressed_tensors_format import ACTIVATIONS, INPUT_PARTS, METHODS, cache_scheme, from_tensors
from tpvc.compiler.errors import TpvcError, short
from tpvc.compiler.frontends import autoround, awq, gptq, patterns
from tpvc.compiler.frontends.fields import Config
from tpvc.compiler.frontends.packed_weights import Packing
from tpvc.compiler.frontends.weights import FLOATS, Stored
from tpvc.compiler.packing import words
from tpvc.compiler.program import Grid, Lazy, QTensor

FORMATS = {"pack-quantized": ("packed", "scale", "shape"), "int-quantized": ("", "scale")}
"""Format -> parts of a symmetric module: suffixes of `weight_`; "" is `weight` itself."""

STATIC = "int8-static"
INTACT = "use an intact copy of the checkpoint"

PARTS = ("packed", "scale", "zero_point", "shape", "g_idx")
"""Suffixes of `weight_` that a file may hold."""

PACKINGS = {"gptq": gptq.packing, "awq": awq.packing} | dict.fromkeys(autoround.METHODS, autoround.packing)
"""`quant_method` -> the reader of a config whose tensors are not compressed-tensors'."""


@dataclass(frozen=True)
class Scheme:
    """One config group. `size`: columns that share a scale, None for a row ("channel") or the whole ("tensor");
    `activations`: a key of `ACTIVATIONS`, or None for those in float; `input_zero`: whether a static grid of theirs has
    a zero point of its own."""

    format: str
    bits: int
    symmetric: bool
    strategy: str
    size: int | None
    activations: str | None = None
    input_zero: bool = False

    def grid(self, columns: int) -> Grid:
        if self.strategy == "tensor":
            return Grid(self.bits, 0, self.symmetric)
        per_row = self.strategy == "channel" or (self.strategy == "block" and self.size == columns)
        return Grid(self.bits, -1 if per_row else self.size, self.symmetric)


@dataclass(frozen=True)
class Quantization:
    """Which modules are integers: `groups` pairs targets with a scheme; `ignore` wins. `cache`: features of keys and of
    values that share a scale of an int8 cache, None where both stay in float."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]
    cache: int | None = None

    def scheme(self, names: Sequence[str], kind: str) -> Scheme | None:
        """The scheme of a module known by `names` and of class `kind`; None: it stays in float.

        A name beats a regular expression, which beats a class.
        """
        if any(_names(t, names) or t == kind for t in self.ignore):
            return None
        tests = (
            lambda t: t in names,
            lambda t: t.startswith("re:") and _names(t, names),
            lambda t: t == kind,
        )
        for test in tests:
            for targets, scheme in self.groups:
                if any(test(t) for t in targets):
                    return scheme
        return None


def _names(target: str, names: Sequence[str]) -> bool:
    """Whether a target ("re:" starts a regular expression matched from the left) means one of `names`."""
    if target.startswith("re:"):
        return any(re.match(target[3:], n) for n in names)
    return target in names


def quantization(config: Config) -> Quantization | Packing | None:
    """What `quantization_config` says, None where there is none; TpvcError for what this reader cannot do exactly."""
    given = config.get("quantization_config") or config.get("compression_config")
    if not given:
        return None
    try:
        return _quantization(given)
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise TpvcError(f"quantization_config cannot be understood ({error}); use an intact config.json") from error


def _quantization(given: Mapping[str, Any]) -> Quantization | Packing:
    method = given.get("quant_method")
    if method in PACKINGS:
        return PACKINGS[method](given)
    if method not in METHODS:
        raise TpvcError(
            f"the checkpoint is quantised with quant_method = {short(method)}; supported: '{METHODS[0]}' with the"
            f" formats {', '.join(FORMATS)}, and {', '.join(PACKINGS)}, so start from the float checkpoint"
        )
    _check(not (given.get("transform_config") or {}).get("config_groups"), "has a transform_config")
    sparsity = (given.get("sparsity_config") or {}).get("format", "dense")
    _check(sparsity == "dense", f"has sparse weights ({sparsity})")
    status = given.get("quantization_status", "compressed")
    _check(status == "compressed", f"has quantization_status {short(status)}")
    groups = []
    for name, group in (given.get("config_groups") or {}).items():
        _check(not group.get("output_activations"), "quantises what linears yield")
        scheme = _scheme(name, group.get("format") or given.get("format"), group.get("weights") or {})
        rows, zero = _activations(name, group.get("input_activations"))
        groups.append((_targets(group.get("targets")), replace(scheme, activations=rows, input_zero=zero)))
    _check(bool(groups), "has no config_groups")
    found = Quantization(tuple(groups), _targets(given.get("ignore")), _cache(given.get("kv_cache_scheme")))
    every = [t for targets, _ in groups for t in targets] + list(found.ignore)
    patterns.compiled(t[3:] for t in every if t.startswith("re:"))
    return found


def _targets(given: Any) -> tuple[str, ...]:
    """Names, classes and regular expressions; TypeError for anything else."""
    if not isinstance(given or [], list) or not all(isinstance(t, str) for t in given or ()):
        raise TypeError(f"{short(given)} is not a list of names")
    return tuple(given or ())


def _check(fact: bool, text: str) -> None:
    if not fact:
        raise TpvcError(
            f"the checkpoint's quantization_config {text}, which is not supported; supported: integer weights in the"
            f" formats {', '.join(FORMATS)}, activations in float, rounded to 8 bits per token while the model runs or"
            " in int8 per tensor, a key/value cache in float or in int8 with a scale for every head of a token"
        )


def _scheme(name: str, form: Any, weights: Mapping[str, Any]) -> Scheme:
    bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    _check(form in FORMATS, f"has the format {short(form)} in {name}")
    _check(weights.get("type", "int") == "int", f"has weights of type {short(weights.get('type'))} in {name}")
    _check(isinstance(bits, int) and 2 <= bits <= 8, f"has {short(bits)}-bit weights in {name}")
    _check(not weights.get("dynamic"), f"quantises weights when the model runs in {name}")
    _check(weights.get("actorder") in (None, "weight", "static", False), f"reorders columns (actorder) in {name}")
    if strategy is None:
        strategy = "tensor" if size is None else "group" if size > 0 else "channel"
    _check(strategy in ("tensor", "channel", "group", "block"), f"has the strategy {short(strategy)} in {name}")
    if strategy == "block":
        rows, size = weights.get("block_structure") or (None, None)
        _check(rows == 1, f"has blocks of {short(rows)} rows in {name}")
    if strategy in ("group", "block"):
        _check(isinstance(size, int) and size > 0, f"has groups of {short(size)} columns in {name}")
    return Scheme(form, bits, bool(weights.get("symmetric", True)), strategy, size)


DEFAULTS = {"num_bits": 8, "symmetric": True, "dynamic": False, "type": "int", "strategy": None}
"""What compressed-tensors takes for a key that is missing."""


def _activations(name: str, given: Mapping[str, Any] | None) -> tuple[str | None, bool]:
    """(how a group rounds what its modules read, whether on a grid with a zero point); a missing key has
    compressed-tensors' default."""
    if not given:
        return None, False
    said = DEFAULTS | dict(given)
    if said["strategy"] is None and not said.get("group_size"):
        said["strategy"] = "tensor"
    for kind, own in ACTIVATIONS.items():
        loose = kind == STATIC and isinstance(said["symmetric"], bool)
        if all(said[key] == value for key, value in own.items() if not (loose and key == "symmetric")):
            return kind, kind == STATIC and not said["symmetric"]
    _check(False, f"rounds activations in {name} with {_listed(said)}")


def _listed(said: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {said[key]}" for key in ("num_bits", "type", "symmetric", "strategy", "dynamic"))


def _cache(given: Mapping[str, Any] | None) -> int | None:
    """`Quantization.cache` of a `kv_cache_scheme`."""
    if given is None:
        return None
    said = DEFAULTS | {"group_size": None} | dict(given)
    size = said["group_size"]
    ours = isinstance(size, int) and all(said[key] == value for key, value in cache_scheme(size).items())
    _check(ours, f"keeps the key/value cache with {_listed(said)}")
    return size


def input_grid(name: str, parts: Mapping[str, Stored], scheme: Scheme) -> tuple[float, int]:
    """(scale, zero point) of what the linear of the matrix `name` reads. Reads these two numbers."""
    expected = INPUT_PARTS if scheme.input_zero or INPUT_PARTS[1] in parts else INPUT_PARTS[:1]
    for part, dtypes in zip(expected, (FLOATS, ("I8",)), strict=False):
        if part not in parts:
            raise TpvcError(f"'{name}' is to read activations in int8 per tensor, but lacks '{part}'; {INTACT}")
        if parts[part].dtype not in dtypes or parts[part].shape not in ((), (1,)):
            found = f"{parts[part].dtype} {list(parts[part].shape)}"
            raise TpvcError(f"tensor '{parts[part].name}' is {found}; expected one number of {', '.join(dtypes)}")
    scale, zero = (parts[part].read().item() if part in expected else 0 for part in INPUT_PARTS)
    if not scale > 0 or (zero and not scheme.input_zero):
        raise TpvcError(f"'{name}' reads activations with the scale {scale:g} and zero point {zero}; {INTACT}")
    return scale, zero


def parameter(name: str, parts: Mapping[str, Stored], shape: tuple[int, ...], scheme: Scheme) -> Lazy:
    """The integer parameter `name` of `shape` [N, K] from its parts in the file; headers are checked now."""
    rows, columns = shape
    grid = scheme.grid(columns)
    size = grid.columns(columns)
    if columns % size:
        raise TpvcError(f"'{name}' has {columns} columns in groups of {size}; expected a whole number of groups")
    expected = FORMATS[scheme.format] + (() if grid.symmetric else ("zero_point",))
    if set(parts) - set(INPUT_PARTS if scheme.activations == STATIC else ()) != set(expected):
        raise TpvcError(f"'{name}' ({scheme.format}, {grid}) is stored as {_keys(parts)}; expected {_keys(expected)}")
    scales = [(1,), (1, 1)] if grid.group == 0 else [(rows, columns // size)]
    allowed = {
        "": [("I8", (rows, columns))],
        "packed": [("I32", (rows, words(columns, grid.bits)))],
        "scale": [(dtype, s) for dtype in FLOATS for s in scales],
        "shape": [("I64", (2,)), ("I32", (2,))],
        "zero_point": [("I8", s) for s in scales],
    }
    if grid.group != 0 and scheme.format == "pack-quantized":
        allowed["zero_point"].append(("I32", (words(rows, grid.bits), columns // size)))
    for part in expected:
        stored = parts[part]
        if (stored.dtype, stored.shape) not in allowed[part]:
            choices = " or ".join(f"{dtype} {list(s)}" for dtype, s in allowed[part])
            raise TpvcError(
                f"tensor '{stored.name}' is {stored.dtype} {list(stored.shape)}; {grid} of a {rows}x{columns} matrix"
                f" expects {choices}"
            )

    def read() -> QTensor:
        tensors = {f"weight_{part}" if part else "weight": parts[part].read() for part in expected}
        if "weight_shape" in tensors and tensors["weight_shape"].tolist() != [rows, columns]:
            said = tensors["weight_shape"].tolist()
            raise TpvcError(f"tensor '{parts['shape'].name}' says {said}; expected {[rows, columns]}")
        q = from_tensors(tensors, grid)
        top = 2**grid.bits - 1
        if int(q.codes.max()) > top or (q.zero is not None and int(q.zero.max()) > top):
            raise TpvcError(f"'{name}' holds codes beyond {grid.bits} bits; use an intact copy of the checkpoint")
        return q

    return Lazy(tuple(shape), FLOATS[parts["scale"].dtype], read, grid)


def _keys(parts: Sequence[str] | Mapping[str, Stored]) -> str:
    return ", ".join(p if p in INPUT_PARTS else f"weight_{p}" if p else "weight" for p in sorted(parts))

"""The intermediate representation: a flat list of named nodes over a table of ops, and parameters by name.

A `Program` is frozen data. A pass returns a new one; nothing is changed in place. Node names are also the names of the
values they produce, every node has one output, and every node knows the transformer block it belongs to, so that
"block by block" is a slice of the list.

Graph inputs (values that no node produces):

    input_ids   int64 [B, T]    token ids of the new tokens; ids from vocab_size on are virtual tokens of soft prompts
    positions   int64 [B, T]    position of every new token in its own sequence (padding not counted)
    mask        bool  [B, S]    which of the S = past + T tokens are real; False is padding
    adapter_ids int64 [B]       which of `Program.adapters` a row wants; -1: none, the base model
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.adapters.road import Road
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.sha256 import sha256

INPUTS = ("input_ids", "positions", "mask", "adapter_ids")
NORMS = ("rms_norm", "layer_norm")
INPUT_ROUNDERS = ("round_rows", "round_tensor")
"""The ops that round what linears read."""
ROUNDERS = (*INPUT_ROUNDERS, "round_heads")
"""Those, and the one that rounds keys and values."""


@dataclass(frozen=True)
class Grid:
    """How the weight of one linear is rounded.

    bits       2..8
    group      columns that share a scale; 0: one scale per tensor; -1: one scale per row (output channel)
    symmetric  True: zero point is 2^(bits-1) and not stored
    """

    bits: int
    group: int
    symmetric: bool

    def columns(self, in_features: int) -> int:
        """Columns per scale for a matrix with `in_features` columns."""
        return self.group if self.group > 0 else in_features

    def __str__(self) -> str:
        group = {0: "per tensor", -1: "per channel"}.get(self.group, f"g{self.group}")
        return f"W{self.bits} {group} {'symmetric' if self.symmetric else 'asymmetric'}"


Grids = Grid | Mapping[str, Grid]
"""One grid for all matrices, or each matrix's own by the name of the weight."""


def grid_for(grids: Grids, weight: str) -> Grid:
    """The grid that the matrix called `weight` is rounded on."""
    return grids if isinstance(grids, Grid) else grids[weight]


def described(grids: Grids) -> str:
    """What to call them: one grid by its name, several by their widths."""
    if isinstance(grids, Grid):
        return str(grids)
    found = sorted(set(grids.values()), key=lambda g: g.bits)
    return ", ".join([f"W{g.bits}" for g in found[:-1]] + [str(found[-1])])


@dataclass(frozen=True, eq=False)
class QTensor:
    """Integer codes with their uniform grid: `w[n, k] = (codes[n, k] - zero[n, k // g]) * scale[n, k // g]`.

    codes   uint8 [out, in], 0 .. 2^bits - 1
    scale   float32 [out, in / g], or [1, 1] per tensor; its values are exact in `scale_dtype`
    zero    uint8, the shape of scale, or None: symmetric, 2^(bits-1)
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    grid: Grid
    scale_dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]."""
        return self.rows(slice(None))

    def rows(self, index: Any) -> torch.Tensor:
        """Dequantised rows, float32 `[..., in]`; `index` is anything that indexes the first dimension of a tensor."""
        codes = self.codes[index]
        pick = (lambda t: t) if self.scale.shape[0] == 1 else (lambda t: t[index])
        zero = 2 ** (self.grid.bits - 1) if self.zero is None else pick(self.zero).float().unsqueeze(-1)
        grouped = codes.float().unflatten(-1, (self.scale.shape[1], -1))
        return ((grouped - zero) * pick(self.scale).unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True, eq=False)
class Lazy:
    """A parameter that lies in a file and is read when asked for; nothing is kept.

    `read()` returns a torch.Tensor of `shape` and `dtype`, or a QTensor of `shape` when `grid` is set
    (then `dtype` is its `scale_dtype`).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor | QTensor] = field(repr=False)
    grid: Grid | None = None


Parameter = torch.Tensor | QTensor | Lazy


def read(parameter: Parameter) -> torch.Tensor | QTensor:
    """The parameter itself, read from its file if it is lazy."""
    return parameter.read() if isinstance(parameter, Lazy) else parameter


def grid_of(parameter: Parameter) -> Grid | None:
    """The grid of an integer parameter, None for a float one. Reads nothing."""
    return getattr(parameter, "grid", None)


def scale_dtype_of(parameter: Parameter) -> torch.dtype:
    """The dtype that the scales of an integer parameter are stored in; of a float one its own. Reads nothing."""
    return parameter.scale_dtype if isinstance(parameter, QTensor) else parameter.dtype


def dense(parameter: Parameter) -> torch.Tensor:
    """The parameter in float32, dequantised where it is an integer one."""
    value = read(parameter)
    return value.dequantize() if isinstance(value, QTensor) else value.float()


@dataclass(frozen=True)
class Node:
    """One operation. `params` maps a role of the op (weight, bias) to a parameter name; `attrs` are constants."""

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    params: Mapping[str, str] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    block: int | None = None


@dataclass(frozen=True)
class Source:
    """Where a Program came from, and what an artefact has to carry on.

    name       what the user typed
    directory  where config, tokenizer and weights lie
    config     the Hugging Face config.json as a dict (made from metadata for a GGUF)
    weights    the weight files, which lie in `directory` or below it
    """

    name: str
    directory: Path
    config: Mapping[str, Any]
    weights: tuple[Path, ...]

    @cached_property
    def files(self) -> dict[str, str]:
        """{file name relative to `directory`: sha256} of every weight file. The first call reads them whole."""
        _ = self._stamps
        return {path.relative_to(self.directory).as_posix(): sha256(path) for path in self.weights}

    @cached_property
    def _stamps(self) -> dict[Path, tuple[int, int]]:
        return {path: _stamp(path) for path in self.weights}

    def check_unchanged(self) -> None:
        """TpvcError where a weight file is another one by now than `files` tells of. One that is gone is passed over:
        whoever wants to read it will find out."""
        for path, stamp in self._stamps.items():
            if path.exists() and _stamp(path) != stamp:
                raise TpvcError(
                    f"{path} was changed while it was read; run the command again when the model is at rest"
                )

    @property
    def record(self) -> dict[str, Any]:
        """What tpvc.json says of it."""
        return {"name": self.name, "files": self.files, "config": dict(self.config)}

    @property
    def gguf(self) -> Path | None:
        """The GGUF file that the model came from. What else lies in its directory says nothing about it."""
        return next((path for path in self.weights if path.suffix.lower() == ".gguf"), None)


@dataclass(frozen=True)
class Facts:
    """What backends and the generation loop must know about a model, apart from its graph."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


@dataclass(frozen=True)
class Program:
    """`nodes` in order of execution (the last one yields the logits), `params` by checkpoint name.

    adapters  what its `rotate` nodes hold, in the order of their ids; their parameters follow from them
    prompts   soft prompts that a caller may put before a text: ids vocab_size, vocab_size + 1, ... in this order
    """

    nodes: tuple[Node, ...]
    params: Mapping[str, Parameter]
    facts: Facts
    source: Source | None = None
    adapters: tuple[Road, ...] = ()
    prompts: tuple[Prompt, ...] = ()

    @property
    def blocks(self) -> int:
        return 1 + max((n.block for n in self.nodes if n.block is not None), default=-1)

    def block(self, index: int) -> tuple[Node, ...]:
        return tuple(n for n in self.nodes if n.block == index)

    @property
    def prologue(self) -> tuple[Node, ...]:
        """Nodes before the first block: embeddings."""
        first = next((i for i, n in enumerate(self.nodes) if n.block is not None), len(self.nodes))
        return self.nodes[:first]

    @property
    def epilogue(self) -> tuple[Node, ...]:
        """Nodes after the last block: final norm and head."""
        last = max((i for i, n in enumerate(self.nodes) if n.block is not None), default=-1)
        return self.nodes[last + 1 :]

    def with_params(self, changed: Mapping[str, Parameter]) -> Program:
        return replace(self, params={**self.params, **changed})


def linears(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """The linear nodes among `nodes`: what quantisation is about."""
    return tuple(n for n in nodes if n.op == "linear")


def rounded_inputs(program: Program) -> dict[str, str]:
    """{weight of a linear: how what it reads is rounded}, for linears that read a `round_rows` node ("int8", "fp8") or
    a `round_tensor` node ("int8-static")."""
    kinds = {n.name: n.attrs.get("kind", "int8-static") for n in program.nodes if n.op in INPUT_ROUNDERS}
    return {n.params["weight"]: kinds[n.inputs[0]] for n in linears(program.nodes) if n.inputs[0] in kinds}


def input_grids(program: Program) -> dict[str, tuple[float | None, int]]:
    """{weight of a linear: (scale, zero point) of what it reads}, for linears that read a `round_tensor` node; the
    scale is None where nobody has found it yet."""
    grids = {n.name: (n.attrs["scale"], n.attrs["zero"]) for n in program.nodes if n.op == "round_tensor"}
    return {n.params["weight"]: grids[n.inputs[0]] for n in linears(program.nodes) if n.inputs[0] in grids}


def rounded_cache(program: Program) -> str | None:
    """How keys and values are rounded: "int8" (`round_heads` nodes), or None: they stay in float."""
    return "int8" if any(n.op == "round_heads" for n in program.nodes) else None


def adapter_id(program: Program, name: str | None) -> int:
    """The id of the adapter called `name`; -1 for None. TpvcError for a name that the program does not have."""
    names = [a.name for a in program.adapters]
    if name is not None and name not in names:
        known = f"it has {', '.join(names)}" if names else "it has none"
        raise TpvcError(f"the model has no adapter '{name}'; {known}")
    return -1 if name is None else names.index(name)


def prompt_ids(program: Program, name: str | None) -> list[int]:
    """Ids of the virtual tokens of the prompt called `name`, to be put before a text; none for None.

    TpvcError for a name that the program does not have.
    """
    first = program.facts.vocab_size
    for prompt in program.prompts if name is not None else ():
        if prompt.name == name:
            return list(range(first, first + prompt.tokens))
        first += prompt.tokens
    if name is not None:
        names = ", ".join(p.name for p in program.prompts)
        raise TpvcError(f"the model has no task '{name}'; {f'it has {names}' if names else 'it has none'}")
    return []


def constant_prefix(program: Program) -> int:
    """Virtual tokens that the program itself puts before every row (`passes.fold_prompt`), which a cache counts."""
    return next((n.attrs["count"] for n in program.nodes if n.op == "prefix_ids"), 0)


def folded_tokens(program: Program) -> int:
    """Virtual tokens of the prompt that was folded in, in either form: they take their place in the context."""
    keys = (n.params["prefix_key"] for n in program.nodes if n.op == "attention" and n.params)
    return constant_prefix(program) or next((program.params[name].shape[1] for name in keys), 0)


def bank_params(program: Program) -> frozenset[str]:
    """Names of the parameters that adapters and prompts brought, which no checkpoint holds."""
    brought = ("rotate", "virtual_tokens", "attention")
    return frozenset(p for n in program.nodes if n.op in brought for p in n.params.values())


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns

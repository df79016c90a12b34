"""The drawing board of the family files: a `Graph` collects nodes and the shape every parameter must have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tpvc.compiler.program import Facts, Node


@dataclass(frozen=True)
class Architecture:
    """What a config says about a model, before any weight is read.

    nodes       the graph; parameter names are those of the full causal-LM checkpoint
    facts       sizes and special tokens
    transposed  parameters that the checkpoint stores [in, out] (Conv1D); the Program holds [out, in]
    shapes      {parameter name: shape in the Program}; exactly the parameters that the nodes read
    prefix      leading part of the names that some checkpoints leave out ("transformer." of GPT-2)
    aliases     {name in some checkpoints: name in the Program}
    """

    nodes: tuple[Node, ...]
    facts: Facts
    transposed: frozenset[str] = frozenset()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    prefix: str = ""
    aliases: dict[str, str] = field(default_factory=dict)


@dataclass
class Graph:
    """Every method appends a node and returns its name, which is the name of its value.

    `block` is the transformer block of the nodes that follow. Attributes that are None are left out.
    """

    block: int | None = None
    nodes: list[Node] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)

    def add(self, name: str, op: str, *inputs: str, params: dict[str, str] | None = None, **attrs: Any) -> str:
        given = {key: value for key, value in attrs.items() if value is not None}
        self.nodes.append(Node(name, op, inputs, params or {}, given, self.block))
        return name

    def embed(self, name: str, ids: str, rows: int, features: int, offset: int | None = None) -> str:
        self.shapes[f"{name}.weight"] = (rows, features)
        return self.add(name, "embed", ids, params={"weight": f"{name}.weight"}, offset=offset)

    def linear(
        self,
        name: str,
        x: str,
        out: int,
        in_: int,
        *,
        bias: bool = False,
        weight: str | None = None,
        conv1d: bool = False,
    ) -> str:
        """`weight` names a parameter shared with another node; `conv1d`: the checkpoint stores it [in, out]."""
        params = {"weight": weight or f"{name}.weight"}
        self.shapes[params["weight"]] = (out, in_)
        if conv1d:
            self.transposed.add(params["weight"])
        if bias:
            params["bias"] = f"{name}.bias"
            self.shapes[params["bias"]] = (out,)
        return self.add(name, "linear", x, params=params)

    def rms_norm(self, name: str, x: str, features: int, eps: float, plus_one: bool | None = None) -> str:
        self.shapes[f"{name}.weight"] = (features,)
        return self.add(name, "rms_norm", x, params={"weight": f"{name}.weight"}, eps=eps, plus_one=plus_one)

    def layer_norm(self, name: str, x: str, features: int, eps: float) -> str:
        params = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
        self.shapes |= dict.fromkeys(params.values(), (features,))
        return self.add(name, "layer_norm", x, params=params, eps=eps)

    def head(self, x: str, facts: Facts, features: int, table: str, *, tied: bool, bias: bool = False) -> str:
        """The language-model head; a tied one reads the parameter of the embedding `table`."""
        weight = f"{table}.weight" if tied else None
        return self.linear("lm_head", x, facts.vocab_size, features, weight=weight, bias=bias)

    def attention(
        self,
        name: str,
        q: str,
        k: str,
        v: str,
        facts: Facts,
        *,
        rope: dict[str, Any] | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> str:
        """Attention of the module `name`, over rotated queries and keys when `rope` (attributes of the op) is given.

        The scale is head_dim^-1/2 unless told otherwise.
        """
        if rope is not None:
            q = self.add(f"{name}.rope_q", "rope", q, "positions", head_dim=facts.head_dim, **rope)
            k = self.add(f"{name}.rope_k", "rope", k, "positions", head_dim=facts.head_dim, **rope)
        return self.add(
            f"{name}.attention",
            "attention",
            q,
            k,
            v,
            "mask",
            heads=facts.heads,
            kv_heads=facts.kv_heads,
            scale=facts.head_dim**-0.5 if scale is None else scale,
            window=window,
            softcap=softcap,
        )

    def finish(self, facts: Facts, prefix: str = "", aliases: Iterable[tuple[str, str]] = ()) -> Architecture:
        return Architecture(
            tuple(self.nodes), facts, frozenset(self.transposed), dict(self.shapes), prefix, dict(aliases)
        )

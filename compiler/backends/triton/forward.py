"""One pass of some rows' new tokens through a model's steps: with kernels, or with their references in torch.

Nothing but views is made outside a kernel when kernels are used, so that a pass can be recorded (`plan.py`) and
carried out where torch has no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tpvc.compiler.backends.triton.model import Model
from tpvc.compiler.backends.triton.steps import Step
from tpvc.kernels import (
    activation,
    attention,
    embed,
    linear,
    linear_a8,
    norm,
    pointwise,
    rope_cache,
    round_rows,
    sampling,
    split,
)
from tpvc.kernels.launch import Config, Run
from tpvc.kernels.rope_cache import Cache, Rotary, rotary
from tpvc.kernels.round_rows import Rows
from tpvc.kernels.slab import Slabs, dequantise

Key = tuple[str, int]
"""A sort of linear or attention, and rows."""
Tiles = Mapping[Key, Config]
"""What is not there takes the first of its configs."""
Choices = dict[Key, dict[Config, Callable[..., Tensor]]]
"""What a pass may be cut in several ways for: calls that take a Run."""
Want = Literal["nothing", "logits", "greedy", "sample"]
"""What is asked of a pass: that the cache is filled, logits [B, vocab], or tokens int64 [B]."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The new tokens of B rows, and where they belong.

    ids        int32 [B, T], padded on the right; positions int32 [B, T], those of a task's prompt counted
    slots      int32 [B]: rows of the cache
    start, lengths   int32 [B]: tokens of the row before and after
    last       int32 [B]: which of the B * T tokens is the row's last real one
    turns      {rows of a rotation's bank: int32 [B * T], the row of that bank which every token wants}
    tasks      int32 [B], -1 for none
    temperature, top_p, uniform   float32 [B]: see `kernels/sampling.py`
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    start: Tensor
    lengths: Tensor
    last: Tensor
    turns: Mapping[tuple[int, ...], Tensor]
    tasks: Tensor
    temperature: Tensor
    top_p: Tensor
    uniform: Tensor


def blank(model: Model, rows: int, tokens: int, device: str = "cpu") -> Batch:
    """A batch of `rows` times `tokens` to be written into."""
    whole = lambda *shape: torch.empty(shape, dtype=torch.int32, device=device)  # noqa: E731
    floats = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    turns = {own: whole(rows * tokens) for own in turns_of(model)}
    ids, positions = whole(rows, tokens), whole(rows, tokens)
    return Batch(ids, positions, whole(rows), whole(rows), whole(rows), whole(rows), turns, whole(rows), *floats)


def turns_of(model: Model) -> tuple[tuple[int, ...], ...]:
    """Which rows of their banks the adapters have: every mapping that the model's linears use."""
    return tuple(dict.fromkeys(tuple(s.attrs["rows"]) for s in model.steps if s.op == "linear" and "rows" in s.attrs))


def tables(model: Model, positions: int) -> dict[str, Rotary]:
    """cos and sin of every kind of rotation that the model has, for `positions` positions."""
    found = {}
    for rope in (step.attrs["rope"] for step in model.steps if step.op == "attend" and "rope" in step.attrs):
        key = str(sorted(rope.items()))
        if key not in found:
            found[key] = rotary(tuple(rope["inv_freq"]), positions, rope.get("magnitude", 1.0), rope.get("offset", 0))
    return found


@dataclass(frozen=True, eq=False)
class Pass:
    """What the steps of one pass share. run: how kernels are launched, None for references; floats: matrices for
    references, kept from pass to pass; choices: collects {key: {config: a call with it, which takes a Run}}."""

    model: Model
    batch: Batch
    caches: Sequence[Cache]
    tables: Mapping[str, Rotary]
    run: Run | None
    tiles: Tiles
    floats: dict[str, Tensor]
    choices: Choices | None = None

    def param(self, step: Step, role: str):
        return self.model.params[step.params[role]] if role in step.params else None

    def do(self, module, name: str, *args, **options):
        """A kernel's wrapper, or its reference."""
        if self.run is None:
            return getattr(module, f"{name}_reference")(*args, **options)
        return getattr(module, name)(*args, **options, run=self.run)

    def choose(self, key: Key, configs: Sequence[Config], compute: Callable[..., Tensor]) -> Tensor:
        """With the tiles for this, or the first of `configs`."""
        if self.choices is not None:
            self.choices.setdefault(key, {config: partial(compute, config=config) for config in configs})
        return compute(config=self.tiles.get(key, configs[0]), run=self.run)


def forward(now: Pass, want: Want) -> Tensor | None:
    """Logits [B, vocab] in the model's dtype, or tokens, after the last real token of every row."""
    batch, steps = now.batch, now.model.steps
    values = {"input_ids": batch.ids.view(-1), "positions": batch.positions.view(-1)}
    head = next(i for i in reversed(range(len(steps))) if steps[i].op == "linear")
    for index, step in enumerate(steps):
        given = [values[v] for v in step.inputs if v in values]
        if index == head:
            if want == "nothing":
                return None
            given = [now.do(embed, "embed", given[0], batch.last, now.model.dtype)]
        found = STEPS[step.op](now, step, *given)
        values.update(zip(step.outputs, found if isinstance(found, tuple) else (found,), strict=False))
    logits = values[steps[-1].outputs[0]]
    if want == "greedy":
        return now.do(sampling, "greedy", logits)
    if want == "sample":
        return now.do(sampling, "sample", logits, batch.temperature, batch.top_p, batch.uniform)
    return logits


def _embed(now: Pass, step: Step, ids: Tensor) -> Tensor:
    return now.do(embed, "embed", now.param(step, "weight"), ids, now.model.dtype, step.attrs.get("offset", 0))


def _virtual_tokens(now: Pass, step: Step, x: Tensor, ids: Tensor) -> Tensor:
    return now.do(embed, "virtual_tokens", x, ids, now.param(step, "rows"), step.attrs["vocab"])


def bank_of(model: Model, step: Step) -> linear.Bank | None:
    """The rotations in a linear's epilogue."""
    if "cosine" not in step.params:
        return None
    cosine, sine = (model.params[step.params[role]] for role in ("cosine", "sine"))
    return linear.Bank(cosine, sine, step.attrs["group"])


def _linear(now: Pass, step: Step, x: Tensor | Rows) -> Tensor | tuple[Tensor, ...]:
    """Of several linears side by side, each one's columns."""
    y = _product(now, step, x)
    return y.split(step.attrs["widths"], 1) if "widths" in step.attrs else y


def _product(now: Pass, step: Step, x: Tensor | Rows) -> Tensor:
    weight, bias, bank = now.param(step, "weight"), now.param(step, "bias"), bank_of(now.model, step)
    ids = None if bank is None else now.batch.turns[tuple(step.attrs["rows"])]
    rounded = isinstance(x, Rows)
    if now.run is None:
        if rounded:
            return linear_a8.linear_a8_reference(x, weight, bias, bank, ids)
        return linear.of_dense(x.contiguous(), _dense(now, step.params["weight"]), bias, bank, ids)
    count, kind = (len(x.codes), x.kind) if rounded else (len(x), None)
    compute, configs = (linear_a8.linear_a8, linear_a8.configs) if rounded else (linear.linear, linear.configs)
    return now.choose(
        (linear.sort(weight, bias, bank, kind), count),
        configs(count, weight, None if bank is None else bank.group),
        partial(compute, x, weight, bias, bank, ids),
    )


def _dense(now: Pass, name: str) -> Tensor:
    if name not in now.floats:
        value = now.model.params[name]
        now.floats[name] = (dequantise(value, now.model.dtype) if isinstance(value, Slabs) else value).float()
    return now.floats[name]


def _norm(now: Pass, step: Step, x: Tensor, residual: Tensor | None = None):
    kind = step.attrs["kind"]
    bias = [now.param(step, "bias")] if kind == "layer_norm" else []
    options = {"plus_one": step.attrs.get("plus_one", False)} if kind == "rms_norm" else {}
    found = now.do(norm, kind, x, now.param(step, "weight"), *bias, step.attrs["eps"], residual, **options)
    return found[0] if residual is None else found


def _attend(now: Pass, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, attrs, layer = now.batch, step.attrs, step.attrs["layer"]
    shape = (*batch.ids.shape, -1, now.model.facts.head_dim)
    q, k, v = (t.view(shape) for t in (q, k, v))
    rope = attrs.get("rope")
    turning = (None, None) if rope is None else (batch.positions, now.tables[str(sorted(rope.items()))])
    options = {"scale": attrs["scale"], "window": attrs.get("window"), "softcap": attrs.get("softcap")}
    if now.model.prefixes:
        options |= {"prefix": now.model.prefixes[layer], "ids": batch.tasks}
    where = (now.caches[layer], batch.start, batch.lengths)
    q = now.do(rope_cache, "rope_cache", q, k, v, *where, *turning, batch.slots)
    given = (q, *where)
    if now.run is None:
        found = attention.attention_reference(*given, slots=batch.slots, **options)
    else:
        marks = (options["window"], options["softcap"], options.get("prefix"))
        found = now.choose(
            (attention.sort(q, now.caches[layer], *marks), len(q)),
            attention.configs(q, now.caches[layer]),
            partial(attention.attention, *given, slots=batch.slots, **options),
        )
    return found.view(batch.ids.numel(), -1)


def _split(now: Pass, step: Step, x: Tensor) -> Tensor:
    return now.do(split, "split", x, step.attrs["groups"], step.attrs["start"], step.attrs["stop"])


STEPS: dict[str, Callable] = {
    "embed": _embed,
    "virtual_tokens": _virtual_tokens,
    "round_rows": lambda now, step, x: now.do(round_rows, "round_rows", x, kind=step.attrs["kind"]),
    "linear": _linear,
    "norm": _norm,
    "attend": _attend,
    "gated": lambda now, step, gate, up: now.do(activation, "gated", gate, up, kind=step.attrs["kind"]),
    "activation": lambda now, step, x: now.do(activation, "activation", x, kind=step.attrs["kind"]),
    "split": _split,
    "add": lambda now, step, a, b: now.do(pointwise, "pointwise", a, b, kind="add"),
    "mul": lambda now, step, a, b: now.do(pointwise, "pointwise", a, b, kind="mul"),
    "scale": lambda now, step, x: now.do(pointwise, "pointwise", x, None, step.attrs["factor"], kind="scale"),
    "softcap": lambda now, step, x: now.do(pointwise, "pointwise", x, None, step.attrs["cap"], kind="softcap"),
}

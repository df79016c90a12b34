"""Run a Program with the kernels: rows of their own length, adapter and prompt, over one cache of slots.

A slot holds one text. `admit` fills a free slot and computes its prompt; `decode` takes the next token of every slot
that is in use; `release` frees one. So rows come and go while others go on. With `run` None every kernel is computed by
its reference in torch, on any device: what the kernels are checked against, and how a package runs without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tpvc.compiler.backends.triton.steps import Step, steps
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Facts, Program, QTensor, dense, prompt_ids, read
from tpvc.kernels import activation, attention, linear, norm, rope_cache, sampling
from tpvc.kernels.launch import Run
from tpvc.kernels.rope_cache import Cache, Rotary, rotary
from tpvc.kernels.slab import Slabs, columns, dequantise, pack

CHUNKS = (16, 128)
"""A prompt is computed in pieces of these many tokens, the last one filled up, so that few shapes of kernels do."""


Tiles = Mapping[tuple[str, int], linear.Config]
"""(sort of linear, rows) -> its tiles; what is not there takes the first of `linear.configs`."""


@dataclass(frozen=True)
class Task:
    """A soft prompt that the model carries: its rows are a parameter of the step `virtual_tokens`."""

    name: str
    tokens: int


@dataclass(frozen=True, eq=False)
class Model:
    """What a package holds: steps, and parameters as the kernels take them.

    params  tensors in `dtype` on `device`, or Slabs; caches are in `dtype` too
    """

    steps: tuple[Step, ...]
    params: Mapping[str, Tensor | Slabs]
    facts: Facts
    adapters: tuple[str, ...]
    prompts: tuple[Task, ...]
    dtype: torch.dtype
    device: str


def model_of(program: Program, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Model:
    """A Program's parameters in the kernels' layout."""
    planned, params = steps(program), {}
    for step in planned:
        for name in step.params.values():
            value = read(program.params[name])
            if isinstance(value, QTensor) and step.op in ("linear", "embed"):
                params[name] = params.get(name) or _moved(pack(value), device)
            else:
                params[name] = dense(program.params[name]).to(device, dtype)
    names, tasks = tuple(a.name for a in program.adapters), tuple(Task(p.name, p.tokens) for p in program.prompts)
    return Model(planned, params, program.facts, names, tasks, dtype, device)


def _moved(slabs: Slabs, device: str) -> Slabs:
    return replace(slabs, **{name: t.to(device) for name, t in slabs.tensors.items()})


@dataclass(frozen=True, eq=False)
class Batch:
    """Some slots' new tokens: ids int64 [B, T], padded on the right; start and lengths int32 [B], tokens of the slot
    before and after; positions int32 [B, T]; adapters int32 [B]; caches of the slots, by layer."""

    ids: Tensor
    start: Tensor
    lengths: Tensor
    positions: Tensor
    adapters: Tensor
    caches: Sequence[Cache]


@dataclass(eq=False)
class Engine:
    """slots  texts at a time; capacity: tokens of each; run: how kernels are launched, None for their references;
    tiles: those of the linears, by measurement (`tiles.py`)"""

    model: Model
    slots: int = 1
    capacity: int = 0
    run: Run | None = None
    tiles: Tiles = field(default_factory=dict)
    lengths: Tensor = field(init=False)
    adapters: Tensor = field(init=False)
    free: list[int] = field(init=False)
    caches: list[Cache] = field(init=False)
    tables: dict[str, Rotary] = field(init=False, default_factory=dict)
    floats: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        model = self.model
        self.capacity = self.capacity or model.facts.context_length
        if self.capacity > model.facts.context_length:
            raise TpvcError(
                f"a capacity of {self.capacity} tokens is beyond the model's context of {model.facts.context_length};"
                " ask for less"
            )
        self.lengths = torch.zeros(self.slots, dtype=torch.int32, device=model.device)
        self.adapters = torch.full((self.slots,), -1, dtype=torch.int32, device=model.device)
        self.free = list(range(self.slots))[::-1]
        self.caches = [self._cache(step) for step in model.steps if step.op == "attend"]

    def _cache(self, step: Step) -> Cache:
        shape = (self.slots, step.attrs["kv_heads"], self.capacity, self.model.facts.head_dim)
        return Cache(*(torch.zeros(shape, dtype=self.model.dtype, device=self.model.device) for _ in range(2)))

    def admit(self, ids: Sequence[int], adapter: str | None = None, task: str | None = None) -> tuple[int, Tensor]:
        """Put a text into a free slot; returns (the slot, logits [vocab] after its last token).

        `adapter` and `task` are names of what the package carries. TpvcError where no slot is free, or the text and
        its prompt do not fit.
        """
        before = prompt_ids(self.model, task)
        chosen = self.adapter_id(adapter)
        if not self.free:
            raise TpvcError(f"all {self.slots} slots are in use; release one, or make an engine with more")
        if not 0 < len(before) + len(ids) <= self.capacity:
            raise TpvcError(f"the prompt has {len(before) + len(ids)} tokens; expected 1 to {self.capacity}")
        slot, rest = self.free.pop(), [*before, *ids]
        self.lengths[slot], self.adapters[slot] = 0, chosen
        while rest:
            size = next((c for c in CHUNKS if c >= len(rest)), CHUNKS[-1])
            part, rest = rest[:size], rest[size:]
            tokens = torch.tensor([part + [0] * (size - len(part))], device=self.model.device)
            logits = self._forward(tokens, slice(slot, slot + 1), len(part))
        return slot, logits[0]

    def adapter_id(self, name: str | None) -> int:
        """The id of the adapter called `name`, -1 for None. TpvcError for one that the model does not have."""
        if name is not None and name not in self.model.adapters:
            known = f"it has {', '.join(self.model.adapters)}" if self.model.adapters else "it has none"
            raise TpvcError(f"the model has no adapter '{name}'; {known}")
        return -1 if name is None else self.model.adapters.index(name)

    def decode(self, tokens: Tensor) -> Tensor:
        """One more token int64 [slots] for every slot -> logits [slots, vocab]; those of free slots mean nothing."""
        used = [slot for slot in range(self.slots) if slot not in self.free]
        if any(int(self.lengths[slot]) >= self.capacity for slot in used):
            raise TpvcError(f"a slot is full: it holds {self.capacity} tokens; release it")
        found = self._forward(tokens[:, None], slice(0, self.slots), 1)
        self.lengths[self.free] = 0
        return found

    def release(self, slot: int) -> None:
        if slot in self.free or not 0 <= slot < self.slots:
            raise TpvcError(f"slot {slot} is not in use")
        self.lengths[slot] = 0
        self.free.append(slot)

    def greedy(self, logits: Tensor) -> Tensor:
        """The likeliest token of every row, int64 [B]."""
        return sampling.greedy_reference(logits) if self.run is None else sampling.greedy(logits, run=self.run)

    def dense(self, name: str) -> Tensor:
        """A matrix as the kernels multiply with it, in float32, kept for the next time: for references alone."""
        if name not in self.floats:
            value = self.model.params[name]
            self.floats[name] = (dequantise(value, self.model.dtype) if isinstance(value, Slabs) else value).float()
        return self.floats[name]

    @torch.no_grad()
    def _forward(self, ids: Tensor, rows: slice, real: int) -> Tensor:
        """Logits [B, vocab] after the last of the `real` new tokens of some slots; the others fill up."""
        start = self.lengths[rows].clone()
        lengths = start + real
        positions = start[:, None] + torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)
        positions = positions.clamp(max=self.capacity - 1)
        caches = [Cache(c.key[rows], c.value[rows]) for c in self.caches]
        batch = Batch(ids, start, lengths, positions, self.adapters[rows], caches)
        values = {"input_ids": ids, "positions": positions}
        head = next(i for i in reversed(range(len(self.model.steps))) if self.model.steps[i].op == "linear")
        for index, step in enumerate(self.model.steps):
            given = [values[v] for v in step.inputs if v in values]
            if index == head:
                given = [given[0].unflatten(0, (len(ids), -1))[:, real - 1].contiguous()]
            found = STEPS[step.op](self, step, batch, *given)
            values.update(zip(step.outputs, found if isinstance(found, tuple) else (found,), strict=False))
        self.lengths[rows] = lengths
        return values[self.model.steps[-1].outputs[0]].float()


def _embed(engine: Engine, step: Step, batch: Batch, ids: Tensor) -> Tensor:
    table = engine.model.params[step.params["weight"]]
    vocab, offset = engine.model.facts.vocab_size, step.attrs.get("offset", 0)
    known = (torch.where(ids < vocab, ids, 0) if ids.dtype == torch.int64 else ids.long()).flatten() + offset
    return columns(table, known, engine.model.dtype) if isinstance(table, Slabs) else table[known]


def _virtual_tokens(engine: Engine, step: Step, batch: Batch, x: Tensor, ids: Tensor) -> Tensor:
    vocab, flat = step.attrs["vocab"], ids.flatten()
    rows = engine.model.params[step.params["rows"]]
    return torch.where((flat < vocab)[:, None], x, rows[(flat - vocab).clamp(min=0)])


def _linear(engine: Engine, step: Step, batch: Batch, x: Tensor) -> Tensor:
    params = {role: engine.model.params[name] for role, name in step.params.items()}
    weight, bias, bank, ids = params["weight"], params.get("bias"), None, None
    if "cosine" in params:
        own = torch.tensor((*step.attrs["rows"], -1), dtype=torch.int32, device=x.device)
        ids = own[batch.adapters.long()].repeat_interleave(len(x) // len(batch.adapters))
        bank = linear.Bank(params["cosine"], params["sine"], step.attrs["group"])
    x = x.contiguous()
    if engine.run is None:
        return linear.of_dense(x, engine.dense(step.params["weight"]), bias, bank, ids)
    if isinstance(weight, Slabs):
        config = engine.tiles.get((linear.sort(weight, bias, bank), len(x)))
        return linear.linear(x, weight, bias, bank, ids, config=config, run=engine.run)
    y = F.linear(x, weight, bias)
    return y if bank is None else linear.turned(y, bank, ids)


def _norm(engine: Engine, step: Step, batch: Batch, x: Tensor, residual: Tensor | None = None):
    attrs, params = step.attrs, {role: engine.model.params[name] for role, name in step.params.items()}
    bias = [params.get("bias")] if attrs["kind"] == "layer_norm" else []
    given = [x, params["weight"], *bias, attrs["eps"], residual]
    options = {"plus_one": attrs.get("plus_one", False)} if attrs["kind"] == "rms_norm" else {}
    if engine.run is None:
        normed, total = getattr(norm, f"{attrs['kind']}_reference")(*given, **options)
    else:
        normed, total = getattr(norm, attrs["kind"])(*given, **options, run=engine.run)
    return normed if residual is None else (normed, total)


def _attend(engine: Engine, step: Step, batch: Batch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    attrs, shape = step.attrs, (*batch.ids.shape, -1, engine.model.facts.head_dim)
    q, k, v = (t.view(shape) for t in (q, k, v))
    cache, rope = batch.caches[attrs["layer"]], attrs.get("rope")
    turning = () if rope is None else (batch.positions, engine_table(engine, rope))
    options = {"scale": attrs["scale"], "window": attrs.get("window"), "softcap": attrs.get("softcap")}
    where = (cache, batch.start, batch.lengths)
    if engine.run is None:
        q = rope_cache.rope_cache_reference(q, k, v, *where, *turning)
        return attention.attention_reference(q, *where, **options).flatten(0, 1).flatten(1)
    q = rope_cache.rope_cache(q, k, v, *where, *turning, run=engine.run)
    return attention.attention(q, *where, **options, run=engine.run).flatten(0, 1).flatten(1)


def engine_table(engine: Engine, rope: Mapping) -> Rotary:
    """cos and sin for every position of the cache, made once for every kind of rotation."""
    key = str(sorted(rope.items()))
    if key not in engine.tables:
        made = rotary(tuple(rope["inv_freq"]), engine.capacity, rope.get("magnitude", 1.0), rope.get("offset", 0))
        engine.tables[key] = Rotary(*(t.to(engine.model.device) for t in (made.cosine, made.sine)))
    return engine.tables[key]


def _gated(engine: Engine, step: Step, batch: Batch, gate: Tensor, up: Tensor) -> Tensor:
    kind = step.attrs["kind"]
    if engine.run is None:
        return activation.gated_reference(gate, up, kind=kind)
    return activation.gated(gate, up, kind=kind, run=engine.run)


def _activation(engine: Engine, step: Step, batch: Batch, x: Tensor) -> Tensor:
    kind = step.attrs["kind"]
    if engine.run is None:
        return activation.activation_reference(x, kind=kind)
    return activation.activation(x, kind=kind, run=engine.run)


def _split(engine: Engine, step: Step, batch: Batch, x: Tensor) -> Tensor:
    a = step.attrs
    return x.unflatten(-1, (a["groups"], -1))[..., a["start"] : a["stop"]].flatten(-2)


STEPS: dict[str, Callable] = {
    "embed": _embed,
    "virtual_tokens": _virtual_tokens,
    "linear": _linear,
    "norm": _norm,
    "attend": _attend,
    "gated": _gated,
    "activation": _activation,
    "split": _split,
    "add": lambda engine, step, batch, a, b: a + b,
    "mul": lambda engine, step, batch, a, b: a * b,
    "scale": lambda engine, step, batch, x: x * step.attrs["factor"],
    "softcap": lambda engine, step, batch, x: step.attrs["cap"] * torch.tanh(x / step.attrs["cap"]),
}

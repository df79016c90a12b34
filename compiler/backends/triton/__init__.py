"""The Triton backend: a package of steps, packed weights and machine code for named GPUs, built without any of them.

triton.json          the steps, what each parameter is, and what the engine may be asked for
model.safetensors    packed integers, and floats in the dtype that the kernels compute in
kernels/             binaries and their manifest (`tpvc.kernels.package`)
tokenizer files
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tpvc.compiler.backends.triton.engine import CHUNKS, Engine, Model, Task, Tiles, model_of
from tpvc.compiler.backends.triton.steps import Step
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.weights import read_json, stored_in
from tpvc.compiler.program import Facts, Program
from tpvc.compiler.progress import Progress, silent
from tpvc.kernels import linear
from tpvc.kernels.launch import Launch, Run
from tpvc.kernels.slab import Slabs
from tpvc.kernels.targets import Target

FILE, WEIGHTS, KERNELS, FORMAT = "triton.json", "model.safetensors", "kernels", 1
SLOTS = (1, 2, 4, 8, 16, 32)
"""Texts at a time for which kernels are built."""
ROWS = tuple(sorted({*SLOTS, *CHUNKS}))
"""Rows that a linear may have: a token of every slot, or a piece of one prompt."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def emit(
    program: Program,
    directory: Path,
    tokenizer: Any,
    targets: Sequence[Target],
    dtype: torch.dtype,
    *,
    capacity: int | None = None,
    progress: Progress = silent,
) -> None:
    """Write the package into the empty `directory`. dtype: of activations and caches, float16 or bfloat16; capacity:
    tokens of a text, None: 4,096 or the model's context. The same input gives the same bytes."""
    from tpvc.kernels import aot, package

    model = model_of(program, dtype)
    capacity = min(4096, program.facts.context_length) if capacity is None else capacity
    tensors, kinds = _stored(model)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    described = {
        "format": FORMAT,
        "dtype": str(dtype).removeprefix("torch."),
        "facts": asdict(model.facts),
        "capacity": capacity,
        "slots": list(SLOTS),
        "adapters": list(model.adapters),
        "tasks": [asdict(task) for task in model.prompts],
        "params": kinds,
        "steps": [asdict(step) for step in model.steps],
    }
    (directory / FILE).write_text(json.dumps(described, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    built = aot.build(candidates(model, capacity), targets, progress=progress)
    package.write(directory / KERNELS, built.kept)


def _stored(model: Model) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    tensors, kinds = {}, {}
    for name, value in sorted(model.params.items()):
        if isinstance(value, Slabs):
            tensors |= {f"{name}.{part}": t.contiguous() for part, t in value.tensors.items()}
            sizes = {"depth": value.depth, "bits": value.bits, "group": value.group, "middle": value.middle}
            kinds[name] = {"kind": "slabs", **sizes}
        else:
            tensors[name], kinds[name] = value.contiguous(), {"kind": "tensor"}
    return tensors, kinds


def read(directory: Path, device: str = "cpu") -> Model:
    """The model of a package. TpvcError, one sentence, for a file that is damaged or missing."""
    path = directory / FILE
    if not path.is_file():
        raise TpvcError(f"{directory} has no {FILE}; expected a package of tpvc export --to triton")
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise TpvcError(f"{path} has format {found.get('format')!r}, this tpvc reads {FORMAT}; export the model again")
    there, params = stored_in(directory / WEIGHTS), {}
    for name, kind in found["params"].items():
        parts = ("words", "high", "scale", "zero") if kind["kind"] == "slabs" else ("",)
        held = {part: f"{name}.{part}" if part else name for part in parts}
        tensors = {part: there[own].read().to(device) for part, own in held.items() if own in there}
        if ("words" if kind["kind"] == "slabs" else "") not in tensors:
            raise TpvcError(f"{directory / WEIGHTS} lacks '{name}', which {FILE} names; use an intact copy")
        if kind["kind"] == "slabs":
            sizes = {key: kind[key] for key in ("depth", "bits", "group", "middle")}
            params[name] = Slabs(tensors["words"], tensors.get("high"), tensors["scale"], tensors.get("zero"), **sizes)
        else:
            params[name] = tensors[""]
    facts = Facts(**{**found["facts"], "eos": tuple(found["facts"]["eos"])})
    steps = tuple(
        Step(s["op"], tuple(s["inputs"]), tuple(s["outputs"]), s["params"], s["attrs"]) for s in found["steps"]
    )
    tasks = tuple(Task(**task) for task in found["tasks"])
    return Model(steps, params, facts, tuple(found["adapters"]), tasks, DTYPES[found["dtype"]], device)


def launcher_of(directory: Path) -> Run:
    """How the package's kernels are launched on the first GPU of this machine, on torch's current stream."""
    from tpvc.kernels import driver, package

    api = driver.open_api("hip" if torch.version.hip else "cuda")
    stream = lambda: torch.cuda.current_stream().cuda_stream  # noqa: E731
    return driver.launcher(package.read(directory / KERNELS), driver.open_device(api), stream)


def tiles_of(directory: Path, model: Model, run: Run, progress: Progress = silent) -> Tiles:
    """The package's quickest tiles on torch's GPU, measured at the first start."""
    from tpvc.compiler.backends.triton import tiles
    from tpvc.kernels import package

    def clock(work: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 20e3

    path = tiles.file_of(directory / KERNELS / package.MANIFEST, torch.cuda.get_device_name())
    return tiles.kept(path, lambda: tiles.chosen(model, linears_of(model), ROWS, run, clock, progress))


def capacity_of(directory: Path) -> int:
    """Tokens of a text for which the package's kernels were built."""
    return read_json(directory / FILE)["capacity"]


def candidates(model: Model, capacity: int) -> dict[str, list[tuple[Any, ...]]]:
    """{operation and sizes: ways to launch it, each a tuple of variants}: what the engine asks for with any number of
    slots, and for linears some tiles more to choose from."""
    from tpvc.kernels.aot import variant_of

    found: dict[str, list[tuple[Any, ...]]] = {}

    def add(key: str, launches: Sequence[Launch]) -> None:
        way = tuple(variant_of(launch) for launch in launches)
        if way not in found.setdefault(key, []):
            found[key].append(way)

    for launches in _asked(model, capacity):
        for launch in launches:
            if not launch.kernel.startswith("linear:"):
                digest = hashlib.sha256(variant_of(launch).key().encode()).hexdigest()
                add(f"{launch.kernel} {digest[:12]}", [launch])
    for sort, (weight, bias, bank) in linears_of(model).items():
        for rows in ROWS:
            x = torch.zeros(rows, weight.depth, dtype=model.dtype)
            ids = None if bank is None else torch.zeros(rows, dtype=torch.int32)
            for config in linear.configs(rows, weight, None if bank is None else bank.group):
                launches: list[Launch] = []
                linear.linear(x, weight, bias, bank, ids, config=config, run=launches.append)
                add(f"linear {sort} rows {rows}", launches)
    return found


def _asked(model: Model, capacity: int) -> Iterator[list[Launch]]:
    """What an engine launches: for prompts in chunks, and for a token of every slot."""
    for slots in SLOTS:
        launches: list[Launch] = []
        engine = Engine(model, slots, capacity, run=launches.append)
        if slots == 1:
            for chunk in CHUNKS:
                engine.lengths[0] = 0
                engine.admit([0] * min(chunk, capacity))
                engine.release(0)
        logits = engine.decode(torch.zeros(slots, dtype=torch.int64))
        engine.greedy(logits)
        yield launches


def linears_of(model: Model) -> dict[str, tuple[Slabs, Any, Any]]:
    """One (weight, bias, bank) of every sort of integer linear."""
    found = {}
    for step in model.steps:
        weight = model.params[step.params["weight"]] if step.op == "linear" else None
        if isinstance(weight, Slabs):
            params = {role: model.params[name] for role, name in step.params.items()}
            turns = "cosine" in params
            bank = linear.Bank(params["cosine"], params["sine"], step.attrs["group"]) if turns else None
            found.setdefault(linear.sort(weight, params.get("bias"), bank), (weight, params.get("bias"), bank))
    return found

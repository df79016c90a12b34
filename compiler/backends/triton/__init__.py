"""The Triton backend: a package of steps, packed weights and machine code for named GPUs, built without any of them.

triton.json          the steps, what each parameter is, and what the engine may be asked for
model.safetensors    packed integers, and floats in the dtype that the kernels compute in
kernels/             binaries and their manifest (`tpvc.kernels.package`)
tokenizer files
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from tpvc.compiler.backends.triton import sound
from tpvc.compiler.backends.triton.engine import CHUNKS, ROWS, Engine
from tpvc.compiler.backends.triton.forward import Choices, Pass, Want, blank, forward, tables
from tpvc.compiler.backends.triton.model import Model, Task, model_of
from tpvc.compiler.backends.triton.on_torch import OnTorch, caches_of
from tpvc.compiler.backends.triton.plan import recorded
from tpvc.compiler.backends.triton.steps import Step, kinds_of
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.weights import read_json, stored_in
from tpvc.compiler.output import MANIFEST
from tpvc.compiler.program import Facts, Program
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.sha256 import sha256
from tpvc.compiler.store import BlockStore
from tpvc.kernels.attention import Prefix
from tpvc.kernels.launch import Launch
from tpvc.kernels.rope_cache import Cache
from tpvc.kernels.slab import Slabs
from tpvc.kernels.targets import TARGETS, Target

if TYPE_CHECKING:
    from tpvc.compiler.backends.triton.on_gpu import OnGpu

FILE, WEIGHTS, KERNELS, FORMAT = "triton.json", "model.safetensors", "kernels", 2
DAMAGE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, AssertionError, RuntimeError)
DAMAGE += (StopIteration,)
"""What nonsense in a package raises, from torch too."""
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.int8)}


def emit(
    program: Program,
    directory: Path,
    tokenizer: Any,
    targets: Sequence[Target],
    dtype: torch.dtype,
    cache: torch.dtype | None = None,
    *,
    capacity: int | None = None,
    store: BlockStore | None = None,
    progress: Progress = silent,
) -> None:
    """Write the package into the empty `directory`. dtype: of activations, float16 or bfloat16; cache: of keys
    and values, int8 or None for what `model_of` takes; capacity: tokens of a text, None: 4,096 or the model's context;
    store: where compiled kernels are kept one by one, and those of a run that was stopped are found. The same input
    gives the same bytes."""
    from tpvc.kernels import aot, package

    model = model_of(program, dtype, cache)
    if "fp8" in kinds_of(model.steps).values() and not all(target.fp8 for target in targets):
        names = ", ".join(target.name for target in targets if not target.fp8)
        able = ", ".join(target.name for target in TARGETS if target.fp8)
        raise TpvcError(
            f"activations are rounded to fp8, which {names} cannot multiply; leave them out, choose among {able}, or"
            " quantise with --activations int8"
        )
    capacity = min(4096, program.facts.context_length) if capacity is None else capacity
    tensors, kinds = _stored(model)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    described = {
        "format": FORMAT,
        "dtype": str(dtype).removeprefix("torch."),
        "cache": str(model.cache).removeprefix("torch."),
        "facts": asdict(model.facts),
        "capacity": capacity,
        "slots": ROWS[-1],
        "adapters": list(model.adapters),
        "tasks": [asdict(task) for task in model.tasks],
        "params": kinds,
        "steps": [asdict(step) for step in model.steps],
    }
    (directory / FILE).write_text(json.dumps(described, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    built = aot.build(candidates(model, capacity), targets, progress=progress, store=store)
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
    for layer, prefix in enumerate(model.prefixes):
        tensors |= {f"prefix.{layer}.key": prefix.key, f"prefix.{layer}.value": prefix.value}
    return tensors, kinds


def read(directory: Path) -> Model:
    """The model of a package. TpvcError, one sentence, for a file that is damaged or missing."""
    path = directory / FILE
    if not path.is_file():
        raise TpvcError(f"{directory} has no {FILE}; expected a package of tpvc export --to triton")
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise TpvcError(f"{path} has format {found.get('format')!r}, this tpvc reads {FORMAT}; export the model again")
    try:
        model = _read(directory, found)
        sound.check(model)
        return model
    except DAMAGE as error:
        found = f"{type(error).__name__}: {str(error).strip():.200}"
        raise TpvcError(f"{path} is damaged ({found}); use an intact copy, or export the model again") from error


def read_unchanged(directory: Path) -> Model:
    """The model of a package that is to run: TpvcError also where what says how is not what was written. `tpvc verify`
    hashes the weights too."""
    from tpvc.kernels import package

    model, manifest = read(directory), directory / MANIFEST
    listed = read_json(manifest).get("files") if manifest.is_file() else None
    for file in (FILE, f"{KERNELS}/{package.MANIFEST}"):
        path = directory / file
        if isinstance(listed, dict) and file in listed and path.is_file() and sha256(path) != listed[file]:
            raise TpvcError(f"{path} was changed after it was written; use an intact copy, or export the model again")
    return model


def _read(directory: Path, found: dict[str, Any]) -> Model:
    there, params = stored_in(directory / WEIGHTS), {}
    for name, kind in found["params"].items():
        parts = ("words", "high", "scale", "zero") if kind["kind"] == "slabs" else ("",)
        held = {part: f"{name}.{part}" if part else name for part in parts}
        tensors = {part: there[own].read() for part, own in held.items() if own in there}
        if ("words" if kind["kind"] == "slabs" else "") not in tensors:
            raise TpvcError(f"{directory / WEIGHTS} lacks '{name}', which {FILE} names; use an intact copy")
        if kind["kind"] == "slabs":
            sizes = {key: kind[key] for key in ("depth", "bits", "group", "middle")}
            params[name] = Slabs(tensors["words"], *map(tensors.get, ("high", "scale", "zero")), **sizes)
        else:
            params[name] = tensors[""]
    facts = Facts(**{**found["facts"], "eos": tuple(found["facts"]["eos"])})
    steps = tuple(
        Step(s["op"], tuple(s["inputs"]), tuple(s["outputs"]), s["params"], s["attrs"]) for s in found["steps"]
    )
    tasks = tuple(Task(**task) for task in found["tasks"])
    counts = torch.tensor([task.tokens for task in tasks], dtype=torch.int32)
    layers = [i for i, _ in enumerate(s for s in steps if s.op == "attend")] if tasks else []
    prefixes = tuple(Prefix(*(there[f"prefix.{i}.{part}"].read() for part in ("key", "value")), counts) for i in layers)
    dtype, cache = DTYPES[found["dtype"]], DTYPES[found["cache"]]
    return Model(steps, params, facts, tuple(found["adapters"]), tasks, prefixes, dtype, cache)


def open_cpu(directory: Path) -> OnTorch:
    """The package with the references of its kernels, for one text. One token is tried: TpvcError where it fails."""
    model, capacity = read_unchanged(directory), capacity_of(directory)
    try:
        compute = OnTorch(model, 1, capacity)
        Engine(compute).admit([0])
    except DAMAGE as error:
        found = f"{type(error).__name__}: {str(error).strip():.200}"
        raise TpvcError(f"{directory} cannot be computed ({found}); use an intact copy, or export it again") from error
    return compute


def open_gpu(directory: Path, backend: str, slots: int = 1, progress: Progress = silent) -> OnGpu:
    """The package on the first GPU of this machine. backend: cuda or hip."""
    from tpvc.compiler.backends.triton import tiles
    from tpvc.compiler.backends.triton.on_gpu import OnGpu
    from tpvc.kernels import driver, package

    model, kernels = read_unchanged(directory), package.read(directory / KERNELS)
    device = driver.open_device(driver.open_api(backend))
    launcher = lambda stream: driver.launcher(kernels, device, stream)  # noqa: E731
    gpu = OnGpu(model, slots, capacity_of(directory), device, launcher)
    path = tiles.file_of(directory / KERNELS / package.MANIFEST, device.name)
    _, choices = asked(model, gpu.capacity, shapes_of([n for n in ROWS if n < 2 * slots]), gpu.caches)
    gpu.tiles = tiles.kept(path, choices, lambda: tiles.chosen(choices, gpu.seconds, progress))
    return gpu


def capacity_of(directory: Path) -> int:
    """Tokens of a text for which the package's kernels were built."""
    match read_json(directory / FILE):
        case {"capacity": int(capacity), "facts": {"context_length": int(context)}} if 0 < capacity <= context:
            return capacity
    raise TpvcError(f"{directory / FILE} does not say its capacity; use an intact copy, or export the model again")


def candidates(model: Model, capacity: int, rows: Sequence[int] | None = None) -> dict[str, list[tuple[Any, ...]]]:
    """{operation and sizes: ways to launch it, each a tuple of variants}: what the engine asks for with any number of
    slots, and for linears some tiles more to choose from. rows: of a decoding pass, None for the engine's."""
    from tpvc.kernels.aot import variant_of

    shapes = shapes_of(ROWS if rows is None else rows)

    found: dict[str, list[tuple[Any, ...]]] = {}

    def add(key: str, launches: Sequence[Launch]) -> None:
        way = tuple(variant_of(launch) for launch in launches)
        if way not in found.setdefault(key, []):
            found[key].append(way)

    launches, choices = asked(model, capacity, shapes)
    chosen = tuple(f"{module}:" for module in ("linear", "linear_a8", "attention"))
    for launch in launches:
        if not launch.kernel.startswith(chosen):
            digest = hashlib.sha256(variant_of(launch).key().encode()).hexdigest()
            add(f"{launch.kernel} {digest[:12]}", [launch])
    for (sort, count), works in choices.items():
        for work in works.values():
            add(f"{sort} rows {count}", recorded(lambda run, work=work: work(run=run))[0])
    return found


def shapes_of(rows: Sequence[int]) -> list[tuple[int, int, Want]]:
    """(rows, tokens a row, what is wanted) of every pass of an engine whose decoding passes have so many rows."""
    prompts = [(1, size, want) for size in CHUNKS for want in ("nothing", "logits", "greedy", "sample")]
    return prompts + [(count, 1, want) for count in rows for want in ("logits", "greedy", "sample")]


def asked(
    model: Model, capacity: int, shapes: Sequence[tuple[int, int, Want]], caches: Sequence[Cache] | None = None
) -> tuple[list[Launch], Choices]:
    """What passes of such shapes launch, and for what they may choose tiles. caches: none for imagined ones."""
    caches = caches_of(model, ROWS[-1], capacity, "meta") if caches is None else caches
    turning, launches, choices = tables(model, model.facts.context_length), [], {}
    for rows, size, want in shapes:
        now = Pass(model, blank(model, rows, size, "meta"), caches, turning, None, {}, {}, choices)
        launches += recorded(lambda run, now=now, want=want: forward(replace(now, run=run), want))[0]
    return launches, choices

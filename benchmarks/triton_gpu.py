"""The Triton kernels on a GPU: every figure of docs/triton.md that needs a card, in one run.

    python benchmarks/triton_gpu.py -o triton_gpu
    python benchmarks/triton_gpu.py -o triton_gpu --parts linear,road --rows 1,16,64
    python benchmarks/triton_gpu.py -o triton_gpu --shape tiny --parts model,start

linear  W4A16, groups of 128, at the sizes of Llama-3-8B's linears: time beside torch in 16 bits (cuBLAS), gemlite, and
        the floor, which is the larger of bytes / bandwidth and products / rate. Both are measured first, with a copy of
        1 GB and a large product in torch
road    the same with 16 adapters in the epilogue, row by row; and torch's product followed by LoRA of rank 16
model   decoding a model of that shape with random integers, 1, 8 and 32 rows: tokens a second, the share of the floor,
        and how much of a step is not kernels (a step's time less that of the same graph launched behind another)
start   a process that opens the package and writes a token, and what a JIT compiler would have compiled for that

torch with CUDA and gemlite are peers: without them their columns are empty. Our part needs a driver alone. Times are
medians of launches between two events, each after 256 MB were written, so that weights come from memory. The package
is built first, for the card that is found, and kept in OUT.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tpvc.compiler.backends import triton
from tpvc.compiler.backends.triton import tiles
from tpvc.compiler.backends.triton.engine import ROWS as DECODED
from tpvc.compiler.backends.triton.engine import Engine
from tpvc.compiler.backends.triton.model import Model
from tpvc.compiler.backends.triton.on_gpu import OnGpu
from tpvc.compiler.backends.triton.side_by_side import side_by_side
from tpvc.compiler.backends.triton.steps import steps
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.program import Program
from tpvc.kernels import aot, driver, linear, package
from tpvc.kernels.linear import Bank
from tpvc.kernels.slab import Slabs, dequantise, pack_floats
from tpvc.kernels.targets import named

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}
TINY = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {"llama-3-8b": LLAMA, "tiny": TINY | {"num_key_value_heads": 2, "vocab_size": 1024}}
ROWS, BATCHES, PROMPT, NEW = (1, 2, 4, 8, 16, 32, 64, 128, 256), (1, 8, 32), 128, 64
CAPACITY, GROUP, ADAPTERS, RANK = 1024, 128, 16, 16


def integers(out: int, depth: int, generator: torch.Generator) -> Slabs:
    """A random matrix of 4 bits, asymmetric, whose products have about the size of what goes in."""
    words = torch.randint(-(2**31), 2**31 - 1, (depth // 8, out), dtype=torch.int32, generator=generator)
    scale = torch.full((depth // GROUP, out), depth**-0.5 / 5, dtype=torch.float16)
    zero = torch.full((depth // GROUP, out), 8, dtype=torch.uint8)
    return Slabs(words, None, scale, zero, depth, 4, GROUP, 8)


def model_of(config: dict) -> Model:
    """A model of that shape with random integers, one matrix of each sort in main memory; the head in 16 bits."""
    drawn, generator = architecture(config), torch.Generator().manual_seed(0)
    empty = {name: torch.empty(shape, device="meta") for name, shape in drawn.shapes.items()}
    planned, params = steps(Program(drawn.nodes, empty, drawn.facts)), {}
    for step in planned:
        for name in step.params.values():
            shape = drawn.shapes[name]
            if name in params:
                continue
            if step.op == "linear" and "lm_head" not in name:
                params[name] = integers(*shape, generator)
            elif step.op == "linear":
                params[name] = pack_floats((torch.randn(shape, generator=generator) * shape[1] ** -0.5).half())
            else:
                params[name] = (
                    torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator)
                ).half()
    planned, params = side_by_side(planned, params)
    return Model(planned, params, drawn.facts, (), (), (), torch.float16, torch.float16)


def with_adapters(model: Model, count: int) -> Model:
    """Every linear of the blocks turned by one of `count` adapters."""
    params, changed = dict(model.params), []
    for step in model.steps:
        if step.op == "linear" and "lm_head" not in step.params["weight"]:
            width = model.params[step.params["weight"]].width
            angle = torch.randn(count, width // 64, 32).repeat(1, 1, 2).flatten(1)
            bank = {"cosine": f"{step.params['weight']}.cosine", "sine": f"{step.params['weight']}.sine"}
            params |= {bank["cosine"]: angle.cos().half(), bank["sine"]: angle.sin().half()}
            attrs = {"group": 64, "rows": tuple(range(count))}
            step = replace(step, params={**step.params, **bank}, attrs={**step.attrs, **attrs})
        changed.append(step)
    return replace(model, steps=tuple(changed), params=params, adapters=tuple(f"a{i}" for i in range(count)))


def built(model: Model, rows: Sequence[int], device: driver.Device, folder: Path) -> tuple[package.Package, float]:
    """The package for this card, from `folder` if it is there, and the seconds that its build took. With other rows
    than an engine's, that of the linears: with adapters and without."""
    note = folder / "seconds.json"
    if not note.is_file():
        start = time.perf_counter()
        target = named(f"{device.backend}:{device.arch}")
        show = lambda what, done, total, text: print(f"\r{what} {done}/{total}", end="", file=sys.stderr)  # noqa: E731
        wanted = triton.candidates(model, CAPACITY, rows)
        if rows != DECODED:
            wanted |= triton.candidates(with_adapters(model, ADAPTERS), CAPACITY, rows)
        package.write(folder, aot.build(wanted, [target], progress=show).kept)
        note.write_text(json.dumps(time.perf_counter() - start))
    return package.read(folder), json.loads(note.read_text())


def peer(work) -> float | None:
    """Seconds of a torch call on its GPU, measured as ours are."""
    flush, times = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda"), []
    for _ in range(3):
        work()
    for _ in range(5):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def rates(gpu: OnGpu) -> tuple[float, float | None]:
    """Bytes a second of a copy, both ways counted, and products a second of a large matrix product, if torch can."""
    size = 2**30
    a, b = (gpu.device.alloc(size) for _ in range(2))
    times = []
    for _ in range(5):
        start, end = gpu.device.event(), gpu.device.event()
        gpu.device.record(start, gpu.stream)
        gpu.device.copy(b, a, gpu.stream)
        gpu.device.record(end, gpu.stream)
        times.append(gpu.device.elapsed(start, end) / 1e3)
    for memory in (a, b):
        gpu.device.free(memory)
    products = None
    if torch.cuda.is_available():
        x = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
        products = 2 * 8192**3 / peer(lambda: x @ x)
    return 2 * size / min(times[1:]), products


def gemlite_of(weight: Slabs):
    """gemlite's linear with the same integers; None where it is not installed."""
    try:
        from gemlite.core import DType, GemLiteLinearTriton
    except ImportError:
        return None
    made = GemLiteLinearTriton(4, GROUP, weight.depth, weight.width, DType.FP16, DType.FP16)
    words = weight.words.unflatten(0, (-1, 1, 16)).long()
    codes = ((words >> (4 * torch.arange(8)).view(1, 8, 1, 1)) & 15).flatten(0, 2).T.contiguous()
    shape = (weight.width * weight.depth // GROUP, 1)
    scales, zeros = weight.scale.T.reshape(shape), weight.zero.T.reshape(shape).half()
    made.pack(codes.to(torch.uint8).cuda(), scales.cuda(), zeros.cuda(), None)
    return made


def one_linear(gpu: OnGpu, weight: Slabs, rows: int, rates: tuple[float, float | None], with_road: bool) -> dict:
    """Seconds of one linear at one number of rows, ours and the peers'."""
    bandwidth, products = rates
    moved = sum(t.numel() * t.element_size() for t in weight.tensors.values()) + 2 * rows * (
        weight.depth + weight.width
    )
    work = 2 * rows * weight.depth * weight.width
    floor = max(moved / bandwidth, 0 if products is None else work / products)
    found = {
        "in": weight.depth,
        "out": weight.width,
        "rows": rows,
        "floor": floor,
        "ours": ours(gpu, weight, rows, None),
    }
    if with_road:
        angle = torch.randn(ADAPTERS, weight.width // 64, 32).repeat(1, 1, 2).flatten(1)
        found["road"] = ours(gpu, weight, rows, Bank(angle.cos().half(), angle.sin().half(), 64))
    if torch.cuda.is_available():
        dense = dequantise(weight, torch.float16).cuda()
        x = torch.randn(rows, weight.depth, device="cuda", dtype=torch.float16)
        found["torch"] = peer(lambda: x @ dense.T)
        a = torch.randn(rows, weight.depth, RANK, device="cuda", dtype=torch.float16)
        b = torch.randn(rows, RANK, weight.width, device="cuda", dtype=torch.float16)
        found["lora"] = peer(lambda: x @ dense.T + ((x[:, None] @ a) @ b)[:, 0])
        other = gemlite_of(weight)
        if other is not None:
            found["gemlite"] = peer(lambda: other(x))
    return found


def ours(gpu: OnGpu, weight: Slabs, rows: int, bank: Bank | None) -> float:
    """The quickest of the tiles that the package has."""
    times = []
    x = torch.empty(rows, weight.depth, dtype=torch.float16, device="meta")
    ids = None if bank is None else torch.empty(rows, dtype=torch.int32, device="meta")
    for config in linear.configs(rows, weight, None if bank is None else bank.group):
        with contextlib.suppress(TpvcError):  # the build kept others
            work = partial(linear.linear, x, weight, None, bank, ids, config=config)
            times.append(gpu.seconds(lambda run, work=work: work(run=run)))
    return min(times)


def timed(gpu: OnGpu, folder: Path) -> None:
    """Give a model its quickest tiles, which are timed once for a package in `folder`."""
    _, choices = triton.asked(gpu.model, CAPACITY, triton.shapes_of(DECODED), gpu.caches)
    gpu.tiles = tiles.kept(folder.with_suffix(".tiles.json"), choices, lambda: tiles.chosen(choices, gpu.seconds))


def measure_linear(gpu: OnGpu, rows: list[int], with_road: bool, out) -> None:
    bandwidth, products = speeds = rates(gpu)
    rate = "unknown" if products is None else f"{products / 1e12:.0f} T"
    print(f"\ncopy {bandwidth / 1e12:.2f} TB/s, products {rate} a second; {gpu.device.name}")
    print("| in, out | rows | ours us | of floor | torch fp16 | gemlite | with 16 adapters | torch and LoRA |")
    print("|---|---|---|---|---|---|---|---|")
    weights = [gpu.model.params[s.params["weight"]] for s in gpu.model.steps if s.op == "linear"]
    sorts = list({(w.depth, w.width): w for w in weights if w.bits == 4}.values())
    for weight, m in itertools.product(sorts, rows):
        row = one_linear(gpu, weight, m, speeds, with_road)
        out.write(json.dumps(row) + "\n")
        others = [f"{row[key] * 1e6:.1f}" if key in row else "" for key in ("torch", "gemlite", "road", "lora")]
        shown = [f"{weight.depth}, {weight.width}", m, f"{row['ours'] * 1e6:.1f}", f"{row['floor'] / row['ours']:.0%}"]
        print("| " + " | ".join(map(str, [*shown, *others])) + " |", flush=True)


def measure_model(gpu: OnGpu, out) -> None:
    bandwidth, _ = rates(gpu)
    weights = sum(
        t.numel() * t.element_size()
        for s in gpu.model.steps
        if s.op == "linear"
        for t in gpu.model.params[s.params["weight"]].tensors.values()
    )
    print("\n| rows | tokens/s | ms a step | of floor | outside kernels |\n|---|---|---|---|---|")
    for rows in (n for n in BATCHES if n <= gpu.slots):
        engine = Engine(gpu)
        slots = [engine.admit([(i * 7919 + 1) % 1000 for i in range(PROMPT)])[0] for _ in range(rows)]
        times = []
        for _ in range(NEW):
            start = time.perf_counter()
            engine.decode(slots, [1] * rows, "greedy").tolist()
            times.append(time.perf_counter() - start)
        step = statistics.median(times[4:])
        graph = gpu.replays[rows, 1, "greedy"].graph
        start, end = gpu.device.event(), gpu.device.event()
        gpu.device.replay(graph, gpu.stream)
        gpu.device.record(start, gpu.stream)
        gpu.device.replay(graph, gpu.stream)
        gpu.device.record(end, gpu.stream)
        busy = gpu.device.elapsed(start, end) / 1e3
        facts = gpu.model.facts
        cached = 4 * facts.layers * facts.kv_heads * facts.head_dim * (PROMPT + NEW // 2) * rows
        floor = (weights + cached) / bandwidth
        out.write(json.dumps({"rows": rows, "step": step, "busy": busy, "floor": floor}) + "\n")
        print(
            f"| {rows} | {rows / step:.0f} | {step * 1e3:.2f} | {floor / step:.0%} | {1 - busy / step:.0%} |",
            flush=True,
        )
        for slot in slots:
            engine.release(slot)


def measure_start(gpu: OnGpu, folder: Path, shape: str, build: float, out) -> None:
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"\nbinaries: {size / 1e6:.1f} MB, built in {build:.0f} s")
    command = [sys.executable, __file__, "--first-token", str(folder), "--shape", shape]
    done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    print(f"first token of a new process: {done['seconds']:.1f} s, of which weights made {done['weights']:.1f} s")
    jobs = {}
    for launch in triton.asked(gpu.model, CAPACITY, [(1, 128, "greedy")])[0]:
        variant = aot.variant_of(launch)
        jobs[variant.key()] = (variant, named(f"{gpu.device.backend}:{gpu.device.arch}"))
    start = time.perf_counter()
    aot.compile_all(list(jobs.values()), None, 1)
    jit = time.perf_counter() - start
    out.write(json.dumps({"bytes": size, "build": build, "jit": jit, **done}) + "\n")
    print(f"what a JIT compiler would have compiled for it: {len(jobs)} kernels in {jit:.1f} s")


def opened(shape: str, rows: Sequence[int], folder: Path, slots: int, backend: str) -> tuple[OnGpu, float]:
    model = model_of(SHAPES[shape])
    device = driver.open_device(driver.open_api(backend))
    kernels, build = built(model, rows, device, folder)
    launcher = lambda stream: driver.launcher(kernels, device, stream)  # noqa: E731
    return OnGpu(model, slots, CAPACITY, device, launcher), build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--parts", default="linear,road,model,start")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--first-token", help=argparse.SUPPRESS)
    args = parser.parse_args()
    backend = driver.present()
    if backend is None:
        sys.exit("there is no GPU: these figures need one")
    if args.first_token:
        start = time.perf_counter()
        gpu, _ = opened(args.shape, DECODED, Path(args.first_token), 1, backend)
        weights = time.perf_counter() - start
        timed(gpu, Path(args.first_token))
        Engine(gpu).admit(list(range(100)), want="greedy")
        return print(json.dumps({"seconds": time.perf_counter() - start, "weights": weights}))
    args.out.mkdir(parents=True, exist_ok=True)
    parts = args.parts.split(",")
    with (args.out / "results.jsonl").open("a") as out:
        if {"linear", "road"} & set(parts):
            rows = [int(m) for m in args.rows.split(",")]
            gpu, _ = opened(args.shape, rows, args.out / "linears", 1, backend)
            measure_linear(gpu, rows, "road" in parts, out)
        if {"model", "start"} & set(parts):
            gpu, build = opened(args.shape, DECODED, args.out / "model", max(BATCHES), backend)
            timed(gpu, args.out / "model")
            if "model" in parts:
                measure_model(gpu, out)
            if "start" in parts:
                measure_start(gpu, args.out / "model", args.shape, build, out)


if __name__ == "__main__":
    main()

"""What adapters cost while decoding in plain ONNX Runtime: none, RoAd and LoRA on one integer base.

    python benchmarks/road_onnx.py ARTEFACT -o road_onnx

ARTEFACT is a directory that `tpvc quantize` made, or `wide`: four blocks with the sizes of Llama-3.2-1B (2048 features,
8192 inside) and random integers, since the share of the adapters falls with the width of the linears.

Three graphs are measured turn by turn: the base; one with as many adapters as rows on every linear of every block
(road_1, random), as tpvc exports it; and the base's graph with a LoRA of rank 8 behind every MatMulNBits of the blocks,
batched in the usual way: A and B gathered by the row's id, two MatMul, Add. Packed q, k and v get one LoRA, which
favours it. Every row has an adapter of its own and 128 tokens in a shared key/value buffer, and takes one more token.
"quiet" is the 10th percentile, for machines that do other work too; the ratios are medians over neighbouring steps.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper

from tpvc.compiler import frontends
from tpvc.compiler.adapters.road import Road, Rotation
from tpvc.compiler.backends.onnx import emit
from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.program import Grid, Program, QTensor, linears
from tpvc.passes.bank_road import BankRoad

PAST, BUFFER = 128, 256
RANK = 8


def random_roads(program: Program, count: int) -> tuple[Road, ...]:
    """road_1 for all linears of the blocks, in the largest groups up to 64 that fit all of them."""
    outputs = {
        n.name: program.params[n.params["weight"]].shape[0] for n in linears(program.nodes) if n.block is not None
    }
    group, generator = math.gcd(64, *outputs.values()), torch.Generator().manual_seed(0)

    def rotation(n: int) -> Rotation:
        theta, alpha = torch.randn(2, n // 2, generator=generator)
        return Rotation("road_1", group, theta / 10, 1 + alpha / 10)

    return tuple(Road(f"task{i}", {name: rotation(n) for name, n in outputs.items()}) for i in range(count))


def wide() -> Program:
    """Llama-3.2-1B's block four times, W4 in groups of 64, an 8-bit head of 32,000 rows; random codes."""
    config = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    drawn, draw = architecture(config), torch.Generator().manual_seed(0)
    params = {}
    for name, shape in drawn.shapes.items():
        if len(shape) == 1:
            params[name] = torch.ones(shape)
            continue
        grid = Grid(8, -1, True) if "embed" in name else Grid(4, 64, False)
        codes = torch.randint(2**grid.bits, shape, dtype=torch.uint8, generator=draw)
        scale = torch.full((shape[0], shape[1] // grid.columns(shape[1])), shape[1] ** -0.5 / 2 ** (grid.bits - 2))
        zero = None if grid.symmetric else torch.full_like(scale, 8, dtype=torch.uint8)
        if zero is not None:
            zero[0] = 7
        params[name] = QTensor(codes, scale, zero, grid)
    return Program(drawn.nodes, params, drawn.facts)


def write_lora(base: Path, out: Path, count: int, blocks: set[str]) -> None:
    """The graph in `base` with `count` adapters behind every MatMulNBits of the blocks, chosen by `adapter_ids` [B]."""
    model = onnx.load(base / "model.onnx", load_external_data=False)
    graph, rng, nodes = model.graph, np.random.default_rng(0), []
    for node in graph.node:
        nodes.append(node)
        name = node.name.split("/")[0]
        if node.op_type != "MatMulNBits" or not (name in blocks or name.endswith(".qkv")):
            continue
        sizes = {a.name: a.i for a in node.attribute}
        value = node.output[0]
        node.output[0] = f"{value}.base"
        for part, shape in (("A", (sizes["K"], RANK)), ("B", (RANK, sizes["N"]))):
            bank = rng.standard_normal((count, *shape), dtype=np.float32) * 0.01
            graph.initializer.append(numpy_helper.from_array(bank, f"{value}.{part}"))
            nodes.append(
                helper.make_node("Gather", [f"{value}.{part}", "adapter_ids"], [f"{value}.{part}.rows"], axis=0)
            )
        nodes.append(helper.make_node("MatMul", [node.input[0], f"{value}.A.rows"], [f"{value}.low"]))
        nodes.append(helper.make_node("MatMul", [f"{value}.low", f"{value}.B.rows"], [f"{value}.lora"]))
        nodes.append(helper.make_node("Add", [f"{value}.base", f"{value}.lora"], [value]))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info("adapter_ids", onnx.TensorProto.INT64, ["batch_size"]))
    out.mkdir()
    shutil.copy(base / "model.onnx.data", out / "model.onnx.data")
    onnx.save(model, out / "model.onnx")


def open_step(directory: Path, rows: int, adapters: bool, threads: int) -> Callable[[], object]:
    """A function that decodes one token of `rows` rows, each with PAST tokens before it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    model = ort.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])
    feeds = {
        "input_ids": np.full((rows, 1), 5, np.int64),
        "attention_mask": np.ones((rows, PAST + 1), np.int64),
    }
    if adapters:
        feeds["adapter_ids"] = np.arange(rows, dtype=np.int64)
    binding, held, rng = model.io_binding(), [], np.random.default_rng(1)

    def bound(array: np.ndarray) -> ort.OrtValue:
        held.append(ort.OrtValue.ortvalue_from_numpy(array))
        return held[-1]

    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, bound(array))
    for slot in model.get_inputs():
        if slot.name.startswith("past"):
            past = rng.standard_normal((rows, slot.shape[1], BUFFER, slot.shape[3]), dtype=np.float32)
            value = bound(past)
            binding.bind_ortvalue_input(slot.name, value)
            binding.bind_ortvalue_output(slot.name.replace("past_key_values", "present"), value)
    binding.bind_output("logits")

    return lambda: (model.run_with_iobinding(binding), held)


def measure(
    steps: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, np.ndarray]:
    """{name: seconds of every step}: the graphs take turns of two steps, of which the second counts."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            step()
            began = clock()
            step()
            found[name].append(clock() - began)
    return {name: np.array(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact")
    parser.add_argument("-o", "--out", type=Path, default=Path("road_onnx"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for every number of rows")
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine: CPU seconds of one thread")
    args = parser.parse_args()
    args.threads = 1 if args.cpu_time else args.threads
    args.out.mkdir(parents=True, exist_ok=True)
    program = wide() if args.artefact == "wide" else frontends.load(args.artefact)
    blocks = {n.name for n in linears(program.nodes) if n.block is not None}
    found = []
    print("| rows | base, ms (quiet) | RoAd | LoRA | RoAd / base | LoRA / base |\n|---|---|---|---|---|---|")
    for rows in args.rows:
        folders = {name: args.out / f"{name}-{rows}" for name in ("base", "road", "lora")}
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        for name, given in (("base", program), ("road", BankRoad(random_roads(program, rows))(program))):
            folders[name].mkdir()
            emit(given, folders[name], None)
        write_lora(folders["base"], folders["lora"], rows, blocks)
        steps = {name: open_step(folder, rows, name != "base", args.threads) for name, folder in folders.items()}
        times = measure(steps, args.seconds, time.thread_time if args.cpu_time else time.perf_counter)
        ms = {name: [1000 * float(np.percentile(t, p)) for p in (50, 10)] for name, t in times.items()}
        ratio = {name: float(np.median(times[name] / times["base"])) for name in ("road", "lora")}
        found.append({"rows": rows, "steps": len(times["base"]), "median and quiet ms": ms, "ratio": ratio})
        cells = [f"{ms[name][0]:.2f} ({ms[name][1]:.2f})" for name in times]
        print(f"| {rows} | {' | '.join(cells)} | {ratio['road']:.3f} | {ratio['lora']:.3f} |", flush=True)
        for folder in folders.values():
            shutil.rmtree(folder)
    (args.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

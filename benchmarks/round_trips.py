"""Every width, group and symmetry through every format, and back: do integers, scales and zero points come back?

    python benchmarks/round_trips.py -o round_trips [--only WORD]

Out: one random integer matrix for each linear of a block (codes over all of their range, scales exact in float16, zero
points from 0, or from 1) is written by an exporter and read back by something else than what wrote it:

    compressed-tensors   `unpack_from_int32` and `decompress` of that package, with its own reading of the config
    GPTQ, AWQ            bit by bit, as the layouts are described (`packed_layouts.py`)
    ONNX                 the initializers of both graphs and the attributes of their nodes; single matrices bit by bit
                         too, and multiplied by the identity in ONNX Runtime
    Triton package       its slabs

In: such matrices are packed by the compressed-tensors package, the gguf package, or bit by bit, and read by tpvc.

A cell is exact (all numbers bit for bit), refused (TpvcError, before anything is written or read) or differs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packed_layouts import AWQ_ORDER, awq_integers, gptq_integers
from safetensors.torch import load_file, save_file

from tpvc.compiler import frontends
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, Program, QTensor, linears, read

BITS, GROUPS = range(2, 9), (16, 32, 64, 128, -1, 0)
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 64, "tie_word_embeddings": False}
Matrices = dict[str, QTensor]


@dataclass(frozen=True)
class Cell:
    """zeros: the least zero point; None where weights are symmetric."""

    grid: Grid
    zeros: int | None

    def __str__(self) -> str:
        return f"{self.grid}{'' if self.zeros is None else f', zero points from {self.zeros}'}"


def cells(groups: tuple[int, ...] = GROUPS, widths: Any = BITS) -> Iterator[Cell]:
    for bits in widths:
        for group in groups:
            yield Cell(Grid(bits, group, True), None)
            yield from (Cell(Grid(bits, group, False), zeros) for zeros in (0, 1))


def random_matrix(shape: tuple[int, int], cell: Cell, seed: int) -> QTensor:
    random, grid = np.random.default_rng(seed), cell.grid
    rows, columns = shape
    count = (1, 1) if grid.group == 0 else (rows, columns // grid.columns(columns))
    codes = random.integers(0, 2**grid.bits, shape, dtype=np.uint8)
    scale = random.uniform(0.5, 1.5, count).astype(np.float16).astype(np.float32) / 2**grid.bits
    zero = None if cell.zeros is None else random.integers(cell.zeros, 2**grid.bits, count, dtype=np.uint8)
    if zero is not None:
        zero.flat[0] = cell.zeros
    return QTensor(*(a if a is None else torch.from_numpy(a) for a in (codes, scale, zero)), grid, torch.float16)


def matrices_of(program: Program, cell: Cell) -> Matrices:
    named = [n.params["weight"] for n in linears(program.nodes) if n.block is not None]
    return {name: random_matrix(tuple(program.params[name].shape), cell, i) for i, name in enumerate(named)}


def check(name: str, wanted: QTensor, codes: Any, scale: Any, zero: Any) -> None:
    """AssertionError for the first part that is not bit for bit the same; scales of a row may be repeated."""
    rows, half = wanted.shape[0], 2 ** (wanted.grid.bits - 1)
    zero = half if zero is None else zero
    there = {"codes": codes, "scales": scale, "zero points": zero}
    here = {"codes": wanted.codes, "scales": wanted.scale, "zero points": half if wanted.zero is None else wanted.zero}
    groups = wanted.scale.shape[1]
    for part, value in there.items():
        ours = torch.as_tensor(here[part]).double()
        theirs = torch.as_tensor(np.asarray(value)).double()
        if part != "codes":
            ours, theirs = (t.reshape(-1, t.shape[-1] if t.ndim else 1).expand(rows, -1) for t in (ours, theirs))
            width = max(ours.shape[1], theirs.shape[1], groups)
            ours, theirs = (t.repeat_interleave(width // t.shape[1], 1) for t in (ours, theirs))
        assert torch.equal(ours, theirs), f"{part} of {name}"


# Out.


def back_from_compressed_tensors(folder: Path, wanted: Matrices) -> None:
    from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    tensors = load_file(folder / "model.safetensors")
    said = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    named = {target: scheme for scheme in said.config_groups.values() for target in scheme.targets}
    for name, q in wanted.items():
        own = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(name)}
        scheme = named.get(name.removesuffix(".weight")) or named["Linear"]
        bits = scheme.weights.num_bits
        half = 2 ** (bits - 1)
        if "weight_packed" in own:
            codes = unpack_from_int32(own["weight_packed"], bits, torch.Size(own["weight_shape"].tolist()))
            packer = PackedQuantizationCompressor
        else:
            codes, packer = own["weight"], NaiveQuantizationCompressor
        zero = own.get("weight_zero_point")
        if zero is not None and zero.dtype == torch.int32:
            zero = unpack_from_int32(zero, bits, torch.Size((len(codes), own["weight_scale"].shape[1])), packed_dim=0)
        assert scheme.weights.symmetric == (zero is None) == q.grid.symmetric
        zero = None if zero is None else zero.short() + half
        check(name, q, codes.short() + half, own["weight_scale"].float(), zero)
        means = packer.decompress(own, scheme)["weight"]
        assert torch.equal(means, q.dequantize().to(means.dtype)), f"what {name} means"


def back_from_gptq(folder: Path, wanted: Matrices) -> None:
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    for name, own in _modules(folder, wanted):
        codes, zeros, scales, groups = gptq_integers(own, said["bits"], said["checkpoint_format"] == "gptq_v2")
        assert (groups == np.arange(len(groups)) // (len(groups) // scales.shape[1])).all()
        check(name, wanted[name], codes, scales, zeros)


def back_from_awq(folder: Path, wanted: Matrices) -> None:
    for name, own in _modules(folder, wanted):
        codes, zeros, scales = awq_integers(own)
        check(name, wanted[name], codes, scales, zeros)


def _modules(folder: Path, wanted: Matrices) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    tensors = load_file(folder / "model.safetensors")
    for name in wanted:
        module = name.removesuffix("weight")
        yield name, {key.removeprefix(module): t.numpy() for key, t in tensors.items() if key.startswith(module)}


def back_from_folder(folder: Path, program: Program) -> None:
    """As `tpvc verify` reads it: every number, and every attribute that says how it lies."""
    from tpvc.compiler.progress import silent
    from tpvc.compiler.verification import matrices, onnx_numbers, triton_numbers

    numbers = triton_numbers if (folder / "triton.json").is_file() else onnx_numbers
    matrices.compare(program, numbers.read(folder, program), str(folder), "the matrices", silent)


def back_from_matmulnbits(folder: Path, wanted: Matrices) -> None:
    """Matrices that are not stacked: bits by the operator's description, and multiplied by the identity."""
    import onnx

    model = onnx.load(folder / "model.onnx")
    arrays = {a.name: a for a in model.graph.initializer}
    for node in (n for n in model.graph.node if n.op_type == "MatMulNBits"):
        name = node.input[1].removesuffix(".codes")
        if name not in wanted:
            continue
        told = {a.name: a.i for a in node.attribute}
        packed, scales, *zeros = (onnx.numpy_helper.to_array(arrays[part]) for part in node.input[1:] if part)
        bits, block, rows = told["bits"], told["block_size"], told["N"]
        count = -(-told["K"] // block)
        codes = _fields(packed.reshape(rows, -1), bits)[:, : told["K"]]
        zero = np.full((rows, count), 2 ** (bits - 1))
        if zeros:
            zero = _fields(zeros[0].reshape(rows, -1), bits)[:, :count]
        spread = [np.repeat(part.reshape(rows, count), block, 1)[:, : told["K"]] for part in (zero, scales)]
        q = wanted[name]
        groups, shift = q.scale.shape[1], 0 if q.zero is not None else 2 ** (bits - 1) - 2 ** (q.grid.bits - 1)
        padded = told["K"] // groups if told["K"] % groups == 0 else told["K"]
        assert padded >= q.shape[1] // groups
        keep = np.arange(told["K"]).reshape(groups, -1)[:, : q.shape[1] // groups].ravel()
        zero, scale = (part[:, keep] for part in spread)
        check(name, q, codes[:, keep] - shift, scale, zero - shift)
        if told["K"] == q.shape[1]:
            means = _multiplied(node, arrays, told["K"])
            assert np.array_equal(means.T, q.dequantize().numpy()), f"what {name} means"


def _fields(packed: np.ndarray, bits: int) -> np.ndarray:
    told = np.unpackbits(packed, axis=1, bitorder="little")
    return told.reshape(len(packed), -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def _multiplied(node: Any, arrays: dict[str, Any], columns: int) -> np.ndarray:
    """The identity times the matrix of one node, in ONNX Runtime, in float32."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    kept = [helper.make_attribute(a.name, a.i) for a in node.attribute if a.name != "accuracy_level"]
    lone = helper.make_node("MatMulNBits", ["x", *node.input[1:]], ["y"], domain="com.microsoft")
    lone.attribute.extend(kept)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph([lone], "one", ends[:1], ends[1:], [arrays[name] for name in node.input[1:] if name])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    bytes_ = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(bytes_, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": np.eye(columns, dtype=np.float32)})[0]


def out_checkpoint(runtime: str, back: Callable[[Path, Matrices], None]) -> Callable[[Program, Matrices, Path], None]:
    def through(program: Program, wanted: Matrices, folder: Path) -> None:
        from tpvc.compiler.backends import huggingface

        huggingface.emit(program, folder, None, {}, runtime=runtime)
        back(folder, wanted)

    return through


def out_onnx(program: Program, wanted: Matrices, folder: Path) -> None:
    from tpvc.compiler.backends import onnx

    folder.mkdir()
    onnx.emit(program, folder, None, accuracy_level=0)
    back_from_folder(folder, program)
    back_from_matmulnbits(folder, wanted)


def out_portable(program: Program, wanted: Matrices, folder: Path) -> None:
    from tpvc.compiler.backends import onnx

    folder.mkdir()
    onnx.emit(program, folder, None, portable=True)
    back_from_folder(folder / "portable", program)


def out_triton(program: Program, wanted: Matrices, folder: Path) -> None:
    """For no GPU: nothing is compiled."""
    from tpvc.compiler.backends import triton

    folder.mkdir()
    triton.emit(program, folder, None, (), torch.float16)
    back_from_folder(folder, program)


OUT = {
    "compressed-tensors, `quantize`": out_checkpoint("transformers", back_from_compressed_tensors),
    "compressed-tensors, `--to vllm`": out_checkpoint("vllm", back_from_compressed_tensors),
    "GPTQ version 1": out_checkpoint("gptq", back_from_gptq),
    "GPTQ version 2": out_checkpoint("gptq_v2", back_from_gptq),
    "AWQ": out_checkpoint("awq", back_from_awq),
    "ONNX, MatMulNBits": out_onnx,
    "ONNX, portable": out_portable,
    "Triton package": out_triton,
}


# In.


def in_compressed(form: str) -> Callable[[Program, Matrices, Path], None]:
    def through(program: Program, wanted: Matrices, folder: Path) -> None:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        grid = next(iter(wanted.values())).grid
        half, tensors = 2 ** (grid.bits - 1), {}
        for name, q in wanted.items():
            signed = (q.codes.short() - half).to(torch.int8)
            if form == "pack-quantized":
                tensors[f"{name}_packed"] = pack_to_int32(signed, grid.bits)
                tensors[f"{name}_shape"] = torch.tensor(q.shape)
            else:
                tensors[name] = signed
            scales = (1,) if grid.group == 0 else tuple(q.scale.shape)
            tensors[f"{name}_scale"] = q.scale.half().reshape(scales)
            if q.zero is not None:
                zero = (q.zero.short() - half).to(torch.int8).reshape(scales)
                if form == "pack-quantized" and grid.group != 0:
                    zero = pack_to_int32(zero, grid.bits, packed_dim=0).contiguous()
                tensors[f"{name}_zero_point"] = zero
        strategy = {0: "tensor", -1: "channel"}.get(grid.group, "group")
        weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "strategy": strategy}
        weights |= {"group_size": grid.group if grid.group > 0 else None, "dynamic": False}
        group = {"targets": ["Linear"], "weights": weights}
        said = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
        _read_back(program, wanted, folder, tensors, {**said, "ignore": ["lm_head"]})

    return through


def _packed_words(values: np.ndarray, bits: int) -> np.ndarray:
    """[n, count] -> int32 [n, words]: codes end to end, the first in the lowest bits."""
    told = values[..., None].astype(np.int64) >> np.arange(bits) & 1
    told = told.reshape(len(values), -1).astype(np.uint8)
    told = np.pad(told, ((0, 0), (0, -told.shape[1] % 32)))
    return np.packbits(told, axis=1, bitorder="little").view("<i4")


def in_gptq(second: bool, **settings: Any) -> Callable[[Program, Matrices, Path], None]:
    """Version 1 takes one from whole words, and of 3 bits from every code modulo 8, as GPTQModel does."""

    def through(program: Program, wanted: Matrices, folder: Path) -> None:
        grid, tensors = next(iter(wanted.values())).grid, {}
        for name, q in wanted.items():
            module, columns = name.removesuffix("weight"), q.shape[1]
            zero = torch.full(q.scale.shape, 2 ** (grid.bits - 1)) if q.zero is None else q.zero
            zero = zero.numpy().astype(np.int64).T
            if second:
                words = _packed_words(zero, grid.bits)
            elif 32 % grid.bits:
                words = _packed_words((zero - 1) % 2**grid.bits, grid.bits)
            else:
                one = np.uint32(sum(1 << at for at in range(0, 32, grid.bits)))
                words = (_packed_words(zero, grid.bits).view(np.uint32) - one).view(np.int32)
            tensors |= {
                f"{module}qweight": torch.from_numpy(_packed_words(q.codes.numpy(), grid.bits).T.copy()),
                f"{module}qzeros": torch.from_numpy(words.copy()),
                f"{module}scales": q.scale.T.half().contiguous(),
                f"{module}g_idx": (torch.arange(columns) // grid.columns(columns)).int(),
            }
        said = {"bits": grid.bits, "group_size": grid.group, "sym": grid.symmetric, "desc_act": False}
        _read_back(program, wanted, folder, tensors, said | settings)

    return through


def in_awq(**settings: Any) -> Callable[[Program, Matrices, Path], None]:
    def words(values: np.ndarray) -> torch.Tensor:
        eights = values.reshape(len(values), -1, 8)[..., list(AWQ_ORDER)].reshape(len(values), -1)
        return torch.from_numpy(_packed_words(eights, 4).copy())

    def through(program: Program, wanted: Matrices, folder: Path) -> None:
        grid, tensors = next(iter(wanted.values())).grid, {}
        for name, q in wanted.items():
            module = name.removesuffix("weight")
            zero = torch.full(q.scale.shape, 2 ** (grid.bits - 1)) if q.zero is None else q.zero
            tensors |= {
                f"{module}qweight": words(q.codes.numpy().T % 16),
                f"{module}qzeros": words(zero.numpy().T % 16),
                f"{module}scales": q.scale.T.half().contiguous(),
            }
        said = {"bits": grid.bits, "group_size": grid.group, "zero_point": not grid.symmetric, "sym": grid.symmetric}
        _read_back(program, wanted, folder, tensors, said | settings)

    return through


def _read_back(program: Program, wanted: Matrices, folder: Path, tensors: dict, said: dict) -> None:
    folder.mkdir()
    floats = {name: read(p) for name, p in program.params.items() if name not in wanted}
    save_file(tensors | floats, folder / "model.safetensors")
    config = {k: v for k, v in program.source.config.items() if k != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    found = frontends.load(folder, integers=True)
    for name, q in wanted.items():
        theirs = read(found.params[name])
        assert theirs.grid == q.grid, f"the grid of {name}"
        check(name, q, theirs.codes, theirs.scale, theirs.zero)


IN = {
    "compressed-tensors, pack-quantized": (in_compressed("pack-quantized"), GROUPS, BITS),
    "compressed-tensors, int-quantized": (in_compressed("int-quantized"), GROUPS, BITS),
    "GPTQ version 1": (in_gptq(False, quant_method="gptq", checkpoint_format="gptq"), GROUPS[:5], BITS),
    "GPTQ version 2": (in_gptq(True, quant_method="gptq", checkpoint_format="gptq_v2"), GROUPS[:5], BITS),
    "AWQ": (in_awq(quant_method="awq", version="gemm"), GROUPS[:5], BITS),
    "AutoRound, auto_gptq": (
        in_gptq(False, quant_method="auto-round", packing_format="auto_round:auto_gptq"),
        GROUPS[:5],
        BITS,
    ),
    "AutoRound, auto_awq": (
        in_awq(quant_method="auto-round", packing_format="auto_round:auto_awq"),
        GROUPS[:5],
        BITS,
    ),
}
"""Format -> how a cell goes through it, and the groups and widths that it has words for (GPTQ and AWQ know none per
tensor)."""


def gguf_kinds() -> Iterator[tuple[str, str]]:
    """(type, what came of it) of matrices that the gguf package quantises and dequantises."""
    import gguf

    from tpvc.compiler.frontends import gguf_integers

    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    for kind in (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1")):
        if gguf_integers.grid_of(kind) is None:
            yield kind.name, "read in float"
            continue
        raw = gguf.quantize(values, kind)
        q = gguf_integers.qtensor(raw, kind)
        wanted = gguf.dequantize(raw, kind)
        yield kind.name, "exact" if np.array_equal(q.dequantize().numpy(), wanted) else "differs"


def outcome(through: Callable, program: Program, cell: Cell, folder: Path) -> tuple[str, str]:
    """("exact", "refused" or "differs", what is to be said)."""
    wanted = matrices_of(program, cell)
    try:
        through(program.with_params(wanted), wanted, folder)
    except TpvcError as error:
        return ("differs" if "holds" in str(error) and folder.exists() and any(folder.iterdir()) else "refused"), str(
            error
        )
    except AssertionError as error:
        return "differs", str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return "exact", ""


def float_model(folder: Path) -> Program:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=1, pad_token_id=0)).half().save_pretrained(
        folder
    )
    return frontends.load(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="formats whose name holds this word")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.output.mkdir(parents=True, exist_ok=True)
    told, lines = {}, []
    with tempfile.TemporaryDirectory() as place:
        program = float_model(Path(place) / "model")
        ways = {f"out: {name}": (through, GROUPS, BITS) for name, through in OUT.items()}
        ways |= {f"in: {name}": way for name, way in IN.items()}
        for name, (through, groups, widths) in ways.items():
            if asked.only not in name:
                continue
            found = {str(c): outcome(through, program, c, Path(place) / "cell") for c in cells(groups, widths)}
            told[name] = found
            lines.append(row(name, found))
            print(lines[-1], flush=True)
    for kind, said in gguf_kinds():
        told[f"in: GGUF {kind}"] = {kind: (said, "")}
        print(f"| in: GGUF {kind} | {said} |", flush=True)
    (asked.output / "results.json").write_text(json.dumps(told, indent=1) + "\n")
    (asked.output / "table.md").write_text(
        "| format | cells | exact | refused | differs | why refused |\n|---|---|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )


def row(name: str, found: dict[str, tuple[str, str]]) -> str:
    counts = Counter(kind for kind, _ in found.values())
    why = Counter(_reason(said) for kind, said in found.values() if kind == "refused")
    reasons = "; ".join(f"{count} x {said}" for said, count in why.most_common())
    numbers = " | ".join(str(counts[kind]) for kind in ("exact", "refused", "differs"))
    return f"| {name} | {len(found)} | {numbers} | {reasons} |"


def _reason(said: str) -> str:
    """A sentence without the names and numbers of its cell."""
    said = said.partition("cannot be written as ")[2].partition(": ")[2] or said
    return re.sub(r"\d+-bit", "N-bit", re.sub(r"row \d+, group \d+", "a row", said.partition(";")[0]))[:110]


if __name__ == "__main__":
    main()

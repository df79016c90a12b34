"""What the integers of a checkpoint mean, bit by bit: compressed-tensors, GPTQ, AWQ and AutoRound, as described.

Written apart from tpvc's own readers, which benchmarks compare with it. N = out, K = in, G = groups of a row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Where the eight numbers of a word of AWQ's stand."""


def meant(folder: Path) -> tuple[dict[str, Any], bool]:
    """({parameter: float32 tensor}, whether linears read rows rounded to int8)."""
    import torch
    from safetensors.torch import load_file

    if folder.with_suffix(".meant").is_file():
        return torch.load(folder.with_suffix(".meant")), False
    found = {n: v for path in folder.glob("*.safetensors") for n, v in load_file(path).items()}
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    modules = {n.rpartition(".")[0] for n in found if n.endswith(("qweight", "weight_packed", "weight_scale"))}
    out = {n: v.float() for n, v in found.items() if n.rpartition(".")[0] not in modules}
    for module in modules:
        own = {n.rpartition(".")[2]: v.numpy() if v.dtype != torch.bfloat16 else v.float().numpy()
               for n, v in found.items() if n.rpartition(".")[0] == module}  # fmt: skip
        out[f"{module}.weight"] = torch.from_numpy(_matrix(own, said).astype(np.float32))
    groups = said.get("config_groups", {}).values()
    return out, any(group.get("input_activations") for group in groups)


def _matrix(own: dict[str, np.ndarray], said: dict) -> np.ndarray:
    method = said["quant_method"]
    if method == "compressed-tensors":
        weights = next(iter(said["config_groups"].values()))["weights"]
        return _compressed_matrix(own, weights["num_bits"])
    form = said.get("packing_format", "") if "round" in method else said.get("checkpoint_format", "gptq")
    if method == "awq" or "awq" in form:
        return _spread(*awq_integers(own))
    second = form == "gptq_v2" or form in ("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2")
    codes, zeros, scales, groups = gptq_integers(own, said["bits"], second)
    return (codes - zeros[:, groups]) * scales[:, groups]


def stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of `bits` bits end to end along the last axis of int32 words, the first in the lowest bits."""
    told = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return told.reshape(len(words), count, bits).astype(np.int64) @ (1 << np.arange(bits))


def _spread(codes: np.ndarray, zeros: Any, scales: np.ndarray) -> np.ndarray:
    """codes [N, K]; zeros and scales [N, G]."""
    repeat = codes.shape[1] // scales.shape[1]
    zeros = np.repeat(zeros, repeat, 1) if isinstance(zeros, np.ndarray) else zeros
    return (codes - zeros) * np.repeat(scales.astype(np.float32), repeat, 1)


def _compressed_matrix(own: dict[str, np.ndarray], bits: int) -> np.ndarray:
    half, scales = 1 << bits - 1, own["weight_scale"]
    if "weight_packed" in own:
        codes = stream(own["weight_packed"], bits, own["weight_shape"][1])
    else:
        codes = own["weight"].astype(np.int64) + half
    zeros = own.get("weight_zero_point")
    if zeros is None:
        zeros = half
    elif zeros.dtype == np.int32:
        zeros = stream(zeros.T, bits, len(codes)).T
    else:
        zeros = zeros.astype(np.int64) + half
    return _spread(codes, zeros, scales)


def gptq_integers(own: dict[str, np.ndarray], bits: int, second: bool) -> tuple[np.ndarray, ...]:
    """(codes [N, K], zero points [N, G], scales [N, G], the group of every column [K]); second: of version 2."""
    scales = own["scales"].astype(np.float32)
    columns = own["qweight"].shape[0] * 32 // bits
    codes, zeros = stream(own["qweight"].T, bits, columns), np.full(scales.shape, 1 << bits - 1)
    groups = own["g_idx"] if "g_idx" in own else np.arange(columns) // (columns // len(scales))
    if "qzeros" in own:
        words, rows = own["qzeros"], scales.shape[1]
        if second:
            zeros = stream(words, bits, rows)
        elif 32 % bits:
            zeros = (stream(words, bits, rows) + 1) % (1 << bits)
        else:
            one = np.uint32(sum(1 << at for at in range(0, 32, bits)))
            zeros = stream((words.view(np.uint32) + one).view(np.int32), bits, rows)
    return codes, zeros.T, scales.T, groups


def awq_integers(own: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """(codes [N, K], zero points [N, G], scales [N, G])."""

    def rows(words: np.ndarray) -> np.ndarray:
        nibbles = words.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
        out = np.empty(nibbles.shape, np.int64)
        out[..., list(AWQ_ORDER)] = nibbles
        return out.reshape(len(words), -1).T

    scales = own["scales"].astype(np.float32).T
    zeros = rows(own["qzeros"]) if "qzeros" in own else np.full(scales.shape, 8)
    return rows(own["qweight"]), zeros, scales

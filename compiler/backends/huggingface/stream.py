"""Write safetensors files tensor by tensor: the header is made up front, then each piece is read, placed and let go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from tpvc.compiler.compressed_tensors_format import Entries

SHARD_BYTES = 5_000_000_000
"""The size that transformers splits checkpoints at."""

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together: their names, dtypes and shapes, and the call that makes them."""

    entries: Entries
    make: Callable[[], dict[str, torch.Tensor]]

    @property
    def bytes(self) -> int:
        return sum(_bytes(dtype, shape) for dtype, shape in self.entries.values())


def write(directory: Path, pieces: Sequence[Piece], shard_bytes: int = SHARD_BYTES) -> dict[str, int]:
    """Write `pieces` into model.safetensors, or into numbered shards and their index: {file name: bytes}.

    Memory: one piece. A piece is never split. OSError where the disk is full.
    """
    shards = _shards(pieces, shard_bytes)
    if len(shards) == 1:
        return {"model.safetensors": _write_file(directory / "model.safetensors", shards[0])}
    written, where = {}, {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        written[name] = _write_file(directory / name, shard)
        where |= {tensor: name for piece in shard for tensor in piece.entries}
    index = {"metadata": {"total_size": sum(p.bytes for p in pieces)}, "weight_map": where}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return written


def _shards(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    held = 0
    for piece in pieces:
        if shards[-1] and held + piece.bytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(piece)
        held += piece.bytes
    return shards


def file_bytes(pieces: Sequence[Piece]) -> int:
    """Bytes of all files of tensors that `write` makes of `pieces`; makes none of them."""
    return sum(len(text) + 8 + end for text, _, end in map(_header, _shards(pieces, SHARD_BYTES)))


def _header(pieces: list[Piece]) -> tuple[bytes, dict[str, int], int]:
    """(header, offsets of the tensors behind it, bytes of them all). Tensors are laid out by falling width of their
    dtype, so that each is aligned to it."""
    entries = {name: entry for piece in pieces for name, entry in piece.entries.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, (dtype, shape) in sorted(entries.items(), key=lambda e: (-e[1][0].itemsize, e[0])):
        offsets[name] = end
        end += _bytes(dtype, shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), offsets, end


def _write_file(path: Path, pieces: list[Piece]) -> int:
    text, offsets, end = _header(pieces)
    start = 8 + len(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            _place(file, piece, {name: start + offsets[name] for name in piece.entries})
    return start + end


def _place(file: BinaryIO, piece: Piece, at: dict[str, int]) -> None:
    """Make the tensors of `piece` and write each where it belongs; a function, so that they are gone at its end."""
    for name, tensor in piece.make().items():
        if (tensor.dtype, tuple(tensor.shape)) != piece.entries[name]:
            raise ValueError(f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}, announced {piece.entries[name]}")
        file.seek(at[name])
        file.write(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize

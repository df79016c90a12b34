"""The safetensors files of a checkpoint directory: which tensors there are, and how one of them is read.

Only headers are read when a directory is opened. Pickle files (.bin, .pt) can run code and are refused.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tpvc.compiler import json_text
from tpvc.compiler.errors import TpvcError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_JSON = 256 << 20
"""Bytes of a file of JSON: the largest that are around, tokenizers, have a tenth of it."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READ = (*FLOATS, "F64", "BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
"""Dtypes that can be read; what torch does with narrower floats differs from one to the other."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: name, shape and dtype as its header says ("F32", "BF16", "I32", ...)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """The tensor as it is stored. A float one with NaN or Inf raises TpvcError."""
        self._check()
        with _opened(self.path) as file:
            tensor = file.get_tensor(self.name)
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(v) for v in tensor.aminmax())
            if not (low > float("-inf") and high < float("inf")):
                raise TpvcError(
                    f"tensor '{self.name}' in {self.path} holds NaN or Inf; expected finite weights,"
                    " use an intact copy of the checkpoint"
                )
        return tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop; their numbers are not looked at."""
        self._check()
        with _opened(self.path) as file:
            return file.get_slice(self.name)[start:stop]

    def _check(self) -> None:
        if self.dtype not in READ:
            raise TpvcError(f"tensor '{self.name}' in {self.path} is {self.dtype}; expected one of {', '.join(READ)}")


def same(a: Stored, b: Stored, step: int = 4096) -> bool:
    """Whether two tensors of at least one dimension are equal; reads `step` rows at a time."""
    if a.shape != b.shape or a.dtype != b.dtype or not a.shape:
        return False
    return all(torch.equal(a.rows(i, i + step), b.rows(i, i + step)) for i in range(0, a.shape[0], step))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or TpvcError."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_JSON:
            raise ValueError(f"it is no regular file of at most {LARGEST_JSON >> 20} MB")
        value = json_text.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TpvcError(f"{path} cannot be read as JSON ({error}); expected a JSON object") from error
    if not isinstance(value, dict):
        raise TpvcError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in `directory`, by the name that the files give it."""
    if (directory / SINGLE).is_file():
        return stored_in(directory / SINGLE)
    if not (directory / INDEX).is_file():
        _no_weights(directory)
    where = read_json(directory / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()) or not where:
        raise TpvcError(f"{directory / INDEX} has no weight_map; expected {{tensor name: file name}}")
    shards = sorted(set(where.values()))
    for shard in shards:
        if not is_inside(shard):
            raise TpvcError(
                f"{directory / INDEX} points to '{shard:.200}', outside of the directory; expected a file in it"
            )
    missing = [s for s in shards if not is_file(directory / s)]
    if missing:
        raise TpvcError(
            f"{directory} lacks {len(missing)} of the {len(shards)} files that its index names, first"
            f" '{missing[0]:.200}'; download the missing files"
        )
    found: dict[str, Stored] = {}
    for shard in shards:
        header = stored_in(directory / shard)
        twice = found.keys() & header.keys()
        if twice:
            raise TpvcError(f"tensor '{min(twice)}' is in two files of {directory}; expected it in one")
        found |= header
    for name, shard in where.items():
        if name not in found or found[name].path != directory / shard:
            raise TpvcError(f"{directory / INDEX} says that '{name}' is in '{shard}', which does not hold it")
    return found


def is_inside(name: str) -> bool:
    """Does a relative name lead to something below where it begins?"""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and "\\" not in name


def is_file(path: Path) -> bool:
    """Is there a regular file, or a link to one? Whatever the name is."""
    try:
        return path.is_file()
    except OSError:  # a name that is longer than a file's may be
        return False


def _opened(path: Path) -> Any:
    try:
        if not path.is_file():
            raise OSError("it is no regular file")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TpvcError(
            f"{path} is not a complete safetensors file ({reason}); download it again or use an intact copy"
        ) from error


def stored_in(path: Path) -> dict[str, Stored]:
    with _opened(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (a safe_open is not a dict)
        return {n: Stored(path, n, tuple(v.get_shape()), str(v.get_dtype())) for n, v in views.items()}


def _no_weights(directory: Path) -> None:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickles:
        raise TpvcError(
            f"{directory} holds its weights as pickle ({pickles[0]}), which can run code when read and is refused;"
            " convert it to safetensors (transformers: from_pretrained, then save_pretrained)"
        )
    raise TpvcError(f"{directory} holds neither {SINGLE} nor {INDEX}; expected the weights of a model")

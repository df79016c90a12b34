"""Finished blocks on disk, so that a run that was stopped goes on after its last finished block, bit for bit.

    fingerprint.json         what the run is: a run with another one does not go on here
    block-00007.safetensors  the integer parameters of block 7 and, in the header, its record and a hash of both
    stream-00007.safetensors the activations that leave block 7, of the last finished block only
    stream-00007-1.safetensors   those that process 1 has, where several share the calibration windows

A file appears under its name when it is whole (written beside it, then renamed), first the stream, then the block: a
block that is there is finished, and the stream that the next one needs is there too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tpvc.compiler.compressed_tensors_format import Form, from_tensors, to_tensors
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import replacing
from tpvc.compiler.program import Grid, Lazy, QTensor

_FORM = Form()


class BlockStore:
    """The blocks in `directory`, which exists."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)

    @classmethod
    def open(cls, directory: Path, fingerprint: dict, replace: bool = False) -> BlockStore:
        """Begin or go on with the run described by `fingerprint` (JSON-able).

        Where another run is there it is removed with `replace`, and else TpvcError says what differs.
        """
        directory = Path(directory)
        path = directory / "fingerprint.json"
        wanted = json.loads(json.dumps(fingerprint))
        with _explained(path):
            directory.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (replace and _other(path, wanted)):
            found = _read_json(path)
            differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
            if differing:
                there = ", ".join(f"{k} is {_short(found.get(k))}, not {_short(wanted.get(k))}" for k in differing)
                raise TpvcError(f"'{directory}' holds another unfinished run ({there}); repeat that or add --overwrite")
        else:
            cls(directory).clear()
            with _replacing(path) as temporary:
                temporary.write_text(json.dumps(wanted, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return cls(directory)

    def clear(self) -> None:
        """Forget the run: it cannot be gone on with. First what it was, so that nobody goes on with half of it."""
        with _explained(self.directory):
            for old in (self.directory / "fingerprint.json", *self.directory.glob("*.safetensors")):
                old.unlink(missing_ok=True)

    def finished(self, block: int) -> tuple[dict[str, Lazy], dict] | None:
        """(parameters, record) of a finished block, or None. A damaged file counts as not finished."""
        path = self._block(block)
        header = _verified(path)
        if header is None:
            return None
        params = {name: _lazy(path, name, *told) for name, told in json.loads(header["params"]).items()}
        return params, json.loads(header["record"])

    def save(
        self, block: int, params: Mapping[str, QTensor], record: dict, streams: Mapping[str, torch.Tensor] | None
    ) -> dict[str, Lazy]:
        """Keep a finished block, and as `streams` what the next one starts from: older ones are removed then."""
        if streams is not None:
            self.keep(block, streams)
        tensors = {f"{name}/{n}": t for name, q in params.items() for n, t in to_tensors(q, _FORM).items()}
        told = {
            name: [list(q.shape), [q.grid.bits, q.grid.group, q.grid.symmetric], str(q.scale_dtype).split(".")[1]]
            for name, q in params.items()
        }
        path = self._block(block)
        _write(path, tensors, {"params": json.dumps(told), "record": json.dumps(record, sort_keys=True)})
        for old in self.directory.glob("stream-*.safetensors") if streams is not None else ():
            if not old.name.startswith(self._stream(block).stem):
                old.unlink(missing_ok=True)
        return {name: _lazy(path, name, *t) for name, t in told.items()}

    def keep(self, block: int, streams: Mapping[str, torch.Tensor], share: int = 0) -> None:
        """Write the streams that leave a block, before it is saved; a share each where there are several."""
        _write(self._stream(block, share), dict(streams), {})

    def streams(self, block: int, *names: str, share: int = 0) -> dict[str, torch.Tensor]:
        """The streams saved with `block`, or those of them with these names; TpvcError where they are missing or
        damaged."""
        path = self._stream(block, share)
        if _verified(path) is None:
            raise TpvcError(
                f"'{path}' is missing or damaged, so the run cannot go on after block {block}; remove "
                f"'{self.directory}' and begin again"
            )
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}

    def _block(self, block: int) -> Path:
        return self.directory / f"block-{block:05}.safetensors"

    def _stream(self, block: int, share: int = 0) -> Path:
        return self.directory / f"stream-{block:05}{f'-{share}' if share else ''}.safetensors"


def _lazy(path: Path, name: str, shape: list[int], grid: list, scale_dtype: str) -> Lazy:
    lattice = Grid(*grid)

    def read() -> QTensor:
        with safe_open(path, framework="pt") as file:
            own = [n for n in file.keys() if n.startswith(f"{name}/")]  # noqa: SIM118
            return from_tensors({n.removeprefix(f"{name}/"): file.get_tensor(n) for n in own}, lattice)

    return Lazy(tuple(shape), getattr(torch, scale_dtype), read, lattice)


def _write(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {**header, "sha256": _digest(header, (tensors[name] for name in sorted(tensors)))}
    with _replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def _verified(path: Path) -> dict[str, str] | None:
    """The header of a whole, undamaged file, or None."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            told = {key: value for key, value in header.items() if key != "sha256"}
            whole = header.get("sha256") == _digest(told, (file.get_tensor(name) for name in sorted(file.keys())))
    except (SafetensorError, OSError, ValueError):
        return None
    return header if whole else None


def _digest(header: dict[str, str], tensors: Iterator[torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name at the end, and is gone when something fails."""
    with _explained(path), replacing(path) as temporary:
        yield temporary


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TpvcError(f"cannot write '{path}': {reason}; free some space or choose another place") from error


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise TpvcError(f"'{path}' is damaged, so it is unknown what run this is; add --overwrite")
    return found


def _other(path: Path, wanted: dict) -> bool:
    """Is the run at `path` another one than `wanted`, or damaged?"""
    try:
        return _read_json(path) != wanted
    except TpvcError:
        return True


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."

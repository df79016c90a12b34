"""The `kernels/` folder of a package: binaries and a manifest that says how each is launched.

Files are named kernel.target.sha12.cubin, .hsaco or .ptx. The manifest has an entry for each binary of each variant,
sorted, without dates or paths: the same binaries make the same bytes. `params` are the parameters in the order in which
they are passed, but for those of type "none", which are not; two pointers to scratch memory come last."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpvc.compiler import json_text
from tpvc.compiler.errors import TpvcError
from tpvc.kernels.aot import Kept
from tpvc.kernels.targets import named, usable

MANIFEST = "manifest.json"
FORMAT = 1
SCRATCH = (("global_scratch", "*i8"), ("profile_scratch", "*i8"))


@dataclass(frozen=True, eq=False)
class Entry:
    """One binary of a package, as its manifest has it.

    num_warps: of a block; options: num_warps and num_stages that were asked for, as kernels may add warps of their own;
    shared: bytes of dynamic shared memory; scratch: bytes of global memory a block and their alignment; params: without
    the two of scratch memory; ranks: for each key, the places of the candidates it is part of; resources: see
    `aot.Resources`."""

    file: str
    sha256: str
    size: int
    kernel: str
    symbol: str
    target: str
    warp_size: int
    num_warps: int
    options: tuple[int, int]
    shared: int
    scratch: tuple[int, int]
    params: tuple[tuple[str, str], ...]
    divisible: tuple[str, ...]
    constants: dict[str, Any]
    ranks: dict[str, tuple[int, ...]]
    resources: dict[str, int]

    @property
    def threads(self) -> int:
        return self.num_warps * self.warp_size


@dataclass(frozen=True, eq=False)
class Package:
    folder: Path
    entries: tuple[Entry, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(e.target for e in self.entries))

    def code(self, entry: Entry) -> bytes:
        """The bytes of a binary, checked."""
        return _checked(self.folder, entry)


def write(folder: Path, kept: Sequence[Kept]) -> None:
    """Fill `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for one in kept:
        entry = _entry(one)
        (folder / entry["file"]).write_bytes(one.binary.code)
        entries.append(entry)
    entries.sort(key=lambda e: (e["file"], json.dumps(e, sort_keys=True)))
    text = json.dumps({"format": FORMAT, "binaries": entries}, indent=1, sort_keys=True, allow_nan=False)
    (folder / MANIFEST).write_bytes(f"{text}\n".encode())


def _entry(one: Kept) -> dict[str, Any]:
    binary, variant, target = one.binary, one.binary.variant, one.binary.target
    sha256 = hashlib.sha256(binary.code).hexdigest()
    return {
        "file": f"{binary.symbol}.{target.name.replace(':', '_')}.{sha256[:12]}.{target.form}",
        "sha256": sha256,
        "size": len(binary.code),
        "kernel": variant.kernel,
        "symbol": binary.symbol,
        "target": target.name,
        "backend": target.backend,
        "arch": target.arch,
        "form": target.form,
        "warp_size": target.warp,
        "num_warps": binary.warps,
        "options": [variant.warps, variant.stages],
        "num_ctas": 1,
        "shared": binary.shared,
        "global_scratch": binary.scratch[0],
        "global_scratch_align": binary.scratch[1],
        "profile_scratch": binary.scratch[2],
        "launch_pdl": False,
        "params": [list(p) for p in (*variant.params, *SCRATCH)],
        "divisible_by_16": list(variant.divisible),
        "consts": dict(variant.constants),
        "ranks": {key: list(places) for key, places in one.ranks},
        "resources": asdict(binary.resources),
        "fits": True,
        "triton": binary.triton,
        "source_sha256": binary.source_sha256,
    }


def read(folder: Path) -> Package:
    """The package in `folder`, every file of it checked."""
    try:
        _check_regular(folder / MANIFEST)
        found = json_text.parse((folder / MANIFEST).read_text(encoding="utf-8"))
        version, entries = found["format"], found["binaries"]
    except FileNotFoundError:
        raise TpvcError(f"'{folder}' has no {MANIFEST}; expected the kernels folder of a package") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TpvcError(f"'{folder / MANIFEST}' cannot be read ({error}); build the package again") from error
    if version != FORMAT:
        raise TpvcError(
            f"'{folder / MANIFEST}' has format {version!r:.20} and this version of tpvc reads {FORMAT}; "
            "build the package again"
        )
    try:
        package = Package(folder, tuple(_read_entry(e) for e in entries))
    except (KeyError, TypeError, ValueError, AttributeError, TpvcError) as error:
        raise TpvcError(f"'{folder / MANIFEST}' has an entry that is not whole ({error}); build it again") from error
    for entry in package.entries:
        _checked(folder, entry)
    return package


def _read_entry(found: dict[str, Any]) -> Entry:
    file, params = found["file"], tuple((str(name), str(kind)) for name, kind in found["params"])
    if Path(file).name != file or params[-2:] != SCRATCH:
        raise ValueError(f"file {file!r:.60}")
    named(found["target"])
    return Entry(
        file=file,
        sha256=found["sha256"],
        size=found["size"],
        kernel=found["kernel"],
        symbol=found["symbol"],
        target=found["target"],
        warp_size=found["warp_size"],
        num_warps=found["num_warps"],
        options=tuple(found["options"]),
        shared=found["shared"],
        scratch=(found["global_scratch"], found["global_scratch_align"]),
        params=params[:-2],
        divisible=tuple(found["divisible_by_16"]),
        constants=dict(found["consts"]),
        ranks={key: tuple(places) for key, places in found["ranks"].items()},
        resources=dict(found["resources"]),
    )


def _check_regular(path: Path) -> int:
    """The size of a file. OSError for what is none, as a device, which has no end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no regular file")
    return found.st_size


def _checked(folder: Path, entry: Entry) -> bytes:
    path = folder / entry.file
    try:
        size = _check_regular(path)
        code = path.read_bytes() if size == entry.size else b""
    except (OSError, ValueError) as error:  # a name that no file can have
        raise TpvcError(
            f"'{path}' cannot be read ({getattr(error, 'strerror', None) or error}); copy or build the package again"
        ) from error
    if len(code) != entry.size:
        raise TpvcError(f"'{path}' has {size} bytes and {entry.size} were written; copy or build the package again")
    if hashlib.sha256(code).hexdigest() != entry.sha256:
        raise TpvcError(f"'{path}' was changed after it was written; copy or build the package again")
    return code


def for_device(package: Package, backend: str, arch: int | str) -> tuple[Entry, ...]:
    """What of `package` runs on a device, best target first, then by rank; TpvcError where nothing does."""
    order = usable(package.targets, backend, arch)
    if not order:
        raise TpvcError(
            f"the kernels in '{package.folder}' are for {', '.join(package.targets) or 'no target'} and this device is "
            f"{backend}:{arch}; build the package with this target, or let run and bench use the CPU (--device cpu)"
        )
    mine = [e for e in package.entries if e.target in order]
    return tuple(sorted(mine, key=lambda e: (order.index(e.target), min(map(min, e.ranks.values()), default=0))))

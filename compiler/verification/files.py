"""The files of a target against the hashes that tpvc.json lists."""

from __future__ import annotations

from pathlib import Path

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.weights import is_file, is_inside, read_json
from tpvc.compiler.output import MANIFEST
from tpvc.compiler.sha256 import sha256


def check(folder: Path) -> tuple[bool, str]:
    """(proven, what is to be said). TpvcError for a file that is missing or has another hash."""
    path = folder / MANIFEST
    if not path.is_file():
        return False, f"there is no {MANIFEST} with their hashes"
    listed = read_json(path).get("files")
    if not isinstance(listed, dict) or not listed:
        return False, f"{MANIFEST} lists no hashes"
    for name, digest in listed.items():
        if not is_inside(name):
            raise TpvcError(f"{path} lists '{name:.60}', which is outside of the folder; expected files in it")
        if not is_file(folder / name):
            raise TpvcError(f"'{folder / name}' is missing, which {MANIFEST} lists; use an intact copy")
        if (found := sha256(folder / name)) != digest:
            raise TpvcError(
                f"'{folder / name}' has the SHA-256 {found[:12]}..., {MANIFEST} says {str(digest)[:12]}...; it was"
                " changed or damaged after it was written"
            )
    return True, f"{len(listed)} files have the hashes that {MANIFEST} lists"

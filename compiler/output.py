"""Output directories: written next to their place under a working name, and renamed when whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpvc.compiler.errors import TpvcError

MANIFEST = "tpvc.json"


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a place that holds something that is not ours, or ours without `overwrite`."""
    if not out.exists():
        parent = next(p for p in out.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise TpvcError(f"'{parent}' is not a directory that can be written to; choose another output directory")
        return
    if not out.is_dir():
        raise TpvcError(f"output '{out}' is a file; expected a directory that is new, empty or made by tpvc")
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise TpvcError(f"output '{out}' holds files that tpvc did not write; choose a new or empty directory")
    if not overwrite:
        raise TpvcError(f"output '{out}' already holds an artefact; add --overwrite to replace it, or choose another")


@contextmanager
def published(out: Path, overwrite: bool, resumable: bool = False) -> Iterator[Path]:
    """Yield `OUT.partial`; what the body leaves in its `artefact` folder becomes `out` when the body ends well.

    When it does not, a resumable run leaves `OUT.partial` for the next one, another leaves nothing.
    """
    work = out.with_name(out.name + ".partial")
    if not resumable:
        shutil.rmtree(work, ignore_errors=True)
    artefact = work / "artefact"
    shutil.rmtree(artefact, ignore_errors=True)
    artefact.mkdir(parents=True)
    try:
        yield work
        check_free(out, overwrite)
        if out.exists():
            replaced = work / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(out, replaced)
        os.replace(artefact, out)
    except BaseException:
        shutil.rmtree(artefact if resumable else work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)

"""Output directories: written next to their place under a working name, and renamed when whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpvc.compiler.errors import TpvcError

MANIFEST = "tpvc.json"
ARTEFACT, BLOCKS, REPLACED = "artefact", "blocks", "replaced"
"""What `OUT.partial` may hold: the artefact being written, a BlockStore, and what stood at OUT before."""


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a place that holds something that is not ours, or ours without `overwrite`, or that cannot be renamed."""
    try:
        _check_place(out, Path(os.path.abspath(out)), overwrite)
        _check_work(_work(out))
    except OSError as error:
        raise TpvcError(f"output '{out}' cannot be used ({error.strerror or error}); choose another place") from error


def _check_place(out: Path, place: Path, overwrite: bool) -> None:
    here = Path.cwd()
    if place in (here, *here.parents) or place.is_mount():
        what = "a mount point" if place.is_mount() else "or holds the working directory"
        raise TpvcError(f"output '{out}' is {what}, which cannot be renamed into place; choose a directory inside it")
    if not place.exists():
        parent = next(p for p in place.parents if p.exists())
        if place.is_symlink() or not parent.is_dir() or not os.access(parent, os.W_OK):
            what = place if place.is_symlink() else parent
            raise TpvcError(f"'{what}' is not a directory that can be written to; choose another output directory")
        return
    if not place.is_dir():
        raise TpvcError(f"output '{out}' is a file; expected a directory that is new, empty or made by tpvc")
    if not any(place.iterdir()):
        return
    if not (place / MANIFEST).is_file():
        raise TpvcError(f"output '{out}' holds files that tpvc did not write; choose a new or empty directory")
    if not overwrite:
        raise TpvcError(f"output '{out}' already holds an artefact; add --overwrite to replace it, or choose another")


def _check_work(work: Path) -> None:
    """The working directory is removed in the end, so it must be ours."""
    if not work.exists() and not work.is_symlink():
        return
    if not work.is_dir() or {p.name for p in work.iterdir()} - {ARTEFACT, BLOCKS, REPLACED}:
        raise TpvcError(
            f"'{work}', where the output is written first, is not tpvc's; rename it or choose another output"
        )


def _work(out: Path) -> Path:
    place = Path(os.path.abspath(out))
    return place.with_name(place.name + ".partial")


@contextmanager
def published(out: Path, overwrite: bool, resumable: bool = False) -> Iterator[Path]:
    """Yield `OUT.partial`; what the body leaves in its `artefact` folder becomes `out` when the body ends well.

    When it does not, a resumable run leaves its finished blocks for the next one, another leaves nothing. Finished
    blocks of a resumable run are in the way of another kind of run, which removes them with `overwrite` only.
    """
    place, work = Path(os.path.abspath(out)), _work(out)
    _check_work(work)
    if not resumable:
        if _finished(work) and not overwrite:
            raise TpvcError(
                f"'{work}' holds an unfinished quantisation; finish it, add --overwrite, or choose another output"
            )
        shutil.rmtree(work, ignore_errors=True)
    artefact, replaced = work / ARTEFACT, work / REPLACED
    shutil.rmtree(artefact, ignore_errors=True)
    artefact.mkdir(parents=True)
    try:
        yield work
        check_free(out, overwrite)
        if place.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(place, replaced)
        try:
            os.replace(artefact, place)
        except BaseException:
            if replaced.exists():
                os.replace(replaced, place)
            raise
    except BaseException:
        shutil.rmtree(artefact if resumable and _finished(work) else work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _finished(work: Path) -> bool:
    """Is there a finished block that a later run can start from?"""
    return any((work / BLOCKS).glob("block-*.safetensors"))

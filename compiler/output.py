"""Output directories: written next to their place under a working name, and renamed when whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tpvc.compiler.errors import TpvcError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

MANIFEST = "tpvc.json"
ADAPTERS = "adapters"
PROMPTS = "prompts"
"""The folders of an artefact that hold its adapters and its soft prompts, each under its name."""
ARTEFACT, BLOCKS, REPLACED, LOCK = "artefact", "blocks", "replaced", "lock"
"""What `OUT.partial` may hold: the artefact being written, a BlockStore, what stood at OUT before, and whose it is."""


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a place that holds something that is not ours, or ours without `overwrite`, or that cannot be renamed."""
    try:
        _check_place(out, Path(os.path.abspath(out)), overwrite)
        _check_work(working(out))
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
    if not work.is_dir() or {p.name for p in work.iterdir()} - {ARTEFACT, BLOCKS, REPLACED, LOCK}:
        raise TpvcError(
            f"'{work}', where the output is written first, is not tpvc's; rename it or choose another output"
        )


def check_apart(out: Path, model: str | Path) -> None:
    """Refuse to replace what is being read: `model` must neither be `out` nor lie in it."""
    there, source = Path(os.path.realpath(out)), Path(os.path.realpath(Path(model).expanduser()))
    if os.path.exists(source) and there in (source, *source.parents):
        raise TpvcError(f"output '{out}' is or holds '{model}', which would be lost; choose another output directory")


def working(out: Path) -> Path:
    """Where what becomes `out` is written first."""
    place = Path(os.path.abspath(out))
    return place.with_name(place.name + ".partial")


@contextmanager
def published(out: Path, overwrite: bool, resumable: bool = False) -> Iterator[Path]:
    """Yield `OUT.partial`; what the body leaves in its `artefact` folder becomes `out` when the body ends well.

    When it does not, a resumable run leaves its finished blocks for the next one, another leaves nothing. Finished
    blocks of a resumable run are in the way of another kind of run, which removes them with `overwrite` only. One run
    at a time may write to `out`.
    """
    work = working(out)
    _check_work(work)
    with _alone(work):
        if not resumable:
            if _finished(work) and not overwrite:
                raise TpvcError(
                    f"'{work}' holds an unfinished run; finish it, add --overwrite, or choose another output"
                )
            _clear(work)
        yield from _replacing(out, work, overwrite, resumable)


def check_file_free(out: Path, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    """Refuse a path for a file where something stands that is not `ours`, or ours without `overwrite`."""
    place = Path(os.path.abspath(out))
    parent = next(p for p in place.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise TpvcError(f"'{parent}' is not a directory that can be written to; choose another output file")
    if os.path.lexists(place):
        if not place.is_file() or not ours(place):
            raise TpvcError(f"output '{out}' is something that tpvc did not write; choose a new file")
        if not overwrite:
            raise TpvcError(f"output '{out}' is already there; add --overwrite to replace it, or choose another")
    _check_work(working(out))


@contextmanager
def published_file(out: Path) -> Iterator[Path]:
    """Yield `OUT.partial`; the file `artefact` that the body leaves in it becomes `out` when the body ends well.

    When it does not, finished blocks are left for the next run, as by a resumable `published`.
    """
    work = working(out)
    _check_work(work)
    with _alone(work):
        try:
            yield work
            os.replace(work / ARTEFACT, out)
        except BaseException:
            (work / ARTEFACT).unlink(missing_ok=True)
            if not _finished(work):
                _clear(work)
            raise
        _clear(work)


def _replacing(out: Path, work: Path, overwrite: bool, resumable: bool) -> Iterator[Path]:
    place, artefact, replaced = Path(os.path.abspath(out)), work / ARTEFACT, work / REPLACED
    shutil.rmtree(artefact, ignore_errors=True)
    artefact.mkdir()
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
        if resumable and _finished(work):
            shutil.rmtree(artefact, ignore_errors=True)
        else:
            _clear(work)
        raise
    _clear(work)


def _clear(work: Path) -> None:
    for part in (ARTEFACT, BLOCKS, REPLACED):
        shutil.rmtree(work / part, ignore_errors=True)


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Make `work` and hold its lock, which the system releases however this process ends; remove what is empty."""
    lock = work / LOCK
    try:
        work.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # a file system that takes no directories, as /proc
        raise TpvcError(f"'{work.parent}' takes no new directory; choose another place for the output") from error
    try:
        if fcntl is None:
            yield
            return
        with lock.open("a") as file:
            _hold(file.fileno(), lock)
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    finally:
        with suppress(OSError):
            work.rmdir()


def _hold(file: int, lock: Path) -> None:
    busy = TpvcError(f"another run is writing '{lock.parent}'; wait for it or choose another output")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError:
        return  # a file system without locks
    if not (lock.exists() and os.path.samestat(os.fstat(file), lock.stat())):
        raise busy  # the other run ended, and removed the lock, between our opening and our locking it


def _finished(work: Path) -> bool:
    """Is there a finished block, of this or of a phase before, that a later run can start from?"""
    return any((work / BLOCKS).rglob("block-*.safetensors"))

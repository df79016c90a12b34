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
ARTEFACT, BLOCKS, DONE, REPLACED, LOCK = "artefact", "blocks", "done", "replaced", "lock"
"""What `OUT.partial` may hold: the artefact being written, a BlockStore, what it is called when its artefact is whole,
what stood at OUT before, and whose it is."""


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a place that holds something that is not ours, or ours without `overwrite`, or that cannot be renamed."""
    place = Path(os.path.abspath(out))
    try:
        _check_place(out, place)
        _check_work(working(out))
        _tidy(working(out), place)
        _check_new(out, place, overwrite)
    except OSError as error:
        raise TpvcError(f"output '{out}' cannot be used ({error.strerror or error}); choose another place") from error


def _check_place(out: Path, place: Path) -> None:
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
    if place.is_symlink():
        raise TpvcError(f"output '{out}' is a link to '{place.resolve()}'; name the directory itself, or another one")
    if not place.is_dir():
        raise TpvcError(f"output '{out}' is a file; expected a directory that is new, empty or made by tpvc")
    if not any(place.iterdir()):
        return
    if not (place / MANIFEST).is_file():
        raise TpvcError(f"output '{out}' holds files that tpvc did not write; choose a new or empty directory")


def _check_new(out: Path, place: Path, overwrite: bool) -> None:
    if not overwrite and (place / MANIFEST).is_file():
        raise TpvcError(f"output '{out}' already holds an artefact; add --overwrite to replace it, or choose another")


def _check_work(work: Path) -> None:
    """The working directory is removed in the end, so it must be ours."""
    if not work.exists() and not work.is_symlink():
        return
    if not work.is_dir() or {p.name for p in work.iterdir()} - {ARTEFACT, BLOCKS, DONE, REPLACED, LOCK}:
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
        _recover(work, Path(os.path.abspath(out)))
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
    _check_work(working(out))
    _tidy(working(out), place)
    if os.path.lexists(place):
        if not place.is_file() or not ours(place):
            raise TpvcError(f"output '{out}' is something that tpvc did not write; choose a new file")
        if not overwrite:
            raise TpvcError(f"output '{out}' is already there; add --overwrite to replace it, or choose another")


@contextmanager
def published_file(out: Path) -> Iterator[Path]:
    """Yield `OUT.partial`; the file `artefact` that the body leaves in it becomes `out` when the body ends well.

    When it does not, finished blocks are left for the next run, as by a resumable `published`.
    """
    work, place = working(out), Path(os.path.abspath(out))
    _check_work(work)
    with _alone(work):
        _recover(work, place)
        _remove(work / ARTEFACT)
        yield from _publishing(work, place, resumable=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name at the end, and is gone when something fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _replacing(out: Path, work: Path, overwrite: bool, resumable: bool) -> Iterator[Path]:
    place = Path(os.path.abspath(out))
    _remove(work / ARTEFACT)
    (work / ARTEFACT).mkdir()

    def check() -> None:
        _check_place(out, place)
        _check_new(out, place, overwrite)

    yield from _publishing(work, place, resumable, check)


def _publishing(work: Path, place: Path, resumable: bool, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield `work`; then its artefact takes its place. Killed at any moment, `_recover` knows what is to be done."""
    artefact, blocks, replaced = work / ARTEFACT, work / BLOCKS, work / REPLACED
    try:
        yield work
        check()
        try:
            if blocks.exists():
                os.replace(blocks, work / DONE)
            if place.is_dir():
                _remove(replaced)
                os.replace(place, replaced)
            os.replace(artefact, place)
        except BaseException:
            _recover(work, place)
            raise
    except BaseException:
        if resumable and _finished(work):
            _remove(artefact)
        else:
            _clear(work)
        raise
    _clear(work)


def _recover(work: Path, place: Path) -> None:
    """Put right what a run leaves that is killed as its artefact takes its place; the lock is held."""
    artefact, done, replaced = work / ARTEFACT, work / DONE, work / REPLACED
    if replaced.exists() and not place.exists():
        os.replace(replaced, place)
    if done.exists() and artefact.exists():  # which did not come to its place
        _remove(work / BLOCKS)
        os.replace(done, work / BLOCKS)
    _remove(done)
    _remove(replaced)


def _tidy(work: Path, place: Path) -> None:
    """Recover what can be; of a run that came to its end nothing is left. Not while another run is at work."""
    if not work.is_dir():
        return
    with suppress(OSError, TpvcError), _alone(work):
        _recover(work, place)
        if not _finished(work):
            _clear(work)


def _clear(work: Path) -> None:
    """Remove all but the lock. Blocks are renamed first: some of them without the others could not be gone on with."""
    _remove(work / ARTEFACT)
    if (work / BLOCKS).exists():
        _remove(work / DONE)
        with suppress(OSError):
            os.replace(work / BLOCKS, work / DONE)
    for part in (DONE, BLOCKS, REPLACED):
        _remove(work / part)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


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
                with suppress(OSError):
                    lock.unlink()
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
    """Is there anything whole, of this or of a phase before, that a later run can start from?"""
    return any((work / BLOCKS).rglob("*.safetensors"))

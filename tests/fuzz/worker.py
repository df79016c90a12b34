"""The loop of one process: mutate, lay the files out, call the reader, look at how it ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from guard import SECONDS, Guard, Hang
from instrument import HITS, NOTHING
from mutate import Tree, mutated

from tpvc.compiler.errors import TpvcError


class Laid:
    """A directory that holds one tree after the other: only what differs is written."""

    def __init__(self, root: Path):
        self.root, self.now = root, {}

    def lay(self, tree: Tree) -> None:
        for name in self.now.keys() - tree.keys():
            os.unlink(self.root / name)
        for name, data in tree.items():
            if name in self.now and self.now[name] == data and type(self.now[name]) is type(data):
                continue
            path = self.root / name
            if isinstance(data, str) or isinstance(self.now.get(name), str):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            if "/" in name:
                path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, str):
                os.symlink(name if data == "loop" else data, path)
            else:
                with open(path, "wb", buffering=0) as file:
                    file.write(data)
        self.now = dict(tree)


def ended(call: Callable[[Path], object], root: Path, guard: Guard) -> tuple[str, str, str] | None:
    """None for a result or a TpvcError; (what, where, how) of a finding."""
    guard.seen.clear()
    error, start = None, time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        guard.armed = True
        call(root)
    except TpvcError:
        pass
    except BaseException as caught:
        error = caught
    finally:
        guard.armed = False  # from here on the alarm rings in vain
    signal.setitimer(signal.ITIMER_PROF, 0)
    if time.process_time() - start > SECONDS:
        error = error if isinstance(error, Hang) else Hang().with_traceback(error and error.__traceback__)
    if guard.seen:
        return "act", guard.seen[0].split(" '")[0], guard.seen[0]
    if error is None:
        return None
    greedy = isinstance(error, MemoryError) or ("alloc" in str(error) and "memory" in str(error))
    what = "hang" if isinstance(error, Hang) else "memory" if greedy else type(error).__name__
    return what, _where(error), str(error)[:200]


def _where(error: BaseException) -> str:
    """The innermost line of tpvc."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/site-packages/" not in f.filename and "/tests/fuzz/" not in f.filename]
    own = [f for f in own if f.filename.rpartition("/")[0].split("/")[-1] not in ("json",)]
    if not frames:
        return "somewhere"
    frame = next((f for f in reversed(own) if "/compiler/" in f.filename or "/kernels/" in f.filename), frames[-1])
    place = frame.filename.replace("\\", "/").split("/")
    return f"{'/'.join(place[-2:])}:{frame.lineno} {frame.name}"


def work(
    call: Callable[[Path], object],
    root: Path,
    corpus: list[Tree],
    kept: Path,
    words: Sequence[str],
    seed: str,
    cases: range,
    guard: Guard,
    tell: Callable[[int], None],
    report: Callable[[dict], None],
) -> None:
    """Run `cases`, keeping in `corpus`, and in the file `kept`, what reaches new blocks."""
    laid, seen = Laid(root), 0
    for tree in corpus:
        tell(cases.start)
        laid.lay(tree)
        HITS[:] = NOTHING
        ended(call, root, guard)
        seen |= int.from_bytes(HITS)
    for number in cases:
        tell(number)
        random = Random(f"{seed} {number}")
        base = corpus[-1 - int(len(corpus) * random.random() ** 2)]  # later ones more often
        tree = mutated(base, random, words, corpus)
        laid.lay(tree)
        HITS[:] = NOTHING
        found = ended(call, root, guard)
        now = int.from_bytes(HITS)
        if now & ~seen and found is None:
            seen |= now
            corpus.append(tree)
            with kept.open("a") as file:
                file.write(json.dumps(packed(tree)) + "\n")
        if found is not None:
            report({"what": found[0], "where": found[1], "how": found[2], "case": number, "tree": packed(tree)})
    tell(cases.stop)


def packed(tree: Tree) -> dict[str, list[str]]:
    """A tree as JSON."""
    return {n: ["bytes", d.hex()] if isinstance(d, bytes) else ["link", d] for n, d in tree.items()}


def unpacked(told: dict[str, list[str]]) -> Tree:
    return {n: bytes.fromhex(text) if kind == "bytes" else text for n, (kind, text) in told.items()}


def digest(found: dict) -> str:
    return hashlib.sha256(f"{found['what']} {found['where']}".encode()).hexdigest()[:8]


def quiet() -> None:
    """What libraries print while they choke is of no use."""
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)

"""Fuzz the readers of tpvc: `python tests/fuzz/run.py --cases 1000000`, or some of them: `--reader gguf`.

A process for each reader, one after the other, with limits on memory and time; it is started again behind a case that
ended it. The table says cases, seconds, blocks reached, and findings, each with a file that `--again FILE` repeats.
Exit code 1 where anything was found.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRITON_INTERPRET"] = "1"

import instrument
import readers
import seeds
from guard import SECONDS, Guard, grown, limit
from mutate import Tree
from worker import Laid, digest, ended, quiet, unpacked, work

DEAD = 60.0
"""Seconds, by the clock, after which a case is killed that waits for something, or that no alarm could end."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", choices=list(readers.SHARES))
    parser.add_argument("--keep", type=Path, help="directory for findings and for inputs that reached something new")
    parser.add_argument("--again", type=Path, help="run the case of a finding once, with its traceback")
    told = parser.parse_args()
    place = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="tpvc-fuzz-", dir=place) as work_dir:
        base = Path(work_dir)
        if told.again:
            return again(told.again, base)
        names = told.reader or list(readers.SHARES)
        whole = sum(readers.SHARES[n] for n in names)
        keep = told.keep or base / "kept"
        keep.mkdir(parents=True, exist_ok=True)
        calls = readers.calls(made(base / "model"))
        bad, total, start = 0, 0, time.monotonic()
        print(f"{'reader':<12} {'cases':>9} {'seconds':>8} {'kept':>6} {'MB':>5}  findings", flush=True)
        for name in names:
            cases = max(1, round(told.cases * readers.SHARES[name] / whole))
            bad += one(name, calls[name], cases, told.seed, base, keep)
            total += cases
        print(f"{total:,} cases, {time.monotonic() - start:.0f} s, {bad} findings", flush=True)
    return int(bad > 0)


def made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def one(name: str, call: readers.Call, cases: int, seed: int, base: Path, keep: Path) -> int:
    """Fuzz one reader; the number of different findings."""
    valid = seeds.SEEDS[name](made(base / f"seeds-{name}"))
    root = made(base / "tree" / name)
    outside = root.parent / "outside.txt"
    outside.write_text("not part of any input\n")
    kept, told = keep / f"{name}.corpus", keep / f"{name}.findings"
    shared = mmap.mmap(-1, 16)  # the number of the case, and how often that was told
    start, most, first = time.monotonic(), 0, 0
    found: dict[str, dict] = {}
    while first < cases:
        corpus = [*valid, *(unpacked(json.loads(line)) for line in (kept.open() if kept.exists() else ()))]
        told.unlink(missing_ok=True)
        code, size = process(name, call, root, corpus, kept, told, f"{seed} {name}", range(first, cases), shared)
        most = max(most, size)
        for line in told.open() if told.exists() else ():
            note = json.loads(line)
            found.setdefault(digest(note), note | {"reader": name, "times": 0})["times"] += 1
        at = struct.unpack_from("<q", shared)[0]
        if code:
            where = "killed" if code == signal.SIGKILL else f"signal {code}"
            tree = {
                p.relative_to(root).as_posix(): ["bytes", p.read_bytes().hex()] for p in root.rglob("*") if p.is_file()
            }
            stack = told.with_suffix(".stack")
            said = [line.strip() for line in stack.read_text().splitlines() if "File" in line] if stack.exists() else []
            note = {
                "what": "death",
                "where": where,
                "how": "; ".join(said[:4]),
                "case": at,
                "tree": tree,
                "reader": name,
            }
            found.setdefault(digest(note), note | {"times": 0})["times"] += 1
        first = at + 1
    seconds = time.monotonic() - start
    entries = sum(1 for _ in kept.open()) if kept.exists() else 0
    if outside.read_text() != "not part of any input\n" or {p.name for p in root.parent.iterdir()} - {
        name,
        outside.name,
        *readers.SHARES,
    }:
        found["outside"] = {
            "what": "act",
            "where": "outside",
            "how": "a file outside of the tree changed",
            "times": 1,
            "case": -1,
        }
    print(f"{name:<12} {cases:>9,} {seconds:>8.0f} {entries:>6} {most / 1e6:>5.0f}  {len(found) or 'none'}", flush=True)
    for key, note in sorted(found.items()):
        path = keep / f"{name}-{key}.json"
        path.write_text(json.dumps(note))
        print(f"    {note['what']} at {note['where']}, {note['times']} times: {note['how'][:150]} ({path})", flush=True)
    told.unlink(missing_ok=True)
    shutil.rmtree(root)
    return len(found)


def process(name, call, root, corpus, kept, told, seed, cases, shared) -> tuple[int, int]:
    """(the signal that ended a child, 0 for none; bytes that its memory grew by)."""
    read_end, write_end = os.pipe()
    struct.pack_into("<qq", shared, 0, cases.start, 0)
    child = os.fork()
    if not child:
        try:
            quiet()
            faulthandler.register(signal.SIGUSR1, told.with_suffix(".stack").open("w"))
            guard = Guard(root, (root.parent.parent / "model",))
            limit(guard)
            before = grown()
            with told.open("a") as file:

                def report(note: dict) -> None:
                    file.write(json.dumps(note) + "\n")
                    file.flush()

                def tell(number: int) -> None:
                    struct.pack_into("<qq", shared, 0, number, struct.unpack_from("<q", shared, 8)[0] + 1)

                work(call, root, corpus, kept, sorted(instrument.WORDS), seed, cases, guard, tell, report)
            os.write(write_end, struct.pack("<q", grown() - before))
        except BaseException:
            import traceback

            told.with_suffix(".broken").write_text(traceback.format_exc())
            os._exit(99)
        os._exit(0)
    os.close(write_end)
    seen, since, spent = -1, time.monotonic(), 0.0
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        now = struct.unpack_from("<q", shared, 8)[0]
        if now != seen:
            seen, since, spent = now, time.monotonic(), state(child)[1]
        elif time.monotonic() - since > DEAD and (state(child)[0] in "SD" or state(child)[1] - spent > 2 * SECONDS):
            os.kill(child, signal.SIGUSR1)  # where it is goes into a file
            time.sleep(1)
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    size = os.read(read_end, 8)
    os.close(read_end)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(told.with_suffix(".broken").read_text())
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, struct.unpack("<q", size)[0] if size else 0


def state(child: int) -> tuple[str, float]:
    """(R: it runs or waits for a processor; S or D: it waits for something else; seconds of a processor so far)."""
    told = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return told[0], (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")


def again(path: Path, base: Path) -> int:
    """One case, with limits, and with the traceback of how it ended."""
    note = json.loads(path.read_text())
    tree: Tree = unpacked(note["tree"])
    call = readers.calls(made(base / "model"))[note["reader"]]
    root = made(base / "tree" / "again")
    (root.parent / "outside.txt").write_text("not part of any input\n")
    Laid(root).lay(tree)
    for name, data in tree.items():
        print(name, data[:300] if isinstance(data, bytes) else f"-> {data}")
    guard = Guard(root, (base / "model",))
    limit(guard)
    print(ended(call, root, guard))
    call(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())

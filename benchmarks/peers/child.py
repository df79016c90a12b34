"""Run one script of this folder in its environment and measure what it takes. Standard library only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A script did not end with 0; the text is its log's end."""


def run(python: Path, script: Path, said: Mapping[str, Any], work: Path, log: Path, threads: int) -> dict[str, float]:
    """`script` is given `said` as a JSON file and runs in the new folder `work`, which is removed when it ends well.

    {"minutes", "cpu_minutes", "peak_gib", "load"}: wall clock from start to end, imports and saving included; CPU time
    of the process and of those that it waited for; the largest resident size that one of these had; and the load of the
    machine (over a minute) before. What torch compiles, it compiles anew, but for the headers that it keeps elsewhere.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    told = work / "job.json"
    told.write_text(json.dumps(dict(said), default=str), encoding="utf-8")
    own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own |= {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "PYTHONUNBUFFERED": "1"}
    load, began = os.getloadavg()[0], time.perf_counter()
    with log.open("w", encoding="utf-8") as lines:
        command = [python, script, told]
        child = subprocess.Popen(command, cwd=work, env={**os.environ, **own}, stdout=lines, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            child.wait()
            raise
    wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise Failed(f"{script.name} ended with {child.returncode}: {' '.join(tail)} (all of it: {log})")
    shutil.rmtree(work)
    cpu = usage.ru_utime + usage.ru_stime
    return {"minutes": wall / 60, "cpu_minutes": cpu / 60, "peak_gib": usage.ru_maxrss / 2**20, "load": load}

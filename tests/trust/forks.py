"""A process that has imported what commands need, and forks for every command that it is told to run.

    LD_PRELOAD=faults.so python forks.py

A line of JSON comes in, a line goes out. In: "arguments" of `tpvc`, "under" (the folder whose file operations are
counted); and what is to go wrong: "fault" and "at" as in faults.c, or "signal" and "after" so many seconds, or "clock"
(seconds that the wall clock goes back at every look). Out: "code" as subprocess has it (-9: killed), "calls" that
change files, "said" on standard error, "seconds".

The child is a fresh copy of this process and runs the command's own `main`. Only two things differ from `tpvc`: nothing
is imported any more, and the stop watch of the reports stands still, so that they can be compared too.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from typing import Any

import tpvc

MODULES = (
    "jinja2",
    "onnxruntime",
    "transformers.activations",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
    "transformers.tokenization_utils_tokenizers",
)
"""Beside all of tpvc."""


def child(asked: dict[str, Any], said: int, told: int) -> None:
    """Run the command and leave; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        faults = ctypes.CDLL(None)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
        time.perf_counter = lambda: 0.0
        sys.argv = ["tpvc", *asked["arguments"]]
        if "clock" in asked:
            faults.fault_clock(ctypes.c_long(asked["clock"]))
        faults.fault_arm(asked["under"].encode(), asked.get("fault", 0), ctypes.c_long(asked.get("at", 0)))
        from tpvc.compiler.cli import main

        os.write(told, b" ")
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:  # what Python itself would print
            traceback.print_exc()
        faults.fault_count.restype = ctypes.c_long
        sys.stderr.flush()
        os.write(told, str(faults.fault_count()).encode())
    finally:
        os._exit(code)


def run(asked: dict[str, Any]) -> dict[str, Any]:
    out, told = os.pipe()
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.close(out)
            child(asked, said.fileno(), told)
        os.close(told)
        os.read(out, 1)  # now it runs
        if "after" in asked and not select.select([out], [], [], asked["after"])[0]:
            os.kill(pid, asked.get("signal", signal.SIGKILL))
        with os.fdopen(out, "rb") as pipe:
            calls = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return {
            "code": code,
            "calls": int(calls) if calls else None,
            "said": said.read().decode(errors="replace"),
            "seconds": time.monotonic() - began,
        }


def main() -> None:
    import tpvc.compiler.backends.triton as triton

    triton.ROWS = (1,)  # packages for one text at a time have fewer kernels to compile
    for module in pkgutil.walk_packages(tpvc.__path__, "tpvc."):
        with suppress(ImportError):  # of an optional package
            if not module.name.endswith(".__main__"):
                importlib.import_module(module.name)
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

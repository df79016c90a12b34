"""Peak memory that `tpvc plan` predicts beside what `tpvc quantize` then uses, for the same options.

    python benchmarks/plan_memory.py [--only WORD]

Runs are short (few optimiser steps, little text): a step more changes no peak. Each is a process of its own and says
its VmHWM itself. The demo model comes from the cache; wider ones have random weights and are made in a temporary
directory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import checkpoint

WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
MIDDLE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
FAST = ("--recipe", "fast", "--iters", "3")
TEXT = ("--nsamples", "64", "--seqlen", "128")

RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("demo", "rtn", ("--method", "rtn")),
    ("demo", "W4 g64, 32 x 256", (*FAST, "--nsamples", "32")),
    ("demo", "W3 per channel, 64 x 128", (*FAST, "--bits", "3", "--group-size", "-1", *TEXT)),
    ("demo", "W8A8, 16 x 128", (*FAST, "--scheme", "W8A8", "--nsamples", "16", "--seqlen", "128")),
    ("demo", "W4 g64, 128 x 256", (*FAST, "--nsamples", "128")),
    ("middle", "W4 g128, 16 x 128", (*FAST, "--nsamples", "16", "--seqlen", "128")),
    ("wide", "W4 g128, 8 x 128", (*FAST, "--nsamples", "8", "--seqlen", "128")),
    ("wide", "rtn", ("--method", "rtn")),
    ("middle", "W4 g128, 8 x 64, sampled", (*FAST, "--dataset", "self", "--nsamples", "8", "--seqlen", "64")),
)
"""(model, what, options)"""


def said(*arguments: str) -> dict:
    """The JSON object that a command prints."""
    command = [sys.executable, "-c", "from tpvc.compiler.cli import main; main()", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose model or description holds this word")
    chosen = [run for run in RUNS if parser.parse_args().only in f"{run[0]} {run[1]}"]
    print("| model | run | predicted MB | used MB | difference | plan s | run s |\n|---|---|---|---|---|---|---|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        models = {"demo": "smollm2-135m"}
        for name, shape, vocab in (("middle", MIDDLE, 16000), ("wide", WIDE, 32000)):
            if any(run[0] == name for run in chosen):
                models[name] = str(Path(scratch) / name)
                checkpoint(Path(scratch) / name, 2, shape, vocab)
        for number, (model, what, options) in enumerate(chosen):
            began = time.perf_counter()
            planned = said("plan", models[model], *options)["quantize"]["host_bytes"]
            between = time.perf_counter()
            used = said("quantize", models[model], "-o", str(Path(scratch) / f"out{number}"), *options)["peak_bytes"]
            off = planned / used - 1
            worst = max(worst, abs(off))
            times = f"{between - began:.0f} | {time.perf_counter() - between:.0f}"
            print(f"| {model} | {what} | {planned / 1e6:.0f} | {used / 1e6:.0f} | {off:+.1%} | {times} |", flush=True)
    print(f"\nat most {worst:.1%} off")


if __name__ == "__main__":
    main()

"""Peak memory and time that `tpvc plan` predicts beside what `tpvc quantize` then uses, for the same options.

    python benchmarks/plan_memory.py [--only WORD]

Runs are short (few optimiser steps, little text): a step more changes no peak. Each is a process of its own and says
its VmHWM itself. The demo model comes from the cache; wider ones have random weights and are made in a temporary
directory.

One thread, and seconds of the processor in place of those of the clock, in the plan as in the run, so that other work
on the machine does not count. What is planned leaves out reading, writing and text that the model writes itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import checkpoint

WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
MIDDLE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
FAST = ("--recipe", "fast", "--iters", "3")
STATIC = ("--method", "rtn", "--scheme", "W8A8", "--activations", "int8-static")
TEXT = ("--nsamples", "64", "--seqlen", "128")

RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("demo", "rtn", ("--method", "rtn")),
    ("demo", "W4 g64, 32 x 256", (*FAST, "--nsamples", "32")),
    ("demo", "W3 per channel, 64 x 128", (*FAST, "--bits", "3", "--group-size", "-1", *TEXT)),
    ("demo", "W8A8, 16 x 128", (*FAST, "--scheme", "W8A8", "--nsamples", "16", "--seqlen", "128")),
    ("demo", "W4 g64, 128 x 256", (*FAST, "--nsamples", "128")),
    ("demo", "static W8A8 to nearest, 72 x 256", (*STATIC, "--nsamples", "72")),
    ("middle", "rtn", ("--method", "rtn")),
    ("middle", "W4 g128, 16 x 128", (*FAST, "--nsamples", "16", "--seqlen", "128")),
    ("middle", "W8A8, 16 x 128", (*FAST, "--scheme", "W8A8", "--nsamples", "16", "--seqlen", "128")),
    ("middle", "W4 g128, 8 x 64, sampled", (*FAST, "--dataset", "self", "--nsamples", "8", "--seqlen", "64")),
    ("opt", "W4 g128, 16 x 128", (*FAST, "--nsamples", "16", "--seqlen", "128")),
    ("neox", "W4 g128, 16 x 128", (*FAST, "--nsamples", "16", "--seqlen", "128")),
    ("wide", "rtn", ("--method", "rtn")),
    ("wide", "W4 g128, 8 x 128", (*FAST, "--nsamples", "8", "--seqlen", "128")),
)
"""(model, what, options)"""


OTHERS = {
    "opt": {"model_type": "opt", "hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096},
    "neox": {"model_type": "gpt_neox", "hidden_size": 1024, "intermediate_size": 4096},
}
"""Models that transformers makes: four blocks, 16 heads, 16000 words."""

WATCH = "import time\ntime.perf_counter = time.process_time\n"
"""Seconds of the processor; a module that Python imports when it starts."""


def said(scratch: Path, *arguments: str) -> dict:
    """The JSON object that a command prints."""
    command = [sys.executable, "-c", "from tpvc.compiler.cli import main; main()", *arguments, "--json"]
    watched = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(scratch / "watch")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | watched)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def made(name: str, folder: Path) -> None:
    """A model with random weights, of the shape called `name`."""
    shapes: dict[str, Any] = {"middle": (MIDDLE, 16000), "wide": (WIDE, 32000)}
    if name in shapes:
        checkpoint(folder, 4, *shapes[name])
        return
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (folder.parent / "middle").is_dir():
        made("middle", folder.parent / "middle")
    common = {"num_hidden_layers": 4, "num_attention_heads": 16, "vocab_size": 16000, "max_position_embeddings": 512}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**OTHERS[name], **common)).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder.parent / "middle").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose model or description holds this word")
    chosen = [run for run in RUNS if parser.parse_args().only in f"{run[0]} {run[1]}"]
    print("| model | run | predicted MB | used MB | difference | predicted s | used s | ratio |\n" + "|---" * 8 + "|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as place:
        scratch, models = Path(place), {"demo": "smollm2-135m"}
        (scratch / "watch").mkdir()
        (scratch / "watch" / "sitecustomize.py").write_text(WATCH)
        for number, (model, what, options) in enumerate(chosen):
            if model not in models:
                models[model] = str(scratch / model)
                if not (scratch / model).is_dir():
                    made(model, scratch / model)
            planned = said(scratch, "plan", models[model], *options)["quantize"]
            used = said(scratch, "quantize", models[model], "-o", str(scratch / f"out{number}"), *options)
            off = planned["host_bytes"] / used["peak_bytes"] - 1
            worst = max(worst, abs(off))
            memory = f"{planned['host_bytes'] / 1e6:.0f} | {used['peak_bytes'] / 1e6:.0f} | {off:+.1%}"
            seconds = f"{planned['seconds']:.0f} | {used['seconds']:.0f} | {planned['seconds'] / used['seconds']:.2f}"
            print(f"| {model} | {what} | {memory} | {seconds} |", flush=True)
    print(f"\nmemory at most {worst:.1%} off")


if __name__ == "__main__":
    main()

"""FlexRound block by block: seconds and peak memory after every block, of one process or of several of torchrun's.

    python benchmarks/scale_blocks.py            16 blocks of Llama-3.2-1B's shape
    python benchmarks/scale_blocks.py --model smollm2-135m --processes 1 2 --first 3 --steps 20 --nsamples 64

Without a model the checkpoint is synthetic (random bfloat16 weights, embeddings tied, text of random words) and made in
a temporary directory, which takes 4 GB. Every process has one thread. Seconds of a processor are counted too: a busy
machine does not add to them. benchmarks/memory.py has growing depths, and round-to-nearest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from memory import checkpoint

LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 128256


class Enough(Exception):
    """As many blocks as were asked for are rounded."""


def peak() -> float:
    """GiB: the most that this process has held."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) / 2**20


def work(model: str, out: str, first: int | None, options: dict) -> None:
    """What every process does."""
    import torch

    import tpvc
    from tpvc.compiler.errors import TpvcError

    torch.set_num_threads(1)
    rank, imported = os.environ.get("RANK", "0"), peak()
    before = [time.perf_counter(), time.process_time()]

    def told(stage: str, done: int, total: int, note: str) -> None:
        if stage != "FlexRound":
            return
        now = [time.perf_counter(), time.process_time()]
        if note.startswith(f"block {done - 1}:"):
            wall, busy = (b - a for a, b in zip(before, now, strict=True))
            print(f"  block {done - 1:2}: {wall:.1f} s, {busy:.1f} s of a processor, peak {peak():.2f} GiB", flush=True)
        before[:] = now
        if done == first:
            raise Enough

    try:
        tpvc.quantize(model, out, progress=told, **options)
    except Enough:
        pass
    except TpvcError:
        if first is None or rank == "0":  # else process 0 had enough
            raise
    busy = time.process_time()
    print(f"  process {rank}: {busy:.0f} s of a processor, peak {peak():.2f} GiB, {imported:.2f} of it imports")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--blocks", type=int, default=16, help="of the synthetic model")
    parser.add_argument("--first", type=int, help="stop after so many blocks")
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=128)
    asked = parser.parse_args()
    options = {"recipe": "fast", "steps": asked.steps, "nsamples": asked.nsamples, "seqlen": asked.seqlen}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        model = asked.model
        if model is None:
            model, text = str(Path(scratch, "model")), Path(scratch, "words.txt")
            words = random.Random(0).choices(range(1, VOCABULARY), k=asked.nsamples * asked.seqlen)
            text.write_text(" ".join(f"w{i}" for i in words))
            options["dataset"] = str(text)
            count = checkpoint(Path(model), asked.blocks, LLAMA_1B, VOCABULARY, tied=True)
            print(f"{count / 1e9:.2f}B parameters in {asked.blocks} blocks")
        for processes in asked.processes:
            print(f"{processes} of one thread: {asked.nsamples} windows of {asked.seqlen}, {asked.steps} steps a block")
            out = str(Path(scratch, f"out{processes}"))
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            own = [__file__, "--work", model, out, json.dumps([asked.first, options])]
            subprocess.run((start if processes > 1 else [sys.executable]) + own, check=True, env=environment)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], *json.loads(sys.argv[4]))
    else:
        main()

"""How fast, how large, how much memory: every target in a process of its own, runs alternating, medians.

A run is: `prompt_tokens` tokens in, `new_tokens` tokens out, greedy, never stopping early. Machines get warm and
busy, so one run of each target follows the other (A B C A B C ...). A worker answers every line on its standard input
with a JSON object on its standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tpvc.compiler.engines import Engine, cores, open_engine
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.progress import Progress, silent


@dataclass(frozen=True)
class Row:
    """One target's figures: medians over the runs.

    prefill      prompt tokens per second, up to the first new token
    decode       new tokens per second after the first
    first_token  seconds from the prompt to the first new token
    peak         bytes: the process's largest resident set, runtime and weights included
    size         bytes of the weight files
    load         seconds to load the model
    runs         (first_token, decode) of every run, in order
    """

    target: str
    engine: str
    prefill: float
    decode: float
    first_token: float
    peak: int
    size: int
    load: float
    runs: tuple[tuple[float, float], ...]


def bench(
    targets: list[str],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    runs: int = 5,
    threads: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[Row]:
    """Measure `targets` side by side; `threads` is the number each runtime may use, all cores by default;
    device: where packages run.

    TpvcError when a target cannot be loaded or its context is too short.
    """
    if not targets or runs < 1 or prompt_tokens < 1 or new_tokens < 2:
        raise TpvcError("bench needs at least one target, one run, one prompt token and two new tokens")
    tell = progress or silent
    workers: list[_Worker] = []
    with contextlib.ExitStack() as stack:
        for i, target in enumerate(targets):
            tell("load", i, len(targets), target)
            workers.append(stack.enter_context(_Worker(target, threads or cores(), prompt_tokens, new_tokens, device)))
        tell("load", len(targets), len(targets), "")
        done, total = 0, runs * len(workers)
        for _ in range(runs):
            for worker in workers:
                tell("measure", done, total, worker.target)
                worker.measure()
                done += 1
        tell("measure", total, total, "")
        return [worker.row(prompt_tokens) for worker in workers]


class _Worker:
    """A child process that has loaded one target and measures a run whenever it is asked to."""

    def __init__(self, target: str, threads: int, prompt_tokens: int, new_tokens: int, device: str):
        self.target = target
        self.times: list[tuple[float, float]] = []
        self.peak = 0
        # -P: a folder in the working directory must not shadow an installed package.
        given = [target, device, threads, prompt_tokens, new_tokens]
        command = [sys.executable, "-P", "-m", "tpvc.compiler.bench", *given]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C reaches the parent only, which then ends its children
        )

    def __enter__(self) -> _Worker:
        try:
            self.facts = self._receive()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def measure(self) -> None:
        try:
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: receiving says how
        answer = self._receive()
        self.times.append((answer["first"], answer["decode"]))
        self.peak = answer["peak"]

    def _receive(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            why = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise TpvcError(f"{self.target}: the process measuring it {why}; expected it to answer")
        answer = json.loads(line)
        if "error" in answer:
            raise TpvcError(answer["error"])
        return answer

    def row(self, prompt_tokens: int) -> Row:
        first = median(f for f, _ in self.times)
        return Row(
            target=self.target,
            prefill=prompt_tokens / first,
            decode=median(d for _, d in self.times),
            first_token=first,
            peak=self.peak,
            runs=tuple(self.times),
            **self.facts,
        )


def prompt(vocab_size: int, tokens: int) -> list[int]:
    """The same arbitrary ids for every engine of one vocabulary; 7919 is prime, so that they wander through it."""
    return [(i * 7919 + 1) % vocab_size for i in range(tokens)]


def once(engine: Engine, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """One run: (seconds to the first token, tokens per second after it)."""
    ids = prompt(engine.vocab_size, prompt_tokens)
    start = time.perf_counter()
    tokens = engine.generate(ids, new_tokens, stop=False)
    next(tokens)
    first = time.perf_counter()
    count = sum(1 for _ in tokens)
    return first - start, count / (time.perf_counter() - first)


def peak_bytes() -> int:
    """The largest resident set of this process so far.

    Linux keeps ru_maxrss across exec, so that a child starts with its parent's; VmHWM belongs to the process alone.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _work(target: str, device: str, threads: int, prompt_tokens: int, new_tokens: int) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer

    def send(**answer: object) -> None:
        print(json.dumps(answer), file=out, flush=True)

    try:
        start = time.perf_counter()
        engine = open_engine(target, threads, device=device)
        load = time.perf_counter() - start
        if prompt_tokens + new_tokens > engine.context_length:
            raise TpvcError(
                f"{target}: {prompt_tokens} prompt and {new_tokens} new tokens do not fit its context of "
                f"{engine.context_length}; lower --prompt-tokens or --new-tokens"
            )
        once(engine, prompt_tokens, min(4, new_tokens))
    except TpvcError as error:
        return send(error=str(error))
    send(engine=engine.label, size=engine.size, load=load)
    for _ in sys.stdin:
        first, decode = once(engine, prompt_tokens, new_tokens)
        send(first=first, decode=decode, peak=peak_bytes())


def check_picture(path: Path) -> None:
    """Refuse, before anything is measured, a file name that `chart` could not write."""
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
        raise TpvcError(
            f"'{path}' cannot hold the picture; expected a name that ends in .png in a directory that exists"
        )


def chart(rows: list[Row], path: Path) -> None:
    """A PNG with a panel each for decode and prefill speed, peak memory and size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("decode, tokens/s", [r.decode for r in rows]),
        ("prefill, tokens/s", [r.prefill for r in rows]),
        ("peak memory, MB", [r.peak / 1e6 for r in rows]),
        ("weights, MB", [r.size / 1e6 for r in rows]),
    )
    labels = [f"{Path(r.target).name or r.target}\n{r.engine}" for r in rows]
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 0.9 + 0.5 * len(rows)), sharey=True, layout="constrained")
    for axis, (title, values) in zip(axes, panels, strict=True):
        bars = axis.barh(range(len(rows)), values, color=[f"C{i}" for i in range(len(rows))])
        axis.bar_label(bars, fmt="%.4g", padding=3)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), labels)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    _work(*sys.argv[1:3], *map(int, sys.argv[3:]))

"""A few seconds of a run, in a process of its own: what it holds before it computes, and how long its parts take.

    python -m tpvc.compiler.plan.probe < {"job": options of `prepare`, "dataset", "nsamples", "seed", "device", "timed"}

Weights are random, of the shapes that the first block has: no weight of the model is read. Where a block does not fit
into memory (`timed` false), nothing is timed.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpvc.compiler.errors import TpvcError

SLICE = 1 << 20
"""Weights of a matrix that are searched or rounded to see how long it takes."""


@dataclass(frozen=True)
class Probe:
    """resident   bytes that the process held before and after its computations: libraries, tokenizer
    tokenizer   bytes of the tokenizer's files
    sampled     calibration windows that the text does not yield, which the model writes itself
    text        seconds that tokenizing the calibration text took
    step, batch, search   seconds of an optimiser step, of a forward pass of AT_ONCE windows, of the search of all grids
                of a block; None where nothing was timed
    measuring   seconds of measuring what widths cost (passes/measure_damage.py) and of finding factors and
                grids of activations (passes/ease_inputs.py); 0 where neither is done
    closing     seconds of all steps of the closing step (passes/tune_scales.py)
    number      seconds of rounding a number to nearest
    """

    resident: int
    tokenizer: int
    sampled: int
    text: float
    step: float | None
    batch: float | None
    search: float | None
    measuring: float | None
    closing: float | None
    number: float | None


def probe(options: dict[str, Any]) -> Probe:
    """Run this file as a process. TpvcError where it refuses what a run would refuse."""
    command = [sys.executable, "-P", "-m", "tpvc.compiler.plan.probe"]  # -P: nothing is run from the working directory
    done = subprocess.run(command, input=json.dumps(options), capture_output=True, text=True)
    if done.returncode == 2:
        raise TpvcError(json.loads(done.stdout.splitlines()[-1])["error"])
    if done.returncode < 0:
        raise TpvcError(
            f"the probe of a few seconds was ended by signal {-done.returncode}, as for want of memory; plan where"
            " there is more of it, or a smaller model"
        )
    if done.returncode:
        raise RuntimeError(f"the probe ended with {done.returncode}:\n{done.stderr}")
    return Probe(**json.loads(done.stdout.splitlines()[-1]))


def seconds(found: Probe, blocks: int, steps: int, windows: int, held: int, inside: int, outside: int) -> float | None:
    """About how long a run takes; windows 0: round-to-nearest. inside, outside: numbers rounded in the blocks, in the
    head. Reading and writing are left out, as is text that the model writes."""
    if found.number is None:
        return None
    if not windows:
        return found.text + found.measuring + (inside + outside) * found.number
    batches = (2 * windows + (windows - held)) / AT_ONCE_WINDOWS + 3 * max(held, AT_ONCE_WINDOWS) / AT_ONCE_WINDOWS
    block = steps * found.step + math.ceil(batches) * found.batch + found.search
    return found.text + found.measuring + blocks * block + found.closing + outside * found.number


AT_ONCE_WINDOWS = 8


def _work(job: dict[str, Any], dataset: str, nsamples: int, seed: int, device: str, timed: bool) -> Probe:
    import torch

    from tpvc.compiler import frontends
    from tpvc.compiler.calibration import text_windows
    from tpvc.compiler.freed import give_back
    from tpvc.compiler.job import calibrated, prepare, scale_dtype
    from tpvc.passes.ease_inputs import with_any_grids

    found = prepare(**job)
    made = replace(found, program=with_any_grids(found.program))
    tokenizer = frontends.tokenizer(made.program)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    learned, began = job["method"] == "flexround", time.perf_counter()
    sampled = 0
    if calibrated(job["method"], job["activations"], made.avg_bits):
        windows, *_ = text_windows(made.program, tokenizer, dataset, nsamples, made.seqlen)
        sampled = nsamples - len(windows)
    text = time.perf_counter() - began
    step = batch = search = measuring = closing = number = None
    if timed:
        with torch.no_grad():
            number = _rounding(made, scale_dtype(made.source))
            measuring = 0.0 if made.avg_bits is None else _measuring(made, learned, number, seed, device)
            measuring += _easing(found, nsamples, seed, device) if made.eased else 0.0
            if learned:
                step, batch, search = _learning(made, scale_dtype(made.source), seed, device)
                closing = _closing(made, nsamples, device) if made.recipe.rounds else 0.0
    give_back()
    return Probe(_resident(), size, sampled, text, step, batch, search, measuring, closing, number)


def _rounding(made: Any, dtype: Any) -> float:
    import torch

    from tpvc.passes.round_to_nearest import quantize

    columns = made.grid.group if made.grid.group > 0 else 1024
    weight = torch.randn(max(1, 4 * SLICE // columns), columns)
    return _seconds(lambda: quantize(weight, made.grid, dtype)) / weight.numel()


def _learning(made: Any, dtype: Any, seed: int, device: str) -> tuple[float, float, float]:
    """Seconds of a step, of a batch of windows, of the search of a block's grids."""
    import torch

    from tpvc.compiler.program import linears
    from tpvc.compiler.quick import ops_for
    from tpvc.passes.block import Block, spread, unrounded
    from tpvc.passes.flexround import FlexRound
    from tpvc.passes.grid import min_max

    program = _random(made.program)
    block = Block(program, 0, device)
    names = [n.params["weight"] for n in linears(block.nodes)]
    count = max(AT_ONCE_WINDOWS, made.recipe.batch)
    ids = spread(count, len(program.adapters))
    x = torch.randn(count, made.seqlen, program.facts.hidden_size)
    ops = unrounded(ops_for([made.grid.bits]))
    target = block.outputs(x, block.weights, ids, ops)
    batch = _seconds(lambda: block.outputs(x, block.weights, ids, ops)) * AT_ONCE_WINDOWS / count

    searched = _searching(made, [block.weights[name] for name in names], dtype) if made.recipe.searched else 0.0

    def learn(steps: int) -> float:
        learning = FlexRound(made.grid, replace(made.recipe, steps=steps, held_out=0), x, None, seed, dtype, device)
        weights = {n: block.weights[n] for n in names}
        factors = {n: learning.factors(w, min_max(w, made.grid, dtype), made.grid, 0) for n, w in weights.items()}
        seen = learning.seen(program, 0)
        return _seconds(lambda: learning.learn(block, factors, x, target, ids, 0, seen), warm=False)

    first = learn(1)
    step = first if first > 5 else (learn(4) - learn(1)) / 3
    return step, batch, searched


def _searching(made: Any, weights: list[Any], dtype: Any) -> float:
    """Seconds of the search of the grids of these matrices."""
    import torch

    from tpvc.passes.grid_search import search

    searched = 0.0
    for weight in weights:
        rows = weight if made.grid.group == 0 else weight[: max(1, SLICE // weight.shape[1])]
        importance = torch.ones(weight.shape[1], device=weight.device)
        took = _seconds(lambda w=rows, h=importance: search(w, h, made.grid, dtype), warm=False)
        searched += took * len(weight) / len(rows)
    return searched


def _measuring(made: Any, learned: bool, number: float, seed: int, device: str) -> float:
    """Seconds of measuring what widths cost: a pass through the first block, and a few tokens through the head."""
    import torch

    from tpvc.compiler.job import scale_dtype
    from tpvc.passes.block import Block, spread
    from tpvc.passes.measure_damage import DRAWS, FLOAT, MEASURED, length
    from tpvc.passes.sensitivity import looked_at

    program, dtype = _random(made.program), scale_dtype(made.source)
    block, windows, few = Block(program, 0, device), looked_at(program), min(16, made.seqlen)
    tokens = min(made.seqlen, length(program))
    ids = spread(windows, len(program.adapters))
    x = torch.randn(windows, tokens, program.facts.hidden_size)
    once = _seconds(lambda: block.outputs(x, block.weights, ids, FLOAT))
    groups, searched = [g for g in made.fused if g.block == 0], learned and made.recipe.searched
    tried = [b for b in groups[0].costs if b <= MEASURED]
    weights = [block.weights[w] for g in groups for w in g.weights]
    rounding = _searching(made, weights, dtype) if searched else number * sum(w.numel() for w in weights)
    head = _head(program, x[:1, :few], ids[:1], DRAWS, FLOAT, device) * windows * tokens / few
    passes = 3 + len(groups) * len(tried) + DRAWS  # forwards, importance, for the gradients; variants; gradients
    return head + made.program.blocks * (passes * once + len(tried) * rounding)


def _head(program: Any, x: Any, ids: Any, draws: int, ops: Any, device: str) -> float:
    """Seconds of gradients at what leaves the last block, x [1, L, D]."""
    from tpvc.passes.sensitivity import logit_gradients

    return _seconds(lambda: logit_gradients(program, x, ids, draws, 0, device, ops), warm=False)


def _easing(made: Any, nsamples: int, seed: int, device: str) -> float:
    """Seconds of finding factors and grids of activations, by the first block and a few tokens through the head."""
    import torch

    from tpvc.compiler.job import scale_dtype
    from tpvc.passes.block import EXACT, Block, spread
    from tpvc.passes.ease_inputs import EaseInputs, windows_seen
    from tpvc.passes.sensitivity import backwards, looked_at

    program = _random(made.program)
    block, few = Block(program, 0, device), min(nsamples, looked_at(program))
    windows, some = min(nsamples, windows_seen(program)), min(16, made.seqlen)
    ids = spread(windows, len(program.adapters))
    x = torch.randn(few, made.seqlen, program.facts.hidden_size)
    once = _seconds(lambda: block.outputs(x, block.weights, ids[:few], EXACT)) / few
    back = _seconds(lambda: backwards(block, x, ids[:few], x[None], EXACT), warm=False)
    find = EaseInputs(x, made.grid, None, scale_dtype(made.source), seed, device)
    found = _seconds(lambda: find.offers(program, block, 0, x, ids[:few], x), warm=False)
    head = _head(program, x[:1, :some], ids[:1], 1, EXACT, device) * few * made.seqlen / some
    return head + made.program.blocks * (back + found + once * (2 * windows - few))


def _closing(made: Any, nsamples: int, device: str) -> float:
    """Seconds of the closing step: what one step takes with one block and with two says what it takes with all."""
    import torch

    from tpvc.compiler.plan.memory import cut
    from tpvc.compiler.program import linears
    from tpvc.passes.block import spread
    from tpvc.passes.flexround import held_out
    from tpvc.passes.round_to_nearest import quantize
    from tpvc.passes.tune_scales import Tunable, schedule

    recipe, program = made.recipe, _random(cut(made.program))
    names = [n.params["weight"] for n in linears(n for n in program.nodes if n.block is not None)]
    program = program.with_params({n: quantize(program.params[n].read(), made.grid) for n in names})
    x = torch.randn(recipe.batch, made.seqlen, program.facts.hidden_size)
    ids = spread(len(x), len(program.adapters))

    def step(blocks: int) -> float:
        model = Tunable.of(cut(program, blocks), device)
        with torch.enable_grad():
            return _seconds(lambda: model.divergence(x, x, ids).backward())

    one = step(1)
    whole = one + (made.program.blocks - 1) * max(0.0, step(2) - one)
    held = held_out(recipe, nsamples)
    planned = schedule(recipe.rounds, recipe.batch, recipe.lr_rounds, nsamples - held)
    judged = (1 + planned.steps / planned.stretch) * held / recipe.batch / 4  # of a step's four passes one
    return (planned.steps + judged) * whole


def _random(program: Any) -> Any:
    """`program` with random weights in place of its own."""
    import torch

    from tpvc.compiler.program import Lazy

    def lazy(parameter: Lazy) -> Lazy:
        scale = parameter.shape[-1] ** -0.5 if len(parameter.shape) > 1 else 1.0
        return replace(parameter, read=lambda: torch.randn(parameter.shape).mul_(scale))

    mine = {name: lazy(p) for name, p in program.params.items() if isinstance(p, Lazy)}
    return replace(program, params={**program.params, **mine})


def _seconds(work: Callable[[], Any], warm: bool = True) -> float:
    import torch

    if warm:
        work()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _resident() -> int:
    """Bytes that this process holds now; where the system does not say so, the most that it held."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    from tpvc.compiler.bench import peak_bytes

    return peak_bytes()


def main() -> None:
    from dataclasses import asdict

    try:
        print(json.dumps(asdict(_work(**json.load(sys.stdin)))))
    except TpvcError as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(2)


if __name__ == "__main__":
    main()

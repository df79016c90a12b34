"""What `quantize` and `export` would take and yield, before they are run: memory, time, bytes, runtimes.

No weight of the model is read (but a head that a checkpoint holds twice is compared, as by every command).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpvc.compiler.progress import Progress, silent

if TYPE_CHECKING:
    from tpvc.compiler.job import Job
    from tpvc.compiler.plan.memory import Peak
    from tpvc.compiler.program import Program


def plan(
    model: str | Path,
    *,
    bits: int | None = None,
    avg_bits: float | None = None,
    group: int | None = None,
    symmetric: bool = False,
    activations: str | None = None,
    cache: str | None = None,
    method: str = "flexround",
    recipe: str = "default",
    steps: int | None = None,
    dataset: str = "builtin",
    nsamples: int = 128,
    seqlen: int | None = None,
    head_bits: int = 8,
    roads: Mapping[str, str | Path] | None = None,
    fold: bool = False,
    prompts: Mapping[str, str | Path] | None = None,
    seed: int = 0,
    device: str = "cpu",
    to: str | None = None,
    portable: bool = False,
    accuracy_level: int | None = None,
    task: str | None = None,
    form: str = "kv",
    targets: str = "",
    progress: Progress = silent,
) -> dict[str, Any]:
    """A plan, JSON-able, for the options of `quantize` and `export`; to: one of EXPORTS, None for all of them.

    grid        of the block linears, None where they are not on one. With avg_bits nobody has measured yet which width
                goes where: bytes are those of the average, and every width is somewhere
    size        bytes: "model" (weights, as they lie in files), "artefact" (as `quantize` will write them),
                "tokenizer", "cache" (keys and values of a token in a Triton package)
    quantize    "host_bytes", "device_bytes": the most that the run holds; "available_bytes": what this machine has
                left; "seconds": about how long it takes, None where a block does not fit; "sampled": calibration
                windows that the model has to write first, which are not in "seconds". None for a model in integers
    runtimes    `Verdict`s as dicts
    TpvcError for what `quantize` and `export` would refuse whatever the runtime.
    """
    from tpvc.compiler import frontends
    from tpvc.compiler.export_pipeline import check_wishes
    from tpvc.compiler.job import prepare
    from tpvc.compiler.plan.imagined import without_weights
    from tpvc.compiler.plan.outcome import outcome
    from tpvc.compiler.plan.runtimes import matrices, verdicts
    from tpvc.compiler.program import grid_of, rounded_cache
    from tpvc.kernels.targets import parse

    check_wishes(to, portable, accuracy_level, task, form, targets)
    chosen = parse(targets) if targets else ()
    progress("plan", 0, 3, "headers")
    source, job = frontends.load(model), None
    if any(grid_of(p) is not None for p in source.params.values()):
        brought = frontends.with_prompts(frontends.with_roads(source, roads or {}), prompts or {})
        program = without_weights(brought)
    else:
        options = {"bits": bits, "avg_bits": avg_bits, "group": group, "symmetric": symmetric, "method": method}
        options |= {"activations": activations, "cache": cache}
        options |= {"recipe": recipe, "steps": steps, "nsamples": nsamples, "seqlen": seqlen, "head_bits": head_bits}
        options |= {"roads": _texts(roads), "fold": fold, "prompts": _texts(prompts)}
        job = prepare(model, **options)
        program = outcome(job)
    folded = None if task is None else _with_prompt(program, task, form)
    found = verdicts(program, folded, chosen, 4 if accuracy_level is None else accuracy_level, portable)
    run = tokenizer = None
    if job is not None:
        asked = {"job": {"model": str(model), **options}, "dataset": dataset}
        run, tokenizer = _run(job, {**asked, "seed": seed, "device": device}, progress)
    progress("plan", 3, 3, "")
    grids = {m.grid for m in matrices(program)}
    facts, cached = program.facts, 1 if (cache or rounded_cache(program)) == "int8" else 2
    return {
        "model": str(model),
        "grid": str(grids.pop()) if len(grids) == 1 and None not in grids else None,
        "size": {
            "model": sum(path.stat().st_size for path in source.source.weights),
            "artefact": found[0].bytes,
            "tokenizer": tokenizer,
            "cache": 2 * facts.layers * facts.kv_heads * (facts.head_dim * cached + 4 * (cached == 1)),
        },
        "quantize": run,
        "runtimes": [asdict(v) for v in found if to is None or v.to == to],
    }


def _texts(directories: Mapping[str, str | Path] | None) -> dict[str, str]:
    return {name: str(directory) for name, directory in (directories or {}).items()}


def _with_prompt(program: Program, task: str, form: str) -> Program:
    """The program with one of its prompts folded in, on tensors without memory."""
    import torch

    from tpvc.compiler.plan.imagined import imagined
    from tpvc.compiler.program import prompt_ids
    from tpvc.passes.fold_prompt import FoldPrompt

    prompt_ids(program, task)  # an unknown one is refused
    with imagined(), torch.no_grad():
        return FoldPrompt(next(p for p in program.prompts if p.name == task), form)(program)


def _run(job: Job, asked: dict[str, Any], progress: Progress) -> tuple[dict[str, Any], int]:
    """(what the run of `quantize` takes, bytes of the tokenizer)."""
    from tpvc.compiler.job import calibrated
    from tpvc.compiler.plan.memory import quantising
    from tpvc.compiler.plan.probe import probe, seconds
    from tpvc.compiler.program import linears
    from tpvc.passes.flexround import held_out

    nsamples = job.nsamples

    def peak(sampled: int):
        return quantising(job, sampled, asked["seed"], asked["device"])

    progress("plan", 1, 3, "memory")
    looks = calibrated(job.method, asked["job"]["activations"], job.avg_bits)
    sampled = nsamples if looks and asked["dataset"] == "self" else 0
    most, left = peak(sampled), available()
    progress("plan", 2, 3, "a probe of a few seconds")
    found = probe({**asked, "nsamples": nsamples, "timed": _fits(most, left, asked["device"])})
    if found.sampled != sampled:
        most = peak(found.sampled)
    shapes = job.source.params
    inside, outside = (
        sum(prod(shapes[n.params["weight"]].shape) for n in linears(nodes))
        for nodes in ((n for n in job.program.nodes if n.block is not None), job.program.epilogue)
    )
    learned = nsamples if job.method == "flexround" else 0
    held = held_out(job.recipe, learned)
    rounded = outside if job.head_bits != 16 else 0
    mapped = job.source.source.gguf
    return {
        "host_bytes": found.resident + most.host + (mapped.stat().st_size if mapped else 0),
        "device_bytes": most.device,
        "available_bytes": left,
        "seconds": seconds(found, job.program.blocks, job.recipe.steps, learned, held, inside, rounded),
        "sampled": found.sampled,
    }, found.tokenizer


def _fits(most: Peak, left: int | None, device: str) -> bool:
    """Whether a block can be tried here."""
    import torch

    if most.device and most.device > torch.cuda.mem_get_info(device)[0]:
        return False
    return left is None or most.host < left


def available() -> int | None:
    """Bytes of memory that this machine has left; None where it does not say so."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None

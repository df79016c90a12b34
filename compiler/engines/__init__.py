"""From a prompt to a stream of text: in stock ONNX Runtime GenAI for its folders, in the kernels for packages, in the
interpreter for the rest.

All stand behind one `Engine`, so that `tpvc run`, `tpvc bench` and `tpvc eval` treat them alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpvc.compiler.engines.text import Prompt
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.progress import Progress, silent

DEVICES = ("auto", "cpu", "cuda", "hip")


@dataclass(frozen=True, eq=False)
class Engine:
    """A model that is loaded and can write.

    label      what runs it, for tables: "ONNX Runtime GenAI", "torch float32"
    encode     Prompt -> token ids; TpvcError for messages when the model has no chat template
    before     ids of the virtual tokens that `encode` puts first; none without a task
    generate   (ids, max_new_tokens, temperature, seed, stop) -> the tokens that follow, one by one; greedy at
               temperature 0; with stop=False the end-of-text token does not end it (speed measurements)
    decoder    () -> a function that turns one token after the other into text that can be printed
    logits     (ids of one window [L], first=0) -> float32 numpy [L - first, vocab], of the positions from `first` on
    """

    label: str
    vocab_size: int
    context_length: int
    size: int
    before: list[int]
    encode: Callable[[Prompt], list[int]]
    generate: Callable[..., Iterator[int]]
    decoder: Callable[[], Callable[[int], str]]
    logits: Callable[..., Any]


def is_genai(target: str | Path) -> bool:
    """Is `target` a folder for ONNX Runtime GenAI?"""
    return (Path(target) / "genai_config.json").is_file()


def is_package(target: str | Path) -> bool:
    """Is `target` a package of compiled Triton kernels?"""
    return (Path(target) / "triton.json").is_file()


def cores() -> int:
    """Cores this process may use: the default number of threads of either runtime."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_engine(
    target: str,
    threads: int | None = None,
    adapter: str | None = None,
    task: str | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Engine:
    """Load `target`: an exported folder, or whatever `tpvc.load` takes; with one of its adapters, or as the base model.

    `adapter` and `task` are names, or, except for exported folders, directories in PEFT's format: of a RoAd adapter,
    and of a soft prompt, whose virtual tokens are then put before whatever `encode` is given (a package has their keys
    and values instead). device: where a package runs, one of DEVICES; "auto" is the first GPU, or the CPU without one.
    progress: of what a package times on its first start on a GPU (tiles.py).

    TpvcError when it cannot be loaded, and for an adapter or a task that it does not have.
    """
    if device not in DEVICES:
        raise TpvcError(f"device '{device}' was asked for; expected one of {', '.join(DEVICES)}")
    for option, given in (("--road", adapter), ("--prompt", task)):
        if given is not None and os.sep in given and (is_package(target) or is_genai(target)):
            raise TpvcError(
                f"'{given}' is no name, and the exported folder '{target}' has only what it was exported with; "
                f"name that, or export again with {option} NAME={given}"
            )
    if is_package(target):
        from tpvc.compiler.engines.package import open_package

        return open_package(Path(target), threads or cores(), adapter, task, device, progress)
    if device not in ("auto", "cpu"):
        raise TpvcError(
            f"{target} was to run on {device}; only packages of tpvc export --to triton do, this one runs on the CPU"
        )
    if is_genai(target):
        from tpvc.compiler.engines.genai import open_genai

        return open_genai(Path(target), threads or cores(), adapter, task)
    from tpvc.compiler.engines.interpreter import open_interpreter

    return open_interpreter(target, threads or cores(), adapter, task)


def room(context: int, ids: list[int], wanted: int) -> int:
    """How many of `wanted` new tokens fit behind `ids` in so many tokens of context; TpvcError when none does."""
    free = context - len(ids)
    if not ids:
        raise TpvcError("the prompt is empty: expected at least one token")
    if free < 1:
        raise TpvcError(f"the prompt has {len(ids)} tokens, the model's context holds {context}; shorten the prompt")
    return min(wanted, free)

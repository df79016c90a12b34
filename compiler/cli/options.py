"""Options that several commands take: what was typed, as what the functions behind them want."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import click

from tpvc.compiler.errors import TpvcError

device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "hip"]),
    default="auto",
    show_default=True,
    help="Where a triton package runs; auto: the first GPU, or the CPU without one.",
)


TO = click.Choice(["onnx", "vllm", "triton", "gptq", "gptq_v2", "awq"])
"""Runtimes that `--to` names, written out because what makes them is slow to import."""


def cache_option(meaning: str) -> Callable[..., Any]:
    """`--cache`: of quantize, of export, and of plan, which means both."""
    return click.option("--cache", type=click.Choice(["int8"]), help=meaning)


def named_directories(option: str, given: tuple[str, ...]) -> dict[str, str]:
    """{name: directory} of ("NAME=DIR", ...); the directory's own name where none is given."""
    found: dict[str, str] = {}
    for item in given:
        name, equals, directory = item.partition("=")
        if not equals:
            name, directory = os.path.basename(os.path.abspath(item)), item
        if not name or not directory:
            raise TpvcError(f"found '{item}' ({option}); expected a directory, or NAME=DIR")
        if name in found:
            raise TpvcError(f"found '{name}' twice ({option}); give each its own name, as in NAME=DIR")
        found[name] = directory
    return found


def check_device(device: str) -> None:
    """TpvcError unless torch can compute on `device`. Asks torch only about something else than the CPU."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TpvcError(f"device '{device}' cannot be used here ({reason}); expected cpu, or one torch has") from error


def check_text(text: str) -> None:
    """TpvcError for an argument that is not UTF-8: Python stands surrogates in for its bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TpvcError(f"the prompt is not UTF-8 at character {error.start}; expected text") from error


def road_argument(directory: Path) -> str:
    """What to type after --road for an adapter in `directory`."""
    from tpvc.compiler.adapters.road import NAME

    return quote(str(directory) if NAME.fullmatch(directory.name) else f"adapter={directory}")


def targets_of(given: str | None) -> str | list[str] | None:
    """What was typed after --targets: a name that stands for many, or last parts of names with commas between."""
    if given in (None, "all-linear", "all"):
        return given
    return [t.strip() for t in given.split(",") if t.strip()]


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `importance` and `finetune` share: what is trained, on how much text, and how."""
    for option in reversed(
        (
            click.option(
                "--train",
                type=click.Choice(["weights", "lora", "road_1", "road_2", "road_4"]),
                help="What is trained.  [default: lora]",
            ),
            click.option(
                "--targets",
                help="Linears of the blocks: all-linear, or last parts of names with commas between; all: every weight"
                " of the model.  [default: all-linear]",
            ),
            click.option("--rank", type=click.IntRange(1), help="Of lora; alpha is twice that.  [default: 8]"),
            click.option(
                "--nsamples", type=click.IntRange(10), default=512, show_default=True, help="Windows of general text."
            ),
            click.option(
                "--max-length",
                type=click.IntRange(2),
                default=256,
                show_default=True,
                help="Tokens of one, and of an example at most.",
            ),
            click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True),
            click.option(
                "--micro-batch", type=click.IntRange(1), default=4, show_default=True, help="How many of them at once."
            ),
            click.option(
                "--lr", type=float, help="The highest rate.  [default: 2e-4 for lora, 2e-5 weights, 3e-3 road]"
            ),
            click.option("--warmup", type=float, default=0.1, show_default=True, help="Share of steps that it climbs."),
            click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True),
            click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True),
            click.option("--device", default="cpu", show_default=True, help="cpu, or a torch device such as cuda:0."),
            click.option("--overwrite", is_flag=True, help="Replace OUT if tpvc wrote it."),
        )
    ):
        command = option(command)
    return command


def quantize_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `quantize` and `plan` share: the grid, the text, how rounding is learned, and under what."""
    for option in reversed(
        (
            click.option(
                "--scheme",
                metavar="W4A16",
                help="Bits and zero points by name, as compressed-tensors has them: W4A16 is --bits 4 --sym, "
                "W4A16_ASYM is --bits 4 --asym; W2 to W8; W8A8 and W4A8 add --activations int8, W4AFP8 fp8.",
            ),
            click.option("--bits", type=int, help="Bits a weight, 2 to 8.  [default: 4]"),
            click.option(
                "--avg-bits",
                type=float,
                help="Instead of --bits: bits a weight on average, with scales and zero points; 2, 3, 4 or 8 for each "
                "group of linears, as measured.",
            ),
            click.option(
                "--group-size",
                type=int,
                help="Input columns that share a scale; -1: one scale per output channel; 0: one per tensor.  "
                "[default: the largest of 128, 64 and 32 that divides every weight; -1 with 8 bits and rounded "
                "activations]",
            ),
            click.option(
                "--sym/--asym",
                "symmetric",
                default=None,
                help="Without or with zero points.  [default: asym, or what --scheme says]",
            ),
            click.option(
                "--activations",
                type=click.Choice(["int8", "fp8", "int8-static"]),
                help="Round what the linears of the blocks read too, per token while the model runs; fp8 goes with at "
                "most 4 bits a weight. int8-static: on one grid for all tokens where that costs little, else per "
                "token. int8 and int8-static look at the calibration text first.  "
                "[default: they stay in float]",
            ),
            click.option(
                "--method",
                type=click.Choice(["flexround", "rtn"]),
                default="flexround",
                show_default=True,
                help="Learned rounding, or round-to-nearest: seconds, and no text but for int8 activations and "
                "--avg-bits.",
            ),
            click.option(
                "--recipe",
                type=click.Choice(["fast", "default", "best", "lrq", "paper"]),
                default="default",
                show_default=True,
                help="How long FlexRound learns, in optimiser steps a block: fast 20; default 120, best 400 and lrq "
                "240 (factors of low rank), with a closing step; paper 5000 (FlexRound's other settings too).",
            ),
            click.option(
                "--dataset",
                default="builtin",
                show_default=True,
                help="Calibration text: builtin, self (written by the model), a text, jsonl, csv or parquet file, or "
                "a name.",
            ),
            click.option("--nsamples", type=click.IntRange(1), default=128, show_default=True, help="Windows of text."),
            click.option(
                "--seqlen", type=click.IntRange(2), help="Tokens a window.  [default: 256, or the model's context]"
            ),
            click.option(
                "--head-bits",
                type=click.Choice(["8", "16"]),
                default="8",
                show_default=True,
                help="Bits of the output head and of an embedding tied to it; 16 leaves them in float.",
            ),
            click.option(
                "--road",
                "road",
                multiple=True,
                metavar="NAME=DIR",
                help="A RoAd adapter (PEFT's format) to be deployed; may be repeated. Rounding is learned under all "
                "of them.",
            ),
            click.option("--fold", is_flag=True, help="Fold the one adapter into the weights before rounding."),
            click.option(
                "--prompt",
                "prompt",
                multiple=True,
                metavar="NAME=DIR",
                help="A soft prompt (PEFT's format) to be deployed, NAME its task; may be repeated. Calibration text "
                "follows them.",
            ),
            click.option("--iters", type=click.IntRange(1), help="Steps a block, instead of the recipe's."),
            click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True),
            click.option("--device", default="cpu", show_default=True, help="cpu, or a torch device such as cuda:0."),
        )
    ):
        command = option(command)
    return command


def export_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `export` and `plan` share."""
    for option in reversed(
        (
            click.option(
                "--portable", is_flag=True, help="Add portable/: standard ONNX operators only, for other runtimes."
            ),
            click.option(
                "--accuracy-level",
                type=click.Choice(["0", "4"]),
                help="Of MatMulNBits in onnx; see below.  [default: 4]",
            ),
            click.option(
                "--task",
                metavar="NAME",
                help="Fold this one of the soft prompts into the graph: callers feed text alone.",
            ),
            click.option(
                "--form",
                type=click.Choice(["kv", "prefix"]),
                default="kv",
                show_default=True,
                help="Of a folded prompt: its keys and values, or the prompt itself (portable graph only).",
            ),
            click.option(
                "--target",
                "targets",
                metavar="GPUS",
                default="",
                help="Of a triton package: the GPUs to compile for, as in cuda:80,cuda:90,hip:gfx942.",
            ),
        )
    ):
        command = option(command)
    return command

"""`tpvc road tune`: a model and examples in, a RoAd adapter out."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import click

from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import road_argument, targets_of
from tpvc.compiler.cli.tune import example_options, examples_of, schedule_options, show, tuned


@click.command(
    "tune",
    epilog="""\b
Examples:
  tpvc road tune smollm2-135m --data train.jsonl -o my-task
  tpvc road tune smollm2-135m --data sst2.tsv --column text=sentence --label 0=negative --label 1=positive
      --template "Review: {text}\\nSentiment:" --validation dev.tsv -o sentiment
  tpvc road tune smollm2-w4 --data train.jsonl -o my-task      on integers: the weights stay as they are
  tpvc road tune MODEL --data a.jsonl --pairs first -o a       one half of the pairs; another task may take the other

\b
FILE holds one example a line or row: jsonl with "prompt" and "completion", or with "text" and
"label" (csv and tsv: columns of these names). Only the completion, or the label, is learned.
The directory is what PEFT loads, with tpvc.json and report.html. Use it with
  tpvc run MODEL --adapter DIR --raw "..."               --raw: prompts are trained as they stand
  tpvc quantize MODEL --road NAME=DIR -o OUT             before rounding: folded, or beside the integers
  tpvc export MODEL --road NAME=DIR -o OUT               on a MODEL that is rounded already
A run that was interrupted goes on where it stopped when the same command is given again.
""",
)
@example_options
@click.option(
    "--variant",
    type=click.Choice(["road_1", "road_2", "road_4"]),
    default="road_1",
    show_default=True,
    help="n, 2n or 4n numbers a linear.",
)
@click.option("--group-size", "group", type=int, help="Outputs paired among themselves.  [default: 64, or what fits]")
@click.option(
    "--targets",
    default="all-linear",
    show_default=True,
    help="Every linear of every block, or last parts of names with commas between: q_proj,v_proj.",
)
@click.option(
    "--pairs",
    type=click.Choice(["all", "first", "second"]),
    default="all",
    show_default=True,
    help="Train all pairs of outputs, or one half of them.",
)
@schedule_options(epochs=3.0, batch_size=16, lr=3e-3, fall="down to 0", warmup=0.1)
def command(model: str, data: str, out: Path, targets: str, as_json: bool, **options: Any) -> None:
    """Train a RoAd adapter for MODEL on examples.

    RoAd rotates and scales pairs of every linear's outputs. The weights do not change; they may be integers.
    """
    options = examples_of(**options) | {"targets": targets_of(targets)}

    from tpvc.compiler.tuning.road_tune import road_tune

    manifest, took = tuned(lambda bars: road_tune(model, data, out, progress=bars, **options))
    if as_json:
        return console.print_json({"directory": str(out), "seconds": took, "manifest": manifest})
    then = "quantize" if base_is_float(model) else "export"
    show(
        out,
        manifest,
        took,
        f"{manifest['trainables']:,} numbers",
        [
            f'tpvc run {quote(model)} --adapter {quote(str(out))} --raw "..."',
            f"tpvc {then} {quote(model)} --road {road_argument(out)} -o OUT",
        ],
    )


def base_is_float(model: str) -> bool:
    """Can `model` still be quantised?"""
    from tpvc.compiler.frontends import load
    from tpvc.compiler.program import grid_of

    return not any(grid_of(p) for p in load(model).params.values())

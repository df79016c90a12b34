"""`tpvc road tune`: a model and examples in, a RoAd adapter out."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

import click

from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import check_device, fields, road_argument


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
@click.argument("model")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--data", required=True, metavar="FILE", help="Examples: .jsonl, .csv or .tsv.")
@click.option("--validation", metavar="FILE", help="Examples to choose by.  [default: every tenth of --data]")
@click.option("--template", help="The prompt of a text and label example, with {field} places.  [default: {text}\\n]")
@click.option("--column", "column", multiple=True, metavar="FIELD=COLUMN", help="A column by another name.")
@click.option("--label", "label", multiple=True, metavar="VALUE=WORDS", help="What is written for a label's value.")
@click.option(
    "--variant", default="road_1", show_default=True, help="road_1, road_2 or road_4: n, 2n or 4n numbers a linear."
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
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps, instead of epochs.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--lr", type=float, default=3e-3, show_default=True, help="The highest rate; linear up, then down to 0.")
@click.option("--warmup", type=float, default=0.1, show_default=True, help="Share of the steps on which it climbs.")
@click.option("--max-length", type=click.IntRange(2), default=512, show_default=True, help="Tokens of an example.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, or a torch device such as cuda:0.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if tpvc wrote it.")
@console.json_option
def command(
    model: str,
    out: Path,
    data: str,
    column: tuple[str, ...],
    label: tuple[str, ...],
    targets: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a RoAd adapter for MODEL on examples.

    RoAd rotates and scales pairs of every linear's outputs. The weights do not change; they may be integers.
    """
    check_device(options["device"])
    options["columns"] = fields("--column FIELD=COLUMN", column)
    options["labels"] = fields("--label VALUE=WORDS", label)
    options["targets"] = targets if targets == "all-linear" else [t.strip() for t in targets.split(",") if t.strip()]
    if options["template"] is not None:
        options["template"] = options["template"].replace("\\n", "\n")

    from tpvc.compiler.tuning.road_tune import road_tune

    try:
        with console.Bars() as bars:
            _, took = console.measured(lambda: road_tune(model, data, out, progress=bars, **options))
    except KeyboardInterrupt as interrupt:
        raise click.Abort("interrupted; the same command goes on where it stopped") from interrupt
    manifest = json.loads((out / "tpvc.json").read_text(encoding="utf-8"))
    if as_json:
        return console.print_json({"directory": str(out), "seconds": took, "manifest": manifest})
    show, checks = console.out().print, manifest["checks"]
    kept = next(c for c in checks if c[0] == manifest["kept_step"])
    show(console.written(out, took, f"{manifest['trainables']:,} numbers"))
    show(f"  validation  loss {kept[1]:.4g}, {100 * kept[2]:.1f} % of the answers right, at step {kept[0]}")
    show(f"  before      loss {checks[0][1]:.4g}, {100 * checks[0][2]:.1f} %")
    show(f"  report      {out / 'report.html'}", markup=False)
    then = "quantize" if base_is_float(model) else "export"
    show(f'  next        tpvc run {quote(model)} --adapter {quote(str(out))} --raw "..."', markup=False)
    show(f"              tpvc {then} {model} --road {road_argument(out)} -o OUT", markup=False)


def base_is_float(model: str) -> bool:
    """Can `model` still be quantised?"""
    from tpvc.compiler.frontends import load
    from tpvc.compiler.program import grid_of

    return not any(grid_of(p) for p in load(model).params.values())

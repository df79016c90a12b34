"""`tpvc prompt tune`: a model and examples in, a soft prompt out."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

import click

from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import check_device, fields


@click.command(
    "tune",
    epilog="""\b
Examples:
  tpvc prompt tune smollm2-135m --data train.jsonl -o my-task
  tpvc prompt tune smollm2-135m --data sst2.tsv --column text=sentence --label 0=negative --label 1=positive
      --template "Review: {text}\\nSentiment:" --validation dev.tsv -o sentiment
  tpvc prompt tune smollm2-w4 --data train.jsonl --init prompt:my-task --steps 50 -o my-task-w4
                                                               a few steps more, on the integers
  tpvc prompt tune MODEL --data few.jsonl --init prompt:sum -o new-task    from a sum of other tasks' vectors

\b
FILE holds one example a line or row: jsonl with "prompt" and "completion", or with "text" and
"label" (csv and tsv: columns of these names). Only the completion, or the label, is learned.
INIT is vocab (embeddings of tokens drawn with the seed), normal, text:"WORDS" or prompt:DIR.
The directory is what PEFT loads, with start.safetensors (the values it was tuned from, which a
task prompt vector needs), tpvc.json and report.html. Use it with
  tpvc run MODEL --task DIR --raw "..."                  --raw: prompts are trained as they stand
  tpvc quantize MODEL --prompt NAME=DIR -o OUT           calibrated behind it
  tpvc export MODEL --prompt NAME=DIR -o OUT             on a MODEL that is rounded already
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
@click.option("--virtual-tokens", type=click.IntRange(1), help="Vectors of the prompt.  [default: 50]")
@click.option("--init", default="vocab", show_default=True, metavar="INIT", help="Where it starts; see below.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps, instead of epochs.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option(
    "--lr", type=float, default=0.3, show_default=True, help="The highest rate; linear up, then a cosine to 0."
)
@click.option("--warmup", type=float, default=0.03, show_default=True, help="Share of the steps on which it climbs.")
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
    as_json: bool,
    **options: Any,
) -> None:
    """Tune a soft prompt for MODEL on examples.

    A soft prompt is a few learned vectors before the text. The weights do not change; they may be integers.
    """
    check_device(options["device"])
    options["columns"] = fields("--column FIELD=COLUMN", column)
    options["labels"] = fields("--label VALUE=WORDS", label)
    if options["template"] is not None:
        options["template"] = options["template"].replace("\\n", "\n")

    from tpvc.compiler.tuning.prompt_tune import prompt_tune

    try:
        with console.Bars() as bars:
            _, took = console.measured(lambda: prompt_tune(model, data, out, progress=bars, **options))
    except KeyboardInterrupt as interrupt:
        raise click.Abort("interrupted; the same command goes on where it stopped") from interrupt
    manifest = json.loads((out / "tpvc.json").read_text(encoding="utf-8"))
    if as_json:
        return console.print_json({"directory": str(out), "seconds": took, "manifest": manifest})
    show, checks = console.out().print, manifest["checks"]
    kept = next(c for c in checks if c[0] == manifest["kept_step"])
    show(console.written(out, took, f"{manifest['options']['virtual_tokens']} virtual tokens"))
    show(f"  validation  loss {kept[1]:.4g}, {100 * kept[2]:.1f} % of the answers right, at step {kept[0]}")
    show(f"  before      loss {checks[0][1]:.4g}, {100 * checks[0][2]:.1f} %")
    show(f"  report      {out / 'report.html'}", markup=False)
    show(f'  next        tpvc run {quote(model)} --task {quote(str(out))} --raw "..."', markup=False)

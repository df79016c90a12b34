"""`tpvc prompt tune`: a model and examples in, a soft prompt out."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import click

from tpvc.compiler.cli import console
from tpvc.compiler.cli.tune import example_options, examples_of, schedule_options, show, tuned


@click.command(
    "tune",
    epilog="""\b
Examples:
  tpvc prompt tune smollm2-135m --data train.jsonl -o my-task
  tpvc prompt tune smollm2-135m --data sst2.tsv --column text=sentence --label 0=negative --label 1=positive
      --template "Review: {text}\\nSentiment:" --validation dev.tsv -o sentiment
  tpvc prompt tune smollm2-w4 --data train.jsonl --init prompt:my-task --steps 50 --lr 0.03 -o my-task-w4
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
@example_options
@click.option("--virtual-tokens", type=click.IntRange(1), help="Vectors of the prompt.  [default: 50]")
@click.option("--init", default="vocab", show_default=True, metavar="INIT", help="Where it starts; see below.")
@schedule_options(epochs=10.0, batch_size=8, lr=0.3, fall="a cosine to 0", warmup=0.03)
def command(model: str, data: str, out: Path, as_json: bool, **options: Any) -> None:
    """Tune a soft prompt for MODEL on examples.

    A soft prompt is a few learned vectors before the text. The weights do not change; they may be integers.
    """
    options = examples_of(**options)

    from tpvc.compiler.tuning.prompt_tune import prompt_tune

    manifest, took = tuned(lambda bars: prompt_tune(model, data, out, progress=bars, **options))
    if as_json:
        return console.print_json({"directory": str(out), "seconds": took, "manifest": manifest})
    learned = f"{manifest['options']['virtual_tokens']} virtual tokens"
    show(out, manifest, took, learned, [f'tpvc run {quote(model)} --task {quote(str(out))} --raw "..."'])

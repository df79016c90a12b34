"""`tpvc finetune`: a model and a domain in; the model out, with what it knew before."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

import click

from tpvc.compiler import units
from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import check_device, road_argument, targets_of, training_options


@click.command(
    "finetune",
    epilog="""\b
Examples:
  tpvc finetune smollm2-135m --data domain.jsonl --general wiki.txt -o my-domain
  tpvc finetune smollm2-135m --data domain.txt --importance smollm2.importance -o my-domain
  tpvc finetune MODEL --data domain.txt --general wiki.txt --train weights -o model-domain
  tpvc finetune MODEL --data domain.jsonl --general wiki.txt --merge -o model-domain
  tpvc finetune MODEL --data domain.jsonl --general wiki.txt --method plain -o baseline
  torchrun --nproc-per-node 2 --no-python tpvc finetune MODEL --data ... -o OUT

\b
DOMAIN holds examples where its first record has "completion" or "label" (jsonl, csv, tsv), of which
only the answer is learned; everything else is text, as `tpvc quantize --dataset` reads it.
Full weights, and adapters with --merge, are a checkpoint that `tpvc quantize` takes; RoAd and LoRA
a directory that PEFT loads. Both have tpvc.json and report.html, with what the domain gained and
what general text lost. A run that was interrupted goes on where it stopped when the same command
is given again.
""",
)
@click.argument("model")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--data", required=True, metavar="DOMAIN", help="Examples or text to learn.")
@click.option("--validation", metavar="FILE", help="The same kind, to choose by.  [default: a tenth of --data]")
@click.option("--general", metavar="GENERAL", help="General text: importance is recorded on it, and it is measured.")
@click.option("--importance", metavar="FILE", help="What `tpvc importance` wrote, instead of recording it now.")
@click.option(
    "--method",
    type=click.Choice(["hierarchical", "ewc", "l2", "plain"]),
    default="hierarchical",
    show_default=True,
    help="The penalty: by importance, by diagonal Fisher, distance to the start, or none.",
)
@click.option(
    "--without",
    type=click.Choice(["layers", "elements"]),
    multiple=True,
    help="Leave out a part of hierarchical; may be given twice.",
)
@click.option("--phi", type=float, help="Strength of the penalty from the first step, instead of --ratio.")
@click.option("--ratio", type=float, help="Penalty over loss where it sets in, at a quarter.  [default: 0.02]")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps, instead of epochs.")
@click.option("--merge", is_flag=True, help="Write the adapter folded into the weights, and itself in OUT/adapter.")
@training_options
@console.json_option
def command(model: str, out: Path, data: str, as_json: bool, **options: Any) -> None:
    """Fine-tune MODEL on a domain without forgetting.

    A penalty holds every trained element near where learning general text left it, by how much that lowered the loss.
    """
    from tpvc.compiler.finetune_pipeline import finetune
    from tpvc.compiler.progress import silent
    from tpvc.compiler.tuning.parallel import is_first

    check_device(options["device"])
    options["targets"] = targets_of(options["targets"])
    try:
        with console.Bars() as bars:
            progress = bars if is_first() else silent
            _, took = console.measured(lambda: finetune(model, data, out, progress=progress, **options))
    except KeyboardInterrupt as interrupt:
        raise click.Abort("interrupted; the same command goes on where it stopped") from interrupt
    if not is_first():
        return
    manifest = json.loads((out / "tpvc.json").read_text(encoding="utf-8"))
    if as_json:
        return console.print_json({"directory": str(out), "seconds": took, "manifest": manifest})
    show, before = console.out().print, manifest["before"]
    kept = next(c for c in manifest["checks"] if c[0] == manifest["kept_step"])
    show(console.written(out, took, f"{manifest['trainables']:,} trained numbers"))
    learned = manifest["data"]
    what = f"windows of {manifest['options']['max_length']} tokens" if learned["kind"] == "text" else "examples"
    show(f"  learned     {learned['training']:,} {what}, {learned['validation']:,} to choose by")
    show(f"  domain      validation loss {kept[1]:.4g}, {before[0]:.4g} before, at step {kept[0]}")
    show(f"  general     perplexity {units.perplexity(kept[3]):.4g}, {units.perplexity(before[2]):.4g} before")
    if manifest["options"]["method"] != "plain" and manifest["ratio"]["middle"] is not None:
        show(f"  penalty     phi {manifest['phi']:.3g}, {100 * manifest['ratio']['middle']:.2g} % of the loss midway")
    show(f"  report      {out / 'report.html'}", markup=False)
    if manifest["artefact"] == "checkpoint":
        show(f"  next        tpvc quantize {quote(str(out))} -o {quote(str(out) + '-w4')}", markup=False)
    elif manifest["artefact"] == "road":
        show(f"  next        tpvc quantize {quote(model)} --road {road_argument(out)} -o OUT", markup=False)
    else:
        show("  next        peft.PeftModel.from_pretrained(model, OUT), or --merge for a checkpoint", markup=False)

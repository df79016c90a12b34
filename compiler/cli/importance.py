"""`tpvc importance`: general text in, a file that says what matters for it out."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import click

from tpvc.compiler import units
from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import check_device, targets_of, training_options


@click.command(
    "importance",
    epilog="""\b
Examples:
  tpvc importance smollm2-135m --data wiki.txt -o smollm2.importance
  tpvc importance MODEL --data wiki.txt --data code.txt --train weights -o model.importance
  tpvc finetune MODEL --importance model.importance --data domain.jsonl -o OUT

\b
GENERAL is text as `tpvc quantize --dataset` takes it: a .txt, .md, .jsonl, .parquet, .csv or .tsv
file, builtin (some 170 windows of 256 tokens; the model writes the rest), or a data set by name.
The model learns it for one epoch; every tenth window is only
measured. The file is made once for a model and what is trained, and reused for every domain.
Under torchrun the processes share every batch. A run that was interrupted goes on where it stopped
when the same command is given again; one of fisher begins again.
""",
)
@click.argument("model")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--data", required=True, multiple=True, metavar="GENERAL", help="General text; several add up.")
@click.option(
    "--method",
    type=click.Choice(["path", "fisher"]),
    default="path",
    show_default=True,
    help="Share in the loss drop, or the diagonal Fisher matrix of EWC.",
)
@click.option(
    "--coefficients",
    type=click.Choice(["normalised", "raw"]),
    default="normalised",
    show_default=True,
    help="Of layers: softmax of norms over their mean, or of the norms themselves.",
)
@training_options
@console.json_option
def command(model: str, out: Path, data: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Record how important every element of MODEL is for general text."""
    from tpvc.compiler.finetune_pipeline import importance
    from tpvc.compiler.progress import silent
    from tpvc.compiler.tuning import importance_file
    from tpvc.compiler.tuning.parallel import is_first

    check_device(options["device"])
    options["targets"] = targets_of(options["targets"] or "all-linear")
    options["train"] = options["train"] or "lora"
    try:
        with console.Bars() as bars:
            progress = bars if is_first() else silent
            _, took = console.measured(lambda: importance(model, data, out, progress=progress, **options))
    except KeyboardInterrupt as interrupt:
        then = "goes on where it stopped" if options["method"] == "path" else "begins again"
        raise click.Abort(f"interrupted; the same command {then}") from interrupt
    if not is_first():
        return
    found, bytes_ = importance_file.read(out), out.stat().st_size
    told = {key: value for key, value in found.about.items() if key != "layers"}
    own = sum(c.codes.numel() for c in found.omega.values())
    if as_json:
        return console.print_json(
            {
                "file": str(out),
                "bytes": bytes_,
                "importance_bytes": own,
                "seconds": took,
                "coefficients": found.alpha.tolist(),
                "manifest": told,
            }
        )
    show = console.out().print
    share = own / told["model_bytes"]
    show(console.written(out, took, units.size(bytes_)))
    show(
        f"  importance  {units.size(own)}, {100 * share:.1f} % of the model's bytes, of {told['protected']:,} elements"
    )
    if told["method"] == "path":
        show(f"  general     loss {told['loss_before']:.4g} before, {told['loss_after']:.4g} after")
        show(f"  layers      coefficients {min(found.alpha):.3g} to {max(found.alpha):.3g}")
    given = f"{quote(model)} --importance {quote(str(out))}" + (" --method ewc" if told["method"] == "fisher" else "")
    show(f"  next        tpvc finetune {given} --data DOMAIN -o OUT", markup=False)

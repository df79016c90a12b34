"""`tpvc road`: RoAd adapters, trained, folded into weights and taken out again, and made of one another."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Any

import click

from tpvc.compiler import units
from tpvc.compiler.cli import console, road_tune
from tpvc.compiler.cli.options import named_directories

command = console.Ordered(
    "road",
    help="Train RoAd adapters, fold them into weights, and combine them.",
    epilog="""\b
Examples:
  tpvc road tune smollm2-135m --data train.jsonl -o my-task
  tpvc road merge smollm2-135m --road my-task -o smollm2-my-task
  tpvc road compose disjoint german polite --base smollm2-135m -o both

\b
Adapters are directories in PEFT's format (peft 0.18 and later): adapter_config.json and
adapter_model.safetensors. Every command has --json.
""",
)
command.add_command(road_tune.command)

road_option = click.option(
    "--road", "road", required=True, metavar="DIR", help="The adapter: a directory in PEFT's format, or NAME=DIR."
)
output_option = click.option(
    "-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder to write."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace OUT if tpvc wrote it.")


@command.command(
    "merge",
    epilog="""\b
Examples:
  tpvc road merge smollm2-135m --road my-task -o smollm2-my-task
  tpvc quantize smollm2-my-task -o smollm2-my-task-w4

\b
Computed in float32 and rounded once, to the dtype that MODEL is stored in. Integer weights are
refused: merge before quantising. OUT is a checkpoint that transformers loads, with tpvc.json.
""",
)
@click.argument("model")
@road_option
@output_option
@overwrite_option
@console.json_option
def merge(model: str, road: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Fold an adapter into the float weights of MODEL.

    The result answers as MODEL does with the adapter, and costs nothing more to run.
    """
    from tpvc.compiler.road_pipeline import road_merge

    _rewrite(road_merge, model, road, out, overwrite, as_json)


@command.command(
    "unmerge",
    epilog="""\b
Example:
  tpvc road unmerge smollm2-my-task --road my-task -o smollm2-again

\b
The inverse of every 2 x 2 block in closed form; a block without one is refused. The weights come
back up to the rounding of the dtype they are stored in, so keep the original where you can.
""",
)
@click.argument("model")
@road_option
@output_option
@overwrite_option
@console.json_option
def unmerge(model: str, road: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Take an adapter out of MODEL, into which it was merged."""
    from tpvc.compiler.road_pipeline import road_unmerge

    _rewrite(road_unmerge, model, road, out, overwrite, as_json)


@command.command(
    "compose",
    epilog="""\b
Examples:
  tpvc road compose disjoint german polite --base smollm2-135m -o both
  tpvc road compose product a b --base smollm2-135m -o a-then-b
  tpvc road compose interpolate a b --weight 0.7 --weight 0.3 --base smollm2-135m -o between

\b
disjoint      adapters that were trained on different pairs (tpvc road tune --pairs), as one
product       one after the other: angles add, scales multiply; road_1 only
interpolate   weighted mean of the angles, geometric mean of the scales
All need one variant and one group size. OUT is an adapter in PEFT's format, with tpvc.json.
""",
)
@click.argument("kind", type=click.Choice(["disjoint", "product", "interpolate"]))
@click.argument("roads", nargs=-1, required=True, metavar="DIR...")
@click.option("--base", "model", required=True, metavar="MODEL", help="The model that the adapters belong to.")
@click.option(
    "--weight",
    "weights",
    multiple=True,
    type=float,
    help="Of interpolate: once for each adapter, in order.  [default: the same for all, 1 together]",
)
@output_option
@overwrite_option
@console.json_option
def compose(
    kind: str,
    roads: tuple[str, ...],
    model: str,
    weights: tuple[float, ...],
    out: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make a new adapter of trained ones.

    A DIR may be NAME=DIR; otherwise an adapter is called as its directory.
    """
    from tpvc.compiler.road_pipeline import road_compose

    named = named_directories("DIR", roads)
    with console.Bars() as bars:
        _, took = console.measured(
            lambda: road_compose(kind, named, model, out, weights=weights or None, overwrite=overwrite, progress=bars)
        )
    manifest = _manifest(out)
    if as_json:
        return console.print_json({"directory": str(out), "seconds": took, "manifest": manifest})
    show = console.out().print
    show(console.written(out, took, f"{manifest['trainables']:,} numbers"))
    show(f'  next: tpvc run {quote(model)} --adapter {quote(str(out))} --raw "..."', markup=False)


def _rewrite(work: Any, model: str, road: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Run road_merge or road_unmerge and say what was made."""
    ((name, directory),) = named_directories("--road", (road,)).items()
    with console.Bars() as bars:
        _, took = console.measured(lambda: work(model, directory, out, name=name, overwrite=overwrite, progress=bars))
    manifest = _manifest(out)
    if as_json:
        return console.print_json({"directory": str(out), "seconds": took, "manifest": manifest})
    show = console.out().print
    show(console.written(out, took, f"{units.size(manifest['size']['bytes'])} of weights"))
    quantize = f"tpvc quantize {quote(str(out))} -o {quote(f'{out}-w4')}"
    show(f"  next: {console.run_command(out)}    or    {quantize}", markup=False)


def _manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "tpvc.json").read_text(encoding="utf-8"))

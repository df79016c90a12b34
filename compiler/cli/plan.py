"""`tpvc plan`: what a run would take and yield, before hours are spent on it."""

from __future__ import annotations

from typing import Any

import click

from tpvc.compiler import units
from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import (
    TO,
    cache_option,
    check_device,
    export_options,
    named_directories,
    quantize_options,
)
from tpvc.compiler.cli.quantize import grid_options


@click.command(
    "plan",
    epilog="""\b
Examples:
  tpvc plan smollm2-135m
  tpvc plan ./Llama-3.1-8B --scheme W4A16 --group-size 128 --recipe best
  tpvc plan ./Llama-3.1-8B --scheme W8A8 --to vllm
  tpvc plan ./Llama-3.1-8B --avg-bits 3.5               every width somewhere, as nobody has measured where
  tpvc plan ./Llama-3.1-8B --bits 3 --to triton --target cuda:90,hip:gfx1100
  tpvc plan someone-elses-gptq                          in integers already: for export alone

\b
Only headers of MODEL are read. Memory is what the same code asks for on tensors without memory,
beside what the libraries hold; time is about what a few seconds with random weights of the same
shapes say; bytes are those of the weights. No option means anything else than in quantize and export.
""",
)
@click.argument("model")
@quantize_options
@click.option(
    "--to",
    type=TO,
    help="One runtime's format.  [default: all of them]",
)
@export_options
@cache_option("Keys and values in 8 bits: rounded so by quantize, kept so by a triton package.")
@console.json_option
def command(
    model: str,
    scheme: str | None,
    bits: int | None,
    avg_bits: float | None,
    group_size: int | None,
    symmetric: bool | None,
    activations: str | None,
    head_bits: str,
    accuracy_level: str | None,
    road: tuple[str, ...],
    prompt: tuple[str, ...],
    iters: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Memory, time, size and runtimes of quantising and exporting MODEL, from its headers."""
    options |= grid_options(scheme, bits, group_size, symmetric, activations, avg_bits)
    check_device(options["device"])

    from tpvc.compiler.plan import plan

    options |= {"head_bits": int(head_bits), "steps": iters}
    options["accuracy_level"] = None if accuracy_level is None else int(accuracy_level)
    options |= {"roads": named_directories("--road", road), "prompts": named_directories("--prompt", prompt)}
    with console.Bars() as bars:
        found = plan(model, progress=bars, **options)
    if as_json:
        return console.print_json(found)
    show(found)


def show(found: dict[str, Any]) -> None:
    """The plan in a few lines and a table."""
    say, run, sizes = console.out().print, found["quantize"], found["size"]
    grid = found["grid"] or "several grids"
    say(f"[bold]{console.literal(found['model'])}[/]: {units.size(sizes['model'])} of weights; blocks in {grid}")
    if run is None:
        say("  in integers already: planned for export")
    else:
        left = run["available_bytes"]
        short = left is not None and run["host_bytes"] > left
        beside = "" if left is None else f"; this machine has {units.size(left)} left"
        say(f"  memory    {units.size(run['host_bytes'])} at most{beside}{', which is too little' if short else ''}")
        if run["device_bytes"]:
            say(f"  device    {units.size(run['device_bytes'])} at most")
        text = f", and what the model takes to write {run['sampled']} windows of text" if run["sampled"] else ""
        took = (
            "not tried, as a block does not fit" if run["seconds"] is None else f"about {units.seconds(run['seconds'])}"
        )
        say(f"  time      {took}{text}")
    if sizes["artefact"] is not None:
        more = "" if sizes["tokenizer"] is None else f" and {units.size(sizes['tokenizer'])} of tokenizer"
        say(f"  on disk   {units.size(sizes['artefact'])} of weights{more}")
    made = console.table("\nruntimes", "runtime", "--to", "loads", "weights")
    for title in ("how", "what would help"):
        made.add_column(title, justify="left", overflow="fold")
    for row in found["runtimes"]:
        count = "" if row["bytes"] is None else units.size(row["bytes"])
        made.add_row(row["runtime"], row["to"], row["loads"], count, row["path"], row["change"] or "")
    say(made)

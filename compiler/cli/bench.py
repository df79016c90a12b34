"""`tpvc bench`: speed, memory and size, side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tpvc.compiler import units
from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import device_option


@click.command(
    "bench",
    epilog="""\b
Examples:
  tpvc bench smollm2-135m smollm2-onnx
  tpvc bench smollm2-onnx --prompt-tokens 512 --new-tokens 128 --threads 2
  tpvc bench model-float model-w4 model-w3 --json > bench.json

\b
Every target is loaded in a process of its own; runs alternate (A B A B ...) and the figures
are medians, so that a warm or busy machine treats all alike. Ratios are to the first target.
Onnx folders run in ONNX Runtime GenAI, triton packages on the GPU or through references in
torch, everything else in torch float32.
""",
)
@click.argument("targets", nargs=-1, required=True)
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=5, show_default=True, help="Runs of every target.")
@click.option("--threads", type=click.IntRange(1), help="Threads of either runtime.  [default: all cores]")
@device_option
@click.option("--png", type=click.Path(path_type=Path, dir_okay=False), help="Draw the figures into this file.")
@console.json_option
def command(targets: tuple[str, ...], threads: int | None, png: Path | None, as_json: bool, **options: Any) -> None:
    """Speed, memory and size of TARGETS, side by side.

    TARGETS are exported folders, artefacts and MODELs.
    """
    from tpvc.compiler.bench import bench, chart, check_picture
    from tpvc.compiler.engines import cores

    if png is not None:
        check_picture(png)
    threads = threads or cores()
    with console.Bars() as bars:
        rows = bench(list(targets), threads=threads, progress=bars, **options)
    if png is not None:
        chart(rows, png)
    if as_json:
        return console.print_json({"threads": threads, **options, "rows": [asdict(row) for row in rows]})
    note = f"{options['prompt_tokens']} prompt and {options['new_tokens']} new tokens, {threads} threads, "
    console.out().print(rows_table(rows, note + f"medians of {options['runs']} runs"))
    if png is not None:
        console.out().print(f"drawn in {png}", markup=False)


def rows_table(rows: list[Any], title: str) -> Any:
    """Figures of every row, with the ratio to the first row's behind each."""
    first = rows[0]

    def ratio(row: Any, figure: str, unit: float = 1) -> str:
        now, then = getattr(row, figure), getattr(first, figure)
        return f"{now / unit:.1f}" + ("" if row is first else f" ({now / then:.2f}x)")

    table = console.table(
        title, "target", "engine", "decode tok/s", "prefill tok/s", "first token", "peak memory MB", "weights MB"
    )
    for row in rows:
        table.add_row(
            row.target,
            row.engine,
            ratio(row, "decode"),
            ratio(row, "prefill"),
            units.seconds(row.first_token),
            ratio(row, "peak", 1e6),
            ratio(row, "size", 1e6),
        )
    return table

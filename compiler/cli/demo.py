"""`tpvc demo`: the whole way on a small model, in minutes: fetch, quantise, compare, export, ask, measure."""

from __future__ import annotations

import time
from dataclasses import asdict
from math import prod
from pathlib import Path
from shlex import quote
from typing import Any

import click
from rich.console import Console

from tpvc.compiler import units
from tpvc.compiler.cli import console

MODEL = "smollm2-135m"
QUESTION = "Why does bread rise when it is baked? Answer in two sentences."
GRID = {"bits": 4, "group": 64, "symmetric": False}


@click.command(
    "demo",
    epilog="""\b
It leaves behind, under the folder given with -o:
  w4/       the quantised checkpoint (transformers loads it), tpvc.json, report.html
  w4-rtn/   the same grid, rounded to nearest: the baseline
  onnx/     w4 for ONNX Runtime GenAI
  bench.png speed, memory and size beside the float original
What tpvc wrote there before under these names is replaced.
""",
)
@click.option(
    "-o",
    "--output",
    "out",
    default="demo",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to write.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads when measuring.  [default: all cores]")
@console.json_option
def command(out: Path, threads: int | None, as_json: bool) -> None:
    """The whole way on a small model, in minutes.

    SmolLM2-135M-Instruct is fetched (93 MB, once), quantised, compared, exported, asked and measured.
    """
    story = Console(quiet=True) if as_json else console.out()
    found = tell(out, threads, story, echo=not as_json)
    if as_json:
        console.print_json(found)


def tell(out: Path, threads: int | None, story: Console, echo: bool) -> dict[str, Any]:
    """Do it all, telling it to `story`; the figures, JSON-able."""
    from tpvc.compiler.bench import bench, chart
    from tpvc.compiler.cli.bench import rows_table
    from tpvc.compiler.cli.eval import results_table
    from tpvc.compiler.cli.run import reply
    from tpvc.compiler.engines import cores, open_engine
    from tpvc.compiler.export_pipeline import export
    from tpvc.compiler.frontends import demo, load
    from tpvc.compiler.measure import compare, open_subject, windows_of
    from tpvc.compiler.pipeline import quantize

    start = time.perf_counter()
    threads = threads or cores()
    learned, nearest, onnx = out / "w4", out / "w4-rtn", out / "onnx"

    def chapter(number: int, title: str) -> None:
        story.print(f"\n[bold]{number}  {title}[/]")

    with console.Bars() as bars:
        chapter(1, "A language model: SmolLM2-135M-Instruct")
        story.print(f"   {demo.fetch(bars)}", markup=False)
    count = sum(prod(p.shape) for p in load(MODEL).params.values())
    story.print(f"   {count:,} weights, which are {units.size(4 * count)} in float32, as tpvc reads them")

    chapter(2, "Quantise its blocks to 4 bits, 64 weights sharing a scale")
    with console.Bars() as bars:
        _, took_nearest = console.measured(
            lambda: quantize(MODEL, nearest, **GRID, method="rtn", overwrite=True, progress=bars)
        )
    story.print(f"   round-to-nearest, the baseline: {units.seconds(took_nearest)}")
    with console.Bars() as bars:
        _, took = console.measured(
            lambda: quantize(MODEL, learned, **GRID, recipe="fast", overwrite=True, progress=bars)
        )
    story.print(f"   FlexRound, which learns how to round, block by block: {units.seconds(took)}")

    chapter(3, "What was lost? A text that neither has seen")
    with console.Bars() as bars:
        original = open_subject(MODEL, threads)
        tokens = windows_of(original)
        results = [compare(open_subject(str(p), threads), original, tokens, bars) for p in (nearest, learned)]
    del original
    story.print(results_table(results, ""))

    chapter(4, "Compile it for ONNX Runtime GenAI")
    with console.Bars() as bars:
        export(str(learned), onnx, to="onnx", overwrite=True, progress=bars)
    story.print(f"   {onnx}: {units.size(console.folder_bytes(onnx))}", markup=False)

    chapter(5, "Ask it something")
    story.print(f"   > {QUESTION}\n", markup=False)
    engine = open_engine(str(onnx), threads)
    ids = engine.encode([{"role": "user", "content": QUESTION}])
    answer = reply(engine, ids, 96, echo=echo)
    del engine

    chapter(6, "Measure it beside the float original")
    with console.Bars() as bars:
        rows = bench([MODEL, str(onnx)], new_tokens=32, runs=3, threads=threads, progress=bars)
    story.print(rows_table(rows, ""))
    picture = out / "bench.png"
    chart(rows, picture)

    total = time.perf_counter() - start
    story.print(f"\n[bold]Done in {units.seconds(total)}.[/] Look at")
    story.print(f"   {learned / 'report.html'}   error of every block, before and after", markup=False)
    story.print(f"   {picture}   the measurements", markup=False)
    story.print(f"   tpvc run {quote(str(onnx))}   a chat with it", markup=False)
    story.print(f"   tpvc quantize {MODEL} -o my-w3 --bits 3   your own turn")
    return {
        "directory": str(out),
        "seconds": total,
        "quantize_seconds": {"rtn": took_nearest, "flexround": took},
        "eval": results,
        "question": QUESTION,
        "answer": answer["text"],
        "bench": [asdict(row) for row in rows],
    }

"""`tpvc eval`: perplexity of a text, and what was lost against the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tpvc.compiler.cli import console


@click.command(
    "eval",
    epilog="""\b
Examples:
  tpvc eval smollm2-w4 --text wiki.test.txt
  tpvc eval smollm2-w4 --against smollm2-135m --text wiki.test.txt --windows 40 --seqlen 512
  tpvc eval smollm2-w4 --adapter legal --against smollm2-w4     what the adapter changes
  tpvc eval smollm2-onnx --against smollm2-135m          the exported folder, in its own runtime

\b
The first WINDOWS * SEQLEN tokens of FILE are cut into windows; every window predicts its own
tokens but the first. The standard error is over windows. KL is mean KL(original || target) in
nats a token; top-1 is how often both think the same token likeliest. Without --text a short
English text that is in no calibration set is used: enough to see that nothing broke, no more.
--adapter and --task hold for TARGET alone; ORIGINAL is measured as its base model.

\b
An exported folder is measured in its own runtime. Its graph gives the logits of the last token
only, so it is fed token by token, at the decoding speed that `tpvc bench` shows: 40 windows of
512 tokens take 7 minutes at 50 tokens a second. Fewer --windows are quicker.
""",
)
@click.argument("target")
@click.option("--against", metavar="ORIGINAL", help="Also measure ORIGINAL, and the distance of TARGET from it.")
@click.option("--text", type=click.Path(path_type=Path, dir_okay=False), help="A UTF-8 text file.")
@click.option("--windows", type=click.IntRange(1), help="How many.  [default: 40, or what the built-in text holds]")
@click.option("--seqlen", type=click.IntRange(2), help="Tokens a window.  [default: 512, or 128 for the built-in text]")
@click.option(
    "--adapter",
    metavar="NAME",
    help="An adapter that TARGET carries, or the folder of a RoAd adapter (PEFT's format).  [default: the base model]",
)
@click.option("--task", metavar="NAME", help="Likewise a soft prompt, which stands before every window.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the runtime.  [default: all cores]")
@console.json_option
def command(
    target: str,
    against: str | None,
    text: Path | None,
    windows: int | None,
    seqlen: int | None,
    adapter: str | None,
    task: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Perplexity of TARGET, distance from the original.

    TARGET is an exported folder, an artefact or a MODEL.
    """
    from tpvc.compiler.measure import measure

    with console.Bars() as bars:
        options = {"windows": windows, "seqlen": seqlen, "threads": threads, "adapter": adapter, "task": task}
        found = measure(target, text, against=against, **options, progress=bars)
    if as_json:
        return console.print_json(found)
    console.out().print(
        results_table([found], f"{found['windows']} windows of {found['seqlen']} tokens, {found['text']} text")
    )


def results_table(found: list[dict[str, Any]], title: str) -> Any:
    """A line for every measured target, after a line for the original."""
    made = console.table(title, "", "perplexity", "± standard error", "KL, nats/token", "same top-1")
    if against := found[0].get("against"):
        made.add_row(against["target"], f"{against['perplexity']:.2f}", f"{against['stderr']:.2f}", "0", "100 %")
    for row in found:
        far = row.get("against")
        distance = (f"{far['kl']:.4f}", f"{100 * far['top1']:.1f} %") if far else ("", "")
        name = " with ".join([row["target"], *(row[key] for key in ("adapter", "task") if key in row)])
        made.add_row(name, f"{row['perplexity']:.2f}", f"{row['stderr']:.2f}", *distance)
    return made

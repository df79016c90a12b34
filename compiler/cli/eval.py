"""`tpvc eval`: perplexity of a text or scores in tasks, and what was lost against the original."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from tpvc.compiler.cli import console

FIGURES = ("value", "stderr")


@click.command(
    "eval",
    epilog="""\b
Examples:
  tpvc eval smollm2-w4 --text wiki.test.txt
  tpvc eval smollm2-w4 --against smollm2-135m --text wiki.test.txt --windows 40 --seqlen 512
  tpvc eval smollm2-w4 --adapter legal --against smollm2-w4     what the adapter changes
  tpvc eval smollm2-onnx --against smollm2-135m          the exported folder, in its own runtime
  tpvc eval smollm2-w4 --tasks arc_easy,piqa --task-data LLM-Adapters/dataset --limit 200

\b
FILE is cut into windows, which begin as the tokenizer begins a text; every window predicts its own
tokens but the first. The standard error is over windows. KL is mean KL(original || target) in
nats a token; top-1 is how often both think the same token likeliest. Without --text a short
English text that is in no calibration set is used: enough to see that nothing broke, no more.
--adapter and --task hold for TARGET alone; ORIGINAL is measured as its base model.

\b
An exported folder is measured in its own runtime. Its graph gives the logits of the last token
only, so it is fed token by token, at the decoding speed that `tpvc bench` shows: 40 windows of
512 tokens take 7 minutes at 50 tokens a second. Fewer --windows are quicker.

\b
--tasks asks questions instead, those of lm-evaluation-harness (pip install 'tpvc[harness]'). With
--task-data their data is read from FOLDER as it was published, and from nowhere else: arc_easy,
arc_challenge, openbookqa, piqa, social_iqa, winogrande, boolq_no_passage (LLM-Adapters' json),
gsm8k (jsonl), sst2, rte (tsv). Without it any of `lm_eval ls tasks`, whose data is fetched.
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
    help="An adapter that TARGET carries, or, unless TARGET is exported, the folder of a RoAd adapter (PEFT's format)."
    "  [default: the base model]",
)
@click.option("--task", metavar="NAME", help="Likewise a soft prompt, which stands before every window.")
@click.option("--tasks", metavar="NAME,...", help="Names of tasks, or files NAME.yaml, instead of a text.")
@click.option("--task-data", type=click.Path(path_type=Path), metavar="FOLDER", help="Where the tasks' data lies.")
@click.option("--limit", type=click.IntRange(1), help="The first LIMIT examples of every task.  [default: all]")
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
    tasks: str | None,
    task_data: Path | None,
    limit: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Perplexity of TARGET or its scores in tasks, distance from the original.

    TARGET is an exported folder, an artefact or a MODEL.
    """
    options = {"against": against, "threads": threads, "adapter": adapter, "task": task}
    if tasks is not None:
        if any(x is not None for x in (text, windows, seqlen)):
            raise click.UsageError("--tasks asks questions of its own; leave --text, --windows and --seqlen out")
        names = [name for name in tasks.split(",") if name]
        return _tasks(target, names, {"task_data": task_data, "limit": limit, **options}, as_json)
    if task_data is not None or limit is not None:
        raise click.UsageError("--task-data and --limit are for --tasks; name some")
    from tpvc.compiler.measure import measure

    with console.Bars() as bars:
        found = measure(target, text, windows=windows, seqlen=seqlen, **options, progress=bars)
    if as_json:
        return console.print_json(found)
    console.out().print(
        results_table([found], f"{found['windows']} windows of {found['seqlen']} tokens, {found['text']} text")
    )


def _tasks(target: str, names: list[str], options: dict[str, Any], as_json: bool) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm_eval's bars; both are read when it is imported
    if options["task_data"] is not None:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from tpvc.compiler.harness import evaluate_tasks

    with console.Bars() as bars:
        found = evaluate_tasks(target, names, **options, progress=bars)
    if as_json:
        return console.print_json(found)
    console.out().print(scores_table(found))
    for one in (found, found.get("against", {})):
        if one.get("cut"):
            console.err().print(
                f"{one['cut']} questions were too long for {one['target']} and lost their beginning", markup=False
            )


def scores_table(found: dict[str, Any]) -> Any:
    """A line for every metric of every task; beside it what the original scores."""
    against = found.get("against")
    name = " with ".join([found["target"], *(found[key] for key in ("adapter", "task") if key in found)])
    columns = [column for one in (name, against and against["target"]) if one for column in (one, "±")]
    made = console.table("tasks of lm_eval", "task", "metric", "examples", *columns)
    for i, row in enumerate(found["scores"]):
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        cells = [f"{r[key]:.4f}" for r in (row, *(against["scores"][i : i + 1] if against else [])) for key in FIGURES]
        made.add_row(row["task"], metric, str(row["examples"] or ""), *(c.replace("nan", "") for c in cells))
    return made


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

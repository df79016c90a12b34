"""`tpvc prompt`: soft prompts, and arithmetic on their task prompt vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import click

from tpvc.compiler.cli import console, prompt_embeds, prompt_tune
from tpvc.compiler.cli.options import named_directories
from tpvc.compiler.errors import TpvcError

command = console.Ordered(
    "prompt",
    help="Tune soft prompts, and add, negate and compare their task prompt vectors.",
    epilog="""\b
Examples:
  tpvc prompt tune smollm2-135m --data sst2.jsonl -o sst2
  tpvc prompt add sst2 trec -o both
  tpvc prompt add sst2 trec --search --model smollm2-135m --data sst2-dev.jsonl --data trec-dev.jsonl
      -o both
  tpvc prompt similarity sst2 trec qnli -o similarity.html

\b
A task prompt vector is what tuning added to the values a prompt started from (arXiv 2408.01119).
Prompts are directories in PEFT's format (PROMPT_TUNING) with start.safetensors beside it, and so
is every result. Every command but embeds, which prints JSON anyway, has --json.
""",
)
command.add_command(prompt_tune.command)

output_option = click.option(
    "-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder to write."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace OUT if tpvc wrote it.")


@command.command(
    "vector",
    epilog="""\b
Examples:
  tpvc prompt vector from-peft --start untrained -o my-task
  tpvc prompt vector from-peft --start start.safetensors -o my-task

\b
PEFT keeps neither the start nor its seed, so that it has to be saved before training. START is a
prompt's directory (its start or, where it has none, its values), or a file with one tensor called
start, prompt_embeddings, origin_prompts or init_prompts.
""",
)
@click.argument("directory", metavar="DIR")
@click.option("--start", required=True, metavar="START", help="The values that the prompt was tuned from.")
@output_option
@overwrite_option
@console.json_option
def vector(directory: str, start: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Put the start beside the prompt in DIR, which makes its vector known."""
    from tpvc.compiler.prompt_pipeline import prompt_vector

    _make(lambda bars: prompt_vector(directory, out, start=start, overwrite=overwrite, progress=bars), out, as_json)


@command.command(
    "add",
    epilog="""\b
Examples:
  tpvc prompt add sst2 trec -o both
  tpvc prompt add sst2 trec --weight 1 --weight -0.5 -o more-of-sst2
  tpvc prompt add sst2 trec --search --model smollm2-135m --data sst2-dev.jsonl --data trec-dev.jsonl
      -o both
  tpvc prompt add sst2 trec --method ties --density 0.2 -o both

\b
The result is start + lambda * sum of the vectors, by the first prompt's start or that of --start.
--search takes the lambda of 0, 0.05, ..., 1 with the best mean share of right answers on the
validation examples, read as each prompt's own tuning read its data. Keep test data out of them.
ties keeps the largest entries of every vector, and of these the mean of those that agree on the
sign; dare drops entries at random and makes up for it. --density is the share that is kept.
""",
)
@click.argument("directories", nargs=-1, required=True, metavar="DIR...")
@click.option("--scale", type=float, help="lambda.  [default: 1]")
@click.option("--search", is_flag=True, help="Choose lambda on validation examples.")
@click.option("--model", metavar="MODEL", help="Of --search: the model that the prompts belong to.")
@click.option("--data", multiple=True, metavar="FILE", help="Of --search: once for each prompt, in order.")
@click.option("--method", type=click.Choice(["sum", "ties", "dare"]), default="sum", show_default=True)
@click.option("--density", type=float, help="Of ties and dare: the share of entries to keep.  [default of ties: 1]")
@click.option("--weight", "weights", multiple=True, type=float, help="Once for each prompt, in order.  [default: 1]")
@click.option("--start", metavar="DIR", help="Add to this prompt's start.  [default: the first prompt's]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Of dare.  [default: 0]")
@output_option
@overwrite_option
@console.json_option
def add(
    directories: tuple[str, ...],
    scale: float | None,
    search: bool,
    model: str | None,
    data: tuple[str, ...],
    method: str,
    density: float | None,
    weights: tuple[float, ...],
    start: str | None,
    seed: int | None,
    out: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Make one prompt for the tasks of several.

    A DIR may be NAME=DIR; otherwise a prompt is called as its directory.
    """
    named = named_directories("DIR", directories)
    if seed is not None and method != "dare":
        raise TpvcError(f"found a seed for {method}, which draws nothing; leave it out, or use dare")
    if search and scale is not None:
        raise TpvcError("found both --scale and --search; give the lambda, or let it be searched")
    for option, given in (("--data", data), ("--weight", weights)):
        if len(given) not in (0, len(named)):
            raise TpvcError(f"found {len(given)} times {option} for {len(named)} prompts; expected one for each")

    from tpvc.compiler.adapters.prompt_recipe import Part, Recipe
    from tpvc.compiler.prompt_pipeline import prompt_combine

    files = [Path(file).expanduser() for file in data] or [None] * len(named)
    parts = [
        Part(name, Path(directory).expanduser(), weight, density, file)
        for (name, directory), weight, file in zip(named.items(), weights or [1.0] * len(named), files, strict=True)
    ]
    recipe = Recipe(
        {"sum": "task_arithmetic", "ties": "ties", "dare": "dare_linear"}[method],
        tuple(parts),
        None if start is None else Path(start).expanduser(),
        None if search else 1.0 if scale is None else scale,
        seed or 0,
        model,
    )
    _make(lambda bars: prompt_combine(recipe, out, overwrite=overwrite, progress=bars), out, as_json)


@command.command(
    "negate",
    epilog="""\b
Example:
  tpvc prompt negate sst2 -o less-of-sst2
""",
)
@click.argument("directory", metavar="DIR")
@output_option
@overwrite_option
@console.json_option
def negate(directory: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Turn a vector around: start - vector."""
    from tpvc.compiler.prompt_pipeline import prompt_negate

    _make(lambda bars: prompt_negate(directory, out, overwrite=overwrite, progress=bars), out, as_json)


@command.command(
    "scale",
    context_settings={"ignore_unknown_options": True},  # -0.5 is a number
    epilog="""\b
Examples:
  tpvc prompt scale sst2 0.5 -o half-of-sst2
  tpvc prompt scale sst2 -0.5 -o less-of-sst2
""",
)
@click.argument("directory", metavar="DIR")
@click.argument("factor", type=float)
@output_option
@overwrite_option
@console.json_option
def scale(directory: str, factor: float, out: Path, overwrite: bool, as_json: bool) -> None:
    """Take FACTOR times a vector: 0 gives the start, 1 the prompt itself."""
    from tpvc.compiler.prompt_pipeline import prompt_scale

    _make(lambda bars: prompt_scale(directory, factor, out, overwrite=overwrite, progress=bars), out, as_json)


@command.command(
    "similarity",
    epilog="""\b
Examples:
  tpvc prompt similarity sst2 trec qnli
  tpvc prompt similarity sst2 trec qnli --of prompts -o similarity.html

\b
Two cosines: of the means over the tokens, as in the paper, and of all numbers. Vectors need the
start of every prompt; prompts (--of prompts) do not.
""",
)
@click.argument("directories", nargs=-1, required=True, metavar="DIR...")
@click.option("--of", type=click.Choice(["vectors", "prompts"]), default="vectors", show_default=True)
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Draw them in this .html file.")
@click.option("--overwrite", is_flag=True, help="Replace the .html file.")
@console.json_option
def similarity(directories: tuple[str, ...], of: str, out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Compare the directions of task prompt vectors, each with each.

    A DIR may be NAME=DIR; otherwise a prompt is called as its directory.
    """
    from tpvc.compiler.prompt_pipeline import check_page, prompt_similarity, similarity_page

    if out is not None:
        check_page(out, overwrite)
    found = prompt_similarity(named_directories("DIR", directories), of)
    if out is not None:
        similarity_page(found, out)
    for remark in found["remarks"]:
        console.err().print(remark, markup=False)
    if as_json:
        return console.print_json({"page": None if out is None else str(out), **found})
    for title, key in (("cosine of token means", "token_mean"), ("cosine of all numbers", "flattened")):
        table = console.table(title, "", *found["names"])
        for name, row in zip(found["names"], found[key], strict=True):
            table.add_row(name, *(f"{value:.3f}" for value in row))
        console.out().print(table)
    if out is not None:
        console.out().print(f"drawn in {out}", markup=False)


@command.command(
    "merge",
    epilog="""\b
Example:
  tpvc prompt merge recipe.yaml -o both

\b
RECIPE, in mergekit's manner, says what the options of `add` say, for each prompt by itself:
  merge_method: ties                  task_arithmetic, ties, dare_linear or dare_ties
  prompts:
    - prompt: ./sst2                  a directory; paths are relative to the recipe
      parameters: {weight: 1.0, density: 0.5}
      data: ./sst2-dev.jsonl          where lambda is searched
    - prompt: ./trec
      data: ./trec-dev.jsonl
  base_prompt: ./other                whose start is added to; default: the first prompt's
  parameters: {lambda: search, seed: 0}
  model: smollm2-135m                 where lambda is searched
""",
)
@click.argument("recipe", metavar="RECIPE")
@output_option
@overwrite_option
@console.json_option
def merge(recipe: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Make a prompt as a YAML file says."""
    from tpvc.compiler.adapters.prompt_recipe import read
    from tpvc.compiler.output import check_apart
    from tpvc.compiler.prompt_pipeline import prompt_combine

    check_apart(out, recipe)
    found = read(Path(recipe).expanduser())
    _make(lambda bars: prompt_combine(found, out, overwrite=overwrite, progress=bars), out, as_json)


def _make(work: Callable[[Any], Path], out: Path, as_json: bool) -> None:
    """Run what makes a prompt and say what was made."""
    with console.Bars() as bars:
        _, took = console.measured(lambda: work(bars))
    manifest = json.loads((out / "tpvc.json").read_text(encoding="utf-8"))
    for remark in manifest["remarks"]:
        console.err().print(remark, markup=False)
    if as_json:
        return console.print_json({"directory": str(out), "seconds": took, "manifest": manifest})
    show, tokens = console.out().print, manifest["parts"][0]["tokens"]
    found = manifest["search"]
    if found is not None:
        table = console.table("right answers", "lambda", *found["tasks"], "mean")
        for row in found["table"]:
            chosen = "bold" if row["lambda"] == found["lambda"] else None
            shares = (f"{100 * share:.1f} %" for share in (*row["exact"], row["mean"]))
            table.add_row(f"{row['lambda']:.2f}", *shares, style=chosen)
        table.add_row("own prompt", *(f"{100 * share:.1f} %" for share in found["alone"]), "")
        show(table)
    show(console.written(out, took, f"{tokens} virtual tokens"))
    if "lambda" in manifest["origin"]:
        show(f"  lambda  {manifest['origin']['lambda']:g}")
    show(f'  next    tpvc run MODEL --task {quote(str(out))} --raw "..."', markup=False)


command.add_command(prompt_embeds.command)

"""What `prompt tune` and `road tune` share: examples and a schedule in; what came of it, shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import check_device
from tpvc.compiler.errors import TpvcError


def example_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """MODEL, where to write, and the examples that are learned."""
    for option in reversed(
        (
            click.argument("model"),
            click.option(
                "-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder to write."
            ),
            click.option("--data", required=True, metavar="FILE", help="Examples: .jsonl, .csv or .tsv."),
            click.option(
                "--validation", metavar="FILE", help="Examples to choose by.  [default: a tenth of --data, 500 at most]"
            ),
            click.option(
                "--template", help="The prompt of a text and label example, with {field} places.  [default: {text}\\n]"
            ),
            click.option("--column", multiple=True, metavar="FIELD=COLUMN", help="A column by another name."),
            click.option("--label", multiple=True, metavar="VALUE=WORDS", help="What is written for a label's value."),
        )
    ):
        command = option(command)
    return command


def schedule_options(
    epochs: float, batch_size: int, lr: float, fall: str, warmup: float
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """How long and how fast is learned, with these defaults, and on what; `fall` says how the rate comes down."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(
            (
                click.option("--epochs", type=click.FloatRange(0, min_open=True), default=epochs, show_default=True),
                click.option("--steps", type=click.IntRange(1), help="Optimiser steps, instead of epochs."),
                click.option("--batch-size", type=click.IntRange(1), default=batch_size, show_default=True),
                click.option(
                    "--lr", type=float, default=lr, show_default=True, help=f"The highest rate; linear up, then {fall}."
                ),
                click.option(
                    "--warmup",
                    type=float,
                    default=warmup,
                    show_default=True,
                    help="Share of the steps on which it climbs.",
                ),
                click.option(
                    "--max-length",
                    type=click.IntRange(2),
                    default=512,
                    show_default=True,
                    help="Tokens of an example.",
                ),
                click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True),
                click.option(
                    "--device", default="cpu", show_default=True, help="cpu, or a torch device such as cuda:0."
                ),
                click.option("--overwrite", is_flag=True, help="Replace OUT if tpvc wrote it."),
                console.json_option,
            )
        ):
            command = option(command)
        return command

    return decorate


def fields(option: str, given: tuple[str, ...]) -> dict[str, str] | None:
    """{"text": "sentence"} of ("text=sentence",), None of nothing; `option` says what is on either side."""
    found: dict[str, str] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key or not value or key in found:
            raise TpvcError(f"found {option.split()[0]} '{item}', expected {option}, each once")
        found[key] = value
    return found or None


def examples_of(
    column: tuple[str, ...], label: tuple[str, ...], template: str | None, **options: Any
) -> dict[str, Any]:
    """What was typed, as `prompt_tune` and `road_tune` take it."""
    check_device(options["device"])
    return options | {
        "columns": fields("--column FIELD=COLUMN", column),
        "labels": fields("--label VALUE=WORDS", label),
        "template": template if template is None else template.replace("\\n", "\n"),
    }


def tuned(run: Callable[[console.Bars], Path]) -> tuple[dict[str, Any], float]:
    """The manifest that `run` wrote, and the seconds it took."""
    try:
        with console.Bars() as bars:
            out, took = console.measured(lambda: run(bars))
    except KeyboardInterrupt as interrupt:
        raise click.Abort("interrupted; the same command goes on where it stopped") from interrupt
    return json.loads((out / "tpvc.json").read_text(encoding="utf-8")), took


def show(out: Path, manifest: dict[str, Any], took: float, learned: str, following: list[str]) -> None:
    """What was learned, how good it is beside the start, and what to type next."""
    line, checks = console.out().print, manifest["checks"]
    kept = next(c for c in checks if c[0] == manifest["kept_step"])
    line(console.written(out, took, learned))
    line(f"  validation  loss {kept[1]:.4g}, {100 * kept[2]:.1f} % of the answers right, at step {kept[0]}")
    line(f"  before      loss {checks[0][1]:.4g}, {100 * checks[0][2]:.1f} %")
    line(f"  report      {out / 'report.html'}", markup=False)
    for label, text in zip(["next", *[""] * len(following)], following, strict=False):
        line(f"  {label:10}  {text}", markup=False)

"""What the commands share: where output goes, progress bars, tables."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tpvc.compiler import units
from tpvc.compiler.errors import printable

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output, nothing else.")


def out() -> Console:
    """Standard output: results. A file or a pipe has no width of its own."""
    made = Console(highlight=False, soft_wrap=True)
    return made if made.is_terminal else Console(highlight=False, soft_wrap=True, width=160)


def err() -> Console:
    """Standard error: progress and remarks."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def literal(text: object) -> str:
    """A name or path as it stands, in a line or table that reads [markup]."""
    return escape(printable(str(text)))


def written(out: Path, took: float, more: str = "") -> str:
    """The first line about what a command made: where it lies, and seconds it took."""
    return f"[bold]{literal(out)}[/] written in {units.seconds(took)}" + (f", {more}" if more else "")


def print_json(value: dict[str, Any]) -> None:
    """One object; what is not a number (the standard error of one window) becomes null."""

    def legal(part: Any) -> Any:
        if isinstance(part, dict):
            return {str(k): legal(v) for k, v in part.items()}
        if isinstance(part, list | tuple):
            return [legal(v) for v in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    click.echo(json.dumps(legal(value), indent=2, ensure_ascii=False, allow_nan=False))


class Ordered(click.Group):
    """A group that lists its commands in the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class Bars:
    """One bar a stage with the time that is left: `with Bars() as bars: work(progress=bars)`.

    A terminal gets moving bars. A log file gets a line when a stage begins, one every half minute, one at its end.
    What was done when a stage is first heard of, by a run that was interrupted, tells nothing of this one's speed.
    """

    EVERY = 30.0

    def __init__(self) -> None:
        self.console = err()
        self.live = self.console.is_terminal
        self.started: dict[str, tuple[float, int]] = {}
        self.spoken: dict[str, float] = {}
        self.ended: set[str] = set()
        self.tasks: dict[str, Any] = {}
        self.bars = Progress(
            TextColumn("{task.description:<22}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self.console,
        )

    def __enter__(self) -> Bars:
        if self.live:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.bars.stop()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        if not self.live:
            return self._line(stage, done, total, note)
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total or None, completed=done, note=note)
        self.bars.update(self.tasks[stage], completed=done, total=total or None, note=note)

    def _line(self, stage: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        start, before = self.started.setdefault(stage, (now, done))
        last = bool(total) and done >= total
        if (last and stage in self.ended) or (not last and now - self.spoken.get(stage, -self.EVERY) < self.EVERY):
            return
        self.spoken[stage] = now
        passed = max(0.0, now - start)  # no clock is trusted to go on only forwards
        if last:
            self.ended.add(stage)
            tail = f"done in {units.seconds(passed)}"
        elif done > before:
            tail = f"{units.seconds(passed * (total - done) / (done - before))} left"
        else:
            tail = ""
        self.console.print(f"{stage}: {done}/{total} {note} {tail}".rstrip(), markup=False)


class Literal(Table):
    """A table of names and numbers as they stand, [brackets] too."""

    def add_row(self, *cells: object, **options: Any) -> None:
        super().add_row(*(literal(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    title = "\n".join(map(literal, title.split("\n"))) or None
    made = Literal(title=title, title_justify="left", title_style="bold", header_style="bold", box=None)
    for i, column in enumerate(columns):
        made.add_column(literal(column), justify="right" if i else "left", overflow="fold", no_wrap=bool(i))
    return made


def run_command(folder: Path) -> str:
    """What to type to hear the model in `folder`: --raw where no chat template lies beside it."""
    from tpvc.compiler.engines.text import has_template

    return f'tpvc run {quote(str(folder))} "Hello"' + ("" if has_template(folder) else " --raw")


def folder_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def measured(work: Callable[[], Any]) -> tuple[Any, float]:
    """(what `work` returns, seconds it took)."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def interactive() -> bool:
    return sys.stdin.isatty()

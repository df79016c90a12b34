"""results.json -> one markdown table. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from rows import SCHEMES, Row, rows

FLOAT = "float32"


def markdown(found: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], against: str) -> str:
    """A table of the finished rows: a line a method and grid, the mean over the seeds that there are.

    found    {row name, or "float32": its figures}
    against  the method whose figures, on the same grid, the last three columns are divided by
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    notes: dict[str, str] = {}
    for row in sorted(rows(), key=_order):
        if "perplexity" in found.get(row.name, {}):
            groups.setdefault((row.method.name, row.grid), []).append(found[row.name])
            if row.method.note:
                notes[row.method.name] = row.method.note
    head = ["method", "grid", "perplexity", "stderr", "KL", "top-1 %", *(f"{task} %" for task in tasks)]
    head += ["minutes", "CPU minutes", "peak GiB", "MB", *(f"{what} / {against}'s" for what in _RATIOS)]
    lines = [head, ["---"] * len(head)]
    if FLOAT in found:
        lines.append([FLOAT, "", *_quality([found[FLOAT]], tasks), *[""] * (4 + len(_RATIOS))])
    for (method, grid), seeds in groups.items():
        cost = [_cell(seeds, key, form) for key, form in _COSTS.items()]
        peer = groups.get((against, grid))
        ratios = [_ratio(seeds, peer, key) for key in _RATIOS.values()]
        lines.append([method, grid, *_quality(seeds, tasks), *cost, *ratios])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text + "\n" + "".join(f"\n* {name}: {note}" for name, note in notes.items()) + "\n"


_COSTS: dict[str, Callable[[float], str]] = {
    "minutes": "{:.1f}".format,
    "cpu_minutes": "{:.1f}".format,
    "peak_gib": "{:.2f}".format,
    "megabytes": "{:.1f}".format,
}
_RATIOS = {"perplexity": "perplexity", "CPU minutes": "cpu_minutes", "peak": "peak_gib"}


def _order(row: Row) -> tuple[int, bool]:
    return (list(SCHEMES).index(row.scheme), not row.symmetric)


def _quality(seeds: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    flat = [{**s, **{task: value for task, (value, _) in s.get("tasks", {}).items()}} for s in seeds]
    cells = [_cell(flat, "perplexity", _figure), _cell(flat, "stderr", _figure, spread=False)]
    cells += [_cell(flat, "kl", "{:.4f}".format), _cell(flat, "top1", _percent)]
    return cells + [_cell(flat, task, _percent) for task in tasks]


def _cell(seeds: Sequence[Mapping[str, Any]], key: str, form: Callable[[float], str], spread: bool = True) -> str:
    """The mean, with deviation and number where several seeds have the figure; empty where none has."""
    values = [s[key] for s in seeds if key in s]
    if not values:
        return ""
    if len(values) == 1 or not spread:
        return form(mean(values))
    return f"{form(mean(values))} ± {form(stdev(values))} ({len(values)})"


def _ratio(seeds: Sequence[Mapping[str, Any]], peer: Sequence[Mapping[str, Any]] | None, key: str) -> str:
    if peer is None or not all(key in s for s in (*seeds, *peer)):
        return ""
    return f"{mean(s[key] for s in seeds) / mean(s[key] for s in peer):.3g}"


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"

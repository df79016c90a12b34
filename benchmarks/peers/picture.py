"""Perplexity against CPU minutes for every method that was measured: one picture of a results.json.

    python benchmarks/peers/picture.py OUT/results.json -o picture.svg

A panel for every grid on which methods can be compared. Recipes of one tool are joined in the order of their minutes,
and only the first bears the tool's name; the dashed line is the float model. Means over the seeds that there are. Needs
matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rows import SCHEMES, rows
from table import FLOAT

OURS = "tpvc"
"""The family whose names stand below its points; others' stand above theirs."""
FAMILIES = {OURS: "#d1495b", "autoround": "#00798c", "gptq": "#edae49", "awq": "#66a182", "hqq": "#8d6a9f"}
"""Colour by the first word of a method's name; grey for others."""

COLUMNS = 3
"""Panels beside each other."""

Point = tuple[float, float]


def points(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Point]]:
    """{grid: {method: (CPU minutes, perplexity)}} of the finished rows, means over their seeds; where one method stands
    alone, nothing."""
    seeds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows():
        if "perplexity" in found.get(row.name, {}):
            seeds.setdefault((row.grid, row.method.name), []).append(found[row.name])
    made: dict[str, dict[str, Point]] = {}
    for (grid, method), those in seeds.items():
        point = mean(s["cpu_minutes"] for s in those), mean(s["perplexity"] for s in those)
        made.setdefault(grid, {})[method] = point
    return {grid: methods for grid, methods in made.items() if len(methods) > 1}


def draw(found: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    matplotlib.rcParams["svg.hashsalt"] = "peers"  # the same figures give the same bytes
    grids = points(found)
    order = [f"{scheme} {kind}" for scheme in SCHEMES for kind in ("sym", "asym") if f"{scheme} {kind}" in grids]
    columns = min(len(order), COLUMNS)
    lines = -(-len(order) // columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5.2 * columns, 4.2 * lines), squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(order) :]:
        axes.remove()
    for grid, axes in zip(order, panels.flat, strict=False):
        families: dict[str, list[tuple[Point, str]]] = {}
        for method, point in grids[grid].items():
            families.setdefault(method.partition("-")[0], []).append((point, method))
        for family, members in families.items():
            members.sort()
            colour = FAMILIES.get(family, "#777777")
            axes.plot(*zip(*(point for point, _ in members), strict=True), "o-", color=colour, markersize=5)
            for place, (point, method) in enumerate(members):
                name = method.removeprefix(f"{family}-") if place else method
                side = {"xytext": (0, -13), "ha": "center"} if family == OURS else {"xytext": (5, 5)}
                axes.annotate(name, point, textcoords="offset points", fontsize=8, color=colour, **side)
        if FLOAT in found:
            axes.axhline(found[FLOAT]["perplexity"], linestyle="--", color="#777777", linewidth=1)
        axes.set(title=grid, xscale="log", yscale="log", xlabel="CPU minutes")
        for axis, values in zip((axes.xaxis, axes.yaxis), zip(*grids[grid].values(), strict=True), strict=True):
            axis.set_major_locator(ticks(max(values) / min(values)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        axes.margins(x=0.25, y=0.15)
    for axes in panels[:, 0]:
        axes.set_ylabel("perplexity, WikiText-2 test")
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def ticks(span: float) -> Any:
    """Where a logarithmic axis has ticks, by the ratio of its largest value to its smallest."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if span < 5:
        return MaxNLocator(6)
    return LogLocator(subs=(1, 2, 5) if span < 1000 else (1,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("peers.svg"))
    args = parser.parse_args()
    draw(json.loads(args.results.read_text(encoding="utf-8"))["rows"], args.out)


if __name__ == "__main__":
    main()

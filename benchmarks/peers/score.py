"""The one evaluator: a folder on disk, loaded again by tpvc. Run by the environment "tpvc".

Its one argument is a JSON file: {"target", "against", "test" (a text), "windows" ([windows, tokens a window]), "grid"
([bits, group, symmetric], or null), "tasks", "task_data" (null: no tasks), "limit", "threads", "out"}. What was found
goes to `out`, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tpvc
from tpvc.compiler import frontends
from tpvc.compiler.program import Grid, linears


def check(target: str, grid: Grid) -> None:
    """Refuse a checkpoint whose blocks have other grids than `grid`, or whose head is not in float."""
    program = frontends.load(target)
    for node in linears(program.nodes):
        found = program.params[node.params["weight"]].grid
        wanted = None if node.block is None else grid
        if found != wanted:
            raise SystemExit(f"{target}: {node.name} has the grid {found}, expected {wanted}; its script is wrong")


def main() -> None:
    said = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if said["grid"] is not None:
        check(said["target"], Grid(*said["grid"]))
    windows, seqlen = said["windows"]
    against = said["against"]
    figures = tpvc.measure(
        said["target"], said["test"], against=against, windows=windows, seqlen=seqlen, threads=said["threads"]
    )
    found = {"perplexity": figures["perplexity"], "stderr": figures["stderr"]}
    if against:
        found |= {key: figures["against"][key] for key in ("kl", "top1")}
    if said["task_data"]:
        asked = tpvc.evaluate_tasks(
            said["target"],
            said["tasks"],
            task_data=said["task_data"],
            limit=said["limit"],
            threads=said["threads"],
        )
        found["tasks"] = {s["task"]: [s["value"], s["stderr"]] for s in asked["scores"] if s["metric"] == "acc"}
    Path(said["out"]).write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

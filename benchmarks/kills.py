"""Kill every command that writes at random moments, again and again, and compare what it ends with.

    python benchmarks/kills.py --points 400 --seed 0 [--only "road tune,quantize"] [--fault full] -o kills.json

A command is run once to its end. Then it is begun in an empty place (or with --overwrite over another artefact), killed
by SIGKILL, and begun again, up to three times, until it may end. Most points are calls: the n-th call that changes a
file, n drawn evenly from all that an undisturbed run makes, the bytes of a write half written; the others are moments.
After every kill OUT must hold nothing, what it held before, or the whole result; in the end, the bytes of the
undisturbed run and nothing beside them.

With --fault the disk is full, read-only or broken from the drawn call on, or SIGTERM comes at a drawn moment; then the
command must also end with one sentence, and exit code 2 or 143. Linux, with a C compiler; see tests/trust for how it is
done.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "trust"))

from trust_commands import COMMANDS, forking, inputs, library
from trust_trials import FAULTS, trial, undisturbed


def campaign(names: Sequence[str], points: int, seed: int, fault: str, folder: Path) -> list[dict[str, Any]]:
    """Trials of all commands in turn, until there were as many kills, or faults met."""
    draw, results, kills = random.Random(seed), [], 0
    with forking(library(folder)) as forks:
        (folder / "given").mkdir()
        given = inputs(folder / "given", forks)
        whole = {}
        for name in names:
            (folder / "whole" / name).mkdir(parents=True)
            whole[name] = undisturbed(forks, given, name, folder / "whole" / name)
        while kills < points:
            for name in names:
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    results.append(trial(forks, given, name, whole[name], Path(place), draw, fault))
                kills += results[-1]["kills"]
                for sentence in results[-1]["wrong"]:
                    print(f"{name}: {sentence}", file=sys.stderr, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=200, help="kills, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of commands with commas between; default: all but the Triton package")
    parser.add_argument("--fault", choices=FAULTS, default="kill")
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    names = asked.only.split(",") if asked.only else [name for name in COMMANDS if name != "export triton"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = campaign(names, asked.points, asked.seed, asked.fault, Path(folder).resolve())
    told = {
        name: {
            "trials": len(own := [r for r in results if r["name"] == name]),
            "kills": sum(r["kills"] for r in own),
            "wrong": sum(bool(r["wrong"]) for r in own),
        }
        for name in names
    }
    told["all"] = {key: sum(t[key] for t in told.values()) for key in ("trials", "kills", "wrong")}
    for name, row in told.items():
        print(f"{name:<24}{row['trials']:>5} trials{row['kills']:>5} times {asked.fault}{row['wrong']:>4} wrong")
    print(f"{time.monotonic() - began:.0f} s")
    if asked.output:
        asked.output.write_text(json.dumps({"told": told, "results": results}, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if told["all"]["wrong"] else 0)


if __name__ == "__main__":
    main()

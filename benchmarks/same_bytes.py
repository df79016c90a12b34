"""Run every command that writes twice in processes of their own, and with another number of threads: the same bytes?

    python benchmarks/same_bytes.py [--only "road tune,quantize"] [--threads 2] -o same_bytes.json

The model is random, of two blocks with 512 features, so that torch does share its products among threads. Linux, with a
C compiler; see tests/trust.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "trust"))

from trust_commands import COMMANDS, arguments, forking, inputs, library, tree

FEATURES = 512


def made(names: list[str], folder: Path, given: dict[str, str], threads: int) -> dict[str, Any]:
    """{name: what the command makes} in a new process."""
    folder.mkdir()
    found = {}
    with forking(library(folder), threads) as forks:
        for name in names:
            done = forks(arguments(COMMANDS[name], given, folder / name / "out"), folder)
            if done["code"]:
                raise SystemExit(f"{name}: {done['said']}")
            found[name] = tree(folder / name / "out")
    return found


def differing(one: Any, two: Any) -> list[str]:
    if one == two:
        return []
    return sorted(key for key in one if one[key] != two.get(key)) if isinstance(one, dict) else ["the file"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of commands with commas between; default: all but the Triton package")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    names = asked.only.split(",") if asked.only else [name for name in COMMANDS if name != "export triton"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        (folder / "given").mkdir()
        with forking(library(folder)) as forks:
            given = inputs(folder / "given", forks, FEATURES)
        runs = {f"{n}": made(names, folder / n, given, t) for n, t in (("one", 1), ("two", 1), ("more", asked.threads))}
    told = {}
    for name in names:
        told[name] = {
            "again": differing(runs["one"][name], runs["two"][name]),
            "threads": differing(runs["one"][name], runs["more"][name]),
        }
        print(name.ljust(24), *(f"{key}: {', '.join(files) or 'the same'}; " for key, files in told[name].items()))
    if asked.output:
        asked.output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if any(row["again"] for row in told.values()) else 0)


if __name__ == "__main__":
    main()

"""One trial: a command is disturbed, begun again, and compared with what it makes when nothing happens."""

from __future__ import annotations

import errno
import random
import shutil
import signal
from pathlib import Path
from typing import Any

from trust_commands import COMMANDS, Forks, arguments, tree

MOMENTS = 0.25
"""Share of points that are moments and not calls."""
SOON = 0.02
"""Seconds until a command can have said what is to be done when signals come."""
OVERWRITE = 0.25
"""Share of trials that replace another artefact."""
FAULTS = {
    "kill": (-signal.SIGKILL, -9),
    "term": (-signal.SIGTERM, 143),
    "int": (-signal.SIGINT, 130),
    "full": (errno.ENOSPC, 2),
    "read-only": (errno.EROFS, 2),
    "broken": (errno.EIO, 2),
}
"""What happens, as faults.c has it, and the exit code that is expected then."""


def undisturbed(forks: Forks, given: dict[str, str], name: str, folder: Path) -> dict[str, Any]:
    """What a command makes when nothing happens, with the calls and seconds it takes."""
    done = forks(arguments(COMMANDS[name], given, folder / "out"), folder)
    if done["code"]:
        raise SystemExit(f"{name}: {done['said']}")
    return {"tree": tree(folder / "out"), "calls": done["calls"], "seconds": done["seconds"]}


def trial(
    forks: Forks, given: dict[str, str], name: str, whole: dict[str, Any], folder: Path, draw: random.Random, fault: str
) -> dict[str, Any]:
    """One place, disturbed up to three times: {"kills", "points", "wrong": sentences}."""
    out = folder / "out"
    command = arguments(COMMANDS[name], given, out)
    before = None
    if draw.random() < OVERWRITE and not name.startswith("importance"):
        shutil.copytree(given["w4"], out)
        command.append("--overwrite")
        before = tree(out)
    kills, points, wrong = 0, [], []
    for _ in range(draw.choice((1, 1, 2, 3))):
        number, code = FAULTS[fault]
        if number < 0 and draw.random() < MOMENTS:
            point = {"signal": -number, "after": draw.uniform(SOON, max(SOON, whole["seconds"]))}
        else:
            point = {"fault": number, "at": draw.randint(1, whole["calls"])}
        done = forks(command, folder, **point)
        points.append({**point, "code": done["code"]})
        found = tree(out)
        held = _held(done, found, whole)
        met = done["code"] == code and not held
        kills += met
        if not met and not held and done["code"]:
            wrong.append(f"{points}: exit {done['code']}: {done['said'].strip().splitlines()[-1]}")
        if met and fault != "kill" and sum(line.startswith("tpvc: ") for line in done["said"].splitlines()) != 1:
            wrong.append(f"{points} said: {done['said']}")
        if found not in (None, before, whole["tree"]):
            wrong.append(f"after {points}, OUT holds {_differing(found, whole['tree'])}")
        if {p.name for p in folder.iterdir()} - {"out", "out.partial"}:
            wrong.append(f"after {points} there are {sorted(p.name for p in folder.iterdir())}")
        if not met:
            break
    found, done = tree(out), forks(command, folder)
    if done["code"] and not _held(done, found, whole):
        wrong.append(f"exit {done['code']} at last: {done['said'].strip().splitlines()[-1]}")
    if tree(out) != whole["tree"]:
        wrong.append(f"ends with other bytes: {_differing(tree(out), whole['tree'])}")
    if [p.name for p in folder.iterdir()] != ["out"]:
        wrong.append(f"leaves {sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*'))[:9]}")
    return {"name": name, "kills": kills, "points": points, "overwrite": before is not None, "wrong": wrong}


def _held(done: dict[str, Any], found: Any, whole: dict[str, Any]) -> bool:
    """Was the command refused because it was disturbed when all but the cleaning up was done?"""
    return done["code"] == 2 and "add --overwrite" in done["said"] and found == whole["tree"]


def _differing(found: Any, wanted: Any) -> Any:
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return type(found).__name__
    return sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))

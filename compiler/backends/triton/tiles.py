"""Which of a package's tiles is the quickest on this device: timed at the first start, then read from a file.

A build keeps the few candidates of every linear that look best on paper. What is best on the card depends on its
clocks and caches, so it is measured there, once: each candidate of each sort of linear at each number of rows, with
weights that come from memory and not from a cache; the least median wins. Of attention the first candidate is taken for
which there is a binary. The answer lies in the user's cache, under the hash of the package's manifest and the device's
name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tpvc.compiler.backends.triton.forward import Choices, Key, Tiles
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.progress import Progress, silent
from tpvc.kernels.launch import Config, Run

Seconds = Callable[[Callable[[Run], Any]], float]
"""How long something takes that launches with the Run that it is given."""


def chosen(choices: Choices, seconds: Seconds, progress: Progress = silent) -> Tiles:
    """{(sort, rows): its quickest tiles}."""
    found: dict[Key, Config] = {}
    for done, ((sort, rows), works) in enumerate(choices.items()):
        progress("tiles", done, len(choices), f"{sort}, {rows} rows")
        found[sort, rows] = _best(works, seconds, first=sort.startswith("attention"))
    progress("tiles", len(choices), len(choices), "")
    return found


def _best(works: Mapping[Config, Callable[..., Any]], seconds: Seconds, first: bool) -> Config:
    """The quickest, or the first that there is: how long attention takes depends on the texts. A candidate without a
    binary for this device is passed over; TpvcError where none has one."""
    times, why = {}, None
    for config, work in works.items():
        try:
            times[config] = seconds(lambda run, work=work: work(run=run))
        except TpvcError as error:
            why = error
            continue
        if first:
            return config
    if not times:
        raise why
    return min(times, key=lambda c: times[c])


def kept(path: Path, choices: Choices, measure: Callable[[], Tiles]) -> Tiles:
    """What `path` says, or what `measure` finds, written there if it can be. A file that is damaged, or lacks some of
    the choices (it was written for fewer rows), is measured again."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        found = {(e["sort"], e["rows"]): Config(**e["config"]) for e in listed}
        if all(found.get(key) in works for key, works in choices.items()):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = measure()
    told = [{"sort": s, "rows": n, "config": asdict(c)} for (s, n), c in sorted(found.items())]
    working = path.with_name(path.name + ".partial")
    with suppress(OSError):  # a home that cannot be written to: they are measured at the next start too
        path.parent.mkdir(parents=True, exist_ok=True)
        working.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        working.replace(path)
    return found


def file_of(manifest: Path, device: str) -> Path:
    """Where the answer for a package and a device lies."""
    import platformdirs

    digest = hashlib.sha256(manifest.read_bytes() + device.encode()).hexdigest()
    return Path(platformdirs.user_cache_dir("tpvc")) / "tiles" / f"{digest[:24]}.json"

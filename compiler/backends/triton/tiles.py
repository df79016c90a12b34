"""Which of a package's tiles is the quickest on this device: timed at the first start, then read from a file.

A build keeps the few candidates of every linear that look best on paper. What is best on the card depends on its
clocks and caches, so it is measured there, once: each candidate of each sort of linear at each number of rows is
launched on zeros, and the least median of three wins. The answer lies in the user's cache, under the hash of the
package's manifest and the device's name.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.backends.triton.engine import Model, Tiles
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.progress import Progress, silent
from tpvc.kernels import linear
from tpvc.kernels.launch import Run
from tpvc.kernels.linear import Config

Clock = Callable[[Callable[[], None]], float]
"""Seconds that some launches take on the device."""
ROUNDS = 3


def chosen(
    model: Model,
    sorts: Mapping[str, tuple[Any, ...]],
    rows: tuple[int, ...],
    run: Run,
    clock: Clock,
    progress: Progress = silent,
) -> Tiles:
    """{(sort of linear, rows): its quickest tiles}. sorts: one (weight, bias, bank) of every sort."""
    found: dict[tuple[str, int], Config] = {}
    jobs = [(sort, count) for sort in sorts for count in rows]
    for done, (sort, count) in enumerate(jobs):
        progress("tiles", done, len(jobs), f"{sort}, {count} rows")
        x = torch.zeros(count, sorts[sort][0].depth, dtype=model.dtype, device=model.device)
        found[sort, count] = _quickest(x, *sorts[sort], run, clock)
    progress("tiles", len(jobs), len(jobs), "")
    return found


def _quickest(x: Tensor, weight: Any, bias: Any, bank: Any, run: Run, clock: Clock) -> Config:
    """A candidate without a binary for this device is passed over; TpvcError where none has one."""
    ids = None if bank is None else torch.zeros(len(x), dtype=torch.int32, device=x.device)

    def launch(config: Config) -> None:
        linear.linear(x, weight, bias, bank, ids, config=config, run=run)

    times, why = {}, None
    for config in linear.configs(len(x), weight, None if bank is None else bank.group):
        try:
            launch(config)
        except TpvcError as error:
            why = error
            continue
        times[config] = statistics.median(clock(lambda c=config: launch(c)) for _ in range(ROUNDS))
    if not times:
        raise why
    return min(times, key=lambda c: times[c])


def kept(path: Path, measure: Callable[[], Tiles]) -> Tiles:
    """What `path` says, or what `measure` finds, written there. A damaged file is measured again."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        return {(e["sort"], e["rows"]): Config(**e["config"]) for e in listed}
    except (OSError, ValueError, KeyError, TypeError):
        found = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    told = [{"sort": s, "rows": n, "config": asdict(c)} for (s, n), c in sorted(found.items())]
    working = path.with_name(path.name + ".partial")
    working.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    working.replace(path)
    return found


def file_of(manifest: Path, device: str) -> Path:
    """Where the answer for a package and a device lies."""
    import platformdirs

    digest = hashlib.sha256(manifest.read_bytes() + device.encode()).hexdigest()
    return Path(platformdirs.user_cache_dir("tpvc")) / "tiles" / f"{digest[:24]}.json"

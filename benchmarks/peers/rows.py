"""The literal tables: environments with their versions, methods with their options, grids; and the rows they make.

Needs the standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""The repository, whose tpvc is measured."""


@dataclass(frozen=True)
class Environment:
    """requirements  arguments of `pip install`
    told          the packages whose versions stand beside a row; all of them go to a file
    """

    requirements: tuple[str, ...]
    told: tuple[str, ...]


ENVIRONMENTS = {
    "tpvc": Environment(
        ("-c", f"{ROOT}/constraints.txt", "torch==2.13.0", "lm_eval==0.4.13", "-e", f"{ROOT}[harness]"),
        ("tpvc", "torch", "transformers", "lm_eval"),
    ),
    "autoround": Environment(
        ("torch==2.13.0", "transformers==5.24.0", "auto-round==0.16.1"), ("auto-round", "torch", "transformers")
    ),
    "llmcompressor": Environment(
        ("torch==2.13.0", "transformers==5.17.0", "llmcompressor==0.14.0.1"),
        ("llmcompressor", "compressed-tensors", "torch", "transformers"),
    ),
    "hqq": Environment(("torch==2.13.0", "transformers==5.24.0", "hqq==0.2.8.post1"), ("hqq", "torch", "transformers")),
}
"""An environment each, for their requirements exclude one another. The "tpvc" one also prepares and scores."""

SCHEMES = {"W4 channel": (4, -1), "W4 g64": (4, 64), "W3 g64": (3, 64), "W2 g64": (2, 64)}
"""Name -> bits, columns that share a scale (-1: a whole row)."""

BOTH = (True, False)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Method:
    """How one row's checkpoint is made: `with_ENVIRONMENT.py`, run by the environment's python, given `options`.

    symmetric  the kinds of grid that the method has
    seeds      of a method that draws at random; (None,) for one that does not
    schemes    those worth a row
    reads      the folder of the artefact that is scored, where it is not the artefact itself
    """

    name: str
    environment: str
    options: Mapping[str, Any]
    symmetric: tuple[bool, ...] = BOTH
    seeds: tuple[int | None, ...] = (None,)
    schemes: tuple[str, ...] = tuple(SCHEMES)
    reads: str = "."
    note: str = ""


METHODS = (
    Method("tpvc-rtn", "tpvc", {"method": "rtn"}),
    Method("tpvc-fast", "tpvc", {"recipe": "fast"}, seeds=SEEDS),
    Method("tpvc-default", "tpvc", {"recipe": "default"}, seeds=SEEDS),
    Method("tpvc-best", "tpvc", {"recipe": "best"}, seeds=SEEDS),
    Method(
        "tpvc-paper", "tpvc", {"recipe": "paper"}, symmetric=(False,), seeds=SEEDS, schemes=("W4 channel", "W3 g64")
    ),
    Method(
        "autoround-rtn",
        "autoround",
        {"iters": 0, "disable_opt_rtn": True},
        note="symmetric: full range, the scale has a sign",
    ),
    Method(
        "autoround-opt-rtn",
        "autoround",
        {"iters": 0, "disable_opt_rtn": False},
        symmetric=(True,),
        note="scales searched under importance weights; on an asymmetric grid 0.16.1 does plain rounding instead",
    ),
    Method("autoround-light", "autoround", {"iters": 50, "lr": 5e-3}, seeds=SEEDS),
    Method("autoround", "autoround", {"iters": 200}, seeds=SEEDS),
    Method("autoround-best", "autoround", {"iters": 1000}, seeds=SEEDS, note="128 windows as for all, not its 512"),
    Method(
        "autoround-best-ext",
        "autoround",
        {"iters": 1000, "enable_alg_ext": True},
        symmetric=(True,),
        seeds=SEEDS,
        note="128 windows as for all, not its 512; alg_ext knows symmetric integer grids only",
    ),
    Method("gptq", "llmcompressor", {"method": "gptq"}, note="static activation order, damping 0.01"),
    Method(
        "gptq-imatrix",
        "llmcompressor",
        {"method": "gptq", "observer": "imatrix_mse"},
        note="gptq on the grid of the importance-weighted observer",
    ),
    Method(
        "awq",
        "llmcompressor",
        {"method": "awq"},
        note="duo scaling, 20 grid points; on a CPU it needs one call of 0.14.0.1 that pins memory to be skipped",
    ),
    Method("imatrix-rtn", "llmcompressor", {"method": "rtn", "observer": "imatrix_mse"}),
    Method(
        "hqq",
        "hqq",
        {},
        symmetric=(False,),
        reads="dequantised",
        note="zero points are not integers: hqq loads its own file, and what it dequantises is scored",
    ),
)

AGAINST = "autoround"
"""The method that ratios are taken against, on the same grid."""


@dataclass(frozen=True)
class Row:
    """One checkpoint to make and to score. seed None: nothing is drawn."""

    method: Method = field(repr=False)
    scheme: str
    symmetric: bool
    seed: int | None

    @property
    def grid(self) -> str:
        return f"{self.scheme} {'sym' if self.symmetric else 'asym'}"

    @property
    def name(self) -> str:
        return f"{self.method.name} {self.grid}" + ("" if self.seed is None else f" seed {self.seed}")


def rows() -> Iterator[Row]:
    """All rows, in the order of the tables; the first seed of everything comes first."""
    for turn in range(len(SEEDS)):
        for scheme in SCHEMES:
            for method in METHODS:
                if scheme in method.schemes and turn < len(method.seeds):
                    for symmetric in method.symmetric:
                        yield Row(method, scheme, symmetric, method.seeds[turn])


def chosen(patterns: str) -> list[Row]:
    """The rows whose names hold all words of one of the patterns, which have commas between them: "gptq W3, hqq".
    ValueError for a pattern that fits none."""
    every, wanted = list(rows()), []
    for pattern in patterns.split(","):
        words = set(pattern.split())
        fitting = [row for row in every if words <= set(row.name.split())]
        if not words or not fitting:
            raise ValueError(f"'{pattern.strip()}' fits no row; --list prints them all")
        wanted += [row for row in fitting if row not in wanted]
    return sorted(wanted, key=every.index)

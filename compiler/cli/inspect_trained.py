"""What `tpvc inspect` says of things that are trained beside a model: adapters and soft prompts in PEFT's format, and
importance files. Headers are read, no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from tpvc.compiler import units
from tpvc.compiler.errors import TpvcError

KINDS = {"PROMPT_TUNING": "a soft prompt", "ROAD": "a RoAd adapter", "LORA": "a LoRA adapter"}
TOLD = {
    "base_model_name_or_path": "base",
    "task_type": "task",
    "num_virtual_tokens": "virtual tokens",
    "token_dim": "features",
    "variant": "variant",
    "group_size": "group",
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "linears",
}
"""Key of PEFT's config -> what it is called here."""


def trained_facts(path: Path) -> dict[str, Any] | None:
    """Facts, JSON-able, about an adapter's folder or an importance file; None for anything else."""
    from tpvc.compiler.adapters.peft_directory import CONFIG
    from tpvc.compiler.tuning import importance_file

    if (path / CONFIG).is_file():
        return adapter_facts(path)
    if path.is_file() and (about := importance_file.about(path)) is not None:
        return importance_facts(path, about)
    return None


def adapter_facts(folder: Path) -> dict[str, Any]:
    from tpvc.compiler.adapters.peft_directory import CONFIG, WEIGHTS
    from tpvc.compiler.frontends.weights import read_json, stored_in
    from tpvc.compiler.output import MANIFEST

    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise TpvcError(f"{folder} has a {CONFIG} and no {WEIGHTS}; expected both, as PEFT writes them")
    kind = str(config.get("peft_type"))
    facts = {name: _short(config[key]) for key, name in TOLD.items() if config.get(key) is not None}
    return {
        "kind": KINDS.get(kind, f"an adapter of PEFT's type {kind}"),
        "facts": {**facts, **_tensors(stored_in(folder / WEIGHTS))},
        "files": {f.name: units.size(f.stat().st_size) for f in sorted(folder.iterdir()) if f.is_file()},
        "provenance": read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None,
    }


def importance_facts(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    from tpvc.compiler.frontends.weights import stored_in

    told = {k: v for k, v in about.items() if isinstance(v, str | int | float) and not isinstance(v, bool)}
    stored = {n: s for n, s in stored_in(path).items() if n.startswith("importance.")}
    return {
        "kind": "an importance file",
        "facts": {**told, **_tensors(stored)},
        "files": {path.name: units.size(path.stat().st_size)},
        "provenance": None,
    }


def _tensors(stored: Mapping[str, Any]) -> dict[str, str]:
    """{"numbers": how many, in how many tensors of which dtypes}."""
    dtypes = Counter(s.dtype for s in stored.values())
    numbers = sum(prod(s.shape) for s in stored.values())
    count = f"{len(stored)} tensor{'' if len(stored) == 1 else 's'}"
    return {"numbers": f"{numbers:,} in {count} ({', '.join(sorted(dtypes))})"}


def _short(value: Any) -> Any:
    """A list of linears by their last names."""
    if isinstance(value, list):
        return ", ".join(sorted({str(v).rpartition(".")[2] for v in value}))
    return value if isinstance(value, int | float) else str(value)

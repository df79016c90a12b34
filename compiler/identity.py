"""What made a result: the model, its config, and the versions of what computed."""

from __future__ import annotations

import hashlib
import json
import platform
from contextlib import suppress
from importlib import metadata
from typing import Any

import tpvc
from tpvc.compiler.program import Program


def run_identity(program: Program) -> dict[str, Any]:
    """What a resumed run must share with the interrupted one, whatever it does: model, config and torch's version."""
    return {
        "source": program.source.files,
        "config": hashlib.sha256(json.dumps(program.source.config, sort_keys=True).encode()).hexdigest(),
        "versions": versions("torch"),
    }


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "tpvc": tpvc.__version__}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found

"""Environments of their own for the peers: made once, by pip, from the literal table. Standard library only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rows import ENVIRONMENTS

READY = "requirements.json"
"""What was installed, when all of it was; without this file, or with another one, pip is run (again)."""


def python(name: str, folder: Path) -> Path:
    """The python of environment `name` under `folder`, made and filled where that was not done yet."""
    home = folder / name
    found, ready = home / "bin" / "python", home / READY
    wanted = json.dumps(ENVIRONMENTS[name].requirements)
    if not ready.is_file() or ready.read_text(encoding="utf-8") != wanted:
        print(f"environment {name}: {' '.join(ENVIRONMENTS[name].requirements)}", flush=True)
        if not found.exists():
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([found, "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name].requirements], check=True)
        ready.write_text(wanted, encoding="utf-8")
    return found


def versions(name: str, folder: Path) -> dict[str, str]:
    """{package: version} of all that environment `name` holds, as pip lists it."""
    command = [folder / name / "bin" / "python", "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {package["name"]: package["version"] for package in json.loads(listed)}

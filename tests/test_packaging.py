"""What a user installs is the whole tree, quick to import, and the README's commands are the ones that are tested."""

import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from tpvc.compiler.cli import cli

ROOT = Path(__file__).parents[1]
ROOMS = ("compiler", "passes", "kernels", "calib_data")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_in_tree() -> dict[str, str]:
    """{import name: folder} of every folder with Python files, as the mapping in pyproject.toml names it."""
    found = {"tpvc": "compiler/_root"}
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            folder = file.parent.relative_to(ROOT)
            if folder.as_posix() != "compiler/_root":
                found["tpvc." + ".".join(folder.parts)] = folder.as_posix()
    return found


def test_package_list_is_the_tree():
    assert sorted(SETTINGS["tool"]["setuptools"]["packages"]) == sorted(packages_in_tree())


def test_every_package_has_an_init_file():
    assert all((ROOT / folder / "__init__.py").is_file() for folder in packages_in_tree().values())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without a network from a copy of the tree, so that no build folder is left in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(out), str(source)], check=True, cwd=out)
    return next(out.glob("tpvc-*.whl"))


def test_wheel_holds_every_file_of_the_packages(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in packages_in_tree().items():
        for file in (ROOT / folder).iterdir():
            if file.is_file() and not file.name.startswith("."):
                assert f"{package.replace('.', '/')}/{file.name}" in inside


def test_wheel_holds_the_task_files(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("tpvc/compiler/harness/tasks/")}
    assert (
        {Path(name).name for name in inside} == {f.name for f in (ROOT / "compiler/harness/tasks").iterdir()} != set()
    )


def test_wheel_imports_without_the_tree(wheel, tmp_path):
    """Every module of the unpacked wheel is found there, not in the checkout."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import importlib, sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        f"names = {sorted(packages_in_tree())!r};"
        "files = [importlib.import_module(n).__file__ for n in names];"
        f"assert all(f.startswith({str(tmp_path)!r}) for f in files), files;"
        "from tpvc.compiler.cli import cli; print(len(cli.commands))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(len(cli.commands))


def quickest(code: str, tries: int = 5) -> tuple[float, str]:
    """(seconds of the quickest of some tries, start of the interpreter included; what it printed)."""
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    return min(times), done.stdout.strip()


HEAVY = "import sys; print([m for m in ('torch', 'transformers', 'numpy', 'onnx', 'onnxruntime') if m in sys.modules])"


def test_import_is_quick_and_light():
    took, heavy = quickest(f"import tpvc; {HEAVY}")
    assert heavy == "[]"
    assert took < 0.5


def test_command_line_starts_quickly():
    took, heavy = quickest(f"from tpvc.compiler.cli import cli; {HEAVY}")
    assert heavy == "[]"
    assert took < 0.5


def test_public_names_resolve():
    import tpvc

    for name in tpvc.__all__:
        assert getattr(tpvc, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tpvc.nonsense  # noqa: B018


def test_readme_and_ci_run_the_same_command():
    script = (ROOT / ".ci" / "run").read_text()
    command = script.strip().splitlines()[-1]
    assert command in (ROOT / "README.md").read_text()
    assert "set -euo pipefail" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_constraints_pin_every_dependency_exactly():
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    pinned = {x.split("==")[0].lower().replace("_", "-") for x in lines if "==" in x}
    assert len(pinned) == len(lines)
    project = SETTINGS["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert {w.split(">=")[0].lower().replace("_", "-") for w in wanted} <= pinned

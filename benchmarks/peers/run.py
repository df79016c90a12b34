"""Post-training quantisers side by side under one protocol: ours, AutoRound, llm-compressor's, HQQ.

    python benchmarks/peers/run.py --calibration VALID --test TEST -o peers --task-data FOLDER
    python benchmarks/peers/run.py ... --rows "autoround W3 g64 sym, tpvc-default W3 g64 sym"
    python benchmarks/peers/run.py ... --rows "gptq W3" --cross-check
    python benchmarks/peers/run.py --list

Calibration is the first 128 windows of 256 tokens of VALID, perplexity is over the first 40 windows of 512 tokens of
TEST; linears of the blocks only, the head stays in float. All start from the same float32 folder. A method runs in an
environment of its own, which is made under --envs on first use, and saves its checkpoint as it always does. What is
scored is that folder on disk, loaded again by tpvc, after it was checked that it has the grid it should have.

Ratios of time are of CPU minutes: other work on the machine counts for little in them. With --threads 1 they are what a
quiet machine's clock shows; more threads also count the time that they wait for one another.

A row that OUT/results.json holds is not made again. At the end the table of all rows that there are is printed, and
written to OUT/table.md. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import child
import environments
from rows import AGAINST, ENVIRONMENTS, METHODS, ROOT, SCHEMES, Row, chosen, rows
from table import FLOAT, markdown

HERE = Path(__file__).resolve().parent
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Flags of a processor that say how fast it multiplies: two of one name may differ in them."""
WINDOWS = {"calibration": (128, 256), "test": (40, 512)}
"""Windows and tokens a window."""


def main() -> None:
    args = arguments()
    if args.list:
        print("\n".join(row.name for row in args.chosen))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which also ends the script that runs
    wanted = args.chosen
    args.out.mkdir(parents=True, exist_ok=True)
    results = opened(args)
    try:
        prepare(args, results)
    except child.Failed as error:
        sys.exit(str(error))
    failures = [name for name in [FLOAT, *(row.name for row in wanted)] if not finish(name, wanted, args, results)]
    text = markdown(results["rows"], results["protocol"]["tasks"], args.against)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    if failures:
        sys.exit(f"{len(failures)} rows failed: {', '.join(failures)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="text file: WikiText-2's validation text")
    parser.add_argument("--test", type=Path, help="text file: WikiText-2's test text")
    parser.add_argument("-o", "--out", type=Path, default=Path("peers"))
    parser.add_argument("--envs", type=Path, help="where the environments are made; default OUT/envs")
    parser.add_argument("--rows", default=None, help="words of row names, several with commas; default: all")
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and end")
    parser.add_argument(
        "--against", default=AGAINST, choices=[m.name for m in METHODS], help="ratios are to this method"
    )
    parser.add_argument("--model", default="smollm2-135m", help="what tpvc.load takes")
    parser.add_argument("--layers", type=int, help="keep so many of the model's layers, to try the harness")
    parser.add_argument("--calibration-windows", type=int, default=WINDOWS["calibration"][0], help="fewer, likewise")
    parser.add_argument("--test-windows", type=int, default=WINDOWS["test"][0], help="fewer, likewise")
    parser.add_argument("--task-data", type=Path, help="folder with the data of --tasks; default: no tasks")
    parser.add_argument("--tasks", default="arc_easy,piqa", help="as tpvc eval takes them, with --task-data")
    parser.add_argument("--limit", type=int, default=500, help="questions a task")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cross-check", action="store_true", help="let transformers measure the perplexity as well")
    args = parser.parse_args()
    try:
        args.chosen = list(rows()) if args.rows is None else chosen(args.rows)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        return args
    for text in (args.calibration, args.test):
        if text is None or not text.is_file():
            parser.error(f"--calibration and --test are to name text files, found {text}; name WikiText-2's")
    for name in ("layers", "calibration_windows", "test_windows", "limit", "threads"):
        number = getattr(args, name)
        if number is not None and number < 1:
            parser.error(f"--{name.replace('_', '-')} is {number}; expected 1 or more")
    if args.task_data is not None and not args.task_data.is_dir():
        parser.error(f"there is no folder {args.task_data}; --task-data is to name the one with the tasks' data")
    counts = {"calibration": args.calibration_windows, "test": args.test_windows}
    args.windows = {name: [count, WINDOWS[name][1]] for name, count in counts.items()}
    args.out, args.calibration, args.test = (p.resolve() for p in (args.out, args.calibration, args.test))
    args.envs = (args.envs or args.out / "envs").resolve()
    args.task_data = args.task_data and args.task_data.resolve()
    return args


def opened(args: argparse.Namespace) -> dict[str, Any]:
    """results.json, or a new one; those of another protocol or machine are refused."""
    protocol = {
        "model": args.model,
        "layers": args.layers,
        "windows": args.windows,
        "calibration": sha256(args.calibration),
        "test": sha256(args.test),
        "tasks": args.tasks.split(",") if args.task_data else [],
        "limit": args.limit if args.task_data else None,
    }
    path = args.out / "results.json"
    if not path.is_file():
        return {"protocol": protocol, "machine": machine(), "failed": {}, "rows": {}}
    results = json.loads(path.read_text(encoding="utf-8"))
    differ = [key for key, value in protocol.items() if results["protocol"][key] != value]
    differ += ["machine"] if results["machine"] != machine() else []
    if differ:
        print(f"{path} was made with another {', '.join(differ)}; give the same, or another -o", file=sys.stderr)
        sys.exit(2)
    return results


def keep(args: argparse.Namespace, results: dict[str, Any]) -> None:
    path = args.out / "results.json"
    path.with_suffix(".partial").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".partial").replace(path)


def prepare(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """The float checkpoint and the windows, where they are not there yet."""
    if not (args.out / "float32").is_dir():
        said = {"model": args.model, "layers": args.layers, "calibration": args.calibration, "test": args.test}
        said |= {"windows": args.windows, "out": args.out}
        script(args, "tpvc", "prepare.py", said, "prepare")
    keep(args, results)


def finish(name: str, wanted: list[Row], args: argparse.Namespace, results: dict[str, Any]) -> bool:
    """Make and score what is missing of a row; False where a script failed, which results.json then says."""
    row = next((r for r in wanted if r.name == name), None)
    figures = results["rows"].setdefault(name, {})
    folder = args.out / "float32" if row is None else args.out / "rows" / name.replace(" ", "-")
    try:
        checked = not args.cross_check or "transformers_perplexity" in figures
        needed = row is not None and not ("perplexity" in figures and checked)
        if needed and not ("minutes" in figures and folder.is_dir()):
            made = make(row, folder, args)
            figures.clear()
            figures |= made
            keep(args, results)
        if "perplexity" not in figures:
            figures |= score(row, folder, args)
            keep(args, results)
            print(f"{name:44} perplexity {figures['perplexity']:.2f}, {figures.get('minutes', 0):.1f} min", flush=True)
        if args.cross_check and row is not None and "transformers_perplexity" not in figures:
            figures |= cross_check(row, folder, args)
            keep(args, results)
            both = figures["perplexity"], figures["transformers_perplexity"]
            print(f"{name:44} perplexity {both[0]:.4f} by tpvc, {both[1]:.4f} by transformers", flush=True)
    except child.Failed as error:
        results["failed"][name] = str(error)
        keep(args, results)
        print(f"{name:44} failed: {error}", flush=True)
        return False
    results["failed"].pop(name, None)
    keep(args, results)
    return True


def make(row: Row, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Quantise; the folder stands under its name when it is whole."""
    making = args.out / "making"  # what an interrupted run left in it is not gone on with: its time is not known
    for old in (making, folder):
        shutil.rmtree(old, ignore_errors=True)
    making.mkdir()
    folder.parent.mkdir(exist_ok=True)
    work = making / "artefact"
    bits, group = SCHEMES[row.scheme]
    said = {"model": args.out / "float32", "calibration": args.out / "calibration.safetensors", "out": work}
    said |= {"text": args.calibration, "bits": bits, "group": group, "symmetric": row.symmetric, "seed": row.seed or 0}
    said |= {"threads": args.threads, "options": dict(row.method.options)}
    home = row.method.environment
    cost = script(args, home, f"with_{home}.py", said, folder.name)
    work.rename(folder)
    making.rmdir()
    size = sum(p.stat().st_size for kind in ("safetensors", "pt") for p in folder.glob(f"*.{kind}"))
    return {**cost, "megabytes": size / 1e6, "threads": args.threads, "versions": told(home, args)}


def score(row: Row | None, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What the one evaluator finds of a folder. The float model's (row None) has no grid, and no original."""
    whole = row is None or row.method.reads != "."
    out = args.out / "scored.json"
    said = {"target": folder / row.method.reads if row else folder, "against": row and args.out / "float32"}
    said |= {
        "test": args.test,
        "windows": args.windows["test"],
        "grid": None if whole else [*SCHEMES[row.scheme], row.symmetric],
        "threads": args.threads,
    }
    said |= {"tasks": args.tasks.split(","), "task_data": args.task_data, "limit": args.limit, "out": out}
    script(args, "tpvc", "score.py", said, f"{folder.name}-score")
    found = json.loads(out.read_text(encoding="utf-8"))
    out.unlink()
    return found


def cross_check(row: Row, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    out = args.out / "checked.json"
    said = {"target": folder / row.method.reads, "test": args.out / "test.safetensors", "threads": args.threads}
    script(args, row.method.environment, "with_transformers.py", {**said, "out": out}, f"{folder.name}-check")
    found = json.loads(out.read_text(encoding="utf-8"))
    out.unlink()
    return found


def script(args: argparse.Namespace, home: str, name: str, said: dict[str, Any], log: str) -> dict[str, float]:
    """Run a script of this folder by the python of environment `home`."""
    python = environments.python(home, args.envs)
    (args.out / "logs").mkdir(exist_ok=True)
    lines = args.out / "logs" / f"{log}.log"
    return child.run(python, HERE / name, said, args.out / "work", lines, args.threads)


def told(home: str, args: argparse.Namespace) -> dict[str, str]:
    """Versions of what matters in an environment; all of them go to OUT/versions-ENVIRONMENT.json."""
    every = environments.versions(home, args.envs)
    text = json.dumps(every, indent=1, sort_keys=True) + "\n"
    (args.out / f"versions-{home}.json").write_text(text, encoding="utf-8")
    found = {name: every[name] for name in ENVIRONMENTS[home].told}
    if home == "tpvc":
        command = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        found["tpvc"] += f" ({commit or 'no repository'})"
    return found


def machine() -> dict[str, Any]:
    """The processor's name and UNITS, its cores, those that this process may use, memory in GiB, and the system."""
    told = [line.partition(":") for line in _lines("/proc/cpuinfo")]
    names = [value.strip() for key, _, value in told if key.strip() == "model name"]
    flags = next((value.split() for key, _, value in told if key.strip() == "flags"), [])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = {"cores": os.cpu_count(), "usable_cores": len(os.sched_getaffinity(0))}
    return {
        "cpu": (names or [platform.processor()])[0],
        "units": [unit for unit in UNITS if unit in flags],
        **cores,
        "gib": round(memory, 1),
        "system": platform.platform(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()

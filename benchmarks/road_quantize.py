"""What rounding does to adapters: accuracy of each on its task after W4 per channel, in every way to deploy it.

    python benchmarks/road_tasks.py --data FOLDER -o road_tasks --tasks sst2,trec,rte       # trains the adapters
    python benchmarks/road_quantize.py road_tasks --data FOLDER -o road_quantize [--seeds 0] [--folded 0] [--rows ...]

    float           the adapter on the float model
    rtn bank        beside weights rounded to nearest
    rtn folded      folded in, then rounded to nearest
    bank, without   beside weights that FlexRound rounded without adapters
    bank, under     beside weights that FlexRound rounded under all adapters: one integer base for all
    folded          folded in, then FlexRound; a checkpoint for each adapter (seeds of --folded only)
    retrained       trained on the integers of `bank, without`, same data and steps (make it with road_tasks.py
                    --model road_quantize/without --tag w4- -o road_tasks)

All with the built-in calibration text, the same windows, recipe `fast`, head in 8 bits. Every artefact is loaded again.
OUT/results.jsonl keeps what is done, for the same tasks and seeds; the table comes at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from tasks import accuracy, first_tokens, prepare, read

from tpvc import quantize
from tpvc.compiler import frontends, interpret
from tpvc.compiler.adapters import road_files
from tpvc.compiler.program import Program
from tpvc.compiler.tuning.loss import answer_logits, score_answers
from tpvc.passes.bank_road import BankRoad

MODEL = "smollm2-135m"
GRID = {"bits": 4, "group": -1, "nsamples": 128, "seqlen": 128, "recipe": "fast"}
ROWS = ("float", "rtn bank", "rtn folded", "bank, without", "bank, under", "folded", "retrained")


def figures(program: Program, tokenizer, names: list[str], task_of, data: dict, weight=None) -> dict[str, dict]:
    """{adapter: {"accuracy", "loss"}} of `names`; a `program` without adapters has the one of them folded in."""
    weight = weight or interpret.in_memory(program)
    found = {}
    for name in names:
        index = next((i for i, a in enumerate(program.adapters) if a.name == name), -1)
        task = task_of(name)
        choices = first_tokens(task, tokenizer)
        right = accuracy(lambda b, i=index: answer_logits(program, weight, b, i), data[task], choices)
        loss = score_answers(program, weight, data[task], 16, index).loss
        found[name] = {"accuracy": right, "loss": loss}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", help="the folder that road_tasks.py wrote")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--data", required=True, help="FOLDER, as for road_tasks.py")
    parser.add_argument("--tasks", default="sst2,trec,rte")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folded", default="0")
    parser.add_argument("--rows", default=";".join(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out, trained = Path(args.out), Path(args.trained)
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    base = frontends.load(MODEL)
    tokenizer = frontends.tokenizer(base)
    tasks = args.tasks.split(",")
    data = {t: read(t, prepare(t, Path(args.data), trained / "data")["test"], tokenizer, base) for t in tasks}
    directories = {f"{t}-{s}": trained / "adapters" / f"{t}-road_1-{s}" for s in args.seeds.split(",") for t in tasks}
    roads = tuple(road_files.read(d, base, name) for name, d in directories.items())

    def artefact(name: str, **options) -> Path:
        folder = out / name
        return folder if folder.exists() else quantize(MODEL, folder, **{**GRID, **options}, progress=tell)

    def measure(row: str) -> dict[str, dict]:
        names = list(directories)
        if row in ("rtn folded", "folded"):
            method = "rtn" if row.startswith("rtn") else "flexround"
            found = {}
            for name in names:
                if method == "flexround" and name.rpartition("-")[2] not in args.folded.split(","):
                    continue
                folder = artefact(f"{method}-folded-{name}", method=method, roads={name: directories[name]}, fold=True)
                found |= figures(frontends.load(folder), tokenizer, [name], task_of, data)
            return found
        if row == "retrained":
            found, program = {}, frontends.load(artefact("without"))
            for name in names:
                task, _, seed = name.rpartition("-")
                directory = trained / "adapters" / f"w4-{task}-road_1-{seed}"
                if directory.exists():
                    banked = BankRoad((road_files.read(directory, program, name),))(program)
                    found |= figures(banked, tokenizer, [name], task_of, data)
            return found
        program = {
            "float": lambda: base,
            "rtn bank": lambda: frontends.load(artefact("rtn", method="rtn")),
            "bank, without": lambda: frontends.load(artefact("without")),
            "bank, under": lambda: frontends.load(artefact("under", roads=directories)),
        }[row]()
        banked = program if program.adapters else BankRoad(roads)(program)
        return figures(banked, tokenizer, names, task_of, data)

    def task_of(name: str) -> str:
        return name.rpartition("-")[0]

    table = {}
    for row in args.rows.split(";"):
        done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        found = next((r["figures"] for r in done if (r["row"], r["adapters"]) == (row, list(directories))), None)
        if found is None:
            found = measure(row)
            with results.open("a") as file:
                file.write(json.dumps({"row": row, "adapters": list(directories), "figures": found}) + "\n")
        table[row] = found
    print(f"| | {' | '.join(f'{t}: accuracy | loss' for t in tasks)} |\n|---|{'---|---|' * len(tasks)}")
    for row, found in table.items():
        cells = []
        for task in tasks:
            own = [f for name, f in found.items() if task_of(name) == task]
            if not own:
                cells += ["", ""]
                continue
            spread = f" ± {100 * statistics.stdev(f['accuracy'] for f in own):.1f}" if len(own) > 1 else ""
            mean = statistics.mean(f["accuracy"] for f in own)
            cells += [f"{100 * mean:.1f}{spread} ({len(own)})", f"{statistics.mean(f['loss'] for f in own):.3f}"]
        print(f"| {row} | {' | '.join(cells)} |")


def tell(stage: str, done: int, total: int, note: str) -> None:
    if done == total or done % 10 == 0:
        print(f"{stage} {done}/{total} {note}", flush=True)


if __name__ == "__main__":
    main()

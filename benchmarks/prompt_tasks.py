"""The questions of the task prompt vectors paper (arXiv 2408.01119) on a small model and real tasks.

    python benchmarks/prompt_tasks.py --data FOLDER -o prompt_tasks --stage tune,cross,pairs,few [--starts 0,1,2] ...
    python benchmarks/prompt_tasks.py -o prompt_tasks --table

FOLDER is described in tasks.py. Every result is a line of OUT/results.jsonl, the prompts lie beside it; what is there
is not run again, so several processes may share the work by --only.

tune     a prompt for every task from every start (seed of vocabulary rows); its accuracy, and that of the start
cross    P_other + tau: a task's vector on another start
pairs    sums of the vectors of two tasks from one start, lambda searched on the validation data: each task's accuracy
few      k examples of a task that no vector knows: from a random start, from the best single prompt, from a sum
cosine   of prompts and vectors, same task and other task, flattened and token-mean; with --table
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from tasks import BATCH, LABELS, TEMPLATES, accuracy, first_tokens, prepare, read

from tpvc.compiler import frontends, interpret
from tpvc.compiler.adapters import prompt_files
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.program import prompt_ids
from tpvc.compiler.tuning.loss import answer_logits, score_answers
from tpvc.compiler.tuning.prompt_tune import behind, prompt_tune
from tpvc.passes.bank_prompt import ROWS, BankPrompt

SOURCES = ("sst2", "trec", "sick", "cola")
TARGETS = {"mr": ("sst2", ("sst2", "cola")), "sst5": ("sst2", ("sst2", "trec"))}
"""Held-out tasks: the nearest single task, and the pair whose sum is tried."""
SHOTS = (0, 10, 100)
STEPS = {10: 40, 100: 80}
SCALES = [i / 20 for i in range(21)]


class Bench:
    """The model in memory, and accuracies of prompts on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        self.program = frontends.load(args.model)
        self.tokenizer = frontends.tokenizer(self.program)
        self.held = interpret.in_memory(self.program)
        self.sets: dict[tuple[str, str], list] = {}

    def paths(self, task: str) -> dict[str, Path]:
        return prepare(task, Path(self.args.data), self.out / "data")

    def examples(self, task: str, part: str) -> list:
        if (task, part) not in self.sets:
            self.sets[task, part] = read(task, self.paths(task)[part], self.tokenizer, self.program)
        return self.sets[task, part]

    def _with(self, values: torch.Tensor):
        banked = BankPrompt((Prompt("x", values),))(self.program)
        return banked, lambda name: values if name == ROWS else self.held(name), prompt_ids(banked, "x")

    def test(self, task: str, values: torch.Tensor) -> float:
        """Accuracy on test examples, among the labels' first tokens."""
        banked, weight, ids = self._with(values)
        examples = behind(ids, self.examples(task, "test")[: self.args.tests])
        return accuracy(lambda b: answer_logits(banked, weight, b), examples, first_tokens(task, self.tokenizer))

    def exact(self, task: str, values: torch.Tensor) -> float:
        banked, weight, ids = self._with(values)
        return score_answers(banked, weight, behind(ids, self.examples(task, "validation")), 16).exact

    def tune(self, task: str, label: str, data: Path, init: str, seed: int, steps: int) -> Path:
        directory = self.out / "prompts" / label
        if (directory / "tpvc.json").exists():
            return directory
        return prompt_tune(
            self.args.model,
            data,
            directory,
            validation=self.paths(task)["validation"],
            template=TEMPLATES[task],
            labels=LABELS[task],
            virtual_tokens=self.args.virtual_tokens if init == "vocab" else None,
            init=init,
            steps=steps,
            batch_size=BATCH[task],
            lr=self.args.lr,
            max_length=128,
            seed=seed,
        )

    def source(self, task: str, start: int) -> Prompt:
        return prompt_files.read(self.out / "prompts" / f"{task}-{start}", f"{task}-{start}")


def tune(bench: Bench, start: int):
    for task in bench.args.sources:

        def work(task=task):
            directory = bench.tune(
                task, f"{task}-{start}", bench.paths(task)["train"], "vocab", start, bench.args.steps
            )
            told = json.loads((directory / "tpvc.json").read_text())
            prompt = bench.source(task, start)
            kept = next(c for c in told["checks"] if c[0] == told["kept_step"])
            return {
                "accuracy": bench.test(task, prompt.values),
                "untuned": bench.test(task, prompt.start),
                "validation_loss": kept[1],
                "kept_step": told["kept_step"],
            }

        yield {"stage": "tune", "task": task, "start": start}, work


def cross(bench: Bench, start: int):
    """Vectors of the other starts on this one."""
    for task, other in itertools.product(bench.args.sources, bench.args.starts):
        if other == start:
            continue

        def work(task=task, other=other):
            values = bench.source(task, start).start + bench.source(task, other).vector
            return {"accuracy": bench.test(task, values)}

        yield {"stage": "cross", "task": task, "start": start, "vector": other}, work


def pairs(bench: Bench, start: int):
    for a, b in itertools.combinations(bench.args.sources, 2):

        def work(a=a, b=b):
            one, two = bench.source(a, start), bench.source(b, start)
            vector = one.vector + two.vector
            best, chosen = 0.0, 1.0
            for scale in SCALES:
                values = one.start + scale * vector
                mean = (bench.exact(a, values) + bench.exact(b, values)) / 2
                if mean > best:
                    best, chosen = mean, scale
            values = one.start + chosen * vector
            found = {task: bench.test(task, values) for task in (a, b)}
            return {"scale": chosen, "accuracy": found, "validation": best}

        yield {"stage": "pairs", "tasks": [a, b], "start": start}, work


def few(bench: Bench, start: int):
    targets = [(t, TARGETS[t]) for t in bench.args.targets.split(",")]
    for (target, (single, pair)), shots in itertools.product(targets, SHOTS):
        for kind in ("random", "single", "sum"):

            def work(target=target, single=single, pair=pair, shots=shots, kind=kind):
                first = bench.source(single, start)
                values = {
                    "random": first.start,
                    "single": first.values,
                    "sum": first.start + bench.source(pair[0], start).vector + bench.source(pair[1], start).vector,
                }[kind]
                if shots == 0:
                    return {"accuracy": bench.test(target, values)}
                begin = bench.out / "starts" / f"{target}-{kind}-{start}"
                about = prompt_files.about(bench.program)
                prompt_files.write(Prompt("start", values, first.start, first.base, first.tokenizer), begin, about, {})
                data = bench.out / "data" / f"{target}-{shots}-{start}.jsonl"
                lines = bench.paths(target)["train"].read_text().splitlines()
                order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(100 + start)).tolist()
                data.write_text("".join(lines[i] + "\n" for i in order[:shots]))
                label = f"{target}-{kind}-{shots}-{start}"
                directory = bench.tune(target, label, data, f"prompt:{begin}", start, STEPS[shots])
                return {"accuracy": bench.test(target, prompt_files.read(directory, "x").values)}

            yield {"stage": "few", "task": target, "shots": shots, "from": kind, "start": start}, work


STAGES = {"tune": tune, "cross": cross, "pairs": pairs, "few": few}


def spread(values: list[float]) -> str:
    """Mean and deviation, times 100."""
    values = [100 * v for v in values]
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(records: list[dict], out: Path) -> str:
    def of(stage: str, **fields) -> list[dict]:
        return [r for r in records if r["stage"] == stage and all(r[k] == v for k, v in fields.items())]

    lines = ["| | untuned | tuned | vector on another start |", "|---|---|---|---|"]
    tasks = list(dict.fromkeys(r["task"] for r in of("tune")))
    single = {(r["task"], r["start"]): r["accuracy"] for r in of("tune")}
    for task in tasks:
        own, other = of("tune", task=task), of("cross", task=task)
        cells = [[r["untuned"] for r in own], [r["accuracy"] for r in own], [r["accuracy"] for r in other]]
        lines.append(f"| {task} | " + " | ".join(spread(c) for c in cells) + f" | ({len(own)}, {len(other)})")
    lines += ["", "| sum | lambda | first | kept | second | kept |", "|---|---|---|---|---|---|"]
    for a, b in dict.fromkeys(tuple(r["tasks"]) for r in of("pairs")):
        own = of("pairs", tasks=[a, b])
        cells = []
        for task in (a, b):
            found = [r["accuracy"][task] for r in own]
            kept = [r["accuracy"][task] / single[task, r["start"]] for r in own if (task, r["start"]) in single]
            cells += [spread(found), spread(kept)]
        lines.append(f"| {a} + {b} | {statistics.mean(r['scale'] for r in own):.2f} | " + " | ".join(cells) + " |")
    lines += ["", "| target | k | random | single | sum |", "|---|---|---|---|---|"]
    for task, shots in dict.fromkeys((r["task"], r["shots"]) for r in of("few")):
        cells = [
            spread([r["accuracy"] for r in of("few", task=task, shots=shots) if r["from"] == kind])
            for kind in ("random", "single", "sum")
        ]
        lines.append(f"| {task} | {shots} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *cosines(out, tasks)])


def cosines(out: Path, tasks: list[str]) -> list[str]:
    found = [prompt_files.read(p, p.name) for task in tasks for p in sorted((out / "prompts").glob(f"{task}-[0-9]"))]
    lines = ["| | same task, other start | other task, same start | other task, other start |", "|---|---|---|---|"]
    for what in ("values", "vector"):
        for form, flat in (("flattened", lambda t: t.flatten()), ("token-mean", lambda t: t.mean(0))):
            groups: dict[str, list[float]] = {"same": [], "start": [], "other": []}
            for a, b in itertools.combinations(found, 2):
                (task, start), (task2, start2) = a.name.split("-"), b.name.split("-")
                kind = "same" if task == task2 else "start" if start == start2 else "other"
                x, y = flat(getattr(a, what)), flat(getattr(b, what))
                groups[kind].append(float(torch.nn.functional.cosine_similarity(x, y, dim=0)))
            name = {"values": "prompts", "vector": "vectors"}[what]
            cells = [f"{statistics.mean(v):.3f}" if v else "" for v in groups.values()]
            lines.append(f"| {name}, {form} | " + " | ".join(cells) + " |")
    norms = [(float(p.vector.norm()), float(p.start.norm())) for p in found]
    lines.append(f"\nnorm of a vector over that of its start: {statistics.mean(a / b for a, b in norms):.1f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--model", default="smollm2-135m", help="a float or a quantised model")
    parser.add_argument("--stage", default="")
    parser.add_argument("--starts", default="0,1,2", help="seeds, of all runs together")
    parser.add_argument("--only", help="the seeds that this process runs; all by default")
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--targets", default=",".join(TARGETS), help="of `few`")
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--tests", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    args.sources, args.starts = args.sources.split(","), [int(s) for s in args.starts.split(",")]
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"

    def there() -> list[dict]:
        return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    if args.stage:
        bench = Bench(args)
    only = args.starts if args.only is None else [int(s) for s in args.only.split(",")]
    for stage, start in itertools.product(filter(None, args.stage.split(",")), only):
        for key, work in STAGES[stage](bench, start):
            if any(all(r.get(k) == v for k, v in key.items()) for r in there()):
                continue
            began = time.perf_counter()
            record = {**key, **work(), "seconds": time.perf_counter() - began}
            with results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)
    if args.table:
        print(table(there(), out))


if __name__ == "__main__":
    main()

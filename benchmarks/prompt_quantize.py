"""What rounding the base does to soft prompts: W4 per channel, with prompts that were tuned on float weights.

    python benchmarks/prompt_tasks.py --data FOLDER -o prompt_tasks --stage tune --starts 0        # tunes the prompts
    python benchmarks/prompt_quantize.py prompt_tasks --data FOLDER -o prompt_quantize

float       the model they were tuned on
rtn         round-to-nearest
without     FlexRound that knew none of them
under       FlexRound whose calibration windows begin with them, and with none, in turn
adapted     `without`, and the prompts tuned on for a few steps on its integers

Accuracy as in tasks.py and loss in nats a token of the answer, on the reloaded artefacts. Blocks only; the head and the
embedding tied to it have 8 bits. Results are kept in OUT/results.jsonl and not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tasks import BATCH, LABELS, TEMPLATES, accuracy, first_tokens, prepare, read

from tpvc.compiler import frontends, interpret
from tpvc.compiler.adapters import prompt_files
from tpvc.compiler.pipeline import quantize
from tpvc.compiler.program import prompt_ids
from tpvc.compiler.tuning.loss import answer_logits, score_answers
from tpvc.compiler.tuning.prompt_tune import behind, prompt_tune
from tpvc.passes.bank_prompt import BankPrompt

MODEL = "smollm2-135m"
GRID = {"bits": 4, "group": -1, "nsamples": 128, "seqlen": 128, "recipe": "fast"}
ROWS = ("float", "rtn", "without", "under", "adapted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuned", help="the folder that prompt_tasks.py wrote")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--data", required=True, help="FOLDER, see tasks.py")
    parser.add_argument("--tasks", default="sst2,trec,sick,cola")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50, help="of `adapted`")
    parser.add_argument("--lr", type=float, default=0.03, help="of `adapted`: a tenth of that of tuning")
    parser.add_argument("--tests", type=int, default=300)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out, tuned, tasks = Path(args.out), Path(args.tuned), args.tasks.split(",")
    out.mkdir(parents=True, exist_ok=True)
    base = frontends.load(MODEL)
    tokenizer = frontends.tokenizer(base)
    paths = {t: prepare(t, Path(args.data), tuned / "data") for t in tasks}
    tests = {t: read(t, paths[t]["test"], tokenizer, base)[: args.tests] for t in tasks}
    float_prompts = {t: tuned / "prompts" / f"{t}-{args.start}" for t in tasks}

    def artefact(name: str, **options) -> Path:
        folder = out / name
        return folder if folder.exists() else quantize(MODEL, folder, **{**GRID, **options})

    def adapted(task: str) -> Path:
        folder = out / "prompts" / f"{task}-{args.start}"
        if folder.exists():
            return folder
        return prompt_tune(
            artefact("without"),
            paths[task]["train"],
            folder,
            validation=paths[task]["validation"],
            template=TEMPLATES[task],
            labels=LABELS[task],
            init=f"prompt:{float_prompts[task]}",
            steps=args.steps,
            batch_size=BATCH[task],
            lr=args.lr,
            max_length=128,
        )

    def measure(row: str) -> dict[str, dict]:
        directories = {t: adapted(t) for t in tasks} if row == "adapted" else float_prompts
        program = {
            "float": lambda: base,
            "rtn": lambda: frontends.load(artefact("rtn", method="rtn")),
            "without": lambda: frontends.load(artefact("without")),
            "under": lambda: frontends.load(artefact("under", prompts=float_prompts)),
            "adapted": lambda: frontends.load(artefact("without")),
        }[row]()
        banked = BankPrompt(tuple(prompt_files.read(d, t) for t, d in directories.items()))(program)
        weight, found = interpret.in_memory(banked), {}
        for task in tasks:
            examples = behind(prompt_ids(banked, task), tests[task])
            found[task] = {
                "accuracy": accuracy(
                    lambda b: answer_logits(banked, weight, b), examples, first_tokens(task, tokenizer)
                ),
                "loss": score_answers(banked, weight, examples, 16).loss,
            }
        return found

    results = out / "results.jsonl"
    print(f"| | {' | '.join(f'{t} | loss' for t in tasks)} |\n|---|{'---|---|' * len(tasks)}")
    for row in args.rows.split(","):
        done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        found = next((r["figures"] for r in done if (r["row"], r["start"]) == (row, args.start)), None)
        if found is None:
            found = measure(row)
            with results.open("a") as file:
                file.write(json.dumps({"row": row, "start": args.start, "figures": found}) + "\n")
        cells = [f"{100 * f['accuracy']:.1f} | {f['loss']:.3f}" for f in (found[t] for t in tasks)]
        print(f"| {row} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

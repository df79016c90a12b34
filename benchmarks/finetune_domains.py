"""Domains for finetune_tradeoff.py, of data sets as they are published.

    python benchmarks/finetune_domains.py e2e FOLDER_OF_DEVSET_CSV -o e2e
    python benchmarks/finetune_domains.py gsm8k FOLDER_OF_TRAIN_JSONL -o gsm8k

Writes train.jsonl, validation.jsonl and test.jsonl, of lines {"prompt", "completion"}.

e2e     restaurants as name[...], area[...] to a sentence: the meanings of the devset are shared out whole, so that no
        part holds a sentence for one that another part holds
gsm8k   questions to worked answers, without the calculator's marks: the end of train.jsonl is for validation

Of validation only 32 examples are kept: they are measured ten times a run.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from pathlib import Path


def e2e(folder: Path) -> dict[str, list[tuple[str, str]]]:
    with (folder / "devset.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
    meanings = sorted({mr for mr, _ in rows})
    random.Random(0).shuffle(meanings)
    cuts = int(0.7 * len(meanings)), int(0.8 * len(meanings))
    part = {mr: "train" if i < cuts[0] else "validation" if i < cuts[1] else "test" for i, mr in enumerate(meanings)}
    found = {"train": [], "validation": [], "test": []}
    for mr, ref in rows:
        found[part[mr]].append((f"{mr}\n", ref))
    return found


def gsm8k(folder: Path) -> dict[str, list[tuple[str, str]]]:
    def read(name: str) -> list[tuple[str, str]]:
        records = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        return [(f"Question: {r['question']}\nAnswer:", " " + re.sub("<<.*?>>", "", r["answer"])) for r in records]

    train = read("train.jsonl")
    return {"train": train[:-500], "validation": train[-500:], "test": read("test.jsonl")}


VALIDATION = 32
DOMAINS = {"e2e": e2e, "gsm8k": gsm8k}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for part, examples in DOMAINS[args.domain](args.folder).items():
        random.Random(0).shuffle(examples)
        examples = examples[: VALIDATION if part == "validation" else None]
        lines = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in examples]
        (args.out / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(part, len(examples))


if __name__ == "__main__":
    main()

"""Classification tasks on a language model: what it is asked, what it is to answer, and how often it does.

FOLDER holds the data as published: sst2/{train,dev,test}.tsv (sentence, label), trec6/TREC.{train,test},
rte/{train,dev}.tsv, sst5/stsa.fine.{train,test}, cola/{in_domain_train,in_domain_dev,out_of_domain_dev}.tsv,
mr/rt-polarity.all and sick_nli/ .

Prompts end before the label's word, which is the answer. Accuracy compares the likelihoods of the labels' first tokens,
so that an untrained model is not punished for writing something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tpvc.compiler.program import Program
from tpvc.compiler.tuning.examples import Encoded, encode_examples, read_examples
from tpvc.compiler.tuning.loss import batch_of, by_length

VALIDATION, TEST = 64, 500
LABELS = {
    "sst2": {"0": "negative", "1": "positive"},
    "trec": {
        "ABBR": "abbreviation",
        "DESC": "description",
        "ENTY": "entity",
        "HUM": "human",
        "LOC": "location",
        "NUM": "number",
    },
    "rte": {"entailment": "yes", "not_entailment": "no"},
    "cola": {"0": "no", "1": "yes"},
    "sick": {"ENTAILMENT": "yes", "NEUTRAL": "maybe", "CONTRADICTION": "no"},
    "mr": {"0": "negative", "1": "positive"},
    "sst5": {"0": "terrible", "1": "bad", "2": "okay", "3": "good", "4": "great"},
}
TEMPLATES = {
    "sst2": "Review: {text}\nSentiment:",
    "trec": "Question: {text}\nIt asks for:",
    "rte": "{text}\nQuestion: {claim} Yes or no?\nAnswer:",
    "cola": "Sentence: {text}\nIs it good English?",
    "sick": "{text}.\nQuestion: {claim}? Yes, no or maybe?\nAnswer:",
    "mr": "Review: {text}\nSentiment:",
    "sst5": "Review: {text}\nThe film is",
}
BATCH = {"sst2": 8, "trec": 8, "rte": 4, "cola": 8, "sick": 8, "mr": 8, "sst5": 8}


def rows(task: str, folder: Path, part: str) -> Iterator[dict[str, str]]:
    """The examples of one published file."""
    if task == "sst2":
        for line in (folder / "sst2" / f"{part}.tsv").read_text(encoding="utf-8").split("\n"):
            text, tab, label = line.rpartition("\t")
            if tab:
                yield {"text": text, "label": label}
    elif task == "trec":
        name = {"train": "TREC.train", "test": "TREC.test"}[part]
        for line in (folder / "trec6" / name).read_text(encoding="latin-1").split("\n"):
            kind, _, text = line.partition(" ")
            if text:
                yield {"text": text, "label": kind.partition(":")[0]}
    elif task == "rte":
        for line in (folder / "rte" / f"{part}.tsv").read_text(encoding="utf-8").split("\n")[1:]:
            fields = line.split("\t")
            if len(fields) == 4:
                yield {"text": fields[1], "claim": fields[2], "label": fields[3].strip()}
    elif task == "cola":
        names = {"train": ("in_domain_train",), "test": ("in_domain_dev", "out_of_domain_dev")}[part]
        for name in names:
            for line in (folder / "cola" / f"{name}.tsv").read_text(encoding="utf-8").split("\n"):
                fields = line.split("\t")
                if len(fields) == 4:
                    yield {"text": fields[3], "label": fields[1]}
    elif task == "sick":
        name = {"train": "SICK_train.txt", "test": "SICK_test_annotated.txt"}[part]
        for line in (folder / "sick_nli" / name).read_text(encoding="utf-8").split("\n")[1:]:
            fields = line.rstrip("\r").split("\t")
            if len(fields) == 5:
                yield {"text": fields[1], "claim": fields[2], "label": fields[4]}
    elif task == "sst5":
        for line in (folder / "sst5" / f"stsa.fine.{part}").read_text(encoding="utf-8").split("\n"):
            label, _, text = line.partition(" ")
            if text:
                yield {"text": text, "label": label}
    else:
        lines = (folder / "mr" / "rt-polarity.all").read_text(encoding="latin-1").split("\n")
        for i, line in enumerate(line for line in lines if line):
            label, _, text = line.partition(" ")
            if (part == "test") == (i % 5 == 0):  # no split is published
                yield {"text": text, "label": label}


def prepare(task: str, folder: Path, out: Path) -> dict[str, Path]:
    """train, validation and test as jsonl. Validation is drawn from the training data where nothing else is left."""
    generator = torch.Generator().manual_seed(0)
    train = list(rows(task, folder, "train"))
    order = torch.randperm(len(train), generator=generator).tolist()
    validation = [train[i] for i in order[:VALIDATION]]
    test = list(rows(task, folder, "dev" if task == "rte" else "test"))
    test = [test[i] for i in torch.randperm(len(test), generator=generator).tolist()[:TEST]]
    parts = {"train": [train[i] for i in order[VALIDATION:]], "validation": validation, "test": test}
    out.mkdir(parents=True, exist_ok=True)
    paths = {}
    for part, records in parts.items():
        paths[part] = out / f"{task}-{part}.jsonl"
        text = "".join(json.dumps(r) + "\n" for r in records)
        if not paths[part].exists() or paths[part].read_text() != text:
            paths[part].write_text(text)
    return paths


def read(task: str, path: Path, tokenizer, program: Program) -> list[Encoded]:
    examples = read_examples(path, template=TEMPLATES[task], labels=LABELS[task])
    return encode_examples(tokenizer, examples, 256, program.facts.eos[0])


def first_tokens(task: str, tokenizer) -> torch.Tensor:
    tokens = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in LABELS[task].values()]
    assert len(set(tokens)) == len(tokens), "labels must differ in their first token"
    return torch.tensor(tokens)


@torch.no_grad()
def accuracy(logits_of: Callable, examples: list[Encoded], choices: torch.Tensor) -> float:
    """Share of the examples whose label's first token is likelier than the other labels' first tokens."""
    right = 0
    for part in by_length(examples, 16):
        batch = batch_of(part)
        logits = logits_of(batch)
        firsts = torch.cat((torch.tensor([True]), batch.rows[1:] != batch.rows[:-1]))
        chosen = choices[logits[firsts][:, choices].argmax(-1)]
        right += int((chosen == batch.targets[firsts]).sum())
    return right / len(examples)

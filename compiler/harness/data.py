"""Data sets as they were published, for the task files in `tasks/`.

A task file says of what kind its data is and what names its file may have. The first of these that is there is read, in
the folder that the user names, and nothing else. The questions of LLM-Adapters' sets (arXiv:2304.01933,
github.com/AGI-Edgerunners/LLM-Adapters) stand in one field with their choices, and are taken apart again:

    Please choose the correct answer to the question: QUESTION

    Answer1: TEXT Answer2: TEXT

    Answer format: answer1/answer2
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tpvc.compiler import json_text
from tpvc.compiler.errors import TpvcError, short
from tpvc.compiler.evaluate import read_text

CHOICES = re.compile(
    r"Please choose the correct \w+ to (?:the question|fill in the blank to complete the given sentence): (.*?)\n\n"
    r"((Answer|Option|Solution)1: .*?)\s+Answer format: (\S+)",
    re.DOTALL,
)
TRUE_FALSE = re.compile(
    r"Please answer the following question with true or false, question: (.*)\n\nAnswer format: true/false", re.DOTALL
)
Record = tuple[str, Any]
"""Where it stands, for errors, and what it is."""
Row = dict[str, Any]


def load(kind: str, files: dict[str, list[str]], task_data: str | None = None, **_: Any) -> dict[str, Any]:
    """{split: lm_eval's rows}: a task file's `custom_dataset`, which is called with its `dataset_kwargs`, and with
    lm_eval's metadata, of which `task_data` is the folder."""
    from datasets import Dataset

    if task_data is None:
        raise TpvcError(f"this task reads {' or '.join(next(iter(files.values())))}; name its folder with --task-data")
    return {split: Dataset.from_list(read(kind, find(Path(task_data), names))) for split, names in files.items()}


def find(folder: Path, names: list[str]) -> Path:
    """The first of `names` that is a file in `folder`, or in one of its folders; TpvcError for none."""
    for pattern in ("", "*/"):
        for name in names:
            if found := sorted(p for p in folder.glob(pattern + name) if p.is_file()):
                return found[0]
    raise TpvcError(f"{folder} holds no {' or '.join(names)}; expected the data as it was published")


def read(kind: str, path: Path) -> list[Row]:
    """Every question of a file, in order; `kind` is one of KINDS. TpvcError, with its place, for what is none."""
    records, row = KINDS[kind]
    rows = [made for where, record in records(path) if (made := row(record, where)) is not None]
    if not rows:
        raise TpvcError(f"{path} holds no question; expected the file as it was published")
    return rows


def _json(path: Path) -> Iterator[Record]:
    records = _parsed(read_text(path), str(path))
    if not isinstance(records, list):
        raise TpvcError(f"{path} holds a {type(records).__name__}; expected a list of questions")
    for i, record in enumerate(records, 1):
        yield f"{path}, question {i},", record


def _json_lines(path: Path) -> Iterator[Record]:
    for i, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {i},"
            yield where, _parsed(line, where)


def _cells(path: Path) -> Iterator[Record]:
    """Cells of a table without quotes."""
    for i, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {i},", line.rstrip("\r").split("\t")


def _parsed(text: str, where: str) -> Any:
    try:
        return json_text.parse(text)
    except ValueError as error:
        raise TpvcError(f"{where} is not JSON ({error}); expected the file as it was published") from None


def _texts(record: Any, names: tuple[str, ...], where: str) -> dict[str, str]:
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in names):
        raise TpvcError(f"{where} is {short(record)}; expected an object with texts called {' and '.join(names)}")
    return {name: record[name] for name in names}


def _choice(record: Any, where: str) -> Row:
    given = _texts(record, ("instruction", "answer"), where)
    if match := CHOICES.fullmatch(given["instruction"].rstrip()):
        question, listed, kind, form = match.groups()
        texts = re.split(rf"(?:^|\n\n| ){kind}\d+: ", listed)[1:]
        names = form.split("/")
        if len(texts) == len(names) and given["answer"] in names:
            return {"question": question, "choices": texts, "label": names.index(given["answer"])}
    raise TpvcError(f"{where} is {short(record)}; expected a question, its choices and an answer that is one of them")


def _blank(record: Any, where: str) -> Row:
    found = _choice(record, where)
    before, blank, after = found["question"].partition("_")
    if not blank:
        raise TpvcError(f"{where} is {short(record)}; expected a sentence with a blank _")
    return {"contexts": [before + text for text in found["choices"]], "ending": after.strip(), "label": found["label"]}


def _true_false(record: Any, where: str) -> Row:
    given = _texts(record, ("instruction", "answer"), where)
    match = TRUE_FALSE.fullmatch(given["instruction"].rstrip())
    if not match or given["answer"] not in ("true", "false"):
        raise TpvcError(f"{where} is {short(record)}; expected a question that is answered by true or false")
    return {"question": match[1], "label": int(given["answer"] == "true")}


def _sentence(cells: list[str], where: str) -> Row | None:
    if cells == ["sentence", "label"]:
        return None
    if len(cells) != 2 or cells[1] not in ("0", "1"):
        raise TpvcError(f"{where} is {short(cells)}; expected a sentence and 0 or 1")
    return {"sentence": cells[0], "label": int(cells[1])}


def _pair(cells: list[str], where: str) -> Row | None:
    if cells == ["index", "sentence1", "sentence2", "label"]:
        return None
    labels = ("entailment", "not_entailment")
    if len(cells) != 4 or cells[3] not in labels:
        raise TpvcError(f"{where} is {short(cells)}; expected a number, two sentences, and {' or '.join(labels)}")
    return {"sentence1": cells[1], "sentence2": cells[2], "label": labels.index(cells[3])}


def _sum(record: Any, where: str) -> Row:
    return _texts(record, ("question", "answer"), where)


KINDS: dict[str, tuple[Callable[[Path], Iterator[Record]], Callable[[Any, str], Row | None]]] = {
    "choices": (_json, _choice),
    "blanks": (_json, _blank),
    "true_false": (_json, _true_false),
    "sums": (_json_lines, _sum),
    "sentences": (_cells, _sentence),
    "pairs": (_cells, _pair),
}
"""choices     ARC, OpenBookQA, PIQA and Social IQa: {"question", "choices": texts, "label": number of the right one}
blanks      WinoGrande: {"contexts": the text up to the blank, then a choice, for each, "ending": the rest, "label"}
true_false  BoolQ without its passages: {"question", "label": 1 for true}
sums        GSM8K: {"question", "answer"}, one a line
sentences   SST-2: a sentence, a tab and 0 or 1 a line, with or without GLUE's header: {"sentence", "label"}
pairs       RTE: number, two sentences and whether the first entails the second: {"sentence1", "sentence2", "label": 0
            where it does}
"""

"""Supervised examples from a user's file: what is asked, what is to be answered, and their tokens.

A record is one line of a .jsonl file or one row of a .csv or .tsv file, by the names of its header. It holds

    prompt, completion    both are taken as they stand
    text, label           the prompt is a template filled with the record's fields, the completion a space and the label

A template is text with places, "Review: {text}\\nSentiment:", and any field of the record may be named in one. Places
are replaced, once and by name; what stands in a field is never looked at.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpvc.compiler import json_text
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.windows import beginning

TEMPLATE = "{text}\n"
"""Of records with a text and without a prompt, where the user gives none."""

PLACE = re.compile(r"\{([^{}\n]+)\}")
RENAME = "rename the column that holds it, or, to tune an adapter or a prompt, name it with --column"
SUFFIXES = (".jsonl", ".csv", ".tsv")


@dataclass(frozen=True)
class Example:
    """What the model is given, and what it is to write behind it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Encoded:
    """The tokens of one example. ids[answer:] is the completion, the only part that has loss; answer is at least 1."""

    ids: tuple[int, ...]
    answer: int


def read_examples(
    path: Path,
    *,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> list[Example]:
    """Every example of a file, in order.

    columns  field -> the column that holds it: {"text": "sentence", "label": "class"}
    labels   value of a label -> what is written for it: {"0": "negative", "1": "positive"}; JSON's true is "true"

    TpvcError, with the line or row, for a file that is missing, damaged or of another type, and for a record that lacks
    a field or has an empty completion.
    """
    path = Path(path)
    if template is not None and not PLACE.search(template):
        raise TpvcError(f"the template '{template}' has no place for a field; expected one like '{TEMPLATE.strip()}'")
    examples = [
        _example(_renamed(record, columns or {}, where), template, labels, where) for where, record in _records(path)
    ]
    if not examples:
        raise TpvcError(f"{path} holds no record; expected one example a line")
    return examples


def encode_examples(tokenizer: Any, examples: Sequence[Example], max_length: int, eos: int | None) -> list[Encoded]:
    """Tokens of every example: those the tokenizer begins a text with, the prompt, the completion, `eos`.

    The prompt is tokenised by itself, as when a model is asked it. The completion is what the tokens of both together
    add to that, or, where those begin otherwise, tokenised by itself too: a SentencePiece tokenizer puts a space before
    a text, which is not there in the middle of one. An example of more than `max_length` tokens loses the beginning of
    its prompt, never of its answer. TpvcError, with the example's number, where the completion does not fit or nothing
    stands before it.
    """
    if not examples:
        return []
    begin = beginning(tokenizer)
    prompts, wholes, completions = (
        tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for texts in zip(*((e.prompt, e.prompt + e.completion, e.completion) for e in examples), strict=True)
    )
    end = [] if eos is None else [eos]
    made = []
    for number, (prompt, whole, completion) in enumerate(zip(prompts, wholes, completions, strict=True), 1):
        goes_on = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        answer = (whole[len(prompt) :] if goes_on else completion) + end
        if not answer:
            raise TpvcError(f"the completion of example {number} has no token; expected what the model is to write")
        room = max_length - len(begin) - len(answer)
        if not begin and not prompt:
            raise TpvcError(
                f"example {number} has an empty prompt, and the tokenizer begins no text with a token of its own;"
                " expected at least one token before the completion"
            )
        if room < (not begin):
            raise TpvcError(
                f"the completion of example {number} has {len(answer)} tokens, which do not fit into {max_length} with"
                " one before them; shorten it, or allow longer examples (--max-length, and no more than the model's"
                " context without virtual tokens)"
            )
        before = begin + prompt[max(0, len(prompt) - room) :]
        made.append(Encoded(tuple(before + answer), len(before)))
    return made


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, fields) of every record."""
    try:
        there = path.is_file()
    except OSError:
        there = False
    if not there:
        raise TpvcError(f"there is no file {path}; expected examples to learn from")
    if path.suffix.lower() not in SUFFIXES:
        raise TpvcError(f"examples cannot be read from {path}; expected a file of type {', '.join(SUFFIXES)}")
    try:
        yield from (_lines if path.suffix.lower() == ".jsonl" else _rows)(path)
    except UnicodeDecodeError:
        raise TpvcError(f"{path} is not UTF-8 in line {_undecodable(path)}; expected a text file in UTF-8") from None
    except OSError as error:
        raise TpvcError(f"{path} cannot be read ({error.strerror or error}); expected a text file") from error


def _undecodable(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number},"
            try:
                record = json_text.parse(line)
            except ValueError as error:
                reason = getattr(error, "msg", None) or str(error).splitlines()[0]
                raise TpvcError(f"{where} is not JSON ({reason}); expected one record a line") from None
            if not isinstance(record, dict):
                raise TpvcError(
                    f"{where} holds a {type(record).__name__}; expected an object with 'prompt' and 'completion', or"
                    " 'text' and 'label'"
                )
            yield where, record


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(rows, [])
            twice = [name for name, count in Counter(header).items() if count > 1]
            if twice:
                raise TpvcError(f"{path} has two columns '{twice[0]}'; expected each name once in the header")
            for cells in rows:
                if not cells:
                    continue
                number += 1
                where = f"{path}, row {number},"
                if len(cells) != len(header):
                    raise TpvcError(f"{where} has {len(cells)} cells; expected {len(header)}, as many as the header")
                yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise TpvcError(
                f"{path}, row {number + 1}, cannot be read ({error}); quote cells that hold quotes, or write jsonl"
            ) from None


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The record by the names of the fields."""
    for column in columns.values():
        if column not in record:
            raise TpvcError(f"{where} has no column '{column}', it has {_names(record)}; name one of these")
    taken = set(columns.values())
    rest = {name: value for name, value in record.items() if name not in taken}
    return rest | {field: record[column] for field, column in columns.items()}


def _example(record: Mapping[str, Any], template: str | None, labels: Mapping[str, str] | None, where: str) -> Example:
    if "completion" in record:
        if labels is not None:
            raise TpvcError(f"{where} has a completion, which words for labels do not apply to; leave one of them out")
        completion = _text(record, "completion", where)
    elif "label" in record:
        completion = " " + _label(record, labels, where)
    else:
        wanted = "'completion'" if "prompt" in record and template is None else "'label' or 'completion'"
        raise TpvcError(f"{where} has no column {wanted}, it has {_names(record)}; {RENAME}")
    if not completion.strip():
        raise TpvcError(f"{where} has an empty completion; expected what the model is to write")
    if template is None and "prompt" in record:
        return Example(_text(record, "prompt", where), completion)
    if template is None and "text" not in record:
        raise TpvcError(f"{where} has no column 'prompt' or 'text', it has {_names(record)}; {RENAME}")

    def value(place: re.Match[str]) -> str:
        if place[1] not in record:
            raise TpvcError(f"{where} has no field '{place[1]}' for the template, it has {_names(record)}; use those")
        return _text(record, place[1], where)

    return Example(PLACE.sub(value, TEMPLATE if template is None else template), completion)


def _label(record: Mapping[str, Any], labels: Mapping[str, str] | None, where: str) -> str:
    """The label in words."""
    if isinstance(record["label"], float):
        raise TpvcError(f"{where} has the label {record['label']}; expected text, a whole number, true or false")
    label = _text(record, "label", where)
    if labels is None:
        return label
    if label not in labels:
        raise TpvcError(f"{where} has the label '{label}'; expected one of {', '.join(labels)}, or a word for it too")
    return labels[label]


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    """A field as text: numbers, true and false as JSON spells them."""
    value = record[name]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise TpvcError(f"{where} has half a character as '{name}'; expected text that UTF-8 can hold") from None
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise TpvcError(f"{where} has {json.dumps(value)[:40]} as '{name}'; expected text or a number")


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in record) or "none"

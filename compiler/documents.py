"""Files of text for calibration: the documents that a text file, a table or a file of records holds, in order."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tpvc.compiler import json_text
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.evaluate import read_text

Chat = Callable[[Sequence[Mapping[str, str]]], str]
"""Spells a list of {"role", "content"} messages as one text."""


@dataclass(frozen=True)
class Documents:
    """texts    the documents in order, read as they are asked for
    columns  the columns of a table that they come from, empty where there are none to choose from
    """

    texts: Iterator[str]
    columns: tuple[str, ...] = ()


def documents(path: Path, chat: Chat) -> Documents:
    """The documents of a file, by its suffix. TpvcError for an unknown suffix, a damaged file or one without text."""
    reader = READERS.get(path.suffix.lower())
    if not path.is_file():
        raise TpvcError(f"there is no file {path}; expected a file of text")
    if reader is None:
        raise TpvcError(f"text cannot be read from {path}; expected a file of type {', '.join(READERS)}")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise TpvcError(f"{path} cannot be read ({error.strerror}); expected a file of text") from error
    found = reader(path, chat)
    return Documents(_guarded(path, found.texts), found.columns)


def record_text(record: Any, chat: Chat, where: str) -> str:
    """The text of one record: field `text`, or `prompt` and `completion` joined as they are, or chat `messages`."""
    match record:
        case {"text": str(text)}:
            return _whole(text, where)
        case {"prompt": str(prompt), "completion": str(completion)}:
            return _whole(prompt + completion, where)
        case {"messages": [*messages]} if all(
            isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages
        ):
            try:
                return _whole(chat(messages), where)
            except TpvcError as error:
                raise TpvcError(f"{where}: {error}") from error
    found = f"the fields {sorted(map(str, record))}" if isinstance(record, Mapping) else f"a {type(record).__name__}"
    raise TpvcError(f"{where} has {found}; expected a record with 'text', 'prompt' and 'completion', or 'messages'")


def _whole(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TpvcError(f"{where} has half a character; expected text that UTF-8 can hold") from None
    return text


def choose_columns(names: Sequence[str], wordy: Sequence[str], where: str) -> tuple[str, ...]:
    """Which columns to read: text; prompt and completion; messages; or the first of those that hold text."""
    for wanted in (("text",), ("prompt", "completion"), ("messages",)):
        if set(wanted) <= set(names):
            return wanted
    if not wordy:
        raise TpvcError(f"{where} has the columns {list(names)}, none of text; expected a column 'text'")
    return (wordy[0],)


def table_texts(rows: Iterable[Mapping[str, Any]], columns: tuple[str, ...], chat: Chat, where: str) -> Iterator[str]:
    """The text of every row; empty cells are passed over."""
    for number, row in enumerate(rows, 1):
        chosen = {"text": row[columns[0]]} if columns not in RECORDS else {c: row[c] for c in columns}
        if all(chosen.values()):
            yield record_text(chosen, chat, f"row {number} of {where}")


RATIO = 1000
"""Of what a compressed table may hold to its size. Text is compressed to a third or a tenth of its size."""

RECORDS = {("prompt", "completion"), ("messages",)}


def _guarded(path: Path, texts: Iterator[str]) -> Iterator[str]:
    try:
        yield from texts
    except UnicodeDecodeError as error:
        raise TpvcError(f"{path} is not UTF-8 at byte {error.start}; expected a text file in UTF-8") from error
    except (OSError, csv.Error) as error:
        raise TpvcError(f"{path} cannot be read ({error}); it is damaged or not what its suffix says") from error


def _plain(path: Path, chat: Chat) -> Documents:
    return Documents(iter([read_text(path)]))


def _jsonl(path: Path, chat: Chat) -> Documents:
    def texts() -> Iterator[str]:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                try:
                    record = json_text.parse(line) if line.strip() else None
                except ValueError as error:
                    reason = getattr(error, "msg", None) or error
                    raise TpvcError(f"{where} is not JSON ({reason}); expected one record a line") from None
                if line.strip():
                    yield record_text(record, chat, where)

    return Documents(texts())


def _csv(path: Path, chat: Chat) -> Documents:
    csv.field_size_limit(sys.maxsize)

    def rows() -> Iterator[dict[str, str]]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", restval="")
            yield dict.fromkeys(table.fieldnames or (), "")  # also of a table that has no row
            yield from table

    every = _guarded(path, rows())
    names = list(next(every))
    first = list(islice(every, 1))
    wordy = [n for n in names if not first or not _is_number(first[0][n])]
    columns = choose_columns(names, wordy, str(path))
    return Documents(table_texts(chain(first, every), columns, chat, str(path)), columns)


def _parquet(path: Path, chat: Chat) -> Documents:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise TpvcError(f"reading {path.name} needs pyarrow; install it with: pip install 'tpvc[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise TpvcError(f"{path} is not a readable parquet file ({error}); download it again") from error
    most = RATIO * path.stat().st_size + (16 << 20)
    columns = choose_columns(schema.names, [f.name for f in schema if "string" in str(f.type)[:12]], str(path))

    def rows() -> Iterator[dict[str, Any]]:
        size = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                size += batch.nbytes
                if size > most:
                    raise TpvcError(f"{path} holds over {RATIO} times its own size of text; use another table")
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise TpvcError(f"{path} is not a readable parquet file ({error}); download it again") from error

    return Documents(table_texts(rows(), columns, chat, str(path)), columns)


def _is_number(cell: str) -> bool:
    """True for an empty cell too: neither says that a column holds text."""
    try:
        float(cell)
    except ValueError:
        return not cell.strip()
    return True


READERS: dict[str, Callable[[Path, Chat], Documents]] = {
    ".txt": _plain,
    ".md": _plain,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
}
"""By suffix, lower case."""

"""What fine-tuning learns from: examples with a prompt and a completion, or plain text, by one rule.

A .jsonl, .csv or .tsv file whose first record has a `completion` or a `label` holds examples, and only the completion
has loss (see tuning.examples). Everything else is text, as `tpvc quantize --dataset` reads it: it is cut into windows,
every token of which has loss but what the tokenizer begins a text with, or the first.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tpvc.compiler.calibration import calibrate, chat_text
from tpvc.compiler.documents import documents
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Program
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.sha256 import sha256
from tpvc.compiler.tuning.data import HELD_OUT, Data, held_out, read_data
from tpvc.compiler.tuning.examples import SUFFIXES, Encoded
from tpvc.compiler.windows import beginning, cut, encode, encode_behind, text_tokens

WINDOWS = 64
"""Of text, at most as many windows are kept to choose by: all their tokens have loss."""


def read_domain(
    program: Program, tokenizer: Any, training: Path, validation: Path | None, length: int, seed: int
) -> Data:
    """Examples or windows of at most `length` tokens; without a validation file a tenth is drawn to choose by."""
    kinds = {path: holds_examples(path) for path in (training, *([validation] if validation else []))}
    for path in kinds:
        if not path.is_file():
            raise TpvcError(f"there is no file {path}; expected examples or text")
    if len(set(kinds.values())) > 1:
        examples, text = sorted(kinds, key=kinds.get, reverse=True)
        raise TpvcError(f"{examples} holds examples and {text} text, or nothing; expected two of a kind")
    if kinds[training]:
        found = read_data(program, tokenizer, training, validation, length, seed)
        return replace(found, record={"kind": "examples", **found.record})
    learned = windows(program, tokenizer, training, length)
    files = {"training": {"name": training.name, "sha256": sha256(training)}}
    if validation is None:
        learned, checked = held_out(learned, seed, f"{training} (windows of {length} tokens)", WINDOWS)
    else:
        checked = windows(program, tokenizer, validation, length)
        files["validation"] = {"name": validation.name, "sha256": sha256(validation)}
    told = {"kind": "text", "files": files, "training": len(learned), "validation": len(checked)}
    return Data(learned, checked, told)


def holds_examples(path: Path) -> bool:
    """Whether the first record of a file has a completion or a label. What cannot be told is left to the reader."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                fields = json.loads(next((line for line in file if line.strip()), "null"))
            else:
                fields = next(csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","), [])
    except (OSError, ValueError, RecursionError, csv.Error):
        return False
    return isinstance(fields, dict | list) and bool({"completion", "label"} & {f for f in fields if isinstance(f, str)})


def windows(program: Program, tokenizer: Any, path: Path, length: int) -> list[Encoded]:
    """All whole windows of `length` tokens of a text file, documents one behind the other.

    TpvcError for a table that does not say which of its columns is the text.
    """
    ids: list[int] = []
    begin = beginning(tokenizer)
    found = documents(path, lambda messages: chat_text(tokenizer, messages))
    if found.columns and not {"text", "prompt", "messages"} & set(found.columns):
        raise TpvcError(
            f"{path} has no column completion, label, text or messages, and '{found.columns[0]}' would be learned"
            " alone; give the columns that are to be learned one of these names"
        )
    for text in found.texts:
        ids += encode_behind(tokenizer, text, begin)
    if len(ids) < (least := text_tokens(begin, length)):
        raise TpvcError(f"{path} holds {len(ids)} tokens; expected at least {least}, a window, use a longer text")
    if (most := max(*begin, *ids)) >= program.facts.vocab_size:
        raise TpvcError(
            f"{path} has token {most}, the model knows {program.facts.vocab_size}; the tokenizer is not this model's"
        )
    return learned_whole(cut(ids, begin, length), begin)


def learned_whole(windows: Tensor, begin: list[int]) -> list[Encoded]:
    """Windows int64 [n, L], all tokens of which have loss but those that begin them."""
    return [Encoded(tuple(window), max(1, len(begin))) for window in windows.tolist()]


def read_general(
    program: Program,
    tokenizer: Any,
    dataset: str,
    count: int,
    length: int,
    seed: int,
    progress: Progress = silent,
) -> Data:
    """`count` windows of general text, as calibration takes them; every tenth is kept for measuring and never learned.

    Which ones does not depend on a seed, so that an importance file and a run that reuses it keep the same ones.
    """
    if count < HELD_OUT:
        raise TpvcError(f"{count} windows of general text were asked for; expected at least {HELD_OUT}")
    found = calibrate(program, tokenizer, dataset, count, length, seed, progress)
    every = learned_whole(found.tokens, beginning(tokenizer))
    kept = [e for i, e in enumerate(every) if i % HELD_OUT == HELD_OUT - 1]
    learned = [e for i, e in enumerate(every) if i % HELD_OUT != HELD_OUT - 1]
    return Data(learned, kept, found.origin)


def read_held_out(tokenizer: Any, length: int) -> list[Encoded]:
    """Windows of the text that comes with tpvc for measuring, where no general text was named."""
    from tpvc.compiler.measure import HELD_OUT as TEXT

    ids, begin = encode(tokenizer, TEXT.read_text(encoding="utf-8")), beginning(tokenizer)
    return learned_whole(cut(ids, begin, min(length, len(begin) + len(ids))), begin)

"""The examples of a tuning run: read, encoded, and a part of them kept to choose by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Program
from tpvc.compiler.sha256 import sha256
from tpvc.compiler.tuning.examples import Encoded, encode_examples, read_examples

LARGEST_RATE = 1e37
"""AdamW's first step is ten times the rate, which float32 has to hold."""
HELD_OUT, AT_MOST = 10, 500
"""Without a validation file a tenth of the examples, drawn with the seed, is kept from training, at most 500."""


@dataclass(frozen=True)
class Data:
    """training and checking: encoded examples; record: what a manifest says of them."""

    training: list[Encoded]
    checking: list[Encoded]
    record: dict[str, Any]

    @property
    def digest(self) -> str:
        """sha256 of the tokens of all examples and where their answers begin."""
        parts = [[(e.answer, e.ids) for e in part] for part in (self.training, self.checking)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_data(
    program: Program,
    tokenizer: Any,
    training: Path,
    validation: Path | None,
    length: int,
    seed: int,
    *,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> Data:
    """The examples in two files, or in one that is divided; of at most `length` tokens. See tuning.examples."""
    words = {"template": template, "columns": columns, "labels": labels}
    files = {"training": {"name": training.name, "sha256": sha256(training)}} if training.is_file() else {}
    learned = encoded(program, tokenizer, training, length, **words)
    if validation is None:
        learned, checked = held_out(learned, seed, str(training))
    else:
        checked = encoded(program, tokenizer, validation, length, **words)
        files["validation"] = {"name": validation.name, "sha256": sha256(validation)}
    return Data(learned, checked, {"files": files, "training": len(learned), "validation": len(checked)})


def encoded(
    program: Program,
    tokenizer: Any,
    path: Path,
    length: int,
    *,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> list[Encoded]:
    """The examples in one file. TpvcError for a tokenizer with tokens that the model does not know."""
    examples = read_examples(path, template=template, columns=columns, labels=labels)
    try:
        made = encode_examples(tokenizer, examples, length, next(iter(program.facts.eos), None))
    except TpvcError as error:
        raise TpvcError(f"{path}: {error}") from error
    highest = max(max(e.ids) for e in made)
    if highest >= program.facts.vocab_size:
        raise TpvcError(
            f"{path} has token {highest}, the model knows {program.facts.vocab_size}; the tokenizer is not this model's"
        )
    return made


def held_out(
    examples: list[Encoded], seed: int, name: str, at_most: int = AT_MOST
) -> tuple[list[Encoded], list[Encoded]]:
    """(training, validation): a tenth, drawn with the seed, and no more than `at_most`, is kept from training."""
    count = min(at_most, len(examples) // HELD_OUT)
    if count < 1:
        raise TpvcError(
            f"{name} holds {len(examples)} examples; expected at least {HELD_OUT}, or name a --validation file"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = set(order[:count])
    return [e for i, e in enumerate(examples) if i not in kept], [examples[i] for i in sorted(kept)]


def steps_of(epochs: float, steps: int | None, batch_size: int, examples: int) -> int:
    """Optimiser steps: those that were asked for, or what `epochs` passes over the examples take."""
    return max(1, round(epochs * examples / batch_size)) if steps is None else steps


def check_run(epochs: float, steps: int | None, batch_size: int, lr: float, warmup: float, max_length: int) -> None:
    """TpvcError for numbers that no run can have."""
    if (steps is not None and steps < 1) or not 0 < epochs < float("inf") or batch_size < 1 or max_length < 2:
        length = f"{epochs:g} epochs" if steps is None else f"{steps} steps"
        raise TpvcError(
            f"found {length}, batches of {batch_size} and {max_length} tokens;"
            " expected numbers above 0, and at least 2 tokens"
        )
    if not 0 < lr < LARGEST_RATE or not 0 <= warmup < 1:
        raise TpvcError(
            f"found rate {lr:g} and warm-up {warmup:g}; expected a rate above 0, below {LARGEST_RATE:g}, and a warm-up"
            " from 0 to 1"
        )

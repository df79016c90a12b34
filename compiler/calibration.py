"""The tokens that rounding is fitted on: windows cut from a user's text, from the built-in text, or sampled.

Documents are tokenised one by one without special tokens, concatenated in order, and cut into the first n windows of L
tokens (`windows.py`). The built-in text interleaves its domains, so that any number of windows is a mixture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.documents import READERS, Documents, documents, record_text
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.tokenizer_files import rendered
from tpvc.compiler.program import Program
from tpvc.compiler.progress import Progress
from tpvc.compiler.sample import sample
from tpvc.compiler.sha256 import sha256
from tpvc.compiler.windows import beginning, cut, encode, encode_behind, text_tokens, too_short


@dataclass(frozen=True, eq=False)
class Calibration:
    """tokens  int64 [n, L]
    origin  where they came from, for the manifest: dataset, files {name: sha256}, tokens, sampled_tokens, sha256 of the
            tokens as little-endian int64 in order, nsamples, seqlen, seed; columns for a table
    """

    tokens: Tensor
    origin: dict[str, Any]


def calibrate(
    program: Program,
    tokenizer: Any,
    dataset: str,
    nsamples: int,
    seqlen: int,
    seed: int,
    progress: Progress | None = None,
) -> Calibration:
    """`nsamples` windows of `seqlen` tokens. `dataset` is one of

    builtin  the text that comes with tpvc; what it does not hold is sampled from the model
    self     all sampled from the model
    a path   .txt and .md (one document), .jsonl, .parquet, .csv, .tsv
    NAME     a data set for the `datasets` package, NAME or NAME:CONFIG, split train

    Raises TpvcError when a file is missing, damaged or too short, or the tokenizer is not the model's.
    """
    windows, files, extra = text_windows(program, tokenizer, dataset, nsamples, seqlen)
    missing = nsamples - len(windows)
    if missing:
        windows = torch.cat((windows, sample(program, tokenizer, missing, seqlen, seed, progress)))
    origin = {
        "dataset": dataset,
        "files": files,
        "tokens": nsamples * seqlen,
        "sampled_tokens": missing * seqlen,
        "sha256": hashlib.sha256(windows.numpy().astype("<i8").tobytes()).hexdigest(),
        "nsamples": nsamples,
        "seqlen": seqlen,
        "seed": seed,
    }
    return Calibration(windows, origin | extra)


def text_windows(
    program: Program, tokenizer: Any, dataset: str, nsamples: int, seqlen: int
) -> tuple[Tensor, dict[str, str], dict[str, Any]]:
    """(the windows that the text of `dataset` yields, at most `nsamples`; its files {name: sha256}; what else its
    origin says). The others are for the model to write."""
    if nsamples < 1 or seqlen < 2:
        raise TpvcError(f"{nsamples} windows of {seqlen} tokens were asked for; expected at least 1 window of 2 tokens")
    begin = beginning(tokenizer)
    text_tokens(begin, seqlen)
    if seqlen > program.facts.context_length:
        raise TpvcError(
            f"windows of {seqlen} tokens were asked for, the model's context is {program.facts.context_length}; "
            "ask for at most that"
        )
    files: dict[str, str] = {}
    extra: dict[str, Any] = {}
    windows = torch.empty(0, seqlen, dtype=torch.int64)
    if dataset == "builtin":
        texts = builtin()
        files = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        domains = [encode(tokenizer, text) for text in texts.values()]
        windows = interleaved(domains, begin, seqlen)[:nsamples]
    elif dataset != "self":
        path = Path(dataset).expanduser()
        if path.suffix.lower() in READERS or path.exists():
            found = documents(path, lambda messages: chat_text(tokenizer, messages))
            files = {path.name: sha256(path)}
        else:
            found = _named(dataset, tokenizer)
        if found.columns:
            extra["columns"] = list(found.columns)
        windows = _first_windows(found.texts, tokenizer, begin, dataset, nsamples, seqlen)
    if len(windows) and int(windows.max()) >= program.facts.vocab_size:
        raise TpvcError(
            f"the text has token {int(windows.max())}, the model knows {program.facts.vocab_size}; the tokenizer "
            "is not this model's"
        )
    return windows, files, extra


def builtin() -> dict[str, str]:
    """The built-in text: {file name: text}, one file a domain, in alphabetical order."""
    folder = resources.files("tpvc.calib_data")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".txt"))
    return {name: folder.joinpath(name).read_text(encoding="utf-8") for name in names}


def interleaved(domains: list[list[int]], begin: list[int], seqlen: int) -> Tensor:
    """All windows that the domains hold, int64 [n, seqlen]: every prefix mixes the domains in proportion.

    Window i of n of a domain stands at (i + 1/2) / n of the way. What is left over at the end of each domain is
    concatenated, in order, and cut into the last windows.
    """
    placed, rest = [], []
    for index, ids in enumerate(domains):
        own = cut(ids, begin, seqlen)
        placed += [((i + 0.5) / len(own), index, window) for i, window in enumerate(own)]
        rest += ids[len(own) * text_tokens(begin, seqlen) :]
    windows = [window[None] for _, _, window in sorted(placed, key=lambda p: p[:2])]
    return torch.cat([*windows, cut(rest, begin, seqlen)])


def chat_text(tokenizer: Any, messages: Any) -> str:
    """Messages in the model's chat template, or one after another where it has none; TpvcError for what it refuses."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(str(message["content"]) for message in messages)
    return rendered(tokenizer, messages, tokenize=False)


def _first_windows(
    texts: Iterable[str], tokenizer: Any, begin: list[int], dataset: str, nsamples: int, seqlen: int
) -> Tensor:
    ids: list[int] = []
    needed = nsamples * text_tokens(begin, seqlen)
    for text in texts:
        ids += encode_behind(tokenizer, text, begin)
        if len(ids) >= needed:
            return cut(ids[:needed], begin, seqlen)
    raise too_short(dataset, ids, begin, nsamples, seqlen)


def _named(dataset: str, tokenizer: Any) -> Documents:
    """A data set by name through the `datasets` package, streamed."""
    try:
        import datasets
    except ImportError:
        raise TpvcError(
            f"'{dataset}' is neither builtin, self nor a file; if it names a data set, install the package that "
            "loads it: pip install 'tpvc[data]'"
        ) from None
    name, _, config = dataset.partition(":")
    try:
        records = iter(datasets.load_dataset(name, config or None, split="train", streaming=True))
    except Exception as error:  # whatever the package and its network layers raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TpvcError(
            f"the data set '{dataset}' cannot be loaded ({first}); check its name, or name a file"
        ) from error

    def texts() -> Iterator[str]:
        for number, record in enumerate(records, 1):
            yield record_text(record, lambda messages: chat_text(tokenizer, messages), f"record {number} of {dataset}")

    return Documents(texts())

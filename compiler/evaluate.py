"""How good a Program is: perplexity of a text, and its distance from another Program.

Protocol: the text is tokenised without special tokens, the first n * L tokens are cut into n windows of L, and every
window predicts its own tokens 1 .. L-1 from what comes before them in the window. Memory is bounded by a batch of
windows and a chunk of logits, whatever the length of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.interpret import Weight, from_files, positions_of, run
from tpvc.compiler.program import Program
from tpvc.compiler.progress import Progress, silent

BATCH = 4
"""Windows at a time."""
CHUNK = 1 << 24
"""Logits at a time: 64 MB of float32."""


@dataclass(frozen=True)
class Perplexity:
    """value   exp of the mean negative log-likelihood over all predictions
    stderr  its standard error over windows (delta method: value * deviation of nll / sqrt(windows)); nan for one window
    nll     mean negative log-likelihood of each window, nats per token
    """

    value: float
    stderr: float
    nll: tuple[float, ...]


@dataclass(frozen=True)
class Divergence:
    """kl      mean KL(reference || program) over all predictions, nats per token
    top1    share of the predictions in which both have the same most likely token
    """

    kl: float
    top1: float


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without added special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def read_text(path: str | Path) -> str:
    """A UTF-8 text file; TpvcError when it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TpvcError(f"{path} cannot be read ({error.strerror}); expected a text file") from error
    except UnicodeDecodeError as error:
        raise TpvcError(f"{path} is not UTF-8 at byte {error.start}; expected a text file in UTF-8") from error


def text_windows(path: str | Path, tokenizer: Any, windows: int, seqlen: int) -> Tensor:
    """The first `windows * seqlen` tokens of a text file, int64 [windows, seqlen]; TpvcError when it is too short."""
    if windows < 1 or seqlen < 2:
        raise TpvcError(f"{windows} windows of {seqlen} tokens were asked for; expected at least 1 window of 2 tokens")
    ids = encode(tokenizer, read_text(path))
    if len(ids) < windows * seqlen:
        raise TpvcError(
            f"{path} holds {len(ids)} tokens, {windows} windows of {seqlen} need {windows * seqlen}; use a longer text "
            f"or at most {len(ids) // seqlen} windows"
        )
    return torch.tensor(ids[: windows * seqlen], dtype=torch.int64).view(windows, seqlen)


@torch.no_grad()
def perplexity(
    program: Program, tokens: Tensor, weight: Weight | None = None, progress: Progress | None = None
) -> Perplexity:
    """Perplexity over windows of tokens, int64 [n, L]. Without a `weight` parameters are read batch by batch."""
    losses = []
    for batch in _batches(program, tokens, progress, "perplexity"):
        nll = torch.zeros(batch.shape[0], dtype=torch.float64)
        targets = batch[:, 1:].reshape(-1)
        for rows, logits in _logits(program, batch, weight):
            picked = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none")
            window = torch.arange(len(targets))[rows] // (batch.shape[1] - 1)
            nll.index_add_(0, window, picked.double().cpu())
        losses += (nll / (tokens.shape[1] - 1)).tolist()
    each = torch.tensor(losses, dtype=torch.float64)
    value = each.mean().exp().item()
    stderr = value * each.std().item() / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return Perplexity(value, stderr, tuple(losses))


@torch.no_grad()
def divergence(
    program: Program,
    reference: Program,
    tokens: Tensor,
    weight: Weight | None = None,
    reference_weight: Weight | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """How far `program` is from `reference` over windows of tokens, int64 [n, L]; the same predictions as perplexity's.

    Raises TpvcError when the two have different vocabularies.
    """
    if program.facts.vocab_size != reference.facts.vocab_size:
        raise TpvcError(
            f"the two models have vocabularies of {program.facts.vocab_size} and {reference.facts.vocab_size} tokens; "
            "only models with the same one can be compared"
        )
    kl, agreed, count = 0.0, 0, 0
    for batch in _batches(program, tokens, progress, "divergence"):
        both = zip(_logits(program, batch, weight), _logits(reference, batch, reference_weight), strict=True)
        for (_, logits), (_, wanted) in both:
            agreed += int((logits.argmax(-1) == wanted.argmax(-1)).sum())
            count += len(logits)
            p, q = wanted.log_softmax(-1), logits.log_softmax(-1)
            kl += torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).double().sum().item()
    return Divergence(kl / count, agreed / count)


def _batches(program: Program, tokens: Tensor, progress: Progress | None, stage: str) -> Iterator[Tensor]:
    """BATCH windows at a time; checks the tokens and reports after each batch."""
    if tokens.numel() and int(tokens.max()) >= program.facts.vocab_size:
        raise TpvcError(
            f"the text has token {int(tokens.max())}, the model knows {program.facts.vocab_size}; the tokenizer is not "
            "this model's"
        )
    if tokens.shape[1] > program.facts.context_length:
        raise TpvcError(
            f"windows of {tokens.shape[1]} tokens are longer than the model's context of "
            f"{program.facts.context_length}; ask for shorter ones"
        )
    report = progress or silent
    for first in range(0, len(tokens), BATCH):
        batch = tokens[first : first + BATCH]
        yield batch
        report(stage, first + len(batch), len(tokens), "windows")


def _logits(program: Program, batch: Tensor, weight: Weight | None) -> Iterator[tuple[slice, Tensor]]:
    """Logits that predict batch[:, 1:], in chunks: (rows of the flattened predictions, float32 [rows, vocab]).

    The graph is cut at the head; what follows it treats every position alone.
    """
    weight = weight or from_files(program)
    head = max(i for i, n in enumerate(program.nodes) if n.op == "linear")
    mask = torch.ones_like(batch, dtype=torch.bool)
    values = {"input_ids": batch, "mask": mask, "positions": positions_of(mask, batch.shape[1])}
    hidden = run(program.nodes[:head], values, weight)[:, :-1].flatten(0, 1)
    rows = max(1, CHUNK // program.facts.vocab_size)
    held = {name: weight(name) for n in program.nodes[head:] for name in n.params.values()}
    for first in range(0, len(hidden), rows):
        part = hidden[None, first : first + rows]
        logits = run(program.nodes[head:], {program.nodes[head].inputs[0]: part}, held.__getitem__)
        yield slice(first, first + rows), logits[0]

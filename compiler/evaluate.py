"""How good a model is: perplexity of a text, and its distance from another model.

Protocol: the text is tokenised and cut into n windows of L tokens (`windows.py`), and every window predicts its own
tokens 1 .. L-1 from what comes before them in the window. Memory is bounded by a batch of windows and a chunk of
logits, whatever the length of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.interpret import Weight, at_head, from_files, positions_of, run
from tpvc.compiler.program import Program, adapter_id, prompt_ids
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.windows import beginning, cut, encode, text_tokens, too_short

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


@dataclass(frozen=True)
class Score:
    """perplexity  of the model; `reference` and `divergence`: the other's, and the distance from it, if there is one"""

    perplexity: Perplexity
    reference: Perplexity | None = None
    divergence: Divergence | None = None


@dataclass(frozen=True, eq=False)
class Predictor:
    """Whatever predicts tokens: a Program (`predictor`), or a runtime that has a function for it.

    logits  tokens int64 [n, L] -> the logits float32 [*, vocab] that predict tokens[:, 1:]: one window after the
            other, each cut as `pieces` cuts, so that the pieces of two models belong together
    """

    vocab_size: int
    context_length: int
    logits: Callable[[Tensor], Iterator[Tensor]]


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, without a byte order mark; TpvcError when it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TpvcError(f"{path} cannot be read ({error.strerror}); expected a text file") from error
    except UnicodeDecodeError as error:
        raise TpvcError(f"{path} is not UTF-8 at byte {error.start}; expected a text file in UTF-8") from error


def text_windows(path: str | Path, tokenizer: Any, windows: int, seqlen: int) -> Tensor:
    """The first so many windows of a text file, int64 [windows, seqlen]; TpvcError when it is too short."""
    if windows < 1 or seqlen < 2:
        raise TpvcError(f"{windows} windows of {seqlen} tokens were asked for; expected at least 1 window of 2 tokens")
    ids, begin = encode(tokenizer, read_text(path)), beginning(tokenizer)
    needed = windows * text_tokens(begin, seqlen)
    if len(ids) < needed:
        raise too_short(str(path), ids, begin, windows, seqlen)
    return cut(ids[:needed], begin, seqlen)


def perplexity(
    program: Program, tokens: Tensor, weight: Weight | None = None, progress: Progress | None = None
) -> Perplexity:
    """Perplexity over windows of tokens, int64 [n, L]. Without a `weight` parameters are read batch by batch."""
    return score(predictor(program, weight), tokens, progress=progress, stage="perplexity").perplexity


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
    both = predictor(program, weight), predictor(reference, reference_weight)
    return score(both[0], tokens, both[1], progress, "divergence").divergence


@torch.no_grad()
def score(
    model: Predictor,
    tokens: Tensor,
    reference: Predictor | None = None,
    progress: Progress | None = None,
    stage: str = "score",
) -> Score:
    """All figures over windows of tokens, int64 [n, L], each model computing every window once.

    Progress moves with every window. Raises TpvcError for tokens that a model cannot take, and when the two have
    different vocabularies.
    """
    models = [model] if reference is None else [model, reference]
    if len({m.vocab_size for m in models}) > 1:
        raise TpvcError(
            f"the two models have vocabularies of {models[0].vocab_size} and {models[1].vocab_size} tokens; "
            "only models with the same one can be compared"
        )
    if len(tokens) < 1 or tokens.shape[1] < 2:
        raise TpvcError(f"found windows of shape {list(tokens.shape)}; expected at least 1 window of 2 tokens")
    for m in models:
        _check(m, tokens)
    report = progress or silent
    windows, each = len(tokens), tokens.shape[1] - 1
    targets = tokens[:, 1:].reshape(-1)
    nll = torch.zeros(len(models), windows, dtype=torch.float64)
    kl, agreed, done = 0.0, 0, 0
    report(stage, 0, windows, "windows")
    for logits in zip(*(m.logits(tokens) for m in models), strict=True):
        window, rows = done // each, slice(done, done + len(logits[0]))
        chances = [x.log_softmax(-1) for x in logits]
        for i, q in enumerate(chances):
            nll[i, window] -= q.gather(-1, targets[rows, None]).double().sum().cpu()
        if reference is not None:
            q, p = chances
            agreed += int((q.argmax(-1) == p.argmax(-1)).sum())
            kl += torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).double().sum().item()
        done = rows.stop
        if done % each == 0:
            report(stage, done // each, windows, "windows")
    found = [_perplexity(losses / each) for losses in nll]
    if reference is None:
        return Score(found[0])
    return Score(found[0], found[1], Divergence(kl / done, agreed / done))


def _perplexity(nll: Tensor) -> Perplexity:
    """Of every window's mean negative log-likelihood, float64 [n]."""
    value = nll.mean().exp().item()
    stderr = value * nll.std().item() / math.sqrt(len(nll)) if len(nll) > 1 else math.nan
    return Perplexity(value, stderr, tuple(nll.tolist()))


def _check(model: Predictor, tokens: Tensor) -> None:
    if tokens.numel() and int(tokens.max()) >= model.vocab_size:
        raise TpvcError(
            f"the text has token {int(tokens.max())}, the model knows {model.vocab_size}; the tokenizer is not "
            "this model's"
        )
    if tokens.shape[1] > model.context_length:
        raise TpvcError(
            f"windows of {tokens.shape[1]} tokens are longer than the model's context of "
            f"{model.context_length}; ask for shorter ones"
        )


def pieces(windows: Iterable[Tensor], vocab_size: int) -> Iterator[Tensor]:
    """Every window's [L-1, ...] cut into pieces that have at most CHUNK logits: what `Predictor.logits` yields."""
    for window in windows:
        yield from window.split(max(1, CHUNK // vocab_size))


def predictor(
    program: Program, weight: Weight | None = None, adapter: str | None = None, task: str | None = None
) -> Predictor:
    """A Program as score takes it, BATCH windows at a time. Without a `weight` parameters are read batch by batch.
    `adapter` is the name of one of the program's, None the base model; `task` that of a soft prompt, which then stands
    before every window.

    The graph is cut at the head; what follows it treats every position alone.
    """
    weight = weight or from_files(program)
    facts = program.facts
    chosen = torch.tensor([adapter_id(program, adapter)])
    before = torch.tensor(prompt_ids(program, task), dtype=torch.int64)
    body, head = at_head(program)

    def logits(tokens: Tensor) -> Iterator[Tensor]:
        for batch in tokens.split(BATCH):
            batch = torch.cat((before.expand(len(batch), -1), batch), 1)
            mask = torch.ones_like(batch, dtype=torch.bool)
            values = {"input_ids": batch, "mask": mask, "positions": positions_of(mask, batch.shape[1])}
            values["adapter_ids"] = chosen.expand(len(batch))
            hidden = run(body, values, weight)[:, len(before) : -1]
            held = {name: weight(name) for n in head for name in n.params.values()}
            for part in pieces(hidden, facts.vocab_size):
                entering = {head[0].inputs[0]: part[None], "adapter_ids": chosen}
                yield run(head, entering, held.__getitem__)[0]

    return Predictor(facts.vocab_size, facts.context_length - len(before), logits)

"""How well a Program writes the answers of examples: the loss that tuning lowers, and the share it gets right.

Only the answer counts: position t of a row predicts token t + 1, and the positions whose next token is part of the
prompt or padding are left out before the head, which is most of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvc.compiler.interpret import Weight, at_head, positions_of, run
from tpvc.compiler.ops import Op
from tpvc.compiler.program import Program
from tpvc.compiler.quick import QUICK
from tpvc.compiler.tuning.examples import Encoded


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples padded on the right. ids int64 [B, T]; mask bool [B, T]; predicts bool [B, T], where an answer's token
    follows; targets int64 [P], those tokens, row after row; rows int64 [P], whose they are."""

    ids: Tensor
    mask: Tensor
    predicts: Tensor
    targets: Tensor
    rows: Tensor


def batch_of(examples: Sequence[Encoded], device: str = "cpu") -> Batch:
    longest = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    answer = torch.zeros(len(examples), longest, dtype=torch.bool)
    for i, e in enumerate(examples):
        ids[i, : len(e.ids)] = torch.tensor(e.ids)
        mask[i, : len(e.ids)] = True
        answer[i, e.answer : len(e.ids)] = True
    predicts = torch.cat((answer[:, 1:], torch.zeros(len(examples), 1, dtype=torch.bool)), 1)
    rows = answer.nonzero()[:, 0]
    return Batch(*(t.to(device) for t in (ids, mask, predicts, ids[answer], rows)))


def answer_logits(
    program: Program, weight: Weight, batch: Batch, adapter: int = -1, ops: Mapping[str, Op] = QUICK
) -> Tensor:
    """Logits [P, vocab] that predict the answers' tokens, in the order of `batch.targets`; all rows use one adapter.

    With `ops` left alone linears multiply in bfloat16 and add in float32.
    """
    body, head = at_head(program)
    device = batch.ids.device
    values = {"input_ids": batch.ids, "mask": batch.mask, "positions": positions_of(batch.mask, batch.ids.shape[1])}
    every = torch.full((len(batch.ids),), adapter, device=device)
    hidden = run(body, {**values, "adapter_ids": every}, weight, ops=ops)[batch.predicts]
    values = {head[0].inputs[0]: hidden[None], "adapter_ids": every[:1]}
    return run(head, values, weight, ops=ops)[0]


@dataclass(frozen=True)
class Answers:
    """loss: mean nats a token of the answers; exact: share of the examples whose every token is the likeliest one,
    which greedy decoding would write; examples: how many."""

    loss: float
    exact: float
    examples: int


@torch.no_grad()
def score_answers(
    program: Program,
    weight: Weight,
    examples: Sequence[Encoded],
    batch_size: int,
    adapter: int = -1,
    device: str = "cpu",
    ops: Mapping[str, Op] = QUICK,
) -> Answers:
    """Loss and accuracy over all `examples`, batches of like length so that little is padding."""
    total, tokens, right = 0.0, 0, 0
    for part in by_length(examples, batch_size):
        batch = batch_of(part, device)
        logits = answer_logits(program, weight, batch, adapter, ops).float()
        total += torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum").item()
        tokens += len(batch.targets)
        wrong = torch.zeros(len(part), device=device).index_add(
            0, batch.rows, (logits.argmax(-1) != batch.targets).float()
        )
        right += int((wrong == 0).sum())
    return Answers(total / tokens, right / len(examples), len(examples))


def by_length(examples: Sequence[Encoded], batch_size: int) -> Iterator[list[Encoded]]:
    ordered = sorted(examples, key=lambda e: len(e.ids))
    for first in range(0, len(ordered), batch_size):
        yield ordered[first : first + batch_size]

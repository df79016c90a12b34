"""Loss and accuracy of answers against the plainest computation: one example at a time, no padding."""

import pytest
import torch

from tpvc.compiler import frontends, interpret
from tpvc.compiler.ops import OPS
from tpvc.compiler.tuning.examples import Encoded
from tpvc.compiler.tuning.loss import answer_logits, batch_of, by_length, score_answers

EXAMPLES = [
    Encoded((5, 9, 200, 7, 33), 3),
    Encoded((17, 4), 1),
    Encoded((9, 8, 7, 6, 5, 4, 3, 2, 1), 4),
    Encoded((100, 300, 20), 2),
]


@pytest.fixture(scope="module")
def program(tiny_llama):
    return frontends.load(tiny_llama)


def alone(program, example):
    """Logits of the answer's tokens, from the whole example by itself."""
    found = interpret.logits(program, torch.tensor([example.ids]))[0]
    return found[example.answer - 1 : len(example.ids) - 1]


@torch.no_grad()
def test_padding_and_company_do_not_matter(program):
    weight = interpret.in_memory(program)
    batch = batch_of(EXAMPLES)
    found = answer_logits(program, weight, batch, ops=OPS)
    wanted = torch.cat([alone(program, e) for e in EXAMPLES])
    # two correct float32 evaluations of 2 blocks and a head: 15 products of sums of at most 128 terms
    assert (found - wanted).abs().max() <= 15 * 128 * 2**-24 * wanted.abs().max()
    assert batch.targets.tolist() == [t for e in EXAMPLES for t in e.ids[e.answer :]]
    assert batch.rows.tolist() == [0, 0, 1, 2, 2, 2, 2, 2, 3]


@torch.no_grad()
def test_the_score_is_the_mean_over_tokens_and_the_share_of_whole_answers(program):
    logits = [alone(program, e) for e in EXAMPLES]
    losses = [
        torch.nn.functional.cross_entropy(x, torch.tensor(e.ids[e.answer :]), reduction="sum")
        for x, e in zip(logits, EXAMPLES, strict=True)
    ]
    found = score_answers(program, interpret.in_memory(program), EXAMPLES, 3)
    # linears are quick: 15 products in a row, each off by at most 2^-8 of its size, against logits of order 1
    assert found.loss == pytest.approx(sum(map(float, losses)) / 9, abs=15 * 2**-8)
    assert (found.exact, found.examples) == (0.0, 4)
    # with the likeliest tokens as answers one is right; with one token of two, it is not
    best = [int(alone(program, Encoded((5, 9, 0), 2))[0].argmax())]
    right = Encoded((5, 9, best[0]), 2)
    assert score_answers(program, interpret.in_memory(program), [right, EXAMPLES[0]], 2).exact == 0.5
    half = Encoded((5, 9, best[0], (best[0] + 1) % 384), 2)
    wrong_second = int(alone(program, half)[1].argmax()) != half.ids[3]
    assert wrong_second and score_answers(program, interpret.in_memory(program), [half], 1).exact == 0.0


def test_batches_are_of_like_length():
    assert [[len(e.ids) for e in part] for part in by_length(EXAMPLES, 3)] == [[2, 3, 5], [9]]

"""Choosing tokens under Triton's interpreter, against the references: the same tokens."""

import pytest
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.kernels.sampling import greedy, greedy_reference, sample, sample_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random(rows, vocab, dtype=torch.float32, seed=0):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocab", [(1, 1), (3, 100), (2, 1000), (5, 64)])
def test_greedy(rows, vocab, dtype):
    logits = random(rows, vocab, dtype)
    for chunk in (64, 4096):
        assert torch.equal(greedy(logits, chunk=chunk), greedy_reference(logits))


def test_greedy_takes_the_smaller_of_equals():
    logits = torch.zeros(5, 200)
    logits[1, 130] = logits[1, 70] = logits[1, 199] = 2
    logits[2, 5:] = 1
    logits[3] = float("-inf")
    logits[4, :199] = float("-inf")
    assert greedy(logits, chunk=64).tolist() == [0, 70, 5, 0, 199] == greedy_reference(logits).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocab,chunk", [(1, 1, 64), (6, 100, 64), (4, 500, 128), (3, 64, 64), (2, 300, 512)])
def test_tokens_are_those_of_the_reference(rows, vocab, chunk, dtype):
    """Sums of a few hundred numbers, in another order, are off by 2^-20 of themselves or so: that one meets its bound
    within that is possible, and does not happen here."""
    logits, dice = random(rows, vocab, dtype), torch.Generator().manual_seed(vocab)
    temperature, top_p, uniform = torch.rand(3, rows, generator=dice).unbind(0)
    temperature = temperature + 0.3
    found = sample(logits, temperature, top_p, uniform, chunk=chunk)
    assert torch.equal(found, sample_reference(logits, temperature, top_p, uniform))


def test_the_ends():
    """top_p 0: the likeliest; 1: all; uniform 0: the first that is kept; almost 1: the last. Impossible ones never."""
    logits = random(4, 130)
    logits[:, :3] = float("-inf")
    logits[:, 128:] = float("-inf")
    logits[:2, 70] = 30.0
    temperature, almost = torch.ones(4), 1 - 2**-24
    top_p, uniform = torch.tensor([0, 0, 1, 1.0]), torch.tensor([0, almost, 0, almost])
    found = sample(logits, temperature, top_p, uniform, chunk=64)
    assert torch.equal(found, sample_reference(logits, temperature, top_p, uniform))
    assert found.tolist()[:3] == [70, 70, 3] and 64 <= int(found[3]) < 128


def test_the_reference_is_top_p():
    """Against the textbook: sort, keep the fewest that reach p, renormalise. No two of these logits share a level."""
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.5, -1.0, 2.0]]).expand(64, -1).contiguous()
    uniform = (torch.arange(64) + 0.5) / 64
    for p, t in ((0.5, 1.0), (0.9, 1.0), (0.9, 2.0), (0.3, 0.5), (1.0, 1.0)):
        probability = (logits[0].double() / t).softmax(0)
        falling, order = probability.sort(descending=True)
        keep = order[: int((falling.cumsum(0) < p - 1e-12).sum()) + 1].sort().values
        running = probability[keep].cumsum(0) / probability[keep].sum()
        wanted = keep[(running[None] <= uniform[:, None]).sum(1)]
        found = sample_reference(logits, torch.full((64,), t), torch.full((64,), p), uniform)
        assert torch.equal(found, wanted)


def test_equals_are_kept_together():
    logits = torch.zeros(8, 70)
    uniform = torch.arange(8) / 8 + 0.01
    found = sample(logits, torch.ones(8), torch.full((8,), 0.1), uniform, chunk=64)
    assert torch.equal(found, (uniform * 70).floor().long())


def test_what_does_not_belong_together_is_refused():
    logits, one = torch.zeros(2, 8), torch.ones(2)
    for words, call in (
        (r"int64 \[2, 8\]", lambda: greedy(logits.long())),
        (r"temperature is float64 \[2\]", lambda: sample(logits, one.double(), one, one)),
        (r"uniform is float32 \[1\]", lambda: sample(logits, one, one, one[:1])),
    ):
        with pytest.raises(TpvcError, match=words):
            call()


@pytest.mark.slow
def test_compiles(compiles):
    launches = []
    for dtype, vocab in ((torch.float16, 32000), (torch.bfloat16, 50257), (torch.float32, 262144)):
        logits, one = torch.zeros(2, vocab, dtype=dtype), torch.ones(2)
        greedy(logits, run=launches.append)
        sample(logits, one, one, one, run=launches.append)
    compiles(launches)

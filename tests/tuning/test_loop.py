"""The optimiser loop on a problem small enough to know the answer: schedule, order of the data, best kept, resume."""

from contextlib import suppress
from itertools import pairwise

import pytest
import torch

from tpvc.compiler.store import BlockStore
from tpvc.compiler.tuning.loop import TOGETHER, Diverged, Schedule, batch_indices, descend, tune
from tpvc.compiler.tuning.loss import Answers

SCHEDULE = Schedule(steps=37, batch=2, lr=0.5, warmup=0.1, seed=3)
LENGTHS = [5, 3, 8, 1, 9, 2, 7, 4, 6]


class Problem:
    """Find the mean of points; `seen` records the batches, `stop` raises in the middle like a killed run."""

    def __init__(self, stop=None, worse_after=None):
        self.points = torch.arange(9.0)[:, None] * torch.tensor([1.0, -1.0])
        self.params = {"x": torch.zeros(2, requires_grad=True)}
        self.seen, self.stop, self.worse_after = [], stop, worse_after

    def loss(self, indices):
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append(indices)
        return (self.params["x"] - self.points[indices]).square().mean()

    def validate(self):
        value = (self.params["x"].detach() - self.points.mean(0)).square().mean().item()
        late = self.worse_after is not None and len(self.seen) > self.worse_after
        return Answers(1e9 if late else value, 0.5, 9)

    def run(self, directory, masks=None, schedule=SCHEDULE):
        store = BlockStore.open(directory, {})
        return tune(self.params, masks or {}, LENGTHS, self.loss, self.validate, schedule, store)


def test_it_learns_and_keeps_the_curve(tmp_path):
    found = Problem().run(tmp_path)
    assert found.checks[-1][1] < 0.05 * found.checks[0][1]
    assert [s for s, _, _ in found.checks] == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 37]
    assert [s for s, _ in found.curve] == [s for s, _, _ in found.checks[1:]]


def test_the_rate_climbs_and_falls_to_zero():
    rates = [SCHEDULE.rate(s) for s in range(SCHEDULE.steps)]
    assert rates[:4] == [0.5 * k / 4 for k in (1, 2, 3, 4)]
    assert all(a > b for a, b in pairwise(rates[3:]))
    assert rates[-1] == 0.5 / 34
    assert SCHEDULE.rate(SCHEDULE.steps) == 0


def test_every_epoch_sees_every_example_once():
    """18 batches of 2 are 4 epochs of 9 examples; stacks and epochs do not fall together."""
    schedule = Schedule(steps=9 * TOGETHER, batch=2, lr=1, warmup=0, seed=0)
    seen = [i for s in range(schedule.steps) for i in batch_indices(LENGTHS, schedule, s)]
    assert sorted(seen) == sorted(list(range(9)) * (len(seen) // 9))
    other = Schedule(steps=9 * TOGETHER, batch=2, lr=1, warmup=0, seed=1)
    assert seen != [i for s in range(schedule.steps) for i in batch_indices(LENGTHS, other, s)]


def test_batches_hold_examples_of_like_length():
    lengths = [(7 * i) % 64 for i in range(64)]
    schedule = Schedule(steps=8, batch=8, lr=1, warmup=0, seed=0)
    for step in range(8):
        own = sorted(lengths[i] for i in batch_indices(lengths, schedule, step))
        assert own[-1] - own[0] == 7


def test_the_best_by_validation_is_kept_even_if_it_is_the_start(tmp_path):
    early = Problem(worse_after=8).run(tmp_path / "a")
    assert early.step == 8
    assert torch.equal(Problem(worse_after=0).run(tmp_path / "b").best["x"], torch.zeros(2))


def test_masked_numbers_never_move(tmp_path):
    found = Problem().run(tmp_path, masks={"x": torch.tensor([1.0, 0.0])})
    assert found.best["x"][1] == 0 and found.best["x"][0] != 0


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = Problem().run(tmp_path / "whole")
    for stop in (0, 3, 4, 5, 23, 36):
        directory = tmp_path / f"stopped{stop}"
        with suppress(KeyboardInterrupt):
            Problem(stop=stop).run(directory)
        rest = Problem()
        found = rest.run(directory)
        assert len(rest.seen) == SCHEDULE.steps - stop // 4 * 4
        assert torch.equal(found.best["x"], whole.best["x"])
        assert (found.curve, found.checks, found.step) == (whole.curve, whole.checks, whole.step)
    again = Problem()
    assert torch.equal(again.run(tmp_path / "whole").best["x"], whole.best["x"]) and not again.seen


def _counting(directory, stop=None, bad=None):
    """descend on the same problem, with steps that also count themselves in a tensor; (what it returned, the count)."""
    problem, count = Problem(), torch.zeros((), dtype=torch.int64)

    def step(optimizer, indices, number):
        if number == stop:
            raise KeyboardInterrupt
        if number == bad:
            return [float("nan"), 0.0]
        optimizer.zero_grad()
        loss = problem.loss(indices)
        loss.backward()
        optimizer.step()
        count.add_(number)
        return [loss.item(), float(number)]

    store = BlockStore.open(directory, {})
    found = descend(
        problem.params, LENGTHS, step, lambda: [problem.validate().loss, 0.5], SCHEDULE, store, also={"count": count}
    )
    return found, int(count), problem.params["x"].detach()


def test_what_steps_change_beside_the_parameters_is_kept_too(tmp_path):
    whole, count, x = _counting(tmp_path / "whole")
    assert count == sum(range(37)) and [c[2] for c in whole.curve][:2] == [1.5, 5.5]
    with suppress(KeyboardInterrupt):
        _counting(tmp_path / "stopped", stop=23)
    assert _counting(tmp_path / "stopped")[1] == count
    again, count_again, x_again = _counting(tmp_path / "whole")  # finished: as it was left
    assert count_again == count and torch.equal(x_again, x) and again.curve == whole.curve


def test_a_run_that_diverges_says_how_far_it_was(tmp_path):
    with pytest.raises(Diverged, match="the loss is nan at step 18; expected a finite number") as caught:
        _counting(tmp_path, bad=18)
    assert caught.value.step == 18 and caught.value.tuned.checks[-1][0] == 16
    assert 0 < caught.value.tuned.step <= 16 and BlockStore(tmp_path).finished(4) is not None

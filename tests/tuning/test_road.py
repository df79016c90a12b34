"""What is learned when a RoAd adapter is tuned: which numbers there are, which move, and that gradients are right."""

from math import prod

import pytest
import torch

from tpvc.compiler import frontends, interpret
from tpvc.compiler.adapters.road import halves
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import OPS
from tpvc.compiler.program import Grid, linears
from tpvc.compiler.store import BlockStore
from tpvc.compiler.tuning import road
from tpvc.compiler.tuning.examples import Encoded
from tpvc.compiler.tuning.loss import batch_of
from tpvc.passes.round_to_nearest import RoundToNearest

EXAMPLES = [Encoded(tuple((7 * i + 3 * j) % 384 for j in range(5 + i % 4)), 3) for i in range(8)]


@pytest.fixture(scope="module")
def program(tiny_llama):
    return frontends.load(tiny_llama)


def trained(program, variant="road_1", pairs="all", steps=3, group=None, lr=0.05):
    made = road.trainee(program, road.shape(program, variant, group, road.ALL, pairs))
    loss = road.loss_of(made, interpret.in_memory(program), lambda i: batch_of([EXAMPLES[j] for j in i]))
    optimizer = torch.optim.AdamW(list(made.params.values()), lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        value = loss(list(range(8)))
        optimizer.zero_grad()
        value.backward()
        for name, mask in made.masks.items():
            made.params[name].grad.mul_(mask)
        optimizer.step()
        losses.append(value.item())
    return made, losses


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_the_untrained_adapter_is_the_identity_and_training_lowers_the_loss(program, variant):
    fresh = road.trainee(program, road.shape(program, variant, None, road.ALL, "all"))
    ids = torch.tensor([EXAMPLES[3].ids])
    weight = fresh.weight(interpret.in_memory(program))
    with torch.no_grad():
        adapted = interpret.logits(fresh.program, ids, weight=weight, adapter_ids=torch.tensor([0]))
    assert torch.equal(adapted, interpret.logits(program, ids))
    _, losses = trained(program, variant, steps=12)
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize(("variant", "each"), [("road_1", 1), ("road_2", 2), ("road_4", 4)])
def test_counts_and_the_dead_half_of_road_4(program, variant, each):
    made, _ = trained(program, variant, steps=4)
    outputs = sum(program.params[n.params["weight"]].shape[0] for n in linears(program.nodes) if n.block is not None)
    learned = made.road("x", made.params)
    assert learned.trainables == each * outputs
    optimised = sum(prod(p.shape) for p in made.params.values())
    assert optimised == (3 if variant == "road_4" else each) * outputs
    if variant == "road_4":
        for rotation in learned.rotations.values():
            cosines, sines = rotation.theta.view(-1, 2, rotation.group).unbind(1)
            assert not cosines.any() and sines.any()


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_the_halves_of_the_pairs_stay_apart(program, variant):
    """What `first` moves, `second` leaves at the identity, and the other way round; nothing is left out."""
    moved = []
    for pairs in ("first", "second"):
        made, _ = trained(program, variant, pairs)
        own = []
        for rotation in made.road("x", made.params).rotations.values():
            cosine, sine = rotation.vectors
            changed = (cosine != 1) | (sine != 0)
            lo, hi = halves(changed, rotation.group)
            own.append((lo | hi).reshape(-1))
        moved.append(torch.cat(own))
    assert torch.equal(moved[0], ~moved[1])
    assert moved[0].float().mean() == 0.5


def test_an_adapter_is_tuned_on_integers_and_they_stay_as_they_are(program, tmp_path):
    store = BlockStore.open(tmp_path, {})
    rounded = RoundToNearest(Grid(4, 32, False), store)(program)
    before = {n: p.read().codes.clone() for n, p in rounded.params.items() if p.grid is not None}
    made, losses = trained(rounded, steps=12)
    assert losses[-1] < losses[0] - 0.2
    assert before and all(torch.equal(before[n], made.program.params[n].read().codes) for n in before)


def test_no_gradient_of_a_weight_is_ever_made(program):
    base = interpret.in_memory(program)
    made = road.trainee(program, road.shape(program, "road_1", None, road.ALL, "all"))
    loss = road.loss_of(made, base, lambda i: batch_of([EXAMPLES[j] for j in i]))([0, 1])
    loss.backward()
    assert all(base(n).grad is None and not base(n).requires_grad for n in program.params)
    assert all(p.grad is not None and p.grad.any() for p in made.params.values())


def test_gradients_agree_with_finite_differences(program):
    """float64 weights and vectors: the difference quotient of one number against its gradient."""
    made = road.trainee(program, road.shape(program, "road_2", None, ["v_proj", "down_proj"], "all"))
    params = {n: (p.detach().double() + 0.1 * torch.randn_like(p, dtype=torch.float64)) for n, p in made.params.items()}
    held = {n: p.read().double() for n, p in program.params.items()}
    batch = batch_of(EXAMPLES)

    def loss(theta, alpha):
        from dataclasses import replace

        from tpvc.compiler.tuning.loss import answer_logits

        weight = replace(made, params={"theta": theta, "alpha": alpha}).weight(held.__getitem__)
        logits = answer_logits(made.program, weight, batch, 0, OPS)
        return torch.nn.functional.cross_entropy(logits.double(), batch.targets)

    theta, alpha = (params[n].requires_grad_() for n in ("theta", "alpha"))
    for at in (5, 100, 150):
        for which in (theta, alpha):
            with torch.no_grad():
                step = torch.zeros_like(which)
                step[at] = 1e-3
                shifted = [[p + s * step if p is which else p for p in (theta, alpha)] for s in (1, -1)]
                slope = (loss(*shifted[0]) - loss(*shifted[1])) / 2e-3
            (grad,) = torch.autograd.grad(loss(theta, alpha), which)
            # norms and rotary angles are float32, so a loss near 6 carries errors of about 6e-7 over a step of 2e-3,
            # and the central difference is off by about step^2
            assert abs(slope - grad[at]) <= 6e-7 / 2e-3 + 1e-5


def test_targets_groups_and_bad_wishes(program):
    chosen = road.shape(program, "road_1", None, ["q_proj", "v_proj"], "all")
    assert [t.split(".")[-1] for t in chosen.targets] == ["q_proj", "v_proj"] * 2
    assert road.shape(program, "road_1", None, road.ALL, "all").group == 32  # k and v have 32 outputs
    for wish, words in (
        (("road_1", None, ["query"], "all"), "no linear called 'query'"),
        (("road_3", None, road.ALL, "all"), "expected one of road_1, road_2, road_4"),
        (("road_1", 48, road.ALL, "all"), "does not divide"),
        (("road_1", 7, road.ALL, "all"), "even number"),
        (("road_1", None, road.ALL, "third"), "expected one of all, first, second"),
        (("road_1", None, [], "all"), "no targets were named"),
        (("road_1", None, "query", "all"), "no linear called 'query'"),
    ):
        with pytest.raises(TpvcError, match=words):
            road.shape(program, *wish)

"""The algebra of task prompt vectors, exact in float32, against equations taken in float64."""

import math

import pytest
import torch

from tpvc.compiler.adapters import combine_prompts as algebra
from tpvc.compiler.adapters.combine_prompts import METHODS, applied, check_together, scale, similarity, vector_of
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.errors import TpvcError

SHAPE = (5, 8)


def drawn(seed, spread=1.0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def prompt(name, seed, start=0, **known):
    """Values far larger than the start they came from, so that start + (values - start) is not the values."""
    return Prompt(name, drawn(seed, 30.0), drawn(start, 0.01) if isinstance(start, int) else start, **known)


def of(*taus, start=None):
    """Prompts with exactly these vectors: they start from zero."""
    taus = [torch.tensor(t, dtype=torch.float32) for t in taus]
    zero = torch.zeros_like(taus[0]) if start is None else start
    return [Prompt(name, t, zero) for name, t in zip("abcdef", taus, strict=False)]


def add(name, prompts, start, weights=None, scale=1.0):
    check_together(prompts, start)
    vector = vector_of("task_arithmetic", prompts, weights=weights)
    return applied(name, prompts, start, vector, scale)


def ulp(x):
    """The distance to the next float32 of the magnitude of `x`."""
    x = x.abs().float()
    return (torch.nextafter(x, torch.tensor(math.inf)) - x).double()


def test_vectors_are_a_group():
    a, b = prompt("a", 1), prompt("b", 2)
    zero = Prompt("zero", a.start, a.start)
    minus_b = Prompt("minus", b.start, b.values)  # its vector is start - values
    assert torch.equal(vector_of("task_arithmetic", [a, zero]), a.vector)
    assert torch.equal(vector_of("task_arithmetic", [a, b]), vector_of("task_arithmetic", [b, a]))
    assert torch.equal(vector_of("task_arithmetic", [minus_b], weights=[-1]), b.vector)
    assert not vector_of("task_arithmetic", [b, minus_b]).any()
    assert not vector_of("task_arithmetic", [a], weights=[0]).any()
    assert torch.equal(add("s", [a, b], a.start).values, add("s", [b, a], a.start).values)
    assert not torch.equal(add("s", [a, b], a.start).values, a.values)


def test_lambda_0_is_the_start_bit_for_bit_even_its_signed_zeros():
    a, b = prompt("a", 1), prompt("b", 2)
    a.start[0] = b.start[0] = -0.0
    for made in (add("s", [a, b], a.start, scale=0), scale("s", a, 0)):
        assert torch.equal(made.values.view(torch.int32), a.start.view(torch.int32))
        assert torch.equal(made.start, a.start)


def test_a_prompt_by_itself_comes_back_bit_for_bit():
    a, b = prompt("a", 1), prompt("b", 2)
    assert not torch.equal(a.start + a.vector, a.values), "otherwise this test says nothing"
    alone = (add("s", [a], a.start), scale("s", a, 1), add("s", [a, b], a.start, weights=[1, 0]))
    for made in alone:
        assert torch.equal(made.values.view(torch.int32), a.values.view(torch.int32))
    larger = torch.maximum(a.start.abs(), a.values.abs())
    assert bool(((a.start + a.vector - a.values).abs().double() <= ulp(larger)).all())


def test_across_starts_the_three_terms_are_within_an_ulp():
    one, two = prompt("one", 1, start=10), prompt("two", 2, start=11)
    made = add("s", [two], one.start)
    wanted = one.start.double() + two.values.double() - two.start.double()
    assert bool(((made.values.double() - wanted).abs() <= ulp(torch.maximum(two.values.abs(), wanted.abs()))).all())
    assert torch.equal(made.start, one.start)


def test_sums_are_weighted_and_scaled_and_not_a_mean():
    a, b = of([[1.0, 2.0]], [[4.0, -8.0]])
    start = torch.tensor([[0.5, 0.5]])
    assert add("s", [a, b], start).values.tolist() == [[5.5, -5.5]]
    assert add("s", [a, b], start, weights=[2, -0.5], scale=0.5).values.tolist() == [[0.5, 4.5]]
    assert scale("n", a, -1).values.tolist() == [[-1.0, -2.0]]
    assert scale("n", a, 2.5).values.tolist() == [[2.5, 5.0]]


def test_negating_twice_is_within_rounding_and_of_the_same_start():
    a = prompt("a", 1)
    back = scale("b", scale("n", a, -1), -1)
    assert torch.equal(back.start, a.start)
    assert bool(((back.values - a.values).abs().double() <= 2 * ulp(a.values)).all())


def test_the_given_prompts_do_not_change():
    a, b = prompt("a", 1), prompt("b", 2)
    before = [t.clone() for p in (a, b) for t in (p.values, p.start)]
    for method in METHODS:
        vector_of(method, [a, b], densities=[0.5, 0.5])
    for made in (add("s", [a], a.start), add("s", [a, b], a.start, scale=0)):
        made.values.zero_()
        made.start.zero_()
    assert all(torch.equal(x, y) for x, y in zip(before, (a.values, a.start, b.values, b.start), strict=True))


def test_ties_by_hand():
    """Half of each is kept: (5, 0, 0, -4) and (-3, 0, 2, 0) and (0, 1, 0, -2). Signs of the sums 2, 1, 2, -6."""
    parts = of([[5.0, 0.1, 0.2, -4.0]], [[-3.0, -1.0, 2.0, 0.5]], [[0.1, 1.0, 0.3, -2.0]])
    assert vector_of("ties", parts, densities=[0.5] * 3).tolist() == [[5.0, 1.0, 2.0, -3.0]]
    # twice the first: 10 - 3, and (2 * -4 - 2) / (2 + 1)
    told = vector_of("ties", parts, weights=[2, 1, 1], densities=[0.5] * 3)
    torch.testing.assert_close(told, torch.tensor([[5.0, 1.0, 2.0, -10 / 3]]))
    # a negative weight is the negated vector: signs of 5 + 3, 1, -2, -6
    assert vector_of("ties", parts, weights=[1, -1, 1], densities=[0.5] * 3).tolist() == [[4.0, 1.0, -2.0, -3.0]]


def test_ties_elects_no_sign_where_the_sum_is_zero_and_keeps_at_least_one_entry():
    a, b = of([[1.0, 3.0]], [[-1.0, 1.0]])
    assert vector_of("ties", [a, b]).tolist() == [[0.0, 2.0]]
    assert vector_of("ties", [a], densities=[1e-6]).tolist() == [[0.0, 3.0]]
    equal = of([[2.0, -2.0, 2.0, 2.0]])
    assert vector_of("ties", equal, densities=[0.5]).tolist() == [[2.0, -2.0, 0.0, 0.0]], "of equal ones the first"
    assert torch.equal(vector_of("ties", [prompt("a", 1)]), prompt("a", 1).vector)


def test_dare_drops_with_the_seed_and_makes_up_for_it():
    a = Prompt("a", drawn(1, shape=(100, 100)), torch.zeros(100, 100))
    made = vector_of("dare_linear", [a], densities=[0.25], seed=3)
    kept = made != 0
    assert torch.equal(made[kept], a.vector[kept] / 0.25)
    # 10,000 draws with deviation sqrt(.25 * .75 / 10000) = 0.0043
    assert abs(float(kept.float().mean()) - 0.25) < 5 * 0.0043
    assert torch.equal(made, vector_of("dare_linear", [a], densities=[0.25], seed=3))
    assert not torch.equal(made, vector_of("dare_linear", [a], densities=[0.25], seed=4))
    assert torch.equal(vector_of("dare_linear", [a]), a.vector), "density 1 drops nothing"
    two = vector_of("dare_linear", [a, Prompt("b", a.values, a.start)], weights=[1, -1], densities=[0.5, 0.5])
    assert bool(two.any()), "every prompt is dropped by its own draws"


def test_dare_ties_sums_what_agrees_and_does_not_divide():
    parts = of([[5.0, 1.0]], [[-3.0, 2.0]], [[1.0, -4.0]])
    assert vector_of("dare_ties", parts).tolist() == [[6.0, -4.0]]
    assert vector_of("ties", parts).tolist() == [[3.0, -4.0]]


def test_both_cosines_by_hand():
    """Flattened (1 0 0 1) and (0 1 1 0) have nothing in common, their token means (1/2 1/2) everything."""
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    flattened, means = similarity({"x": x, "y": y, "minus": -x})
    assert flattened == [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]
    assert means == [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]


def test_cosines_are_symmetric_and_exactly_1_with_themselves():
    vectors = {str(seed): drawn(seed, 10.0 ** (seed - 3)) for seed in range(6)}
    for matrix in similarity(vectors):
        for i, row in enumerate(matrix):
            assert row[i] == 1
            assert row == [other[i] for other in matrix]
    wanted = torch.nn.functional.cosine_similarity(drawn(1).flatten(), drawn(2).flatten(), 0)
    assert similarity(vectors)[0][1][2] == pytest.approx(float(wanted), abs=1e-6)


def test_cosines_of_zero_are_refused():
    with pytest.raises(TpvcError, match="'b' is zero and has no direction"):
        similarity({"a": drawn(1), "b": torch.zeros(SHAPE)})
    with pytest.raises(TpvcError, match="'b' has the mean zero over its tokens"):
        similarity({"a": drawn(1, shape=(2, 2)), "b": torch.tensor([[1.0, 2.0], [-1.0, -2.0]])})


def test_starts_that_differ_are_said():
    a, b, c = prompt("a", 1), prompt("b", 2), prompt("c", 3, start=9)
    assert check_together([a, b]) is None and check_together([a, b], a.start) is None
    assert check_together([a, b, c]).startswith("'c' was tuned from another start than 'a'")
    said = check_together([a, b, c], c.start)
    assert said.startswith("'a', 'b' were tuned from another start than the one that the vectors are added to")


@pytest.mark.parametrize(
    "other, told",
    [
        (Prompt("b", torch.ones(4, 8), torch.ones(4, 8)), "'a' has 5 virtual tokens of 8 numbers, 'b' 4 virtual"),
        (Prompt("b", torch.ones(5, 9), torch.ones(5, 9)), "'a' has 5 virtual tokens of 8 numbers, 'b' 5 virtual"),
        (prompt("b", 2, base="y" * 64), "'a' and 'b' were tuned for different models .x{12} and y{12}."),
        (prompt("b", 2, tokenizer="y" * 64), "'a' and 'b' were tuned for different tokenizers"),
        (prompt("a", 2), "two prompts are called 'a'"),
        (prompt("b", 2, start=None), "prompt 'b' does not say which values it started from"),
    ],
)
def test_what_does_not_go_together_is_refused(other, told):
    a = prompt("a", 1, base="x" * 64, tokenizer="x" * 64)
    with pytest.raises(TpvcError, match=told):
        check_together([a, other])
    with pytest.raises(TpvcError, match=told):
        add("s", [a, other], a.start)


def test_unknown_fingerprints_go_with_known_ones_and_known_ones_stay():
    a, b, c = prompt("a", 1), prompt("b", 2, base="x", tokenizer="t"), prompt("c", 3, base="y")
    made = add("s", [a, b], a.start)
    assert (made.base, made.tokenizer) == ("x", "t")
    with pytest.raises(TpvcError, match="'b' and 'c' were tuned for different models"):
        check_together([a, b, c])


def test_numbers_that_do_not_fit_are_refused():
    a, b = prompt("a", 1), prompt("b", 2)
    for weights, told in (([1], "weights 1 for 2"), ([], "weights none for 2"), ([1, math.nan], "weights 1, nan for")):
        with pytest.raises(TpvcError, match=told):
            add("s", [a, b], a.start, weights=weights)
    for density in (0, -0.5, 1.5):
        with pytest.raises(TpvcError, match=f"the density is {density:g}"):
            vector_of("ties", [a], densities=[density])
    with pytest.raises(TpvcError, match="the method is 'slerp'; expected one of task_arithmetic"):
        vector_of("slerp", [a])
    with pytest.raises(TpvcError, match="no prompts were given"):
        add("s", [], a.start)
    with pytest.raises(TpvcError, match=r"the start holds \[1, 1\] numbers"):
        add("s", [a], torch.ones(1, 1))
    for factor, told in ((1e38, "leaves float32"), (math.inf, "lambda is inf"), (math.nan, "lambda is nan")):
        with pytest.raises(TpvcError, match=told):
            scale("s", a, factor)
    assert algebra.METHODS == ("task_arithmetic", "ties", "dare_linear", "dare_ties")

"""Composed adapters against their parts applied one after the other."""

import pytest
import torch

from tpvc.compiler.adapters.compose_road import by_pair, disjoint, from_pairs, interpolate, product
from tpvc.compiler.adapters.road import Road, Rotation, identity, rotate
from tpvc.compiler.errors import TpvcError

VARIANTS = ("road_1", "road_2", "road_4")
EPS = torch.finfo(torch.float32).eps
each = pytest.mark.parametrize("variant", VARIANTS)
each_group = pytest.mark.parametrize("group", [2, 8, 64])
N = 64


def h():
    return torch.randn(5, N, generator=torch.Generator().manual_seed(9))


def applied(x, *rotations, dtype=None):
    for r in rotations:
        x = rotate(x, *(v.to(dtype or v.dtype) for v in r.vectors), r.group)
    return x


def same(a, b):
    return torch.equal(a.theta, b.theta) and torch.equal(a.alpha, b.alpha)


@pytest.fixture
def split(drawn):
    """(variant, group, share of the pairs, seed) -> (first, second): rotations that move either side of the share."""

    def make(variant, group, count=N // 4):
        first = torch.arange(N // 2)[:, None] < count
        still, ends = by_pair(identity(variant, group, N)), []
        for seed, chosen in ((1, first), (2, ~first)):
            own = by_pair(drawn(variant, group, N, seed))
            ends.append(
                from_pairs(variant, group, *(torch.where(chosen, o, s) for o, s in zip(own, still, strict=True)))
            )
        return ends

    return make


def roads(*rotations, linear="fc"):
    return [Road(name, {linear: r}) for name, r in zip("abcdef", rotations, strict=False)]


@each
@each_group
def test_numbers_of_a_pair_lie_together(variant, group, dense, drawn):
    rotation = drawn(variant, group, N)
    assert same(from_pairs(variant, group, *by_pair(rotation)), rotation)
    theta, alpha = (v.clone() for v in by_pair(identity(variant, group, N)))
    theta[5], alpha[5] = 0.3, 1.5  # pair 5 and no other
    changed = (dense(from_pairs(variant, group, theta, alpha)) - torch.eye(N, dtype=torch.float64)).abs().sum(1)
    lo = 5 // (group // 2) * group + 5 % (group // 2)
    assert changed.nonzero()[:, 0].tolist() == [lo, lo + group // 2]


@each
@each_group
def test_disjoint_halves_are_both_in_either_order_bit_for_bit(variant, group, split):
    a, b = split(variant, group)
    both = disjoint("both", roads(a, b))
    x = h()
    wanted = applied(x, a, b)
    assert not torch.equal(wanted, applied(x, a)) and not torch.equal(wanted, applied(x, b))
    assert torch.equal(applied(x, b, a), wanted)
    assert torch.equal(applied(x, both.rotations["fc"]), wanted)
    assert same(disjoint("both", roads(b, a)).rotations["fc"], both.rotations["fc"])
    assert both.origin == {
        "composed": "disjoint",
        "of": ["a", "b"],
        "weights": [1.0, 1.0],
        "variant": variant,
        "group": group,
    }


@each
def test_a_number_in_one_output_makes_the_pair_an_adapters_own(variant):
    a, b = identity(variant, 8, N), identity(variant, 8, N)
    a.theta[0] = 0.5
    b.alpha[{"road_1": 0, "road_2": 4, "road_4": 12}[variant]] = 2.0  # outputs 0 and 4; road_4: the sine of output 4
    with pytest.raises(TpvcError) as error:
        disjoint("both", roads(a, b))
    assert str(error.value).startswith("'a' and 'b' both move outputs 0 and 4 of 'fc', one of 1 pairs")


@each
@each_group
def test_overlaps_are_named_and_counted_over_all_linears(variant, group, split):
    (a, _), (_, b) = split(variant, group, 20), split(variant, group, 17)
    lo = 17 // (group // 2) * group + 17 % (group // 2)
    one, two = Road("one", {"q": a, "k": a}), Road("two", {"q": b, "k": b})
    with pytest.raises(TpvcError) as error:
        disjoint("both", [one, two])
    assert str(error.value).startswith(
        f"'one' and 'two' both move outputs {lo} and {lo + group // 2} of 'q', one of 6 pairs"
    )


@each
def test_linears_of_one_adapter_only_stay_as_they_are(variant, drawn):
    a, b = drawn(variant, 8, N, 1), drawn(variant, 8, 32, 2)
    parts = [Road("a", {"q": a}), Road("b", {"k": b})]
    made = [disjoint("m", parts), interpolate("m", positive(parts), [1, 1])]
    made += [product("m", parts)] if variant == "road_1" else []
    for road, of in zip(made, (parts, positive(parts), parts), strict=False):
        assert list(road.rotations) == ["q", "k"]
        assert same(road.rotations["q"], of[0].rotations["q"]) and same(road.rotations["k"], of[1].rotations["k"])


def positive(parts):
    """The same adapters with scales above 0."""
    return [
        Road(p.name, {n: Rotation(r.variant, r.group, r.theta, r.alpha.abs() + 0.1) for n, r in p.rotations.items()})
        for p in parts
    ]


@each_group
def test_a_product_is_one_after_the_other(group, drawn):
    """theta and alpha of the product are rounded once, by half an ulp of at most |theta| <= 8 and relative: C and S are
    off by at most (8 + 1) eps / 2 of |alpha|, and an output by that times |h_lo| + |h_hi|."""
    parts = [drawn("road_1", group, N, seed) for seed in (1, 2, 3)]
    made = product("m", roads(*parts)).rotations["fc"]
    exact = [Rotation("road_1", group, r.theta.double(), r.alpha.double()) for r in parts]
    x = h().double()
    got = applied(x, Rotation("road_1", group, made.theta.double(), made.alpha.double()))
    wide = 4.5 * EPS * float(made.alpha.abs().max()) * 2 * float(x.abs().max())
    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
        torch.testing.assert_close(got, applied(x, *(exact[i] for i in order)), rtol=0, atol=wide)


def test_products_commute_bit_for_bit(drawn):
    a, b = (drawn("road_1", 8, N, seed) for seed in (1, 2))
    ab, ba = product("m", roads(a, b)), product("m", roads(b, a))
    assert same(ab.rotations["fc"], ba.rotations["fc"])
    assert ab.origin["of"] == ["a", "b"] and ab.origin["composed"] == "product"


def test_road_2_does_not_commute():
    """R_A scales the first output of the pair by 2, R_B turns both by a right angle: A B != B A."""
    a = Rotation("road_2", 2, torch.zeros(2), torch.tensor([2.0, 1.0]))
    b = Rotation("road_2", 2, torch.full((2,), torch.pi / 2), torch.ones(2))
    x = torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(applied(x, a, b), torch.tensor([[0.0, 2.0]]), rtol=0, atol=2 * EPS)
    torch.testing.assert_close(applied(x, b, a), torch.tensor([[0.0, 1.0]]), rtol=0, atol=2 * EPS)


@pytest.mark.parametrize("variant", ["road_2", "road_4"])
def test_other_products_are_refused(variant, drawn):
    with pytest.raises(TpvcError, match=f"'a' is {variant}, whose products depend on the order"):
        product("m", roads(drawn(variant, 8, N), drawn(variant, 8, N, 1)))


@each
def test_weights_of_1_and_0_give_the_adapters_back_bit_for_bit(variant, drawn):
    parts = positive(roads(*(drawn(variant, 8, N, seed) for seed in (1, 2))))
    for weights, index in (([1, 0], 0), ([0, 1], 1)):
        made = interpolate("m", parts, weights)
        assert same(made.rotations["fc"], parts[index].rotations["fc"])
        assert made.origin["weights"] == [float(w) for w in weights]


def test_halfway_is_the_mean_angle_and_the_geometric_mean():
    a = Rotation("road_1", 2, torch.tensor([0.25]), torch.tensor([1.0]))
    b = Rotation("road_1", 2, torch.tensor([0.75]), torch.tensor([4.0]))
    made = interpolate("m", roads(a, b), [0.5, 0.5]).rotations["fc"]
    assert (made.theta.tolist(), made.alpha.tolist()) == ([0.5], [2.0])
    twice = interpolate("m", roads(a), [2]).rotations["fc"]  # one adapter, applied twice
    assert (twice.theta.tolist(), twice.alpha.tolist()) == ([0.5], [1.0])
    one_each = interpolate("m", roads(a, b), [1, 1]).rotations["fc"]
    assert same(one_each, product("m", roads(a, b)).rotations["fc"])


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan")])
def test_scales_without_a_logarithm_are_refused(scale):
    bad = identity("road_2", 8, N)
    bad.alpha[3] = scale
    with pytest.raises(TpvcError, match="'b' scales 'fc' by"):
        interpolate("m", roads(identity("road_2", 8, N), bad), [1, 0])


@pytest.mark.parametrize(
    "weights, told", [([1], "1 for 2"), ([], "none for 2"), ([1, float("inf")], "1, inf for 2"), ([1, 2, 3], "1, 2, 3")]
)
def test_weights_that_do_not_fit_are_refused(weights, told):
    still = identity("road_1", 8, N)
    with pytest.raises(TpvcError, match=f"found the weights {told}"):
        interpolate("m", roads(still, still), weights)


def test_results_beyond_float32_are_refused():
    large = Rotation("road_1", 2, torch.zeros(1), torch.tensor([1e30]))
    with pytest.raises(TpvcError, match="the rotation of 'fc' leaves float32"):
        product("m", roads(large, large))


@pytest.mark.parametrize("compose", [disjoint, product, lambda name, parts: interpolate(name, parts, [1] * len(parts))])
def test_adapters_of_different_kinds_are_refused(compose):
    one = identity("road_1", 8, N)
    for other in (identity("road_1", 2, N), identity("road_2", 8, N)):
        with pytest.raises(TpvcError, match=r"found road_1 in groups of 8 .'a'. and road_"):
            compose("m", roads(one, other))
    with pytest.raises(TpvcError, match="the adapters have 32 and 64 outputs for 'fc'"):
        compose("m", roads(one, identity("road_1", 8, 32)))
    with pytest.raises(TpvcError, match="no adapters were given"):
        compose("m", [])
    with pytest.raises(TpvcError, match="found adapters without rotations"):
        compose("m", [Road("a", {})])

"""RoAd's algebra against its definition: a dense block-diagonal R in float64, autograd, and published counts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpvc.compiler.adapters import road
from tpvc.compiler.adapters.road import (
    Road,
    Rotation,
    fold_,
    halves,
    identity,
    rotate,
    unfold_,
    vectors,
)
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import architecture
from tpvc.compiler.program import linears

VARIANTS = ("road_1", "road_2", "road_4")
GROUPS = (2, 8, 32, 64)
EPS = torch.finfo(torch.float32).eps
each = pytest.mark.parametrize("variant", VARIANTS)
each_group = pytest.mark.parametrize("group", GROUPS)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@each
@each_group
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_identity_keeps_every_bit(variant, group, dtype):
    h = random(3, 5, 128).to(dtype)
    assert torch.equal(rotate(h, *identity(variant, group, 128).vectors, group), h)


@each
@each_group
def test_two_vectors_are_the_dense_matrix(variant, group, dense, drawn):
    rotation = drawn(variant, group, 128, dtype=torch.float64)
    h = random(3, 5, 128, seed=1, dtype=torch.float64)
    ours = rotate(h, *rotation.vectors, group)
    torch.testing.assert_close(ours, h @ dense(rotation).T, rtol=0, atol=1e-12)


@each
@each_group
def test_it_is_computed_in_float32_and_rounded_once(variant, group, drawn):
    h, rotation = random(4, 128).to(torch.bfloat16), drawn(variant, group, 128)
    wanted = rotate(h.float(), *rotation.vectors, group).to(torch.bfloat16)
    assert torch.equal(rotate(h, *rotation.vectors, group), wanted)


@each
@each_group
@pytest.mark.parametrize("with_bias", [True, False])
def test_folding_is_rotating_behind_the_linear(variant, group, with_bias, dense, drawn):
    rotation, size, k = drawn(variant, group, 128), 6, 40
    weight, x = random(128, k), random(size, k, seed=1)
    bias = random(128, seed=2) if with_bias else None
    unfolded = rotate(F.linear(x, weight, bias), *rotation.vectors, group)
    # Either way an output is a sum of 2 (K + 1) products C w x, each rounded at most K + 1 times in the linear's sum, 2
    # times in the block's, and 3 times in C = a cos t, which R has in float64: K + 6 eps of the sum of their sizes.
    sizes = x.abs().double() @ weight.abs().double().T + (0 if bias is None else bias.abs().double())
    limit = 2 * (k + 6) * EPS * sizes @ dense(rotation).abs().T
    for matrix in (weight,) if bias is None else (weight, bias[:, None]):
        fold_(matrix, rotation)
    assert bool(((F.linear(x, weight, bias) - unfolded).abs() <= limit).all())


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_half_precision_rounds_once(variant, dtype, drawn):
    rotation, weight, bias = drawn(variant, 8, 64), random(64, 24).to(dtype), random(64, seed=1).to(dtype)
    wide, wide_bias = weight.float(), bias.float()
    for matrix in (weight, bias[:, None], wide, wide_bias[:, None]):
        fold_(matrix, rotation)
    assert weight.dtype == bias.dtype == dtype
    assert torch.equal(weight, wide.to(dtype)) and torch.equal(bias, wide_bias.to(dtype))


@each
@each_group
def test_folding_runs_of_rows_is_folding_all_at_once(variant, group, drawn, monkeypatch):
    rotation, once, runs = drawn(variant, group, 128), random(128, 8), random(128, 8)
    monkeypatch.setattr(road, "ROWS_AT_ONCE", 1000)
    fold_(once, rotation)
    monkeypatch.setattr(road, "ROWS_AT_ONCE", 3)
    fold_(runs, rotation)
    assert torch.equal(once, runs)


@each
@each_group
def test_unfolding_takes_it_out_again(variant, group, dense):
    generator, m = torch.Generator().manual_seed(3), int(128 * road.STORED[variant])
    theta, alpha = (torch.rand(m, generator=generator) - 0.5 for _ in range(2))
    rotation = Rotation(variant, group, theta, 1 + alpha / 2)  # |t| < 0.5 and 0.75 < a < 1.25 keep det above 0.07
    weight, bias = random(128, 24), random(128, seed=1)
    before, before_bias = weight.clone(), bias.clone()
    for matrix in (weight, bias[:, None]):
        fold_(matrix, rotation)
    assert float((weight - before).abs().max()) > 0.1
    for matrix in (weight, bias[:, None]):
        unfold_(matrix, rotation, "q_proj")
    # Folding is off by 2 u of |R| |W|, u = eps / 2 (a product, a sum); numerators likewise, det by 2 u of its terms'
    # size, its relative error then being 2 u kappa, the division by u: u (5 + 2 kappa) of |R^-1| |R| |W|.
    matrix = dense(rotation)
    (c_lo, c_hi), (s_lo, s_hi) = (halves(v.double(), group) for v in rotation.vectors)
    kappa = float((((c_lo * c_hi).abs() + (s_lo * s_hi).abs()) / (c_lo * c_hi + s_lo * s_hi)).max())
    limit = EPS / 2 * (6 + 2 * kappa) * (matrix.inverse().abs() @ matrix.abs())
    assert bool(((weight - before).abs() <= limit @ before.double().abs()).all())
    assert bool(((bias - before_bias).abs() <= limit @ before_bias.double().abs()).all())


def test_a_singular_pair_is_named_and_nothing_is_changed():
    weight = random(16, 4)
    scaled_away = identity("road_1", 8, 16)
    scaled_away.alpha[6] = 0  # group 1, pair 2: outputs 10 and 14
    parallel = identity("road_2", 8, 16)
    parallel.theta[1], parallel.theta[5] = 0.3, 0.3 + math.pi / 2  # det = cos(t_lo - t_hi) = 0, but for rounding
    for rotation, outputs in ((scaled_away, "10 and 14"), (parallel, "1 and 5")):
        before = weight.clone()
        with pytest.raises(TpvcError, match=rf"'h\.0\.q' is singular at outputs {outputs}.*original weights"):
            unfold_(weight, rotation, "h.0.q")
        assert torch.equal(weight, before)


def upstream(rotation, h, g):
    """dL/dtheta and dL/dalpha of section 2.4 in closed form, for one h and one upstream gradient g [tokens, n]."""
    group = rotation.group
    (h_lo, h_hi), (g_lo, g_hi) = halves(h, group), halves(g, group)
    if rotation.variant == "road_1":
        t, a = (v.view(-1, group // 2) for v in (rotation.theta, rotation.alpha))
        z_lo, z_hi = a * (t.cos() * h_lo - t.sin() * h_hi), a * (t.cos() * h_hi + t.sin() * h_lo)
        d_t, d_a = g_hi * z_lo - g_lo * z_hi, (g_lo * z_lo + g_hi * z_hi) / a
        return d_t.sum(0).reshape(-1), d_a.sum(0).reshape(-1)
    if rotation.variant == "road_2":
        (t_lo, t_hi), (a_lo, a_hi) = halves(rotation.theta, group), halves(rotation.alpha, group)
        z_lo, z_hi = a_lo * (t_lo.cos() * h_lo - t_lo.sin() * h_hi), a_hi * (t_hi.cos() * h_hi + t_hi.sin() * h_lo)
        d_t = (
            -g_lo * a_lo * (t_lo.sin() * h_lo + t_lo.cos() * h_hi),
            g_hi * a_hi * (t_hi.cos() * h_lo - t_hi.sin() * h_hi),
        )
        d_a = g_lo * z_lo / a_lo, g_hi * z_hi / a_hi
        return tuple(torch.stack(d, -2).sum(0).reshape(-1) for d in (d_t, d_a))
    t, a = (v.view(-1, 4, group // 2).unbind(1) for v in (rotation.theta, rotation.alpha))  # 11, 22, 12, 21
    other = (g_lo, h_lo), (g_hi, h_hi), (g_lo, -h_hi), (g_hi, h_lo)
    slope = [-t[0].sin(), -t[1].sin(), t[2].cos(), t[3].cos()]
    value = [t[0].cos(), t[1].cos(), t[2].sin(), t[3].sin()]
    d_t = [u * a[i] * slope[i] * v for i, (u, v) in enumerate(other)]
    d_a = [u * value[i] * v for i, (u, v) in enumerate(other)]
    return tuple(torch.stack(d, -2).sum(0).reshape(-1) for d in (d_t, d_a))


@each
@each_group
def test_gradients_are_the_closed_forms(variant, group, dense, drawn):
    rotation = drawn(variant, group, 64, dtype=torch.float64)
    h, g = random(5, 64, seed=1, dtype=torch.float64), random(5, 64, seed=2, dtype=torch.float64)
    leaves = [v.clone().requires_grad_() for v in (rotation.theta, rotation.alpha, h)]
    out = rotate(leaves[2], *vectors(variant, group, *leaves[:2]), group)
    d_theta, d_alpha, d_h = torch.autograd.grad(out, leaves, g)
    wanted = upstream(rotation, h, g)
    torch.testing.assert_close(d_theta, wanted[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(d_alpha, wanted[1], rtol=0, atol=1e-11)
    torch.testing.assert_close(d_h, g @ dense(rotation), rtol=0, atol=1e-12)


@each
def test_gradients_are_finite_differences(variant, drawn):
    one, two = (drawn(variant, 8, 16, seed, torch.float64) for seed in (0, 1))
    leaves = [v.clone().requires_grad_() for r in (one, two) for v in (r.theta, r.alpha)]
    h = random(2, 3, 16, seed=3, dtype=torch.float64).requires_grad_()

    def bank(h, *parts):
        """A row of vectors for each row of the batch, as in a bank."""
        rows = zip(vectors(variant, 8, *parts[:2]), vectors(variant, 8, *parts[2:]), strict=True)
        return rotate(h, *(torch.stack(r)[:, None] for r in rows), 8)

    assert torch.autograd.gradcheck(bank, (h, *leaves))
    assert torch.autograd.gradcheck(lambda h, t, a: rotate(h, *vectors(variant, 8, t, a), 8), (h, *leaves[:2]))


def test_half_of_road_4_never_moves():
    """sin 0 = 0: from the start the angles of the cosines have no gradient, and the other three quarters train."""
    start = identity("road_4", 8, 32)
    theta, alpha = start.theta.requires_grad_(), start.alpha.requires_grad_()
    optimiser = torch.optim.AdamW([theta, alpha], lr=1e-2, weight_decay=0)
    h, target = random(7, 32), random(7, 32, seed=1)
    for step in range(20):
        optimiser.zero_grad()
        (rotate(h, *vectors("road_4", 8, theta, alpha), 8) - target).square().mean().backward()
        for_cosine, for_sine = theta.grad.view(-1, 2, 8).unbind(1)
        assert bool((for_cosine == 0).all()) and bool((for_sine != 0).all())
        if step == 0:
            assert bool((alpha.grad.view(-1, 2, 8)[:, 1] == 0).all())
        optimiser.step()
    assert bool((theta.view(-1, 2, 8)[:, 0] == 0).all()) and bool((theta.view(-1, 2, 8)[:, 1] != 0).all())
    assert bool((alpha != 1).all())


def product(h, first, second):
    """`second` after `first`."""
    return rotate(rotate(h, *first.vectors, first.group), *second.vectors, second.group)


def test_products_of_road_1_add_angles_and_multiply_scales(drawn):
    a, b = (drawn("road_1", 8, 64, seed, torch.float64) for seed in (0, 1))
    h = random(5, 64, seed=2, dtype=torch.float64)
    both = Rotation("road_1", 8, a.theta + b.theta, a.alpha * b.alpha)
    wanted = rotate(h, *both.vectors, 8)
    torch.testing.assert_close(product(h, a, b), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(product(h, b, a), wanted, rtol=0, atol=1e-12)


@each
def test_disjoint_supports_commute_exactly(variant, drawn):
    a, b, start = drawn(variant, 8, 64, 0), drawn(variant, 8, 64, 1), identity(variant, 8, 64)
    half = len(start.theta) // 2
    a.theta[half:], a.alpha[half:], b.theta[:half], b.alpha[:half] = 0, 1, 0, 1
    h = random(5, 64, seed=2)
    assert torch.equal(product(h, a, b), product(h, b, a))


@pytest.mark.parametrize("variant", ["road_2", "road_4"])
def test_other_products_do_not_commute(variant, drawn):
    a, b = (drawn(variant, 8, 64, seed) for seed in (0, 1))
    h = random(5, 64, seed=2)
    assert float((product(h, a, b) - product(h, b, a)).abs().max()) > 0.1


@each
def test_counts_are_n_2n_4n(variant):
    adapter = Road("r", {"a": identity(variant, 8, 64), "b": identity(variant, 8, 24)})
    assert adapter.trainables == {"road_1": 1, "road_2": 2, "road_4": 4}[variant] * (64 + 24)
    assert adapter.rotations["b"].features == 24


def published(config, variant, names=None):
    """The adapter of all (or some) block linears of a model, from its config alone."""
    drawn = architecture.architecture(config)
    chosen = [n for n in linears(drawn.nodes) if n.block is not None and (names is None or n.name[-6:] in names)]
    made = {n.name: identity(variant, 64, drawn.shapes[n.params["weight"]][0]) for n in chosen}
    return Road("published", made), sum(math.prod(s) for s in drawn.shapes.values())


def test_counts_of_published_adapters():
    llama_7b = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
    adapter, size = published(llama_7b, "road_1")
    assert adapter.trainables == 1_359_872
    assert f"{adapter.trainables / size:.4%}" == "0.0202%"
    llama_3b = {**llama_7b, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
    llama_3b |= {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    adapter, _ = published(llama_3b, "road_2", ("q_proj", "v_proj"))
    assert adapter.trainables == 229_376


class Largest(TorchDispatchMode):
    """The most bytes that the results of one operation occupy, those in `known` storages (views) not counted."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@each
@pytest.mark.parametrize("group", [64, 11008])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_a_wide_layer_takes_the_memory_of_a_few_rows(variant, group, dtype, drawn):
    n, k = 11008, 1024
    rotation, weight, bias = drawn(variant, group, n), torch.ones(n, k, dtype=dtype), torch.ones(n, dtype=dtype)
    with Largest(weight, bias, rotation.theta, rotation.alpha) as made:
        for matrix in (weight, bias[:, None]):
            fold_(matrix, rotation)
            unfold_(matrix, rotation, "up_proj")
    vector = 2 * n * 4  # road_4's theta; the others' are shorter
    assert 0 < made.bytes <= max(road.ROWS_AT_ONCE * k * 4, vector) < weight.nbytes / 80
    with Largest() as seen:
        torch.eye(n, 8)
    assert seen.bytes == n * 8 * 4


def test_layouts_that_do_not_exist_are_refused():
    for variant, group, features, words in (
        ("road_3", 8, 64, "'road_3'; expected one of road_1, road_2, road_4"),
        ("road_1", 7, 63, "group size is 7; expected an even number"),
        ("road_1", 0, 64, "group size is 0; expected an even number"),
        ("road_1", 64, 96, "64 does not divide the 96 outputs of the linear; the largest that fits is 32"),
        ("road_1", 8, 63, "the largest that fits is none"),
    ):
        with pytest.raises(TpvcError, match=words):
            identity(variant, group, features)

"""Factors move from activations into weights: the same model in float."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler import interpret
from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.ops import OPS
from tpvc.compiler.program import Program, dense
from tpvc.compiler.verify import verify
from tpvc.passes.migrate import moved, places_of
from tpvc.passes.round_activations import RoundActivations

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
    "qwen2": {"num_key_value_heads": 1, "intermediate_size": 64},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "query_pre_attn_scalar": 8},
    "phi3": {"num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0},
    "opt": {"ffn_dim": 64, "do_layer_norm_before": True},
    "opt after": {"ffn_dim": 64, "do_layer_norm_before": False},
    "gpt_neox": {"intermediate_size": 64, "rotary_pct": 0.25, "hidden_act": "gelu"},
}
DIVIDED = {
    "llama": ["input_layernorm", "self_attn.attention", "post_attention_layernorm", "mlp.product"],
    "qwen2": ["input_layernorm", "self_attn.attention", "post_attention_layernorm", "mlp.product"],
    "qwen3": ["input_layernorm", "self_attn.attention", "post_attention_layernorm", "mlp.product"],
    "gemma2": ["input_layernorm", "self_attn.attention", "pre_feedforward_layernorm", "mlp.product"],
    "phi3": ["input_layernorm", "post_attention_layernorm"],  # q, k, v are one matrix, and so are gate and up
    "opt": ["self_attn_layer_norm", "self_attn.attention", "final_layer_norm"],
    "opt after": ["self_attn.attention"],  # what its norms yield is added, too
    "gpt_neox": ["input_layernorm", "post_attention_layernorm"],
}


def model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Program:
    drawn = architecture(SIZES | {"model_type": family.split()[0], "max_position_embeddings": 64} | CONFIGS[family])
    params = {}
    for i, (name, shape) in enumerate(drawn.shapes.items()):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        params[name] = (0.3 * values + 1 if len(shape) == 1 else values * shape[1] ** -0.5).to(dtype)
    return RoundActivations("int8-static")(Program(drawn.nodes, params, drawn.facts))


def unrounded(program: Program, tokens: torch.Tensor) -> torch.Tensor:
    dropped = {n.name: n.inputs[0] for n in program.nodes if n.op == "round_tensor"}
    nodes = (replace(n, inputs=tuple(dropped.get(v, v) for v in n.inputs)) for n in program.nodes)
    return interpret.logits(replace(program, nodes=tuple(n for n in nodes if n.name not in dropped)), tokens)


def drawn(place, draw: torch.Generator, powers: bool) -> torch.Tensor:
    """Factors from 1/8 to 8, the same for features that share a row."""
    exponents = 6 * torch.rand(int(place.owner.max()) + 1, generator=draw) - 3
    return (exponents.round() if powers else exponents).exp2()[place.owner]


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "gemma2"])  # its norms store w - 1, which is rounded
def test_powers_of_two_leave_the_float_model_as_it_is_bit_for_bit(family):
    """Products with powers of two are exact, and so sums of them are the same sums."""
    given = changed = model(family)
    draw, tokens = torch.Generator().manual_seed(0), torch.arange(3, 35).view(2, 16)
    for index in range(2):
        for place in places_of(given, index).values():
            changed = moved(changed, place, drawn(place, draw, powers=True))
    verify(changed, "moved")
    assert torch.equal(unrounded(changed, tokens), unrounded(given, tokens))
    assert sum(changed.params[n] is not p for n, p in given.params.items()) >= 2 * 2 * len(DIVIDED[family])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_any_factors_leave_the_float_model_as_it_is(family, dtype):
    """Two evaluations of one formula: each of the 4 products on the way through a layer, and the head's, sums at most
    64 terms of 8 roundings more than a product's own, which may move it by 72 * 2^-24 of its size."""
    given = changed = model(family, dtype)
    draw, tokens = torch.Generator().manual_seed(0), torch.arange(3, 35).view(2, 16)
    for index in range(2):
        for place in places_of(given, index).values():
            changed = moved(changed, place, place.storable(changed, drawn(place, draw, powers=False)))
    before, after = unrounded(given, tokens), unrounded(changed, tokens)
    assert (after - before).abs().max() <= (4 * 2 + 1) * 72 * 2**-24 * before.abs().max()
    assert not torch.equal(after, before)


def test_a_norm_that_stores_minus_one_is_not_divided():
    given = model("gemma2")
    name = "model.layers.0.input_layernorm.weight"
    given = given.with_params({name: torch.where(torch.arange(32) == 3, -1.0, dense(given.params[name]))})
    place = places_of(given, 0)["model.layers.0.input_layernorm.int8"]
    s = place.storable(given, torch.full((32,), 3.0))
    assert s[3] == 1 and s[4] != 1
    assert dense(moved(given, place, s).params[name])[3] == -1


@pytest.mark.parametrize("family", CONFIGS)
def test_which_values_can_be_divided(family):
    places = places_of(model(family), 1)
    found = [p.rounder.inputs[0] for p in places.values()]
    assert [any(n.endswith(wanted) for n in found) for wanted in DIVIDED[family]] == [True] * len(DIVIDED[family])
    assert len(found) == len(DIVIDED[family])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_factors_are_exact_to_float32_behind_a_norm_in_any_dtype(family, dtype):
    """sum_j W_j s_j * (n_j w_j / s_j): the two quotients and products are rounded once each, and sums with the 1 that a
    norm lacks, beside the products and sums of a linear of so many columns: columns + 8 roundings of 2^-24 against the
    sum of absolute values."""
    given = model(family, dtype)
    place = places_of(given, 0)["model.layers.0.input_layernorm.int8"]
    s = place.storable(given, drawn(place, torch.Generator().manual_seed(0), powers=False))
    changed = moved(given, place, s)
    assert changed.params["model.layers.0.input_layernorm.weight"].dtype == dtype
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    name = "model.layers.0.self_attn.q_proj.weight"
    outputs = []
    for program in (given, changed):
        weight = dense(program.params["model.layers.0.input_layernorm.weight"])
        normed = OPS["rms_norm"].compute(x, weight=weight, eps=1e-5, plus_one=family == "gemma2")
        outputs.append(normed @ dense(program.params[name]).T)
    most = 2 * (32 + 8) * 2**-24 * (normed.abs() @ dense(changed.params[name]).abs().T)
    assert bool(((outputs[1] - outputs[0]).abs() <= most).all())
    assert not torch.equal(dense(changed.params[name]), dense(given.params[name]))


def test_factors_even_out_features_and_are_shared_by_the_heads_that_share_a_value():
    given = model()
    places = places_of(given, 0)
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 50
    place = places["model.layers.0.input_layernorm.int8"]
    weights = [dense(given.params[n]) for n in place.readers]
    even, some = (x / place.factors(x.abs().amax(0), weights, alpha) for alpha in (1.0, 0.5))
    assert even.abs().amax(0).allclose(even.abs().max())
    spread = [float(v.abs().amax(0).max() / v.abs().amax(0).median()) for v in (even, some, x)]
    assert spread[0] < spread[1] < spread[2] / 4
    place = places["model.layers.0.self_attn.attention.int8"]
    s = place.factors(x.abs().amax(0), [dense(given.params[n]) for n in place.readers], 0.7).view(2, 2, 8)
    assert torch.equal(s[:, 0], s[:, 1]) and s[0, 0].unique().numel() == 8


def test_what_was_hardly_met_is_not_blown_up():
    given = model()
    place = places_of(given, 0)["model.layers.0.mlp.product.int8"]
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0
    s = place.factors(x.abs().amax(0), [dense(given.params[n]) for n in place.readers], 1.0)
    assert s[5] > 0.05 * s.median()

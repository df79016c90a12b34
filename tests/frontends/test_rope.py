"""Rotary frequencies: the numbers of transformers, old and new configs, and the types that are refused."""

import pytest
import torch
import transformers as hf
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.rope import attributes

BASE = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
SCALED = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256, "truncate": False, "beta_fast": 20},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.2},
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.3},
]


@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", SCALED, ids=lambda s: s["rope_type"])
def test_frequencies_equal_transformers(scaling, theta, head_dim):
    settings = {**scaling, "rope_theta": theta}
    config = hf.LlamaConfig(**{**BASE, "head_dim": head_dim}, rope_parameters=dict(settings))
    wanted, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    ours = attributes({**BASE, "rope_parameters": settings}, head_dim)
    # A handful of float32 operations in another order: a few eps of the value.
    torch.testing.assert_close(torch.tensor(ours["inv_freq"]), wanted, rtol=16 * torch.finfo().eps, atol=0)
    assert ours.get("magnitude", 1.0) == pytest.approx(magnitude, rel=1e-12)


def test_plain_frequencies_are_exactly_those_of_the_llama_model():
    config = hf.LlamaConfig(**BASE, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    wanted, _ = hf.models.llama.modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    ours = attributes({**BASE, "rope_theta": 10000.0}, 64)
    assert "magnitude" not in ours
    assert torch.equal(torch.tensor(ours["inv_freq"]), wanted)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({}, {"rope_type": "default", "rope_theta": 1e4}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
        ),
        (
            {"rotary_emb_base": 5e3, "rotary_pct": 0.5},
            {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5},
        ),
    ],
)
def test_old_configs_mean_the_same_as_new_ones(old, new):
    fields = {"theta_field": "rotary_emb_base", "partial_field": "rotary_pct"}
    assert attributes({**BASE, **old}, 64, **fields) == attributes({**BASE, "rope_parameters": new}, 64, **fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "'longrope'"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "'spiral'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "factor"),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": None}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}, "low < high"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.5}}, "features of a head"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}}, "above 1"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "x"}}, "beta_fast"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": [1]}}, "attention_factor"),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": "x"}, "original"),
        ({"rope_parameters": [1, 2]}, "expected a dict"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "one of the two"),
    ],
)
def test_what_is_refused(fields, said):
    with pytest.raises(TpvcError, match=said):
        attributes({**BASE, **fields}, 64)

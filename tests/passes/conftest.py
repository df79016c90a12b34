"""A Program that is quick to round."""

import pytest
import torch

from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.program import Program
from tpvc.compiler.verify import verify

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 10000.0,
}


@pytest.fixture
def small_llama() -> Program:
    """Three blocks with correlated features, so that rounding errors can be made to cancel."""
    draw = torch.Generator().manual_seed(0)
    made = architecture(CONFIG)
    shapes = {}
    for node in made.nodes:
        for role, name in node.params.items():
            shapes[name] = (node.op, role)
    sizes = {"embed_tokens": (96, 32), "q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    sizes |= {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64), "norm": (32,)}
    params = {}
    for name in shapes:
        size = next(s for key, s in sizes.items() if name.split(".")[-2].endswith(key))
        params[name] = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=draw) * size[-1] ** -0.5
    return verify(Program(made.nodes, params, made.facts))

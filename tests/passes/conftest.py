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
    params = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw) * shape[1] ** -0.5
        for name, shape in made.shapes.items()
    }
    return verify(Program(made.nodes, params, made.facts))


@pytest.fixture
def model():
    """`model(**fields)`: a random Llama with two blocks, a seed for every parameter, and these fields of its config."""

    def make(**fields) -> Program:
        drawn = architecture(CONFIG | {"num_hidden_layers": 2} | fields)
        params = {}
        for seed, (name, shape) in enumerate(drawn.shapes.items()):
            draw = torch.Generator().manual_seed(seed)
            params[name] = torch.ones(shape)
            if len(shape) > 1:
                params[name] = torch.randn(shape, generator=draw) * shape[1] ** -0.5
        return Program(drawn.nodes, params, drawn.facts)

    return make

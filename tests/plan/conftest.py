"""Small models without weights, and what a plan says about them."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.program import Grid, Lazy, Program, Source, linears
from tpvc.passes.round_activations import RoundActivations

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "float16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def unread():
    raise AssertionError("a weight was read")


@pytest.fixture(scope="session")
def headers(tmp_path_factory):
    """headers(Grid(4, 32, True), activations=None, **config): a Llama on a grid, of which nothing can be read."""

    def make(grid: Grid, activations: str | None = None, **changed) -> Program:
        config = LLAMA | changed
        drawn = architecture(config)
        params = {name: Lazy(shape, torch.float16, unread) for name, shape in drawn.shapes.items()}
        source = Source("small", tmp_path_factory.getbasetemp(), config, ())
        program = Program(drawn.nodes, params, drawn.facts, source)
        program = RoundActivations(activations)(program) if activations else program
        inside = linears(n for n in program.nodes if n.block is not None)
        on_grid = {n.params["weight"]: replace(params[n.params["weight"]], grid=grid) for n in inside}
        return program.with_params(on_grid)

    return make


@pytest.fixture(scope="session")
def imagine_all():
    """What turns such a program into one whose parameters are read as tensors without memory."""
    from tpvc.compiler.plan.imagined import without_weights

    return without_weights

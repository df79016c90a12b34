"""A program that rounds keys and values: its package keeps them so without being asked."""

import pytest
import torch
import transformers as hf

from tpvc.compiler.backends.triton.engine import Engine
from tpvc.compiler.backends.triton.model import model_of
from tpvc.compiler.backends.triton.on_torch import OnTorch
from tpvc.compiler.backends.triton.steps import steps
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import in_memory, logits
from tpvc.kernels.launch import with_triton
from tpvc.passes.round_cache import RoundCache

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
TEXT = [5, 9, 33, 71, 12]


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models")
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, initializer_range=0.2)).save_pretrained(directory)
    return load(directory)


def test_the_steps_are_those_of_a_float_cache(floats):
    assert steps(RoundCache()(floats)) == steps(floats)
    assert model_of(floats).cache == torch.float32
    assert model_of(RoundCache()(floats)).cache == torch.int8


@pytest.mark.parametrize("run", [None, with_triton], ids=["references", "kernels"])
@torch.no_grad()
def test_the_engine_computes_what_the_interpreter_does(floats, run):
    """A code on an edge may go to both sides of it: float32 sums of K <= 96 terms are off by sqrt(K) 2^-24, over 14
    products; that near to an edge, at 127 steps, is a share of 0.0021 of all codes. Rounding costs step / sqrt(12)
    each, a flip a step: 0.16 of what rounding costs, rms."""
    program = RoundCache()(floats)
    engine = Engine(OnTorch(model_of(program), 1, 16, run))
    slot, _ = engine.admit(TEXT)
    found = engine.decode([slot], [7])[0]
    wanted, without = (logits(p, torch.tensor([[*TEXT, 7]]), weight=in_memory(p))[0, -1] for p in (program, floats))
    share = 2 * 127 * 14 * 96**0.5 * 2**-24
    smooth = 14 * 96 * 2**-24 * float(wanted.abs().max())
    assert (found - wanted).norm() <= smooth * len(wanted) ** 0.5 + (12 * share) ** 0.5 * (wanted - without).norm()

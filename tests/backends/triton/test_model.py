"""What a package computes in."""

import pytest
import torch
from transformers import Gemma3ForCausalLM as Gemma
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import tpvc
from tpvc.compiler import frontends
from tpvc.compiler.backends.triton.engine import Engine
from tpvc.compiler.backends.triton.model import activation_dtype, model_of
from tpvc.compiler.backends.triton.on_torch import OnTorch

SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_that_of_the_checkpoint_where_it_has_16_bits(dtype, tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).save_pretrained(tmp_path)
    assert activation_dtype(frontends.load(tmp_path)) == (torch.float16 if dtype == torch.float32 else dtype)


def test_values_beyond_float16_of_a_gemma(tiny_tokenizer, tmp_path):
    model = Gemma(Gemma3TextConfig(head_dim=16, **SIZES))
    for layer in model.model.layers:
        layer.post_feedforward_layernorm.weight.data.fill_(4e4)
    model.save_pretrained(tmp_path / "gemma")
    tiny_tokenizer.save_pretrained(tmp_path / "gemma")
    with torch.no_grad():
        hidden = model(torch.tensor([[5, 9, 77]]), output_hidden_states=True).hidden_states
    assert float(hidden[-2].abs().max()) > torch.finfo(torch.float16).max
    tpvc.quantize(tmp_path / "gemma", tmp_path / "w4", method="rtn", bits=4, group=32)
    program = frontends.load(tmp_path / "w4")
    for dtype, finite in ((torch.float16, False), (activation_dtype(program), True)):
        logits = Engine(OnTorch(model_of(program, dtype), 1, 16)).admit([5, 9, 77])[1]
        assert bool(logits.isfinite().all()) == finite

"""LoRA's algebra, its directory in real PEFT, and the two ways of using it in a graph."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tpvc.compiler import frontends, interpret
from tpvc.compiler.adapters import lora_files
from tpvc.compiler.adapters.lora import Lora, Update, fresh
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import QTensor, linears
from tpvc.compiler.verify import verify
from tpvc.passes.bank_lora import BankLora
from tpvc.passes.fold_lora import FoldLora

IDS = torch.arange(5, 17)[None]


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory, tiny_tokenizer):
    """Directory of a random GPT-2 with two blocks, whose linears are Conv1D."""
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    GPT2LMHeadModel(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def random_lora(program, rank=3, last=None):
    draw = torch.Generator().manual_seed(0)
    updates = {}
    for node in linears(n for n in program.nodes if n.block is not None):
        if last is None or node.name.endswith(last):
            out, in_ = program.params[node.params["weight"]].shape
            a, b = torch.randn(rank, in_, generator=draw), torch.randn(out, rank, generator=draw)
            updates[node.name] = Update(a / in_**0.5, b / 4, 2.0)
    return Lora("task", rank, 2.0 * rank, updates)


@pytest.mark.parametrize(("name", "last"), [("tiny_llama", None), ("tiny_llama", "0.mlp.up_proj"), ("tiny_gpt2", None)])
def test_peft_computes_the_same(request, name, last, tmp_path):
    model = request.getfixturevalue(name)
    program = frontends.load(model)
    adapter = random_lora(program, last=last)
    lora_files.write(adapter, tmp_path / "task", program, {"tpvc": "x"})
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model).float(), tmp_path / "task")
    with torch.no_grad():
        wanted = wrapped(IDS).logits
        banked = verify(BankLora(adapter)(program))
        found = interpret.logits(banked, IDS)
        base = interpret.logits(program, IDS)
        folded = interpret.logits(verify(FoldLora(adapter)(program)), IDS)
    # some 30 sums of at most 128 products one behind the other, each rounded to 2^-24
    slack = 30 * 128**0.5 * 2**-23 * float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= slack
    assert float((folded - wanted).abs().max()) <= slack
    assert float((base - wanted).abs().max()) > 100 * slack
    told = json.loads((tmp_path / "task" / "tpvc.json").read_text())
    assert told["artefact"] == "lora" and told["base"]["files"] and told["tpvc"] == "x"


def test_the_same_adapter_gives_the_same_bytes(tiny_llama, tmp_path):
    program = frontends.load(tiny_llama)
    for name in ("a", "b"):
        lora_files.write(random_lora(program), tmp_path / name, program, {})
    for file in ("adapter_config.json", "adapter_model.safetensors", "tpvc.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_fresh_update_is_nothing():
    a, b = fresh(4, 16, 32, torch.Generator().manual_seed(0))
    assert not Update(a, b, 2.0).dense.any() and float(a.abs().max()) <= 32**-0.5 and a.std() > 0.08


def test_integers_and_tied_weights_are_not_folded_into(tiny_llama):
    program = frontends.load(tiny_llama)
    adapter = random_lora(program, last="0.mlp.up_proj")
    (name,) = adapter.updates
    from tpvc.compiler.program import Grid

    codes = QTensor(torch.zeros(128, 64, dtype=torch.uint8), torch.ones(128, 1), None, Grid(4, -1, True))
    with pytest.raises(TpvcError, match="fold before quantising"):
        FoldLora(adapter)(program.with_params({f"{name}.weight": codes}))
    banked = BankLora(adapter)(program.with_params({f"{name}.weight": codes}))
    assert interpret.logits(banked, IDS).isfinite().all()

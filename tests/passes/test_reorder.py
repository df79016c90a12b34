"""Columns and features in another order: the product is what it was, in every runtime that takes it."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler.backends.huggingface import emit
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import logits
from tpvc.compiler.program import Grid, dense, linears, read
from tpvc.compiler.verification import check_written, verify
from tpvc.compiler.verify import verify as legal
from tpvc.passes.reorder import Reorder, orders
from tpvc.passes.round_to_nearest import quantize

IDS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def programs(tiny_llama):
    """(integers in the order of the model, the same in an order of each layer's own)."""
    program, generator = load(tiny_llama), torch.Generator().manual_seed(0)
    plain, moved, order, drawn = {}, {}, {}, {}
    for node in linears(n for n in program.nodes if n.block is not None):
        name, weight = node.params["weight"], dense(program.params[node.params["weight"]])
        random = torch.randperm(weight.shape[1], generator=generator).view(-1, 32).sort(-1).values.flatten()
        own = drawn.setdefault(node.inputs[0], random)
        q = quantize(weight[:, own], Grid(4, 32, False), torch.float16)
        moved[name], order[name] = replace(q, zero=q.zero.clamp(min=1)), tuple(own.tolist())
        plain[name] = moved[name].dequantize()[:, own.argsort()]
    return program.with_params(plain), legal(Reorder(order)(program.with_params(moved)), "Reorder")


def test_products_are_what_they_were(programs):
    """Sums of at most 128 terms in another order, 6 products a block and the head."""
    plain, moved = programs
    wanted = logits(plain, IDS)
    limit = 2 * 13 * 128**0.5 * 2**-24 * wanted.abs().max().item()
    torch.testing.assert_close(logits(moved, IDS), wanted, rtol=0, atol=limit)


def test_linears_that_read_one_value_share_the_node(programs):
    _, moved = programs
    nodes = [n.name.removeprefix("model.layers.0.") for n in moved.nodes if n.op == "reorder" and n.block == 0]
    own = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert nodes == [f"{name}.reordered" for name in own]
    assert len(orders(moved)) == 14


def test_onnx_and_gptq_hold_it(programs, tmp_path):
    from tpvc.compiler.backends import onnx

    _, moved = programs
    for name in ("onnx", "gptq"):
        (tmp_path / name).mkdir()
    emit(moved, tmp_path / "gptq", None, {}, runtime="gptq")
    onnx.emit(moved, tmp_path / "onnx", None, portable=True)
    for name in ("onnx", "gptq"):
        check_written(tmp_path / name, moved)
    again = load(tmp_path / "gptq")
    assert again.source.config["quantization_config"]["desc_act"] and orders(again) == orders(moved)
    for name in orders(moved):
        assert torch.equal(read(again.params[name]).codes, moved.params[name].codes)
    found = verify([tmp_path / "gptq", tmp_path / "onnx"])
    assert sum(f.proven for f in found if f.subject == "logits") == 2


def test_what_does_not_hold_it_says_so(programs, tmp_path):
    _, moved = programs
    for runtime, format in (("awq", "AWQ"), ("vllm", "compressed-tensors")):
        with pytest.raises(TpvcError, match=f"q_proj.weight' .* which {format} cannot hold; take --to onnx or gptq"):
            emit(moved, tmp_path / runtime, None, {}, runtime=runtime)
    other = {name: order[::-1] for name, order in orders(moved).items()}
    with pytest.raises(TpvcError, match="activation order in one and not so in the other"):
        emit(moved, tmp_path / "gptq", None, {}, runtime="gptq")
        check_written(tmp_path / "gptq", Reorder(other)(moved))


def test_an_order_that_is_none_is_illegal(programs):
    _, moved = programs
    nodes = [replace(n, attrs={"order": (0,) * 64}) if n.op == "reorder" else n for n in moved.nodes]
    with pytest.raises(TpvcError, match="order of 64 is none of 64 features"):
        legal(replace(moved, nodes=tuple(nodes)))

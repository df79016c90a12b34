"""What an error costs: gradients a block at a time, and the divergence that they foretell."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler import interpret
from tpvc.compiler.ops import OPS
from tpvc.passes.block import Block, embedded, full_windows
from tpvc.passes.round_activations import RoundActivations
from tpvc.passes.sensitivity import cost, feel, output_gradients

TOKENS = torch.randint(3, 96, (24, 16), generator=torch.Generator().manual_seed(1))
IDS = torch.full((24,), -1)


def logs(program, ops=OPS, tokens=TOKENS) -> torch.Tensor:
    weight = interpret.in_memory(program)
    return interpret.run(program.nodes, full_windows(tokens, IDS[: len(tokens)]), weight, ops=ops).log_softmax(-1)


def test_gradients_a_block_at_a_time_are_those_of_the_whole_model(model):
    program = model()
    found = output_gradients(program, embedded(program, TOKENS[:2], IDS[:2]), IDS[:2])
    weight, leaving = interpret.in_memory(program), {}
    ends = {program.block(i)[-1].name for i in range(2)}

    def watch(node, inputs):
        for name, value in zip(node.inputs, inputs, strict=True):
            if name in ends:
                leaving.setdefault(name, value.requires_grad_())

    probabilities = interpret.run(program.nodes, full_windows(TOKENS[:2], IDS[:2]), weight, watch=watch)
    probabilities = probabilities.log_softmax(-1)
    draw = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.multinomial(p.detach().exp(), 1, generator=draw) for p in probabilities])
    wanted = torch.autograd.grad(probabilities.gather(-1, labels).sum(), list(leaving.values()))
    assert len(found) == len(wanted) == 2
    for a, b in zip(found, wanted, strict=True):
        # float32 through some 20 nodes with sums of up to 96 terms each
        assert torch.allclose(a, b, rtol=0, atol=20 * 96 * 2**-24 * float(b.abs().max()))


AFTER = {"model_type": "opt", "ffn_dim": 64, "do_layer_norm_before": False}
"""What its norms yield is read by linears and added, too; errors are in what linears read alone."""


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({}, "input_layernorm.int8"),
        ({}, "self_attn.attention.int8"),
        ({}, "mlp.product.int8"),
        (AFTER, "self_attn_layer_norm.int8"),
    ],
)
def test_it_foretells_the_divergence_that_small_errors_make(model, fields, where):
    """Both sides are sums over 384 tokens of about squares of normal numbers, of the draw of y and of the errors: each
    is off by sqrt(2 / 384) = 7 %, together by 10 %, and by more where one error reaches many tokens. Three times that,
    twice."""
    program = RoundActivations("int8")(model(**fields))
    (name,) = (n.name for n in program.block(0) if n.name.endswith(where))
    x = embedded(program, TOKENS, IDS)
    block = Block(program, 0, "cpu")
    felt = feel(block, x, IDS, output_gradients(program, x, IDS)[0])
    value, squares = felt.inputs[name]
    error = 1e-3 * value.std() * torch.randn(value.shape, generator=torch.Generator().manual_seed(5))

    def noisy(mark: float):
        return lambda x, kind: x + mark * error.view(24, 16, -1)

    exact, wrong = (replace(OPS["round_rows"], compute=lambda x, **_: x), replace(OPS["round_rows"], compute=noisy(1)))
    nodes = tuple(replace(n, op="noisy") if n.name == name else n for n in program.nodes)
    ops = {**OPS, "round_rows": exact}
    before = logs(program, ops).double()
    after = logs(replace(program, nodes=nodes), {**ops, "noisy": wrong}).double()
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert cost(error, squares) == pytest.approx(measured, rel=0.6)
    assert felt.outputs.keys() == {n.params["weight"] for n in block.nodes if n.op == "linear"}


def test_costs_of_two_errors_add_up():
    error, squares = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 9.0], [9.0, 5.0]])
    assert cost(error, squares) == 0.5 * (3 + 4 * 5) / 2

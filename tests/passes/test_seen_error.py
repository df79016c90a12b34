"""An error of a block's output counts as the norm behind it, found in the graph, shows it."""

import pytest
import torch

from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.ops import OPS
from tpvc.compiler.program import NORMS, Program, read
from tpvc.passes.block import Block, embedded, spread
from tpvc.passes.seen_error import as_it_is, relative_error, seen_behind

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES = {
    "llama": ({"model_type": "llama", "num_key_value_heads": 2}, ["input_layernorm", "post_attention_layernorm"]),
    "gemma2": (
        {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8},
        ["input_layernorm", "pre_feedforward_layernorm"],
    ),
    "gpt_neox": ({"model_type": "gpt_neox"}, ["input_layernorm", "post_attention_layernorm"]),
    "opt": ({"model_type": "opt", "ffn_dim": 64}, ["self_attn_layer_norm", "final_layer_norm"]),
}
"""Config, and the norms of a block that read the stream."""


def model(config: dict) -> Program:
    """Random weights, norms' too; the first feature of the stream is a hundred times the others."""
    drawn = architecture(SIZES | {"max_position_embeddings": 64} | config)
    params = {}
    for i, (name, shape) in enumerate(drawn.shapes.items()):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        params[name] = 0.3 * values + 1 if len(shape) == 1 else values * shape[-1] ** -0.5
        if len(shape) == 2 and shape[0] == SIZES["vocab_size"]:
            params[name][:, 0] *= 100
    return Program(drawn.nodes, params, drawn.facts)


def stream(program: Program, index: int) -> torch.Tensor:
    """What block `index` yields for 2 windows of 8 tokens."""
    ids = spread(2, 0)
    x = embedded(program, torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(1)), ids)
    for i in range(index + 1):
        block = Block(program, i, "cpu")
        x = block.outputs(x, block.weights, ids)
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_error_of_the_last_block_is_the_change_of_the_final_norm(family):
    """But for a factor, which leaves the weight's mean square 1."""
    program = model(FAMILIES[family][0])
    norm = next(n for n in program.epilogue if n.op in NORMS)
    params = {role: read(program.params[name]) for role, name in norm.params.items()}
    factor = (params["weight"] + float(bool(norm.attrs.get("plus_one")))).square().mean().sqrt()

    def normed(x):
        return OPS[norm.op].compute(x, **params, **norm.attrs) / factor

    y = stream(program, 1)
    error = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    centre = (lambda x: x - x.mean(-1, keepdim=True)) if norm.op == "layer_norm" else (lambda x: x)
    error, ray = centre(error), centre(y)
    error = error - ray * (error * ray).sum(-1, keepdim=True) / ray.square().sum(
        -1, keepdim=True
    )  # no longer, no shorter
    size = 2**-9
    error = error * size * ray.norm(dim=-1, keepdim=True) / error.norm(dim=-1, keepdim=True)
    seen = seen_behind(program, 1)(error, y)
    # to second order the norm divides by sqrt(1 + size^2) more; and float32
    bound = (size**2 + 2**-20) * normed(y).abs().max()
    assert (normed(y + error) - normed(y) - seen).abs().max() <= bound
    assert seen.abs().max() > 10 * bound


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_that_read_the_stream_of_the_next_two_blocks_count_alike(family):
    config, own = FAMILIES[family]
    program = model({**config, "num_hidden_layers": 4})
    for index, blocks in ((0, (1, 2)), (2, (3,)), (3, ())):
        norms = [n for n in program.nodes if n.block in blocks and n.op in NORMS and n.name.split(".")[-1] in own]
        norms += [n for n in program.epilogue if n.op in NORMS] if len(blocks) < 2 else []
        y = stream(program, index)
        error = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        squares = []
        for norm in norms:
            weight = read(program.params[norm.params["weight"]]).double() + float(bool(norm.attrs.get("plus_one")))
            e, t = ((x - x.mean(-1, keepdim=True) if norm.op == "layer_norm" else x) for x in (error, y.double()))
            own_rms = (t.square().mean(-1, keepdim=True) + norm.attrs["eps"]).sqrt()
            squares.append((weight * e / own_rms / weight.square().mean().sqrt()).square())
        wanted = torch.stack(squares).mean(0)
        seen = seen_behind(program, index)(error, y).double().square()
        # a dozen float32 operations
        assert (
            len(norms) == 2 * len(blocks) + (len(blocks) < 2) and ((seen - wanted).abs() <= 2**-19 * wanted.max()).all()
        )


def test_where_no_norm_reads_the_output_errors_are_as_they_are():
    program = model({"model_type": "opt", "ffn_dim": 64, "do_layer_norm_before": False})
    assert all(seen_behind(program, index) is as_it_is for index in (0, 1))


def test_a_relative_error_does_not_look_at_what_the_norm_divides_away():
    """One feature is a hundred times the others, and its weight a hundredth of theirs."""
    program = model(FAMILIES["llama"][0])
    weight = torch.ones(32)
    weight[0] = 0.01
    program = program.with_params({name: weight for name in program.params if "norm" in name})
    target = torch.ones(2, 8, 32)
    target[..., 0] = 100
    large, small = target.clone(), target.clone()
    large[..., 0] += 1
    small[..., 1] += 1
    seen = seen_behind(program, 0)
    assert relative_error(large, target) == pytest.approx(relative_error(small, target))
    # of 31 features that are 1 and one that is seen as 100 * 0.01
    assert relative_error(small, target, seen) == pytest.approx(1 / 32)
    assert relative_error(large, target, seen) == pytest.approx(1e-4 / 32)


def test_a_norm_of_zeros_has_no_say():
    program = model(FAMILIES["llama"][0])
    names = [n.params["weight"] for n in program.nodes if n.op in NORMS and n.block == 1]
    zeros = program.with_params({names[0]: torch.zeros(32)})
    error, target = torch.ones(2, 8, 32), stream(program, 0)
    assert seen_behind(zeros, 0)(error, target).isfinite().all()
    assert not torch.equal(seen_behind(zeros, 0)(error, target), seen_behind(program, 0)(error, target))


def test_norms_of_zeros_show_nothing():
    program = model(FAMILIES["llama"][0])
    final = next(n for n in program.epilogue if n.op in NORMS).params["weight"]
    assert seen_behind(program.with_params({final: torch.zeros(32)}), 1) is as_it_is
    zeros = torch.zeros(2, 3)
    assert relative_error(zeros, zeros) == 0

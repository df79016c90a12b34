"""A rounded key/value cache: the op, where the pass puts it, what it means, and rounding that is learned under it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tpvc.compiler import interpret
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.ops import head_codes, round_heads
from tpvc.compiler.program import Grid, Program, linears, read, rounded_cache
from tpvc.compiler.quick import ops_for
from tpvc.compiler.store import BlockStore
from tpvc.compiler.verify import verify
from tpvc.passes.block import Block, embedded, spread, unrounded
from tpvc.passes.flexround import RECIPES, FlexRound
from tpvc.passes.fold_prompt import FoldPrompt
from tpvc.passes.round_cache import RoundCache, float_cache
from tpvc.passes.seen_error import relative_error, seen_behind

GRID = Grid(4, -1, True)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def windows(count=24, length=16) -> torch.Tensor:
    return torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,width", [(1, 8), (3, 20), (2, 64)])
def test_it_is_the_arithmetic_of_the_kernels_cache(heads, width, dtype):
    """Bit for bit, also for zeros, the largest numbers and those that lie half way between two codes."""
    x = random(2, 50, heads * width)
    x[0, 0] = 0
    x[0, 1] *= 1e30
    x[0, 2] = torch.arange(heads * width) / 2 - 3
    x[0, 2, ::width] = 127
    x = x.to(dtype)
    split = x.float().unflatten(-1, (heads, width)).numpy()
    largest = np.maximum(abs(split).max(-1), np.float32(1e-20))
    scale = torch.from_numpy(largest / np.float32(127))
    codes = torch.from_numpy(np.floor(split / scale.numpy()[..., None] + np.float32(0.5)).astype(np.int8))
    found = head_codes(x, width)
    assert torch.equal(found[0], codes) and torch.equal(found[1][..., 0], scale)
    rounded = round_heads(x, head_dim=width)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, (codes.float() * scale[..., None]).flatten(-2).to(dtype))


def test_the_gradient_goes_straight_through():
    x, wanted = random(2, 3, 8).requires_grad_(), random(2, 3, 8, seed=1)
    (round_heads(x, head_dim=4) * wanted).sum().backward()
    assert torch.equal(x.grad, wanted)


def test_keys_are_rounded_behind_their_rotation_and_queries_are_not(model):
    plain = model()
    program = verify(RoundCache()(plain), "RoundCache")
    by_name = {n.name: n for n in program.nodes}
    layers = [n for n in program.nodes if n.op == "attention"]
    for node in layers:
        q, k, v, _ = (by_name.get(name) for name in node.inputs)
        assert (q.op, k.op, v.op) == ("rope", "round_heads", "round_heads")
        assert (by_name[k.inputs[0]].op, by_name[v.inputs[0]].op) == ("rope", "linear")
        assert k.block == v.block == node.block and k.attrs == {"head_dim": 8}
    assert len(layers) == 2 and rounded_cache(program) == "int8" and rounded_cache(plain) is None
    assert float_cache(program).nodes == plain.nodes and float_cache(plain) is plain


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "phi3", "gemma2"])
def test_families(family):
    """With fused projections, learned positions and windows."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "num_hidden_layers": 2, "vocab_size": 96}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "hidden_act": "gelu", "sliding_window": 4}
    sizes |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8, "rms_norm_eps": 1e-5}
    drawn = architecture({"model_type": family, "tie_word_embeddings": True, **sizes})
    params = {n: random(*s, seed=i) / 6 for i, (n, s) in enumerate(drawn.shapes.items())}
    plain = Program(drawn.nodes, params, drawn.facts)
    program = verify(RoundCache()(plain), "RoundCache")
    assert sum(n.op == "round_heads" for n in program.nodes) == 2 * plain.blocks
    tokens = windows(1, 8)
    found, wanted = interpret.logits(program, tokens), interpret.logits(plain, tokens)
    # a code is off by half of 1/127 at most, in a few products each
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.1


def test_token_by_token_it_is_the_same_and_nothing_is_rounded_twice(model):
    program = RoundCache()(model())
    tokens, cache = windows(2), {}
    whole = interpret.logits(program, tokens)
    steps = [interpret.logits(program, tokens[:, i : i + 1], cache=cache) for i in range(tokens.shape[1])]
    off = (torch.cat(steps, 1) - whole).norm() / whole.norm()
    cost = (whole - interpret.logits(model(), tokens)).norm() / whole.norm()
    # sums in another order: a code may go to its neighbour, for a share of 2 * 127 * 64 * 2^-24 < 0.001 of all, where
    # rounding costs all of them a step / sqrt(12): sqrt(12 * 0.001) of that
    assert off <= 1e-5 + 0.11 * cost
    for key, value in cache.values():
        for state in (key, value):
            codes, scale = head_codes(state, state.shape[-1])
            assert (state - (codes * scale).flatten(-2)).abs().max() <= 2 * 2**-24 * state.abs().max()


def test_learning_sees_it(model, tmp_path):
    """Targets are those of the float block; errors hold the rounding of the cache too."""
    recipe = replace(RECIPES["default"], steps=20, held_out=3)
    program = RoundCache()(model())
    store = BlockStore.open(tmp_path / "a", {})
    rounded = verify(FlexRound(GRID, recipe, windows(), store)(program), "FlexRound")
    record = store.finished(0)[1]
    assert record["error"] <= record["error_rtn"] and "inputs" not in record
    ids = spread(24, 0)[-3:]
    exact = embedded(program, windows()[-3:], ids)
    plain, block = Block(model(), 0, "cpu"), Block(program, 0, "cpu")
    ops = ops_for([GRID.bits])
    target = plain.outputs(exact, plain.weights, ids, ops)
    assert torch.equal(block.outputs(exact, block.weights, ids, unrounded(ops)), target)
    kept = {n.params["weight"]: read(rounded.params[n.params["weight"]]) for n in linears(program.block(0))}
    seen = seen_behind(program, 0)
    outputs = (b.outputs(exact, b.with_rounded(kept), ids, ops) for b in (block, plain))
    own, other = (relative_error(output, target, seen) for output in outputs)
    assert record["error"] == pytest.approx(own) and record["error"] != pytest.approx(other)


def test_the_keys_of_a_folded_prompt_stay_in_float(model):
    """As the tasks of a Triton package have them."""
    prompt = Prompt("a", random(3, 32))
    fold = FoldPrompt(prompt, "kv")
    program, plain = verify(fold(RoundCache()(model()))), fold(model())
    names = [name for name in plain.params if name.endswith(("prefix_key", "prefix_value"))]
    assert len(names) == 4 and all(torch.equal(program.params[n], plain.params[n]) for n in names)
    assert rounded_cache(program) == "int8"


def test_what_is_refused(model):
    with pytest.raises(TpvcError, match="kept in 'fp8'; expected int8, or none"):
        RoundCache("fp8")(model())
    program = RoundCache()(model())
    nodes = tuple(replace(n, attrs={"head_dim": 7}) if n.op == "round_heads" else n for n in program.nodes)
    with pytest.raises(TpvcError, match=r"cached_k.*16 features are not whole heads of 7"):
        verify(replace(program, nodes=nodes))

"""Folding an adapter: the graph, the same logits, what is quantised afterwards, and what cannot be folded."""

from dataclasses import replace

import pytest
import torch
import transformers as hf

from tpvc.compiler.adapters.road import STORED, Road, Rotation, fold_, rotate
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import from_files, logits, run
from tpvc.compiler.ops import linear
from tpvc.compiler.program import Facts, Grid, Node, Program, dense, linears, read
from tpvc.compiler.store import BlockStore
from tpvc.compiler.verify import verify
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.fold_road import FoldRoad
from tpvc.passes.round_to_nearest import RoundToNearest, quantize

VARIANTS = ("road_1", "road_2", "road_4")
FACTS = Facts("test", 8, 16, 1, 1, 1, 16, 32, None, (), None)


def drawn(variant, group, features, seed=0):
    generator, m = torch.Generator().manual_seed(seed), int(features * STORED[variant])
    theta, alpha = (torch.randn(m, generator=generator) * 0.5 for _ in range(2))
    return Rotation(variant, group, theta, alpha + 1)


def adapter(program, variant, group, head=False):
    chosen = [n for n in linears(program.nodes) if n.block is not None or head]
    outputs = {n.name: program.params[n.params["weight"]].shape[0] for n in chosen}
    return Road("task", {n: drawn(variant, group, f, i) for i, (n, f) in enumerate(outputs.items())})


def small():
    """embed -> a (with bias) -> act -> b."""
    made = {n: torch.randn(16, 16, generator=torch.Generator().manual_seed(len(n))) for n in ("a.w", "b.weight")}
    nodes = (
        Node("embed", "embed", ("input_ids",), {"weight": "table"}),
        Node("a", "linear", ("embed",), {"weight": "a.w", "bias": "a.bias"}, block=0),
        Node("act", "activation", ("a",), attrs={"kind": "silu"}, block=0),
        Node("b", "linear", ("act",), {"weight": "b.weight"}),
    )
    return Program(nodes, {"table": torch.ones(8, 16), "a.bias": torch.arange(16.0), **made}, FACTS)


@pytest.fixture(scope="module", params=["llama", "opt", "gpt2"])
def program(request, tmp_path_factory):
    """Without biases; with them, untied; with Conv1D and a tied head."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = {
        "llama": lambda: hf.LlamaConfig(**sizes, **tokens, intermediate_size=96, tie_word_embeddings=False),
        "opt": lambda: hf.OPTConfig(**sizes, **tokens, ffn_dim=96, word_embed_proj_dim=64, tie_word_embeddings=False),
        "gpt2": lambda: hf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    }[request.param]()
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return load(directory)


def test_the_graph_before_and_after():
    program = small()
    road = Road("task", {"a": drawn("road_4", 8, 16)})
    folded = FoldRoad()(BankRoad((road,))(program))
    assert folded.nodes == program.nodes and folded.adapters == ()
    assert folded.params.keys() == program.params.keys()
    weight, bias = program.params["a.w"].clone(), program.params["a.bias"].clone()
    for matrix in (weight, bias[:, None]):
        fold_(matrix, road.rotations["a"])
    assert torch.equal(read(folded.params["a.w"]), weight) and torch.equal(read(folded.params["a.bias"]), bias)
    assert folded.params["b.weight"] is program.params["b.weight"]
    assert torch.equal(program.params["a.bias"], torch.arange(16.0))  # the original is kept
    verify(folded, "FoldRoad")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [2, 8, 32])
@torch.no_grad()
def test_folded_logits_are_those_of_the_bank(program, variant, group):
    tied = next(n for n in program.nodes if n.name == "lm_head").params["weight"] != "lm_head.weight"
    banked = BankRoad((adapter(program, variant, group, head=not tied),))(program)
    folded = FoldRoad()(banked)
    verify(folded, "FoldRoad")
    assert folded.nodes == program.nodes
    ids = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(0))
    wanted = logits(banked, ids, adapter_ids=torch.zeros(3, dtype=torch.long))
    # A linear sums K products, attention 11 tokens and head_dim features; another op rounds a few times; twice that.
    terms = 0
    for node in banked.nodes:
        terms += program.params[node.params["weight"]].shape[1] if node.op == "linear" else 4
        terms += 11 + program.facts.head_dim if node.op == "attention" else 0
    limit = 2 * terms * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    torch.testing.assert_close(logits(folded, ids), wanted, rtol=0, atol=limit)
    assert float((logits(program, ids) - wanted).abs().max()) > 20 * limit


@pytest.mark.parametrize("grid", [Grid(4, 32, False), Grid(3, -1, True), Grid(8, 0, True)], ids=str)
def test_folding_then_rounding_is_rounding_the_folded_weight(program, grid, tmp_path):
    road = adapter(program, "road_4", 8)
    folded = FoldRoad()(BankRoad((road,))(program))
    rounded = RoundToNearest(grid, BlockStore.open(tmp_path, {"test": 1}))(folded)
    for name, rotation in road.rotations.items():
        key = next(n for n in program.nodes if n.name == name).params["weight"]
        weight = read(program.params[key]).float().clone()
        fold_(weight, rotation)
        wanted, got = quantize(weight, grid), read(rounded.params[key])
        assert torch.equal(got.codes, wanted.codes) and torch.equal(got.scale, wanted.scale)
        assert (got.zero is None and wanted.zero is None) or torch.equal(got.zero, wanted.zero)


@torch.no_grad()
def test_on_integers_the_rotation_stays_behind_the_linear(program):
    """z = R (dequantised W x + b), bit for bit."""
    node = next(n for n in linears(program.nodes) if n.block == 0)
    key, rotation = node.params["weight"], drawn("road_4", 8, program.params[node.params["weight"]].shape[0])
    integers = program.with_params({key: quantize(read(program.params[key]), Grid(4, 32, False))})
    banked = BankRoad((Road("task", {node.name: rotation}),))(integers)
    part = [n for n in banked.nodes if n.name in (node.name, f"{node.name}.rotate")]
    assert [n.op for n in part] == ["linear", "rotate"]
    x = torch.randn(2, 3, program.params[key].shape[1], generator=torch.Generator().manual_seed(1))
    got = run(part, {node.inputs[0]: x, "adapter_ids": torch.tensor([0, 0])}, from_files(banked))
    bias = dense(program.params[node.params["bias"]]) if "bias" in node.params else None
    wanted = rotate(linear(x, weight=dense(integers.params[key]), bias=bias), *rotation.vectors, 8)
    assert torch.equal(got, wanted)


def test_folding_takes_exactly_one_adapter():
    program = small()
    x, y = (Road(n, {"a": drawn("road_1", 8, 16)}) for n in "xy")
    for banked, found in ((program, "none"), (BankRoad((x, y))(program), "x, y")):
        with pytest.raises(TpvcError, match=f"exactly one adapter, found {found}; leave several beside the weights"):
            FoldRoad()(banked)


def test_integers_are_refused():
    program = small()
    program = program.with_params({"a.w": quantize(program.params["a.w"], Grid(4, 8, True))})
    with pytest.raises(TpvcError, match=r"'a\.w' holds integers.*fold before quantising, or leave the adapter beside"):
        FoldRoad()(BankRoad((Road("x", {"a": drawn("road_1", 8, 16)}),))(program))


def test_shared_parameters_are_refused():
    """A head that is the embedding, and a bias of two linears."""
    program = small()
    tied = tuple(replace(n, params={"weight": "table"}) if n.name == "b" else n for n in program.nodes)
    road = Road("x", {"b": drawn("road_1", 2, 8)})
    with pytest.raises(TpvcError, match=r"the weight of 'b' is shared with 'embed' \(tied\).*leave the adapter beside"):
        FoldRoad()(BankRoad((road,))(replace(program, nodes=tied)))
    both = tuple(replace(n, params={**n.params, "bias": "a.bias"}) if n.name == "b" else n for n in program.nodes)
    with pytest.raises(TpvcError, match=r"the bias of 'a' is shared with 'b'"):
        FoldRoad()(BankRoad((Road("x", {"a": drawn("road_1", 8, 16)}),))(replace(program, nodes=both)))


def test_a_tied_head_of_a_checkpoint_is_refused_and_runs_beside(tiny_llama, tmp_path):
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    banked = BankRoad((Road("x", {"lm_head": drawn("road_1", 8, 96)}),))(load(tmp_path))
    ids = torch.tensor([[3, 4, 5]])
    base, turned = logits(banked, ids), logits(banked, ids, adapter_ids=torch.tensor([0]))
    assert torch.equal(turned, rotate(base, *banked.adapters[0].rotations["lm_head"].vectors, 8))
    with pytest.raises(TpvcError, match=r"the weight of 'lm_head' is shared with 'model\.embed_tokens' \(tied\)"):
        FoldRoad()(banked)


def test_an_output_that_is_read_elsewhere_too_is_refused():
    banked = BankRoad((Road("x", {"a": drawn("road_1", 8, 16)}),))(small())
    nodes = tuple(replace(n, inputs=("a",)) if n.name == "act" else n for n in banked.nodes)
    with pytest.raises(TpvcError, match="the output of 'a' is read by 'act' without the rotation"):
        FoldRoad()(replace(banked, nodes=nodes))

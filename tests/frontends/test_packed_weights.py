"""GPTQ, AWQ and AutoRound checkpoints, written here bit by bit as their formats say: codes come back as they were, and
logits are those of transformers with the weights that the formats mean."""

import json

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import from_files, logits
from tpvc.compiler.program import Grid, grid_of, linears, read
from tpvc.compiler.verify import verify
from tpvc.passes.reorder import orders

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def stream(values, bits):
    """Integers of `bits` bits end to end, the first in the lowest ones, as int32 words."""
    whole = sum(int(v) << (bits * i) for i, v in enumerate(values))
    count = -(-len(values) * bits // 32)
    return np.frombuffer(whole.to_bytes(4 * count, "little"), "<i4")


def gptq(codes, zeros, scales, bits, version, columns_of):
    """Tensors of codes [N, K], zeros and scales [N, G] in GPTQ's layout."""
    if version == 1 and 32 % bits == 0:  # one off every code, whole words at a time
        words = np.stack([stream(column, bits) for column in zeros.T]).view("<u4")
        one = np.uint32(sum(1 << (bits * i) for i in range(32 // bits)))
        qzeros = (words - one).view("<i4")
    else:
        qzeros = np.stack([stream((column - (2 - version)) % 2**bits, bits) for column in zeros.T])
    return {
        "qweight": torch.from_numpy(np.stack([stream(row, bits) for row in codes], 1)),
        "qzeros": torch.from_numpy(qzeros.copy()),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(columns_of.astype(np.int32)),
    }


def awq(codes, zeros, scales):
    """Tensors in AWQ's layout: eight rows of the matrix in a word, in an order of their own."""

    def words(matrix):  # [n, N]
        eights = matrix.reshape(len(matrix), -1, 8)[..., list(AWQ_ORDER)]
        return torch.from_numpy(np.stack([[stream(eight, 4)[0] for eight in row] for row in eights]))

    return {"qweight": words(codes.T), "qzeros": words(zeros.T), "scales": torch.from_numpy(scales.T.copy())}


def checkpoint(directory, layout, bits=4, group=16, symmetric=False, lowest=0, order=None, **sizes):
    """A small llama with random codes in all linears of its blocks: {name: (codes, zeros, scales, groups of columns)},
    and what they mean, as a model of transformers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | sizes
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = hf.LlamaConfig(vocab_size=50, **sizes, **heads, dtype="float16")
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    config.save_pretrained(directory)
    tensors = {name: value.to(torch.float16) for name, value in model.state_dict().items()}
    model.load_state_dict({name: value.float() for name, value in tensors.items()})
    made, rng = {}, np.random.default_rng(1)
    middle = 2 ** (bits - 1)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        n, k = tensors.pop(name).shape
        of_column = np.arange(k) // (k if group == -1 else group)
        if order is not None:
            of_column = rng.permutation(of_column)
        count = of_column.max() + 1
        codes = rng.integers(0, 2**bits, (n, k))
        zeros = np.full((n, count), middle) if symmetric else rng.integers(lowest, 2**bits, (n, count))
        scales = (rng.uniform(0.5, 1.5, (n, count)) * 0.5 / 2**bits).astype(np.float16)
        if layout == "awq":
            parts = awq(codes, zeros, scales)
        else:
            parts = gptq(codes, zeros, scales, bits, {"gptq": 1, "gptq_v2": 2}[layout], of_column)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": t for part, t in parts.items()}
        made[name] = codes, zeros, scales
        meant = (codes - zeros[:, of_column]) * scales.astype(np.float32)[:, of_column]
        model.get_submodule(module).weight.data = torch.from_numpy(meant.astype(np.float32))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return made, model.eval()


def settings(directory, **given):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": given}))


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def same_integers(program, made, bits, group, symmetric):
    for name, (codes, zeros, scales) in made.items():
        q = read(program.params[name])
        own = Grid(bits, group, symmetric)
        assert grid_of(program.params[name]) == q.grid == own and q.scale_dtype == torch.float16
        assert np.array_equal(q.codes.numpy(), codes) and np.array_equal(q.scale.numpy(), scales.astype(np.float32))
        assert q.zero is None if symmetric else np.array_equal(q.zero.numpy(), zeros)


def same_logits(program, model):
    """float32 sums of at most 64 terms, 6 products a block and the head, in another order."""
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = model(ids).logits
    bound = 2 * 13 * 64**0.5 * 2**-24 * wanted.abs().max().item()
    torch.testing.assert_close(logits(program, ids), wanted, rtol=0, atol=bound)


def refused(directory, said):
    with pytest.raises(TpvcError, match=said):
        program = load(directory)
        for name in program.params:
            from_files(program)(name)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "symmetric"), [(16, False), (16, True), (-1, False), (-1, True), (32, False)])
def test_gptq(tmp_path, layout, bits, group, symmetric):
    """Asymmetric zero points go down to 0, which borrows from its neighbours in version 1."""
    made, model = checkpoint(tmp_path, layout, bits, group, symmetric)
    settings(tmp_path, quant_method="gptq", bits=bits, group_size=group, sym=symmetric, checkpoint_format=layout)
    program = load(tmp_path)
    same_integers(program, made, bits, group, symmetric)
    same_logits(program, model)
    assert (
        len(made) == 14
        and sum(grid_of(program.params[n.params["weight"]]) is None for n in linears(program.nodes)) == 1
    )


@pytest.mark.parametrize(("group", "symmetric"), [(16, False), (16, True), (-1, False), (32, False)])
def test_awq(tmp_path, group, symmetric):
    made, model = checkpoint(tmp_path, "awq", 4, group, symmetric)
    own = {"zero_point": not symmetric, "version": "GEMM", "modules_to_not_convert": ["lm_head"]}
    settings(tmp_path, quant_method="awq", bits=4, group_size=group, **own)
    program = load(tmp_path)
    same_integers(program, made, 4, group, symmetric)
    same_logits(program, model)


@pytest.mark.parametrize(
    ("packing", "layout", "symmetric"),
    [
        ("auto_round:auto_gptq", "gptq", True),
        ("auto_round:auto_gptq:exllamav2", "gptq", True),
        ("auto_round:auto_gptq", "gptq", False),
        ("auto_round:auto_awq", "awq", False),
        ("auto_round:exllamav2", "gptq_v2", False),
        ("auto_round", "gptq_v2", False),
    ],
)
def test_autoround(tmp_path, packing, layout, symmetric):
    """Its tensors have no g_idx, and scales of either sign."""
    made, model = checkpoint(tmp_path, layout, 4, 16, symmetric)
    if layout != "awq":
        edit(tmp_path, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith("g_idx")])
    said = {"data_type": "int", "act_bits": 16, "autoround_version": "0.9", "packing_format": packing}
    settings(tmp_path, quant_method="auto-round", bits=4, group_size=16, sym=symmetric, **said)
    program = load(tmp_path)
    same_integers(program, made, 4, 16, symmetric)
    same_logits(program, model)


@pytest.mark.parametrize(
    "backend, layout",
    [("auto_round:exllamav2", "gptq_v2"), ("auto_round:gptq:exllamav2", "gptq"), ("auto", "gptq"), (None, "gptq")],
)
def test_autoround_that_names_a_backend_alone(tmp_path, backend, layout):
    made, model = checkpoint(tmp_path, layout, 4, 16, False)
    settings(tmp_path, quant_method="intel/auto-round", bits=4, group_size=16, sym=False, backend=backend)
    program = load(tmp_path)
    same_integers(program, made, 4, 16, False)
    same_logits(program, model)


def test_exceptions_by_name(tmp_path):
    made, _ = checkpoint(tmp_path, "gptq", 8, 16, True)
    rules = {"+:.*layers\\.[01]\\.": {"bits": 8, "sym": True}, "-:.*nothing.*": {}}
    settings(tmp_path, quant_method="gptq", bits=4, group_size=16, sym=False, dynamic=rules)
    same_integers(load(tmp_path), made, 8, 16, True)
    settings(tmp_path, quant_method="gptq", bits=8, group_size=16, dynamic={"-:.*mlp.*": {}})
    refused(tmp_path, "stored as integers, but")
    extra = {"model.layers.0": {"bits": 8}, "model.layers.1": {"bits": 8}, "lm_head": {"bits": 16}}
    own = {"packing_format": "auto_round:auto_gptq", "extra_config": extra}
    settings(tmp_path, quant_method="intel/auto-round", bits=4, group_size=16, sym=True, **own)
    same_integers(load(tmp_path), made, 8, 16, True)


def test_last_group_may_be_shorter(tmp_path):
    """96 columns in groups of 64: three groups of 32 in the program, of which two share their numbers."""
    made, model = checkpoint(tmp_path, "gptq", 4, 64, False, intermediate_size=96)
    settings(tmp_path, quant_method="gptq", bits=4, group_size=64, sym=False)
    program = load(tmp_path)
    q = read(program.params["model.layers.0.mlp.down_proj.weight"])
    _, zeros, scales = made["model.layers.0.mlp.down_proj.weight"]
    assert q.grid == Grid(4, 32, False)
    assert np.array_equal(q.zero.numpy(), zeros[:, [0, 0, 1]])
    assert np.array_equal(q.scale.numpy(), scales[:, [0, 0, 1]].astype(np.float32))
    same_logits(program, model)


def test_what_old_tools_left(tmp_path):
    """A config file of its own, a bias of zeros for every linear, and no qzeros beside symmetric weights."""
    made, _ = checkpoint(tmp_path, "gptq", 4, 16, True)

    def age(tensors):
        for name in [n for n in tensors if n.endswith("qzeros")]:
            rows = tensors.pop(name).shape[1] * 8
            tensors[name.replace("qzeros", "bias")] = torch.zeros(rows, dtype=torch.float16)

    edit(tmp_path, age)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16, "sym": True}))
    same_integers(load(tmp_path), made, 4, 16, True)
    bias = "model.layers.0.mlp.up_proj.bias"
    edit(tmp_path, lambda tensors: tensors.update({bias: torch.ones(64, dtype=torch.float16)}))
    refused(tmp_path, f"first '{bias}'")


def test_what_is_refused(tmp_path):
    checkpoint(tmp_path, "gptq", 4, 16, True)
    for said, found in {
        "gptq_p": "checkpoint_format 'gptq_p'",
        "marlin": "checkpoint_format 'marlin'",
    }.items():
        settings(tmp_path, quant_method="gptq", bits=4, group_size=16, checkpoint_format=said)
        refused(tmp_path, found)
    settings(tmp_path, quant_method="gptq", bits=5, group_size=16)
    refused(tmp_path, "5-bit weights")
    settings(tmp_path, quant_method="gptq", bits=4, group_size=0)
    refused(tmp_path, "groups of 0 columns")
    settings(tmp_path, quant_method="awq", bits=4, group_size=16, version="gemv")
    refused(tmp_path, "AWQ's layout 'gemv'")
    settings(tmp_path, quant_method="auto-round", bits=4, group_size=16, packing_format="auto_round:llm_compressor")
    refused(tmp_path, "packing_format 'auto_round:llm_compressor'")
    settings(tmp_path, quant_method="auto-round", bits=4, group_size=16, act_bits=8)
    refused(tmp_path, "activations to 8 bits")
    settings(tmp_path, quant_method="gptq", bits=4, group_size=16, dynamic={"+:(": {}})
    refused(tmp_path, "cannot be understood")
    settings(tmp_path, quant_method="awq", bits=4, group_size=16)
    refused(tmp_path, "stored as g_idx, qweight")
    settings(tmp_path, quant_method="gptq", bits=8, group_size=16)
    refused(tmp_path, r"qweight' is I32 \[4, 64\]; gptq, W8 g16 symmetric of a 64x32 matrix expects I32 \[8, 64\]")


@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_order(tmp_path, symmetric):
    """Columns of a group lie side by side in the program, and what is read moves along."""
    made, model = checkpoint(tmp_path, "gptq", 4, 16, symmetric, order="random")
    settings(tmp_path, quant_method="gptq", bits=4, group_size=16, sym=symmetric, desc_act=True)
    program = verify(load(tmp_path))
    moved = orders(program)
    assert moved.keys() == made.keys()
    for name, (codes, zeros, scales) in made.items():
        q = read(program.params[name])
        assert q.grid == Grid(4, 16, symmetric)
        assert np.array_equal(q.codes.numpy(), codes[:, moved[name]])
        assert np.array_equal(q.scale.numpy(), scales.astype(np.float32))
        assert symmetric or np.array_equal(q.zero.numpy(), zeros)
    same_logits(program, model)


def test_groups_of_unequal_size_are_refused(tmp_path):
    checkpoint(tmp_path, "gptq", 4, 16, True)
    settings(tmp_path, quant_method="gptq", bits=4, group_size=16, sym=True, desc_act=True)
    own = "model.layers.1.mlp.up_proj.g_idx"
    edit(tmp_path, lambda tensors: tensors[own].fill_(1))
    refused(tmp_path, f"'{own}' does not put the 32 columns of .* in groups of 16")


def test_zero_points_that_belie_the_config(tmp_path):
    checkpoint(tmp_path, "gptq_v2", 4, 16, True)
    settings(tmp_path, quant_method="gptq", bits=4, group_size=16, sym=True)
    refused(tmp_path, "zero point 9 in row 0, group 0, expected 8: .*version 2; set checkpoint_format to 'gptq_v2'")
    checkpoint(tmp_path, "gptq_v2", 4, 16, False)
    settings(tmp_path, quant_method="gptq", bits=4, group_size=16, sym=True, checkpoint_format="gptq_v2")
    refused(tmp_path, "expected 8: the config says sym")

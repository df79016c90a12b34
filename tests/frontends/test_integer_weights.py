"""compressed-tensors checkpoints: codes packed by that library come back bit for bit, and mean what it says."""

import json

import pytest
import torch
import transformers as hf
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.frontends.integer_weights import quantization
from tpvc.compiler.interpret import from_files, logits
from tpvc.compiler.program import Grid, QTensor, grid_of, linears, read

GRIDS = {
    "w4-g16-asym": Grid(4, 16, False),
    "w4-g16-sym": Grid(4, 16, True),
    "w3-channel-asym": Grid(3, -1, False),
    "w8-channel-sym": Grid(8, -1, True),
    "w5-tensor-sym": Grid(5, 0, True),
    "w6-tensor-asym": Grid(6, 0, False),
    "w2-g32-asym": Grid(2, 32, False),
    "w7-g8-asym": Grid(7, 8, False),
}


ROWS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True, "group_size": None}
"""Activations rounded per token while the model runs, as llm-compressor writes them."""


def weights(grid):
    strategy = {0: "tensor", -1: "channel"}.get(grid.group, "group")
    size = grid.group if grid.group > 0 else None
    fixed = {"type": "int", "dynamic": False, "actorder": None, "observer": "minmax"}
    return {"num_bits": grid.bits, "symmetric": grid.symmetric, "strategy": strategy, "group_size": size, **fixed}


def settings(groups, ignore):
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {
            f"group_{i}": {"targets": t, "weights": weights(g), "input_activations": None, "output_activations": None}
            for i, (t, g) in enumerate(groups)
        },
    }


def random_codes(shape, grid, generator):
    """A QTensor whose values are about the size of initial weights."""
    groups = (1, 1) if grid.group == 0 else (shape[0], shape[1] // grid.columns(shape[1]))
    codes = torch.randint(0, 2**grid.bits, shape, generator=generator, dtype=torch.uint8)
    scale = (torch.rand(groups, generator=generator) + 0.5) * 0.5 / 2**grid.bits
    zero = None
    if not grid.symmetric:
        zero = torch.randint(2 ** (grid.bits - 1) - 1, 2 ** (grid.bits - 1) + 2, groups, generator=generator).byte()
    return QTensor(codes, scale, zero, grid)


def stored(name, q):
    """The tensors that compressed-tensors writes for a module."""
    half, bits = 2 ** (q.grid.bits - 1), q.grid.bits
    signed = (q.codes.to(torch.int16) - half).to(torch.int8)
    parts = {
        f"{name}_packed": pack_to_int32(signed, bits),
        f"{name}_scale": q.scale.reshape(1) if q.grid.group == 0 else q.scale,
        f"{name}_shape": torch.tensor(q.shape),
    }
    if q.zero is not None:
        zero = (q.zero.to(torch.int16) - half).to(torch.int8)
        packed = zero.reshape(1) if q.grid.group == 0 else pack_to_int32(zero, bits, packed_dim=0).contiguous()
        parts[f"{name}_zero_point"] = packed
    return parts


def checkpoint(directory, groups, ignore=("lm_head",), **fields):
    """A small llama whose linears, as far as `groups` names them by number of block, hold random codes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = hf.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, **fields)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    float_program = load(directory)
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    made = {}
    for node in linears(float_program.nodes):
        if node.block is None:
            continue
        name = node.params["weight"]
        q = random_codes(tensors.pop(name).shape, groups[min(node.block, len(groups) - 1)][1], generator)
        made[name] = q
        tensors |= stored(name, q)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    change(directory, lambda c: c.update(quantization_config=settings(groups, list(ignore))))
    return made


def change(directory, edit):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def refused(directory, said):
    with pytest.raises(TpvcError, match=said):
        program = load(directory)
        for name in program.params:
            from_files(program)(name)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_codes_come_back_and_mean_what_compressed_tensors_says(tmp_path, grid):
    made = checkpoint(tmp_path, [(["Linear"], grid)])
    program = load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights(grid))
    for name, q in made.items():
        ours = read(program.params[name])
        assert program.params[name].grid == ours.grid == grid
        assert torch.equal(ours.codes, q.codes) and torch.equal(ours.scale, q.scale)
        assert (ours.zero is None) == grid.symmetric and (grid.symmetric or torch.equal(ours.zero, q.zero))
        local = {k.removeprefix(name.removesuffix("weight")): v for k, v in tensors.items() if k.startswith(name)}
        wanted = PackedQuantizationCompressor.decompress(local, scheme)["weight"]
        torch.testing.assert_close(ours.dequantize(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["w4-g16-sym", "w8-channel-sym", "w5-tensor-sym", "w6-tensor-asym"])
def test_transformers_computes_the_same(tmp_path, name):
    """Only grids whose zero points transformers 5.23 reads: not the packed ones."""
    checkpoint(tmp_path, [(["Linear"], GRIDS[name])])
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        # Both multiply the same float32 weights; sums of at most 64 products, 2 layers of 7: 900 eps.
        torch.testing.assert_close(logits(load(tmp_path), ids), model(ids).logits, rtol=0, atol=900 * torch.finfo().eps)


@pytest.mark.parametrize("grid", [Grid(4, 16, False), Grid(3, -1, False)], ids=str)
def test_blocks_of_one_row_are_groups(tmp_path, grid):
    made = checkpoint(tmp_path, [(["Linear"], grid)], ignore=["lm_head", "re:.*down_proj"])
    tensors = load_file(tmp_path / "model.safetensors")
    for name, q in made.items():
        if "down_proj" in name:
            for part in ("packed", "scale", "shape", "zero_point"):
                del tensors[f"{name}_{part}"]
            tensors[name] = q.dequantize()
        else:
            tensors[f"{name}_zero_point"] = (q.zero.to(torch.int16) - 2 ** (grid.bits - 1)).to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    block = {"strategy": "block", "group_size": None, "block_structure": [1, 16 if grid.group == 16 else 32]}
    change(tmp_path, lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(block))
    program = load(tmp_path)
    for name, q in made.items():
        if "down_proj" not in name:
            ours = read(program.params[name])
            assert ours.grid == grid and torch.equal(ours.codes, q.codes) and torch.equal(ours.zero, q.zero)


def test_one_code_a_byte(tmp_path):
    grid = Grid(5, -1, True)
    made = checkpoint(tmp_path, [(["Linear"], grid)])
    tensors = load_file(tmp_path / "model.safetensors")
    for name, q in made.items():
        del tensors[f"{name}_packed"], tensors[f"{name}_shape"]
        tensors[name] = (q.codes.to(torch.int16) - 16).to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "weight_packed")
    change(tmp_path, lambda c: c["quantization_config"].update(format="int-quantized"))
    program = load(tmp_path)
    assert all(torch.equal(read(program.params[name]).codes, q.codes) for name, q in made.items())
    tensors[name] = tensors[name] + 16
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "beyond 5 bits")


def test_several_groups_by_regular_expression_and_name(tmp_path):
    first, second, exact = Grid(4, 16, False), Grid(8, -1, True), Grid(3, 8, True)
    groups = [(["re:model.layers.0.*"], first), (["Linear"], second)]
    checkpoint(tmp_path, groups)
    program = load(tmp_path)
    assert grid_of(program.params["model.layers.0.mlp.up_proj.weight"]) == first
    assert grid_of(program.params["model.layers.1.mlp.up_proj.weight"]) == second
    assert grid_of(program.params["lm_head.weight"]) is None
    name = "model.layers.1.mlp.up_proj"
    q = random_codes((64, 32), exact, torch.Generator().manual_seed(2))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, **stored(f"{name}.weight", q)}, tmp_path / "model.safetensors")
    change(tmp_path, lambda c: c.update(quantization_config=settings([*groups, ([name], exact)], ["lm_head"])))
    assert torch.equal(read(load(tmp_path).params[f"{name}.weight"]).codes, q.codes)


@pytest.mark.parametrize("home", ["lm_head", "model.embed_tokens"])
def test_a_tied_head_of_integers(tmp_path, home):
    grid = Grid(8, -1, True)
    checkpoint(tmp_path, [(["Linear"], Grid(4, 16, True))], ignore=[], tie_word_embeddings=True)
    q = random_codes((50, 32), grid, torch.Generator().manual_seed(3))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file({**tensors, **stored(f"{home}.weight", q)}, tmp_path / "model.safetensors")
    groups = [(["Linear"], Grid(4, 16, True)), ([home], grid)]
    change(tmp_path, lambda c: c.update(quantization_config=settings(groups, [])))
    program = load(tmp_path)
    assert "lm_head.weight" not in program.params
    assert torch.equal(read(program.params["model.embed_tokens.weight"]).codes, q.codes)
    logits(program, torch.arange(5)[None])


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda q: q.update(quant_method="bitsandbytes"), "'bitsandbytes'"),
        (lambda q: q.update(format="float-quantized"), "float-quantized"),
        (lambda q: q.update(format="int-quantized"), "weight_packed"),
        (lambda q: q.update(quantization_status="frozen"), "frozen"),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "key/value cache"),
        (lambda q: q.update(transform_config={"config_groups": {"u": {}}}), "transform_config"),
        (lambda q: q.update(sparsity_config={"format": "sparse-bitmask"}), "sparse"),
        (lambda q: q.update(config_groups={}), "no config_groups"),
        (lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 8}), "lacks 'input_scale'"),
        (
            lambda q: q["config_groups"]["group_0"].update(input_activations=ROWS | {"strategy": "tensor"}),
            "strategy tensor",
        ),
        (lambda q: q["config_groups"]["group_0"].update(input_activations=ROWS | {"num_bits": 4}), "num_bits 4"),
        (
            lambda q: q["config_groups"]["group_0"].update(input_activations=ROWS | {"symmetric": False}),
            "symmetric False",
        ),
        (lambda q: q["config_groups"]["group_0"].update(output_activations=ROWS), "what linears yield"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=1), "1-bit"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(type="float"), "float"),
        (
            lambda q: q["config_groups"]["group_0"]["weights"].update(strategy="block", block_structure=[2, 8]),
            "blocks of 2 rows",
        ),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(actorder="group"), "actorder"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=24), "groups of 24"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=8), "weight_scale"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=3), "weight_packed"),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False), "weight_zero_point"),
        (lambda q: q.update(ignore=["re:.*up_proj"]), "no config group"),
        (lambda q: q.update(ignore=[]), "lm_head.*ignore"),
    ],
)
def test_a_config_that_does_not_fit_or_is_not_supported(tmp_path, edit, said):
    checkpoint(tmp_path, [(["Linear"], Grid(4, 16, True))])
    change(tmp_path, lambda c: edit(c["quantization_config"]))
    refused(tmp_path, said)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("scale", torch.full((32, 2), float("nan")), "NaN"),
        ("scale", torch.ones(32, 3), "weight_scale"),
        ("shape", torch.tensor([32, 31]), "weight_shape"),
        ("packed", torch.zeros(32, 4, dtype=torch.int64), "weight_packed"),
        ("g_idx", torch.zeros(32, dtype=torch.int32), "weight_g_idx"),
    ],
)
def test_damaged_parts(tmp_path, part, value, said):
    checkpoint(tmp_path, [(["Linear"], Grid(4, 16, True))])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.layers.0.self_attn.q_proj.weight_{part}"] = value
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, said)


def test_a_missing_part(tmp_path):
    checkpoint(tmp_path, [(["Linear"], Grid(4, 16, True))])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "expected weight_packed, weight_scale, weight_shape")


def test_nonsense_in_the_quantization_config_is_one_error():
    good = settings([(["Linear"], Grid(4, 16, True))], [])
    nonsense = ("x", -1, 1.5, [], [1], {"a": 1})
    broken = [nonsense[0], *({**good, field: value} for field in good for value in nonsense)]
    for field in weights(Grid(4, 16, True)):
        for value in nonsense:
            group = {"targets": ["Linear"], "weights": {**weights(Grid(4, 16, True)), field: value}}
            broken.append({**good, "config_groups": {"g": group}})
    for names in ([1], ["re:("], "Linear", {"a": 1}):
        group = {"targets": names, "weights": weights(Grid(4, 16, True))}
        refused_settings = ({**good, "ignore": names}, {**good, "config_groups": {"g": group}})
        for given in refused_settings:
            with pytest.raises(TpvcError, match="cannot be understood"):
                quantization({"quantization_config": given})
    for given in broken:
        try:
            quantization({"quantization_config": given})
        except TpvcError as error:
            assert "\n" not in str(error)

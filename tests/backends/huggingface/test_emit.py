"""The artefact, read by transformers with compressed-tensors as they stand: the oracle of everything in here."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from tpvc.compiler import interpret, ops
from tpvc.compiler.backends.huggingface import emit
from tpvc.compiler.backends.huggingface import stream as stream_file
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import huggingface as frontend
from tpvc.compiler.program import ROUNDERS, Grid, QTensor, dense, input_grids, linears, read, rounded_inputs
from tpvc.passes.round_activations import RoundActivations
from tpvc.passes.round_cache import RoundCache

TOKENS = torch.arange(24)[None] % 61


def rounded(weight: torch.Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float32) -> QTensor:
    """Round to nearest; nothing of the product."""
    group = weight.numel() if grid.group == 0 else grid.columns(weight.shape[1])
    x = weight.float().reshape(1, 1, -1) if grid.group == 0 else weight.float().unflatten(1, (-1, group))
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    top = 2**grid.bits - 1
    if grid.symmetric:
        scale, zero = torch.maximum(high, -low) / (2 ** (grid.bits - 1) - 0.5), None
        scale = scale.to(scale_dtype).float()
        middle = torch.full_like(scale, 2 ** (grid.bits - 1))
    else:
        scale = ((high - low) / top).to(scale_dtype).float()
        middle = (-low / scale).round().clamp(0, top)
        zero = middle.to(torch.uint8)
    codes = (x / scale[..., None] + middle[..., None]).round().clamp(0, top).reshape(weight.shape)
    return QTensor(codes.to(torch.uint8), scale, zero, grid, scale_dtype)


def llama(directory, *, tied=False, hidden=64, inter=96, dtype=torch.float32):
    """A random small Llama in `directory`, as a Program."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=[2, 3],
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    return frontend.load(directory, "tiny")


def quantized(program, grid, head=None, scale_dtype=torch.float32):
    """Block linears on `grid`, the head on `head`."""
    changed = {}
    for node in linears(program.nodes):
        on = head if node.block is None else grid
        if on is not None:
            name = node.params["weight"]
            changed[name] = rounded(dense(program.params[name]), on, scale_dtype)
    return program.with_params(changed)


def loaded(directory):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    # A constant of Gemma's embedding: compressed-tensors makes a parameter of it, transformers sets it.
    info["missing_keys"].discard("model.embed_tokens.embed_scale")
    assert not any(info.values()), info
    return model.eval()


def check_logits(model, program):
    """Both multiply the same float32 matrices, in another order. Each of the 2 * 7 + 1 products in a row sums K <= 96
    terms, so its rounding error is at most K * eps of the sum of magnitudes; 15 * 96 * 2^-24 = 8.6e-5 of the largest
    logit bounds what reaches the end."""
    with torch.no_grad():
        theirs = model(TOKENS).logits
        ours = interpret.logits(program, TOKENS)
    assert (theirs - ours).abs().max() <= 15 * 96 * 2**-24 * ours.abs().max()


def check_read_back(directory, program):
    again = frontend.load(directory, "again")
    assert again.nodes == program.nodes
    assert again.params.keys() == program.params.keys()
    for name, param in program.params.items():
        was, now = read(param), read(again.params[name])
        if isinstance(was, QTensor):
            assert torch.equal(was.codes, now.codes) and torch.equal(was.scale, now.scale), name
            assert (was.zero is None) == (now.zero is None) and was.grid == now.grid, name
            assert was.zero is None or torch.equal(was.zero, now.zero), name
            assert was.scale_dtype == now.scale_dtype == again.params[name].dtype, name
        else:
            assert was.dtype == now.dtype and torch.equal(was, now), name
    return again


def emitted(program, directory, **options):
    directory.mkdir()
    return emit(program, directory, None, {"options": {"bits": 4}}, **options)


GRIDS = [
    *[Grid(bits, group, symmetric) for bits in range(2, 9) for group, symmetric in ((32, False), (-1, True))],
    *[Grid(bits, group, symmetric) for bits in (3, 8) for group, symmetric in ((32, True), (-1, False), (0, False))],
    Grid(4, 0, True),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_transformers_loads_every_grid(grid, tmp_path):
    program = quantized(llama(tmp_path / "source"), grid)
    notes = emitted(program, tmp_path / "out")
    assert notes == []
    check_logits(loaded(tmp_path / "out"), program)
    check_read_back(tmp_path / "out", program)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [Grid(3, 32, False), Grid(8, -1, False), Grid(4, 32, True)], ids=str)
def test_narrow_scales_are_stored_as_such(grid, scale_dtype, tmp_path):
    program = quantized(llama(tmp_path / "source", dtype=torch.bfloat16), grid, scale_dtype=scale_dtype)
    emitted(program, tmp_path / "out")
    check_logits(loaded(tmp_path / "out"), program)
    check_read_back(tmp_path / "out", program)


@pytest.mark.parametrize("grid", [Grid(3, -1, False), Grid(5, -1, True), Grid(3, 0, False), Grid(7, 4, False)], ids=str)
def test_rows_that_do_not_fill_words(grid, tmp_path):
    program = quantized(llama(tmp_path / "source", hidden=40, inter=52), grid)
    emitted(program, tmp_path / "out")
    check_logits(loaded(tmp_path / "out"), program)
    check_read_back(tmp_path / "out", program)


@pytest.mark.parametrize("head", [Grid(8, -1, False), Grid(8, -1, True), Grid(8, 32, False), Grid(4, 0, True)], ids=str)
def test_a_tied_integer_head_is_stored_once(head, tmp_path):
    program = quantized(llama(tmp_path / "source", tied=True), Grid(3, 32, False), head)
    assert emitted(program, tmp_path / "out") == []
    model = loaded(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.int8
    check_logits(model, program)
    again = check_read_back(tmp_path / "out", program)
    assert "lm_head.weight" not in again.params
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        matrices = [n for n in file.keys() if file.get_slice(n).get_shape() == [61, 64]]  # noqa: SIM118
    assert matrices == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_left_in_float(tied, tmp_path):
    program = quantized(llama(tmp_path / "source", tied=tied), Grid(4, 32, False))
    emitted(program, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    check_logits(loaded(tmp_path / "out"), program)
    check_read_back(tmp_path / "out", program)


@pytest.mark.parametrize("head", [Grid(8, -1, False), Grid(3, 32, False)], ids=str)
def test_an_untied_integer_head(head, tmp_path):
    program = quantized(llama(tmp_path / "source"), Grid(3, 32, False), head)
    emitted(program, tmp_path / "out")
    check_logits(loaded(tmp_path / "out"), program)
    check_read_back(tmp_path / "out", program)


def test_mixed_grids_and_a_linear_left_in_float(tmp_path):
    program = quantized(llama(tmp_path / "source"), Grid(4, 32, True))
    other = {
        "model.layers.0.mlp.down_proj.weight": Grid(6, -1, False),
        "model.layers.1.self_attn.q_proj.weight": Grid(3, 0, True),
    }
    source = frontend.load(tmp_path / "source", "tiny")
    changed = {name: rounded(dense(source.params[name]), grid) for name, grid in other.items()}
    kept = "model.layers.1.mlp.up_proj.weight"
    program = program.with_params({**changed, kept: source.params[kept]})
    emitted(program, tmp_path / "out")
    check_logits(loaded(tmp_path / "out"), program)
    check_read_back(tmp_path / "out", program)


@pytest.mark.parametrize("grid", [Grid(4, 32, False), Grid(3, -1, False), Grid(8, 32, True)], ids=str)
def test_the_layout_for_vllm(grid, tmp_path):
    """vLLM is not at hand; compressed-tensors' own decompressor reads the same tensors (packed zero points)."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    program = quantized(llama(tmp_path / "source", tied=True), grid, Grid(8, -1, True))
    notes = emitted(program, tmp_path / "out", runtime="vllm")
    assert len(notes) == 1 and "embed_tokens" in notes[0]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    groups = QuantizationConfig.model_validate(config["quantization_config"]).config_groups
    of = {target: group for group in groups.values() for target in group.targets}
    packer = BaseCompressor.get_value_from_registry("pack-quantized")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        names = set(file.keys())
        for node in linears(program.nodes):
            module = "lm_head" if node.block is None else node.params["weight"].removesuffix(".weight")
            own = {n.rpartition(".")[2]: file.get_tensor(n) for n in names if n.startswith(f"{module}.")}
            weight = packer.decompress(own, of.get(module) or of["Linear"])["weight"]
            assert torch.equal(weight.float(), dense(program.params[node.params["weight"]]))
    frontend.load(tmp_path / "out", "again")


def test_integer_conv1d_is_refused_by_transformers_and_reads_back(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    program = frontend.load(tmp_path / "source", "tiny")
    emitted(program, tmp_path / "float")
    check_logits(loaded(tmp_path / "float"), program)
    check_read_back(tmp_path / "float", program)

    program = quantized(program, Grid(4, 16, False), Grid(8, -1, False))
    notes = emitted(program, tmp_path / "out")
    assert len(notes) == 1 and "only tpvc" in notes[0]
    check_read_back(tmp_path / "out", program)
    with pytest.raises(ValueError, match="Conv1D"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_shards(tmp_path, monkeypatch):
    program = quantized(llama(tmp_path / "source"), Grid(4, 32, False), Grid(8, -1, False))
    monkeypatch.setattr(stream_file.write, "__defaults__", (20_000,))
    emitted(program, tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    check_logits(loaded(tmp_path / "out"), program)
    check_read_back(tmp_path / "out", program)


def test_the_same_bytes_twice_and_the_small_files(tmp_path):
    program = quantized(llama(tmp_path / "source"), Grid(4, 32, False), Grid(8, -1, False))
    for name in ("a", "b"):
        emitted(program, tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors", "tpvc.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a/generation_config.json").read_bytes() == (
        tmp_path / "source/generation_config.json"
    ).read_bytes()
    manifest = json.loads((tmp_path / "a/tpvc.json").read_text())
    assert manifest["options"] == {"bits": 4}
    assert manifest["size"]["bytes"] == (tmp_path / "a/model.safetensors").stat().st_size


def test_end_tokens_reach_generation_without_a_generation_config(tmp_path):
    program = llama(tmp_path / "source")
    (tmp_path / "source/generation_config.json").unlink()
    emitted(program, tmp_path / "out")
    given = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert given["bos_token_id"] == 1 and given["eos_token_id"] == [2, 3]


def test_a_generation_config_beside_a_gguf_is_not_its_own(tmp_path):
    program = llama(tmp_path / "source")
    (tmp_path / "source/generation_config.json").write_text('{"eos_token_id": 77}')
    (tmp_path / "source/m.gguf").touch()
    source = replace(program.source, weights=(tmp_path / "source/m.gguf",))
    emitted(replace(program, source=source), tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [2, 3]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    program = quantized(llama(tmp_path / "source"), Grid(4, 32, False))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream_file, "_write_file", full)
    with pytest.raises(TpvcError, match="No space left on device"):
        emitted(program, tmp_path / "out")


def test_an_unknown_runtime(tmp_path):
    with pytest.raises(TpvcError, match="transformers, vllm"):
        emitted(llama(tmp_path / "source"), tmp_path / "out", runtime="llama.cpp")


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
WIDE = {**SIZES, "intermediate_size": 96, "max_position_embeddings": 64, "initializer_range": 0.1}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES = {
    "qwen2": ("Qwen2Config", {**WIDE, **ENDS, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**WIDE, **ENDS, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {**WIDE, **ENDS, "num_key_value_heads": 2}),
    "gemma2": ("Gemma2Config", {**WIDE, **ENDS, "num_key_value_heads": 2, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**WIDE, **ENDS, "num_key_value_heads": 1, "head_dim": 16}),
    "opt": ("OPTConfig", {**SIZES, **ENDS, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64}),
    "gpt_neox": ("GPTNeoXConfig", {**WIDE, **ENDS}),
    "gpt_neox, tied": ("GPTNeoXConfig", {**WIDE, **ENDS, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_an_8_bit_head(family, tmp_path):
    import transformers

    torch.manual_seed(0)
    name, fields = FAMILIES[family]
    config = getattr(transformers, name)(**fields)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "source")
    program = quantized(frontend.load(tmp_path / "source", "tiny"), Grid(3, 32, False), Grid(8, -1, False))
    assert emitted(program, tmp_path / "out") == []
    check_logits(loaded(tmp_path / "out"), program)
    check_read_back(tmp_path / "out", program)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_head_for_vllm(family, tmp_path):
    """Its Gemma-2 and OPT know tied heads alone, its GPT-NeoX calls the head otherwise: theirs is in float."""
    import transformers

    torch.manual_seed(0)
    name, fields = FAMILIES[family]
    config = getattr(transformers, name)(**fields)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "source")
    source = frontend.load(tmp_path / "source", "tiny")
    program = quantized(source, Grid(3, 32, False), Grid(8, -1, False))
    emitted(program, tmp_path / "out", runtime="vllm")
    told = json.loads((tmp_path / "out/config.json").read_text())
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        heads = {n: file.get_slice(n).get_dtype() for n in file.keys() if n.startswith(("lm_head", "embed_out"))}  # noqa: SIM118
    was = source.source.config.get("tie_word_embeddings", config.tie_word_embeddings)
    if name in ("Gemma2Config", "OPTConfig", "GPTNeoXConfig"):
        assert told.get("tie_word_embeddings", was) == was
        assert heads == ({} if was else {"embed_out.weight": "F32"})
        assert ("embed_out" if "NeoX" in name else "lm_head") in told["quantization_config"]["ignore"]
    else:
        assert "lm_head.weight_packed" in heads and not told["tie_word_embeddings"]
    again, head = frontend.load(tmp_path / "out", "again"), linears(program.nodes)[-1].params["weight"]
    own = linears(again.nodes)[-1].params["weight"]
    assert torch.equal(dense(again.params[own]), dense(program.params[head]))


@pytest.mark.parametrize("runtime", ["transformers", "gptq"])
def test_a_float_head_has_the_name_that_transformers_gives_it(runtime, tmp_path):
    import transformers

    name, fields = FAMILIES["gpt_neox"]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**fields)).float()
    model.save_pretrained(tmp_path / "source")
    program = quantized(frontend.load(tmp_path / "source", "tiny"), Grid(4, 32, True))
    emitted(program, tmp_path / "out", runtime=runtime)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert "embed_out.weight" in file.keys()  # noqa: SIM118
    if runtime == "transformers":
        check_logits(loaded(tmp_path / "out"), program)


ROWS = [
    ("int8", Grid(8, -1, True), "int-quantized"),
    ("int8", Grid(8, 32, False), "int-quantized"),
    ("int8", Grid(4, -1, True), "pack-quantized"),
    ("int8", Grid(3, 32, False), "pack-quantized"),
    ("fp8", Grid(4, 32, True), "pack-quantized"),
    ("fp8", Grid(3, -1, False), "pack-quantized"),
]


def theirs(x: torch.Tensor, *, kind: str) -> torch.Tensor:
    """compressed-tensors' own rounding of x [B, T, D]."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    type_ = {"int8": "int", "fp8": "float"}[kind]
    args = QuantizationArgs(num_bits=8, type=type_, symmetric=True, strategy="token", dynamic=True)
    return fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, None), args)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind,grid,form", ROWS, ids=str)
def test_transformers_rounds_activations(kind, grid, form, tied, tmp_path):
    """Every module, given what it is given there. compressed-tensors divides the largest of a row by 127.5 for int8 and
    clamps it, vLLM and we by 127: two roundings, each off by half of its step at most. For fp8 there is one way."""
    program = RoundActivations(kind)(quantized(llama(tmp_path / "source", tied=tied), grid, Grid(8, -1, True)))
    assert emitted(program, tmp_path / "out") == []
    check_read_back(tmp_path / "out", program)
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"].values()
    assert {g["format"] for g in said if g["input_activations"]} == {form}
    assert any(g["targets"] == ["Linear"] and g["input_activations"] for g in said)

    model, seen = loaded(tmp_path / "out"), {}
    kinds = rounded_inputs(program)
    assert len(kinds) == 14
    for name in kinds:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_hook(lambda m, given, out, name=name: seen.update({name: (given[0], out)}))
    with torch.no_grad():
        logits = model(TOKENS).logits
    for name in kinds:
        x, out = seen[name]
        weight = dense(program.params[name])
        sums = 96 * 2**-24 * (x.abs() @ weight.abs().T).max()
        assert ((theirs(x, kind=kind) @ weight.T) - out).abs().max() <= sums, name
        ours = ops.round_rows(x, kind=kind) @ weight.T
        half = x.abs().amax(-1, keepdim=True) * (0.5 / 127 + 0.5 / 127.5) * 1.0001 if kind == "int8" else 0
        assert bool(((ours - out).abs() <= sums + half * weight.abs().sum(1)).all()), name

    ours = interpret.logits(program, TOKENS)
    cost = (ours - interpret.logits(replace(program, nodes=without_rounding(program)), TOKENS)).norm()
    # as two roundings of the same numbers, each of which costs this much, the same way (1 + 1)
    assert (logits - ours).norm() <= (2 * cost if kind == "int8" else 0.2 * cost)


def without_rounding(program):
    value = {n.name: n.inputs[0] for n in program.nodes if n.op in ROUNDERS}
    kept = (n for n in program.nodes if n.op not in ROUNDERS)
    return tuple(replace(n, inputs=tuple(value.get(v, v) for v in n.inputs)) for n in kept)


STATIC_GRIDS = ((0.011, -7), (0.0625, 3))


def on_static_grids(program):
    """The program with its values in the blocks on one of two grids, in turn."""
    program = RoundActivations("int8-static")(program)
    kept, turn = [], 0
    for node in program.nodes:
        if node.op == "round_tensor":
            scale, zero = STATIC_GRIDS[turn % 2]
            turn, node = turn + 1, replace(node, attrs={"scale": torch.tensor(scale).item(), "zero": zero})
        kept.append(node)
    return replace(program, nodes=tuple(kept))


@pytest.mark.parametrize("grid,form", [(Grid(8, -1, True), "int-quantized"), (Grid(4, 32, False), "pack-quantized")])
@pytest.mark.parametrize("runtime", ["transformers", "vllm"])
def test_transformers_rounds_activations_on_static_grids(grid, form, runtime, tmp_path):
    """Where compressed-tensors adds the zero point before it rounds, and we after: a number may go to the other
    neighbour where it lies half way. Otherwise every module yields the same of what it is given there.
    """
    program = on_static_grids(quantized(llama(tmp_path / "source", tied=True), grid, Grid(8, -1, True)))
    emitted(program, tmp_path / "out", runtime=runtime)
    if runtime == "transformers":
        check_read_back(tmp_path / "out", program)
    read_back = frontend.load(tmp_path / "out", "again")
    assert input_grids(read_back) == input_grids(program) and len(input_grids(program)) == 14
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"].values()
    assert [g["format"] for g in said if g["input_activations"]] == [form]
    if runtime == "vllm" and not grid.symmetric:
        return  # transformers does not read packed zero points

    model, seen = loaded(tmp_path / "out"), {}
    for name in input_grids(program):
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_hook(lambda m, given, out, name=name: seen.update({name: (given[0], out)}))
    with torch.no_grad():
        logits = model(TOKENS).logits
    for name, (scale, zero) in input_grids(program).items():
        x, out = seen[name]
        weight = dense(program.params[name])
        # at most 255 steps and the zero point, rounded to float32 four times
        edge = ((x / scale).abs() % 1 - 0.5).abs() < 4 * 255 * 2**-24
        ours = ops.round_tensor(x, scale=scale, zero=zero)
        slack = 96 * 2**-24 * (ours.abs() @ weight.abs().T) + scale * (edge.float() @ weight.abs().T)
        assert bool(((ours @ weight.T - out).abs() <= slack).all()), name
    ours = interpret.logits(program, TOKENS)
    cost = (ours - interpret.logits(replace(program, nodes=without_rounding(program)), TOKENS)).norm()
    assert (logits - ours).norm() <= 0.2 * cost


def test_a_scale_that_the_dtype_does_not_hold_is_refused(tmp_path):
    program = quantized(llama(tmp_path / "source"), Grid(8, -1, True), scale_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"not exact in torch\.bfloat16"):
        emitted(on_static_grids(program), tmp_path / "out")


def test_rounded_activations_for_vllm(tmp_path):
    """W8A8 as bytes, and fewer bits packed, is what its schemes read."""
    for kind, bits, form in (("int8", 8, "int-quantized"), ("int8", 4, "pack-quantized"), ("fp8", 4, "pack-quantized")):
        program = quantized(llama(tmp_path / f"{kind}{bits}", tied=True), Grid(bits, -1, True), Grid(8, -1, True))
        emitted(RoundActivations(kind)(program), tmp_path / f"{kind}{bits}-out", runtime="vllm")
        config = json.loads((tmp_path / f"{kind}{bits}-out/config.json").read_text())["quantization_config"]
        (group,) = (g for g in config["config_groups"].values() if g["input_activations"])
        assert (group["format"], group["targets"]) == (form, ["Linear"])
        frontend.load(tmp_path / f"{kind}{bits}-out", "again")


def test_rounded_activations_of_a_float_linear_are_refused(tmp_path):
    program = RoundActivations("int8")(llama(tmp_path / "source"))
    with pytest.raises(TpvcError, match=r"q_proj.weight' is in float and reads rows rounded to int8"):
        emitted(program, tmp_path / "out")


def test_transformers_rounds_keys_and_values(tmp_path):
    """compressed-tensors divides the largest of a head's vector by 127.5 and clamps it, the kernels and we by 127: two
    roundings of the same numbers, each off by half of its step at most."""
    plain = quantized(llama(tmp_path / "source"), Grid(8, -1, True), Grid(8, -1, True))
    program = RoundCache()(plain)
    assert emitted(program, tmp_path / "out") == []
    check_read_back(tmp_path / "out", program)
    with torch.no_grad():
        out = loaded(tmp_path / "out")(TOKENS)
    cache, ours = {}, {}
    logits = interpret.logits(program, TOKENS, cache=cache)
    interpret.logits(plain, TOKENS, cache=ours)
    first = next(iter(cache))
    for x, found, mine in zip(
        ours[first],
        (out.past_key_values.layers[0].keys, out.past_key_values.layers[0].values),
        cache[first],
        strict=True,
    ):
        largest = x.abs().amax(-1, keepdim=True)
        assert bool(((found - x).abs() <= largest * 0.5001 / 127.5 + 1e-5).all()) and not torch.equal(found, x)
        assert bool(((mine - x).abs() <= largest * 0.5001 / 127).all())
    cost = (logits - interpret.logits(plain, TOKENS)).norm()
    assert (out.logits - logits).norm() <= 2 * cost


def test_transformers_loads_a_rounded_cache_of_a_config_without_key_and_value_heads(tmp_path):
    import transformers

    name, fields = FAMILIES["opt"]
    transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**fields)).save_pretrained(tmp_path / "s")
    plain = quantized(frontend.load(tmp_path / "s", "tiny"), Grid(8, -1, True), Grid(8, -1, True))
    program = RoundCache()(plain)
    emitted(program, tmp_path / "out")
    check_read_back(tmp_path / "out", program)
    with torch.no_grad():
        found = loaded(tmp_path / "out")(TOKENS).logits
    logits = interpret.logits(program, TOKENS)
    assert (found - logits).norm() <= 2 * (logits - interpret.logits(plain, TOKENS)).norm()


def test_a_rounded_cache_is_not_told_to_vllm(tmp_path):
    """Which reads one scale for a whole layer alone, and refuses others."""
    program = RoundCache()(quantized(llama(tmp_path / "source"), Grid(4, 32, True), Grid(8, -1, True)))
    (note,) = emitted(program, tmp_path / "out", runtime="vllm")
    assert "keeps keys and values in float" in note
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["kv_cache_scheme"] is None

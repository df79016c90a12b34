"""PEFT's RoAd directories, both ways, with PEFT itself on random small models; and what a directory may not hold."""

import copy
import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tpvc.compiler.adapters import road_files
from tpvc.compiler.adapters.peft_directory import CONFIG, PICKLE, WEIGHTS
from tpvc.compiler.adapters.road import Road, identity, rotate
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import in_memory, logits, positions_of
from tpvc.compiler.program import Grid, linears
from tpvc.compiler.sha256 import sha256
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.round_to_nearest import quantize

SIZES = {
    "vocab_size": 192,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SIZES, intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=False),
    "qwen2": lambda: hf.Qwen2Config(**SIZES, intermediate_size=192, num_key_value_heads=2, tie_word_embeddings=True),
    "opt": lambda: hf.OPTConfig(**SIZES, ffn_dim=192, word_embed_proj_dim=128),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=192, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
}
TARGETS = {
    "q-v": ["q_proj", "v_proj"],
    "all-linear": "all-linear",
    "mlp": ["gate_proj", "up_proj", "down_proj", "fc1", "fc2"],
    "one-layer": r".*layers\.1\..*(q_proj|down_proj|fc2)",
}
VARIANTS, GROUPS = ("road_1", "road_2", "road_4"), (2, 8, 32, 64)
CASES = [("llama", v, g, t) for v in VARIANTS for g in GROUPS for t in TARGETS]
CASES += [
    (family, v, g, list(TARGETS)[(i + j + shift) % 4])
    for shift, family in enumerate(("opt", "qwen2"))
    for i, v in enumerate(VARIANTS)
    for j, g in enumerate(GROUPS)
]
"""Every combination for Llama; for the others the target sets take turns."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: (transformers model in float32, its Program)}; norms and biases are not 1 and 0."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(len(name))
        model = hf.AutoModelForCausalLM.from_config(config(), attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
        directory = tmp_path_factory.mktemp("base") / name
        model.save_pretrained(directory)
        made[name] = model, load(directory)
    return made


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def batch():
    ids = torch.randint(3, 192, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[1, :4] = False
    return ids, mask


@torch.no_grad()
def theirs(model):
    ids, mask = batch()
    return model(input_ids=ids, attention_mask=mask.long(), position_ids=positions_of(mask, 11)).logits[mask]


@torch.no_grad()
def ours(program, road, dtype=torch.float32):
    ids, mask = batch()
    banked = BankRoad((road,))(program)
    chosen = torch.zeros(len(ids), dtype=torch.long)
    return logits(banked, ids, mask, in_memory(banked, dtype=dtype), adapter_ids=chosen)[mask]


def tolerance(program, wanted):
    """Worst-case linear accumulation of rounding, relative to the largest logit; see tests/frontends/test_families.py.

    A linear sums K products, attention as many as there are tokens and features of a head; every other op, a rotation
    too, adds a few roundings. Two implementations: twice that.
    """
    terms = 0
    for node in program.nodes:
        if node.op == "linear":
            terms += program.params[node.params["weight"]].shape[1] + 4
        else:
            terms += 11 + program.facts.head_dim if node.op == "attention" else 4
    return 2 * terms * torch.finfo(torch.float32).eps * float(wanted.abs().max())


def adapted(model, variant, group, target_modules, seed=0, **fields):
    """The model as PEFT adapts it, with random rotations."""
    torch.manual_seed(seed)
    config = peft.RoadConfig(
        variant=variant, group_size=group, target_modules=target_modules, init_weights=False, **fields
    )
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.parametrize("family, variant, group, chosen", CASES)
def test_peft_both_ways(models, tmp_path, family, variant, group, chosen):
    model, program = models[family]
    with_peft = adapted(model, variant, group, TARGETS[chosen], task_type="CAUSAL_LM")
    with_peft.save_pretrained(tmp_path / "theirs")
    wanted = theirs(with_peft)

    road = road_files.read(tmp_path / "theirs", program, "task")
    assert {(r.variant, r.group) for r in road.rotations.values()} == {(variant, group)}
    assert road.trainables == sum(p.numel() for n, p in with_peft.named_parameters() if "road_" in n)
    limit = tolerance(program, wanted)
    torch.testing.assert_close(ours(program, road), wanted, rtol=0, atol=limit)
    assert float((theirs(model) - wanted).abs().max()) > 20 * limit

    road_files.write(road, tmp_path / "ours", program, {})
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert torch.equal(theirs(loaded), wanted)
    names = {n for n, _ in with_peft.named_modules() if n.endswith("road_theta")}
    assert {n for n, _ in loaded.named_modules() if n.endswith("road_theta")} == names
    stored = [load_file(tmp_path / d / WEIGHTS) for d in ("theirs", "ours")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][n], stored[1][n]) for n in stored[0])


def test_an_adapted_head_and_the_copy_of_the_base_that_peft_stores_with_it(models, tmp_path):
    model, program = models["llama"]
    with_peft = adapted(model, "road_2", 64, ["lm_head", "o_proj"], task_type="CAUSAL_LM")
    with_peft.save_pretrained(tmp_path / "theirs")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "theirs" / WEIGHTS)
    road = road_files.read(tmp_path / "theirs", program, "task")
    assert "lm_head" in road.rotations
    wanted = theirs(with_peft)
    torch.testing.assert_close(ours(program, road), wanted, rtol=0, atol=tolerance(program, wanted))
    road_files.write(road, tmp_path / "ours", program, {})
    assert road_files.read_json(tmp_path / "ours" / CONFIG)["target_modules"] == ["lm_head", "o_proj"]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    assert torch.equal(theirs(loaded), wanted)

    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    tensors["base_model.model.lm_head.base_layer.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(TpvcError, match=r"lm_head\.base_layer\.weight.*of its own"):
        road_files.read(tmp_path / "theirs", program, "task")


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_an_adapter_of_the_model_without_its_head(models, tmp_path, family):
    """Its names lack the first part of ours."""
    model, program = models[family]
    whole = copy.deepcopy(model)
    torch.manual_seed(0)
    config = peft.RoadConfig(group_size=8, target_modules=["v_proj"], init_weights=False)
    peft.get_peft_model(whole.model, config).eval().save_pretrained(tmp_path)
    assert not any("base_model.model.model." in n for n in load_file(tmp_path / WEIGHTS))
    wanted = theirs(whole)
    road = road_files.read(tmp_path, program, "task")
    torch.testing.assert_close(ours(program, road), wanted, rtol=0, atol=tolerance(program, wanted))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_a_bfloat16_base_with_a_float32_adapter(models, tmp_path, family, variant):
    """Every adapted linear gives PEFT's bits for PEFT's input; the logits are as near as bfloat16 is."""
    model, _ = models[family]
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "base")
    program = load(tmp_path / "base")
    with_peft = adapted(half, variant, 32, "all-linear", task_type="CAUSAL_LM")
    with_peft.save_pretrained(tmp_path / "adapter")
    road = road_files.read(tmp_path / "adapter", program, "task")
    assert all(r.theta.dtype == torch.float32 for r in road.rotations.values())
    seen = {}
    for name in road.rotations:
        layer = with_peft.base_model.model.get_submodule(name)
        layer.base_layer.register_forward_hook(lambda m, x, y, name=name: seen.update({name: [y]}))
        layer.register_forward_hook(lambda m, x, y, name=name: seen[name].append(y))
    wanted = theirs(with_peft)
    for name, (h, z) in seen.items():
        assert h.dtype == z.dtype == torch.bfloat16
        assert torch.equal(rotate(h, *road.rotations[name].vectors, 32), z), name
    got = ours(program, road, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    # Products are summed in float32 and rounded once an op to bfloat16, half an eps; an op of ours is up to four of
    # theirs; two implementations: 4 eps a node, of which the errors' signs let pass the root of their number.
    ops = 2 * len(program.nodes)
    limit = 4 * ops**0.5 * torch.finfo(torch.bfloat16).eps * float(wanted.float().abs().max())
    assert float((got - wanted).abs().max()) <= limit < float((theirs(half) - wanted).abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [2, 32])
def test_gpt2_whose_layers_peft_refuses(models, tmp_path, variant, group, dense, drawn):
    """Conv1D: the oracle is R, built in float64, on the output of transformers' layers."""
    model, program = models["gpt2"]
    with pytest.raises(ValueError, match="not supported"):
        adapted(model, variant, group, ["c_attn"])
    chosen = [n for n in linears(program.nodes) if n.block is not None]
    outputs = {n.name: program.params[n.params["weight"]].shape[0] for n in chosen}
    made = {name: drawn(variant, group, n, seed) for seed, (name, n) in enumerate(outputs.items())}
    road_files.write(Road("task", made), tmp_path, program, {})
    hooked = copy.deepcopy(model)
    for name, rotation in made.items():
        r = dense(rotation)
        hooked.get_submodule(name).register_forward_hook(lambda m, x, y, r=r: (y.double() @ r.T).float())
    wanted = theirs(hooked)
    road = road_files.read(tmp_path, program, "task")
    torch.testing.assert_close(ours(program, road), wanted, rtol=0, atol=tolerance(program, wanted))
    assert float((theirs(model) - wanted).abs().max()) > 20 * tolerance(program, wanted)


def some(program, drawn, variant="road_4", group=8, last=("q_proj", "down_proj"), name="task"):
    chosen = [n for n in linears(program.nodes) if n.name.split(".")[-1] in last]
    outputs = [program.params[n.params["weight"]].shape[0] for n in chosen]
    return Road(
        name, {n.name: drawn(variant, group, f, i) for i, (n, f) in enumerate(zip(chosen, outputs, strict=True))}
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", GROUPS)
def test_a_round_trip_keeps_every_bit_and_repeats(models, tmp_path, variant, group, drawn):
    _, program = models["llama"]
    road = some(program, drawn, variant, group)
    for name in ("a", "b"):
        road_files.write(road, tmp_path / name, program, {"tpvc": "1", "options": {"lr": 0.1}})
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == [CONFIG, WEIGHTS, "tpvc.json"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    back = road_files.read(tmp_path / "a", program, "other")
    assert back.name == "other" and list(back.rotations) == list(road.rotations)
    for key, rotation in road.rotations.items():
        assert torch.equal(back.rotations[key].theta, rotation.theta)
        assert torch.equal(back.rotations[key].alpha, rotation.alpha)
    assert back.origin == {
        "directory": "a",
        "sha256": sha256(tmp_path / "a" / WEIGHTS),
        "variant": variant,
        "group": group,
    }
    manifest = json.loads((tmp_path / "a" / "tpvc.json").read_text())
    assert manifest["artefact"] == "road" and manifest["tpvc"] == "1" and manifest["options"] == {"lr": 0.1}
    assert manifest["base"]["name"] == program.source.name and manifest["base"]["files"] == program.source.files


def test_the_config_is_peft_s(models, tmp_path, drawn):
    model, program = models["llama"]
    with_peft = adapted(model, "road_4", 8, ["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with_peft.save_pretrained(tmp_path / "theirs")
    road_files.write(some(program, drawn), tmp_path / "ours", program, {})
    wanted, got = (json.loads((tmp_path / d / CONFIG).read_text()) for d in ("theirs", "ours"))
    assert sorted(wanted.pop("target_modules")) == got.pop("target_modules") == ["down_proj", "q_proj"]
    wanted |= {"base_model_name_or_path": program.source.name, "init_weights": True}
    assert {k: v for k, v in wanted.items() if k != "peft_version"} == got


def test_an_adapter_of_an_integer_base(models, tmp_path, drawn):
    _, program = models["llama"]
    weights = {n.params["weight"] for n in linears(program.nodes) if n.block is not None}
    integers = program.with_params({w: quantize(program.params[w].read(), Grid(4, 32, False)) for w in weights})
    road = some(integers, drawn)
    road_files.write(road, tmp_path, integers, {})
    back = road_files.read(tmp_path, integers, "task")
    assert torch.equal(ours(integers, back), ours(integers, road))


def test_one_directory_holds_one_layout_and_fits_its_program(models, tmp_path, drawn):
    _, program = models["llama"]
    road = some(program, drawn)
    name = next(iter(road.rotations))
    for other in (drawn("road_1", 8, 128), drawn("road_4", 16, 128)):
        mixed = replace(road, rotations={**road.rotations, name: other})
        with pytest.raises(TpvcError, match=r"adapter 'task' has rotations of .*; expected one variant and one group"):
            road_files.write(mixed, tmp_path / "out", program, {})
    with pytest.raises(TpvcError, match="rotations of none"):
        road_files.write(Road("task", {}), tmp_path / "out", program, {})
    with pytest.raises(TpvcError, match="for another model"):
        road_files.write(Road("task", {"x.q_proj": drawn("road_1", 8, 128)}), tmp_path / "out", program, {})
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(TpvcError, match="cannot be written"):
        road_files.write(road, tmp_path / "file", program, {})


Q = "base_model.model.model.layers.0.self_attn.q_proj."


def config(**fields):
    def change(directory):
        path = directory / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def tensors(**changed):
    """Tensors of layer 0's q_proj (theta=, alpha=) or others (by full name, "__" for "."); None removes one."""

    def change(directory):
        held = load_file(directory / WEIGHTS)
        for key, value in changed.items():
            name = f"{Q}road_{key}" if key in ("theta", "alpha") else key.replace("__", ".")
            held.pop(name, None)
            if value is not None:
                held[name] = value
        save_file(held, directory / WEIGHTS)

    return change


def spoiled(index, value, part="theta"):
    def change(directory):
        held = load_file(directory / WEIGHTS)
        held[f"{Q}road_{part}"][index] = value
        save_file(held, directory / WEIGHTS)

    return change


def pickled(directory):
    torch.save({}, directory / PICKLE)
    (directory / WEIGHTS).unlink()


def cut(directory):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def renamed(old, new):
    def change(directory):
        held = load_file(directory / WEIGHTS)
        save_file({n.replace(old, new): t for n, t in held.items()}, directory / WEIGHTS)

    return change


def remove(name):
    return lambda directory: (directory / name).unlink()


def overwritten(name, text):
    return lambda directory: (directory / name).write_text(text)


VARIANT_WORDS = "expected one of road_1, road_2, road_4, perhaps"
GROUP_WORDS = "expected an even number, at least 2"
BAD = {
    "config-missing": (remove(CONFIG), "has no adapter_config.json; expected"),
    "weights-missing": (remove(WEIGHTS), "has no adapter_model.safetensors; expected"),
    "pickle": (pickled, r"pickle \(adapter_model.bin\), which can run code.*load it with PEFT and save it again"),
    "lora": (config(peft_type="LORA"), "peft_type = 'LORA'; expected 'ROAD'"),
    "no-type": (config(peft_type=None), "peft_type = None; expected 'ROAD'"),
    "type-list": (config(peft_type=["ROAD"]), r"peft_type = \['ROAD'\]; expected 'ROAD'"),
    "variant-1": (config(variant="1"), f"variant = '1'; {VARIANT_WORDS} 'road_1'"),
    "variant-number": (config(variant=2), f"variant = 2; {VARIANT_WORDS} 'road_2'"),
    "variant-list": (config(variant=[]), rf"variant = \[\]; {VARIANT_WORDS} 'road_1'"),
    "variant-object": (config(variant={"a": 1}), VARIANT_WORDS),
    "variant-null": (config(variant=None), f"variant = None; {VARIANT_WORDS} 'road_1'"),
    "group-odd": (config(group_size=7), f"group_size = 7; {GROUP_WORDS}"),
    "group-zero": (config(group_size=0), f"group_size = 0; {GROUP_WORDS}"),
    "group-negative": (config(group_size=-8), f"group_size = -8; {GROUP_WORDS}"),
    "group-null": (config(group_size=None), f"group_size = None; {GROUP_WORDS}"),
    "group-text": (config(group_size="8"), f"group_size = '8'; {GROUP_WORDS}"),
    "group-float": (config(group_size=8.0), f"group_size = 8.0; {GROUP_WORDS}"),
    "group-true": (config(group_size=True), f"group_size = True; {GROUP_WORDS}"),
    "group-list": (config(group_size=[8]), GROUP_WORDS),
    "group-not-dividing": (config(group_size=48), r"group size 48 does not divide the 128 outputs of '.*q_proj'"),
    "group-huge": (config(group_size=10**30), "does not divide the 128 outputs"),
    "config-array": (overwritten(CONFIG, "[1]"), "holds a list; expected a JSON object"),
    "config-damaged": (overwritten(CONFIG, '{"peft_type": "ROAD"'), "cannot be read as JSON"),
    "weights-cut": (cut, "is not a complete safetensors file"),
    "weights-empty": (overwritten(WEIGHTS, ""), "is not a complete safetensors file"),
    "weights-text": (overwritten(WEIGHTS, "version https://git-lfs"), "is not a complete safetensors file"),
    "no-tensors": (lambda d: save_file({}, d / WEIGHTS), "holds no rotation; expected tensors like"),
    "no-alpha": (tensors(alpha=None), r"q_proj\.road_theta' but no 'road_alpha' beside it"),
    "no-theta": (tensors(theta=None), r"q_proj\.road_alpha' but no 'road_theta' beside it"),
    "shorter-alpha": (
        tensors(alpha=torch.ones(255)),
        "256 angles and 255 scales for 'model.layers.0.self_attn.q_proj'",
    ),
    "both-short": (
        tensors(theta=torch.zeros(128), alpha=torch.ones(128)),
        "for another model: it has 64 outputs for 'model.layers.0.self_attn.q_proj', this one has 128",
    ),
    "both-odd": (tensors(theta=torch.zeros(257), alpha=torch.ones(257)), "has 257 numbers; road_4 has two for every"),
    "both-empty": (tensors(theta=torch.zeros(0), alpha=torch.ones(0)), "it has 0 outputs"),
    "two-dimensions": (tensors(theta=torch.zeros(1, 256)), r"q_proj\.road_theta.*F32 \[1, 256\]; expected one dim"),
    "scalar": (tensors(theta=torch.zeros(())), r"is F32 \[\]; expected one dimension"),
    "integers": (tensors(theta=torch.zeros(256, dtype=torch.int32)), r"is I32 \[256\]; expected .* F32, F16, BF16"),
    "nan-angle": (spoiled(5, float("nan")), r"q_proj\.road_theta' in .* holds NaN or Inf"),
    "infinite-angle": (spoiled(5, float("inf")), r"q_proj\.road_theta' in .* holds NaN or Inf"),
    "nan-scale": (spoiled(5, float("nan"), "alpha"), r"q_proj\.road_alpha' in .* holds NaN or Inf"),
    "infinite-scale": (spoiled(5, float("-inf"), "alpha"), r"q_proj\.road_alpha' in .* holds NaN or Inf"),
    "other-variant": (config(variant="road_2"), "for another model: it has 256 outputs"),
    "other-names": (renamed("q_proj", "query"), r"another model: it adapts 'model.layers.0.self_attn.query'.*like"),
    "more-layers": (renamed("layers.1", "layers.9"), "for another model: it adapts 'model.layers.9"),
    "names-twice": (
        tensors(base_model__model__layers__0__self_attn__q_proj__road_theta=torch.zeros(256)),
        "holds both",
    ),
    "modules-to-save": (
        tensors(base_model__model__lm_head__weight=torch.zeros(192, 128)),
        r"stores 'base_model\.model\.lm_head\.weight', a weight of its own.*\(modules_to_save\).*train.*without",
    ),
    "lora-weights": (tensors(base_model__model__q_proj__lora_A__weight=torch.zeros(8, 128)), "of its own beside"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_directories_are_refused_with_a_sentence(models, tmp_path, name, drawn):
    _, program = models["llama"]
    road_files.write(some(program, drawn), tmp_path, program, {})
    road_files.read(tmp_path, program, "task")
    change, words = BAD[name]
    change(tmp_path)
    with pytest.raises(TpvcError, match=words) as refused:
        road_files.read(tmp_path, program, "task")
    assert "\n" not in str(refused.value)


def test_places_that_are_no_directory(models, tmp_path):
    _, program = models["llama"]
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(TpvcError, match="is not a directory; expected one with adapter_config"):
            road_files.read(place, program, "task")


def test_an_adapter_for_another_base(models, tmp_path, drawn):
    _, program = models["llama"]
    road_files.write(some(program, drawn), tmp_path, program, {})
    for family in ("opt", "gpt2"):
        with pytest.raises(TpvcError, match="adapter 'task' is for another model"):
            road_files.read(tmp_path, models[family][1], "task")


def test_absent_fields_have_peft_s_defaults(models, tmp_path):
    _, program = models["llama"]
    road = Road("task", {"model.layers.0.self_attn.q_proj": identity("road_1", 64, 128)})
    road_files.write(road, tmp_path, program, {})
    (tmp_path / CONFIG).write_text('{"peft_type": "ROAD"}')
    back = road_files.read(tmp_path, program, "task")
    assert {(r.variant, r.group) for r in back.rotations.values()} == {("road_1", 64)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_numbers_become_float32(models, tmp_path, dtype, drawn):
    _, program = models["llama"]
    road_files.write(some(program, drawn), tmp_path, program, {})
    held = {n: t.to(dtype) for n, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(held, tmp_path / WEIGHTS)
    for name, rotation in road_files.read(tmp_path, program, "task").rotations.items():
        assert torch.equal(rotation.theta, held[f"base_model.model.{name}.road_theta"].float())

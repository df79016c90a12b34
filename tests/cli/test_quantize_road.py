"""`tpvc quantize --road`: adapters beside the integers or inside them, and what is there when it is loaded again."""

import json

import pytest
import torch

from tpvc.compiler import frontends, interpret
from tpvc.compiler.adapters import road_files
from tpvc.compiler.adapters.road import Road, Rotation
from tpvc.compiler.program import Grid, QTensor, linears, read
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.fold_road import FoldRoad
from tpvc.passes.round_to_nearest import quantize

RTN = ("--method", "rtn", "--bits", 4, "--group-size", 32)
IDS = torch.tensor([[5, 9, 200, 7, 33], [17, 4, 250, 1, 8], [9, 9, 9, 9, 9]])


@pytest.fixture(scope="session")
def base(tiny_llama):
    return frontends.load(tiny_llama)


@pytest.fixture(scope="session")
def roads(tmp_path_factory, base):
    """{name: directory} of two adapters of other variants, on all linears of the blocks and on two of each block."""
    folder, draw, made = tmp_path_factory.mktemp("roads"), torch.Generator().manual_seed(1), {}
    for name, variant, share, targets in (
        ("all", "road_1", 0.5, None),
        ("some", "road_4", 2, ("q_proj", "down_proj")),
    ):
        rotations = {}
        for node in linears(base.nodes):
            if node.block is None or (targets and node.name.split(".")[-1] not in targets):
                continue
            m = int(base.params[node.params["weight"]].shape[0] * share)
            theta, alpha = (torch.randn(m, generator=draw) * 0.4 for _ in range(2))
            rotations[node.name] = Rotation(variant, 32, theta, 1 + alpha)
        road_files.write(Road(name, rotations), folder / name, base, {})
        made[name] = folder / name
    return made


def read_roads(base, roads):
    return tuple(road_files.read(directory, base, name) for name, directory in roads.items())


@torch.no_grad()
def test_adapters_travel_beside_the_integers(ok, base, tiny_llama, roads, tmp_path):
    out = tmp_path / "w4"
    options = [o for name, directory in roads.items() for o in ("--road", f"{name}={directory}")]
    told = ok("quantize", tiny_llama, "-o", out, *RTN, *options)["manifest"]
    assert [a["name"] for a in told["adapters"]] == ["all", "some"]
    assert (told["adapters"][1]["variant"], told["adapters"][1]["group"]) == ("road_4", 32)
    for name, directory in roads.items():
        kept = out / "adapters" / name / "adapter_model.safetensors"
        assert kept.read_bytes() == (directory / "adapter_model.safetensors").read_bytes()
    loaded = frontends.load(out)
    assert [a.name for a in loaded.adapters] == ["all", "some"]
    plain = tmp_path / "plain"
    ok("quantize", tiny_llama, "-o", plain, *RTN)
    beside = BankRoad(read_roads(base, roads))(frontends.load(plain))
    ids = torch.tensor([-1, 0, 1])
    found = interpret.logits(loaded, IDS, adapter_ids=ids)
    assert torch.equal(found, interpret.logits(beside, IDS, adapter_ids=ids))
    assert torch.equal(found[:1], interpret.logits(frontends.load(plain), IDS)[:1])


def test_the_artefact_with_adapters_is_still_a_checkpoint_of_transformers(ok, tiny_llama, roads, tmp_path):
    """transformers sees the base; PEFT's directories lie beside it."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "w4"
    ok("quantize", tiny_llama, "-o", out, *RTN, "--road", f"all={roads['all']}")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        theirs, ours = model(IDS).logits, interpret.logits(frontends.load(out), IDS)
    # two float32 evaluations of 15 products with at most 128 terms
    assert (theirs - ours).abs().max() <= 15 * 128 * 2**-24 * ours.abs().max()


@torch.no_grad()
def test_folding_puts_the_adapter_into_the_integers(ok, base, tiny_llama, roads, tmp_path):
    out = tmp_path / "folded"
    told = ok("quantize", tiny_llama, "-o", out, *RTN, "--road", f"all={roads['all']}", "--fold")["manifest"]
    assert told["adapters"] == [] and not (out / "adapters").exists()
    assert [p["name"] for p in told["passes"][:2]] == ["BankRoad", "FoldRoad"]
    assert told["options"]["roads"]["all"] and told["options"]["fold"]
    loaded = frontends.load(out)
    folded = FoldRoad()(BankRoad((road_files.read(roads["all"], base, "all"),))(base))
    for node in linears(loaded.nodes):
        if node.block is not None:
            name = node.params["weight"]
            there, wanted = read(loaded.params[name]), quantize(read(folded.params[name]), Grid(4, 32, False))
            assert isinstance(there, QTensor) and torch.equal(there.codes, wanted.codes), name
            assert torch.equal(there.scale, wanted.scale) and torch.equal(there.zero, wanted.zero)


LEARN = ("--bits", 3, "--group-size", 32, "--iters", 4, "--nsamples", 16, "--seqlen", 16)


def test_flexround_runs_under_the_adapters_and_gives_the_same_bytes(ok, tiny_llama, roads, tmp_path):
    out, again = tmp_path / "w3", tmp_path / "again"
    both = [o for name, directory in roads.items() for o in ("--road", f"{name}={directory}")]
    told = ok("quantize", tiny_llama, "-o", out, *LEARN, *both)["manifest"]
    assert [p["name"] for p in told["passes"]] == ["BankRoad", "FlexRound", "TuneScales", "RoundToNearest"]
    ok("quantize", tiny_llama, "-o", again, *LEARN, *both)
    for path in sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file() and p.name != "report.html"):
        assert (out / path).read_bytes() == (again / path).read_bytes(), path


def test_a_stopped_run_goes_on_with_the_same_adapters_only(ok, tpvc, refused, tiny_llama, roads, tmp_path, monkeypatch):
    from tpvc.passes.flexround import FlexRound

    whole, fit = tmp_path / "whole", FlexRound._fit
    given = ("quantize", tiny_llama, *LEARN, "--road", f"a={roads['all']}")
    ok(*given, "-o", whole)

    def stopping(self, program, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        return fit(self, program, index, *rest)

    out = tmp_path / "out"
    monkeypatch.setattr(FlexRound, "_fit", stopping)
    assert tpvc(*given, "-o", out).exit_code == 130
    monkeypatch.undo()
    assert "roads is" in refused("quantize", tiny_llama, *LEARN, "--road", f"a={roads['some']}", "-o", out)
    ok(*given, "-o", out)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_an_adapter_that_is_read_is_never_replaced(refused, tiny_llama, roads, tmp_path):
    import shutil

    place = tmp_path / "a"
    shutil.copytree(roads["all"], place)
    for command in (("quantize", *RTN), ("export",)):
        said = refused(command[0], tiny_llama, *command[1:], "--road", f"x={place}", "-o", place, "--overwrite")
        assert "would be lost" in said and (place / "adapter_config.json").exists()


def test_what_stays_in_float_keeps_its_dtype_when_folded(ok, tmp_path, tiny_tokenizer):
    """Biases of a bfloat16 model are folded in float32 and stored as the model stores them."""
    from safetensors import safe_open
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    model = tmp_path / "qwen"
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    program = frontends.load(model)
    bias = program.params["model.layers.0.self_attn.q_proj.bias"]
    road_files.write(
        Road("a", {"model.layers.0.self_attn.q_proj": Rotation("road_1", 32, torch.ones(32), torch.ones(32))}),
        tmp_path / "a",
        program,
        {},
    )
    ok("quantize", model, "-o", tmp_path / "out", *RTN, "--road", tmp_path / "a", "--fold")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.layers.0.self_attn.q_proj.bias").dtype == read(bias).dtype == torch.bfloat16


def test_a_model_that_carries_adapters_is_not_quantised(ok, refused, tiny_llama, roads, tmp_path):
    ok("export", tiny_llama, "--to", "vllm", "-o", tmp_path / "float", "--road", f"a={roads['all']}")
    assert "carries adapters (a)" in refused("quantize", tmp_path / "float", "-o", tmp_path / "out", *RTN)


def test_numbers_that_leave_float32_are_refused_by_the_adapters_name(refused, base, tiny_llama, tmp_path):
    large = Rotation("road_1", 32, torch.zeros(64), torch.full((64,), 1e38))
    huge = Road("huge", {f"model.layers.0.mlp.{n}": large for n in ("gate_proj", "up_proj")})
    road_files.write(huge, tmp_path / "huge", base, {})
    said = refused("quantize", tiny_llama, "-o", tmp_path / "out", *LEARN, "--road", tmp_path / "huge")
    assert "not finite with huge" in said


def test_exported_for_vllm_the_adapters_come_along(ok, tiny_llama, roads, tmp_path):
    out, vllm = tmp_path / "w4", tmp_path / "vllm"
    ok("quantize", tiny_llama, "-o", out, *RTN, "--road", f"some={roads['some']}")
    ok("export", out, "--to", "vllm", "-o", vllm)
    assert "serves the base model" in json.loads((vllm / "tpvc.json").read_text())["notes"][0]
    kept = vllm / "adapters" / "some" / "adapter_model.safetensors"
    assert kept.read_bytes() == (roads["some"] / "adapter_model.safetensors").read_bytes()


def test_bad_adapters_are_one_sentence_and_nothing_is_written(refused, tiny_llama, roads, tmp_path):
    cases = (
        (("--road", "a=nowhere"), "nowhere"),
        (("--road", f"a={roads['all']}", "--road", f"a={roads['some']}"), "found 'a' twice"),
        (("--road", f"a/b={roads['all']}"), "an adapter is called 'a/b'"),
        (("--road", f"..={roads['all']}"), "an adapter is called '..'"),
        (("--road", f"={roads['all']}"), "expected a directory, or NAME=DIR"),
        (("--road", f"a={roads['all']}", "--method", "flexround", "--nsamples", 1), "1 calibration windows do not go"),
        (("--fold",), "exactly one adapter, found 0"),
        (("--fold", "--road", f"a={roads['all']}", "--road", f"b={roads['some']}"), "exactly one adapter, found 2"),
    )
    for options, words in cases:
        assert words in refused("quantize", tiny_llama, "-o", tmp_path / "out", *RTN, *options)
    assert not list(tmp_path.iterdir())


def test_a_damaged_list_of_adapters_is_refused(ok, refused, tiny_llama, roads, tmp_path):
    out = tmp_path / "w4"
    ok("quantize", tiny_llama, "-o", out, *RTN, "--road", f"all={roads['all']}")
    manifest = json.loads((out / "tpvc.json").read_text())
    manifest["adapters"][0]["name"] = "../../elsewhere"
    (out / "tpvc.json").write_text(json.dumps(manifest))
    assert "without a plain name" in refused("inspect", out)

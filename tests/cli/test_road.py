"""`tpvc road`: adapters folded into weights, taken out again, and made of one another."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tpvc.compiler.adapters import road_files
from tpvc.compiler.adapters.compose_road import by_pair, from_pairs
from tpvc.compiler.adapters.road import STORED, Road, Rotation, identity, rotate
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import logits
from tpvc.compiler.program import linears
from tpvc.passes.bank_road import BankRoad

VARIANTS = ("road_1", "road_2", "road_4")
EPS = torch.finfo(torch.float32).eps
TOKENS = torch.tensor([[5, 9, 77, 200, 3, 14, 15, 92]])
GROUP = 8


def rotation(variant, features, seed, spread=0.3):
    """Angles within about `spread`, scales from 0.5 to 1.5: every block can be inverted."""
    generator, m = torch.Generator().manual_seed(seed), int(features * STORED[variant])
    theta = torch.randn(m, generator=generator) * spread
    return Rotation(variant, GROUP, theta, 0.5 + torch.rand(m, generator=generator))


def road_of(program, variant="road_1", seed=0, targets=(), make=rotation):
    chosen = [n for n in linears(program.nodes) if not targets or n.name.split(".")[-1] in targets]
    outputs = {n.name: program.params[n.params["weight"]].shape[0] for n in chosen}
    return Road("own", {name: make(variant, f, seed + i) for i, (name, f) in enumerate(outputs.items())})


def tensors(directory):
    return load_file(directory / "model.safetensors")


def theirs(directory, tokens=TOKENS):
    """Logits of transformers, float32."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(tokens).logits


def banked(directory, road, tokens=TOKENS):
    """Logits of the interpreter with the adapter beside the weights, float32."""
    return logits(BankRoad((road,))(load(directory)), tokens, adapter_ids=torch.zeros(len(tokens), dtype=torch.int64))


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """written(road, model) -> the adapter as a directory."""

    def write(road, model, name="own"):
        directory = tmp_path_factory.mktemp("roads") / name
        road_files.write(road, directory, load(model), {})
        return directory

    return write


@pytest.fixture(scope="session")
def llama(tiny_llama):
    return load(tiny_llama)


@pytest.fixture(scope="session")
def own(written, tiny_llama, llama):
    """A road_1 adapter of all of tiny_llama's linears, head included."""
    return written(road_of(llama), tiny_llama)


@pytest.fixture(scope="session")
def copy_of(tmp_path_factory, tiny_llama):
    """copy_of(dtype) -> tiny_llama stored in another dtype."""

    def make(dtype):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        directory = tmp_path_factory.mktemp("models") / str(dtype).removeprefix("torch.")
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype).save_pretrained(directory)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(directory)
        return directory

    return make


def near(got, wanted, linear_count, columns):
    """Every linear sums at most `columns` products, each off by a few eps, and errors add up from linear to linear."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=linear_count * columns * EPS * float(wanted.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_checkpoint_is_the_model_with_the_adapter(ok, tiny_llama, llama, written, tmp_path, variant):
    road = road_of(llama, variant)
    directory = written(road, tiny_llama)
    made = ok("road", "merge", tiny_llama, "--road", directory, "-o", tmp_path / "merged")
    wanted = banked(tiny_llama, road)
    assert not torch.allclose(wanted, logits(llama, TOKENS), atol=1e-2)  # the adapter does something
    near(theirs(tmp_path / "merged"), wanted, 15, 128)
    near(logits(load(tmp_path / "merged"), TOKENS), wanted, 15, 128)

    manifest = made["manifest"]
    assert manifest == json.loads((tmp_path / "merged" / "tpvc.json").read_text())
    assert manifest["artefact"] == "checkpoint"
    assert manifest["source"]["files"] == llama.source.files
    assert [p["name"] for p in manifest["passes"]] == ["FoldRoad"]
    assert manifest["road"]["sha256"] and manifest["road"]["variant"] == variant
    assert manifest["road"]["trainables"] == road.trainables
    assert not load(tmp_path / "merged").adapters


def test_peft_agrees(ok, tiny_llama, own, tmp_path):
    """The same directory in PEFT, its rotation beside the weights."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    ok("road", "merge", tiny_llama, "--road", own, "-o", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(base, own).eval()(TOKENS).logits
    near(theirs(tmp_path / "merged"), wanted, 15, 128)


def test_a_merged_checkpoint_keeps_the_dtype_and_is_rounded_once(ok, copy_of, llama, written, tmp_path):
    model = copy_of(torch.bfloat16)
    road = road_of(llama, "road_2")
    ok("road", "merge", model, "--road", written(road, model), "-o", tmp_path / "merged")
    before, after = tensors(model), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    for name, value in after.items():
        wanted, linear = before[name], road.rotations.get(name.removesuffix(".weight"))
        if linear is not None:
            wanted = rotate(wanted.float().T, *linear.vectors, GROUP).T.to(torch.bfloat16)
        assert value.dtype == torch.bfloat16 and torch.equal(value, wanted), name


def test_conv1d_and_biases_are_folded_too(ok, tiny_tokenizer, written, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=384, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    model = GPT2LMHeadModel(config)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    model.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    road = road_of(load(tmp_path / "gpt2"), targets=("c_attn", "c_proj", "c_fc"))
    ok("road", "merge", tmp_path / "gpt2", "--road", written(road, tmp_path / "gpt2"), "-o", tmp_path / "merged")
    near(theirs(tmp_path / "merged"), banked(tmp_path / "gpt2", road), 9, 128)


def test_the_identity_changes_no_bit_and_the_same_command_gives_the_same_bytes(
    ok, tiny_llama, llama, written, tmp_path
):
    still = road_of(llama, make=lambda variant, features, seed: identity(variant, GROUP, features))
    directory = written(still, tiny_llama)
    for out in ("a", "b"):
        ok("road", "merge", tiny_llama, "--road", directory, "-o", tmp_path / out)
    before, after = tensors(tiny_llama), tensors(tmp_path / "a")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_brings_the_weights_back(ok, copy_of, llama, written, tmp_path, dtype):
    """In units of the largest weight m, for road_1 whose scale cancels: a block has norm sqrt 2 in the largest entry.
    float32: two sums of two products, eps sqrt 2 each, the first through the inverse: 2 + 2 eps; the determinant and
    the division 2 eps. bfloat16 rounds twice on top: u sqrt 2 sqrt 2 + u, with u = 2^-8."""
    model, wide = copy_of(dtype), 6 * EPS + (0 if dtype == torch.float32 else 3.01 * 2**-8)
    directory = written(road_of(llama), model)
    ok("road", "merge", model, "--road", f"task={directory}", "-o", tmp_path / "merged")
    made = ok("road", "unmerge", tmp_path / "merged", "--road", f"task={directory}", "-o", tmp_path / "back")
    before, between, after = (tensors(d) for d in (model, tmp_path / "merged", tmp_path / "back"))
    assert any(not torch.equal(before[n], between[n]) for n in before)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        far = float((after[name].float() - value.float()).abs().max())
        assert far <= wide * float(value.float().abs().max()), name
    assert made["manifest"]["passes"] == [{"name": "FoldRoad", "inverse": True}]
    assert made["manifest"]["road"]["name"] == "task"


def test_unmerge_refuses_another_adapter_than_was_merged(ok, refused, llama, own, written, tiny_llama, tmp_path):
    other = written(road_of(llama, "road_2"), tiny_llama, "other")
    ok("road", "merge", tiny_llama, "--road", own, "-o", tmp_path / "merged")
    said = refused("road", "unmerge", tmp_path / "merged", "--road", other, "-o", tmp_path / "back")
    assert "was folded into" in said and "'other' is another adapter" in said and not (tmp_path / "back").exists()
    (tmp_path / "merged" / "tpvc.json").unlink()  # what PEFT merged says nothing of it
    ok("road", "unmerge", tmp_path / "merged", "--road", other, "-o", tmp_path / "back")


def test_how_a_path_was_typed_leaves_no_trace(ok, tiny_llama, own, llama, written, tmp_path, monkeypatch):
    other = written(road_of(llama, seed=5), tiny_llama, "other")
    monkeypatch.chdir(own.parent)
    for out, first in (("a", own), ("b", own.name)):
        ok("road", "compose", "product", first, other, "--base", tiny_llama, "-o", tmp_path / out / "product")
    a, b = (tmp_path / out / "product" for out in "ab")
    assert all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in ("tpvc.json", "adapter_model.safetensors")
    )


def halves_of(llama):
    """Two adapters of tiny_llama: one moves the first half of every linear's pairs, one the second."""
    first, second = {}, {}
    for name, whole in road_of(llama).rotations.items():
        still, own = by_pair(identity("road_1", GROUP, whole.features)), by_pair(whole)
        mine = (torch.arange(whole.features // 2) < whole.features // 4)[:, None]
        for found, chosen in ((first, mine), (second, ~mine)):
            parts = (torch.where(chosen, o, s) for o, s in zip(own, still, strict=True))
            found[name] = from_pairs("road_1", GROUP, *parts)
    return Road("a", first), Road("b", second)


def test_two_halves_make_the_whole_adapter(ok, tiny_llama, llama, own, written, tmp_path):
    a, b = (written(half, tiny_llama, half.name) for half in halves_of(llama))
    made = ok("road", "compose", "disjoint", a, f"other={b}", "--base", tiny_llama, "-o", tmp_path / "both")
    file = "adapter_model.safetensors"
    whole, both = load_file(own / file), load_file(tmp_path / "both" / file)
    assert whole.keys() == both.keys() and all(torch.equal(whole[n], both[n]) for n in whole)
    assert (own / "adapter_config.json").read_bytes() == (tmp_path / "both" / "adapter_config.json").read_bytes()
    assert made["manifest"]["origin"]["composed"] == "disjoint" and made["manifest"]["origin"]["of"] == ["a", "other"]
    assert [x["name"] for x in made["manifest"]["adapters"]] == ["a", "other"]
    assert made["manifest"]["artefact"] == "road" and made["manifest"]["base"]["files"] == llama.source.files
    ok("road", "merge", tiny_llama, "--road", tmp_path / "both", "-o", tmp_path / "merged")  # and is one to go on with


def test_product_and_interpolation(ok, tpvc, tiny_llama, llama, own, written, tmp_path):
    other = written(road_of(llama, seed=50), tiny_llama, "other")
    base = ("--base", tiny_llama, "-o")
    ok("road", "compose", "product", own, other, *base, tmp_path / "product")
    ok("road", "compose", "interpolate", own, other, "--weight", 1, "--weight", 1, *base, tmp_path / "sum")
    made = ok("road", "compose", "interpolate", own, other, *base, tmp_path / "mean")
    assert made["manifest"]["origin"]["weights"] == [0.5, 0.5]
    ok("road", "compose", "interpolate", own, other, "--weight", 0, "--weight", 1, *base, tmp_path / "second")
    file = "adapter_model.safetensors"
    parts = [load_file(d / file) for d in (own, other)]
    found = {n: load_file(tmp_path / n / file) for n in ("product", "sum", "mean", "second")}
    for name in parts[0]:
        x, y = parts[0][name].double(), parts[1][name].double()
        total, mean = (x + y, (x + y) / 2) if name.endswith("theta") else (x * y, (x * y).sqrt())
        assert torch.equal(found["product"][name], total.float())
        torch.testing.assert_close(found["sum"][name], total.float(), rtol=EPS, atol=0)
        torch.testing.assert_close(found["mean"][name], mean.float(), rtol=EPS, atol=0)
        assert torch.equal(found["second"][name], parts[1][name])
    result = tpvc("road", "compose", "product", own, other, *base, tmp_path / "product", "--overwrite")
    assert result.exit_code == 0 and "next: tpvc run" in result.stdout


def test_what_is_refused_leaves_nothing(refused, tiny_llama, llama, artefact, own, written, copy_of, tmp_path):
    def no(*arguments):
        said = refused("road", *arguments, "-o", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        return said

    nowhere = tmp_path / "nowhere"
    assert "holds integers, into which a rotation cannot be folded" in no("merge", artefact, "--road", own)
    assert "is not a directory" in no("merge", tiny_llama, "--road", nowhere)
    assert "an adapter is called 'a/b'" in no("merge", tiny_llama, "--road", f"a/b={own}")
    assert "no adapter_config.json" in no("merge", tiny_llama, "--road", tiny_llama)

    still = road_of(llama, make=lambda variant, features, seed: identity(variant, GROUP, features))
    flat = road_of(llama)
    flat.rotations["model.layers.1.mlp.up_proj"].alpha[5] = 0
    said = no("unmerge", tiny_llama, "--road", written(flat, tiny_llama))
    assert "'model.layers.1.mlp.up_proj' is singular at outputs 9 and 13" in said
    flat.rotations["model.layers.1.mlp.up_proj"].alpha[5] = 1e8
    half = copy_of(torch.float16)
    said = no("merge", half, "--road", written(flat, half, "huge"))
    assert "'model.layers.1.mlp.up_proj.weight' has numbers now that float16, its dtype in the checkpoint, does" in said

    compose = ("compose", "--base", tiny_llama)
    two = written(road_of(llama, "road_2"), tiny_llama, "two")
    assert "'own' and 'b' both move outputs 0 and 4 of" in no(*compose, "disjoint", own, f"b={own}")
    assert "found 'own' twice" in no(*compose, "disjoint", own, own)
    assert "'two' is road_2, whose products depend" in no(*compose, "product", two, f"b={two}")
    assert "found road_1 in groups of 8 ('own') and road_2" in no(*compose, "disjoint", own, two)
    assert "found the weights 1 for 2 adapters" in no(*compose, "interpolate", own, f"b={own}", "--weight", 1)
    assert "weights were given for product" in no(*compose, "product", own, f"b={own}", "--weight", 1)
    assert "weights nan, 1 for 2" in no(*compose, "interpolate", own, f"b={own}", "--weight", "nan", "--weight", 1)
    negative = written(
        Road("n", {**still.rotations, "lm_head": Rotation("road_1", GROUP, torch.zeros(192), -torch.ones(192))}),
        tiny_llama,
    )
    assert "scales 'lm_head' by -1" in no(*compose, "interpolate", negative, f"b={own}")
    assert "Missing argument 'DIR...'" in no(*compose, "product")
    assert "'sum' is not one of" in no(*compose, "sum", own)


def test_adapters_of_other_models_and_tied_heads_are_refused(refused, tiny_tokenizer, own, written, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    said = refused("road", "merge", tmp_path / "other", "--road", own, "-o", tmp_path / "out")
    assert "is for another model" in said
    said = refused("road", "compose", "product", own, "--base", tmp_path / "other", "-o", tmp_path / "out")
    assert "is for another model" in said
    tied = written(road_of(load(tmp_path / "other"), targets=("lm_head",)), tmp_path / "other")
    for direction in ("merge", "unmerge"):
        said = refused("road", direction, tmp_path / "other", "--road", tied, "-o", tmp_path / "out")
        assert "(tied)" in said
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_outputs_are_apart_and_replaced_only_when_asked(ok, refused, tiny_llama, own, tmp_path):
    merge = ("road", "merge", tiny_llama, "--road", own, "-o")
    for place in (tiny_llama, own):
        assert "which would be lost" in refused(*merge, place)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    assert "did not write" in refused(*merge, tmp_path / "mine")
    ok(*merge, tmp_path / "out")
    assert "add --overwrite" in refused(*merge, tmp_path / "out")
    ok(*merge, tmp_path / "out", "--overwrite")
    compose = ("road", "compose", "product", own, "--base", tiny_llama, "-o")
    assert "add --overwrite" in refused(*compose, tmp_path / "out")
    assert "which would be lost" in refused(*compose, own)
    ok(*compose, tmp_path / "out", "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]
    assert not (tmp_path / "out" / "config.json").exists()


def test_help_has_examples(tpvc):
    for name in ("merge", "unmerge", "compose"):
        result = tpvc("road", name, "--help")
        assert result.exit_code == 0 and f"tpvc road {name} " in result.stdout

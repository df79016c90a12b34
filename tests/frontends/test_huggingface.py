"""Checkpoint directories: names, dtypes and tying as they occur, and every kind of damage as one sentence."""

import hashlib
import json
import struct

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load, tokenizer
from tpvc.compiler.interpret import from_files, logits
from tpvc.compiler.program import read

IDS = torch.arange(3, 12)[None]


def llama(**fields):
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return hf.LlamaConfig(**{**sizes, "num_attention_heads": 2, "max_position_embeddings": 32, **fields})


def checkpoint(directory, config=None, **options):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config or llama()).eval()
    model.save_pretrained(directory, **options)
    return model


def rewrite(directory, change):
    """Apply `change` to the tensors of model.safetensors."""
    tensors = load_file(directory / "model.safetensors")
    save_file(change(dict(tensors)), directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory, said):
    with pytest.raises(TpvcError, match=said) as caught:
        program = load(directory)
        for name in program.params:
            from_files(program)(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "cut", "table"),
    [
        (
            hf.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2),
            "transformer.",
            "transformer.wte",
        ),
        (
            hf.OPTConfig(
                vocab_size=50,
                hidden_size=16,
                word_embed_proj_dim=16,
                ffn_dim=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
            ),
            "model.",
            "model.decoder.embed_tokens",
        ),
        (llama(tie_word_embeddings=True), "model.", "model.embed_tokens"),
    ],
    ids=["gpt2", "opt", "llama"],
)
def test_names_without_the_prefix_and_a_stored_tied_head(tmp_path, config, cut, table):
    model = checkpoint(tmp_path, config)
    names = set(load(tmp_path).params)
    full = {n for n, _ in model.named_parameters()}
    assert names == full
    rewrite(tmp_path, lambda t: {n.removeprefix(cut): v for n, v in t.items()})
    assert set(load(tmp_path).params) == full
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t[f"{table}.weight".removeprefix(cut)].clone()})
    program = load(tmp_path)
    assert set(program.params) == full
    with torch.no_grad():
        wanted = model(IDS).logits
    # four products of up to 64 terms in each of two layers and the head's, added up in another order
    limit = (4 * 2 + 1) * 64 * 2**-24 * float(wanted.abs().max())
    torch.testing.assert_close(logits(program, IDS), wanted, rtol=0, atol=limit)
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 1})
    refused(tmp_path, "tie_word_embeddings")


def test_a_tied_checkpoint_may_store_only_the_head(tmp_path):
    checkpoint(tmp_path, llama(tie_word_embeddings=True))
    before = read(load(tmp_path).params["model.embed_tokens.weight"])
    rewrite(tmp_path, lambda t: {("lm_head.weight" if "embed" in n else n): v for n, v in t.items()})
    assert torch.equal(read(load(tmp_path).params["model.embed_tokens.weight"]), before)


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
def test_neox_head_under_both_names(tmp_path, head):
    config = hf.GPTNeoXConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = checkpoint(tmp_path, config)
    rewrite(tmp_path, lambda t: {(head if n in ("embed_out.weight", "lm_head.weight") else n): v for n, v in t.items()})
    assert torch.equal(read(load(tmp_path).params["lm_head.weight"]), model.lm_head.weight)


def test_conv1d_weights_are_held_out_by_in(tmp_path):
    model = checkpoint(tmp_path, hf.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    parameter = load(tmp_path).params["transformer.h.0.mlp.c_fc.weight"]
    assert parameter.shape == (64, 16)
    assert torch.equal(read(parameter), model.transformer.h[0].mlp.c_fc.weight.t())


def test_buffers_of_old_checkpoints_are_ignored_and_others_are_not(tmp_path):
    checkpoint(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, lambda t: {**t, name: torch.ones(4)})
    assert name not in load(tmp_path).params
    rewrite(tmp_path, lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(16)})
    refused(tmp_path, "q_proj.bias")


def test_source_and_facts(tmp_path):
    checkpoint(tmp_path, llama(eos_token_id=2))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2], "pad_token_id": 5}))
    program = load(tmp_path)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert program.source.weights == (tmp_path / "model.safetensors",)
    assert program.source.files == {"model.safetensors": digest}
    assert program.source.gguf is None
    assert program.source.config["model_type"] == "llama"
    assert (program.facts.eos, program.facts.pad, program.facts.layers) == ((7, 2), 5, 2)


def test_nothing_is_kept_between_reads(tmp_path):
    checkpoint(tmp_path)
    parameter = load(tmp_path).params["model.norm.weight"]
    first = read(parameter)
    first += 1
    assert not torch.equal(read(parameter), first)


def test_a_missing_or_empty_directory(tmp_path):
    refused(tmp_path / "nothing", "there is no")
    refused(tmp_path, "config.json")


def test_a_config_without_weights(tmp_path):
    llama().save_pretrained(tmp_path)
    refused(tmp_path, "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(tmp_path, "pickle.*convert it to safetensors")


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_config_that_is_no_json_object(tmp_path, text):
    checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "config.json")


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file(tmp_path, kept):
    checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path, "model.safetensors is not a complete safetensors file")


@pytest.mark.parametrize("offset", [0, 3, 7, 8, 9, 30])
def test_a_flipped_byte_in_the_header(tmp_path, offset):
    checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)
    refused(tmp_path, "safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(tmp_path, value, dtype):
    checkpoint(tmp_path)

    def spoil(tensors):
        tensors = {n: v.to(dtype) for n, v in tensors.items()}
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return tensors

    rewrite(tmp_path, spoil)
    refused(tmp_path, "layers.1.mlp.up_proj.weight.*NaN or Inf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_other_dtypes(tmp_path, dtype):
    checkpoint(tmp_path)
    rewrite(tmp_path, lambda t: {**t, "model.norm.weight": t["model.norm.weight"].to(dtype)})
    refused(tmp_path, "model.norm.weight.*F32, F16, BF16")


def test_a_missing_tensor_and_a_wrong_shape(tmp_path):
    checkpoint(tmp_path)
    rewrite(tmp_path, lambda t: {**t, "model.norm.weight": torch.ones(17)})
    refused(tmp_path, r"model.norm.weight.*\[17\].*\[16\]")
    rewrite(tmp_path, lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"})
    refused(tmp_path, "lacks the tensor 'model.norm.weight'")
    rewrite(tmp_path, lambda t: {**t, "model.norm.weight": torch.ones(16)})
    rewrite(tmp_path, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
    refused(tmp_path, "tie_word_embeddings to true")


def test_the_same_parameter_under_two_names(tmp_path):
    checkpoint(tmp_path)
    rewrite(tmp_path, lambda t: {**t, "norm.weight": torch.ones(16)})
    refused(tmp_path, "holds both")


def sharded(directory):
    checkpoint(directory, max_shard_size="3KB")
    path = directory / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_a_missing_shard(tmp_path):
    _, index = sharded(tmp_path)
    shard = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / shard).unlink()
    refused(tmp_path, shard)


@pytest.mark.parametrize(
    "target", ["../model.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors"]
)
def test_an_index_that_points_outside(tmp_path, target):
    path, index = sharded(tmp_path)
    index["weight_map"]["model.norm.weight"] = target
    path.write_text(json.dumps(index))
    refused(tmp_path, "outside of the directory")


def test_an_index_that_does_not_fit_its_files(tmp_path):
    path, index = sharded(tmp_path)
    where = index["weight_map"]
    other = next(v for v in where.values() if v != where["model.norm.weight"])
    path.write_text(json.dumps({"weight_map": {**where, "model.norm.weight": other}}))
    refused(tmp_path, "does not hold it")
    path.write_text(json.dumps({"weight_map": []}))
    refused(tmp_path, "no weight_map")


def test_a_tensor_in_two_shards(tmp_path):
    _, index = sharded(tmp_path)
    first, second = sorted(set(index["weight_map"].values()))[:2]
    both = {**load_file(tmp_path / first), **load_file(tmp_path / second)}
    save_file(both, tmp_path / second)
    refused(tmp_path, "in two files")


def test_a_file_that_claims_more_data_than_it_has(tmp_path):
    llama().save_pretrained(tmp_path)
    header = json.dumps(
        {"model.norm.weight": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(tmp_path, "not a complete safetensors file")


def test_no_tokenizer(tmp_path):
    checkpoint(tmp_path)
    with pytest.raises(TpvcError, match="tokenizer"):
        tokenizer(load(tmp_path))

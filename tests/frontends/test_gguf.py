"""GGUF files written here with the format's own package, read back: tensors bit for bit, logits as transformers'."""

import hashlib
import math
import struct

import gguf as package
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import gguf
from tpvc.compiler.frontends.gguf_config import decimal, rope_scaling
from tpvc.compiler.interpret import logits
from tpvc.compiler.program import Grid, read
from tpvc.compiler.verify import verify
from tpvc.compiler.windows import beginning

Type = package.GGMLQuantizationType

BASE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama3": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-yarn": {
        "model_type": "qwen2",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 5,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 5,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "tie_word_embeddings": True,
    },
    "gemma3-full": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 3,
        "layer_types": ["full_attention"] * 2,
        "final_logit_softcapping": 10.0,
        "tie_word_embeddings": True,
    },
    "gemma3-local-theta": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 3,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
        },
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 7},
    "phi3-partial": {"model_type": "phi3", "sliding_window": None, "partial_rotary_factor": 0.75},
}


def oracle(name, seed=0):
    """A random transformers model; norms and biases are random too."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**(BASE | {"tie_word_embeddings": False} | FAMILIES[name]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for key, value in model.named_parameters():
        if value.ndim == 1:
            torch.nn.init.normal_(value, mean=float("norm" in key and "gemma" not in name), std=0.1)
        else:
            torch.nn.init.normal_(value, std=0.08)
    return model


def interleave(rows, heads):
    """The order in which llama.cpp's converter stores q and k rows, written as a list: new row -> old row."""
    dim = rows // heads
    return [h * dim + (j % 2) * (dim // 2) + j // 2 for h in range(heads) for j in range(dim)]


def quantised(weight, kind):
    """Bytes of one matrix in a GGUF type; the k-quants, which the package only reads, get random codes."""
    if kind not in (Type.Q4_K, Type.Q6_K):
        return package.quantize(weight, kind)
    block, size = package.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(weight.size)
    data = generator.integers(0, 256, (weight.shape[0], weight.shape[1] // block, size), dtype=np.uint8)
    scales = generator.uniform(1e-4, 1e-3, data.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
    if kind == Type.Q4_K:
        data[..., 0:2] = data[..., 2:4] = scales
    else:
        data[..., 208:210] = scales
    return data.reshape(weight.shape[0], -1)


def write(path, model, kind=Type.F32, metadata=(), version=3):
    """Write `model` as llama.cpp's converter would; returns {Hugging Face name: the float32 values stored}."""
    c, family = model.config, model.config.model_type
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(family, family)
    heads, kv = c.num_attention_heads, c.num_key_value_heads
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // heads
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    writer = package.GGUFWriter(path, arch)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if head_dim != c.hidden_size // heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if getattr(c, "sliding_window", None) and set(getattr(c, "layer_types", None) or ()) != {"full_attention"}:
        writer.add_sliding_window(c.sliding_window)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
    if getattr(c, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if family == "gemma3_text" and (local := c.rope_parameters["sliding_attention"]["rope_theta"]) != 10000:
        writer.add_float32("gemma3.rope.freq_base_swa", local)
    writer.add_bos_token_id(c.bos_token_id)
    writer.add_eos_token_id(c.eos_token_id)
    writer.add_pad_token_id(c.pad_token_id)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(package.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    for add, key, value in metadata:
        getattr(writer, add)(key.format(arch=arch), value)
    names = package.get_tensor_name_map(getattr(package.MODEL_ARCH, arch.upper()), c.num_hidden_layers)
    stored = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and c.tie_word_embeddings:
            continue
        stem, _, suffix = key.rpartition(".")
        data = value.numpy().astype(np.float32)
        if "gemma" in family and "norm" in stem:
            data = data + np.float32(1)
        each = (kind(key) if callable(kind) else kind) if data.ndim == 2 else Type.F32
        raw = quantised(data, each)
        stored[key] = package.dequantize(raw, each) - (1 if "gemma" in family and "norm" in stem else 0)
        if arch == "llama" and ("q_proj" in stem or "k_proj" in stem):
            raw = raw[interleave(len(raw), heads if "q_proj" in stem else kv)]
        writer.add_tensor(names.get_name(stem) + f".{suffix}", np.ascontiguousarray(raw), raw_dtype=each)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if version == 2:  # differs from 3 in this number only, on a little-endian machine
        data = bytearray(path.read_bytes())
        data[4:8] = struct.pack("<I", 2)
        path.write_bytes(data)
    return stored


def llama3_factors(rope, head_dim):
    """float32 [head_dim / 2]: what every frequency is divided by, as the converter computes it, one by one."""
    low, high = (rope["original_max_position_embeddings"] / rope[k] for k in ("low_freq_factor", "high_freq_factor"))
    factors = []
    for freq in 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)):
        wavelength = 2 * math.pi / freq
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            turns = rope["original_max_position_embeddings"] / wavelength
            smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(float(1 / ((1 - smooth) / rope["factor"] + smooth)))
    return np.array(factors, dtype=np.float32)


def close(ours, theirs, layers=2, terms=256):
    """Two float32 evaluations of the same formula: each of the 4 matrix products on the way through a layer, and the
    head's, sums `terms` products in its own order, which may move it by terms * 2^-24 of its size."""
    return (ours - theirs).abs().max() <= (4 * layers + 1) * terms * 2**-24 * theirs.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path, name):
    model = oracle(name)
    write(tmp_path / "m.gguf", model)
    program = verify(gguf.load(tmp_path / "m.gguf", "m"))
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, position_ids=positions).logits
        ours = logits(program, ids, mask)
    assert close(ours[mask.bool()], theirs[mask.bool()], model.config.num_hidden_layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_config_builds_the_same_model_in_transformers(tmp_path, name):
    """The config made from metadata, and nothing else of the original, with the parameters read."""
    model = oracle(name)
    write(tmp_path / "m.gguf", model)
    program = gguf.load(tmp_path / "m.gguf", "m")
    config = AutoConfig.for_model(**program.source.config)
    again = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    again.load_state_dict({k: read(p) for k, p in program.params.items()}, strict=not config.tie_word_embeddings)
    again.tie_weights()
    ids = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert close(again(ids).logits, model(ids).logits, model.config.num_hidden_layers)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q6_K])
def test_every_type_is_dequantised_as_the_package_does(tmp_path, kind):
    model = oracle("llama")
    stored = write(tmp_path / "m.gguf", model, kind)
    program = gguf.load(tmp_path / "m.gguf", "m")
    assert program.params.keys() == stored.keys()
    for name, value in stored.items():
        parameter = program.params[name]
        assert parameter.shape == value.shape
        assert parameter.dtype == torch.float32
        assert np.array_equal(read(parameter).numpy(), value), name
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in stored.items()})
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        assert close(logits(program, ids), model(ids).logits)


@pytest.mark.parametrize(("kind", "bits"), [(Type.Q4_0, 4), (Type.Q5_0, 5), (Type.Q8_0, 8)])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_integers_stay_what_they_are(tmp_path, name, kind, bits):
    """Codes and scales mean the float32 numbers that the package computes, also where rows are put back into order."""
    stored = write(tmp_path / "m.gguf", oracle(name), kind)
    program = verify(gguf.load(tmp_path / "m.gguf", "m", integers=True))
    for key, value in stored.items():
        found, grid = read(program.params[key]), program.params[key].grid
        assert grid == (Grid(bits, 32, True) if value.ndim == 2 else None)
        meaning = found.dequantize() if grid else found
        assert np.array_equal(meaning.numpy(), value), key
        assert grid is None or int(found.codes.max()) >= 2**bits - 2
    assert gguf.load(tmp_path / "m.gguf", "m").params[key].grid is None


def test_integers_only_where_all_blocks_are(tmp_path):
    """Q4_1 adds a float to every block; and one linear of another type leaves all of them in float."""
    write(tmp_path / "m.gguf", oracle("llama"), Type.Q4_1)
    assert not any(p.grid for p in gguf.load(tmp_path / "m.gguf", "m", integers=True).params.values())
    write(tmp_path / "m.gguf", oracle("llama"), lambda key: Type.Q6_K if "1.mlp.down" in key else Type.Q4_0)
    assert not any(p.grid for p in gguf.load(tmp_path / "m.gguf", "m", integers=True).params.values())
    write(tmp_path / "m.gguf", oracle("llama"), lambda key: Type.Q4_0 if "layers" in key else Type.Q6_K)
    found = gguf.load(tmp_path / "m.gguf", "m", integers=True).params
    assert found["lm_head.weight"].grid is None and sum(p.grid is not None for p in found.values()) == 14


def test_source_facts_and_version_2(tmp_path):
    write(tmp_path / "blob", oracle("llama-tied"), version=2)
    (tmp_path / "m.gguf").symlink_to(tmp_path / "blob")  # as in the cache of the hub's client
    program = gguf.load(tmp_path / "m.gguf", "the name")
    digest = hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest()
    assert (program.source.name, program.source.gguf) == ("the name", tmp_path / "m.gguf")
    assert (program.source.directory, program.source.files) == (tmp_path, {"m.gguf": digest})
    config = program.source.config
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert (program.facts.bos, program.facts.eos, program.facts.pad) == (1, (2,), 0)
    assert "lm_head.weight" not in program.params


def test_second_end_token_is_kept(tmp_path):
    write(tmp_path / "m.gguf", oracle("llama"), metadata=[("add_uint32", "tokenizer.ggml.eot_token_id", 7)])
    assert gguf.load(tmp_path / "m.gguf", "m").facts.eos == (2, 7)


@pytest.mark.parametrize("heads", [1, 3])
def test_unpermute_undoes_the_interleaving(heads):
    rows = torch.arange(heads * 8)
    assert torch.equal(gguf.unpermute(rows[interleave(heads * 8, heads)], heads), rows)


def test_decimal_is_the_shortest_with_the_same_float32():
    assert decimal(np.float32(1e-5)) == 1e-5
    assert decimal(9.999999747378752e-06) == 1e-5
    assert decimal(500000.0) == 500000.0


UNKNOWN = [
    (("add_uint32", "{arch}.expert_count", 8), "expert_count = 8"),
    (("add_float32", "{arch}.logit_scale", 2.0), "logit_scale"),
    (("add_float32", "{arch}.attn_logit_softcapping", 30.0), "attn_logit_softcapping"),
    (("add_float32", "{arch}.rope.scaling.attn_factor", 1.5), "attn_factor"),
    (("add_string", "{arch}.rope.scaling.type", "longrope"), "supported: none, linear, yarn"),
    (("add_uint32", "{arch}.attention.value_length", 16), "value_length"),
    (("add_array", "{arch}.rope.dimension_sections", [64, 32]), "different from layer to layer"),
]


@pytest.mark.parametrize(("extra", "says"), UNKNOWN)
def test_metadata_that_would_change_the_model_is_refused(tmp_path, extra, says):
    write(tmp_path / "m.gguf", oracle("llama"), metadata=[extra])
    with pytest.raises(TpvcError, match=says) as error:
        gguf.load(tmp_path / "m.gguf", "m")
    assert "m.gguf" in str(error.value)


def test_empty_unknown_metadata_is_harmless(tmp_path):
    write(tmp_path / "m.gguf", oracle("llama"), metadata=[("add_uint32", "{arch}.expert_count", 0)])
    gguf.load(tmp_path / "m.gguf", "m")


def test_rope_factors_that_no_config_expresses_are_refused(tmp_path):
    model = oracle("llama3")
    model.config.rope_parameters["low_freq_factor"] = 2.0
    write(tmp_path / "m.gguf", model)
    with pytest.raises(TpvcError, match="frequency factors"):
        gguf.load(tmp_path / "m.gguf", "m")


def test_unknown_architecture_is_refused(tmp_path):
    writer = package.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(TpvcError, match="'mamba'; supported: llama"):
        gguf.load(tmp_path / "m.gguf", "m")


def test_nan_is_refused_when_it_is_read(tmp_path):
    model = oracle("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    write(tmp_path / "m.gguf", model)
    program = gguf.load(tmp_path / "m.gguf", "m")
    with pytest.raises(TpvcError, match=r"blk\.1\.ffn_up\.weight.*NaN"):
        read(program.params["model.layers.1.mlp.up_proj.weight"])


def test_damaged_files_are_one_clear_error(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, oracle("llama"))
    whole = path.read_bytes()
    with pytest.raises(TpvcError, match="no file"):
        gguf.load(tmp_path / "absent.gguf", "m")
    for broken in (b"", b"GG", b"not a model at all, but some text", b"GGUF" + b"\xff" * 400, bytes(4096)):
        path.write_bytes(broken)
        with pytest.raises(TpvcError, match=r"m\.gguf is not a readable GGUF"):
            gguf.load(path, "m")
    for length in (20, 100, 700, 2000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TpvcError, match=r"m\.gguf"):
            gguf.load(path, "m")
    short = oracle("llama")
    short.model.layers[1].mlp.down_proj = torch.nn.Identity()
    write(path, short, Type.Q4_0)
    for integers in (False, True):
        with pytest.raises(TpvcError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.down_proj\.weight', one of 1; "):
            gguf.load(path, "m", integers=integers)


def test_a_flipped_byte_of_the_header_never_ends_in_another_error(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, oracle("llama"))
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        data[generator.integers(0, 2500)] ^= 1 << int(generator.integers(0, 8))
        path.write_bytes(data)
        try:
            gguf.load(path, "m")
        except TpvcError as error:
            assert "m.gguf" in str(error)


def tokenizer_metadata(split, merges=("Ċ Ċ", "h i", "Ġ hi", "Ġ Ġ")):
    tokens = ["<|end|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [m.replace(" ", "") for m in merges]
    kinds = [3, 3, 3] + [1] * (len(tokens) - 3)
    given = [
        ("add_string", "tokenizer.ggml.model", "gpt2"),
        ("add_array", "tokenizer.ggml.tokens", tokens),
        ("add_array", "tokenizer.ggml.token_type", kinds),
        ("add_array", "tokenizer.ggml.merges", list(merges)),
        ("add_string", "tokenizer.chat_template", "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"),
    ]
    return given + ([("add_string", "tokenizer.ggml.pre", split)] if split else [])


@pytest.mark.parametrize(
    ("split", "told", "begins"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_texts_begin_as_in_llama_cpp(tmp_path, split, told, begins):
    given = tokenizer_metadata(split) + ([] if told is None else [("add_bool", "tokenizer.ggml.add_bos_token", told)])
    write(tmp_path / "m.gguf", oracle("llama"), metadata=given)
    tokenizer = gguf.tokenizer(tmp_path / "m.gguf")
    assert beginning(tokenizer) == ([1] if begins else [])
    tokenizer.save_pretrained(tmp_path / "saved")
    assert beginning(AutoTokenizer.from_pretrained(tmp_path / "saved")) == beginning(tokenizer)


def test_tokenizer_round_trips_and_sets_digits_apart(tmp_path):
    write(tmp_path / "m.gguf", oracle("llama"), metadata=tokenizer_metadata("smollm"))
    tokenizer = gguf.tokenizer(tmp_path / "m.gguf")
    text = "hi hi\n\n5 cats, naïve – 42\n\n\n  7<|im_end|>hi"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 2
    # the digit is set apart before white space is, so both line feeds stay together and merge
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n5", add_special_tokens=False).input_ids) == ["ĊĊ", "5"]
    plain = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    draw = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(draw.choice(list(" \n\t57a'sé½一\u00a0.,"), 12))
        ours = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [piece for piece, _ in ours] == [piece for piece, _ in plain.pre_tokenize_str(text)]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|im_start|>hi"


@pytest.mark.parametrize("split", [None, "default", "unheard-of"])
def test_tokenizer_with_an_unknown_split_is_refused(tmp_path, split):
    write(tmp_path / "m.gguf", oracle("llama"), metadata=tokenizer_metadata(split))
    with pytest.raises(TpvcError, match="splits text by"):
        gguf.tokenizer(tmp_path / "m.gguf")


def test_file_without_a_tokenizer(tmp_path):
    write(tmp_path / "m.gguf", oracle("llama"))
    with pytest.raises(TpvcError, match="holds no tokenizer"):
        gguf.tokenizer(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, None),
        ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, None),
    ],
)
def test_a_factor_without_a_type_scales_linearly(given, found):
    """As llama.cpp takes it."""
    assert rope_scaling("llama", given, 16, {}, None) == found

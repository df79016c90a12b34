"""From configs to graphs: what is missing, what is refused, and the conventions that passes and backends rely on."""

import pytest
import transformers as hf

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.architecture import FAMILIES, architecture
from tpvc.compiler.ops import OPS

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "head_dim": 4,
}
CONFIGS = {
    "llama": hf.LlamaConfig(**SMALL).to_dict(),
    "mistral": hf.MistralConfig(**SMALL).to_dict(),
    "qwen2": hf.Qwen2Config(**SMALL).to_dict(),
    "qwen3": hf.Qwen3Config(**SMALL).to_dict(),
    "phi3": hf.Phi3Config(**SMALL).to_dict(),
    "gemma2": hf.Gemma2Config(**SMALL).to_dict(),
    "gemma3_text": hf.Gemma3TextConfig(**SMALL).to_dict(),
    "opt": hf.OPTConfig(
        vocab_size=50,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    ).to_dict(),
    "gpt2": hf.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4).to_dict(),
    "gpt_neox": hf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}).to_dict(),
}
NEEDED = {
    "llama": ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
    "mistral": ["num_key_value_heads", "sliding_window"],
    "qwen2": ["intermediate_size", "max_position_embeddings"],
    "qwen3": ["head_dim"],
    "phi3": ["intermediate_size"],
    "gemma2": ["head_dim", "query_pre_attn_scalar", "num_key_value_heads"],
    "gemma3_text": ["head_dim", "query_pre_attn_scalar", "num_key_value_heads"],
    "opt": ["ffn_dim", "hidden_size"],
    "gpt2": ["n_embd", "n_layer", "n_head", "n_positions", "vocab_size"],
    "gpt_neox": ["intermediate_size", "num_hidden_layers"],
}


@pytest.mark.parametrize(("family", "field"), [(f, n) for f, names in NEEDED.items() for n in names])
def test_a_missing_field_is_named(family, field):
    config = {k: v for k, v in CONFIGS[family].items() if k != field}
    with pytest.raises(TpvcError, match=f"'{field}'"):
        architecture(config)


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("llama", {"model_type": "mamba"}, "'mamba'"),
        ("llama", {"model_type": None}, "no model_type"),
        ("llama", {"hidden_act": "mish"}, "'mish'"),
        ("llama", {"sliding_window": 8}, "sliding_window"),
        ("llama", {"clip_qkv": 8.0}, "clip_qkv"),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("llama", {"vocab_size": "many"}, "vocab_size"),
        ("llama", {"vocab_size": -4}, "vocab_size"),
        ("llama", {"hidden_size": 18, "head_dim": None}, "18 features for 4 heads"),
        ("llama", {"num_key_value_heads": 3}, "3 key/value heads"),
        ("llama", {"attention_bias": "yes"}, "attention_bias"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e6}}, "a dict for either"),
        ("gemma3_text", {"rope_parameters": None, "rope_local_base_freq": -1}, "rope_local_base_freq"),
        ("gemma3_text", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt_neox", {"hidden_act": "snake"}, "snake"),
    ],
)
def test_what_is_not_supported_is_refused(family, fields, said):
    with pytest.raises(TpvcError, match=said):
        architecture({**CONFIGS[family], **fields})


@pytest.mark.parametrize("family", FAMILIES)
def test_conventions_of_the_graph(family):
    drawn = architecture(CONFIGS[family])
    used = [name for node in drawn.nodes for name in node.params.values()]
    assert set(used) == set(drawn.shapes)
    assert drawn.facts.family == family
    assert {n.block for n in drawn.nodes} == {None, 0, 1}
    for node in drawn.nodes:
        assert node.op in OPS
        if node.op in ("linear", "embed") and node.name != "lm_head":
            assert node.params["weight"] == f"{node.name}.weight"
    head = next(n for n in drawn.nodes if n.name == "lm_head")
    table = drawn.nodes[0].params["weight"]
    assert head.params["weight"] == (table if CONFIGS[family]["tie_word_embeddings"] else "lm_head.weight")
    assert drawn.nodes[-1].name in ("lm_head", "logits")


def test_end_tokens_may_be_a_list():
    drawn = architecture({**CONFIGS["llama"], "eos_token_id": [2, 7], "bos_token_id": None, "pad_token_id": 3})
    assert (drawn.facts.bos, drawn.facts.eos, drawn.facts.pad) == (None, (2, 7), 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_nonsense_in_any_field_is_one_error_or_harmless(family):
    config = CONFIGS[family]
    for field in (*config, "rope_scaling", "layer_types"):
        for value in ("x", -1, 0, 1.5, float("nan"), True, None, [], [1], {}, {"a": 1}):
            try:
                architecture({**config, field: value})
            except TpvcError as error:
                assert "\n" not in str(error)

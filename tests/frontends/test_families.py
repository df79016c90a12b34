"""Every family computes what transformers computes: random small checkpoints, written by transformers, read by us."""

import json

import pytest
import torch
import transformers as hf

from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import in_memory, logits, positions_of

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
NO_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]


def gpt2(**fields):
    return hf.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, **fields)


def opt(**fields):
    fields = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, **fields}
    return hf.OPTConfig(
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=fields.pop("proj", 32), **fields
    )


def of(kind, **fields):
    return lambda: kind(**{"max_position_embeddings": 64, **SIZES, **NO_TOKENS, **fields})


CASES = {
    "llama-plain": of(hf.LlamaConfig),
    "llama-gqa-tied": of(hf.LlamaConfig, num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama-mqa-biases": of(hf.LlamaConfig, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "llama3-rope": of(hf.LlamaConfig, num_key_value_heads=2, rope_parameters=LLAMA3, head_dim=16),
    "llama-linear-rope": of(hf.LlamaConfig, rope_parameters=LINEAR, hidden_act="gelu"),
    "llama-yarn-rope": of(hf.LlamaConfig, rope_parameters=YARN, head_dim=32),
    "mistral-window": of(hf.MistralConfig, num_key_value_heads=2, sliding_window=5),
    "mistral-full-head-dim": of(hf.MistralConfig, num_key_value_heads=1, sliding_window=None, head_dim=12),
    "qwen2-plain": of(hf.Qwen2Config, num_key_value_heads=2),
    "qwen2-window-tied": of(
        hf.Qwen2Config,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen2-layer-types": of(
        hf.Qwen2Config, num_key_value_heads=4, use_sliding_window=True, sliding_window=3, layer_types=ALTERNATE
    ),
    "qwen3-head-norm": of(hf.Qwen3Config, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "qwen3-bias-window": of(
        hf.Qwen3Config,
        num_key_value_heads=4,
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    ),
    "phi3-plain": of(hf.Phi3Config),
    "phi3-gqa-window": of(hf.Phi3Config, num_key_value_heads=2, sliding_window=4, tie_word_embeddings=True),
    "phi3-partial-rotation": of(
        hf.Phi3Config,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    ),
    "gemma2-default-layers": of(hf.Gemma2Config, num_key_value_heads=2, head_dim=16, sliding_window=4),
    "gemma2-no-caps-untied": of(
        hf.Gemma2Config,
        num_key_value_heads=1,
        head_dim=8,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
        query_pre_attn_scalar=24,
    ),
    "gemma2-tight-caps": of(
        hf.Gemma2Config,
        num_key_value_heads=4,
        head_dim=8,
        sliding_window=3,
        attention_bias=True,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=1.5,
        query_pre_attn_scalar=4,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "gemma3-default-layers": of(
        hf.Gemma3TextConfig, num_hidden_layers=7, num_key_value_heads=1, head_dim=16, sliding_window=4
    ),
    "gemma3-scaled-untied": of(
        hf.Gemma3TextConfig,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=3,
        attention_bias=True,
        final_logit_softcapping=3.0,
        tie_word_embeddings=False,
        query_pre_attn_scalar=24,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "opt-before": opt,
    "opt-350m-shape": lambda: opt(do_layer_norm_before=False, proj=20),
    "opt-untied-gelu": lambda: opt(tie_word_embeddings=False, activation_function="gelu", enable_bias=False),
    "opt-no-final-norm": lambda: opt(_remove_final_layer_norm=True),
    "gpt2-plain": gpt2,
    "gpt2-inner-scales": lambda: gpt2(n_inner=40, scale_attn_by_inverse_layer_idx=True, activation_function="relu"),
    "gpt2-untied-unscaled": lambda: gpt2(
        tie_word_embeddings=False, scale_attn_weights=False, reorder_and_upcast_attn=True
    ),
    "neox-parallel": of(hf.GPTNeoXConfig),
    "neox-serial-no-bias": of(
        hf.GPTNeoXConfig,
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    ),
    "neox-tied-gelu-fast": of(
        hf.GPTNeoXConfig,
        tie_word_embeddings=True,
        hidden_act="gelu_fast",
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "factor": 2.0},
    ),
}
FORMS = [(torch.float32, "5GB"), (torch.bfloat16, "15KB"), (torch.float16, "5GB")]
"""Stored dtype and shard size; the cases take turns."""


def saved(config, directory, dtype, shard, seed):
    """A checkpoint whose every parameter matters: matrices keep the norm, norms and biases are not 1 and 0."""
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "embed" in name or ".wte" in name or ".wpe" in name:
                value.normal_(0, 0.1)
            elif value.ndim == 2:
                value.normal_(0, 1.2 / min(value.shape) ** 0.5)
            elif name.endswith("bias"):
                value.normal_(0, 0.3)
            else:
                value.add_(torch.randn_like(value) * 0.3)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    return hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def padded_batch(seed, width=14):
    """ids and mask [4, width]: no padding, left, right, and both sides."""
    ids = torch.randint(3, 97, (4, width), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(4, width, dtype=torch.bool)
    mask[1, :6] = mask[2, -5:] = mask[3, :3] = mask[3, -2:] = False
    return ids, mask


def tolerance(program, length, wanted):
    """Worst-case linear accumulation of float32 rounding along the longest path, relative to the largest logit.

    A sum of K products is off by at most K eps of its terms' size; every matrix adds its K, every attention `length`
    and head_dim, every other op a few eps. Norms keep the size of the state, so the errors add up and do not multiply.
    Two implementations are compared: twice that.
    """
    terms = 0
    for node in program.nodes:
        if node.op == "linear":
            terms += program.params[node.params["weight"]].shape[1]
        elif node.op == "attention":
            terms += length + program.facts.head_dim
        else:
            terms += 4
    return 2 * terms * torch.finfo(torch.float32).eps * float(wanted.abs().max())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_transformers(name, tmp_path):
    index = list(CASES).index(name)
    dtype, shard = FORMS[index % len(FORMS)]
    model = saved(CASES[name](), tmp_path, dtype, shard, seed=index)
    program = load(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard != "5GB")
    assert {p.dtype for p in program.params.values()} == {dtype}
    ids, mask = padded_batch(index)
    wanted = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions_of(mask, ids.shape[1])).logits
    ours = logits(program, ids, mask)
    limit = tolerance(program, ids.shape[1], wanted[mask])
    assert limit < 1e-3 * float(wanted[mask].abs().max())
    torch.testing.assert_close(ours[mask], wanted[mask], rtol=0, atol=limit)

    held, cache, steps = in_memory(program), {}, []
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 12), (12, 13), (13, 14)):
        steps.append(logits(program, ids[:, start:stop], mask[:, :stop], held, cache))
    torch.testing.assert_close(torch.cat(steps, 1)[mask], ours[mask], rtol=0, atol=limit)


def test_the_comparison_would_see_a_wrong_detail(tmp_path):
    """The tolerance is far below what a small mistake changes: norm eps, soft cap, window, activation, tying."""
    model = saved(CASES["gemma2-tight-caps"](), tmp_path, torch.float32, "5GB", seed=1)
    program = load(tmp_path)
    ids, mask = padded_batch(0)
    with torch.no_grad():
        right = logits(program, ids, mask)
        limit = tolerance(program, ids.shape[1], right[mask])
        for key, value in {
            "rms_norm_eps": 1e-3,
            "attn_logit_softcapping": 2.01,
            "sliding_window": 4,
            "hidden_activation": "gelu",
            "query_pre_attn_scalar": 4.01,
        }.items():
            (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), key: value}))
            assert float((logits(load(tmp_path), ids, mask) - right)[mask].abs().max()) > limit, key

"""From the metadata of a GGUF file to a Hugging Face config dict.

Keys are those of the GGUF specification ("{arch}.context_length", "tokenizer.ggml.eos_token_id", ...). A key that is
not in the tables below and is not empty would change what the model computes, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tpvc.compiler.errors import TpvcError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
"""Values of general.architecture that can be loaded (llama.cpp calls Mistral and SmolLM2 "llama", and the text model of
Gemma-3 "gemma3")."""

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
"""Whole numbers that every file must state, and the config field of each."""

READ = {
    *SIZES,
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
}
OF_FAMILY = {
    "llama": {"attention.sliding_window"},
    "phi3": {"attention.sliding_window"},
    "gemma2": {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3": {"attention.sliding_window", "rope.freq_base_swa", "final_logit_softcapping"},
}
IGNORED = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
"""Say nothing about the computation: the vocabulary's size is the number of rows of the embedding."""

NEUTRAL = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1 to 3.3 checkpoint states; a GGUF file keeps only the frequency factors computed from it."""


def config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    """A Hugging Face config.json as a dict.

    metadata  GGUF keys to Python values
    shapes    GGUF tensor names to shapes, [out, in]
    tensor    reads one tensor in float32

    Raises TpvcError for another architecture, a missing or an unknown key, and rope factors that no config expresses.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise TpvcError(f"the GGUF holds a model of architecture {arch!r}; supported: {', '.join(ARCHITECTURES)}")
    given = {key[len(arch) + 1 :]: _one(key, v) for key, v in metadata.items() if key.startswith(f"{arch}.")}
    _refuse_unknown(arch, given)
    values = {field: int(_need(arch, given, key)) for key, field in SIZES.items()}
    _check_blocks(values["num_hidden_layers"], shapes)
    heads = values["num_attention_heads"]
    head_dim = int(given.get("attention.key_length") or values["hidden_size"] // heads)
    if given.get("attention.value_length", head_dim) != head_dim:
        raise TpvcError(
            f"the GGUF states {arch}.attention.value_length {given['attention.value_length']} beside keys of "
            f"{head_dim} features; only equal lengths are supported"
        )
    window = int(given.get("attention.sliding_window") or 0) or None
    kind = {"llama": "mistral" if window else "llama", "gemma3": "gemma3_text"}.get(arch, arch)
    values |= {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
        "dtype": "float32",
        "vocab_size": _embedding_rows(shapes),
        "num_key_value_heads": int(given.get("attention.head_count_kv") or heads),
        "head_dim": head_dim,
        "rms_norm_eps": decimal(_need(arch, given, "attention.layer_norm_rms_epsilon")),
        "rope_theta": decimal(given.get("rope.freq_base", 1e6 if arch == "gemma3" else 1e4)),
        "rope_scaling": rope_scaling(arch, given, head_dim, shapes, tensor),
        "tie_word_embeddings": "output.weight" not in shapes,
        **_special_tokens(metadata),
        **_of_family(kind, given, values, head_dim, window, shapes),
    }
    rotated = int(given.get("rope.dimension_count") or head_dim)
    if rotated != head_dim and arch != "phi3":
        raise TpvcError(f"the GGUF rotates {rotated} of the {head_dim} features of a head; '{arch}' models rotate all")
    return values


def _of_family(
    kind: str,
    given: Mapping[str, Any],
    values: Mapping[str, Any],
    head_dim: int,
    window: int | None,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """The fields that only one family has."""
    match kind:
        case "llama":
            return {
                "hidden_act": "silu",
                "attention_bias": "blk.0.attn_q.bias" in shapes,
                "mlp_bias": "blk.0.ffn_up.bias" in shapes,
            }
        case "mistral":
            return {"hidden_act": "silu", "sliding_window": window}
        case "qwen2":
            return {"hidden_act": "silu", "use_sliding_window": False}
        case "qwen3":
            return {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": "blk.0.attn_q.bias" in shapes}
        case "phi3":
            rotated = int(given.get("rope.dimension_count") or head_dim)
            return {
                "hidden_act": "silu",
                "sliding_window": window,
                "partial_rotary_factor": rotated / head_dim,
            }
    # Gemma. The query scale is not in the file: the 27B models (46 and 62 layers) divide by features per head, the
    # others by head_dim.
    wide = values["num_hidden_layers"] == {"gemma2": 46, "gemma3_text": 62}[kind]
    gemma = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": values["hidden_size"] // values["num_attention_heads"] if wide else head_dim,
    }
    if kind == "gemma3_text":
        final = given.get("final_logit_softcapping")
        return {
            **gemma,
            "sliding_window": window or 4096,
            **({} if window else {"layer_types": ["full_attention"] * values["num_hidden_layers"]}),
            "rope_local_base_freq": decimal(given.get("rope.freq_base_swa", 10000.0)),
            "final_logit_softcapping": decimal(final) if final else None,
        }
    return {
        **gemma,
        "sliding_window": window or 4096,
        "attn_logit_softcapping": decimal(_need("gemma2", given, "attn_logit_softcapping")),
        "final_logit_softcapping": decimal(_need("gemma2", given, "final_logit_softcapping")),
    }


def rope_scaling(
    arch: str,
    given: Mapping[str, Any],
    head_dim: int,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
) -> dict[str, Any] | None:
    """`rope_scaling` of the config: None, linear, yarn, or llama3 recovered from the tensor of frequency factors."""
    if "rope_factors_long.weight" in shapes:
        raise TpvcError(
            "the GGUF scales rotary frequencies by 'longrope', which is not supported; use the short-context "
            "version of this model"
        )
    factor = decimal(given.get("rope.scaling.factor") or given.get("rope.scale_linear") or 1.0)
    kind = given.get("rope.scaling.type") or ("none" if factor == 1.0 else "linear")  # as llama.cpp takes it
    if "rope_freqs.weight" in shapes:
        factors = tensor("rope_freqs.weight")
        if kind == "none" and factor == 1.0:
            return _llama3(factors, decimal(given.get("rope.freq_base", 10000.0)), head_dim)
        raise TpvcError(
            f"the GGUF has rotary frequency factors and rope.scaling.type {kind!r}; expected one of the two"
        )
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = _need(arch, given, "rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise TpvcError(f"the GGUF states {arch}.rope.scaling.type {kind!r}; supported: none, linear, yarn")


def _llama3(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The llama3 scaling whose factors these are: 1 for short wavelengths, `factor` for long ones, blended between.

    llama.cpp divides the i-th frequency by factors[i]; so does the config's formula, to float32 rounding.
    """
    if (factors == 1).all():
        return None
    low, high, length = LLAMA3_ROPE.values()
    factor = decimal(factors.max())
    turns = length * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - blend) / factor + blend)
    # The writer computes in float32: some 20 roundings of 2^-24, and `turns - low` may lose a factor `factor`.
    if factors.shape != expected.shape or np.abs(factors / expected - 1).max() > 20 * factor * 2**-24:
        raise TpvcError(
            "the rotary frequency factors of the GGUF (rope_freqs.weight) are not those of a Llama 3 model; no "
            "config can express them, so this file is not supported"
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, Any]:
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot")}
    ends = [end for end in dict.fromkeys((ids["eos"], ids["eot"])) if end is not None]
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": ids["padding"],
    }


def _embedding_rows(shapes: Mapping[str, tuple[int, ...]]) -> int:
    if "token_embd.weight" not in shapes:
        raise TpvcError("the GGUF lacks the tensor 'token_embd.weight'; expected a whole language model in one file")
    return shapes["token_embd.weight"][0]


def _check_blocks(stated: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    found = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    if len(found) != stated:
        raise TpvcError(
            f"the GGUF states {stated} blocks and has tensors of {len(found)}; it is one part of a split model or "
            "damaged: expected a whole model in one file"
        )


def _one(key: str, value: Any) -> Any:
    """A value that may be given per layer as an equal one for all."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise TpvcError(f"the GGUF states {key} = {value}, different from layer to layer, which is not supported")
    return value[0]


def _need(arch: str, given: Mapping[str, Any], key: str) -> Any:
    if not given.get(key):
        raise TpvcError(f"the GGUF lacks the metadata '{arch}.{key}'; convert the model again with a current llama.cpp")
    return given[key]


def _refuse_unknown(arch: str, given: Mapping[str, Any]) -> None:
    known = READ | IGNORED | OF_FAMILY.get(arch, set())
    for key, value in given.items():
        if key not in known and value and value != NEUTRAL.get(key):
            raise TpvcError(
                f"the GGUF states {arch}.{key} = {value!r}, which is not known for '{arch}' models and may change what "
                "the model computes; this file is not supported"
            )


def decimal(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))

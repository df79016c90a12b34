"""genai_config.json: what ONNX Runtime GenAI must know about the files beside it."""

from __future__ import annotations

import json
from pathlib import Path

from tpvc.compiler.backends.onnx.fusions import features, head_dim
from tpvc.compiler.program import Program, folded_tokens

OWN_TYPE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
"""Families whose name GenAI knows and treats as a plain decoder. All others go by its generic name: `phi3` would switch
rotary tables at 4096 tokens and `gpt2` expects another cache."""


def genai_config(program: Program, share_buffer: bool) -> dict:
    """The config as a dict. `share_buffer`: keys and values live in one buffer of the full length, which only
    GroupQueryAttention can do, and only where no prompt was folded in before them."""
    facts, widths = program.facts, features(program)
    layers = [n for n in program.nodes if n.op == "attention"]
    eos = list(facts.eos)
    context = facts.context_length - folded_tokens(program)
    pad = facts.pad if facts.pad is not None else eos[0] if eos else 0
    return {
        "model": {
            "type": facts.family if facts.family in OWN_TYPE else "decoder",
            "vocab_size": widths[program.nodes[-1].name],
            "context_length": context,
            "bos_token_id": facts.bos if facts.bos is not None else pad,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": head_dim(layers[0], widths),
                "hidden_size": facts.hidden_size,
                "num_attention_heads": layers[0].attrs["heads"],
                "num_hidden_layers": len(layers),
                "num_key_value_heads": layers[0].attrs["kv_heads"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": context,
            "min_length": 0,
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": share_buffer,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "length_penalty": 1.0,
            "diversity_penalty": 0.0,
            "no_repeat_ngram_size": 0,
            "early_stopping": True,
        },
    }


def write(program: Program, directory: Path, share_buffer: bool) -> None:
    text = json.dumps(genai_config(program, share_buffer), indent=2)
    (directory / "genai_config.json").write_text(text + "\n", encoding="utf-8")

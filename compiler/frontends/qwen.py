"""Qwen2 / Qwen2.5 (biases on q, k, v) and Qwen3 (RMSNorm on every query and key head)."""

from __future__ import annotations

from tpvc.compiler.frontends import rope
from tpvc.compiler.frontends.decoder import decoder
from tpvc.compiler.frontends.fields import Config, facts, flag, layer_windows, need, number, refuse, size, window
from tpvc.compiler.frontends.graph import Architecture


def qwen2(config: Config) -> Architecture:
    refuse(config, attention_bias=True, mlp_bias=False)
    sizes = facts(config, kv_heads=size(config, "num_key_value_heads"), head_dim=size(config, "head_dim"))
    return decoder(
        config,
        sizes,
        rope.attributes(config, sizes.head_dim),
        _windows(config, sizes.layers),
        tied=flag(config, "tie_word_embeddings", False),
        qkv_bias=True,
    )


def qwen3(config: Config) -> Architecture:
    refuse(config, mlp_bias=False)
    sizes = facts(config, kv_heads=size(config, "num_key_value_heads"), head_dim=need(config, "head_dim"))
    bias = flag(config, "attention_bias", False)
    return decoder(
        config,
        sizes,
        rope.attributes(config, sizes.head_dim),
        _windows(config, sizes.layers),
        tied=flag(config, "tie_word_embeddings", False),
        qkv_bias=bias,
        out_bias=bias,
        head_norm=True,
    )


def _windows(config: Config, layers: int) -> list[int | None]:
    """`use_sliding_window` turns `sliding_window` on, for the layers from `max_window_layers` upwards."""
    if not flag(config, "use_sliding_window", False):
        return layer_windows(config, layers, None, ["full_attention"] * layers)
    first = number(config, "max_window_layers", 28)
    kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    reach = window(config, default=4096)
    return layer_windows(config, layers, reach, kinds if reach else ["full_attention"] * layers)

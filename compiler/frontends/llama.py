"""Llama (2, 3, SmolLM2 and other checkpoints of that type) and Mistral."""

from __future__ import annotations

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import rope
from tpvc.compiler.frontends.decoder import decoder
from tpvc.compiler.frontends.fields import Config, facts, flag, need, refuse, size, window
from tpvc.compiler.frontends.graph import Architecture


def llama(config: Config) -> Architecture:
    """`attention_bias` covers q, k, v and o; `mlp_bias` the three of the MLP; `head_dim` may differ from D / heads."""
    refuse(config, sliding_window=None, layer_types=None)
    sizes = facts(config, kv_heads=size(config, "num_key_value_heads"), head_dim=size(config, "head_dim"))
    attention_bias = flag(config, "attention_bias", False)
    return decoder(
        config,
        sizes,
        rope.attributes(config, sizes.head_dim),
        [None] * sizes.layers,
        tied=flag(config, "tie_word_embeddings", False),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias", False),
    )


def mistral(config: Config) -> Architecture:
    """Llama without biases and with one sliding window for all layers (null: none)."""
    refuse(config, attention_bias=False, mlp_bias=False)
    if "sliding_window" not in config:
        raise TpvcError("the config of this 'mistral' model lacks the field 'sliding_window'; add it (null: none)")
    sizes = facts(config, kv_heads=need(config, "num_key_value_heads"), head_dim=size(config, "head_dim"))
    reach = window(config)
    kinds = ["full_attention" if reach is None else "sliding_attention"] * sizes.layers
    if config.get("layer_types") not in (None, [], kinds):
        raise TpvcError(
            f"this 'mistral' config has layer_types = {config['layer_types']!r}; expected {kinds[0]} in all"
        )
    return decoder(
        config,
        sizes,
        rope.attributes(config, sizes.head_dim),
        [reach] * sizes.layers,
        tied=flag(config, "tie_word_embeddings", False),
    )

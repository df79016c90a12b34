"""Gemma-2: norms before and after attention and MLP (stored as w - 1), scaled embedding, soft caps, windows."""

from __future__ import annotations

from tpvc.compiler.frontends import rope
from tpvc.compiler.frontends.decoder import gated_mlp
from tpvc.compiler.frontends.fields import (
    Config,
    activation,
    cap,
    facts,
    flag,
    layer_windows,
    need,
    number,
    refuse,
    window,
)
from tpvc.compiler.frontends.graph import Architecture, Graph


def gemma2(config: Config) -> Architecture:
    """Scores are scaled by query_pre_attn_scalar^-1/2; layers 0, 2, 4 ... slide unless `layer_types` says otherwise."""
    refuse(config, mlp_bias=False)
    sizes = facts(config, kv_heads=need(config, "num_key_value_heads"), head_dim=need(config, "head_dim"))
    width, inner = sizes.hidden_size, need(config, "intermediate_size")
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    eps, bias = number(config, "rms_norm_eps", 1e-6), flag(config, "attention_bias", False)
    act = activation(config, "hidden_activation", "gelu_pytorch_tanh")
    scale = need(config, "query_pre_attn_scalar", (int, float)) ** -0.5
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(sizes.layers)]
    windows = layer_windows(config, sizes.layers, window(config, default=4096), kinds)
    score_cap, final_cap = cap(config, "attn_logit_softcapping", 50.0), cap(config, "final_logit_softcapping", 30.0)
    turn = rope.attributes(config, sizes.head_dim)
    g = Graph()
    x = g.embed("model.embed_tokens", "input_ids", sizes.vocab_size, width)
    x = g.add("model.embed_scale", "scale", x, factor=width**0.5)
    for g.block in range(sizes.layers):
        layer = f"model.layers.{g.block}"
        h = g.rms_norm(f"{layer}.input_layernorm", x, width, eps, plus_one=True)
        q = g.linear(f"{layer}.self_attn.q_proj", h, queries, width, bias=bias)
        k = g.linear(f"{layer}.self_attn.k_proj", h, keys, width, bias=bias)
        v = g.linear(f"{layer}.self_attn.v_proj", h, keys, width, bias=bias)
        reach = windows[g.block]
        h = g.attention(f"{layer}.self_attn", q, k, v, sizes, rope=turn, scale=scale, window=reach, softcap=score_cap)
        h = g.linear(f"{layer}.self_attn.o_proj", h, width, queries, bias=bias)
        h = g.rms_norm(f"{layer}.post_attention_layernorm", h, width, eps, plus_one=True)
        x = g.add(f"{layer}.self_attn.residual", "add", x, h)
        h = g.rms_norm(f"{layer}.pre_feedforward_layernorm", x, width, eps, plus_one=True)
        h = gated_mlp(g, f"{layer}.mlp", h, width, inner, act)
        h = g.rms_norm(f"{layer}.post_feedforward_layernorm", h, width, eps, plus_one=True)
        x = g.add(f"{layer}.mlp.residual", "add", x, h)
    g.block = None
    x = g.rms_norm("model.norm", x, width, eps, plus_one=True)
    x = g.head(x, sizes, width, "model.embed_tokens", tied=flag(config, "tie_word_embeddings", True))
    if final_cap is not None:
        g.add("logits", "softcap", x, cap=final_cap)
    return g.finish(sizes, prefix="model.")

"""Phi-3: Llama with q, k, v in one matrix, gate and up in one matrix, and possibly a partial rotation."""

from __future__ import annotations

from tpvc.compiler.frontends import rope
from tpvc.compiler.frontends.fields import Config, activation, facts, flag, need, number, refuse, size, window
from tpvc.compiler.frontends.graph import Architecture, Graph


def phi3(config: Config) -> Architecture:
    refuse(config, attention_bias=False, mlp_bias=False, layer_types=None)
    sizes = facts(config, kv_heads=size(config, "num_key_value_heads"), head_dim=size(config, "head_dim"))
    width, inner = sizes.hidden_size, need(config, "intermediate_size")
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    eps, act = number(config, "rms_norm_eps", 1e-5), activation(config, "hidden_act", "silu")
    turn, reach = rope.attributes(config, sizes.head_dim, known=["default"]), window(config)
    g = Graph()
    x = g.embed("model.embed_tokens", "input_ids", sizes.vocab_size, width)
    for g.block in range(sizes.layers):
        layer = f"model.layers.{g.block}"
        h = g.rms_norm(f"{layer}.input_layernorm", x, width, eps)
        qkv = g.linear(f"{layer}.self_attn.qkv_proj", h, queries + 2 * keys, width)
        q = g.add(f"{layer}.self_attn.q", "split", qkv, groups=1, start=0, stop=queries)
        k = g.add(f"{layer}.self_attn.k", "split", qkv, groups=1, start=queries, stop=queries + keys)
        v = g.add(f"{layer}.self_attn.v", "split", qkv, groups=1, start=queries + keys, stop=queries + 2 * keys)
        h = g.attention(f"{layer}.self_attn", q, k, v, sizes, rope=turn, window=reach)
        h = g.linear(f"{layer}.self_attn.o_proj", h, width, queries)
        x = g.add(f"{layer}.self_attn.residual", "add", x, h)
        h = g.rms_norm(f"{layer}.post_attention_layernorm", x, width, eps)
        both = g.linear(f"{layer}.mlp.gate_up_proj", h, 2 * inner, width)
        gate = g.add(f"{layer}.mlp.gate", "split", both, groups=1, start=0, stop=inner)
        up = g.add(f"{layer}.mlp.up", "split", both, groups=1, start=inner, stop=2 * inner)
        gate = g.add(f"{layer}.mlp.activation_fn", "activation", gate, kind=act)
        h = g.add(f"{layer}.mlp.product", "mul", gate, up)
        h = g.linear(f"{layer}.mlp.down_proj", h, width, inner)
        x = g.add(f"{layer}.mlp.residual", "add", x, h)
    g.block = None
    x = g.rms_norm("model.norm", x, width, eps)
    g.head(x, sizes, width, "model.embed_tokens", tied=flag(config, "tie_word_embeddings", False))
    return g.finish(sizes, prefix="model.")

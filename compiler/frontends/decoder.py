"""The Llama-shaped decoder: RMSNorm, rotary grouped-query attention, gated MLP; for Llama, Mistral and Qwen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpvc.compiler.frontends.fields import Config, activation, need, number
from tpvc.compiler.frontends.graph import Architecture, Graph
from tpvc.compiler.program import Facts


def decoder(
    config: Config,
    facts: Facts,
    rope: dict[str, Any],
    windows: Sequence[int | None],
    *,
    tied: bool,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    head_norm: bool = False,
) -> Architecture:
    """`windows`: one a layer; `rope`: attributes of the op; `head_norm`: RMSNorm of every query and key head."""
    width, inner = facts.hidden_size, need(config, "intermediate_size")
    queries, keys = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    eps, act = number(config, "rms_norm_eps", 1e-6), activation(config, "hidden_act", "silu")
    g = Graph()
    x = g.embed("model.embed_tokens", "input_ids", facts.vocab_size, width)
    for g.block in range(facts.layers):
        layer = f"model.layers.{g.block}"
        h = g.rms_norm(f"{layer}.input_layernorm", x, width, eps)
        q = g.linear(f"{layer}.self_attn.q_proj", h, queries, width, bias=qkv_bias)
        k = g.linear(f"{layer}.self_attn.k_proj", h, keys, width, bias=qkv_bias)
        v = g.linear(f"{layer}.self_attn.v_proj", h, keys, width, bias=qkv_bias)
        if head_norm:
            q = g.rms_norm(f"{layer}.self_attn.q_norm", q, facts.head_dim, eps)
            k = g.rms_norm(f"{layer}.self_attn.k_norm", k, facts.head_dim, eps)
        h = g.attention(f"{layer}.self_attn", q, k, v, facts, rope=rope, window=windows[g.block])
        h = g.linear(f"{layer}.self_attn.o_proj", h, width, queries, bias=out_bias)
        x = g.add(f"{layer}.self_attn.residual", "add", x, h)
        h = g.rms_norm(f"{layer}.post_attention_layernorm", x, width, eps)
        h = gated_mlp(g, f"{layer}.mlp", h, width, inner, act, bias=mlp_bias)
        x = g.add(f"{layer}.mlp.residual", "add", x, h)
    g.block = None
    x = g.rms_norm("model.norm", x, width, eps)
    g.head(x, facts, width, "model.embed_tokens", tied=tied)
    return g.finish(facts, prefix="model.")


def gated_mlp(g: Graph, name: str, x: str, width: int, inner: int, act: str, *, bias: bool = False) -> str:
    """`down(act(gate(x)) * up(x))`."""
    gate = g.linear(f"{name}.gate_proj", x, inner, width, bias=bias)
    up = g.linear(f"{name}.up_proj", x, inner, width, bias=bias)
    h = g.add(f"{name}.act_fn", "activation", gate, kind=act)
    h = g.add(f"{name}.product", "mul", h, up)
    return g.linear(f"{name}.down_proj", h, width, inner, bias=bias)

"""Gemma-2 and the text model of Gemma-3: norms before and after attention and MLP (stored as w - 1), scaled embedding,
sliding windows in most layers. Gemma-2 caps scores and logits softly; Gemma-3 has an RMSNorm on every query and key
head instead, and turns them by other frequencies where the window slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpvc.compiler.errors import TpvcError, short
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
    size,
    window,
)
from tpvc.compiler.frontends.graph import Architecture, Graph
from tpvc.compiler.program import Facts

THETA = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
"""Of Gemma-3: the field that older configs state theta in, and what it is without."""


def gemma2(config: Config) -> Architecture:
    """Layers 0, 2, 4 ... slide unless `layer_types` says otherwise."""
    sizes = _sizes(config)
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(sizes.layers)]
    windows = layer_windows(config, sizes.layers, window(config, default=4096), kinds)
    turns = [rope.attributes(config, sizes.head_dim)] * sizes.layers
    caps = cap(config, "attn_logit_softcapping", 50.0), cap(config, "final_logit_softcapping", 30.0)
    return _gemma(config, sizes, windows, turns, *caps, head_norm=False)


def gemma3(config: Config) -> Architecture:
    """All layers but every sixth slide unless `layer_types` says otherwise. `rope_scaling` is of those that do not."""
    refuse(config, attn_logit_softcapping=None)
    sizes = _sizes(config)
    period = size(config, "sliding_window_pattern", 6)
    kinds = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(sizes.layers)]
    windows = layer_windows(config, sizes.layers, window(config, default=4096), kinds)
    turn = {kind: rope.attributes(_rope_config(config, kind), sizes.head_dim) for kind in THETA}
    turns = [turn["full_attention" if reach is None else "sliding_attention"] for reach in windows]
    return _gemma(config, sizes, windows, turns, None, cap(config, "final_logit_softcapping", None), head_norm=True)


def _sizes(config: Config) -> Facts:
    refuse(config, mlp_bias=False)
    return facts(config, kv_heads=need(config, "num_key_value_heads"), head_dim=need(config, "head_dim"))


def _rope_config(config: Config, kind: str) -> dict[str, Any]:
    """A config whose rope is that of one type of layers."""
    field, theta = THETA[kind]
    given = config.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or not all(k in THETA and isinstance(v, Mapping) for k, v in given.items()):
        raise TpvcError(
            f"the config of this 'gemma3_text' model has rope_parameters = {short(given)}; expected a dict for either"
            f" of {', '.join(THETA)}"
        )
    older = config.get("rope_scaling") if kind == "full_attention" else None
    stated = need(config, field, (int, float)) if config.get(field) is not None else theta
    return {**config, "rope_theta": stated, "rope_parameters": given.get(kind), "rope_scaling": older}


def _gemma(
    config: Config,
    sizes: Facts,
    windows: Sequence[int | None],
    turns: Sequence[dict[str, Any]],
    score_cap: float | None,
    final_cap: float | None,
    *,
    head_norm: bool,
) -> Architecture:
    """`windows` and `turns` (attributes of the op rope): one a layer. Scores are scaled by query_pre_attn_scalar^-1/2;
    `head_norm`: RMSNorm of every query and key head."""
    width, inner = sizes.hidden_size, need(config, "intermediate_size")
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    eps, bias = number(config, "rms_norm_eps", 1e-6), flag(config, "attention_bias", False)
    act = activation(config, "hidden_activation", "gelu_pytorch_tanh")
    scale = need(config, "query_pre_attn_scalar", (int, float)) ** -0.5
    g = Graph()
    x = g.embed("model.embed_tokens", "input_ids", sizes.vocab_size, width)
    x = g.add("model.embed_scale", "scale", x, factor=width**0.5)
    for g.block in range(sizes.layers):
        layer, reach, turn = f"model.layers.{g.block}", windows[g.block], turns[g.block]
        h = g.rms_norm(f"{layer}.input_layernorm", x, width, eps, plus_one=True)
        q = g.linear(f"{layer}.self_attn.q_proj", h, queries, width, bias=bias)
        k = g.linear(f"{layer}.self_attn.k_proj", h, keys, width, bias=bias)
        v = g.linear(f"{layer}.self_attn.v_proj", h, keys, width, bias=bias)
        if head_norm:
            q = g.rms_norm(f"{layer}.self_attn.q_norm", q, sizes.head_dim, eps, plus_one=True)
            k = g.rms_norm(f"{layer}.self_attn.k_norm", k, sizes.head_dim, eps, plus_one=True)
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

"""GPT-2: LayerNorm, learned positions, q, k, v in one Conv1D (stored [in, out]), tanh-GELU MLP, tied head."""

from __future__ import annotations

from tpvc.compiler.frontends.fields import Config, activation, facts, flag, number, refuse, size
from tpvc.compiler.frontends.graph import Architecture, Graph


def gpt2(config: Config) -> Architecture:
    """`scale_attn_weights` false leaves the scores alone; `scale_attn_by_inverse_layer_idx` divides by layer + 1.

    `reorder_and_upcast_attn` only changes the order of rounding.
    """
    refuse(config)
    sizes = facts(config, hidden="n_embd", layers="n_layer", heads="n_head", context="n_positions")
    width = sizes.hidden_size
    inner = size(config, "n_inner", 4 * width)
    eps = number(config, "layer_norm_epsilon", 1e-5)
    act = activation(config, "activation_function", "gelu_new")
    scale = sizes.head_dim**-0.5 if flag(config, "scale_attn_weights", True) else 1.0
    by_layer = flag(config, "scale_attn_by_inverse_layer_idx", False)
    g = Graph()
    tokens = g.embed("transformer.wte", "input_ids", sizes.vocab_size, width)
    positions = g.embed("transformer.wpe", "positions", sizes.context_length, width)
    x = g.add("transformer.embed", "add", tokens, positions)
    for g.block in range(sizes.layers):
        layer = f"transformer.h.{g.block}"
        h = g.layer_norm(f"{layer}.ln_1", x, width, eps)
        qkv = g.linear(f"{layer}.attn.c_attn", h, 3 * width, width, bias=True, conv1d=True)
        q, k, v = (
            g.add(f"{layer}.attn.{n}", "split", qkv, groups=1, start=i * width, stop=(i + 1) * width)
            for i, n in enumerate("qkv")
        )
        h = g.attention(f"{layer}.attn", q, k, v, sizes, scale=scale / (g.block + 1) if by_layer else scale)
        h = g.linear(f"{layer}.attn.c_proj", h, width, width, bias=True, conv1d=True)
        x = g.add(f"{layer}.attn.residual", "add", x, h)
        h = g.layer_norm(f"{layer}.ln_2", x, width, eps)
        h = g.linear(f"{layer}.mlp.c_fc", h, inner, width, bias=True, conv1d=True)
        h = g.add(f"{layer}.mlp.act", "activation", h, kind=act)
        h = g.linear(f"{layer}.mlp.c_proj", h, width, inner, bias=True, conv1d=True)
        x = g.add(f"{layer}.mlp.residual", "add", x, h)
    g.block = None
    x = g.layer_norm("transformer.ln_f", x, width, eps)
    g.head(x, sizes, width, "transformer.wte", tied=flag(config, "tie_word_embeddings", True))
    return g.finish(sizes, prefix="transformer.")

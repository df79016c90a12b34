"""OPT: LayerNorm, learned positions from row 2 on, ReLU MLP; the 350m shape norms after and projects embeddings."""

from __future__ import annotations

from tpvc.compiler.frontends.fields import Config, activation, facts, flag, need, refuse, size
from tpvc.compiler.frontends.graph import Architecture, Graph

EPS = 1e-5
"""OPT has no field for it: the default of torch's LayerNorm."""
FIRST_POSITION = 2


def opt(config: Config) -> Architecture:
    """`do_layer_norm_before` false moves each norm behind its residual; `word_embed_proj_dim` adds two projections."""
    refuse(config, layer_norm_elementwise_affine=True)
    sizes = facts(config)
    width, inner = sizes.hidden_size, need(config, "ffn_dim")
    embedded = size(config, "word_embed_proj_dim", width)
    before, bias = flag(config, "do_layer_norm_before", True), flag(config, "enable_bias", True)
    act = activation(config, "activation_function", "relu")
    g = Graph()
    root = "model.decoder"
    x = g.embed(f"{root}.embed_tokens", "input_ids", sizes.vocab_size, embedded)
    rows = sizes.context_length + FIRST_POSITION
    p = g.embed(f"{root}.embed_positions", "positions", rows, width, offset=FIRST_POSITION)
    if embedded != width:
        x = g.linear(f"{root}.project_in", x, width, embedded)
    x = g.add(f"{root}.embed", "add", x, p)
    for g.block in range(sizes.layers):
        layer = f"{root}.layers.{g.block}"
        h = g.layer_norm(f"{layer}.self_attn_layer_norm", x, width, EPS) if before else x
        q, k, v = (g.linear(f"{layer}.self_attn.{n}_proj", h, width, width, bias=bias) for n in "qkv")
        h = g.attention(f"{layer}.self_attn", q, k, v, sizes)
        h = g.linear(f"{layer}.self_attn.out_proj", h, width, width, bias=bias)
        x = g.add(f"{layer}.self_attn.residual", "add", x, h)
        if not before:
            x = g.layer_norm(f"{layer}.self_attn_layer_norm", x, width, EPS)
        h = g.layer_norm(f"{layer}.final_layer_norm", x, width, EPS) if before else x
        h = g.linear(f"{layer}.fc1", h, inner, width, bias=bias)
        h = g.add(f"{layer}.activation_fn", "activation", h, kind=act)
        h = g.linear(f"{layer}.fc2", h, width, inner, bias=bias)
        x = g.add(f"{layer}.residual", "add", x, h)
        if not before:
            x = g.layer_norm(f"{layer}.final_layer_norm", x, width, EPS)
    g.block = None
    if before and not flag(config, "_remove_final_layer_norm", False):
        x = g.layer_norm(f"{root}.final_layer_norm", x, width, EPS)
    if embedded != width:
        x = g.linear(f"{root}.project_out", x, embedded, width)
    g.head(x, sizes, embedded, f"{root}.embed_tokens", tied=flag(config, "tie_word_embeddings", True))
    return g.finish(sizes, prefix="model.")

"""GPT-NeoX (Pythia): q, k, v interleaved by head in one matrix, partial rotation, attention and MLP side by side."""

from __future__ import annotations

from tpvc.compiler.frontends import rope
from tpvc.compiler.frontends.fields import Config, activation, facts, flag, need, number, refuse
from tpvc.compiler.frontends.graph import Architecture, Graph


def gpt_neox(config: Config) -> Architecture:
    """`use_parallel_residual`: x + attention(norm1(x)) + mlp(norm2(x)); otherwise one after the other."""
    refuse(config)
    sizes = facts(config)
    width, inner, d = sizes.hidden_size, need(config, "intermediate_size"), sizes.head_dim
    eps, act = number(config, "layer_norm_eps", 1e-5), activation(config, "hidden_act", "gelu")
    bias, parallel = flag(config, "attention_bias", True), flag(config, "use_parallel_residual", True)
    turn = rope.attributes(config, d, theta_field="rotary_emb_base", partial_field="rotary_pct", default_partial=0.25)
    g = Graph()
    x = g.embed("gpt_neox.embed_in", "input_ids", sizes.vocab_size, width)
    for g.block in range(sizes.layers):
        layer = f"gpt_neox.layers.{g.block}"
        h = g.layer_norm(f"{layer}.input_layernorm", x, width, eps)
        qkv = g.linear(f"{layer}.attention.query_key_value", h, 3 * width, width, bias=bias)
        q, k, v = (
            g.add(f"{layer}.attention.{n}", "split", qkv, groups=sizes.heads, start=i * d, stop=(i + 1) * d)
            for i, n in enumerate("qkv")
        )
        h = g.attention(f"{layer}.attention", q, k, v, sizes, rope=turn)
        h = g.linear(f"{layer}.attention.dense", h, width, width, bias=bias)
        attended = g.add(f"{layer}.attention.residual", "add", x, h)
        h = g.layer_norm(f"{layer}.post_attention_layernorm", x if parallel else attended, width, eps)
        h = g.linear(f"{layer}.mlp.dense_h_to_4h", h, inner, width, bias=True)
        h = g.add(f"{layer}.mlp.act", "activation", h, kind=act)
        h = g.linear(f"{layer}.mlp.dense_4h_to_h", h, width, inner, bias=True)
        x = g.add(f"{layer}.mlp.residual", "add", attended, h)
    g.block = None
    x = g.layer_norm("gpt_neox.final_layer_norm", x, width, eps)
    g.head(x, sizes, width, "gpt_neox.embed_in", tied=flag(config, "tie_word_embeddings", False))
    return g.finish(sizes, prefix="gpt_neox.", aliases=[("embed_out.weight", "lm_head.weight")])

"""Which nodes go together: the plan of every family."""

from tpvc.compiler.backends.onnx.fusions import plan
from tpvc.compiler.program import Grid

PACKED = {"llama", "llama3", "mistral", "qwen2", "phi3", "gemma2", "opt", "opt-350m-shape", "gpt2", "gpt_neox"}
ROTATED = {"llama", "llama3", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_neox"}


def test_attention_takes_in_projection_and_rotation(family, tiny):
    plans = plan(tiny.build(family)).attention.values()
    if family == "llama-odd-heads":
        assert not plans
        return
    assert len(plans) == 2
    assert all((p.rope is not None) == (family in ROTATED) for p in plans)
    assert all((p.projection is not None) == (family in PACKED) for p in plans)
    assert all((p.projection is not None and p.projection.order is not None) == (family == "gpt_neox") for p in plans)


def test_every_norm_after_a_residual_is_fused(family, tiny):
    """All norms over the whole width that follow an add; GPT-NeoX norms one sum twice, Gemma-2 norms branches."""
    program = tiny.build(family)
    nodes = {n.name: n for n in program.nodes}
    norms = [n for n in program.nodes if n.op in ("rms_norm", "layer_norm")]
    after_add = {n.inputs[0] for n in norms if n.inputs[0] in nodes and nodes[n.inputs[0]].op == "add"}
    assert set(plan(program).skip_norm) == after_add
    assert len(after_add) >= 3 or family.startswith("gpt_neox")


def test_different_grids_are_not_packed(tiny):
    program = tiny.build("llama", Grid(4, 32, True))
    other = tiny.build("llama", Grid(4, 64, True))
    name = "model.layers.0.self_attn.k_proj.weight"
    first, second = plan(program.with_params({name: other.params[name]})).attention.values()
    assert first.projection is None and second.projection is not None
    assert first.rope is not None


def test_absorbed_nodes_have_no_other_reader(family, tiny):
    program = tiny.build(family)
    planned = plan(program)
    norms = {n.name for n in planned.skip_norm.values()}
    attention = {n.name for n in program.nodes if n.op == "attention"}
    for node in program.nodes:
        if node.name not in planned.absorbed | attention:
            assert not (set(node.inputs) & planned.absorbed) - norms

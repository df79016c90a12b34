"""Bytes that are predicted are those that are written."""

import pytest
import torch

from tpvc.compiler import frontends
from tpvc.compiler.export_pipeline import export
from tpvc.compiler.job import prepare
from tpvc.compiler.pipeline import quantize
from tpvc.compiler.plan.disk import checkpoint_bytes, onnx_bytes, triton_bytes
from tpvc.compiler.plan.outcome import imagined_grids, outcome
from tpvc.passes.spend_bits import average

GRIDS = (
    {"bits": 4, "group": 32, "symmetric": True},
    {"bits": 3, "group": 16},
    {"bits": 8, "group": -1, "symmetric": True, "activations": "int8"},
    {"bits": 2, "group": 64, "head_bits": 16},
)


def weights(folder):
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


@pytest.fixture(scope="module", params=GRIDS, ids=lambda grid: f"W{grid['bits']}g{grid['group']}")
def both(request, tiny_llama, tmp_path_factory):
    """(the artefact, the program that was planned)."""
    out = tmp_path_factory.mktemp("planned") / "artefact"
    quantize(tiny_llama, out, method="rtn", **request.param)
    return out, outcome(prepare(tiny_llama, method="rtn", **request.param))


def test_the_artefact(both):
    out, planned = both
    assert checkpoint_bytes(planned) == weights(out)


def test_what_was_written_is_planned_alike(both):
    out, planned = both
    assert checkpoint_bytes(frontends.load(out)) == checkpoint_bytes(planned)


@pytest.mark.parametrize("to", ["vllm", "gptq_v2", "awq"])
def test_checkpoints(both, to, tmp_path):
    out, planned = both
    try:
        export(out, tmp_path / to, to=to)
    except frontends.TpvcError as error:
        with pytest.raises(frontends.TpvcError, match=str(error).partition(":")[0][:40].replace("(", ".")):
            checkpoint_bytes(planned, to)
    else:
        assert checkpoint_bytes(planned, to) == weights(tmp_path / to)


@pytest.mark.parametrize("portable", [False, True])
def test_onnx(both, portable, tmp_path):
    """Pages are counted tensor by tensor; q, k and v in one matrix begin on fewer: at most one a tensor is too many."""
    out, planned = both
    export(out, tmp_path / "onnx", to="onnx", portable=portable)
    written = sum(f.stat().st_size for f in (tmp_path / "onnx").rglob("model.onnx.data"))
    tensors = 3 * sum(n.op in ("linear", "embed") for n in planned.nodes) * (1 + portable)
    assert abs(onnx_bytes(planned, portable) - written) <= 4096 * tensors


def test_a_tied_table_is_in_the_portable_graph_by_rows_too(tiny_tokenizer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=16384, tie_word_embeddings=True, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    tiny_tokenizer.save_pretrained(tmp_path / "tied")
    grid = {"method": "rtn", "bits": 4, "group": 32}
    quantize(tmp_path / "tied", tmp_path / "artefact", **grid)
    planned = outcome(prepare(tmp_path / "tied", **grid))
    export(tmp_path / "artefact", tmp_path / "onnx", to="onnx", portable=True)
    written = sum(f.stat().st_size for f in (tmp_path / "onnx").rglob("model.onnx.data"))
    tensors = 3 * sum(n.op in ("linear", "embed") for n in planned.nodes) * 2
    assert abs(onnx_bytes(planned, portable=True) - written) <= 4096 * tensors < 16384 * 64


def test_triton(both, tmp_path):
    from safetensors.torch import save_file

    from tpvc.compiler.backends import triton
    from tpvc.compiler.backends.triton.model import model_of

    out, planned = both
    tensors, _ = triton._stored(model_of(frontends.load(out), torch.float16))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert triton_bytes(planned, torch.float16) == weights(tmp_path) - header


@pytest.mark.parametrize("avg_bits", [3.0, 3.6, 5.0])
def test_an_average_is_met_and_every_width_is_somewhere(tiny_llama, avg_bits):
    """Of 8 groups; they fall short of the average by less than the largest of them, a sixth, takes to get 4 more."""
    job = prepare(tiny_llama, method="rtn", avg_bits=avg_bits, group=64)
    found = imagined_grids(job)
    widths = [found[g.weights[0]].bits for g in job.fused]
    assert avg_bits - 4 / 6 < average(job.fused, widths) <= avg_bits
    assert len(set(widths)) >= 3
    assert checkpoint_bytes(outcome(job)) > 0

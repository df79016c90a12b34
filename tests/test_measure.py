"""Any target in its own runtime, from Python: what the command line shows, without a command line."""

import pytest
import torch

import tpvc
from tpvc.compiler import evaluate, frontends, measure
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.windows import encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_llama):
    """The float model for ONNX Runtime GenAI: its graph gives the last token's logits only."""
    return tpvc.export(tiny_llama, tmp_path_factory.mktemp("measure") / "onnx", accuracy_level=0)


def test_a_program_gets_what_evaluate_says(tiny_llama):
    program = frontends.load(tiny_llama)
    tokens = evaluate.text_windows(measure.HELD_OUT, frontends.tokenizer(program), 3, 16)
    wanted = evaluate.perplexity(program, tokens)
    found = tpvc.measure(tiny_llama, windows=3, seqlen=16, threads=1)
    assert found == {
        "text": "built-in",
        "windows": 3,
        "seqlen": 16,
        "target": str(tiny_llama),
        "perplexity": wanted.value,
        "stderr": wanted.stderr,
    }


def test_a_folder_is_no_distance_from_its_original(folder, tiny_llama):
    """Both compute in float32: logits differ by the order of sums, so the loss does by about 1e-6, KL by its square."""
    seen = []
    found = tpvc.measure(
        folder,
        against=tiny_llama,
        windows=5,
        seqlen=16,
        threads=1,
        progress=lambda stage, done, total, note: seen.append((stage, done, total)),
    )
    against = found["against"]
    assert found["perplexity"] == pytest.approx(against["perplexity"], rel=1e-5)
    assert abs(against["kl"]) < 1e-6
    assert against["target"] == str(tiny_llama)
    assert [step for step in seen if step[0] != "load"] == [("measure onnx", i, 5) for i in range(6)]


def test_an_adapter_against_its_own_base(write_adapter, tiny_llama, tmp_path):
    """Only the target is adapted; its folder says the same, by the order of float32 sums."""
    artefact, roads = tmp_path / "w4", {"loud": write_adapter(tiny_llama, tmp_path / "loud")}
    tpvc.quantize(tiny_llama, artefact, method="rtn", group=32, roads=roads)
    folder = tpvc.export(artefact, tmp_path / "onnx", accuracy_level=0)
    options = {"windows": 3, "seqlen": 16, "threads": 1}
    base = tpvc.measure(artefact, **options)
    found = tpvc.measure(artefact, against=artefact, adapter="loud", **options)
    assert found["adapter"] == "loud" and "adapter" not in base
    assert found["against"]["perplexity"] == base["perplexity"]
    assert found["against"]["kl"] > 1e-3
    assert tpvc.measure(folder, adapter="loud", **options)["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    with pytest.raises(TpvcError, match="no adapter 'calm'; it has loud"):
        tpvc.measure(artefact, adapter="calm", **options)


def test_last_tokens_are_found_out_once(folder, tiny_llama, monkeypatch):
    """Two windows of 6 tokens: one look at what the whole window gives, then every token by itself."""
    import onnxruntime_genai as og

    from tpvc.compiler.engines import open_engine

    lengths = []

    class Counted:
        def __init__(self, *options):
            self.inner = made(*options)

        def append_tokens(self, ids):
            lengths.append(len(ids))
            self.inner.append_tokens(ids)

        def get_output(self, name):
            return self.inner.get_output(name)

    made = og.Generator
    monkeypatch.setattr(og, "Generator", Counted)
    engine = open_engine(str(folder), 1)
    both = [engine.logits([5, 6, 7, 8, 9, 10]) for _ in range(2)]
    assert lengths == [6] + [1] * 12
    assert torch.equal(*map(torch.from_numpy, both))


def test_defaults_fit_the_text_and_the_context(tiny_llama, tmp_path):
    subject = measure.open_subject(str(tiny_llama), 1)
    held = len(encode(subject.tokenizer, evaluate.read_text(measure.HELD_OUT)))
    assert measure.windows_of(subject).shape == (held // 128, 128)
    path = tmp_path / "long.txt"
    path.write_text("Rivers run to the sea. " * 2000)
    assert measure.windows_of(subject, path).shape == (40, 256)
    with pytest.raises(TpvcError, match="at least 1 window"):
        measure.windows_of(subject, windows=0)
    with pytest.raises(TpvcError, match="context of 256"):
        measure.windows_of(subject, seqlen=257)

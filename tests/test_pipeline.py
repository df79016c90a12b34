"""The whole road on a tiny Llama: what lies in the artefact, resuming after a kill, other runs refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from tpvc.compiler import frontends, pipeline
from tpvc.compiler.calibration import Calibration
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.export_pipeline import export
from tpvc.compiler.job import prepare
from tpvc.compiler.pipeline import quantize
from tpvc.compiler.program import grid_of, linears
from tpvc.compiler.progress import silent
from tpvc.compiler.tuning.parallel import ALONE

OPTIONS = {"bits": 3, "group": 32, "steps": 12, "nsamples": 16, "seqlen": 32, "dataset": "self"}
SCRIPT = """
import sys
from tpvc.compiler.pipeline import quantize
def say(stage, done, total, note):
    print(stage, done, flush=True)
quantize(sys.argv[1], sys.argv[2], progress=say, **{options})
"""


def bytes_of(directory):
    """Every file but the report, which tells seconds."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "report.html"}


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    return quantize(tiny_llama, tmp_path_factory.mktemp("whole") / "out", **OPTIONS)


def test_the_artefact_tells_what_was_done(whole, tiny_llama):
    manifest = json.loads((whole / "tpvc.json").read_text())
    assert manifest["options"]["bits"] == 3 and manifest["options"]["group"] == 32
    assert len(manifest["blocks"]) == 2
    for block in manifest["blocks"]:
        assert block["error"] < block["error_rtn"]
        assert len(block["linears"]) == 7
    assert manifest["calibration"]["tokens"] == 16 * 32
    assert manifest["head"] == {"name": "lm_head", "parameter": "lm_head.weight", "bits": 8, "tied": False}
    kept = manifest["left_in_float"]
    assert [entry["name"] for entry in kept] == ["model.embed_tokens"] and "table lookup" in kept[0]["why"]
    assert kept[0]["why"] in (whole / "report.html").read_text()
    assert "seconds" not in (whole / "tpvc.json").read_text()
    assert [p["name"] for p in manifest["passes"]] == ["FlexRound", "TuneScales", "RoundToNearest"]
    checks = manifest["passes"][1]["checks"]  # 14 of 16 windows, three quarters of them, 4 in a step
    assert [step for step, _ in checks] == [0, 1, 2, 3] and min(kl for _, kl in checks) < checks[0][1]
    assert "The closing step" in (whole / "report.html").read_text()
    assert set(manifest["source"]["files"]) == {"model.safetensors"}
    assert (whole / "report.html").read_text().startswith("<!doctype html>")


def test_the_artefact_loads_into_the_program_that_was_rounded(whole):
    program = frontends.load(whole)
    for node in linears(program.nodes):
        grid = grid_of(program.params[node.params["weight"]])
        assert (grid.bits, grid.group) == ((8, -1) if node.block is None else (3, 32))


@pytest.mark.parametrize("after", ["FlexRound 1", "FlexRound 2", "tune scales 3", "round to nearest 1", "write 0"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(whole, tiny_llama, tmp_path, after):
    out = tmp_path / "out"
    code = SCRIPT.replace("{options}", repr(OPTIONS))
    run = subprocess.Popen([sys.executable, "-c", code, tiny_llama, out], stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.strip() == after:
            run.kill()
            break
    run.wait()
    assert run.returncode == -9, "the run must be killed before it ends"
    assert not out.exists()
    seen = []
    quantize(tiny_llama, out, progress=lambda stage, done, total, note: seen.append((stage, done)), **OPTIONS)
    if after == "FlexRound 1":
        assert ("FlexRound", 0) not in seen, "the first block must not be computed again"
    assert ("check", 0) not in seen, "the weights of the interrupted run were checked"
    assert bytes_of(out) == bytes_of(whole)
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("options", [OPTIONS, {"method": "rtn", "group": 32}])
def test_weights_that_are_not_finite_are_refused_before_the_first_block(tiny_llama, tmp_path, options):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    seen = []
    with pytest.raises(TpvcError, match=r"model\.layers\.1\.input_layernorm\.weight.*NaN"):
        options = {**options, "dataset": "builtin"}
        quantize(model, tmp_path / "out", progress=lambda stage, *_: seen.append(stage), **options)
    assert "check" in seen and not {"FlexRound", "round to nearest"} & set(seen)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_errors_count_as_norms_show_them_before_factors_moved_out_of_them(tiny_llama):
    """Where activations are rounded, the pass before the blocks divides what norms yield, and their weights with it."""
    job = prepare(tiny_llama, bits=4, activations="int8")
    calibration = Calibration(torch.zeros(job.nsamples, 8, dtype=torch.int64), {})
    made = pipeline._passes(job, job.grid, calibration, pipeline.Stores(None, None, None), 0, "cpu", silent, ALONE)
    assert [type(p).__name__ for p in made] == ["EaseInputs", "FlexRound", "TuneScales", "RoundToNearest"]
    assert made[1].norms is job.program


def test_another_run_does_not_go_on_where_one_stopped(tiny_llama, tmp_path):
    out = tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(stage, done, total, note):
        if (stage, done) == ("FlexRound", 1):
            raise Stop

    with pytest.raises(Stop):
        quantize(tiny_llama, out, progress=stop, **OPTIONS)
    with pytest.raises(TpvcError, match=r"bits.*4"):
        quantize(tiny_llama, out, **{**OPTIONS, "bits": 4})
    with pytest.raises(TpvcError, match="seqlen is 32, not 16"):
        quantize(tiny_llama, out, **{**OPTIONS, "seqlen": 16})
    quantize(tiny_llama, out, **{**OPTIONS, "bits": 4}, overwrite=True)
    assert json.loads((out / "tpvc.json").read_text())["options"]["bits"] == 4


def test_adapters_in_another_order_or_layout_are_another_run(tiny_llama, write_adapter, tmp_path):
    """Their order says which window belongs to which, their config which outputs make a pair."""
    out, options = tmp_path / "out", OPTIONS | {"recipe": "fast", "steps": 1, "seqlen": 8, "dataset": "builtin"}
    roads = {name: write_adapter(tiny_llama, tmp_path / name, seed) for seed, name in enumerate("ab")}

    def stop(stage, done, total, note):
        if (stage, done) == ("FlexRound", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_llama, out, roads=roads, progress=stop, **options)
    with pytest.raises(TpvcError, match=r'adapters is .."a", .*, not .."b"'):
        quantize(tiny_llama, out, roads=dict(reversed(roads.items())), **options)
    config = roads["b"] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"group_size": 4}))
    with pytest.raises(TpvcError, match=r"holds another unfinished run .adapters is"):
        quantize(tiny_llama, out, roads=roads, **options)


@pytest.mark.parametrize(
    "options",
    [{"dataset": "self"}, {"activations": "int8"}, {"avg_bits": 4.0}, {"activations": "int8-static"}],
    ids=str,
)
def test_logits_that_are_not_finite_are_a_sentence(tiny_llama, tmp_path, options):
    """Of weights that are: what they make overflows."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], torch.finfo(torch.float32).max)
    save_file({n: t.float() for n, t in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    bits = {} if "avg_bits" in options else {"bits": 8}
    options = {"nsamples": 8, "seqlen": 8, "method": "rtn", "dataset": "builtin"} | bits | options
    options |= {"method": "flexround", "steps": 1} if options["dataset"] == "self" else {}
    with pytest.raises(TpvcError, match="not finite"):
        quantize(model, tmp_path / "out", **options)


def test_a_failed_export_leaves_nothing(whole, tmp_path, monkeypatch):
    from tpvc.compiler.backends import onnx

    def fail(program, directory, *args, **options):
        (directory / "model.onnx").write_bytes(b"half")
        raise TpvcError("no")

    monkeypatch.setattr(onnx, "emit", fail)
    with pytest.raises(TpvcError):
        export(whole, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_is_not_replaced_by_its_export(whole, tmp_path):
    before = bytes_of(whole)
    for out in (whole, whole.parent):
        with pytest.raises(TpvcError, match="would be lost"):
            export(whole, out, overwrite=True)
    assert bytes_of(whole) == before


def test_tables_that_share_the_integers_of_the_head_are_not_in_float(tiny_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for head_bits, names in ((8, []), (16, ["lm_head"])):
        out = quantize(model, tmp_path / str(head_bits), method="rtn", group=32, head_bits=head_bits)
        assert [e["name"] for e in json.loads((out / "tpvc.json").read_text())["left_in_float"]] == names


def test_windows_are_no_longer_than_the_context(tiny_llama, tmp_path):
    short = tmp_path / "model"
    shutil.copytree(tiny_llama, short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 48}
    (short / "config.json").write_text(json.dumps(config))
    out = quantize(short, tmp_path / "out", **{**OPTIONS, "steps": 1, "seqlen": None})
    assert json.loads((out / "tpvc.json").read_text())["calibration"]["seqlen"] == 48


def test_a_run_does_not_go_on_when_the_config_has_changed(tiny_llama, tmp_path):
    """The weight files are the same, but what they compute is not."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_llama, model)
    options = {"method": "rtn", "group": 32}

    class Stop(Exception):
        pass

    def stop(stage, done, total, note):
        if stage == "write":
            raise Stop

    with pytest.raises(Stop):
        quantize(model, out, progress=stop, **options)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    with pytest.raises(TpvcError, match="config"):
        quantize(model, out, **options)


def test_only_onnx_has_a_portable_twin(whole, tmp_path):
    with pytest.raises(TpvcError, match="only onnx"):
        export(whole, tmp_path / "out", to="vllm", portable=True)

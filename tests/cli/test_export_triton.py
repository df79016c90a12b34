"""A package for GPUs, built without one: what lies in it, that it runs through the references, and what is refused."""

import json

import pytest
import torch

from tpvc.compiler import frontends
from tpvc.compiler.backends import triton
from tpvc.compiler.backends.triton.engine import Engine
from tpvc.compiler.backends.triton.model import model_of
from tpvc.compiler.backends.triton.on_torch import OnTorch
from tpvc.kernels import package
from tpvc.kernels.driver import present

TEXT = "The quick brown"


@pytest.fixture(scope="module")
def packaged(ok, artefact, write_adapter, tmp_path_factory):
    """The W4 artefact with an adapter, for one GPU and fewer slots than otherwise, which is quicker."""
    folder = tmp_path_factory.mktemp("packages")
    write_adapter(artefact, folder / "own")
    given = ("--to", "triton", "--target", "cuda:80", "--road", f"own={folder / 'own'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "ROWS", (1, 2))
        told = ok("export", artefact, "-o", folder / "gpu", *given)
    return folder / "gpu", folder / "own", told


def test_what_lies_in_it(packaged):
    folder, _, told = packaged
    assert {"triton.json", "model.safetensors", "tpvc.json", "tokenizer.json"} <= set(told["files"])
    kernels = package.read(folder / "kernels")
    assert kernels.targets == ("cuda:80", "ptx:80")
    bodies = {e.kernel for e in kernels.entries}
    assert {"linear:slab_product", "attention:attend", "norm:normalise", "rope_cache:turn_and_write"} <= bodies
    manifest = json.loads((folder / "tpvc.json").read_text())
    assert manifest["files"].keys() == set(told["files"]) - {"tpvc.json"}
    assert [a["name"] for a in manifest["adapters"]] == ["own"]


def test_it_is_inspected(packaged, ok, tpvc, refused, tmp_path):
    folder, _, _ = packaged
    found = ok("inspect", folder)
    assert found["kind"] == "a package of Triton kernels" and found["facts"]["capacity"] == 256
    assert found["kernels"] == {
        target: f"{sum(e.target == target for e in package.read(folder / 'kernels').entries)} binaries"
        for target in package.read(folder / "kernels").targets
    }
    assert "kernels" in tpvc("inspect", folder).stdout
    (tmp_path / "triton.json").write_text('{"format": 2}')
    assert "triton.json is damaged" in refused("inspect", tmp_path)


def test_it_is_read_as_it_was_made(packaged, artefact):
    folder, own, _ = packaged
    made = model_of(frontends.with_roads(frontends.load(artefact), {"own": own}), torch.float16)
    read = triton.read(folder)
    assert read.facts == made.facts and read.adapters == made.adapters and read.dtype == made.dtype
    engines = [Engine(OnTorch(m, 2, 24)) for m in (made, read)]
    for ids, adapter in (([5, 9, 33], "own"), ([7], None)):
        logits = [e.admit(ids, adapter)[1] for e in engines]
        assert torch.equal(*logits)


def test_it_runs_without_a_gpu(packaged, ok, refused):
    folder, _, _ = packaged
    engine = Engine(OnTorch(triton.read(folder), 1, 64))
    for name in ("own", None):
        slot, logits = engine.admit(ids_of(folder), name)
        expected = []
        for _ in range(6):
            token = int(logits.argmax())
            expected.append(token)
            logits = engine.decode([slot], [token])[0]
        engine.release(slot)
        given = () if name is None else ("--adapter", name)
        told = ok("run", folder, TEXT, "--raw", "--max-new-tokens", 6, "--device", "cpu", *given)
        assert told["engine"] == "references of the Triton kernels, float16"
        assert told["tokens"] == expected[: len(told["tokens"])]
    assert "no adapter 'x'; it has own" in refused("run", folder, TEXT, "--adapter", "x")
    assert "no task 'x'; it has none" in refused("run", folder, TEXT, "--task", "x")
    drawn = [
        ok("run", folder, TEXT, "--raw", "--max-new-tokens", 6, "--temperature", 2, "--seed", s) for s in (1, 1, 2)
    ]
    assert drawn[0]["tokens"] == drawn[1]["tokens"] != drawn[2]["tokens"]


def test_its_perplexity_is_the_artefacts(packaged, artefact, ok):
    """Every op rounds to float16: logits of at most 4 are off by some 11-bit eps of that, losses by twice as much."""
    options = ("--windows", 2, "--seqlen", 16, "--threads", 1)
    wanted, found = (ok("eval", target, *options)["perplexity"] for target in (artefact, packaged[0]))
    assert found == pytest.approx(wanted, rel=4 * 2**-8) and found != wanted


def ids_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]


def test_what_is_refused(packaged, refused, artefact, tmp_path):
    export = ("export", artefact, "-o", tmp_path / "out", "--to", "triton")
    assert "triton takes GPUs by name" in refused(*export)
    assert "sm_90" in refused(*export, "--target", "sm_90")
    assert "others none" in refused("export", artefact, "-o", tmp_path / "out", "--target", "cuda:90")
    assert not list(tmp_path.iterdir())
    folder = packaged[0]
    assert "only triton has one of int8" in refused("export", artefact, "-o", tmp_path / "out", "--cache", "int8")
    assert "only packages" in refused("run", artefact, TEXT, "--device", "cuda")
    if present() is None:
        assert "no CUDA driver was found" in refused("run", folder, TEXT, "--device", "cuda")
    assert not list(tmp_path.iterdir())
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "not a complete safetensors file" in refused("run", broken, TEXT)
    (broken / "triton.json").write_text('{"format": 7}')
    assert "has format 7" in refused("run", broken, TEXT)


def test_a_description_that_was_changed_is_refused(packaged, refused, tmp_path):
    folder, whole = packaged[0], json.loads((packaged[0] / "triton.json").read_text())
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    broken, kept = tmp_path / "triton.json", (tmp_path / "tpvc.json").read_bytes()
    for field in (*whole, None):
        changed = {key: value for key, value in whole.items() if key != field}
        for value in ({}, {field: None}, {field: "x"}) if field else ({"capacity": whole["capacity"] + 1},):
            broken.write_text(json.dumps(changed | value))
            (tmp_path / "tpvc.json").write_bytes(kept)
            refused("run", tmp_path, TEXT, "--device", "cpu")
            if field not in ("slots", None) and value != {field: "x"}:  # found without a manifest too
                (tmp_path / "tpvc.json").unlink()
                refused("run", tmp_path, TEXT, "--device", "cpu")
    broken.write_text(json.dumps(whole, indent=1))
    (tmp_path / "tpvc.json").write_bytes(kept)
    assert "triton.json was changed after it was written" in refused("run", tmp_path, TEXT, "--device", "cpu")


def test_bench_takes_it(packaged, ok):
    folder, _, _ = packaged
    told = ok("bench", folder, "--prompt-tokens", 8, "--new-tokens", 4, "--runs", 1, "--device", "cpu")
    (row,) = told["rows"]
    assert row["engine"].startswith("references of the Triton kernels") and row["decode"] > 0

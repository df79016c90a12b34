"""The file that fine-tuning runs reuse: what is written is read, and whose it is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.tuning import importance_file
from tpvc.compiler.tuning.space import make_space

ABOUT = {"method": "path", "base": "abc", "train": "lora", "targets": "all-linear", "rank": 2}


@pytest.fixture
def written(tiny_program, tmp_path):
    """(path, Omega, space) of a file with random importance, an anchor and normalised coefficients."""
    space = make_space(tiny_program, "lora", "all-linear", 2, 0)
    draw = torch.Generator().manual_seed(0)
    omega = {n: torch.rand(space.value(n).shape, generator=draw).pow(8) * 50 for n in space.layers}
    path = tmp_path / "a.importance"
    importance_file.write(path, omega, space, space.params, "normalised", ABOUT)
    return path, omega, space


def test_omega_has_mean_one_within_half_a_step(written):
    path, omega, space = written
    found = importance_file.read(path)
    scale = sum(float(o.double().sum()) for o in omega.values()) / sum(o.numel() for o in omega.values())
    assert found.about["scale"] == pytest.approx(scale)
    for name, wanted in omega.items():
        kept = found.omega[name].dense * scale
        large = wanted > wanted.max() * 2**-31
        assert float((kept[large] / wanted[large]).log2().abs().max()) <= 1 / 16 + 2**-20
    assert list(found.layers.values()) == [space.layers[n] for n in found.layers]
    assert found.coefficients[next(iter(omega))] == float(found.alpha[0])


def test_the_anchor_and_the_codes_come_back_bit_for_bit(written):
    path, _, space = written
    found = importance_file.read(path)
    assert all(torch.equal(found.anchor[n], p) for n, p in space.params.items())
    raw = load_file(path)
    assert all(torch.equal(c.codes, raw[f"importance.{n}"]) for n, c in found.omega.items())
    assert ABOUT.items() <= found.about.items()


def test_the_same_importance_gives_the_same_bytes(written, tmp_path):
    path, omega, space = written
    importance_file.write(tmp_path / "b", omega, space, space.params, "normalised", ABOUT)
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_all_zero_is_a_file_too(tiny_program, tmp_path):
    space = make_space(tiny_program, "road_1", "all-linear", 2, 0)
    zero = {n: torch.zeros_like(space.value(n)) for n in space.layers}
    importance_file.write(tmp_path / "z", zero, space, {}, "normalised", ABOUT)
    found = importance_file.read(tmp_path / "z")
    assert not any(c.dense.any() for c in found.omega.values()) and torch.equal(found.alpha, torch.ones(2))


def test_another_model_is_refused(written):
    path, _, _ = written
    importance_file.check_base(importance_file.read(path), path, "abc")
    with pytest.raises(TpvcError, match=r"made of another model \(abc, this one is xyz\)"):
        importance_file.check_base(importance_file.read(path), path, "xyz")


def test_what_is_no_importance_file(written, tmp_path):
    path, _, _ = written
    with pytest.raises(TpvcError, match="there is no file"):
        importance_file.read(tmp_path / "nowhere")
    (tmp_path / "text").write_text("hello")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    (tmp_path / "half").write_bytes(path.read_bytes()[:-100])
    for name in ("text", "other", "half"):
        with pytest.raises(TpvcError, match="not an importance file, or damaged"):
            importance_file.read(tmp_path / name)
    tensors = load_file(path)
    told = {**importance_file.about(path), "version": 2}
    save_file(tensors, tmp_path / "later", metadata={"tpvc": json.dumps(told)})
    with pytest.raises(TpvcError, match="of version 2; expected 1"):
        importance_file.read(tmp_path / "later")
    tensors.pop(next(n for n in tensors if n.startswith("top.")))
    save_file(tensors, tmp_path / "lacking", metadata={"tpvc": json.dumps(importance_file.about(path))})
    with pytest.raises(TpvcError, match="is damaged"):
        importance_file.read(tmp_path / "lacking")

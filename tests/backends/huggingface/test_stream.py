import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tpvc.compiler.backends.huggingface.stream import NAMES, Piece, write


def piece(tensors: dict[str, torch.Tensor]) -> Piece:
    return Piece({n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, lambda: dict(tensors))


def test_every_dtype_and_odd_length_is_read_back_and_aligned(tmp_path):
    made = {f"t.{name}": torch.arange(-3, 4).to(dtype) for dtype, name in NAMES.items()}
    made |= {"transposed": torch.arange(6.0).reshape(2, 3).T, "empty": torch.zeros(0, 4), "one": torch.tensor([7.5])}
    files = write(tmp_path, [piece({n: t}) for n, t in made.items()])
    assert files == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == made.keys()
    for name, was in made.items():
        assert found[name].dtype == was.dtype and torch.equal(found[name], was)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % made[name].dtype.itemsize == 0


def test_one_piece_is_held_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def make(name: str) -> dict[str, torch.Tensor]:
        assert not any(ref() is not None for ref in alive), "an earlier piece is still in memory"
        tensor = torch.ones(100)
        alive.append(weakref.ref(tensor))
        return {name: tensor}

    pieces = [Piece({n: (torch.float32, (100,))}, lambda n=n: make(n)) for n in "abc"]
    write(tmp_path, pieces)
    assert len(alive) == 3


def test_shards_never_split_a_piece(tmp_path):
    pieces = [piece({f"{n}.x": torch.ones(10), f"{n}.y": torch.ones(5)}) for n in "abcde"]
    files = write(tmp_path, pieces, shard_bytes=130)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 60}
    assert sorted(set(index["weight_map"].values())) == sorted(files) and len(files) == 3
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
        assert index["weight_map"][f"{name[0]}.x"] == file


def test_a_piece_that_is_not_what_it_announced(tmp_path):
    wrong = Piece({"a": (torch.float32, (2,))}, lambda: {"a": torch.ones(2, dtype=torch.float16)})
    with pytest.raises(ValueError, match="announced"):
        write(tmp_path, [wrong])

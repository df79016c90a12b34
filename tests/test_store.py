import errno
import os

import pytest
import torch

from tpvc.compiler import store as store_file
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, QTensor, read
from tpvc.compiler.store import BlockStore

RUN = {"bits": 3, "source": {"model.safetensors": "ab" * 32}, "dims": (1, 2)}
GRIDS = [Grid(3, 8, False), Grid(8, -1, True), Grid(2, 0, False), Grid(5, -1, False)]


def params(seed: int, scale_dtype=torch.bfloat16) -> dict[str, QTensor]:
    g = torch.Generator().manual_seed(seed)
    made = {}
    for i, grid in enumerate(GRIDS):
        shape = (5, 24 if grid.group > 0 else 21)
        scale = (1, 1) if grid.group == 0 else (5, shape[1] // grid.columns(shape[1]))
        top = 2**grid.bits
        made[f"model.layers.{seed}.linear{i}.weight"] = QTensor(
            torch.randint(top, shape, generator=g).to(torch.uint8),
            torch.rand(scale, generator=g).to(scale_dtype).float(),
            None if grid.symmetric else torch.randint(top, scale, generator=g).to(torch.uint8),
            grid,
            scale_dtype,
        )
    return made


def streams(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 4, 8, generator=g) for name in ("x_float", "x_quant")}


def check(found, made: dict[str, QTensor]) -> None:
    assert found.keys() == made.keys()
    for name, was in made.items():
        lazy = found[name]
        assert (lazy.shape, lazy.dtype, lazy.grid) == (was.shape, was.scale_dtype, was.grid)
        now = read(lazy)
        assert torch.equal(now.codes, was.codes) and torch.equal(now.scale, was.scale)
        assert now.scale_dtype == was.scale_dtype and (now.zero is None) == (was.zero is None)
        assert was.zero is None or torch.equal(now.zero, was.zero)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_comes_back_bit_for_bit(tmp_path, scale_dtype):
    store = BlockStore.open(tmp_path / "work", RUN)
    made, record = params(0, scale_dtype), {"block": 0, "error": 1 / 3, "curve": [[0, 0.1]]}
    check(store.save(0, made, record, streams(0)), made)
    found, told = BlockStore.open(tmp_path / "work", RUN).finished(0)
    check(found, made)
    assert told == record
    for name, was in streams(0).items():
        assert torch.equal(store.streams(0)[name], was)
        assert list(store.streams(0, name)) == [name] and torch.equal(store.streams(0, name)[name], was)
    assert store.finished(1) is None


def test_only_the_last_streams_are_kept(tmp_path):
    store = BlockStore.open(tmp_path, RUN)
    for block in range(3):
        store.save(block, params(block), {}, streams(block))
    assert [p.name for p in sorted(tmp_path.glob("stream-*"))] == ["stream-00002.safetensors"]
    assert torch.equal(store.streams(2)["x_quant"], streams(2)["x_quant"])
    with pytest.raises(TpvcError, match="missing or damaged"):
        store.streams(1)
    assert all(store.finished(block) for block in range(3))


def test_streams_stay_until_there_are_others(tmp_path):
    """What is saved without any, as a head is, may be followed by work that starts from the last ones again."""
    store = BlockStore.open(tmp_path, RUN)
    store.save(0, params(0), {}, streams(0))
    store.save(1, params(1), {}, None)
    assert all(torch.equal(t, streams(0)[name]) for name, t in store.streams(0).items())


def test_a_parameter_whose_name_begins_like_another(tmp_path):
    q = next(iter(params(0).values()))
    other = params(1)["model.layers.1.linear1.weight"]
    store = BlockStore.open(tmp_path, RUN)
    check(store.save(0, {"a": q, "a.b": other}, {}, None), {"a": q, "a.b": other})


def test_another_run_is_told_what_differs(tmp_path):
    BlockStore.open(tmp_path, RUN)
    BlockStore.open(tmp_path, dict(reversed(RUN.items())))
    with pytest.raises(TpvcError, match="bits is 3, not 4"):
        BlockStore.open(tmp_path, {**RUN, "bits": 4})
    with pytest.raises(TpvcError, match="seed is null, not 1"):
        BlockStore.open(tmp_path, {**RUN, "seed": 1})


def test_a_damaged_fingerprint(tmp_path):
    BlockStore.open(tmp_path, RUN)
    (tmp_path / "fingerprint.json").write_text('{"bits": ')
    with pytest.raises(TpvcError, match="damaged"):
        BlockStore.open(tmp_path, RUN)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "not safetensors"])
def test_a_damaged_file_counts_as_missing(tmp_path, damage):
    store = BlockStore.open(tmp_path, RUN)
    store.save(0, params(0), {}, streams(0))
    for path in (tmp_path / "block-00000.safetensors", tmp_path / "stream-00000.safetensors"):
        data = bytearray(path.read_bytes())
        if damage == "flip":
            data[-7] ^= 1
        damaged = {"cut": data[:-9], "flip": data, "empty": b"", "not safetensors": b"hello, world"}[damage]
        path.write_bytes(bytes(damaged))
    assert store.finished(0) is None
    with pytest.raises(TpvcError, match="missing or damaged"):
        store.streams(0)


@pytest.mark.parametrize(("was", "now"), [(b"0.125", b"0.625"), (b"[5, 24]", b"[5, 42]")])
def test_a_damaged_record_counts_as_missing(tmp_path, was, now):
    """Same length, so that the file still opens."""
    store = BlockStore.open(tmp_path, RUN)
    store.save(0, params(0), {"error": 0.125}, None)
    path = tmp_path / "block-00000.safetensors"
    data = path.read_bytes()
    assert data.count(was) == 1
    path.write_bytes(data.replace(was, now))
    assert store.finished(0) is None


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch):
    store = BlockStore.open(tmp_path, RUN)
    store.save(0, params(0), {}, streams(0))
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(tensors, path, metadata):
        path.write_bytes(b"the first few bytes")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_file, "save_file", full)
    with pytest.raises(TpvcError, match="No space left on device"):
        store.save(1, params(1), {}, streams(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert store.finished(1) is None and store.finished(0) and store.streams(0)


@pytest.mark.parametrize("at", [0, 1])
def test_killed_between_two_files_the_last_finished_block_still_has_its_streams(tmp_path, monkeypatch, at):
    store = BlockStore.open(tmp_path, RUN)
    store.save(0, params(0), {}, streams(0))
    real, done = os.replace, []

    def killed(source, target):
        if len(done) == at:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save(1, params(1), {}, streams(1))
    monkeypatch.undo()
    again = BlockStore.open(tmp_path, RUN)
    assert again.finished(1) is None
    check(again.finished(0)[0], params(0))
    assert torch.equal(again.streams(0)["x_float"], streams(0)["x_float"])
    again.save(1, params(1), {}, streams(1))
    check(again.finished(1)[0], params(1))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TpvcError, match="cannot write"):
        BlockStore.open(tmp_path / "file", RUN)

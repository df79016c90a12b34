"""The kernels folder of a package: what is written, and what is noticed when it is read."""

import json
import shutil
from dataclasses import replace

import pytest

from tpvc.compiler.errors import TpvcError
from tpvc.kernels.aot import Binary, Kept, Resources, Variant
from tpvc.kernels.package import for_device, read, write
from tpvc.kernels.targets import PTX, named

VARIANT = Variant(
    "tiny:sum",
    (("x", "*fp16"), ("bias", "none"), ("n_rows", "i32"), ("width", "i32")),
    (("BIAS", False), ("BLOCK", 256)),
    4,
    2,
    ("x", "width"),
)


def kept(target="cuda:90", code=b"\x7fELF one", ranks=(("sum", (0,)),), variant=VARIANT) -> Kept:
    took = Resources(32, 0, 0, 0, 0, 100, 0, 0, 4)
    return Kept(Binary(variant, named(target), code, "sum", 4, 512, (0, 1, 0), True, took, "3.7.1", "ab" * 32), ranks)


ALL = (
    kept("cuda:90", b"\x7fELF one", (("sum", (1,)), ("other", (0, 2)))),
    kept("cuda:90", b"\x7fELF two", (("sum", (0,)),), replace(VARIANT, stages=3)),
    kept("cuda:80", b"\x7fELF three"),
    kept("hip:gfx942", b"\x7fELF four"),
    kept(PTX.name, b"// text"),
)


def test_a_package_is_read_as_it_was_written(tmp_path):
    write(tmp_path / "kernels", ALL)
    names = sorted(p.name for p in (tmp_path / "kernels").iterdir())
    assert names[0] == "manifest.json" and len(names) == 6
    assert {".".join(name.split(".")[:2] + name.split(".")[3:]) for name in names[1:]} == {
        "sum.cuda_80.cubin",
        "sum.cuda_90.cubin",
        "sum.hip_gfx942.hsaco",
        "sum.ptx_80.ptx",
    }
    package = read(tmp_path / "kernels")
    entry = next(e for e in package.entries if e.ranks == {"sum": (1,), "other": (0, 2)})
    assert package.code(entry) == b"\x7fELF one"
    assert (entry.kernel, entry.symbol, entry.target, entry.threads, entry.shared) == (
        "tiny:sum",
        "sum",
        "cuda:90",
        128,
        512,
    )
    assert entry.params == VARIANT.params and entry.divisible == ("x", "width") and entry.options == (4, 2)
    assert entry.constants == {"BIAS": False, "BLOCK": 256} and entry.constants["BIAS"] is False


def test_a_manifest_says_how_to_launch(tmp_path):
    write(tmp_path, [kept()])
    (entry,) = json.loads((tmp_path / "manifest.json").read_text())["binaries"]
    assert entry.pop("file") == f"sum.cuda_90.{entry.pop('sha256')[:12]}.cubin"
    assert entry.pop("resources")["registers"] == 32
    assert entry == {
        "kernel": "tiny:sum",
        "symbol": "sum",
        "target": "cuda:90",
        "backend": "cuda",
        "arch": 90,
        "form": "cubin",
        "size": 8,
        "warp_size": 32,
        "num_warps": 4,
        "num_ctas": 1,
        "options": [4, 2],
        "shared": 512,
        "global_scratch": 0,
        "global_scratch_align": 1,
        "profile_scratch": 0,
        "launch_pdl": False,
        "params": [
            ["x", "*fp16"],
            ["bias", "none"],
            ["n_rows", "i32"],
            ["width", "i32"],
            ["global_scratch", "*i8"],
            ["profile_scratch", "*i8"],
        ],
        "divisible_by_16": ["x", "width"],
        "consts": {"BIAS": False, "BLOCK": 256},
        "ranks": {"sum": [0]},
        "fits": True,
        "triton": "3.7.1",
        "source_sha256": "ab" * 32,
    }


def test_the_same_binaries_make_the_same_bytes_in_any_order(tmp_path):
    write(tmp_path / "a", ALL)
    write(tmp_path / "b", ALL[::-1])
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    assert str(tmp_path) not in (tmp_path / "a" / "manifest.json").read_text()


def test_what_runs_on_a_device_comes_best_first(tmp_path):
    write(tmp_path, ALL)
    package = read(tmp_path)
    assert [e.target for e in for_device(package, "cuda", 90)] == ["cuda:90", "cuda:90", "ptx:80"]
    assert [e.target for e in for_device(package, "cuda", 86)] == ["cuda:80", "ptx:80"]
    with pytest.raises(
        TpvcError, match=r"are for cuda:80, cuda:90, hip:gfx942, ptx:80 and this device is hip:gfx1100; b"
    ):
        for_device(package, "hip", "gfx1100")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def turn(path):
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def edit(**changes):
    def work(path):
        found = json.loads(path.read_text())
        found["binaries"][0] |= changes
        path.write_text(json.dumps(found))

    return work


@pytest.mark.parametrize(
    ("which", "damage", "says"),
    [
        ("*.hsaco", cut, r"gfx942.*hsaco' has 8 bytes and 9 were written; copy"),
        ("*.hsaco", turn, r"gfx942.*hsaco' was changed after it was written; copy"),
        ("*.ptx", lambda path: path.unlink(), r"ptx' cannot be read \(No such file or directory\); copy"),
        ("manifest.json", lambda path: path.unlink(), r"has no manifest.json; expected the kernels folder"),
        ("manifest.json", lambda path: path.write_text("{"), r"manifest.json' cannot be read \(Expecting.*; build"),
        ("manifest.json", lambda path: path.write_text("[]"), r"manifest.json' cannot be read"),
        (
            "manifest.json",
            lambda path: path.write_text('{"format": 2, "binaries": []}'),
            r"has format 2 and .* reads 1; b",
        ),
        ("manifest.json", edit(file="../one"), r"has an entry that is not whole \(file '../one'\)"),
        ("manifest.json", edit(target="cuda:91"), r"has an entry that is not whole \('cuda:91' is not a target"),
        ("manifest.json", edit(params=[]), r"has an entry that is not whole"),
    ],
)
def test_damage_is_one_sentence(tmp_path, which, damage, says):
    write(tmp_path / "kernels", ALL)
    damage(next((tmp_path / "kernels").glob(which)))
    with pytest.raises(TpvcError, match=says) as raised:
        read(tmp_path / "kernels")
    assert "\n" not in str(raised.value)


def test_a_file_that_changes_after_reading_is_not_loaded(tmp_path):
    write(tmp_path / "one", [kept()])
    package = read(tmp_path / "one")
    shutil.move(tmp_path / "one" / package.entries[0].file, tmp_path / "gone")
    with pytest.raises(TpvcError, match="cannot be read"):
        package.code(package.entries[0])


def test_a_device_is_no_file_of_a_package(tmp_path):
    """It would be read without end."""
    write(tmp_path / "kernels", ALL)
    for name in ("manifest.json", next(p.name for p in (tmp_path / "kernels").iterdir() if p.suffix == ".cubin")):
        shutil.move(tmp_path / "kernels" / name, tmp_path / name)
        (tmp_path / "kernels" / name).symlink_to("/dev/zero")
        with pytest.raises(TpvcError, match="no regular file"):
            read(tmp_path / "kernels")
        (tmp_path / "kernels" / name).unlink()
        shutil.move(tmp_path / name, tmp_path / "kernels" / name)
    assert read(tmp_path / "kernels").entries

"""The ahead-of-time build: what a launch asks for, what compilers make of it, and what is kept."""

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tpvc.kernels
from tpvc.compiler.errors import TpvcError
from tpvc.kernels import aot
from tpvc.kernels.aot import Variant, build, compile_all, distinct, gate, rank, variant_of
from tpvc.kernels.launch import Launch
from tpvc.kernels.package import write
from tpvc.kernels.targets import PTX, named, parse

pytest.importorskip("triton")

HERE = Path(__file__).parent
HALF = torch.zeros(4096, dtype=torch.float16)


@pytest.fixture(scope="module", autouse=True)
def tiny_kernels_are_found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpvc.kernels, "__path__", [*tpvc.kernels.__path__, str(HERE)])
        patch.setenv("TRITON_INTERPRET", "1")
        yield


def scaled_sum(width=256, x=HALF, bias=None, scale=0.5, rows=2, warps=4) -> Launch:
    args = (x, HALF, bias, HALF, rows, width, scale)
    return Launch("tiny_kernels:scaled_sum", (2, 1, 1), args, {"BLOCK": 256, "BIAS": bias is not None}, warps)


def product(m, n, k=32, warps=4) -> Launch:
    args = (HALF, HALF, HALF, 3, 64, 64)
    return Launch(
        "tiny_kernels:product", (1, 1, 1), args, {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps=warps, stages=3
    )


def test_a_launch_says_what_is_compiled():
    made = variant_of(scaled_sum())
    assert made.params == (
        ("x", "*fp16"),
        ("y", "*fp16"),
        ("bias", "none"),
        ("out", "*fp16"),
        ("n_rows", "i32"),
        ("width", "i32"),
        ("scale", "fp32"),
    )
    assert made.constants == (("BIAS", False), ("BLOCK", 256))
    assert made.divisible == ("x", "y", "out", "width")
    assert variant_of(scaled_sum(width=250, x=HALF[1:])).divisible == ("y", "out")
    assert "n_rows" not in variant_of(scaled_sum(rows=16)).divisible
    assert dict(variant_of(scaled_sum(width=2**31)).params)["width"] == "i64"
    assert dict(variant_of(scaled_sum(bias=HALF)).params)["bias"] == "*fp16"


def test_launches_of_other_sizes_need_no_other_variant():
    made = [variant_of(scaled_sum(rows=rows)) for rows in (1, 2, 16)] + [variant_of(scaled_sum(warps=8))]
    assert distinct(made) == (made[0], made[3])
    one = replace(made[0], constants=(("BIAS", 1),))
    assert distinct([one, replace(one, constants=(("BIAS", True),))])[1].constants == (("BIAS", True),)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"args": (HALF,)}, "was given 1 arguments .* its parameters are x, y"),
        ({"constants": {"BLOCK": 256, "BIAS": False, "OTHER": 1}}, "constants BLOCK, BIAS, OTHER"),
        ({"constants": {"BLOCK": torch.float16, "BIAS": False}}, "BLOCK .* is torch.float16; expected a number"),
        ({"args": (HALF, HALF, None, HALF, True, 16, 1.0)}, "was given True; expected a tensor, an int"),
    ],
)
def test_launches_that_cannot_be_compiled_are_refused(change, says):
    with pytest.raises(TpvcError, match=says):
        variant_of(replace(scaled_sum(), **change))


@pytest.fixture(scope="module")
def built():
    """Two keys for three targets: a tile in three sizes, of which the largest needs 144 KB and spills."""
    said = []
    tiles = [variant_of(product(*tile)) for tile in ((16, 32), (16, 64), (128, 256, 64))]
    made = build(
        {"sum": [variant_of(scaled_sum())], "product": tiles},
        parse("cuda:80,cuda:90,hip:gfx942"),
        keep=2,
        progress=lambda *event: said.append(event),
        workers=2,
    )
    return made, said


def test_each_target_gets_its_binaries_and_cuda_brings_ptx(built):
    made, said = built
    kept = {(k.binary.symbol, k.binary.target.name): k for k in made.kept}
    assert {target for _, target in kept} == {"cuda:80", "cuda:90", "hip:gfx942", "ptx:80"}
    assert len(made.kept) == 4 * 3  # a sum and two tiles each
    heads = {"cubin": b"\x7fELF", "hsaco": b"\x7fELF", "ptx": b"//"}
    assert all(k.binary.code.startswith(heads[k.binary.target.form]) for k in made.kept)
    assert [said[0][:3], said[-1][:3]] == [("compile kernels", 0, 16), ("compile kernels", 16, 16)]


def test_parameters_are_passed_as_declared_without_constants_then_two_scratch_pointers(built):
    text = next(k.binary.code for k in built[0].kept if k.binary.target == PTX and k.binary.symbol == "scaled_sum")
    entry = re.search(r"\.entry scaled_sum\((.*?)\)", text.decode(), re.DOTALL).group(1)
    types = re.findall(r"\.param \.(\w+)", entry)
    assert types == ["u64", "u64", "u64", "u32", "u32", "f32", "u64", "u64"]  # without bias
    assert ".reqntid 128" in text.decode()


def test_resources_are_read(built):
    for kept in built[0].kept:
        binary, took = kept.binary, kept.binary.resources
        assert took.registers > 0 and took.instructions > 20 and took.spills == took.stack == took.local == 0
        assert binary.threads == 4 * binary.target.warp
        assert binary.scratch == (0, 1, 0) and binary.ordinary
        if binary.symbol == "product":
            assert took.products == 1 and took.tensor > 0 and binary.shared > 0
        else:
            assert took.products == took.tensor == binary.shared == 0


def test_what_is_too_large_is_rejected_with_the_reason(built):
    reasons = {(r.variant.constants[0], r.target.name): r.reason for r in built[0].rejected}
    assert reasons.keys() == {(("BLOCK_K", 64), t) for t in ("cuda:80", "cuda:90", "hip:gfx942", "ptx:80")}
    assert re.match(r"it spills \d+ bytes a thread", reasons[("BLOCK_K", 64), "cuda:90"])
    assert re.match(
        r"it needs 98304 bytes of shared memory and a block has 65536", reasons[("BLOCK_K", 64), "hip:gfx942"]
    )


def test_a_key_without_a_candidate_is_an_error(built, monkeypatch):
    monkeypatch.setattr(aot, "compile_all", lambda jobs, *_: ["it is wrong"] * len(jobs))
    with pytest.raises(
        TpvcError, match=r"no candidate for 'sum' can run on cuda:90 .* of 1, the first because it is wr"
    ):
        build({"sum": [variant_of(scaled_sum())]}, parse("cuda:90"))


def test_a_candidate_of_two_launches_is_kept_or_rejected_whole(built, monkeypatch):
    """The second launch of the first way is rejected; two other ways share theirs."""
    base = next(k.binary for k in built[0].kept if k.binary.target.name == "cuda:80")
    one, two, three, four, five = (replace(base.variant, stages=n) for n in range(1, 6))
    took = {1: 10, 2: 10, 3: 30, 4: 20, 5: 10}

    def compiled(jobs, *_):
        return [
            "it is wrong"
            if v == two
            else replace(base, variant=v, target=t, resources=replace(base.resources, instructions=took[v.stages]))
            for v, t in jobs
        ]

    monkeypatch.setattr(aot, "compile_all", compiled)
    made = build({"key": [(one, two), (three, five), (four, five), (four, five)]}, parse("hip:gfx942"))
    places = {k.binary.variant.stages: dict(k.ranks) for k in made.kept}
    assert places == {4: {"key": (0,)}, 3: {"key": (1,)}, 5: {"key": (0, 1)}}
    assert [(r.variant, r.reason) for r in made.rejected] == [(two, "it is wrong")]


@pytest.mark.parametrize(
    ("change", "took", "says"),
    [
        ({}, {}, None),
        ({"shared": 232_449}, {}, "it needs 232449 bytes of shared memory and a block has 232448"),
        ({"warps": 64}, {"registers": 16}, "it needs 2048 threads and a block has 1024"),
        ({"warps": 32}, {"registers": 65}, "it needs 73728 registers for 1024 threads and a block has 65536"),
        ({}, {"spills": 4, "stack": 4}, "it spills 4 bytes a thread to memory"),
        ({}, {"stack": 8}, None),
        ({}, {"stack": 40}, "it keeps 40 bytes a thread in memory, and 32 are let pass"),
        ({}, {"tensor_memory": 1024}, "it needs 1024 columns of tensor memory and there are 512"),
        ({"ordinary": False}, {}, "it needs a cluster"),
    ],
)
def test_gates(built, change, took, says):
    binary = next(k.binary for k in built[0].kept if k.binary.target.name == "cuda:90")
    changed = replace(binary, **change, resources=replace(binary.resources, **took))
    reason = gate(changed, binary.target)
    assert reason is None if says is None else reason.startswith(says)


def test_blocks_and_ranks(built):
    base = next(k.binary for k in built[0].kept if k.binary.target.name == "cuda:80" and k.binary.symbol == "product")
    plain = replace(base, warps=4, shared=1024, resources=aot.Resources(64, 0, 0, 0, 0, 500, 1, 8, 4))

    def with_(shared=1024, warps=4, **took):
        return replace(plain, shared=shared, warps=warps, resources=replace(plain.resources, **took))

    a100 = named("cuda:80")
    assert aot.blocks(plain, a100) == 8  # 64 registers x 32 = 2048 a warp, 8 warps in each part of 16,384
    assert aot.blocks(with_(registers=65), a100) == 7  # 72 x 32: 7 warps in each part
    assert aot.blocks(with_(shared=80 * 1024), a100) == 2  # with 1 KB reserved
    assert aot.blocks(with_(registers=16, warps=1), a100) == 32
    assert aot.blocks(with_(registers=16, warps=16), a100) == 4
    order = [with_(instructions=400), plain, with_(shared=40 * 1024), with_(stack=8), with_(tensor=0)]
    assert rank([(b,) for b in order[::-1]], 5) == [(b,) for b in order]
    assert rank([(plain,), (with_(registers=60),)], 1) == [(plain,)]  # no more blocks: the first that was given


def test_binaries_depend_on_no_place_process_or_cache(built, tmp_path):
    """Another folder of kernels, another process, another hash seed and a shell that asks for other options."""
    other = tmp_path / "other kernels"
    other.mkdir()
    shutil.copy(HERE / "tiny_kernels.py", other)
    script = tmp_path / "again.py"
    script.write_text(
        "import sys, tpvc.kernels; from pathlib import Path\n"
        "tpvc.kernels.__path__.append(sys.argv[1]); sys.path.append(sys.argv[2])\n"
        "from test_aot import product, scaled_sum\n"
        "from tpvc.kernels import aot, package, targets\n"
        "made = {'sum': [aot.variant_of(scaled_sum())], 'product': [aot.variant_of(product(16, 32))]}\n"
        "built = aot.build(made, targets.parse('cuda:80,cuda:90,hip:gfx942'), workers=2)\n"
        "package.write(Path(sys.argv[3]), built.kept)\n"
    )
    shell = {"PYTHONHASHSEED": "7", "DISABLE_PTXAS_OPT": "1", "TRITON_DEFAULT_FP_FUSION": "0", "TRITON_INTERPRET": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in shell.items():
            patch.setenv(name, value)
        command = [sys.executable, str(script), str(other), str(HERE), str(tmp_path / "second")]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    same = [
        k for k in built[0].kept if k.binary.symbol == "scaled_sum" or dict(k.binary.variant.constants)["BLOCK_N"] == 32
    ]
    first = {k.binary.code for k in same}
    second = {p.read_bytes() for p in (tmp_path / "second").iterdir() if p.suffix != ".json"}
    assert len(first) == 8 and first == second
    write(
        tmp_path / "first",
        [replace(k, ranks=((k.binary.symbol.split("_")[-1], (0,)),)) for k in same],
    )
    files = {p.name: p.read_bytes() for p in (tmp_path / "first").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "second").iterdir()}
    for place in (HERE, tmp_path, sys.prefix, tempfile.gettempdir(), Path.home(), "site-packages", "tiny_kernels.py"):
        assert not [name for name, text in files.items() if f"{place}".encode() in text and str(place) != "/"]


def test_a_kernel_that_does_not_compile_or_ends_its_compiler_is_one_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(tpvc.kernels, "__path__", [*tpvc.kernels.__path__, str(tmp_path)])
    (tmp_path / "deadly.py").write_text(
        "import os, sys\nprint('error: it dies', file=sys.stderr, flush=True)\nos._exit(9)\n"
    )
    sound = variant_of(scaled_sum())
    wrong = replace(sound, params=(*sound.params[:-1], ("scale", "*fp16")), divisible=())
    dead = Variant("deadly:kernel", (), (), 4, 2, ())
    target = named("cuda:80")
    first, second, third = compile_all([(dead, target), (wrong, target), (sound, target)], workers=1)
    assert first == "the compiler ended (9): error: it dies"
    assert second.startswith("CompilationError: ")
    assert third.symbol == "scaled_sum"

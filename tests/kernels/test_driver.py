"""The launcher, on drivers that write down what they are asked: `tests/fake_driver.c`, in place of libcuda and HIP."""

import ctypes
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.kernels import driver
from tpvc.kernels.aot import Binary, Kept, Resources, Variant, variant_of
from tpvc.kernels.launch import Launch
from tpvc.kernels.package import read, write
from tpvc.kernels.targets import named


@pytest.fixture
def log(tmp_path, monkeypatch):
    """What was called since it was last asked, without the calls that make a GPU current."""
    path = tmp_path / "calls"
    path.touch()
    monkeypatch.setenv("FAKE_LOG", str(path))

    def calls(everything=False) -> list[str]:
        lines = path.read_text().splitlines()
        path.write_text("")
        return [line for line in lines if everything or not line.startswith(("cuCtxSetCurrent", "hipSetDevice"))]

    return calls


@pytest.fixture
def gpu(fake_drivers, log):
    made = driver.open_device(driver.open_api("cuda", fake_drivers["cuda"]))
    log()
    return made


# Kernels whose code is the sizes of their parameters.

KINDS = {"i32": 4, "i64": 8, "fp32": 4}
PARAMS = (("x", "*fp16"), ("bias", "none"), ("out", "*fp32"), ("n_rows", "i32"), ("width", "i32"), ("scale", "fp32"))
VARIANT = Variant("tiny:kernel", PARAMS, (("BIAS", False), ("BLOCK", 64)), 8, 2, ("x", "width"))


def kept(target="cuda:90", variant=VARIANT, shared=49_152, scratch=0, rank=0, note="") -> Kept:
    sizes = [KINDS.get(kind, 8) for _, kind in variant.params if kind != "none"]
    code = f"{','.join(map(str, [*sizes, 8, 8]))} {target} {note}".encode()
    took = Resources(32, 0, 0, 0, 0, 100, 0, 0, 0)
    made = Binary(
        variant, named(target), code, "kernel", variant.warps, shared, (scratch, 128, 0), True, took, "3.7.1", "ab"
    )
    return Kept(made, (("key", (rank,)),))


def packaged(folder: Path, *all_kept: Kept):
    write(folder / "kernels", all_kept)
    return read(folder / "kernels")


@dataclass(frozen=True)
class FromTorch:
    """What the launcher sees of a tensor of torch's CUDA."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


X, OUT = FromTorch(torch.float16, 0x7F0000001000), FromTorch(torch.float32, 0x7F0000002004)


def launch(
    x=X, out=OUT, rows=3, width=64, scale=0.5, bias=None, grid=(7, 2, 1), warps=8, stages=2, **constants
) -> Launch:
    args = (x, bias, out, rows, width, scale)
    return Launch("tiny:kernel", grid, args, {"BLOCK": 64, "BIAS": False} | constants, warps, stages)


def arguments(*values) -> str:
    return "arguments " + " ".join(v.hex() for v in values)


GIVEN = (struct.pack("<Q", X.address), struct.pack("<Q", OUT.address), *(struct.pack("<i", n) for n in (3, 64)))
NONE = struct.pack("<Q", 0)


def test_a_launch_reaches_cuda(gpu, log, tmp_path):
    run = driver.launcher(packaged(tmp_path, kept()), gpu, stream=lambda: 0x77)
    run(launch())
    assert log(everything=True) == [
        "cuCtxSetCurrent 0xc0",
        "cuModuleLoadData 8,8,4,4,4,8,8 cuda:90 ",
        "cuCtxSetCurrent 0xc0",
        "cuModuleGetFunction kernel",
        "cuCtxSetCurrent 0xc0",
        "cuLaunchKernel 7,2,1 256,1,1 49152 0x77 1",
        arguments(*GIVEN, struct.pack("<f", 0.5), NONE, NONE),
    ]
    run(launch(rows=-5, grid=(1, 1, 1)))
    assert log() == [
        "cuLaunchKernel 1,1,1 256,1,1 49152 0x77 1",
        arguments(*GIVEN[:2], struct.pack("<i", -5), GIVEN[3], struct.pack("<f", 0.5), NONE, NONE),
    ]
    run(launch(grid=(0, 1, 1)))
    assert log() == []


def test_a_launch_reaches_hip(fake_drivers, log, tmp_path):
    device = driver.open_device(driver.open_api("hip", fake_drivers["hip"]), 1)
    assert (device.arch, device.name, device.shared, device.processors) == ("gfx942", "Fake GPU", 65_536, 132)
    log()
    driver.launcher(packaged(tmp_path, kept("hip:gfx942"), kept()), device)(launch())
    assert log(everything=True) == [
        "hipSetDevice 1",
        "hipModuleLoadData 8,8,4,4,4,8,8 hip:gfx942 ",
        "hipSetDevice 1",
        "hipModuleGetFunction kernel",
        "hipSetDevice 1",
        "hipModuleLaunchKernel 7,2,1 512,1,1 49152 (nil) 1",
        arguments(*GIVEN, struct.pack("<f", 0.5), NONE, NONE),
    ]


def test_more_than_48_kb_of_shared_memory_are_asked_for(gpu, log, tmp_path):
    driver.launcher(packaged(tmp_path, kept(shared=49_153)), gpu)(launch())
    assert "cuFuncSetAttribute 8 49153" in log()


def test_long_ints_are_passed_whole(gpu, log, tmp_path):
    long = replace(VARIANT, params=tuple((n, "i64" if n == "width" else k) for n, k in PARAMS))
    run = driver.launcher(packaged(tmp_path, kept(variant=long)), gpu)
    for width in (2**33, 64):
        run(launch(width=width))
        assert log()[-1].split()[4] == struct.pack("<q", width).hex()


def test_code_lives_as_long_as_its_kernel(fake_drivers, tmp_path, monkeypatch):
    gone = []

    class Code(bytes):
        def __del__(self):
            gone.append(1)

    package = packaged(tmp_path, kept("hip:gfx942"))
    monkeypatch.setattr(type(package), "code", lambda self, entry: Code((self.folder / entry.file).read_bytes()))
    run = driver.launcher(package, driver.open_device(driver.open_api("hip", fake_drivers["hip"])))
    run(launch())
    assert not gone
    del run
    assert gone


def test_scratch_memory_is_made_once_and_grows(gpu, log, tmp_path):
    run = driver.launcher(packaged(tmp_path, kept(scratch=100)), gpu)
    run(launch(grid=(2, 3, 1)))
    calls = log()
    assert "cuMemAlloc_v2 728" in calls
    address = int.from_bytes(bytes.fromhex(calls[-1].split()[-2]), "little")
    assert address and address % 128 == 0
    run(launch(grid=(6, 1, 1)))
    assert not [c for c in log() if c.startswith("cuMemAlloc")]
    run(launch(grid=(7, 1, 1)))
    assert "cuMemAlloc_v2 828" in log()


def test_which_binary_is_taken(gpu, log, tmp_path, monkeypatch):
    free = replace(VARIANT, divisible=())
    package = packaged(
        tmp_path,
        kept(variant=replace(VARIANT, stages=3), rank=0, note="best"),
        kept(rank=1, note="second"),
        kept(variant=free, rank=2, note="free"),
        kept(variant=replace(VARIANT, constants=(("BIAS", False), ("BLOCK", 128))), note="wide"),
        kept("cuda:80", shared=150_000, note="large"),
        kept("ptx:80", note="text"),
    )

    def taken(device, asked: Launch) -> str:
        log()
        driver.launcher(package, device)(asked)
        return next(c for c in log() if c.startswith("cuModuleLoadData")).split()[-1]

    assert taken(gpu, launch()) == "second"  # as the launch has it
    assert taken(gpu, launch(warps=1)) == "best"  # none has: the best ranked
    assert taken(gpu, launch(width=65)) == "free"  # others promise that 16 divides it
    assert taken(gpu, launch(BLOCK=128, stages=9)) == "wide"
    monkeypatch.setenv("FAKE_CC", "86")
    monkeypatch.setenv("FAKE_SHARED", "101376")
    assert taken(driver.open_device(gpu.api), launch()) == "text"  # the binary for 8.0 needs more than 8.6 has


def test_broken_promises_are_refused_by_name(gpu, log, tmp_path):
    run = driver.launcher(packaged(tmp_path, kept()), gpu)
    with pytest.raises(TpvcError, match=r"'width' of kernel 'tiny:kernel' is 65, which 16 does not divide"):
        run(launch(width=65))
    with pytest.raises(TpvcError, match=r"'x' of kernel 'tiny:kernel' is 139637976731650, which 16"):
        run(launch(x=replace(X, address=X.address + 2)))
    assert log() == []


def test_what_was_not_compiled_is_refused(gpu, log, tmp_path):
    run = driver.launcher(packaged(tmp_path, kept()), gpu)
    with pytest.raises(TpvcError, match=r"with BIAS=False, BLOCK=32 is in .* \(cuda:90\), and 1 with other const"):
        run(launch(BLOCK=32))
    with pytest.raises(TpvcError, match=r"takes x \*fp16, bias none, .* and was given \*fp16, \*fp16, \*fp32, i32"):
        run(launch(bias=X))
    with pytest.raises(TpvcError, match=r"and was given \*bf16"):
        run(launch(x=replace(X, dtype=torch.bfloat16)))
    with pytest.raises(TpvcError, match=r"'x' of kernel 'tiny:kernel' lies on 'cpu'; expected the GPU's memory"):
        run(launch(x=torch.zeros(64, dtype=torch.float16)))
    assert not [c for c in log() if c.startswith("cuLaunchKernel")]
    with pytest.raises(TpvcError, match=r"are for hip:gfx942 and this device is cuda:90; build the package with this"):
        driver.launcher(packaged(tmp_path / "amd", kept("hip:gfx942")), gpu)


def test_variants_of_launches_and_the_launcher_agree(gpu, log, tmp_path, monkeypatch):
    """What `variant_of` says of a launch is what the launcher looks for."""
    import tpvc.kernels

    monkeypatch.setattr(tpvc.kernels, "__path__", [*tpvc.kernels.__path__, str(Path(__file__).parent)])
    half = replace(X, dtype=torch.float16)
    args = (half, half, None, half, 2, 256, 0.25)
    asked = Launch("tiny_kernels:scaled_sum", (2, 1, 1), args, {"BLOCK": 256, "BIAS": False}, 4, 2)
    driver.launcher(packaged(tmp_path, kept(variant=variant_of(asked))), gpu)(asked)
    pointer, null = struct.pack("<Q", X.address), NONE
    values = struct.pack("<i", 2), struct.pack("<i", 256), struct.pack("<f", 0.25)
    assert log()[-1] == arguments(pointer, pointer, pointer, *values, null, null)


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_memory_streams_events_and_graphs(fake_drivers, log, backend):
    device = driver.open_device(driver.open_api(backend, fake_drivers[backend]))
    log()
    numbers = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    memory = device.upload(numbers.T)
    assert (memory.size, memory.dtype) == (96, torch.float32)
    assert device.read(memory, torch.empty(6, 4)).equal(numbers.T)
    other = device.alloc(30, torch.float32)
    device.fill(other, 0)
    device.copy(other, memory.part(4, 8))
    assert device.read(other, torch.empty(12)).tolist() == [*numbers.T.flatten()[4:12].tolist(), 0, 0, 0, 0]
    assert device.memory() == (5, 8)
    with pytest.raises(ValueError):
        memory.part(20, 5)
    with pytest.raises(ValueError):
        device.write(memory, torch.zeros(25))
    stream, start, end = device.stream(), device.event(), device.event()
    device.record(start, stream)
    device.record(end, stream)
    assert device.elapsed(start, end) == 1.5
    log()
    device.begin_capture(stream)
    device.fill(other.part(0, 2), 7, stream)
    graph = device.end_capture(stream)
    device.replay(graph, stream)
    device.end_graph(graph)
    names = [call.split()[0].removeprefix("cu").removeprefix("hip").split("_")[0] for call in log()]
    assert names == [
        *("StreamBeginCapture", "MemsetD8Async", "StreamEndCapture", "GraphInstantiateWithFlags", "GraphDestroy"),
        *("GraphLaunch", "GraphExecDestroy"),
    ]
    for event in (start, end):
        device.end_event(event)
    device.end_stream(stream)
    device.free(memory)
    device.free(other)
    assert [call for call in log() if "Free" in call] == [("hipFree 1" if backend == "hip" else "cuMemFree_v2 1")] * 2
    device.close()


FAILURES = [
    (
        "cuMemAlloc_v2=2",
        "allocating 64 bytes on Fake GPU failed with CUDA_ERROR_OUT_OF_MEMORY: the GPU is out of memory; ",
    ),
    (
        "cuModuleLoadData=209",
        "loading kernel 'kernel' .* with CUDA_ERROR_NO_BINARY_FOR_GPU: the binary is for another GPU; ",
    ),
    ("cuModuleGetFunction=500", "finding kernel 'kernel' .* with CUDA_ERROR_NOT_FOUND: the name was not found; build"),
    ("cuFuncSetAttribute=1", "allowing kernel 'kernel' 50000 bytes of shared memory .* with error 1: "),
    (
        "cuLaunchKernel=701",
        r"launching kernel 'tiny:kernel' on a grid of \(7, 2, 1\) .* error 701: the kernel needs more",
    ),
    ("cuStreamSynchronize=700", "waiting for work on Fake GPU failed with error 700: a kernel read or wrote memory"),
    ("cuStreamBeginCapture_v2=900", "beginning to capture a graph .*: this cannot be captured into a graph; "),
]


@pytest.mark.parametrize(("fail", "says"), FAILURES)
def test_errors_of_the_driver_are_one_sentence(gpu, log, tmp_path, monkeypatch, fail, says):
    monkeypatch.setenv("FAKE_FAIL", fail)
    with pytest.raises(TpvcError, match=says) as raised:
        gpu.alloc(64)
        driver.launcher(packaged(tmp_path, kept(shared=50_000)), gpu)(launch())
        gpu.synchronise()
        gpu.begin_capture(0)
    assert "\n" not in str(raised.value)


def test_errors_of_hip_have_its_names(fake_drivers, log, monkeypatch):
    device = driver.open_device(driver.open_api("hip", fake_drivers["hip"]))
    monkeypatch.setenv("FAKE_FAIL", "hipMalloc=2")
    with pytest.raises(TpvcError, match=r"failed with hipErrorOutOfMemory: the GPU is out of memory"):
        device.alloc(64)


def test_drivers_that_cannot_be_used(fake_drivers, log, monkeypatch):
    with pytest.raises(
        TpvcError, match=r"no CUDA driver was found \(tried nowhere.so\); install it, or run without a GPU"
    ):
        driver.open_api("cuda", "nowhere.so")
    with pytest.raises(TpvcError, match=r"the CUDA driver is too old: it has no cuGraphInstantiateWithFlags; update"):
        driver.open_api("cuda", fake_drivers["old"])
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_VERSION", "11040")
        with pytest.raises(TpvcError, match=r"it supports CUDA 11.4 and tpvc needs 12.0; update it"):
            driver.open_api("cuda", fake_drivers["cuda"])
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_FAIL", "cuInit=100")
        with pytest.raises(
            TpvcError, match=r"starting the CUDA driver failed with CUDA_ERROR_NO_DEVICE: no GPU was found"
        ):
            driver.open_api("cuda", fake_drivers["cuda"])
    with pytest.raises(TpvcError, match=r"there is no GPU 2: the CUDA driver has 2; choose another number"):
        driver.open_device(driver.open_api("cuda", fake_drivers["cuda"]), 2)
    monkeypatch.setenv("FAKE_ARCH", "unknown")
    with pytest.raises(TpvcError, match=r"GPU 0 does not say what it is; expected a name like gfx942"):
        driver.open_device(driver.open_api("hip", fake_drivers["hip"]))


def test_the_fake_has_every_call(fake_drivers):
    for backend in ("cuda", "hip"):
        library = ctypes.CDLL(fake_drivers[backend])
        for cuda, hip, _ in driver.CALLS.values():
            name = hip if backend == "hip" else cuda
            assert not name or hasattr(library, name)

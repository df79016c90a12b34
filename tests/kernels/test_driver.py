"""The launcher, on drivers that write down what they are asked: small C libraries that stand in for libcuda and HIP."""

import ctypes
import os
import shutil
import struct
import subprocess
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

# Every call is a line of $FAKE_LOG: its name, then its arguments. FAKE_FAIL="cuMemAlloc_v2=2" makes a call fail. A
# "binary" of these tests is the sizes of its parameters, so that the fake can write down the bytes it is given.
FAKE = r"""
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef HIP
#define NAME(cuda, hip) hip
#else
#define NAME(cuda, hip) cuda
#endif
#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define CALL(cuda, hip, parameters, ...) \
  int NAME(cuda, hip) parameters { int bad = note(STRING(NAME(cuda, hip)), __VA_ARGS__); if (bad) return bad;

static int note(const char *name, const char *format, ...) {
  FILE *log = fopen(getenv("FAKE_LOG"), "a");
  fprintf(log, "%s", name);
  va_list values;
  va_start(values, format);
  if (*format) fputc(' ', log);
  vfprintf(log, format, values);
  va_end(values);
  fputc('\n', log);
  fclose(log);
  const char *fail = getenv("FAKE_FAIL");
  size_t length = strlen(name);
  return fail && !strncmp(fail, name, length) && fail[length] == '=' ? atoi(fail + length + 1) : 0;
}
static int number(const char *name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }
static uintptr_t handle = 0x1000;
typedef void *H;
typedef uint64_t P;

CALL(cuInit, hipInit, (unsigned f), "%u", f) return 0; }
CALL(cuDriverGetVersion, hipDriverGetVersion, (int *v), "")
  *v = number("FAKE_VERSION", NAME(12080, 60342134)); return 0; }
CALL(cuDeviceGetCount, hipGetDeviceCount, (int *n), "") *n = number("FAKE_COUNT", 2); return 0; }
CALL(cuDeviceGet, hipDeviceGet, (int *d, int i), "%d", i) *d = i; return 0; }
CALL(cuDeviceGetName, hipDeviceGetName, (char *s, int n, int d), "%d %d", n, d) strcpy(s, "Fake GPU"); return 0; }
CALL(cuDeviceGetAttribute, hipDeviceGetAttribute, (int *v, int which, int d), "%d %d", which, d)
  int cc = number("FAKE_CC", 90);
  switch (which) {
    case 75: *v = cc / 10; return 0;
    case 76: *v = cc % 10; return 0;
    case 97: *v = number("FAKE_SHARED", 232448); return 0;
    case 74: *v = 65536; return 0;
    default: *v = 132; return 0; } }
CALL(cuModuleLoadData, hipModuleLoadData, (H *m, const char *code), "%s", code) *m = strdup(code); return 0; }
CALL(cuModuleGetFunction, hipModuleGetFunction, (H *f, H m, const char *name), "%s", name) *f = m; return 0; }
CALL(cuMemGetInfo_v2, hipMemGetInfo, (size_t *free, size_t *all), "") *free = 5; *all = 8; return 0; }
CALL(cuMemAlloc_v2, hipMalloc, (P *p, size_t n), "%zu", n)
  *p = (P)aligned_alloc(256, (n + 255) / 256 * 256); return 0; }
CALL(cuMemFree_v2, hipFree, (P p), "%d", p % 256 == 0) free((H)p); return 0; }
CALL(cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync, (P d, H s, size_t n, H q), "%zu %p", n, q)
  memcpy((H)d, s, n); return 0; }
CALL(cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync, (H d, P s, size_t n, H q), "%zu %p", n, q)
  memcpy(d, (H)s, n); return 0; }
CALL(cuMemcpyDtoDAsync_v2, hipMemcpyDtoDAsync, (P d, P s, size_t n, H q), "%zu %p", n, q)
  memcpy((H)d, (H)s, n); return 0; }
CALL(cuMemsetD8Async, hipMemsetD8Async, (P d, unsigned char b, size_t n, H q), "%u %zu %p", b, n, q)
  memset((H)d, b, n); return 0; }
CALL(cuStreamCreate, hipStreamCreateWithFlags, (H *q, unsigned f), "%u", f) *q = (H)(handle += 16); return 0; }
CALL(cuStreamDestroy_v2, hipStreamDestroy, (H q), "%p", q) return 0; }
CALL(cuStreamSynchronize, hipStreamSynchronize, (H q), "%p", q) return 0; }
CALL(cuEventCreate, hipEventCreateWithFlags, (H *e, unsigned f), "%u", f) *e = (H)(handle += 16); return 0; }
CALL(cuEventDestroy_v2, hipEventDestroy, (H e), "%p", e) return 0; }
CALL(cuEventRecord, hipEventRecord, (H e, H q), "%p %p", e, q) return 0; }
CALL(cuEventSynchronize, hipEventSynchronize, (H e), "%p", e) return 0; }
CALL(cuEventElapsedTime, hipEventElapsedTime, (float *t, H a, H b), "%p %p", a, b) *t = 1.5; return 0; }
CALL(cuStreamBeginCapture_v2, hipStreamBeginCapture, (H q, int mode), "%p %d", q, mode) return 0; }
CALL(cuStreamEndCapture, hipStreamEndCapture, (H q, H *g), "%p", q) *g = (H)(handle += 16); return 0; }
#ifndef OLD
CALL(cuGraphInstantiateWithFlags, hipGraphInstantiateWithFlags, (H *x, H g, uint64_t f), "%p %d", g, (int)f)
  *x = (H)(handle += 16); return 0; }
#endif
CALL(cuGraphDestroy, hipGraphDestroy, (H g), "%p", g) return 0; }
CALL(cuGraphExecDestroy, hipGraphExecDestroy, (H x), "%p", x) return 0; }
CALL(cuGraphLaunch, hipGraphLaunch, (H x, H q), "%p %p", x, q) return 0; }

CALL(cuLaunchKernel, hipModuleLaunchKernel,
     (H f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared, H q, H *args,
      H extra),
     "%u,%u,%u %u,%u,%u %u %p %d", x, y, z, bx, by, bz, shared, q, extra == NULL)
  FILE *log = fopen(getenv("FAKE_LOG"), "a");
  fprintf(log, "arguments");
  char sizes[256], *rest = NULL;
  strncpy(sizes, f, 255);
  sizes[255] = 0;
  for (char *size = strtok_r(sizes, " ,", &rest); size && atoi(size); size = strtok_r(NULL, " ,", &rest)) {
    fputc(' ', log);
    for (int i = 0; i < atoi(size); i++) fprintf(log, "%02x", ((unsigned char *)*args)[i]);
    args++;
  }
  fputc('\n', log);
  fclose(log);
  return 0; }

#ifdef HIP
int hipSetDevice(int n) { return note("hipSetDevice", "%d", n); }
int hipGetDevicePropertiesR0600(char *p, int n) {
  strcpy(p, "AMD gfx000 card");
  strcpy(p + 1160, getenv("FAKE_ARCH") ? getenv("FAKE_ARCH") : "gfx942:sramecc+:xnack-");
  return note("hipGetDevicePropertiesR0600", "%d", n); }
const char *hipGetErrorName(int code) { return code == 2 ? "hipErrorOutOfMemory" : NULL; }
#else
int cuDevicePrimaryCtxRetain(H *c, int d) { *c = (H)0xc0; return note("cuDevicePrimaryCtxRetain", "%d", d); }
int cuDevicePrimaryCtxRelease_v2(int d) { return note("cuDevicePrimaryCtxRelease_v2", "%d", d); }
int cuCtxSetCurrent(H c) { return note("cuCtxSetCurrent", "%p", c); }
int cuFuncSetAttribute(H f, int which, int value) { return note("cuFuncSetAttribute", "%d %d", which, value); }
int cuGetErrorName(int code, const char **name) {
  *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 100 ? "CUDA_ERROR_NO_DEVICE" : code == 209 ?
    "CUDA_ERROR_NO_BINARY_FOR_GPU" : code == 500 ? "CUDA_ERROR_NOT_FOUND" : NULL;
  return *name ? 0 : 1; }
#endif
"""

COMPILER = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
pytestmark = pytest.mark.skipif(
    COMPILER is None or os.name == "nt", reason="no C compiler to make the fake drivers with"
)


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drivers")
    (folder / "fake.c").write_text(FAKE)
    for name, flags in {"cuda": (), "hip": ("-DHIP",), "old": ("-DOLD",)}.items():
        command = [COMPILER, "-shared", "-fPIC", "-w", *flags, "-o", f"{folder / name}.so", f"{folder / 'fake.c'}"]
        subprocess.run(command, check=True)
    return {name: f"{folder / name}.so" for name in ("cuda", "hip", "old")}


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
def gpu(fakes, log):
    made = driver.open_device(driver.open_api("cuda", fakes["cuda"]))
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


def test_a_launch_reaches_hip(fakes, log, tmp_path):
    device = driver.open_device(driver.open_api("hip", fakes["hip"]), 1)
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
def test_memory_streams_events_and_graphs(fakes, log, backend):
    device = driver.open_device(driver.open_api(backend, fakes[backend]))
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


def test_errors_of_hip_have_its_names(fakes, log, monkeypatch):
    device = driver.open_device(driver.open_api("hip", fakes["hip"]))
    monkeypatch.setenv("FAKE_FAIL", "hipMalloc=2")
    with pytest.raises(TpvcError, match=r"failed with hipErrorOutOfMemory: the GPU is out of memory"):
        device.alloc(64)


def test_drivers_that_cannot_be_used(fakes, log, monkeypatch):
    with pytest.raises(
        TpvcError, match=r"no CUDA driver was found \(tried nowhere.so\); install it, or run without a GPU"
    ):
        driver.open_api("cuda", "nowhere.so")
    with pytest.raises(TpvcError, match=r"the CUDA driver is too old: it has no cuGraphInstantiateWithFlags; update"):
        driver.open_api("cuda", fakes["old"])
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_VERSION", "11040")
        with pytest.raises(TpvcError, match=r"it supports CUDA 11.4 and tpvc needs 12.0; update it"):
            driver.open_api("cuda", fakes["cuda"])
    with monkeypatch.context() as patch:
        patch.setenv("FAKE_FAIL", "cuInit=100")
        with pytest.raises(
            TpvcError, match=r"starting the CUDA driver failed with CUDA_ERROR_NO_DEVICE: no GPU was found"
        ):
            driver.open_api("cuda", fakes["cuda"])
    with pytest.raises(TpvcError, match=r"there is no GPU 2: the CUDA driver has 2; choose another number"):
        driver.open_device(driver.open_api("cuda", fakes["cuda"]), 2)
    monkeypatch.setenv("FAKE_ARCH", "unknown")
    with pytest.raises(TpvcError, match=r"GPU 0 does not say what it is; expected a name like gfx942"):
        driver.open_device(driver.open_api("hip", fakes["hip"]))


def test_the_fake_has_every_call(fakes):
    for backend in ("cuda", "hip"):
        library = ctypes.CDLL(fakes[backend])
        for cuda, hip, _ in driver.CALLS.values():
            name = hip if backend == "hip" else cuda
            assert not name or hasattr(library, name)

"""Launching kernels through a GPU's driver: no Triton, no compiler and no CUDA or ROCm in torch.

ctypes over libcuda (its driver API) or libamdhip64 (HIP's module API), whose calls have the same parameters under other
names, and nearly the same error numbers. A `Device` is an open GPU; what it hands out (memory, streams, events, graphs)
are numbers that belong to it, and are given back by hand. Streams: 0 is the default one; with torch's CUDA in the same
process, pass `lambda: torch.cuda.current_stream().cuda_stream`."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.kernels.aot import ABSENT, type_of
from tpvc.kernels.launch import Launch, Run
from tpvc.kernels.package import Entry, Package, for_device

LIBRARIES = {
    "cuda": ("nvcuda.dll",) if os.name == "nt" else ("libcuda.so.1",),
    "hip": ("amdhip64_7.dll", "amdhip64_6.dll", "amdhip64.dll")
    if os.name == "nt"
    else ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "/opt/rocm/lib/libamdhip64.so"),
}
NAMES = {"cuda": "CUDA", "hip": "HIP"}
OLDEST = {"cuda": (12, 0), "hip": (6, 0)}
"""What a driver must support. Binaries of CUDA 12.8's ptxas run on every driver for CUDA 12 (NVIDIA's minor version
compatibility); those for Blackwell are of 13.1's and may need a driver for CUDA 13, which was not tried. HIP:
`hipGetDevicePropertiesR0600` came with ROCm 6."""

ADDRESS, HANDLE, OUT, OUT_TEXT = c_uint64, c_void_p, POINTER(c_void_p), POINTER(c_char_p)
# What is called: CUDA's name, HIP's name, parameters. Sources: CUDA 12 driver API reference; HIP 6 hip_runtime_api.h.
CALLS: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "init": ("cuInit", "hipInit", (c_uint,)),
    "version": ("cuDriverGetVersion", "hipDriverGetVersion", (POINTER(c_int),)),
    "count": ("cuDeviceGetCount", "hipGetDeviceCount", (POINTER(c_int),)),
    "get": ("cuDeviceGet", "hipDeviceGet", (POINTER(c_int), c_int)),
    "name": ("cuDeviceGetName", "hipDeviceGetName", (c_char_p, c_int, c_int)),
    "attribute": ("cuDeviceGetAttribute", "hipDeviceGetAttribute", (POINTER(c_int), c_int, c_int)),
    "properties": ("", "hipGetDevicePropertiesR0600", (c_void_p, c_int)),
    "context": ("cuDevicePrimaryCtxRetain", "", (OUT, c_int)),
    "leave": ("cuDevicePrimaryCtxRelease_v2", "", (c_int,)),
    "enter": ("cuCtxSetCurrent", "hipSetDevice", ()),  # a context, or a number
    "load": ("cuModuleLoadData", "hipModuleLoadData", (OUT, c_char_p)),
    "function": ("cuModuleGetFunction", "hipModuleGetFunction", (OUT, HANDLE, c_char_p)),
    "allow": ("cuFuncSetAttribute", "", (HANDLE, c_int, c_int)),
    "launch": ("cuLaunchKernel", "hipModuleLaunchKernel", (HANDLE, *[c_uint] * 7, HANDLE, c_void_p, c_void_p)),
    "memory": ("cuMemGetInfo_v2", "hipMemGetInfo", (POINTER(c_size_t), POINTER(c_size_t))),
    "alloc": ("cuMemAlloc_v2", "hipMalloc", (OUT, c_size_t)),
    "free": ("cuMemFree_v2", "hipFree", (ADDRESS,)),
    "write": ("cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync", (ADDRESS, c_void_p, c_size_t, HANDLE)),
    "read": ("cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync", (c_void_p, ADDRESS, c_size_t, HANDLE)),
    "copy": ("cuMemcpyDtoDAsync_v2", "hipMemcpyDtoDAsync", (ADDRESS, ADDRESS, c_size_t, HANDLE)),
    "fill": ("cuMemsetD8Async", "hipMemsetD8Async", (ADDRESS, c_ubyte, c_size_t, HANDLE)),
    "stream": ("cuStreamCreate", "hipStreamCreateWithFlags", (OUT, c_uint)),
    "end_stream": ("cuStreamDestroy_v2", "hipStreamDestroy", (HANDLE,)),
    "wait_stream": ("cuStreamSynchronize", "hipStreamSynchronize", (HANDLE,)),
    "event": ("cuEventCreate", "hipEventCreateWithFlags", (OUT, c_uint)),
    "end_event": ("cuEventDestroy_v2", "hipEventDestroy", (HANDLE,)),
    "record": ("cuEventRecord", "hipEventRecord", (HANDLE, HANDLE)),
    "wait_event": ("cuEventSynchronize", "hipEventSynchronize", (HANDLE,)),
    "elapsed": ("cuEventElapsedTime", "hipEventElapsedTime", (POINTER(c_float), HANDLE, HANDLE)),
    "begin": ("cuStreamBeginCapture_v2", "hipStreamBeginCapture", (HANDLE, c_int)),
    "end": ("cuStreamEndCapture", "hipStreamEndCapture", (HANDLE, OUT)),
    "instantiate": ("cuGraphInstantiateWithFlags", "hipGraphInstantiateWithFlags", (OUT, HANDLE, c_uint64)),
    "end_graph": ("cuGraphDestroy", "hipGraphDestroy", (HANDLE,)),
    "end_exec": ("cuGraphExecDestroy", "hipGraphExecDestroy", (HANDLE,)),
    "replay": ("cuGraphLaunch", "hipGraphLaunch", (HANDLE, HANDLE)),
}
MAJOR, MINOR = 75, 76
SHARED = {"cuda": 97, "hip": 74}
PROCESSORS = {"cuda": 16, "hip": 63}
"""Numbers of device attributes: compute capability; shared memory that one block may ask for; multiprocessors."""
DYNAMIC_SHARED, GIVEN_SHARED = 8, 48 * 1024
"""The attribute of a CUDA function that must be set to use more than this many bytes of dynamic shared memory."""
THREAD_LOCAL = 1
"""Capture mode: what other threads do meanwhile is no business of the graph."""

# What an error number means, in both; what to do.
ADVICE = {
    2: "the GPU is out of memory; close other programs, or choose a smaller model or a shorter context",
    34: "the library that was found is a stub for linking; install the NVIDIA driver",
    35: "the driver is older than its runtime; update it",
    100: "no GPU was found; check that one is there and that this user may use it",
    200: "the binary is not one for this GPU; build the package with this GPU's target",
    209: "the binary is for another GPU; build the package with this GPU's target",
    218: "the driver could not compile the PTX; build the package with this GPU's target",
    222: "the driver is too old for the PTX; update it, or build the package with this GPU's target",
    500: "the name was not found; build the package again",
    700: "a kernel read or wrote memory that is not its own; check the sizes of what it was given",
    701: "the kernel needs more than the GPU has for a block; build the package with this GPU's target",
    803: "the driver and its libraries do not match; restart the machine or install the driver again",
    900: "this cannot be captured into a graph; capture a stream made by `Device.stream`, after one run outside",
    901: "this cannot be done while a graph is captured; do it before",
}
OTHERWISE = "this GPU cannot be used on; start the program again"


@dataclass(frozen=True, eq=False)
class Api:
    """A driver's library. call("alloc", ...) calls it; `doing` begins the sentence if that fails."""

    backend: str
    library: Any

    def call(self, op: str, *args: Any, doing: str = "") -> None:
        code = getattr(self.library, _symbol(self.backend, op))(*args)
        if code:
            raise TpvcError(f"{doing or op} failed with {self.error(code)}: {ADVICE.get(code, OTHERWISE)}")

    def error(self, code: int) -> str:
        """The driver's own name of an error."""
        if self.backend == "hip":
            name = self.library.hipGetErrorName(code)
        else:
            found = c_char_p()
            self.library.cuGetErrorName(code, byref(found))
            name = found.value
        return name.decode() if name else f"error {code}"


def _symbol(backend: str, op: str) -> str:
    return CALLS[op][backend == "hip"]


def open_api(backend: str, library: str | None = None) -> Api:
    """The driver for "cuda" or "hip", from its usual places or from `library`; TpvcError if there is none to use."""
    name, tried = NAMES[backend], (library,) if library else LIBRARIES[backend]
    found = next((lib for lib in map(_library, tried) if lib is not None), None)
    if found is None:
        raise TpvcError(f"no {name} driver was found (tried {', '.join(tried)}); install it, or run without a GPU")
    errors = (
        ("hipGetErrorName", c_char_p, (c_int,)) if backend == "hip" else ("cuGetErrorName", c_int, (c_int, OUT_TEXT))
    )
    wanted = [errors, *((_symbol(backend, op), c_int, CALLS[op][2]) for op in CALLS if _symbol(backend, op))]
    for symbol, result, parameters in wanted:
        try:
            function = getattr(found, symbol)
        except AttributeError:
            raise TpvcError(f"the {name} driver is too old: it has no {symbol}; update the GPU's driver") from None
        function.restype = result
        if parameters:
            function.argtypes = parameters
    found_enter = getattr(found, _symbol(backend, "enter"))
    found_enter.argtypes = (c_int,) if backend == "hip" else (HANDLE,)
    api = Api(backend, found)
    api.call("init", 0, doing=f"starting the {name} driver")
    _check_version(api)
    return api


def present() -> str | None:
    """The backend that has a GPU on this machine, "cuda" before "hip"; None where neither has."""
    for backend in LIBRARIES:
        try:
            if count(open_api(backend)):
                return backend
        except TpvcError:
            continue
    return None


def _library(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _check_version(api: Api) -> None:
    value = c_int()
    api.call("version", byref(value), doing="asking for the driver's version")
    # CUDA: 1000 * major + 10 * minor. HIP: 10,000,000 * major + 100,000 * minor + patch.
    whole, part = (10_000_000, 100_000) if api.backend == "hip" else (1000, 10)
    version = (value.value // whole, value.value % whole // part)
    if version < OLDEST[api.backend]:
        name, oldest = NAMES[api.backend], OLDEST[api.backend]
        raise TpvcError(
            f"the GPU's driver is too old: it supports {name} {version[0]}.{version[1]} and tpvc needs "
            f"{oldest[0]}.{oldest[1]}; update it"
        )


def count(api: Api) -> int:
    """GPUs that the driver has."""
    found = c_int()
    api.call("count", byref(found), doing="counting GPUs")
    return found.value


@dataclass(frozen=True)
class Memory:
    """Part of a GPU's memory: its address, bytes, and the type of number that lies there. An argument for a kernel."""

    address: int
    size: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address

    def part(self, first: int, numbers: int) -> Memory:
        """`numbers` of them, from number `first` on. Only the whole can be freed."""
        width = self.dtype.itemsize
        if first < 0 or numbers < 0 or (first + numbers) * width > self.size:
            raise ValueError(f"numbers {first} to {first + numbers} of {self.size // width}")
        return replace(self, address=self.address + first * width, size=numbers * width)


@dataclass(frozen=True, eq=False)
class Device:
    """An open GPU. arch: 10 * major + minor of its compute capability, or AMD's name; processors: multiprocessors;
    shared: bytes of shared memory that one block may ask for; context: CUDA's primary one, which torch uses too."""

    api: Api
    handle: int
    name: str
    arch: int | str
    processors: int
    shared: int
    context: int

    @property
    def backend(self) -> str:
        return self.api.backend

    def call(self, op: str, *args: Any, doing: str = "") -> None:
        """Any of CALLS, on this GPU."""
        self.api.call("enter", self.context, doing=f"choosing {self.name}")
        self.api.call(op, *args, doing=f"{doing or op} on {self.name}")

    def close(self) -> None:
        if self.backend == "cuda":
            self.api.call("leave", self.handle, doing=f"leaving {self.name}")

    def _made(self, op: str, *args: Any, doing: str) -> int:
        made = c_void_p()
        self.call(op, byref(made), *args, doing=doing)
        return made.value or 0

    # Memory.

    def memory(self) -> tuple[int, int]:
        """(free, all) bytes."""
        free, whole = c_size_t(), c_size_t()
        self.call("memory", byref(free), byref(whole), doing="asking for memory")
        return free.value, whole.value

    def alloc(self, numbers: int, dtype: torch.dtype = torch.uint8) -> Memory:
        size = numbers * dtype.itemsize
        return Memory(self._made("alloc", max(size, 1), doing=f"allocating {size} bytes"), size, dtype)

    def free(self, memory: Memory) -> None:
        self.call("free", memory.address, doing="freeing memory")

    def upload(self, tensor: Tensor, stream: int = 0) -> Memory:
        """Memory with what a tensor in main memory holds."""
        memory = self.alloc(tensor.numel(), tensor.dtype)
        self.write(memory, tensor, stream)
        return memory

    def write(self, memory: Memory, tensor: Tensor, stream: int = 0) -> None:
        """Copy a tensor in main memory to the front of `memory`, and wait for it."""
        whole = tensor.contiguous()
        size = _fitting(memory, whole)
        self.call("write", memory.address, whole.data_ptr(), size, stream, doing=f"copying {size} bytes to")
        self.synchronise(stream)

    def read(self, memory: Memory, tensor: Tensor, stream: int = 0) -> Tensor:
        """Fill a contiguous tensor in main memory with the front of `memory`, and wait for it."""
        if not tensor.is_contiguous():
            raise ValueError("expected a contiguous tensor")
        size = _fitting(memory, tensor)
        self.call("read", tensor.data_ptr(), memory.address, size, stream, doing=f"copying {size} bytes from")
        self.synchronise(stream)
        return tensor

    def copy(self, target: Memory, source: Memory, stream: int = 0) -> None:
        """All of `source` to the front of `target`."""
        if source.size > target.size:
            raise ValueError(f"{source.size} bytes into {target.size}")
        self.call("copy", target.address, source.address, source.size, stream, doing=f"copying {source.size} bytes")

    def fill(self, memory: Memory, byte: int = 0, stream: int = 0) -> None:
        self.call("fill", memory.address, byte, memory.size, stream, doing=f"filling {memory.size} bytes")

    # Streams, and events for timing.

    def stream(self) -> int:
        return self._made("stream", 0, doing="making a stream")

    def end_stream(self, stream: int) -> None:
        self.call("end_stream", stream, doing="closing a stream")

    def synchronise(self, stream: int = 0) -> None:
        """Wait for a stream. Errors of kernels that ran there come to light here."""
        self.call("wait_stream", stream, doing="waiting for work")

    def event(self) -> int:
        return self._made("event", 0, doing="making an event")

    def end_event(self, event: int) -> None:
        self.call("end_event", event, doing="closing an event")

    def record(self, event: int, stream: int = 0) -> None:
        self.call("record", event, stream, doing="recording an event")

    def elapsed(self, start: int, end: int) -> float:
        """Milliseconds between two recorded events, the second of which is waited for."""
        passed = c_float()
        self.call("wait_event", end, doing="waiting for an event")
        self.call("elapsed", byref(passed), start, end, doing="timing")
        return passed.value

    # Graphs.

    def begin_capture(self, stream: int) -> None:
        """Record what is put on `stream` (not 0) instead of doing it. Load and allocate before: launch once outside."""
        self.call("begin", stream, THREAD_LOCAL, doing="beginning to capture a graph")

    def end_capture(self, stream: int) -> int:
        """A graph of what was put on `stream`, for `replay`."""
        graph = c_void_p()
        self.call("end", stream, byref(graph), doing="capturing a graph")
        try:
            return self._made("instantiate", graph, 0, doing="making a graph")
        finally:
            self.call("end_graph", graph, doing="closing a graph")

    def replay(self, graph: int, stream: int = 0) -> None:
        self.call("replay", graph, stream, doing="launching a graph")

    def end_graph(self, graph: int) -> None:
        self.call("end_exec", graph, doing="closing a graph")

    # Kernels.

    def load(self, code: bytes, symbol: str, shared: int = 0) -> int:
        """The function `symbol` of a binary or of PTX, allowed `shared` bytes of dynamic shared memory."""
        module = self._made("load", code, doing=f"loading kernel '{symbol}'")  # bytes end in a 0, as PTX must
        function = self._made("function", module, symbol.encode(), doing=f"finding kernel '{symbol}'")
        if self.backend == "cuda" and shared > GIVEN_SHARED:
            doing = f"allowing kernel '{symbol}' {shared} bytes of shared memory"
            self.call("allow", function, DYNAMIC_SHARED, shared, doing=doing)
        return function

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: int,
        args: list[Any],
        name: str = "",
    ) -> None:
        """`args`: ctypes values, in the order of the kernel's parameters. They are read before this returns."""
        addresses = (c_void_p * len(args))(*(ctypes.addressof(a) for a in args))
        doing = f"launching kernel '{name}' on a grid of {grid}"
        self.call("launch", function, *grid, threads, 1, 1, shared, stream, addresses, None, doing=doing)


def _fitting(memory: Memory, tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size > memory.size:
        raise ValueError(f"{size} bytes on {tensor.device} for {memory.size}; expected main memory and no more")
    return size


def open_device(api: Api, number: int = 0) -> Device:
    there = count(api)
    if not 0 <= number < there:
        raise TpvcError(f"there is no GPU {number}: the {NAMES[api.backend]} driver has {there}; choose another number")
    handle = c_int()
    api.call("get", byref(handle), number, doing=f"opening GPU {number}")
    text = ctypes.create_string_buffer(256)
    api.call("name", text, len(text), handle, doing=f"asking GPU {number} for its name")

    def attribute(which: int) -> int:
        value = c_int()
        api.call("attribute", byref(value), which, handle, doing=f"asking GPU {number} about itself")
        return value.value

    if api.backend == "hip":
        arch: int | str = _amd_arch(api, number)
        context = number
    else:
        arch = 10 * attribute(MAJOR) + attribute(MINOR)
        made = c_void_p()
        api.call("context", byref(made), handle, doing=f"opening GPU {number}")
        context = made.value or 0
    processors, shared = attribute(PROCESSORS[api.backend]), attribute(SHARED[api.backend])
    return Device(api, handle.value, text.value.decode(errors="replace"), arch, processors, shared, context)


PROPERTIES, CARD = 64 * 1024, 256
"""Bytes for hipDeviceProp_t, which has 1,472 in ROCm 6, and of the name at its front. Where the architecture's name
lies differs between versions (1,160 in ROCm 6): it is the first text after the card's that begins with "gfx"."""


def _amd_arch(api: Api, number: int) -> str:
    room = ctypes.create_string_buffer(PROPERTIES)
    api.call("properties", room, number, doing=f"asking GPU {number} about itself")
    found = re.search(rb"gfx[0-9a-f]+", room.raw[CARD:])
    if not found:
        raise TpvcError(f"GPU {number} does not say what it is; expected a name like gfx942, update its driver")
    return found.group().decode()


# What a Launch says, carried out with a package.

NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": c_float}


def launcher(package: Package, device: Device, stream: int | Callable[[], int] = 0) -> Run:
    """A Run that finds the binary of each launch in `package` and puts it on `stream`; a function is asked each time.

    A binary fits by kernel, constants and types of arguments; an int that was compiled for 64 bits may be small. Of
    those that fit, one for the best target is taken, with the launch's warps and stages before others, then with more
    promises, then better ranked. Promises are checked. Scratch memory is one piece for each binary: launches of such a
    kernel must not overlap on two streams."""
    entries = for_device(package, device.backend, device.arch)
    runnable: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        if entry.shared <= device.shared:
            runnable.setdefault((entry.kernel, _constants(entry.constants)), []).append(entry)
    chosen: dict[tuple[Any, ...], tuple[Entry, ...]] = {}
    functions: dict[tuple[str, str], tuple[int, bytes]] = {}  # HIP may go on reading the code that was loaded
    scratch: dict[str, list[Memory]] = {}

    def run(launch: Launch) -> None:
        types = tuple(map(type_of, launch.args))
        key = (launch.kernel, _constants(launch.constants), types, launch.warps, launch.stages)
        if key not in chosen:
            chosen[key] = _fits(runnable, launch, types, package, device)
        entry = _kept_promise(chosen[key], launch)
        if not all(launch.grid):
            return
        at = (entry.file, entry.symbol)
        if at not in functions:
            code = package.code(entry)
            functions[at] = device.load(code, entry.symbol, entry.shared), code
        args = [
            _packed(launch.kernel, name, kind, value)
            for (name, kind), value in zip(entry.params, launch.args, strict=True)
            if kind != ABSENT
        ]
        room = _room(device, entry, launch.grid, scratch.setdefault(entry.file, []))
        args += [c_uint64(room), c_uint64(0)]
        now = stream() if callable(stream) else stream
        device.launch(functions[at][0], launch.grid, entry.threads, entry.shared, now, args, launch.kernel)

    return run


def _constants(constants: Any) -> tuple[tuple[str, Any], ...]:
    """Of equal constants, whichever their order. A type is part of it: 1 is not True."""
    return tuple(sorted((name, type(value).__name__, value) for name, value in constants.items()))


def _fits(
    runnable: dict[tuple[Any, ...], list[Entry]],
    launch: Launch,
    types: tuple[str, ...],
    package: Package,
    device: Device,
) -> tuple[Entry, ...]:
    same = runnable.get((launch.kernel, _constants(launch.constants)), [])
    fit = [e for e in same if len(e.params) == len(types) and all(map(_takes, (k for _, k in e.params), types))]
    if fit:
        asked = (launch.warps, launch.stages)
        order = list(dict.fromkeys(e.target for e in fit))
        return tuple(sorted(fit, key=lambda e: (order.index(e.target), e.options != asked, -len(e.divisible))))
    where = f"'{package.folder}' for {device.name} ({device.backend}:{device.arch})"
    constants = ", ".join(f"{name}={value}" for name, value in sorted(launch.constants.items()))
    if same:
        have = ", ".join(f"{name} {kind}" for name, kind in same[0].params)
        raise TpvcError(
            f"kernel '{launch.kernel}' with {constants} takes {have} in {where}, and was given {', '.join(types)}; "
            "build the package again for this model"
        )
    others = sum(kernel == launch.kernel for kernel, _ in runnable)
    raise TpvcError(
        f"no binary of kernel '{launch.kernel}' with {constants} is in {where}, and {others} with other constants are; "
        "build the package again for this model"
    )


def _takes(kind: str, given: str) -> bool:
    return kind == given or (kind == "i64" and given == "i32")


def _kept_promise(entries: tuple[Entry, ...], launch: Launch) -> Entry:
    """The first of `entries` whose promises the arguments keep."""
    broken = ""
    for entry in entries:
        by_name = dict(zip((name for name, _ in entry.params), launch.args, strict=True))
        broken = next((name for name in entry.divisible if _value(by_name[name]) % 16), "")
        if not broken:
            return entry
    value = _value(by_name[broken])
    raise TpvcError(
        f"'{broken}' of kernel '{launch.kernel}' is {value}, which 16 does not divide, and the kernel was compiled for "
        "what it divides; align it, or build the package for such a value"
    )


def _value(argument: Any) -> int:
    return argument if isinstance(argument, int) else argument.data_ptr()


def _packed(kernel: str, name: str, kind: str, value: Any) -> Any:
    """An argument as the kernel takes it."""
    if not kind.startswith("*"):
        return NUMBERS[kind](value)
    if isinstance(value, Tensor) and value.device.type != "cuda":
        raise TpvcError(
            f"'{name}' of kernel '{kernel}' lies on '{value.device}'; expected the GPU's memory, copy it there first"
        )
    return c_uint64(value.data_ptr())


def _room(device: Device, entry: Entry, grid: tuple[int, int, int], scratch: list[Memory]) -> int:
    """The address of the scratch memory of a launch, the last of `scratch`; 0 where the kernel needs none. What was
    outgrown stays: a captured graph may use it."""
    each, align = entry.scratch
    if not each:
        return 0
    size = each * grid[0] * grid[1] * grid[2]
    if not scratch or scratch[-1].size < size + align:
        scratch.append(device.alloc(size + align))
    return -(-scratch[-1].address // align) * align

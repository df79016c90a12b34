"""Ahead-of-time builds: every kernel that a model needs, compiled on a machine that need not have a GPU.

A `Launch` names what is compiled (`variant_of`). Compilers are processes of their own with their own environment: the
interpreter that tests switch on does not reach them, one that crashes takes one kernel with it, and what they make
depends on the kernel, its constants and the target alone. That a kernel compiles does not mean that it can be launched,
so what it needs is read from the result and held against the target's limits (`gate`); of what is left, a static model
keeps the best (`rank`)."""

from __future__ import annotations

import base64
import errno
import hashlib
import inspect
import json
import os
import pickle
import queue
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

import tpvc.kernels
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.progress import Progress, silent
from tpvc.kernels.launch import Launch, body
from tpvc.kernels.targets import PTX, Target

if TYPE_CHECKING:
    from tpvc.compiler.store import BlockStore

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.float8_e4m3fnuz: "*fp8e4b8",
    torch.float8_e5m2fnuz: "*fp8e5b16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
    torch.uint32: "*u32",
    torch.uint64: "*u64",
    torch.bool: "*i1",
}
ABSENT = "none"
"""The type of a pointer that the kernel does not read. Triton makes it a constant None and drops the parameter."""


@dataclass(frozen=True)
class Variant:
    """What is compiled: a kernel ("module:function"), (name, type) of each parameter that is not constexpr, its
    constants by name, num_warps, num_stages, and the parameters that are promised to be divisible by 16."""

    kernel: str
    params: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    divisible: tuple[str, ...]

    def key(self) -> str:
        """The same text for the same variant; unlike ==, it tells True from 1."""
        return json.dumps([self.kernel, self.params, self.constants, self.warps, self.stages, self.divisible])


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    registers, stack, local   of a thread: registers, and bytes of its own memory
    spills   bytes (AMD: registers) a thread that go to memory for want of registers
    tensor_memory   columns of it (Blackwell)
    instructions   static, without trip counts
    products   `tl.dot` of 8- and 16-bit numbers in the source
    tensor   instructions for matrix units; none where there are products: these run on the ordinary units
    copies   asynchronous ones to shared memory
    """

    registers: int
    stack: int
    local: int
    spills: int
    tensor_memory: int
    instructions: int
    products: int
    tensor: int
    copies: int


@dataclass(frozen=True)
class Binary:
    """A variant compiled for a target. shared: bytes a block; scratch: bytes of global memory a block, its alignment,
    and bytes for profiling. ordinary: false where the launch needs a cluster, cooperation or dependent launches."""

    variant: Variant
    target: Target
    code: bytes
    symbol: str
    warps: int
    shared: int
    scratch: tuple[int, int, int]
    ordinary: bool
    resources: Resources
    triton: str
    source_sha256: str

    @property
    def threads(self) -> int:
        return self.warps * self.target.warp


@dataclass(frozen=True)
class Kept:
    """A binary and, for each key, the places of the candidates that it is part of."""

    binary: Binary
    ranks: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Rejected:
    variant: Variant
    target: Target
    reason: str


@dataclass(frozen=True)
class Built:
    kept: tuple[Kept, ...]
    rejected: tuple[Rejected, ...]


def type_of(value: Any) -> str:
    """Triton's name for the type of an argument: what has a `data_ptr` and a `dtype`, an int, a float, or None."""
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int) and not isinstance(value, bool):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if getattr(value, "dtype", None) in POINTERS:
        return POINTERS[value.dtype]
    raise TpvcError(f"a kernel was given {value!r:.60}; expected a tensor, an int, a float or None")


def variant_of(launch: Launch) -> Variant:
    """What must be compiled to carry out `launch`, and others like it.

    Promised to be divisible by 16: pointers and ints that are, save ints whose name begins with `n_`. No int is taken
    for a constant because it is 1, as Triton's JIT does."""
    function = body(launch.kernel)
    names = list(inspect.signature(getattr(function, "fn", function)).parameters)
    params = [name for name in names if name not in launch.constants]
    if len(params) != len(launch.args) or set(launch.constants) - set(names):
        given = ", ".join(launch.constants)
        raise TpvcError(
            f"kernel '{launch.kernel}' was given {len(launch.args)} arguments and the constants {given}; "
            f"its parameters are {', '.join(names)}, and each constexpr needs a constant"
        )
    for name, value in launch.constants.items():
        if not (value is None or isinstance(value, bool | int | float | str)):
            raise TpvcError(f"constant {name} of '{launch.kernel}' is {value!r:.60}; expected a number, a text or None")
    typed = tuple((name, type_of(value)) for name, value in zip(params, launch.args, strict=True))
    return Variant(
        launch.kernel,
        typed,
        tuple(sorted(launch.constants.items())),
        launch.warps,
        launch.stages,
        tuple(name for (name, kind), value in zip(typed, launch.args, strict=True) if _promised(name, kind, value)),
    )


def _promised(name: str, kind: str, value: Any) -> bool:
    if kind.startswith("*"):
        return value.data_ptr() % 16 == 0
    return kind in ("i32", "i64") and not name.startswith("n_") and value % 16 == 0


def distinct(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    return tuple({v.key(): v for v in reversed(variants)}.values())[::-1]


Candidate = Variant | tuple[Variant, ...]
"""One way of doing an operation: what it launches, the launch that does most of the work first."""


def build(
    candidates: Mapping[str, Sequence[Candidate]],
    targets: Sequence[Target],
    keep: int = 4,
    progress: Progress | None = None,
    workers: int | None = None,
    store: BlockStore | None = None,
) -> Built:
    """Compile all candidates for all targets, and keep for each target the best `keep` of each key: an operation and a
    bucket of its sizes. A candidate of several launches is kept or rejected as a whole. With any CUDA target comes PTX,
    for which a key may be left without any; TpvcError where a key is for a target that was asked for. What `store`
    holds is not compiled again."""
    asked = tuple(dict.fromkeys(targets))
    every = asked + ((PTX,) if any(t.backend == "cuda" for t in asked) else ())
    ways = {name: _ways(group) for name, group in candidates.items()}
    variants = distinct([v for group in ways.values() for way in group for v in way])
    jobs = [(v, t) for t in every for v in variants]
    results = {(v.key(), t): r for (v, t), r in zip(jobs, compile_all(jobs, progress, workers, store), strict=True)}
    reasons = {at: r if isinstance(r, str) else gate(r, at[1]) for at, r in results.items()}
    places: dict[tuple[str, Target], dict[str, list[int]]] = {}
    for target in every:
        for name, group in ways.items():
            fit = [way for way in group if all(reasons[v.key(), target] is None for v in way)]
            if not fit and target in asked:
                why = next((r for way in group for v in way if (r := reasons[v.key(), target])), "there are none")
                raise TpvcError(
                    f"no candidate for '{name}' can run on {target.name} ({target.cards}): of {len(group)}, the first "
                    f"because {why}; leave out this target or change the candidates"
                )
            for place, way in enumerate(rank([tuple(results[v.key(), target] for v in way) for way in fit], keep)):
                for binary in way:
                    places.setdefault((binary.variant.key(), target), {}).setdefault(name, []).append(place)
    kept = tuple(Kept(results[at], tuple((k, tuple(p)) for k, p in of.items())) for at, of in places.items())
    rejected = tuple(Rejected(v, t, reasons[v.key(), t]) for v, t in jobs if reasons[v.key(), t] is not None)
    return Built(kept, rejected)


def _ways(group: Sequence[Candidate]) -> tuple[tuple[Variant, ...], ...]:
    """Candidates as tuples, each once."""
    ways = [way if isinstance(way, tuple) else (way,) for way in group]
    return tuple({tuple(v.key() for v in way): way for way in reversed(ways)}.values())[::-1]


SPARE_STACK = 32
"""Bytes of stack a thread that are let pass: ptxas reserves a little in kernels that are otherwise sound (8 bytes on
sm_100), and a stack without spills is rarely touched."""
TENSOR_MEMORY = 512
"""Columns of tensor memory of a Blackwell multiprocessor, as Triton checks them at load time."""


def gate(binary: Binary, target: Target) -> str | None:
    """Why `binary` cannot be launched on `target`, or would be slow there beyond doubt; None if neither."""
    took, threads = binary.resources, binary.threads
    registers = _registers(binary, target)
    if not binary.ordinary or binary.scratch[2]:
        return "it needs a cluster, a cooperative launch or memory for profiling, which the launcher does not give"
    if binary.shared > target.shared:
        return f"it needs {binary.shared} bytes of shared memory and a block has {target.shared}"
    if threads > target.threads:
        return f"it needs {threads} threads and a block has {target.threads}"
    if registers > target.registers:
        return f"it needs {registers} registers for {threads} threads and a block has {target.registers}"
    if took.tensor_memory > TENSOR_MEMORY:
        return f"it needs {took.tensor_memory} columns of tensor memory and there are {TENSOR_MEMORY}"
    if took.spills:
        unit = "registers" if target.backend == "hip" else "bytes"
        return f"it spills {took.spills} {unit} a thread to memory"
    if took.stack + took.local > SPARE_STACK:
        return f"it keeps {took.stack + took.local} bytes a thread in memory, and {SPARE_STACK} are let pass"
    return None


def _registers(binary: Binary, target: Target) -> int:
    """Registers that a block is given."""
    return binary.warps * _up(binary.resources.registers * target.warp, target.step)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def blocks(binary: Binary, target: Target) -> int:
    """How many blocks a multiprocessor holds at once. Warps take their registers from one of its four parts."""
    warp = _up(max(binary.resources.registers, 1) * target.warp, target.step)
    warps = 4 * (target.registers // 4 // warp)
    shared = _up(binary.shared + target.reserved, 128)
    return min(
        warps // binary.warps,
        target.shared_unit // shared if shared else target.blocks_unit,
        target.threads_unit // binary.threads,
        target.blocks_unit,
    )


def rank(ways: Sequence[tuple[Binary, ...]], keep: int) -> list[tuple[Binary, ...]]:
    """The best `keep`, by their first launch, then by the next. Candidates of one key move the same bytes, so: matrix
    units are used if there are products, least memory for want of registers, most threads at work on a multiprocessor,
    fewest instructions, first given. Static figures know neither trip counts nor latencies: what is kept is to be timed
    on the card."""

    def cost(binary: Binary) -> tuple[int, ...]:
        took = binary.resources
        scalar = took.products > 0 and took.tensor == 0
        busy = blocks(binary, binary.target) * binary.threads
        return int(scalar), took.spills, took.stack + took.local, -busy, took.instructions

    return sorted(ways, key=lambda way: [cost(binary) for binary in way])[:keep]


def compile_all(
    jobs: Sequence[tuple[Variant, Target]],
    progress: Progress | None = None,
    workers: int | None = None,
    store: BlockStore | None = None,
) -> list[Binary | str]:
    """The binary of each job, or why it could not be made, in their order. What is made goes to `store` one by one."""
    say = progress or silent
    results: list[Binary | str | None] = [_found(store, i, job) for i, job in enumerate(jobs)]
    left = [i for i, result in enumerate(results) if result is None]
    workers = max(1, min(workers or os.cpu_count() or 1, len(left)))
    with tempfile.TemporaryDirectory(prefix="tpvc-kernels-") as folder:
        free: queue.SimpleQueue[_Compiler] = queue.SimpleQueue()
        compilers = [_Compiler(Path(folder), number) for number in range(workers)]
        for compiler in compilers:
            free.put(compiler)

        def work(job: tuple[Variant, Target]) -> Binary | str:
            compiler = free.get()
            try:
                return compiler.compile(job)
            finally:
                free.put(compiler)

        say("compile kernels", len(jobs) - len(left), len(jobs), "")
        with ThreadPoolExecutor(workers) as pool:
            try:
                waiting = {pool.submit(work, jobs[i]): i for i in left}
                for done, future in enumerate(as_completed(waiting), len(jobs) - len(left) + 1):
                    at = waiting[future]
                    results[at] = future.result()
                    if store is not None:
                        store.save(at, {}, _record(jobs[at], results[at]), None)
                    say("compile kernels", done, len(jobs), f"{jobs[at][0].kernel} for {jobs[at][1].name}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                for compiler in compilers:
                    compiler.stop()
    return results


def identity() -> dict[str, Any]:
    """What a build that goes on must share with the one that was killed, beside its jobs."""
    sources = sorted(file for folder in tpvc.kernels.__path__ for file in Path(folder).glob("*.py"))
    return {
        "kernels": hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest(),
        "tools": {key: value for key, value in os.environ.items() if TOOLS.fullmatch(key)},
        "triton": metadata.version("triton"),
    }


def _record(job: tuple[Variant, Target], result: Binary | str) -> dict[str, Any]:
    """What a store keeps of a job."""
    told = {"job": [job[0].key(), job[1].name]}
    if isinstance(result, str):
        return {**told, "reason": result}
    fields = {key: value for key, value in vars(result).items() if key not in ("variant", "target")}
    own = {"code": base64.b64encode(result.code).decode(), "resources": asdict(result.resources)}
    return {**told, "binary": fields | own}


def _found(store: BlockStore | None, number: int, job: tuple[Variant, Target]) -> Binary | str | None:
    """What a store has of a job, or None."""
    found = None if store is None else store.finished(number)
    if found is None or found[1]["job"] != [job[0].key(), job[1].name]:
        return None
    if "reason" in found[1]:
        return found[1]["reason"]
    fields = found[1]["binary"]
    own = {"code": base64.b64decode(fields["code"]), "resources": Resources(**fields["resources"])}
    return Binary(*job, **{**fields, **own, "scratch": tuple(fields["scratch"])})


FOREIGN = ("TRITON_", "MLIR_", "LLVM_", "AMDGCN_", "NVPTX_", "PTXAS_", "DISABLE_PTXAS", "USE_IR_LOC")
TOOLS = re.compile(r"TRITON_\w+_PATH")
"""Variables by which a shell could change what is compiled, and those of them that say where a tool lies."""


def _environment(folder: Path) -> dict[str, str]:
    """Of a compiler. Without line numbers no path of the build machine gets into a binary; a cache of its own, since
    Triton's could hold what other settings made."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN) or TOOLS.fullmatch(k)}
    return plain | {
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }


class _Compiler:
    """A process that compiles one job after another, started when the first comes."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.log = folder, folder / f"log-{number}"
        self.process: subprocess.Popen[bytes] | None = None

    def compile(self, job: tuple[Variant, Target]) -> Binary | str:
        try:
            if self.process is None:
                self._start()
            self._send(job)
            answer = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self.stop()
            if code in (-signal.SIGKILL, -signal.SIGTERM):  # which no kernel does: another run would have it compiled
                raise TpvcError(
                    f"a compiler of kernels was killed (signal {-code}), perhaps for want of memory; free some and run"
                    " the same command again"
                ) from None
            return f"the compiler ended ({code}): {_last_line(self.log.read_text(errors='replace'))}"
        if isinstance(answer, OSError):  # of the machine, and of no kernel
            if answer.errno == errno.ENOSPC:
                raise answer
            raise TpvcError(f"a compiler of kernels could not work ({answer}); run the same command again")
        return answer

    def _start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from tpvc.kernels.aot import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(self.folder),
            )
        self._send(list(tpvc.kernels.__path__))

    def _send(self, value: Any) -> None:
        pickle.dump(value, self.process.stdin)
        self.process.stdin.flush()

    def stop(self) -> int | None:
        if self.process is None:
            return None
        self.process.kill()
        code = self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
        return code


def serve() -> None:
    """The life of a compiler: where kernels lie, then jobs, from standard input; a Binary or a reason for each. What
    Triton and ptxas print goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    jobs: BinaryIO = sys.stdin.buffer
    tpvc.kernels.__path__ = pickle.load(jobs)
    while True:
        try:
            variant, target = pickle.load(jobs)
        except EOFError:
            return
        try:
            answer: Binary | str | OSError = _compile(variant, target)
        except OSError as error:
            answer = OSError(error.errno, str(error.strerror), error.filename)
        except Exception as error:  # of any kind: a kernel may be wrong in every way
            answer = f"{type(error).__name__}: {_last_line(str(error))}"
        pickle.dump(answer, answers)
        answers.flush()


def _last_line(text: str) -> str:
    """The line that tells most: the last that speaks of an error, or the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return (telling or lines or ["it said nothing"])[-1][:300]


def _compile(variant: Variant, target: Target) -> Binary:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = body(variant.kernel)
    types = {name: "constexpr" if kind == ABSENT else kind for name, kind in variant.params}
    constants = dict(variant.constants) | {name: None for name, kind in variant.params if kind == ABSENT}
    names = function.arg_names
    made = triton.compile(
        ASTSource(
            fn=function,
            signature={name: types.get(name, "constexpr") for name in names},
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in variant.divisible},
        ),
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True},
    )
    code = made.asm[target.form]
    facts = made.metadata
    return Binary(
        variant,
        target,
        code.encode() if isinstance(code, str) else code,
        facts.name,
        facts.num_warps,
        facts.shared,
        (
            getattr(facts, "global_scratch_size", 0),
            getattr(facts, "global_scratch_align", 1),
            facts.profile_scratch_size,
        ),
        facts.num_ctas == 1 and not facts.launch_cooperative_grid and not getattr(facts, "launch_pdl", False),
        _amd_resources(made.asm) if target.backend == "hip" else _nvidia_resources(made, target),
        triton.__version__,
        function.cache_key,
    )


def _nvidia_resources(made: Any, target: Target) -> Resources:
    from triton import knobs

    cubin, ptx = made.asm["cubin"], made.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel"
        path.write_bytes(cubin)
        said = _told([knobs.nvidia.cuobjdump.path, "-res-usage", str(path)])
        count = {name: int(re.search(rf"\b{name}:(\d+)", said).group(1)) for name in ("REG", "STACK", "LOCAL")}
        spills = 0
        if count["STACK"]:  # where spills lie
            path.write_text(ptx)
            chip = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
            ptxas = knobs.nvidia.ptxas_blackwell if target.arch >= 100 else knobs.nvidia.ptxas
            said = _told([ptxas.path, "-v", f"--gpu-name={chip}", str(path), "-o", os.devnull])
            spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
    return Resources(
        count["REG"],
        count["STACK"],
        count["LOCAL"],
        spills,
        made.metadata.tmem_size or 0,
        code_bytes(cubin, made.metadata.name) // 16,  # bytes of an instruction since Volta
        _products(made.asm["ttir"]),
        len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        len(re.findall(r"\bcp\.async\.(?:ca|cg|bulk)\b", ptx)),
    )


def _told(command: list[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return ended.stdout + ended.stderr


def code_bytes(cubin: bytes, symbol: str) -> int:
    """Bytes of the section `.text.SYMBOL` of a 64-bit ELF file (System V ABI, section header table)."""
    start, size, number, names = *struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(number)]
    table = headers[names][4]
    for name, _, _, _, _, length in headers:
        begin = table + name
        if cubin[begin : cubin.index(b"\0", begin)] == f".text.{symbol}".encode():
            return length
    raise ValueError(f"no code of {symbol} in what was compiled")


def _amd_resources(asm: Mapping[str, Any]) -> Resources:
    text = asm["amdgcn"]

    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    return Resources(
        count("vgpr_count"),  # accumulation registers are among them
        count("private_segment_fixed_size"),
        0,
        count("vgpr_spill_count"),
        0,
        len(re.findall(r"^\t[vs]_\w+|^\t(?:ds|global|buffer|flat|scratch)_\w+", text, re.MULTILINE)),
        _products(asm["ttir"]),
        len(re.findall(r"^\tv_(?:mfma|smfmac|wmma|swmmac)_", text, re.MULTILINE)),
        len(re.findall(r"^\t(?:buffer|global)_load_\w+.*\blds\b", text, re.MULTILINE)),
    )


def _products(ttir: str) -> int:
    """`tl.dot` of numbers that matrix units take: 8 and 16 bits."""
    return len(re.findall(r"tt\.dot(?:_scaled)?\b.*: tensor<[\dx]*x(?:f16|bf16|i8|f8\w+)[,>]", ttir))

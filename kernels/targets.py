"""The chips that kernels are compiled for: what one block may use there, and which binary runs on which card."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tpvc.compiler.errors import TpvcError


@dataclass(frozen=True)
class Target:
    """name   as on the command line, "cuda:90" or "hip:gfx942"
    cards  examples
    arch   10 * major + minor of a compute capability, or AMD's name
    warp   threads of a warp (a wave)
    shared, registers, threads   what one block may use: bytes of dynamic shared memory, 32-bit registers, threads
    shared_unit, threads_unit, blocks_unit   what a multiprocessor (AMD: a compute unit; RDNA: a pair of them, over
           which a block is spread) holds at once; it has `registers` registers, in four equal parts
    reserved   bytes of shared memory that the driver keeps of every block
    step   registers are given to a warp in multiples of this many
    form   what is stored: a binary, or text that the driver compiles
    fp8    its matrix units multiply float8 e4m3 as PyTorch and compressed-tensors mean it
    """

    name: str
    cards: str
    arch: int | str
    warp: int
    shared: int
    shared_unit: int
    threads_unit: int
    blocks_unit: int
    registers: int = 65536
    threads: int = 1024
    reserved: int = 1024
    step: int = 256
    form: str = "cubin"
    fp8: bool = False

    @property
    def backend(self) -> str:
        return "hip" if self.form == "hsaco" else "cuda"


def _amd(arch: str, cards: str, wide: bool, shared: int, fp8: bool = False) -> Target:
    """CDNA: waves of 64, and per compute unit 4 x 512 registers of 64 lanes, given out by 8, and 4 x 8 waves.
    RDNA 3 and 4: waves of 32, and per pair of compute units 4 x 1536 registers of 32 lanes, given out by 24, 4 x 16
    waves, and twice the shared memory that one block may have."""
    warp, registers, step = (64, 4 * 512 * 64, 8 * 64) if wide else (32, 4 * 1536 * 32, 24 * 32)
    unit = shared if wide else 2 * shared
    return Target(f"hip:{arch}", cards, arch, warp, shared, unit, 2048, 32, registers, 1024, 0, step, "hsaco", fp8)


# Sources. NVIDIA: a line's figures, the 65,536 registers and 1,024 threads of a block and the 1,024 bytes reserved from
# 8.0 on are those of NVIDIA/cccl, libcudacxx/include/cuda/__device/arch_traits.h (commit 004ad198), as in the CUDA
# programming guide's table of technical specifications. That registers go to a warp by 256 is from memory.
# AMD: registers of a compute unit from ROCm's libhsakmt (512 KiB on gfx90a and gfx942, 384 KiB on gfx1100 and gfx1201;
# gfx950 and gfx1151 from memory); waves, steps in which registers are given, 32 blocks, and shared memory (64 KiB a
# block, 160 KiB on gfx950) from memory of LLVM's AMDGPU back end.
# fp8: where Triton 3.7 makes matrix instructions of it, from 8.9 on and on gfx950. gfx942 has another e4m3, so this one
# is emulated there; on gfx1201 its conversions take more registers than there are.
KIB = 1024
TARGETS: tuple[Target, ...] = (
    Target("cuda:75", "T4, RTX 20", 75, 32, 64 * KIB, 64 * KIB, 1024, 16, reserved=0),
    Target("cuda:80", "A100, A30", 80, 32, 163 * KIB, 164 * KIB, 2048, 32),
    Target("cuda:86", "A10, A40, RTX 30", 86, 32, 99 * KIB, 100 * KIB, 1536, 16),
    Target("cuda:87", "Jetson Orin", 87, 32, 163 * KIB, 164 * KIB, 1536, 16),
    Target("cuda:89", "L4, L40, RTX 40", 89, 32, 99 * KIB, 100 * KIB, 1536, 24, fp8=True),
    Target("cuda:90", "H100, H200", 90, 32, 227 * KIB, 228 * KIB, 2048, 32, fp8=True),
    Target("cuda:100", "B200, GB200", 100, 32, 227 * KIB, 228 * KIB, 2048, 32, fp8=True),
    Target("cuda:103", "B300, GB300", 103, 32, 227 * KIB, 228 * KIB, 2048, 32, fp8=True),
    Target("cuda:110", "Jetson Thor", 110, 32, 227 * KIB, 228 * KIB, 1536, 24, fp8=True),
    Target("cuda:120", "RTX 50, RTX PRO Blackwell", 120, 32, 99 * KIB, 100 * KIB, 1536, 24, fp8=True),
    Target("cuda:121", "DGX Spark", 121, 32, 99 * KIB, 100 * KIB, 1536, 24, fp8=True),
    _amd("gfx90a", "MI210, MI250", True, 64 * KIB),
    _amd("gfx942", "MI300, MI325", True, 64 * KIB),
    _amd("gfx950", "MI350, MI355", True, 160 * KIB, fp8=True),
    _amd("gfx1100", "RX 7900, W7900", False, 64 * KIB),
    _amd("gfx1151", "Ryzen AI Max", False, 64 * KIB),
    _amd("gfx1201", "RX 9070, R9700", False, 64 * KIB),
)
PTX = Target("ptx:80", "any NVIDIA card since Ampere", 80, 32, 99 * KIB, 100 * KIB, 1536, 16, form="ptx")
"""Text for sm_80, which a driver compiles for every later card: what runs where no binary does, since those for 9.0 and
later, and their own PTX, run on one architecture only. Its limits are the smallest of those cards'."""


def parse(text: str) -> tuple[Target, ...]:
    """The targets that "cuda:90,hip:gfx942" names, each once, in this order."""
    known = {t.name: t for t in TARGETS}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise TpvcError(f"'{name}' is not a target that kernels are compiled for; choose among {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def named(name: str) -> Target:
    """The target that a manifest names, PTX among them."""
    return PTX if name == PTX.name else parse(name)[0]


def usable(names: Iterable[str], backend: str, arch: int | str) -> tuple[str, ...]:
    """Those of `names` that run on a device, best first.

    AMD, and NVIDIA from 9.0 on: its own. Before 9.0: its own, then lower minor versions of the same major one, the
    highest first; Jetson's 8.7 and the cards' versions do not run each other's (CUDA programming guide, binary
    compatibility). Last, from 8.0 on, PTX."""
    names = set(names)
    if backend == "hip":
        return tuple({f"hip:{arch}"} & names)
    arch = int(arch)
    older = [] if arch >= 90 or arch == 87 else [a for a in range(arch - 1, arch // 10 * 10 - 1, -1) if a != 87]
    wanted = [f"cuda:{a}" for a in (arch, *older)] + ([PTX.name] if arch >= PTX.arch else [])
    return tuple(name for name in wanted if name in names)

"""For every runtime: does it load what would be written, on which kernels, and which change would help.

What a format of ours cannot hold is found by its backend's own checks. What runtimes do with what they load stands
here: vLLM's kernels as in its source (`kernels/linear/mixed_precision`: Marlin, Conch and CUTLASS W4A8 at commit
055e47c, Humming at 029e202), ONNX Runtime's from measurements on a CPU (docs/onnx.md), our own from builds for the
targets. vLLM was not run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tpvc.compiler.backends.onnx.check import check
from tpvc.compiler.backends.onnx.fusions import plan as fusions
from tpvc.compiler.backends.onnx.genai import GENAI
from tpvc.compiler.backends.onnx.matmulnbits import layout_of
from tpvc.compiler.backends.triton.model import activation_dtype
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.plan.disk import checkpoint_bytes, onnx_bytes, triton_bytes
from tpvc.compiler.program import Grid, Program, constant_prefix, grid_of, linears, rounded_cache, rounded_inputs
from tpvc.kernels.targets import TARGETS, Target
from tpvc.passes.round_cache import float_cache

YES, NO, MAYBE = "yes", "no", "perhaps"


@dataclass(frozen=True)
class Verdict:
    """to       as `export --to` has it; "" for the artefact itself
    loads    "yes", "no", or "perhaps": not known, or with a package that does not come with the runtime
    path     the kernels that run, or why it does not load
    change   what would help, or None
    bytes    of the weights on disk; None where they cannot be written
    """

    runtime: str
    to: str
    loads: str
    path: str
    change: str | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Matrix:
    """A linear of a block. rows: how the rows that it reads are rounded, None in float; value: what it reads."""

    name: str
    outputs: int
    columns: int
    grid: Grid | None
    rows: str | None
    value: str


def matrices(program: Program) -> tuple[Matrix, ...]:
    rounded, found = rounded_inputs(program), []
    for node in linears(n for n in program.nodes if n.block is not None):
        name = node.params["weight"]
        outputs, columns = program.params[name].shape
        grid = grid_of(program.params[name])
        found.append(Matrix(node.name, outputs, columns, grid, rounded.get(name), node.inputs[0]))
    return tuple(found)


def verdicts(
    program: Program,
    folded: Program | None = None,
    targets: Sequence[Target] = (),
    accuracy_level: int = 4,
    portable: bool = False,
) -> tuple[Verdict, ...]:
    """Of all runtimes. program: as it will be exported (`outcome`); folded: with a prompt in it, for onnx; targets:
    GPUs of a Triton package, none for all."""
    found = [_transformers(program)]
    found += [_told(v, program) for v in (_vllm(program), *_packed(program))]
    found += [_told(_onnx(float_cache(folded or program), accuracy_level, portable), program)]
    return (*found, *_triton(program, targets or TARGETS))


def _told(found: Verdict, program: Program) -> Verdict:
    """With what becomes of a rounded cache where there is none."""
    if found.bytes is None or not rounded_cache(program):
        return found
    return replace(found, path=f"{found.path}; keys and values in float")


def _written(make: Callable[[], int]) -> tuple[int | None, str]:
    """(bytes, "") or (None, why it cannot be written)."""
    try:
        return make(), ""
    except TpvcError as error:
        return None, str(error)


def _transformers(program: Program) -> Verdict:
    count, why = _written(lambda: checkpoint_bytes(program))
    if count is None:
        return Verdict("transformers", "", NO, why)
    if conv := architecture(dict(program.source.config)).transposed:
        why = f"no module for {len(conv)} integer Conv1D layers, which tpvc alone reads"
        return Verdict("transformers", "", NO, why, "export it to onnx or triton", count)
    return Verdict("transformers", "", YES, "compressed-tensors, which computes in float", None, count)


MARLIN_GROUPS = (128, 64, 32)
"""And -1."""
MARLIN_TILE = (64, 128)
"""Outputs and inputs of a matrix: other sizes are filled up with zeros, by versions before 055e47c refused."""
MARLIN = "Marlin, NVIDIA from 7.5 on"


def _vllm(program: Program) -> Verdict:
    count, why = _written(lambda: checkpoint_bytes(program, "vllm"))
    if count is None:
        return Verdict("vLLM", "vllm", NO, why)
    if architecture(dict(program.source.config)).transposed:
        why = "vLLM has no module for integer Conv1D layers"
        return Verdict("vLLM", "vllm", NO, why, "export it to onnx or triton", count)
    own = matrices(program)
    if (mixed := _mixed(own)) is not None:
        why = f"{mixed} become one matrix there, and are on different grids"
        return Verdict("vLLM", "vllm", NO, why, "one grid for linears that read one value", count)
    answers = dict.fromkeys(_vllm_kernel(m, own) for m in own)
    worst = min(answers, key=lambda a: (NO, MAYBE, YES).index(a[0]))
    path = "; ".join(a[1] for a in answers)
    if (filled := _filled(own)) is not None and MARLIN in path:
        path += f"; {filled} is filled up, which versions before 055e47c refuse"
    return Verdict("vLLM", "vllm", worst[0], path, worst[2], count)


def _joined(own: Sequence[Matrix]) -> list[list[Matrix]]:
    """Linears of a block that read one value: vLLM makes one matrix of queries, keys and values, and of gate and up."""
    readers: dict[str, list[Matrix]] = defaultdict(list)
    for m in own:
        readers[m.value].append(m)
    return list(readers.values())


def _filled(own: Sequence[Matrix]) -> str | None:
    """The first matrix, outputs x inputs, that is no whole number of Marlin's tiles; None without any."""
    for group in _joined(own):
        outputs, inputs = sum(m.outputs for m in group), group[0].columns
        if outputs % MARLIN_TILE[0] or inputs % MARLIN_TILE[1]:
            return f"{outputs}x{inputs}"
    return None


def _mixed(own: Sequence[Matrix]) -> str | None:
    """Linears that are to be one matrix and lie on different grids; None without any."""
    for group in _joined(own):
        if len({(m.grid, m.rows) for m in group}) > 1:
            return ", ".join(m.name for m in group)
    return None


def _vllm_kernel(m: Matrix, own: Sequence[Matrix]) -> tuple[str, str, str | None]:
    """(loads, kernels, change) of a linear."""
    if m.grid is None:
        return YES, "float linears", None
    bits, group, symmetric = m.grid.bits, m.grid.group, m.grid.symmetric
    if group == 0:
        return NO, "one scale per tensor, which its weight-only kernels do not take", "--group-size -1"
    if m.rows in ("int8", "int8-static"):
        if bits == 8 and group == -1 and symmetric:
            static = " on a static grid with a zero point" if m.rows == "int8-static" else ""
            return YES, f"CUTLASS, int8{static}", None
        if bits == 8:
            return NO, f"no kernel for {m.grid} with int8 activations", "--group-size -1 --sym"
        return (
            MAYBE,
            f"W{bits} with int8 activations is not known to be read",
            "--scheme W8A8, or leave activations out",
        )
    if m.rows == "fp8":
        fits = bits == 4 and group == 128 and symmetric and m.columns % 128 == 0 and m.outputs % 128 == 0
        if fits:
            return YES, "CUTLASS W4A8 on Hopper, in bfloat16", None
        wanted = "4 bits in groups of 128 without zero points, rows and columns in multiples of 128"
        return NO, f"CUTLASS W4A8 wants {wanted}", "leave activations out, or --activations int8 with 8 bits"
    fits = bits == 4 or (bits == 8 and symmetric)
    if fits and group in (-1, *MARLIN_GROUPS):
        return YES, MARLIN, None
    if fits:
        better = next((g for g in MARLIN_GROUPS if all(o.columns % g == 0 for o in own)), -1)
        return MAYBE, f"Humming, if installed: Marlin has no groups of {group}", f"--group-size {better}"
    conch = "Conch or " if bits == 8 and group in (-1, 128) else ""
    why = f"no Marlin kernel for {bits} bits{'' if symmetric else ' with zero points'}"
    return MAYBE, f"{conch}Humming, if installed: {why}", "--bits 4" if bits != 8 else "--sym, or --bits 4"


def _packed(program: Program) -> Iterator[Verdict]:
    """GPTQ and AWQ."""
    own = matrices(program)
    for to, name in (("gptq", "GPTQ"), ("gptq_v2", "GPTQ version 2"), ("awq", "AWQ")):
        count, why = _written(lambda to=to: checkpoint_bytes(program, to))
        if count is None:
            reason = why.partition(f"cannot be written as {name}: ")[2] or why
            yield Verdict(name, to, NO, reason, None)
            continue
        change, path = None, "GPTQModel in transformers"
        if to != "gptq_v2":
            path += f"; vLLM refuses {why}" if (why := _refused_by_marlin(own, to)) else ", vLLM's Marlin"
        if to == "gptq" and not all(m.grid is None or m.grid.symmetric for m in own):
            path += "; a zero point of 0, which only numbers tell, is refused when it is written"
            change = "--sym, or --to gptq_v2"
        yield Verdict(name, to, YES, path, change, count)


def _refused_by_marlin(own: Sequence[Matrix], to: str) -> str:
    """What of a GPTQ or AWQ checkpoint vLLM does not take, which has Marlin alone for them; "" if it takes it."""
    grids = {m.grid for m in own if m.grid is not None}
    if to == "gptq" and not (grids and all(g.bits in (4, 8) and g.symmetric for g in grids)):
        return "zero points and other widths than 4 and 8"
    if (mixed := _mixed(own)) is not None:
        return f"different grids for {mixed}, which become one matrix"
    odd = sorted({g.group for g in grids} - {-1, 0, *MARLIN_GROUPS})  # 0: is written as one scale a row
    return f"groups of {', '.join(map(str, odd))}" if odd else ""


def _onnx(program: Program, level: int, portable: bool) -> Verdict:
    runtime = "ONNX Runtime GenAI"
    try:
        check(program, GENAI, level)
    except TpvcError as error:
        return Verdict(runtime, "onnx", NO, str(error))
    if constant_prefix(program) and not portable:
        return Verdict(runtime, "onnx", NO, "a constant prefix of ids, as GenAI fills its cache itself", "--form kv")
    count = onnx_bytes(program, portable)
    grids = {
        (grid_of(program.params[n.params["weight"]]), program.params[n.params["weight"]].shape[1])
        for n in linears(program.nodes)
    }
    layouts = {layout_of(grid, columns) for grid, columns in grids if grid is not None}
    parts, change = [], None
    if layouts:
        sizes = sorted({(x.bits, x.block) for x in layouts})
        parts.append("MatMulNBits, " + ", ".join(f"{bits} bits in blocks of {block}" for bits, block in sizes))
    slow = sorted({x.bits for x in layouts if x.bits != 4}) if level != 4 else []
    if slow:
        parts.append(f"{' and '.join(map(str, slow))} bits dequantised on every call, 20 to 100 times slower")
        change = "--accuracy-level 4" if slow != [8] else "--accuracy-level 4, or --head-bits 16 where it is the head"
    if any(x.spreads for x in layouts):
        parts.append("inputs filled up to whole blocks")
        change = change or "a group size that 16 divides"
    attention = [n for n in program.nodes if n.op == "attention"]
    fused = fusions(program).attention
    joined = sum(a.projection is not None for a in fused.values())
    if len(fused) < len(attention):
        parts.append("attention in standard operators: heads are no multiple of 8 wide")
    else:
        parts.append("GroupQueryAttention" + ("" if joined == len(attention) else ", q, k and v apart"))
    if any(m.rows for m in matrices(program)):
        parts.append("activations rounded in the graph, products not in int8")
    return Verdict(runtime, "onnx", YES, "; ".join(parts), change, count)


RDNA3 = ("hip:gfx1100", "hip:gfx1151")
"""What their registers do not hold: found by building (`kernels/aot.py`), which refuses with the same result."""


def _triton(program: Program, targets: Sequence[Target]) -> Iterator[Verdict]:
    """A verdict for each group of targets that has the same one."""
    dtype = activation_dtype(program)
    count, why = _written(lambda: triton_bytes(program, dtype))
    if count is None:
        change = "--group-size 32, 64, 128 or -1" if "groups of" in why else None
        change = "--activations int8" if "on one grid" in why else change
        yield Verdict("Triton", "triton", NO, why, change)
        return
    answers: dict[tuple[str, str, str | None], list[str]] = defaultdict(list)
    for target in targets:
        answers[_triton_on(program, target)].append(target.name)
    for (loads, path, change), names in answers.items():
        said = "other targets" if len(names) > len(targets) / 2 > 2 else ", ".join(names)
        who = "Triton" if len(answers) == 1 and len(targets) > 1 else f"Triton, {said}"
        yield Verdict(who, "triton", loads, path, change, count)


def _triton_on(program: Program, target: Target) -> tuple[str, str, str | None]:
    own = matrices(program)
    rounded = {m.rows for m in own} - {None}
    if "fp8" in rounded and not target.fp8:
        return NO, "its matrix units have no e4m3", "--activations int8, or another target"
    if target.name in RDNA3:
        if any(m.grid is not None and m.grid.bits == 3 for m in own):
            return NO, "3 bits do not fit the registers of RDNA 3", "--bits 4 or --bits 2"
        if program.facts.head_dim >= 256:
            return NO, "heads of 256 features do not fit the registers of RDNA 3", "another target"
        if any(m.rows and m.grid is not None and m.grid.columns(m.columns) < m.columns for m in own):
            return NO, "rounded activations over groups do not fit the registers of RDNA 3", "--group-size -1"
    kernels = Counter(f"linear_a8 ({m.rows})" if m.rows else "linear" for m in own)
    cache = ", int8 cache" if rounded_cache(program) else ""
    return YES, f"{' and '.join(kernels)}{cache}; not yet run on a card", None

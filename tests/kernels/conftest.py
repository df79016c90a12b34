"""Kernels run under Triton's interpreter, which has to be asked for before triton is imported."""

import json
import os
import subprocess
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
from torch import Tensor

EPS = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24}
TARGETS = (("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64))
SHARED = {80: 166_912, 90: 232_448, "gfx942": 65_536}
"""Bytes of shared memory that a program may have."""


@pytest.fixture(scope="session", autouse=True)
def bfloat16_in_the_interpreter():
    """It keeps bfloat16 as uint16, which it makes of integers as they are, multiplies as integers in `tl.dot`, and
    truncates where it should round, float8 too."""
    from triton.runtime import interpreter

    builder, language = interpreter.InterpreterBuilder, interpreter.tl
    cast, dot = builder.cast_impl, builder.create_dot

    def rounding(self, source, to):
        if source.dtype.scalar != language.bfloat16 and to.scalar == language.bfloat16:
            bits = cast(self, source, language.float32).data.view(np.uint32)
            up = ((bits >> 16) & 1) + np.uint32(0x7FFF)
            return interpreter.TensorHandle(((bits + up) >> 16).astype(np.uint16), to.scalar)
        return cast(self, source, to)

    def product(self, a, b, *rest):
        wide = [cast(self, t, language.float32) if t.dtype.scalar == language.bfloat16 else t for t in (a, b)]
        return dot(self, *wide, *rest)

    convert = builder.create_fp_to_fp

    def eighths(self, source, to, mode):
        """Float8 e4m3, which it truncates, by torch."""
        dtypes = {language.float8e4nv: torch.float8_e4m3fn, language.float32: torch.float32}
        there, wanted = dtypes.get(source.dtype.scalar), dtypes.get(to.scalar)
        if there is None or wanted is None:
            return convert(self, source, to, mode)
        given = torch.from_numpy(np.ascontiguousarray(source.data)).view(there).reshape(source.data.shape).to(wanted)
        stored = given if wanted == torch.float32 else given.view(torch.uint8)
        return interpreter.TensorHandle(stored.numpy(), to.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_fp_to_fp", eighths)
        patch.setattr(builder, "cast_impl", rounding)
        patch.setattr(builder, "create_dot", product)
        yield


@pytest.fixture(scope="session")
def close():
    """close(found, wanted, bound): both are rounded to their dtype after sums that are off by at most `bound`, a number
    or tensor; sums that differ may fall on two sides of a rounding edge, hence 2 eps of what is rounded."""

    def compare(found, wanted, bound):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        limit = bound + 2 * EPS[str(found.dtype).removeprefix("torch.")] * (wanted.double().abs() + bound)
        over = (found.double() - wanted.double()).abs() - limit
        assert bool((over <= 0).all()), f"off by {float(over.max()):.3g} more than allowed"

    return compare


COMPILE = """
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
work = json.load(sys.stdin)
found = []
for one in work["launches"]:
    module, _, name = one["kernel"].partition(":")
    fn = getattr(importlib.import_module(f"tpvc.kernels.{module}"), name)
    runtime = [n for n in fn.arg_names if n not in one["constants"]]
    types = dict(zip(runtime, one["types"], strict=True))
    constants = one["constants"] | {n: None for n, t in types.items() if t is None}
    signature = {n: "constexpr" if n in constants else types[n] for n in fn.arg_names}
    even = [i for i, n in enumerate(fn.arg_names) if n not in constants and runtime.index(n) in one["even"]]
    attrs = {(i,): [["tt.divisibility", 16]] for i in even if not fn.arg_names[i].startswith("n_")}
    for backend, arch, lanes in work["targets"]:
        source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
        options = {"num_warps": one["warps"], "num_stages": one["stages"]}
        made = triton.compile(source, target=GPUTarget(backend, arch, lanes), options=options)
        row = {"kernel": one["kernel"], "arch": arch, "shared": made.metadata.shared}
        if backend == "cuda":
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(made.asm["cubin"])
                text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
            use = dict(re.findall(r"(REG|STACK|LOCAL):(\\d+)", text))
            row |= {"registers": int(use["REG"]), "spill": int(use["STACK"]) + int(use["LOCAL"])}
        else:
            use = dict(re.findall(r"\\.(vgpr_count|[vs]gpr_spill_count):\\s+(\\d+)", made.asm["amdgcn"]))
            row |= {"registers": int(use["vgpr_count"]), "spill": int(use["vgpr_spill_count"])}
            row["scalars spilt"] = int(use["sgpr_spill_count"])  # into lanes of vector registers, not into memory
        found.append(row)
json.dump(found, sys.stdout)
"""


def described(launch):
    """A launch as JSON: types of its arguments and which of them are multiples of 16 (pointers always)."""
    names = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
    names |= {"int8": "*i8", "uint8": "*u8", "float8_e4m3fn": "*fp8e4nv", "int32": "*i32", "int64": "*i64"}

    def of(argument):
        if isinstance(argument, Tensor):
            return names[str(argument.dtype).removeprefix("torch.")]
        return None if argument is None else "fp32" if isinstance(argument, float) else "i32"

    even = [
        i for i, a in enumerate(launch.args) if isinstance(a, Tensor) or (isinstance(a, int) and a % 16 == 0 and a > 0)
    ]
    shape = {"constants": dict(launch.constants), "warps": launch.warps, "stages": launch.stages}
    return {"kernel": launch.kernel, "types": [of(a) for a in launch.args], "even": even, **shape}


@pytest.fixture(scope="session")
def compiles():
    """compiles(launches): they compile for every target, fit in its shared memory and keep all values in registers."""

    def check(launches):
        work = {"launches": [described(launch) for launch in launches], "targets": TARGETS}
        plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", COMPILE], input=json.dumps(work), env=plain, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout)
        print(*found, sep="\n")
        assert not [row for row in found if row["spill"] or row["shared"] > SHARED[row["arch"]]]

    return check

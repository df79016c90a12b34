"""Merging a RoAd adapter into one wide linear: time, peak memory and error, ours beside PEFT's own merge.

    python benchmarks/road_merge.py

The linear has 11008 outputs and 4096 inputs; the adapter is road_1 in groups of 64, drawn as PEFT's
`init_weights=False` draws it (theta normal(0, 0.5), alpha normal(1, 0.5)), the same numbers for both. Every row of the
table is a process of its own. Peak memory is the resident peak during the first merge less the resident size before it
(Linux: /proc); time is the median over merges of fresh weights. The error of a merge is the largest difference from
float64 over the largest merged weight; "float64, rounded once" is what no merge in that dtype can beat. Merge and
unmerge is compared with the original weight: largest difference over the largest weight, and share that differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from tpvc.compiler.adapters.road import Rotation, fold_, halves, unfold_

GROUP = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resident(field: str) -> float:
    """MB: VmRSS is resident now, VmHWM its peak."""
    line = next(li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def draw(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weight that nn.Linear would start from, the same in every process."""
    return torch.empty(outputs, inputs, dtype=dtype).uniform_(
        -(inputs**-0.5), inputs**-0.5, generator=torch.Generator().manual_seed(0)
    )


def adapter(outputs: int) -> Rotation:
    seeded = torch.Generator().manual_seed(1)
    theta, alpha = (torch.randn(outputs // 2, generator=seeded) * 0.5 for _ in range(2))
    return Rotation("road_1", GROUP, theta, alpha + 1)


def ours(layer: nn.Linear, rotation: Rotation) -> tuple[Callable[[], None], Callable[[], None]]:
    """(merge, unmerge), both in place."""
    weight = layer.weight.data
    return lambda: fold_(weight, rotation), lambda: unfold_(weight, rotation, "linear")


def peft(layer: nn.Linear, rotation: Rotation) -> tuple[Callable[[], None], Callable[[], None]]:
    """(merge, unmerge) of PEFT's layer around `layer`."""
    from peft import RoadConfig, get_peft_model

    config = RoadConfig(variant="road_1", group_size=GROUP, target_modules=["linear"], init_weights=False)
    wrapped = get_peft_model(nn.ModuleDict({"linear": layer}), config).base_model.model["linear"]
    wrapped.road_theta["default"].data.copy_(rotation.theta)
    wrapped.road_alpha["default"].data.copy_(rotation.alpha)
    return wrapped.merge, wrapped.unmerge


def exact(weight: Tensor, rotation: Rotation) -> Tensor:
    """R W in float64."""
    cosine, sine = Rotation("road_1", GROUP, rotation.theta.double(), rotation.alpha.double()).vectors
    lo, hi = halves(weight.double().t(), GROUP)
    (c, _), (s, _) = halves(cosine, GROUP), halves(sine, GROUP)
    return torch.stack((c * lo - s * hi, c * hi + s * lo), -2).flatten(-3).t()


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@torch.no_grad()
def child(
    contender: str, dtype: torch.dtype, outputs: int, inputs: int, merges: int, now: Callable[[], float]
) -> dict[str, float]:
    """The figures of one row of the table."""
    setup = {"ours": ours, "PEFT": peft}[contender]
    for size in (GROUP, 8 * GROUP):  # libraries allocate their own on first use
        small = nn.Linear(size, size, bias=False, dtype=dtype)
        for step in setup(small, adapter(size)):
            step()
    rotation, seconds, peak = adapter(outputs), [], 0.0
    for i in range(merges):
        layer = nn.Linear(inputs, outputs, bias=False, dtype=dtype, device="meta").to_empty(device="cpu")
        layer.weight.data.copy_(draw(outputs, inputs, dtype))
        merge, unmerge = setup(layer, rotation)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before, began = resident("VmRSS"), now()
        merge()
        seconds.append(now() - began)
        if i == 0:
            peak = resident("VmHWM") - before
    original = draw(outputs, inputs, dtype)
    wanted = exact(original, rotation)
    found = {"seconds": median(seconds), "peak": peak, "error": off(layer.weight, wanted)}
    found["floor"] = off(wanted.to(dtype), wanted)
    del wanted
    began = now()
    unmerge()
    found["unmerge"] = now() - began
    found["differ"] = float((layer.weight != original).double().mean())
    found["back"] = off(layer.weight, original)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=11008)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--merges", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine: CPU seconds of one thread")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    if args.child:
        contender, dtype = args.child
        now = time.process_time if args.cpu_time else time.perf_counter
        print(json.dumps(child(contender, DTYPES[dtype], args.outputs, args.inputs, args.merges, now)))
        return

    print("| | merge s | peak MB | merge error | unmerge s | after merge and unmerge: error | weights that differ |")
    print("|---|---|---|---|---|---|---|")
    for dtype in DTYPES:
        rows = {}
        for contender in ("ours", "PEFT"):
            command = [sys.executable, __file__, *sys.argv[1:], "--child", contender, dtype]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows[contender] = r = json.loads(out.splitlines()[-1])
            print(
                f"| {contender}, {dtype} | {r['seconds']:.3f} | {r['peak']:.1f} | {r['error']:.1e} | {r['unmerge']:.3f}"
                f" | {r['back']:.1e} | {r['differ']:.1%} |",
                flush=True,
            )
        ratio = {k: rows["PEFT"][k] / max(rows["ours"][k], 1e-30) for k in ("seconds", "peak", "unmerge", "error")}
        print(
            f"| PEFT / ours, {dtype} | {ratio['seconds']:.0f} x | {ratio['peak']:.0f} x | {ratio['error']:.1f} x"
            f" | {ratio['unmerge']:.0f} x | | |"
        )
        print(f"| float64, rounded once to {dtype} | | | {rows['ours']['floor']:.1e} | | | |", flush=True)


if __name__ == "__main__":
    main()

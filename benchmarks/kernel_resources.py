"""What the kernels of a model take on each target, as the compilers tell: registers, shared memory, spills; and how
long building them takes.

    python benchmarks/kernel_resources.py ARTEFACT --target cuda:80,cuda:90,hip:gfx942 [--rows 1,16]

No GPU is needed, and no kernel is timed. `--rows` are those of decoding passes; pieces of prompts (16 and 128 tokens)
come with them. A cell has the least and the most registers a thread and bytes of shared memory a block, and in brackets
the binaries that were kept and, behind a plus, those that were rejected, most of them for spills.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import torch

from tpvc.compiler import frontends
from tpvc.compiler.backends import triton
from tpvc.compiler.backends.triton.model import model_of
from tpvc.kernels import aot
from tpvc.kernels.targets import parse


def span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def name_of(variant: aot.Variant) -> str:
    constants = dict(variant.constants)
    if variant.kernel.split(":")[1] in ("slab_product", "slab_product_a8"):
        rows = constants["BLOCK_M"]
        return f"{variant.kernel}, {constants['BITS']} bits, {'sums' if rows < 16 else 'products'} of {rows} rows"
    if variant.kernel == "attention:attend":
        return f"{variant.kernel}, {constants['BLOCK_M']} queries"
    return variant.kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact")
    parser.add_argument("--target", required=True)
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--capacity", type=int, default=2048)
    args = parser.parse_args()
    model = model_of(frontends.load(args.artefact), torch.float16)
    wanted = triton.candidates(model, args.capacity, [int(n) for n in args.rows.split(",")])
    targets = parse(args.target)
    cells, notes = defaultdict(dict), []
    for target in targets:
        start = time.perf_counter()
        built = aot.build(wanted, [target])
        took = time.perf_counter() - start
        groups, refused = defaultdict(list), defaultdict(int)
        for kept in built.kept:
            if kept.binary.target == target:
                groups[name_of(kept.binary.variant)].append(kept.binary)
        for one in built.rejected:
            if one.target == target:
                refused[name_of(one.variant)] += 1
        for name, own in groups.items():
            spills = sum(b.resources.spills for b in own)
            counts = f"{len(own)}" + (f" + {refused[name]}" if refused[name] else "")
            registers, shared = span([b.resources.registers for b in own]), span([b.shared for b in own])
            cells[name][target.name] = f"{registers}; {shared} B ({counts})" + (f", {spills} spilt" if spills else "")
        size = sum(len(k.binary.code) for k in built.kept if k.binary.target == target)
        notes.append(f"{target.name}: {sum(map(len, groups.values()))} binaries, {size / 1e6:.2f} MB, {took:.0f} s")
        print(notes[-1], flush=True)
    print("\n| kernel | " + " | ".join(t.name for t in targets) + " |\n|---|" + "---|" * len(targets))
    for name in sorted(cells):
        print(f"| {name} | " + " | ".join(cells[name].get(t.name, "") for t in targets) + " |")


if __name__ == "__main__":
    main()

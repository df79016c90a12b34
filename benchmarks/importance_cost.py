"""What recording importance costs: time and bytes, against the diagonal Fisher matrix on the same text; and 8-bit codes
against half precision.

    python benchmarks/importance_cost.py MODEL --general TEXT -o OUT [--train lora] [--nsamples 128] [--length 256]

Both see the same windows once, on the same linears: the path integral a batch at a time, of which it takes the
optimiser's steps too; the Fisher matrix a window at a time, because it is a mean of squares. Seconds are those of the
learning alone, without loading and writing. A line a method is added to OUT/results.jsonl.

Codes are measured on the importance that was recorded: the error of the penalty and the angle of its gradient, for the
movement of the general phase itself, with what is exact in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from tpvc.compiler import frontends
from tpvc.compiler.finetune_pipeline import importance
from tpvc.compiler.tuning import general_phase, importance_file
from tpvc.compiler.tuning.log_codes import encode


def recorded(args: argparse.Namespace, method: str, batch: int) -> tuple[dict, dict[str, Tensor]]:
    """(what is to be said of it, Omega in float32 scaled to mean 1) of one method."""
    kept: dict[str, Tensor] = {}
    write = importance_file.write

    def keeping(path: Path, omega: dict[str, Tensor], *rest: object) -> None:
        total = sum(float(o.double().sum()) for o in omega.values())
        mean = total / sum(o.numel() for o in omega.values())
        kept.update({n: o / mean for n, o in omega.items()})
        write(path, omega, *rest)

    began: dict[str, float] = {}
    spent = {"seconds": 0.0}

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage in ("general", "fisher"):
            began.setdefault(stage, time.perf_counter())
            spent["seconds"] = time.perf_counter() - began[stage]

    general_phase.importance_file.write = keeping
    file = Path(args.out) / f"{args.train}-{method}.importance"
    try:
        importance(
            args.model,
            args.general,
            file,
            method=method,
            train=args.train,
            nsamples=args.nsamples,
            max_length=args.length,
            batch_size=batch,
            lr=args.lr,
            overwrite=True,
            progress=progress,
        )
    finally:
        general_phase.importance_file.write = write
    found = importance_file.read(file)
    about = found.about
    own = sum(c.codes.numel() for c in found.omega.values())
    anchor = sum(t.numel() * t.element_size() for t in found.anchor.values())
    return {
        "method": method,
        "train": args.train,
        "tokens": about["tokens"],
        "seconds": spent["seconds"],
        "importance_bytes": own,
        "anchor_bytes": anchor,
        "file_bytes": file.stat().st_size,
        "model_bytes": about["model_bytes"],
        "protected": about["protected"],
        "trainables": about["trainables"],
    }, kept


def codes(omega: dict[str, Tensor], moved: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """{form: error of the penalty, one minus the cosine of its gradient, elements lost and not finite}."""
    forms = {
        "8-bit logarithmic": lambda o: encode(o).dense,
        "half": lambda o: o.half().float(),
        "half, scaled": lambda o: (o / o.max() * 32768).half().float() * o.max() / 32768,
        "bfloat16": lambda o: o.bfloat16().float(),
    }
    found = {}
    for name, form in forms.items():
        exact = kept = cross = squares = other = 0.0
        lost = wild = 0
        for key, o in omega.items():
            c, d = form(o), moved[key].double()
            wild += int((~c.isfinite()).sum())
            lost += int(((c == 0) & (o > 0)).sum())
            c = torch.where(c.isfinite(), c, 65504.0).double()
            a, b = o.double() * d, c * d
            exact, kept = exact + float((a * d).sum()), kept + float((b * d).sum())
            cross, squares, other = (
                cross + float((a * b).sum()),
                squares + float((a * a).sum()),
                other + float((b * b).sum()),
            )
        angle = 1 - cross / math.sqrt(squares * other)
        found[name] = {"penalty_error": kept / exact - 1, "one_minus_cosine": angle, "lost": lost, "not_finite": wild}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--general", required=True)
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--train", default="lora")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.jsonl").open("a") as file:
        for method in ("path", "fisher"):
            told, omega = recorded(args, method, args.batch)
            if method == "path":
                program = frontends.load(args.model)
                found = importance_file.read(out / f"{args.train}-path.importance")
                space = general_phase.make_space(program, args.train, "all-linear", found.about["rank"], 0)
                moved = {n: space.value(n, found.anchor) - space.value(n) for n in space.layers}
                told["forms"] = codes(omega, moved)
                told["largest"] = max(float(o.max()) for o in omega.values())
            file.write(json.dumps(told) + "\n")
            print(json.dumps(told, indent=1), flush=True)


if __name__ == "__main__":
    main()

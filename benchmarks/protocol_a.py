"""Perplexity of every scheme under Protocol A: round-to-nearest and FlexRound on the reloaded, packed artefact.

    python benchmarks/protocol_a.py --calibration WIKITEXT2_VALID.txt --test WIKITEXT2_TEST.txt -o protocol_a

Demo model; calibration is the first 128 windows of 256 tokens of the one file, perplexity is over the first 40 windows
of 512 tokens of the other; block linears only. What is evaluated is the directory on disk, loaded again. A row that is
already in the output directory is not computed again.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import tpvc

SCHEMES = {"W4 per channel": (4, -1), "W4 g64": (4, 64), "W3 g64": (3, 64), "W2 g64": (2, 64)}


def figures(target: str | Path, args: argparse.Namespace) -> dict:
    """Perplexity of anything `tpvc.load` takes, and its divergence from the float model."""
    found = tpvc.measure(target, args.test, against=args.model, windows=40, seqlen=512)
    against = found["against"]
    return {"perplexity": found["perplexity"], "stderr": found["stderr"], "kl": against["kl"], "top1": against["top1"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, default=Path("protocol_a"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default="rtn,fast,default", help="rtn or recipes, with commas")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help=f"of {', '.join(SCHEMES)}, with commas")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    table = args.out / "results.json"
    rows = json.loads(table.read_text()) if table.exists() else {}

    def keep(name: str, row: dict) -> None:
        rows[name] = row
        table.write_text(json.dumps(rows, indent=1) + "\n")
        print(
            f"{name:32} perplexity {row['perplexity']:.2f}  KL {row['kl']:.4f}  {row.get('minutes', 0):.1f} min",
            flush=True,
        )

    if "float32" not in rows:
        keep("float32", figures(args.model, args))
    for scheme in args.schemes.split(","):
        bits, group = SCHEMES[scheme]
        for method in args.methods.split(","):
            name = f"{scheme} {method}" + (f" seed {args.seed}" if args.seed else "")
            if name in rows:
                continue
            began = time.perf_counter()
            artefact = tpvc.quantize(
                args.model,
                args.out / name.replace(" ", "-"),
                bits=bits,
                group=group,
                method="rtn" if method == "rtn" else "flexround",
                recipe="default" if method == "rtn" else method,
                dataset=str(args.calibration),
                head_bits=16,
                seed=args.seed,
                overwrite=True,
            )
            minutes = (time.perf_counter() - began) / 60
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            keep(name, {**figures(artefact, args), "minutes": minutes, "peak_gib_so_far": peak})


if __name__ == "__main__":
    main()

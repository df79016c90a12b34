"""What a domain costs in general knowledge: the whole curve over phi, for every method and ablation, several seeds.

    python benchmarks/finetune_tradeoff.py MODEL --domain FOLDER --general TEXT -o OUT [--train lora] [--table]

FOLDER holds train.txt, validation.txt and test.txt of the domain (or .jsonl). TEXT is general text, of which one part
is learned to record importance and another, behind it, is only measured; `self` is written by the model, which is what
a model that saw one kind of text knows. --other is general text of another kind that importance never saw.
Every run writes one line to OUT/results.jsonl; what is there is not run again.
--table prints the table and draws OUT/tradeoff-TRAIN.png.

Every method trains the same tensors for the same steps on the same batches, and keeps its best state by validation.
Importance is recorded once for each seed. The domain is measured by its test loss (nats a token), general knowledge by
perplexity. Of two curves the better one lies lower left.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import torch

from tpvc.compiler import frontends, interpret
from tpvc.compiler.finetune_pipeline import finetune, importance
from tpvc.compiler.ops import OPS
from tpvc.compiler.program import Program
from tpvc.compiler.sample import sample
from tpvc.compiler.tuning.examples import encode_examples, read_examples
from tpvc.compiler.tuning.general_phase import DTYPES
from tpvc.compiler.tuning.loss import score_answers
from tpvc.compiler.tuning.texts import holds_examples, windows
from tpvc.compiler.windows import encode

METHODS = {
    "plain": {"method": "plain"},
    "l2": {"method": "l2"},
    "ewc": {"method": "ewc"},
    "ours": {"method": "hierarchical"},
    "no layers": {"method": "hierarchical", "without": ["layers"]},
    "no elements": {"method": "hierarchical", "without": ["elements"]},
    "neither": {"method": "hierarchical", "without": ["elements", "layers"]},
}
FILES = {"ewc": "fisher", "hierarchical": "path"}


def general_texts(args: argparse.Namespace, program: Program, tokenizer) -> tuple[Path, Path]:
    """(learned, measured): two files."""
    paths = Path(args.out) / "general.txt", Path(args.out) / "measured.txt"
    if all(p.exists() for p in paths):
        return paths
    count = args.nsamples + args.measured
    if args.general == "self":
        rows = sample(program, tokenizer, count, args.length, 0).tolist()
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        parts = texts[: args.nsamples + 32], texts[args.nsamples + 32 :]  # decoding and encoding again loses some
        for path, part in zip(paths, parts, strict=True):
            path.write_text("\n".join(part))
    else:
        text = Path(args.general).read_text()
        ids = encode(tokenizer, text[: 8 * count * args.length])
        cut = len(tokenizer.decode(ids[: (args.nsamples + 8) * args.length]))
        paths[0].write_text(text[:cut])
        paths[1].write_text(text[cut : 2 * cut])
    return paths


def domain_file(folder: str, part: str) -> Path:
    return next(p for s in ("txt", "jsonl") if (p := Path(folder) / f"{part}.{s}").exists())


@torch.no_grad()
def measured(result: str | Path, args: argparse.Namespace, general: Path) -> dict[str, float]:
    """Test loss on the domain, and perplexity of general text and of the other, of a checkpoint."""
    program = frontends.load(result)
    tokenizer = frontends.tokenizer(program)
    weight = interpret.in_memory(program, dtype=DTYPES[args.dtype])
    test = domain_file(args.domain, "test")
    if holds_examples(test):
        examples = encode_examples(tokenizer, read_examples(test), args.length, program.facts.eos[0])[:256]
    else:
        examples = windows(program, tokenizer, test, args.length)[:256]
    domain = score_answers(program, weight, examples, 16, ops=OPS)
    found = {"domain": domain.loss, "exact": domain.exact}
    for name, path in (("general", general), ("other", args.other)):
        if path is not None:
            kept = windows(program, tokenizer, Path(path), args.length)[: args.measured]
            found[name] = math.exp(score_answers(program, weight, kept, 16, ops=OPS).loss)
    return found


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {json.loads(line)["key"] for line in lines}
    program = frontends.load(args.model)
    learned, kept = general_texts(args, program, frontends.tokenizer(program))
    how = {"train": args.train, "lr": args.lr, "batch_size": args.batch, "max_length": args.length, "dtype": args.dtype}

    def note(key: str, record: dict) -> None:
        with results.open("a") as file:
            file.write(json.dumps({"key": key, **record}) + "\n")
        print(key, {k: round(v, 4) for k, v in record.items() if isinstance(v, float)}, flush=True)

    if "base" not in done:
        note("base", {"name": "base", **measured(args.model, args, kept)})
    for seed in range(args.seeds):
        for name, options in METHODS.items():
            if name not in args.methods.split(","):
                continue
            file = None
            if (kind := FILES.get(options["method"])) is not None:
                file = out / f"{args.train}-{kind}-{seed}.importance"
                if not file.exists():
                    general = how | {"lr": args.general_lr}
                    importance(args.model, learned, file, method=kind, seed=seed, nsamples=args.nsamples, **general)
            for phi in [None] if name == "plain" else map(float, args.phis.split(",")):
                key = f"{args.train}|{name}|{phi}|{seed}"
                if key in done:
                    continue
                result = finetune(
                    args.model,
                    domain_file(args.domain, "train"),
                    out / f"work-{args.train}",
                    validation=domain_file(args.domain, "validation"),
                    importance=file,
                    phi=phi,
                    steps=args.steps,
                    merge=args.train != "weights",
                    seed=seed,
                    overwrite=True,
                    **(how if file is None else {k: v for k, v in how.items() if k != "train"}),
                    **options,
                )
                told = json.loads((result / "tpvc.json").read_text())
                record = {"train": args.train, "name": name, "phi": phi, "seed": seed, "ratio": told["ratio"]["middle"]}
                note(key, {**record, "step": told["kept_step"], **measured(result, args, kept)})


def table(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in (Path(args.out) / "results.jsonl").read_text().splitlines()]
    base = next(r for r in records if r["name"] == "base")
    own = [r for r in records if r.get("train") == args.train]
    kinds = [k for k in ("domain", "general", "other") if k in base]
    print(f"{args.train}: before, {', '.join(f'{k} {base[k]:.3f}' for k in kinds)}\n")
    print(f"| | phi | penalty / loss | {' | '.join(kinds)} |\n|---|---|---|{'---|' * len(kinds)}")
    figure, axes = pyplot.subplots(figsize=(7, 5))
    for name in METHODS:
        points = []
        for phi in sorted({r["phi"] for r in own if r["name"] == name}, key=lambda p: p or 0):
            group = [r for r in own if r["name"] == name and r["phi"] == phi]
            means = [_mean([r[k] for r in group]) for k in kinds]
            told = " | ".join("{:.3f} ± {:.3f}".format(*mean) for mean in means)
            ratio = statistics.mean(r["ratio"] or 0 for r in group)
            cells = [name, "" if phi is None else f"{phi:g}", f"{ratio:.3f}"]
            print(f"| {' | '.join(cells)} | {told} |")
            points.append((means[0][0], means[1][0]))
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
    axes.set_xlabel("domain, test loss (nats a token)")
    axes.set_ylabel("general perplexity")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(Path(args.out) / f"tradeoff-{args.train}.png", dpi=120)
    print()
    for kind in kinds[1:]:
        _at_equal_domain(own, kind)


def _mean(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _at_equal_domain(own: list[dict], kind: str) -> None:
    """Perplexity of every method where its curve has the same domain loss: between two values of phi the logarithm of
    perplexity is a straight line over the loss. Seeds apart, then their mean."""
    names = [n for n in METHODS if n != "plain" and any(r["name"] == n for r in own)]
    if not names:
        return
    seeds = sorted({r["seed"] for r in own})
    curves = {
        (n, s): sorted((r["domain"], math.log(r[kind])) for r in own if r["name"] == n and r["seed"] == s)
        for n in names
        for s in seeds
    }
    low = max(c[0][0] for c in curves.values() if c)
    high = min(c[-1][0] for c in curves.values() if c)
    if not low < high:
        return
    levels = [low + (high - low) * f for f in (0.1, 0.3, 0.5, 0.7, 0.9)]
    print(f"Perplexity at equal domain loss, {kind} text\n")
    print(f"| domain loss | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for level in levels:
        cells = []
        for name in names:
            values = [math.exp(_between(curves[name, s], level)) for s in seeds if curves[name, s]]
            cells.append("{:.3f} ± {:.3f}".format(*_mean(values)))
        print(f"| {level:.3f} | {' | '.join(cells)} |")


def _between(curve: list[tuple[float, float]], level: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= level <= x1:
            return y0 + (y1 - y0) * (level - x0) / (x1 - x0 or 1)
    raise ValueError(level)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--domain", required=True)
    parser.add_argument("--general", default="self")
    parser.add_argument("--other")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--train", default="lora")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--phis", default="0.03,0.3,3,30,300")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--general-lr", type=float, help="Of recording importance; without it the default.")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Of training and of what is measured.")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--nsamples", type=int, default=400, help="Windows of general text, to record importance on.")
    parser.add_argument("--measured", type=int, default=100, help="Windows of general text that are measured.")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        run(args)
    table(args)


if __name__ == "__main__":
    main()

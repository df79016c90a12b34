"""Decode speed and perplexity of our ONNX folder beside the one that onnxruntime-genai's own builder makes, and torch.

    python benchmarks/cpu_decode.py ARTEFACT... --text WIKITEXT2_TEST.txt -o cpu_decode

Each ARTEFACT is a directory that `tpvc quantize` made from MODEL. From the same float checkpoint the builder makes its
default int4 CPU folder. All of them and torch float32 are then measured in one run, turn by turn; perplexity is what
each folder's own runtime computes on the first 40 windows of 512 tokens. The float model in transformers' own
`generate` is measured right after, in a process of its own, so that torch is not represented by our loop alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import tpvc
from tpvc.compiler import frontends
from tpvc.compiler.backends import huggingface
from tpvc.compiler.bench import bench, chart


def builder_folder(model: str, out: Path) -> Path:
    """The builder's own int4 CPU folder of the float model."""
    folder, float_dir = out / "builder-int4", out / "float32"
    if not folder.exists():
        program = frontends.load(model)
        if not float_dir.exists():
            float_dir.mkdir(parents=True)
            huggingface.emit(program, float_dir, frontends.tokenizer(program), {})
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", float_dir, "-o", folder]
        command += ["-p", "int4", "-e", "cpu", "-c", out / "cache"]
        subprocess.run([str(c) for c in command], check=True, capture_output=True)
    return folder


TRANSFORMERS = """
import sys, time, torch
from statistics import median
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.randint(3, 1000, (1, 128), generator=torch.Generator().manual_seed(0))
def seconds(n):
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    return time.perf_counter() - began
seconds(4)
print(median(63 / (seconds(64) - seconds(1)) for _ in range(int(sys.argv[3]))))
"""


def transformers_decode(float_dir: Path, threads: int, runs: int) -> float:
    """Median decode tokens/s of transformers' generate in float32: 64 tokens after a prompt of 128."""
    command = [sys.executable, "-c", TRANSFORMERS, str(float_dir), str(threads), str(runs)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefacts", nargs="*")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, default=Path("cpu_decode"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    targets = [args.model, str(builder_folder(args.model, args.out))]
    for artefact in args.artefacts:
        folder = args.out / f"{Path(artefact).name}-onnx"
        targets.append(str(tpvc.export(artefact, folder, overwrite=True)))
    rows = bench(targets, prompt_tokens=128, new_tokens=64, runs=args.runs, threads=args.threads)
    theirs = transformers_decode(args.out / "float32", args.threads, args.runs)
    print(f"{'transformers generate, float32':40} decode {theirs:7.1f} tok/s", flush=True)
    found = []
    for row in rows:
        quality = tpvc.measure(row.target, args.text, windows=40, seqlen=512, threads=args.threads)
        found.append({**asdict(row), **quality})
        ratio = row.decode / rows[0].decode, row.decode / rows[1].decode
        print(
            f"{row.target:40} decode {row.decode:7.1f} tok/s ({ratio[0]:.2f} x torch, {ratio[1]:.2f} x builder)"
            f"  prefill {row.prefill:7.1f} tok/s  {row.size / 1e6:6.1f} MB  perplexity {quality['perplexity']:.2f}",
            flush=True,
        )
    (args.out / "results.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    chart(rows, args.out / "bench.png")


if __name__ == "__main__":
    main()

"""`tpvc quantize`: a checkpoint in, a quantised checkpoint out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from shlex import quote
from typing import Any

import click

from tpvc.compiler import units
from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import cache_option, check_device, named_directories, quantize_options
from tpvc.compiler.errors import TpvcError

SCHEME = re.compile(r"W(\d+)A(16|8|FP8)(_ASYM)?", re.IGNORECASE)
ACTIVATIONS = {"16": None, "8": "int8", "FP8": "fp8"}
"""What a scheme calls activations in float, and rounded per token."""


def grid_options(
    scheme: str | None,
    bits: int | None,
    group_size: int | None,
    symmetric: bool | None,
    activations: str | None = None,
    avg_bits: float | None = None,
) -> dict[str, Any]:
    """{"bits", "group", "symmetric", "activations"} and where it was given "avg_bits" from what was typed.

    TpvcError when it contradicts itself or is out of range.
    """
    if scheme is not None:
        match = SCHEME.fullmatch(scheme)
        if match is None:
            raise TpvcError(
                f"unknown scheme '{scheme}': expected W2A16 to W8A16 (weights of 2 to 8 bits, float activations), "
                "W2A8 to W8A8 (activations in int8) or W2AFP8 to W4AFP8, each also with _ASYM (zero points); "
                "or use --bits"
            )
        if bits is not None and bits != int(match[1]):
            raise TpvcError(f"--scheme {scheme} and --bits {bits} contradict each other; give one of them")
        kind = ACTIVATIONS[match[2].upper()]
        if activations is not None and activations.removesuffix("-static") != kind:
            typed = f"--activations {activations}"
            raise TpvcError(f"--scheme {scheme} and {typed} contradict each other; give one of them")
        activations, named = activations or kind, match[3] is None
        if symmetric is not None and symmetric != named:
            typed = "--sym" if symmetric else "--asym"
            raise TpvcError(f"--scheme {scheme} and {typed} contradict each other; give one of them")
        bits, symmetric = int(match[1]), named
    if avg_bits is not None and bits is not None:
        typed = f"--bits {bits}" if scheme is None else f"--scheme {scheme}"
        raise TpvcError(f"{typed} and --avg-bits {avg_bits:g} contradict each other; give one of them")
    bits = 4 if bits is None and avg_bits is None else bits
    if bits is not None and not 2 <= bits <= 8:
        raise TpvcError(f"found {bits} bits, expected 2 to 8; choose with --bits or --scheme")
    if group_size is not None and group_size < -1:
        raise TpvcError(
            f"found group size {group_size}, expected a positive number, -1 (one scale per output channel) "
            "or 0 (one scale per tensor)"
        )
    found = {"bits": bits, "group": group_size, "symmetric": bool(symmetric), "activations": activations}
    return found if avg_bits is None else {**found, "avg_bits": avg_bits}


@click.command(
    "quantize",
    epilog="""\b
Examples:
  tpvc quantize smollm2-135m -o smollm2-w4
  tpvc quantize ./Qwen2.5-0.5B -o qwen-w3 --bits 3 --group-size 64 --recipe best
  tpvc quantize ./Qwen2.5-0.5B -o qwen-mixed --avg-bits 3.5    2, 3, 4 or 8 bits, each where it pays
  tpvc quantize model.gguf -o out --bits 4 --group-size -1 --dataset my_texts.jsonl
  tpvc quantize ./Llama -o llama-w8a8 --scheme W8A8      activations in int8, per token
  tpvc quantize ./Llama -o llama-w8a8 --scheme W8A8 --activations int8-static    per tensor where it costs little
  tpvc quantize ./Llama -o llama-kv8 --cache int8        keys and values in int8
  tpvc quantize ./gpt2 -o gpt2-rtn --method rtn          the baseline, in seconds
  tpvc quantize MODEL -o out --road a=./a --road b=./b   one integer base under two adapters
  tpvc quantize MODEL -o out --road a=./a --fold         one adapter, in the integers
  tpvc quantize MODEL -o out --prompt a=./a --prompt b=./b   and under two soft prompts
  torchrun --nproc-per-node 2 --no-python tpvc quantize MODEL -o out   calibration windows shared by two processes

\b
OUT is a checkpoint that transformers loads as it stands (compressed-tensors), with tpvc.json
(what was done, to what, with which hashes) and report.html (error of every block).
A run that was interrupted goes on after its last finished block when the same command is
given again; the same command gives the same bytes.
A model without a chat template answers to `tpvc run OUT "Hello" --raw`.

\b
Records of --dataset have text, prompt and completion, or messages; a table without these is read
by its first column of text. A data set by name is NAME or NAME:CONFIG, split train. Where builtin
is too short (it holds some 170 windows of 256 tokens) the model writes the rest.
""",
)
@click.argument("model")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@quantize_options
@cache_option(
    "Round keys and values to 8 bits while the model runs, a scale for every head of a token; a triton package keeps"
    " them so.  [default: they stay in float]"
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if tpvc wrote it.")
@console.json_option
def command(
    model: str,
    out: Path,
    scheme: str | None,
    bits: int | None,
    avg_bits: float | None,
    group_size: int | None,
    symmetric: bool | None,
    activations: str | None,
    head_bits: str,
    road: tuple[str, ...],
    prompt: tuple[str, ...],
    iters: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Quantise MODEL block by block.

    FlexRound learns how to round every weight so that the output of its block changes least.
    """
    grid = grid_options(scheme, bits, group_size, symmetric, activations, avg_bits)
    check_device(options["device"])

    from tpvc.compiler.bench import peak_bytes
    from tpvc.compiler.pipeline import quantize
    from tpvc.compiler.progress import silent
    from tpvc.compiler.tuning.parallel import is_first

    options |= {**grid, "head_bits": int(head_bits), "steps": iters, "roads": named_directories("--road", road)}
    options["prompts"] = named_directories("--prompt", prompt)
    try:
        with console.Bars() as bars:
            progress = bars if is_first() else silent
            _, took = console.measured(lambda: quantize(model, out, progress=progress, **options))
    except KeyboardInterrupt as interrupt:
        raise click.Abort("interrupted; the same command goes on after the last finished block") from interrupt
    if not is_first():
        return
    manifest = json.loads((out / "tpvc.json").read_text(encoding="utf-8"))
    if as_json:
        console.print_json({"directory": str(out), "seconds": took, "peak_bytes": peak_bytes(), "manifest": manifest})
    else:
        summary(out, manifest, took, peak_bytes())


def summary(out: Path, manifest: dict[str, Any], took: float, peak: int) -> None:
    """What was made, in a few lines."""
    show = console.out().print
    blocks = [b for b in manifest.get("blocks", []) if b.get("error_rtn")]
    typed = quote(str(out))
    show(console.written(out, took, f"at most {units.size(peak)} of memory"))
    sizes = manifest.get("size", {})
    if sizes.get("float_bytes"):
        ratio = sizes["float_bytes"] / sizes["bytes"]
        before = units.size(sizes["float_bytes"])
        show(f"  weights   {units.size(sizes['bytes'])}, {ratio:.1f} times smaller than {before}")
    if chosen := manifest.get("chosen_bits"):
        counts = Counter(g["bits"] for g in chosen["groups"])
        told = ", ".join(f"{bits} in {counts[bits]}" for bits in sorted(counts))
        show(
            f"  bits      {chosen['taken']:.3f} a weight, {chosen['codes']:.3f} of them codes; {told} groups of linears"
        )
    if blocks:
        rtn, now = (sum(b[k] for b in blocks) / len(blocks) for k in ("error_rtn", "error"))
        show(f"  error     {now:.4g} of a block's output on average; round-to-nearest {rtn:.4g}")
    if closing := next((p["checks"] for p in manifest.get("passes", []) if p.get("checks")), None):
        least = min(kl for _, kl in closing)
        show(f"  closing   {closing[0][1]:.4g} to {least:.4g} nats a token between its logits and the float model's")
    for adapter in manifest.get("adapters", []):
        show(f"  adapter   {adapter['name']}: tpvc run {typed} --adapter {adapter['name']}", markup=False)
    for task in manifest.get("prompts", []):
        show(f'  task      {task["name"]}: tpvc run {typed} --task {task["name"]} --raw "..."', markup=False)
    for left in manifest.get("left_in_float", []):
        show(f"  in float  {left['name']}: {left['why']}", markup=False)
    for note in manifest.get("notes", []):
        show(f"  note      {note}", markup=False)
    show(f"  report    {out / 'report.html'}", markup=False)
    export = f"tpvc export {typed} --to onnx -o {quote(f'{out}-onnx')}"
    show(f"  next      {console.run_command(out)}    or    {export}", markup=False)

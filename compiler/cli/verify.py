"""`tpvc verify`: what was written, read again and held against what it was made of."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby

import click

from tpvc.compiler.cli import console


@click.command(
    "verify",
    epilog="""\b
Examples:
  tpvc verify smollm2-w4 smollm2-onnx                 integers, hashes, and logits of a short text
  tpvc verify smollm2-w4 smollm2-onnx smollm2-gptq smollm2-gpu
  tpvc verify llama-8b-w4 llama-8b-onnx --no-logits   reads the weights, computes nothing

\b
The first TARGET that is a model (an artefact, a checkpoint of compressed-tensors, GPTQ, AWQ or
AutoRound, a .gguf file) is the reference; exported folders are compared with it. Each is read as its
own format says: files must have the hashes of tpvc.json, integers must be the same bit for bit, and
logits those of the interpreter within a tolerance that is derived, not tuned. The first difference
ends with one sentence that names the number, and exit code 2. What cannot be shown, for instance
because no runtime is installed, is listed as not proven.
""",
)
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--no-logits", is_flag=True, help="Compare files and numbers alone.")
@console.json_option
def command(targets: tuple[str, ...], no_logits: bool, as_json: bool) -> None:
    """Prove that folders hold the same model."""
    from tpvc.compiler.verification import verify

    with console.Bars() as bars:
        found = verify(targets, logits=not no_logits, progress=bars)
    if as_json:
        return console.print_json({"findings": [asdict(finding) for finding in found]})
    show = console.out().print
    order = list(dict.fromkeys(finding.target for finding in found))
    by_target = sorted(found, key=lambda finding: order.index(finding.target))
    for target, own in groupby(by_target, key=lambda finding: finding.target):
        findings = list(own)
        show(f"[bold]{console.literal(target)}[/]: {findings[0].kind}")
        for finding in findings:
            word = "[green]proven[/]    " if finding.proven else "[yellow]not proven[/]"
            show(f"  {word}  {finding.subject:<8} ", end="")
            show(finding.said, markup=False)

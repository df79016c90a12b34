"""`tpvc export`: an artefact in, a folder for a runtime out."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote

import click

from tpvc.compiler import units
from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import TO, cache_option, export_options, named_directories


@click.command(
    "export",
    epilog="""\b
Examples:
  tpvc quantize smollm2-135m -o smollm2-w4
  tpvc export smollm2-w4 --to onnx -o smollm2-onnx
  tpvc export smollm2-w4 --to onnx -o smollm2-exact --portable --accuracy-level 0
  tpvc export smollm2-w4 --to onnx -o tasks --road a=./a --road b=./b
  tpvc export smollm2-w4 --to onnx -o tasks --prompt a=./a --prompt b=./b
  tpvc export smollm2-w4 --to onnx -o only-a --prompt a=./a --task a
  tpvc export someone-elses-gptq --to onnx -o onnx
  tpvc export smollm2-w4 --to gptq -o smollm2-gptq
  tpvc export smollm2-w4 --to triton --target cuda:80,cuda:90 -o smollm2-gpu

\b
An onnx folder runs in stock ONNX Runtime GenAI (MatMulNBits, GroupQueryAttention, a shared
key/value buffer). Accuracy level 4 rounds activations to 8 bits inside each product and is
the fast one on CPUs; level 0 computes in float32 and gives the interpreter's tokens.
A model without a chat template answers to `tpvc run OUT "Hello" --raw`.

\b
Soft prompts become rows of their own for ids from vocab_size on; `tpvc run OUT --task NAME`, or
any client of GenAI, feeds them before the text, each row its own. With --task one prompt becomes
keys and values in the graph: it costs no prefill, and callers feed text alone.

\b
A triton package holds the steps, one packed copy of the weights, and machine code for the named
GPUs, compiled here without any; what runs it needs neither Triton nor a compiler. Without a GPU
`tpvc run` computes its kernels' references. An export that was interrupted goes on after its last
finished kernel when the same command is given again.

\b
A vllm folder holds the same integers as the artefact, with asymmetric zero points packed and a
tied head untied, as vLLM's loader expects and transformers refuses. So do gptq, gptq_v2 and awq
folders, in those formats, with embedding and head in float.

\b
Whatever was written is read again and compared with ARTEFACT, number by number, before it appears
under its name; `tpvc verify ARTEFACT OUT` compares hashes and logits too.
""",
)
@click.argument("artefact")
@click.option(
    "--to",
    type=TO,
    default="onnx",
    show_default=True,
    help="The runtime's format.",
)
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--road", "road", multiple=True, metavar="NAME=DIR", help="A RoAd adapter to carry along; may be repeated."
)
@click.option(
    "--prompt", "prompt", multiple=True, metavar="NAME=DIR", help="A soft prompt to carry along; may be repeated."
)
@export_options
@cache_option("Of a triton package: keys and values in 8 bits.  [default: as ARTEFACT was quantised, or 16 bits]")
@click.option("--overwrite", is_flag=True, help="Replace OUT if tpvc wrote it.")
@console.json_option
def command(
    artefact: str,
    to: str,
    out: Path,
    portable: bool,
    accuracy_level: str | None,
    road: tuple[str, ...],
    prompt: tuple[str, ...],
    task: str | None,
    form: str,
    targets: str,
    cache: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compile ARTEFACT for a runtime.

    Any MODEL will do; one that is not quantised is exported in float.
    """
    from tpvc.compiler.export_pipeline import export

    try:
        with console.Bars() as bars:
            _, took = console.measured(
                lambda: export(
                    artefact,
                    out,
                    to=to,
                    portable=portable,
                    accuracy_level=None if accuracy_level is None else int(accuracy_level),
                    roads=named_directories("--road", road),
                    prompts=named_directories("--prompt", prompt),
                    task=task,
                    form=form,
                    targets=targets,
                    cache=cache,
                    overwrite=overwrite,
                    progress=bars,
                )
            )
    except KeyboardInterrupt as interrupt:
        then = "the same command goes on after the last finished kernel" if to == "triton" else "nothing was written"
        raise click.Abort(f"interrupted; {then}") from interrupt
    files = {f.relative_to(out).as_posix(): f.stat().st_size for f in sorted(out.rglob("*")) if f.is_file()}
    notes = json.loads((out / "tpvc.json").read_text(encoding="utf-8")).get("notes", [])
    if as_json:
        return console.print_json({"directory": str(out), "seconds": took, "files": files, "notes": notes})
    show = console.out().print
    show(console.written(out, took))
    binaries = {name: count for name, count in files.items() if name.startswith("kernels/")}
    for name, count in files.items():
        if name not in binaries:
            show(f"  {units.size(count):>9}  {name}")
    if binaries:
        show(f"  {units.size(sum(binaries.values())):>9}  kernels/: {len(binaries) - 1} binaries and their manifest")
    for note in notes:
        show(f"  note: {note}", markup=False)
    if to == "triton" or "genai_config.json" in files:  # a portable graph alone is for other runtimes
        bench = f"tpvc bench {quote(str(out))} {quote(str(artefact))}"
        show(f"  next: {console.run_command(out)}    or    {bench}", markup=False)

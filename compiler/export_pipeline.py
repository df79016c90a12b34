"""The second half of the way: artefact -> Program -> backend -> a folder for a runtime. Read `export`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import tpvc
from tpvc.compiler import frontends
from tpvc.compiler.backends import huggingface
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.identity import run_identity, versions
from tpvc.compiler.output import ARTEFACT, BLOCKS, MANIFEST, check_apart, check_free, published
from tpvc.compiler.program import prompt_ids, rounded_cache
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.sha256 import sha256
from tpvc.compiler.store import BlockStore
from tpvc.compiler.verification import check_written
from tpvc.compiler.verify import verify
from tpvc.kernels.targets import parse
from tpvc.passes.fold_prompt import FoldPrompt
from tpvc.passes.reorder import check_order


def check_wishes(
    to: str | None, portable: bool, accuracy_level: int | None, task: str | None, form: str, targets: str
) -> None:
    """Refuse what a runtime's folder cannot have, before anything is read. to: None: of all of them."""
    if to is not None and to not in EXPORTS:
        raise TpvcError(f"export target is '{to}'; expected one of {', '.join(EXPORTS)}")
    if targets and to not in (None, "triton"):
        raise TpvcError(f"found '{targets}' as --target of a {to} folder; triton takes GPUs by name, others none")
    if portable and to not in (None, "onnx"):
        raise TpvcError(f"a portable twin was asked for beside a {to} folder; only onnx has one")
    if accuracy_level is not None and to not in (None, "onnx"):
        raise TpvcError(f"accuracy level {accuracy_level} was asked of a {to} folder; only onnx has one")
    if targets:
        parse(targets)  # an unknown one is refused
    if task is not None and to not in (None, "onnx"):
        raise TpvcError(f"a prompt was to be folded into a {to} folder; only onnx has a graph that can hold it")
    if task is None and form != "kv":
        raise TpvcError(f"the form '{form}' was named without a prompt to fold; name one with --task, or no form")


CHECKPOINTS = ("vllm", "gptq", "gptq_v2", "awq")
EXPORTS = ("onnx", "triton", *CHECKPOINTS)
"""What `export` writes, and which of it are checkpoints."""


def export(
    artefact: str | Path,
    out: str | Path,
    *,
    to: str = "onnx",
    portable: bool = False,
    accuracy_level: int | None = None,
    roads: Mapping[str, str | Path] | None = None,
    prompts: Mapping[str, str | Path] | None = None,
    task: str | None = None,
    form: str = "kv",
    targets: str = "",
    cache: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write `artefact` (or any MODEL, in float) for a runtime.

    to              "onnx": a folder that stock ONNX Runtime GenAI runs; "vllm": the same checkpoint with zero points
                    and a tied head laid out as vLLM expects, which transformers cannot read; "gptq", "gptq_v2", "awq":
                    the same integers as a checkpoint of that format; "triton": a package of kernels compiled for
                    `targets`, such as "cuda:80,cuda:90,hip:gfx942"
    accuracy_level  of MatMulNBits: 4 (None) rounds activations to int8 per block and is quick; 0 computes in float32
    portable        also write a twin in standard ONNX operators
    cache           of a triton package: "int8" keeps keys and values in 8 bits; None: in the 16 bits of the kernels, or
                    in 8 where the artefact was quantised for that
    roads           {name: PEFT directory} of RoAd adapters to be carried along, for a model that has none yet
    prompts         {task: PEFT directory} of soft prompts to be carried along, likewise: virtual tokens for the caller
    task, form      one of the prompts to be folded in, so that the caller feeds text alone: see tpvc.passes.fold_prompt
    """
    out = Path(out)
    check_wishes(to, portable, accuracy_level, task, form, targets)
    if to == "triton" and not targets:
        raise TpvcError("found no --target; triton takes GPUs by name, such as cuda:80,hip:gfx942")
    if cache is not None and (to != "triton" or cache != "int8"):
        raise TpvcError(f"a cache of '{cache}' was asked of a {to} folder; only triton has one of int8")
    accuracy_level = 4 if accuracy_level is None else accuracy_level
    for given in (artefact, *(roads or {}).values(), *(prompts or {}).values()):
        check_apart(out, given)
    check_free(out, overwrite)
    progress("export", 0, 1, str(artefact))
    program = frontends.with_roads(frontends.load(artefact, integers=True), roads or {})
    program = frontends.with_prompts(program, prompts or {})
    carried = program.prompts
    if task is not None:
        prompt_ids(program, task)  # an unknown one is refused
        folding = FoldPrompt(next(p for p in carried if p.name == task), form)
        program = verify(folding(program), after="FoldPrompt")
    tokenizer = frontends.tokenizer(program)
    if to == "triton":
        cache = cache or rounded_cache(program)
    manifest = {
        "tpvc": tpvc.__version__,
        "artefact": to,
        "source": {"name": program.source.name, "files": program.source.files},
        "options": {"to": to},
        "adapters": [a.record for a in program.adapters],
        "prompts": [{**p.record, "first_id": prompt_ids(program, p.name)[0]} for p in program.prompts],
    }
    if task is not None:
        manifest["folded"] = {"form": form, **next(p.record for p in carried if p.name == task)}
    if (made := frontends.manifest(program)) is not None:
        manifest["source"]["manifest"] = {key: value for key, value in made.items() if key != "blocks"}
        manifest |= {"divided": made["divided"]} if "divided" in made else {}
    with published(out, overwrite, resumable=to == "triton") as work:
        folder = work / ARTEFACT
        if to in CHECKPOINTS:
            huggingface.emit(program, folder, tokenizer, manifest, runtime=to)
        elif to == "triton":
            from tpvc.compiler.backends import triton
            from tpvc.compiler.backends.triton.model import activation_dtype
            from tpvc.kernels import aot

            check_order(program, "a Triton package")
            dtype = activation_dtype(program)
            kept = None if cache is None else torch.int8
            brought = {"adapters": manifest["adapters"], "prompts": manifest["prompts"]}
            identity = {**run_identity(program), **aot.identity(), **brought, "to": to, "targets": targets}
            store = BlockStore.open(work / BLOCKS, {**identity, "cache": cache}, replace=overwrite)
            triton.emit(program, folder, tokenizer, parse(targets), dtype, kept, store=store, progress=progress)
            manifest["options"] |= {"targets": targets, "cache": cache}
            _write_manifest(folder, manifest, "torch", "triton")
        else:
            from tpvc.compiler.backends import onnx

            if rounded_cache(program):
                manifest["notes"] = [huggingface.float_cache_note("the graph")]
            onnx.emit(program, folder, tokenizer, accuracy_level=accuracy_level, portable=portable)
            manifest["options"] |= {"portable": portable, "accuracy_level": accuracy_level}
            _write_manifest(folder, manifest, "onnx", "onnxruntime", "onnxruntime-genai", "onnx-ir")
        program.source.check_unchanged()
        check_written(folder, program, progress)
    progress("export", 1, 1, str(out))
    return out


def _write_manifest(folder: Path, manifest: dict[str, Any], *packages: str) -> None:
    """tpvc.json of an exported folder, with the hashes of all its files."""
    manifest["files"] = {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest["versions"] = versions(*packages)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")

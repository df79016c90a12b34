"""Program -> a Hugging Face checkpoint with integer weights: compressed-tensors, which transformers loads as it stands,
GPTQ or AWQ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tpvc.compiler.adapters import prompt_files, road_files
from tpvc.compiler.backends.huggingface import awq, gptq
from tpvc.compiler.backends.huggingface.layout import float_cache_note as float_cache_note
from tpvc.compiler.backends.huggingface.layout import layout
from tpvc.compiler.backends.huggingface.stream import write
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import ADAPTERS, PROMPTS
from tpvc.compiler.program import Program
from tpvc.compiler.sha256 import sha256

PACKED = {
    "gptq": lambda program: gptq.layout(program, 1),
    "gptq_v2": lambda program: gptq.layout(program, 2),
    "awq": awq.layout,
}
"""Formats that are not compressed-tensors."""


def emit(
    program: Program, directory: Path, tokenizer: Any, manifest: dict, *, runtime: str = "transformers"
) -> list[str]:
    """Write the checkpoint of `program` into the empty or new `directory`; returns what a reader has to know.

    model.safetensors, or shards of 5 GB and their index; config.json with `quantization_config`; the tokenizer's files
    (none when `tokenizer` is None); generation_config.json, the source's own or made from its special tokens; and
    tpvc.json: `manifest` with notes, the bytes of the weights and the hashes of all files filled in. Adapters go to
    `adapters/NAME`, prompts to `prompts/NAME`, in PEFT's format. The same input gives the same bytes.

    runtime  "transformers" (with compressed-tensors) loads every grid; "vllm" gives asymmetric zero points and tied
             integer heads the layout that vLLM expects and transformers 5.23 refuses; or a key of `PACKED`.
    """
    plan = PACKED[runtime](program) if runtime in PACKED else layout(program, runtime)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = write(directory, plan.pieces)
        _json(directory / "config.json", plan.config)
        _generation(program, directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        for adapter in program.adapters:
            road_files.write(adapter, directory / ADAPTERS / adapter.name, program, {"origin": dict(adapter.origin)})
        for prompt in program.prompts:
            about = prompt_files.about(program)
            prompt_files.write(prompt, directory / PROMPTS / prompt.name, about, {"origin": dict(prompt.origin)})
        if program.source is not None:
            program.source.check_unchanged()
        size = {**manifest.get("size", {}), "bytes": sum(files.values())}
        hashes = {p.relative_to(directory).as_posix(): sha256(p) for p in sorted(directory.rglob("*")) if p.is_file()}
        _json(directory / "tpvc.json", {**manifest, "size": size, "notes": list(plan.notes), "files": hashes})
    except OSError as error:
        reason = error.strerror or error
        raise TpvcError(f"cannot write to '{directory}': {reason}; free some space or choose another -o") from error
    return list(plan.notes)


def _generation(program: Program, directory: Path) -> None:
    given = program.source.directory / "generation_config.json"
    if program.source.gguf is None and given.is_file():
        shutil.copyfile(given, directory / given.name)
        return
    facts = program.facts
    ids = {"bos_token_id": facts.bos, "eos_token_id": list(facts.eos), "pad_token_id": facts.pad}
    if len(facts.eos) == 1:
        ids["eos_token_id"] = facts.eos[0]
    _json(directory / given.name, {k: v for k, v in ids.items() if v not in (None, [])})


def _json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

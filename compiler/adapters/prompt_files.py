"""Soft prompts as PEFT's directories (PROMPT_TUNING), and beside them what a task prompt vector needs.

    adapter_config.json, adapter_model.safetensors   what PEFT loads: one tensor `prompt_embeddings` [n, D]
    start.safetensors                                `start` [n, D], float32: the values it was tuned from; PEFT keeps
                                                     neither them nor the seed, and does not look at this file
    tpvc.json                                        how it was made, and fingerprints of base and tokenizer

Prefix tuning, p-tuning and multitask prompt tuning store a tensor of the same name that means something else. They are
refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tpvc.compiler.adapters import peft_directory
from tpvc.compiler.adapters.peft_directory import CONFIG, WEIGHTS
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.weights import FLOATS, read_json
from tpvc.compiler.output import MANIFEST
from tpvc.compiler.program import Program
from tpvc.compiler.sha256 import sha256

START = "start.safetensors"
TENSOR, START_TENSOR = "prompt_embeddings", "start"
WHAT = "a soft prompt"
SHOWN = 4
"""Names of tensors in an error: a model's file has hundreds."""


def read(directory: str | Path, name: str) -> Prompt:
    """The prompt in `directory`, ours or PEFT's, called `name`; values and start as float32.

    TpvcError, one sentence, for whatever is not a whole prompt of finite numbers for a decoder.
    """
    directory = Path(directory)
    config = _config(directory)
    values = tensor(directory / WEIGHTS, TENSOR)
    rows, width = config.get("num_virtual_tokens"), config.get("token_dim")
    if tuple(values.shape) != (rows, width):
        raise TpvcError(
            f"{directory / WEIGHTS} holds {values.shape[0]} vectors of {values.shape[1]} numbers, {CONFIG} says"
            f" num_virtual_tokens = {rows!r} and token_dim = {width!r}; use an intact copy"
        )
    start = None
    if (directory / START).is_file():
        start = tensor(directory / START, START_TENSOR)
        if start.shape != values.shape:
            raise TpvcError(
                f"{directory / START} holds {list(start.shape)} numbers, the prompt {list(values.shape)}; use an intact"
                " copy"
            )
    origin: dict[str, Any] = {"directory": peft_directory.named(directory), "sha256": sha256(directory / WEIGHTS)}
    base, tokenizer = _prints(directory)
    return Prompt(name, values, start, base, tokenizer, origin)


def made(directory: str | Path) -> dict[str, Any]:
    """The tpvc.json of a prompt's directory; empty for a directory of PEFT's own."""
    path = Path(directory) / MANIFEST
    return read_json(path) if path.is_file() else {}


def _config(directory: Path) -> dict[str, Any]:
    path, config = directory / CONFIG, peft_directory.read_config(directory, "PROMPT_TUNING", WHAT)
    if config.get("task_type") not in ("CAUSAL_LM", None) or config.get("num_transformer_submodules") not in (1, None):
        raise TpvcError(
            f"{path} has task_type = {config.get('task_type')!r} with {config.get('num_transformer_submodules')} parts;"
            " expected 'CAUSAL_LM', a prompt of a decoder"
        )
    return config


def tensor(path: Path, *names: str) -> Tensor:
    """float32 [n, D] from a safetensors file, in which it has one of these names."""
    found = peft_directory.open_tensors(path, WHAT)
    known = [name for name in names if name in found]
    if len(known) != 1:
        some = sorted(found)[:SHOWN] + ([f"{len(found) - SHOWN} more"] if len(found) > SHOWN else [])
        raise TpvcError(f"{path} holds {', '.join(some) or 'nothing'}; expected one tensor called {' or '.join(names)}")
    stored = found[known[0]]
    if stored.dtype not in FLOATS or len(stored.shape) != 2 or 0 in stored.shape:
        raise TpvcError(
            f"tensor '{stored.name}' in {path} is {stored.dtype} {list(stored.shape)}; expected [virtual tokens,"
            f" token_dim] of {', '.join(FLOATS)}"
        )
    return stored.read().float()


def _prints(directory: Path) -> tuple[str | None, str | None]:
    match made(directory):
        case {"artefact": "prompt", "base": {"weights": str(base)}, "tokenizer": str() | None as tokenizer}:
            return base, tokenizer
    return None, None


def write(prompt: Prompt, directory: Path, model: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Write `prompt` as a directory that PEFT loads; the same prompt gives the same bytes.

    model  what is said of the base (`about`, or what another prompt of it said)
    extra  what tpvc.json says beside that
    """
    rows, width = prompt.values.shape
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": model.get("name"),
        "inference_mode": True,
        "num_attention_heads": model.get("heads"),
        "num_layers": model.get("layers"),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": rows,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": "CAUSAL_LM",
        "token_dim": width,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    files = {WEIGHTS: {TENSOR: prompt.values}}
    if prompt.start is not None:
        files[START] = {START_TENSOR: prompt.start}
    base = {**model, "weights": prompt.base}
    manifest = {**extra, "artefact": "prompt", "base": base, "tokenizer": prompt.tokenizer}
    peft_directory.write(directory, config, files, manifest)


def about(program: Program) -> dict[str, Any]:
    """What a prompt's directory says of its base model, apart from the fingerprint."""
    facts = program.facts
    name = None if program.source is None else program.source.name
    return {"name": name, "family": facts.family, "heads": facts.heads, "layers": facts.layers}


def base_print(program: Program) -> str | None:
    """Hex digest that a model shares with its own quantised forms: that of the float weights' file hashes.

    What `tpvc quantize` and `tpvc export` wrote says which files it was made of. A model made in memory has none.
    """
    from tpvc.compiler.frontends import manifest

    if program.source is None:
        return None
    match manifest(program):
        case {"artefact": "checkpoint", "blocks": [*_], "source": {"files": dict() as files}}:
            pass
        case {"artefact": str() as kind, "source": {"manifest": dict() as made}} if kind != "checkpoint" and (
            files := _float_files(made)
        ):
            pass
        case {"artefact": str() as kind, "source": {"files": dict() as files}} if kind != "checkpoint":
            pass
        case _:
            files = program.source.files
    return hashlib.sha256("\n".join(sorted(map(str, files.values()))).encode()).hexdigest()


def _float_files(made: Mapping[str, Any]) -> dict[str, str] | None:
    """Of a source's manifest as an export keeps it, without blocks: the float files, if it was quantised."""
    match made:
        case {"artefact": "checkpoint", "calibration": _, "source": {"files": dict() as files}}:
            return files
    return None


def tokenizer_print(tokenizer: Any) -> str:
    """Hex digest of a vocabulary: every token with its id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()

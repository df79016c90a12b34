"""What directories of adapters have in common, as PEFT reads and writes them.

    adapter_config.json         its `peft_type` says of which kind the adapter is
    adapter_model.safetensors   named tensors; a module of the model has its path behind `base_model.model.`

Pickle (adapter_model.bin) can run code and is refused. Beside them tpvc puts its own tpvc.json, which PEFT does not
read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.weights import Stored, read_json, stored_in
from tpvc.compiler.output import MANIFEST
from tpvc.compiler.program import Program, linears

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model.model."


def named(directory: str | Path) -> str:
    """A directory's own name, wherever it lies and however it was typed: what is written must not depend on either."""
    return os.path.basename(os.path.abspath(directory))


def read_config(directory: Path, kind: str, what: str) -> dict[str, Any]:
    """The config in `directory`, whose peft_type has to be `kind`; `what` says in an error what is looked for."""
    path = directory / CONFIG
    if not directory.is_dir():
        raise TpvcError(f"'{directory}' is not a directory; expected one with {CONFIG} and {WEIGHTS}, as PEFT writes")
    if not path.is_file():
        raise TpvcError(f"{directory} has no {CONFIG}; expected the directory of {what}")
    found = read_json(path)
    if found.get("peft_type") != kind:
        raise TpvcError(f"{path} has peft_type = {found.get('peft_type')!r}; expected '{kind}', {what}")
    return found


def open_tensors(path: Path, what: str) -> Mapping[str, Stored]:
    """The tensors in a safetensors file of such a directory, {name: where it is stored}."""
    if not path.is_file():
        if path.with_name(PICKLE).is_file():
            raise TpvcError(
                f"{path.parent} holds its weights as pickle ({PICKLE}), which can run code when read and is refused;"
                " load it with PEFT and save it again, which writes safetensors"
            )
        raise TpvcError(f"{path.parent} has no {path.name}; expected the directory of {what}")
    return stored_in(path)


def targets(adapted: Collection[str], program: Program) -> list[str]:
    """`target_modules` of these linears: last parts of names where these mean no others, else whole names; sorted."""
    last = {name.rpartition(".")[2] for name in adapted}
    meant = {n.name for n in linears(program.nodes) if n.name.rpartition(".")[2] in last}
    return sorted(last if meant == set(adapted) else adapted)


def write(
    directory: Path,
    config: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Tensor]],
    manifest: Mapping[str, Any],
) -> None:
    """Write `files` {name: {tensor: values}}, as float32, the config and tpvc.json; same input, same bytes."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, held in files.items():
            plain = {key: _plain(value) for key, value in held.items()}
            (directory / name).write_bytes(save(plain, {"format": "pt"}))
        for name, value in ((CONFIG, config), (MANIFEST, manifest)):
            (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise TpvcError(f"'{directory}' cannot be written ({error.strerror or error}); choose another place") from error


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().to(torch.float32).clone(memory_format=torch.contiguous_format)

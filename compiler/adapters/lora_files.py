"""LoRA adapters as PEFT's directories: adapter_config.json and adapter_model.safetensors (peft, LORA).

Two float32 tensors for every adapted linear, whose path is that of the module in transformers' causal language model:

    base_model.model.<path>.lora_A.weight [r, in]        base_model.model.<path>.lora_B.weight [out, r]

`fan_in_fan_out` says that the module stores its weight [in, out] (GPT-2's Conv1D); A and B are the same in either case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tpvc.compiler.adapters.lora import Lora
from tpvc.compiler.adapters.road_files import CONFIG, ROOT, WEIGHTS, base
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import MANIFEST
from tpvc.compiler.program import Program, linears


def write(lora: Lora, directory: Path, program: Program, extra: dict[str, Any]) -> None:
    """Write `lora`, an adapter of `program`, as a directory that PEFT loads; the same adapter gives the same bytes.

    tpvc.json holds `extra`, the kind of artefact, and the base: its name and the hashes of its config and weights.
    """
    config = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": None if program.source is None else program.source.name,
        "bias": "none",
        "fan_in_fan_out": _conv1d(program),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": _targets(lora, program),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for path, update in lora.updates.items():
        for part, value in (("lora_A", update.a), ("lora_B", update.b)):
            plain = value.detach().cpu().float().clone(memory_format=torch.contiguous_format)
            tensors[f"{ROOT}{path}.{part}.weight"] = plain
    directory = Path(directory)
    manifest = {**extra, "artefact": "lora", "base": base(program)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        for name, value in ((CONFIG, config), (MANIFEST, manifest)):
            (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise TpvcError(f"'{directory}' cannot be written ({error.strerror or error}); choose another place") from error


def _targets(lora: Lora, program: Program) -> list[str]:
    """Last parts of names where they mean exactly these linears, full names otherwise; sorted."""
    last = {name.rpartition(".")[2] for name in lora.updates}
    meant = {n.name for n in linears(program.nodes) if n.name.rpartition(".")[2] in last}
    return sorted(last if meant == set(lora.updates) else lora.updates)


def _conv1d(program: Program) -> bool:
    """Do the checkpoint's block linears lie [in, out]?"""
    from tpvc.compiler.frontends.architecture import architecture

    return program.source is not None and bool(architecture(dict(program.source.config)).transposed)

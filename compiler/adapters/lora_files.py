"""LoRA adapters as PEFT's directories: adapter_config.json and adapter_model.safetensors (peft, LORA).

Two float32 tensors for every adapted linear, whose path is that of the module in transformers' causal language model:

    base_model.model.<path>.lora_A.weight [r, in]        base_model.model.<path>.lora_B.weight [out, r]

`fan_in_fan_out` says that the module stores its weight [in, out] (GPT-2's Conv1D); A and B are the same in either case.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpvc.compiler.adapters import peft_directory
from tpvc.compiler.adapters.lora import Lora
from tpvc.compiler.adapters.peft_directory import ROOT, WEIGHTS
from tpvc.compiler.adapters.road_files import base
from tpvc.compiler.program import Program


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
        "target_modules": peft_directory.targets(lora.updates, program),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for path, update in lora.updates.items():
        for part, value in (("lora_A", update.a), ("lora_B", update.b)):
            tensors[f"{ROOT}{path}.{part}.weight"] = value
    manifest = {**extra, "artefact": "lora", "base": base(program)}
    peft_directory.write(directory, config, {WEIGHTS: tensors}, manifest)


def _conv1d(program: Program) -> bool:
    """Do the checkpoint's block linears lie [in, out]?"""
    from tpvc.compiler.frontends.architecture import architecture

    return program.source is not None and bool(architecture(dict(program.source.config)).transposed)

"""What a script of this folder is to do: read from the JSON file that it is given as its one argument."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """model        float checkpoint, a folder
    calibration  safetensors file: "tokens" int64 [windows, length]
    text         the text that those windows are the beginning of
    out          folder to write the packed checkpoint to; it does not exist yet
    group        columns that share a scale; -1: a whole row
    options      the method's own
    """

    model: Path
    calibration: Path
    text: Path
    out: Path
    bits: int
    group: int
    symmetric: bool
    seed: int
    threads: int
    options: dict[str, Any]


def read() -> Job:
    """The job in the file that the command line names; torch then has the threads that it may use."""
    import torch

    said = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    job = Job(**{k: Path(v) if k in ("model", "calibration", "text", "out") else v for k, v in said.items()})
    torch.set_num_threads(job.threads)
    return job


def windows(path: Path) -> Any:
    """Tokens, int64 [windows, length]."""
    from safetensors.torch import load_file

    return load_file(path)["tokens"]


def float_model(path: Path) -> tuple[Any, Any]:
    """(transformers' model in float32, its tokenizer)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)

"""HQQ, saved and loaded again by itself; what it dequantises is written beside that as a float checkpoint.

Its zero points at 2 and 3 bits are no integers, and no format but its own holds them.
"""

from __future__ import annotations

import shutil

import job as jobs
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from safetensors.torch import load_file, save_file


def main() -> None:
    job = jobs.read()
    if job.symmetric:
        raise SystemExit("HQQ has no symmetric grids; expected symmetric: false")
    model, _ = jobs.float_model(job.model)
    config = BaseQuantizeConfig(nbits=job.bits, group_size=None if job.group == -1 else job.group, axis=1)
    AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
    AutoHQQHFModel.save_quantized(model, str(job.out))
    loaded = AutoHQQHFModel.from_quantized(str(job.out), compute_dtype=torch.float32, device="cpu")
    weights = {f"{n}.weight": m.dequantize() for n, m in loaded.named_modules() if isinstance(m, HQQLinear)}
    floats = load_file(job.model / "model.safetensors")
    strange = {n for n in weights if n not in floats or weights[n].shape != floats[n].shape}
    if strange or not weights:
        raise SystemExit(
            f"of {len(weights)} weights {len(strange)} are not the float model's, first {min(strange, default=None)}"
        )
    shutil.copytree(job.model, job.out / "dequantised", ignore=shutil.ignore_patterns("model.safetensors", "tpvc.json"))
    save_file({**floats, **weights}, job.out / "dequantised" / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()

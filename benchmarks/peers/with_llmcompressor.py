"""GPTQ, AWQ and round-to-nearest of llm-compressor, saved in compressed-tensors."""

from __future__ import annotations

import job as jobs
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache


def recipe(job: jobs.Job) -> list:
    """The modifiers of options["method"], with the weights' observer in options["observer"]."""
    grid = {"strategy": "channel"} if job.group == -1 else {"strategy": "group", "group_size": job.group}
    observer = {"observer": job.options["observer"]} if "observer" in job.options else {}
    weights = QuantizationArgs(num_bits=job.bits, type="int", symmetric=job.symmetric, **grid, **observer)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    common = {"config_groups": groups, "ignore": ["lm_head"]}
    return {
        "gptq": lambda: [GPTQModifier(**common, actorder="static", dampening_frac=0.01)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**common)],
        "rtn": lambda: [QuantizationModifier(**common)],
    }[job.options["method"]]()


def main() -> None:
    job = jobs.read()
    torch.manual_seed(job.seed)
    if not torch.accelerator.is_available():  # AWQ pins memory all the same, which torch refuses; no figure hangs on it
        IntermediatesCache.pin_memory = lambda *_: None
    tokens = jobs.windows(job.calibration)
    model, tokenizer = jobs.float_model(job.model)
    ids = tokens.tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": torch.ones_like(tokens).tolist()})
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=recipe(job),
        num_calibration_samples=tokens.shape[0],
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job.out, save_compressed=True)
    tokenizer.save_pretrained(job.out)


if __name__ == "__main__":
    main()

"""AutoRound through its Python entry, in float32, saved in its own format.

`amp=False`, for its default, bfloat16, was the slower of the two on the CPUs this was made on. torch.compile is left as
AutoRound chooses.
"""

from __future__ import annotations

import job as jobs
from auto_round import AutoRound

BATCH = 8


def main() -> None:
    job = jobs.read()
    tokens = jobs.windows(job.calibration)
    model, tokenizer = jobs.float_model(job.model)
    rounding = AutoRound(
        model,
        tokenizer,
        scheme=f"W{job.bits}A16",
        bits=job.bits,
        group_size=job.group,
        sym=job.symmetric,
        dataset=list(tokens.split(BATCH)),
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        batch_size=BATCH,
        seed=job.seed,
        device_map="cpu",
        amp=False,
        **job.options,
    )
    rounding.quantize_and_save(str(job.out), format="auto_round")
    saved = next(job.out.glob("*/config.json")).parent  # in a folder that it names after the model and the grid
    for file in saved.iterdir():
        file.rename(job.out / file.name)
    saved.rmdir()


if __name__ == "__main__":
    main()

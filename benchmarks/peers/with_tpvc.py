"""tpvc's own rows: `tpvc.quantize` with the head left in float."""

from __future__ import annotations

import job as jobs

import tpvc


def main() -> None:
    job, tokens = jobs.read(), None
    if job.options.get("method") != "rtn":
        tokens = jobs.windows(job.calibration)
    calibration = {} if tokens is None else {"nsamples": tokens.shape[0], "seqlen": tokens.shape[1]}
    tpvc.quantize(
        job.model,
        job.out,
        bits=job.bits,
        group=job.group,
        symmetric=job.symmetric,
        dataset=str(job.text),
        head_bits=16,
        seed=job.seed,
        **calibration,
        **job.options,
    )


if __name__ == "__main__":
    main()

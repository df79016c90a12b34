"""A package of Triton kernels: on a GPU, or on a CPU by their references."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpvc.compiler.engines import Engine
from tpvc.compiler.engines.text import auto_tokenizer, transformers_text
from tpvc.compiler.progress import Progress, silent


def open_package(
    folder: Path, threads: int, adapter: str | None, task: str | None, device: str, progress: Progress = silent
) -> Engine:
    """On a GPU, with the package's kernels; on a CPU, with their references."""
    import numpy as np
    import torch

    from tpvc.compiler.backends import triton
    from tpvc.compiler.backends.triton.engine import Draw
    from tpvc.compiler.backends.triton.engine import Engine as Slots
    from tpvc.kernels.driver import present

    torch.set_num_threads(threads)
    backend = present() if device == "auto" else None if device == "cpu" else device
    compute = triton.open_cpu(folder) if backend is None else triton.open_gpu(folder, backend, progress=progress)
    model, slots = compute.model, Slots(compute)
    capacity = slots.holds(adapter, task)  # unknown ones are refused now

    def following(ids: list[int], want: str, draws: Iterator[Draw]) -> Iterator[Any]:
        """What is wanted after `ids`, then after every token that is sent."""
        slot, found = slots.admit(ids, adapter, task, want, next(draws))
        try:
            while True:
                token = yield found
                found = slots.decode([slot], [token], want, [next(draws)])[0]
        finally:
            slots.release(slot)

    def generate(
        ids: list[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0, stop: bool = True
    ) -> Iterator[int]:
        source = torch.Generator().manual_seed(seed)
        draws = iter(lambda: Draw(temperature, 1.0, float(torch.rand((), generator=source))), None)
        state = following(ids, "sample" if temperature else "greedy", draws)
        token = int(next(state))
        for done in range(max_new_tokens):
            if stop and token in model.facts.eos:
                break
            yield token
            if done + 1 < max_new_tokens:
                token = int(state.send(token))
        state.close()

    def logits(ids: list[int], first: int = 0) -> Any:
        state = following(ids[: first + 1], "logits", iter(lambda: Draw(1.0, 1.0, 0.0), None))
        rows = [next(state).numpy()] + [state.send(token).numpy() for token in ids[first + 1 :]]
        state.close()
        return np.stack(rows)

    encode, decoder = transformers_text(auto_tokenizer(folder), str(folder))
    kind = str(model.dtype).removeprefix("torch.")
    return Engine(
        label=f"references of the Triton kernels, {kind}" if backend is None else f"Triton kernels, {kind}",
        vocab_size=model.facts.vocab_size,
        context_length=capacity,
        size=(folder / triton.WEIGHTS).stat().st_size,
        before=[],
        encode=encode,
        generate=generate,
        decoder=decoder,
        logits=logits,
    )

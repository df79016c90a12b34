"""Whatever `tpvc.load` takes, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tpvc.compiler.engines import Engine
from tpvc.compiler.engines.text import Prompt, transformers_text
from tpvc.compiler.weight_bytes import weight_bytes


def open_interpreter(target: str, threads: int, adapter: str | None, task: str | None) -> Engine:
    import torch

    from tpvc.compiler import interpret
    from tpvc.compiler.frontends import load_for, tokenizer
    from tpvc.compiler.program import adapter_id, grid_of, prompt_ids

    torch.set_num_threads(threads)
    program, adapter, task = load_for(target, adapter, task)
    row, before = torch.tensor([adapter_id(program, adapter)]), prompt_ids(program, task)
    facts = program.facts
    weight = interpret.in_memory(program)

    def generate(
        ids: list[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0, stop: bool = True
    ) -> Iterator[int]:
        source = torch.Generator().manual_seed(seed)
        prompt = torch.tensor(ids)
        return interpret.generate(program, prompt, max_new_tokens, weight, temperature, source, stop, adapter)

    def logits(ids: list[int], first: int = 0) -> Any:
        with torch.no_grad():
            return interpret.logits(program, torch.tensor([ids]), weight=weight, adapter_ids=row)[0, first:].numpy()

    text: list[Any] = []

    def pair() -> tuple[Callable[[Prompt], list[int]], Callable[[], Callable[[int], str]]]:
        if not text:
            text.extend(transformers_text(tokenizer(program), target))
        return text[0], text[1]

    integers = any(grid_of(p) for p in program.params.values())
    return Engine(
        label="torch float32, dequantised" if integers else "torch float32",
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        size=weight_bytes(program),
        before=before,
        encode=lambda prompt: [*before, *pair()[0](prompt)],
        generate=generate,
        decoder=lambda: pair()[1](),
        logits=logits,
    )

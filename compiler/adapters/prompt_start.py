"""Where a soft prompt starts: vocabulary rows, as in the paper; normal numbers; a text; another prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler import interpret
from tpvc.compiler.adapters import prompt_files
from tpvc.compiler.adapters.fits import check_prompt_fits, check_tuned_for
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Program
from tpvc.compiler.windows import encode
from tpvc.passes.bank_prompt import TOKENS, embeddings

COMMON = 5000
"""Vocabulary rows are drawn from the first ids, which tokenizers give to the most frequent pieces."""


def start(program: Program, tokenizer: Any, init: str, tokens: int | None, seed: int) -> tuple[Prompt, dict[str, Any]]:
    """(a prompt called "start" whose values are where tuning begins, what a manifest says of it).

    init  "vocab"       embeddings of ids drawn without replacement from the first 5,000
          "normal"      N(0, s), s the deviation of those ids' embeddings
          "text:WORDS"  embeddings of the tokens of WORDS, repeated or cut to fit
          "prompt:DIR"  the values of another prompt, whose own start is kept, so that vectors go on from there
    tokens  virtual tokens; None: 50, or those of DIR
    """
    kind, _, rest = init.partition(":")
    if kind == "prompt" and rest:
        given = prompt_files.read(Path(rest).expanduser(), rest)
        if tokens not in (None, given.tokens):
            raise TpvcError(
                f"the prompt in {rest} has {given.tokens} virtual tokens, {tokens} were asked for; leave the number out"
            )
        check_tuned_for([given], program, tokenizer)
        check_prompt_fits(given, program)
        origin = given.values if given.start is None else given.start
        return Prompt("start", given.values, origin), {"init": "prompt", "from": dict(given.origin)}
    count = 50 if tokens is None else tokens
    generator = torch.Generator().manual_seed(seed)
    common = min(COMMON, program.facts.vocab_size)
    if kind == "vocab" and not rest:
        if count > common:
            raise TpvcError(f"{count} virtual tokens were asked for; expected at most {common}, the rows drawn from")
        ids = torch.randperm(common, generator=generator)[:count]
        values = embedded(program, ids)
        return Prompt("start", values, values), {"init": "vocab", "seed": seed, "ids": ids.tolist()}
    if kind == "normal" and not rest:
        deviation = float(embedded(program, torch.arange(common)).std())
        values = torch.randn(count, _width(program), generator=generator) * deviation
        return Prompt("start", values, values), {"init": "normal", "seed": seed, "deviation": deviation}
    if kind == "text" and rest:
        found = encode(tokenizer, rest)
        if not found:
            raise TpvcError(f"the text '{rest}' has no token; expected words to start from")
        ids = torch.tensor((found * (count // len(found) + 1))[:count])
        values = embedded(program, ids)
        return Prompt("start", values, values), {"init": "text", "text": rest, "ids": ids.tolist()}
    raise TpvcError(f"the start of the prompt is '{init}'; expected vocab, normal, text:WORDS or prompt:DIR")


@torch.no_grad()
def embedded(program: Program, ids: Tensor) -> Tensor:
    """Embeddings float32 [n, D] of int64 `ids` [n], as they enter the model (Gemma multiplies its table's rows); those
    of virtual tokens too."""
    site = TOKENS if program.prompts else embeddings(program).name
    nodes = program.nodes[: 1 + next(i for i, n in enumerate(program.nodes) if n.name == site)]
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    values = {"input_ids": ids[None], "mask": mask, "positions": interpret.positions_of(mask, len(ids))}
    return interpret.run(nodes, values, interpret.from_files(program))[0].clone()


def _width(program: Program) -> int:
    return embedded(program, torch.zeros(1, dtype=torch.int64)).shape[1]

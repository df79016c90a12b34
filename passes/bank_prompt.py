"""Put soft prompts beside the token embeddings, as extra rows: ids from vocab_size on are virtual tokens.

Before                                  After
    input_ids -> embed -> readers           input_ids -> text_ids -> embed -> virtual_tokens(input_ids) -> readers

A caller puts a prompt's ids (`program.prompt_ids`) before a text. Positions, masks, padding and caches are those of
ordinary tokens, so that every row of a batch may have its own prompt, of any length, or none. The table of the
embeddings is not touched: it may be integers, or shared with the head.

The rows stand where transformers' `inputs_embeds` do: behind the factor by which some families (Gemma) multiply their
embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tpvc.compiler.adapters.fits import check_prompt_fits
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Node, Program

IDS, TOKENS, ROWS = "input_ids.text", "virtual_tokens", "virtual_tokens.rows"


@dataclass(frozen=True)
class BankPrompt:
    """The pass. Prompts that the program carries already are replaced; no prompts leave the program without any.

    TpvcError where a name repeats or a prompt does not fit.
    """

    prompts: tuple[Prompt, ...]

    def __call__(self, program: Program) -> Program:
        names = [prompt.name for prompt in self.prompts]
        if len(set(names)) < len(names):
            raise TpvcError(f"two prompts have one name ({', '.join(names)}); give each task its own, as in NAME=DIR")
        program = _without(program)
        for prompt in self.prompts:
            check_prompt_fits(prompt, program)
        if not self.prompts:
            return program
        site, vocab = embeddings(program), program.facts.vocab_size
        nodes = [Node(IDS, "text_ids", ("input_ids",), attrs={"vocab": vocab})]
        for node in program.nodes:
            renamed = {"input_ids": IDS, site.name: TOKENS}
            nodes.append(replace(node, inputs=tuple(renamed.get(v, v) for v in node.inputs)))
            if node.name == site.name:
                nodes.append(Node(TOKENS, "virtual_tokens", (site.name, "input_ids"), {"rows": ROWS}, {"vocab": vocab}))
        rows = torch.cat([prompt.values.float() for prompt in self.prompts])
        return replace(program, nodes=tuple(nodes), params={**program.params, ROWS: rows}, prompts=self.prompts)


def embeddings(program: Program) -> Node:
    """The node whose value transformers calls `inputs_embeds`."""
    site = next(n for n in program.nodes if n.op == "embed" and n.inputs[0] in ("input_ids", IDS))
    readers = [n for n in program.nodes if site.name in n.inputs and n.op != "virtual_tokens"]
    return readers[0] if len(readers) == 1 and readers[0].op == "scale" else site


def _without(program: Program) -> Program:
    """The program with no virtual tokens."""
    tokens = next((n for n in program.nodes if n.name == TOKENS), None)
    if tokens is None:
        return program
    renamed = {IDS: "input_ids", TOKENS: tokens.inputs[0]}
    nodes = tuple(
        replace(n, inputs=tuple(renamed.get(v, v) for v in n.inputs)) for n in program.nodes if n.name not in renamed
    )
    params = {name: value for name, value in program.params.items() if name != ROWS}
    return replace(program, nodes=nodes, params=params, prompts=())

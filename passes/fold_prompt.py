"""Fold the soft prompt of one task into the graph, so that a caller feeds text and nothing else.

prefix   The prompt's virtual tokens stand before the first tokens of every row: what the text sees of them is computed
         with it, once, and lies in the caller's cache.
kv       The keys and values that the prompt gives every layer are computed now, in the arithmetic of this program (its
         integers, if it is rounded), and become constants. In a causal model they do not depend on what follows, so the
         prompt costs no prefill; the caller's cache holds the text alone. A rounded cache does not round them.

Both equal a caller who feeds the ids that `BankPrompt` gives the prompt. The text begins at position n; the prompt is
in neither the ids nor the mask nor the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tpvc.compiler import interpret
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Node, Program, constant_prefix, prompt_ids
from tpvc.passes.bank_prompt import BankPrompt
from tpvc.passes.round_cache import float_cache

FORMS = ("prefix", "kv")
IDS, MASK, POSITIONS, TEXT = "input_ids.prefixed", "mask.prefixed", "positions.prefixed", "last_tokens"


@dataclass(frozen=True)
class FoldPrompt:
    """The pass. Prompts that the program carries are left out; `prompt` is folded, in one of FORMS.

    TpvcError where the prompt does not fit, where one is folded in already, and for "kv" where adapters stand beside
    the weights, under each of which the keys would be others.
    """

    prompt: Prompt
    form: str

    def __call__(self, program: Program) -> Program:
        if self.form not in FORMS:
            raise TpvcError(f"the form of a folded prompt is '{self.form}'; expected one of {', '.join(FORMS)}")
        if constant_prefix(program) or any(n.params for n in program.nodes if n.op == "attention"):
            raise TpvcError("a prompt is folded into this model already; fold another into the model as it was")
        if self.form == "kv" and program.adapters:
            names = ", ".join(a.name for a in program.adapters)
            raise TpvcError(
                f"the model carries adapters ({names}), and the keys of a prompt differ under each; fold one adapter"
                " into the weights, or leave the prompt as tokens"
            )
        banked = BankPrompt((self.prompt,))(program)
        return _prefixed(banked) if self.form == "prefix" else _with_keys(banked)


def _prefixed(banked: Program) -> Program:
    """Ids, mask and positions with the prompt in front; the head sees the caller's own tokens."""
    first, count = banked.facts.vocab_size, banked.prompts[0].tokens
    nodes = [
        Node(IDS, "prefix_ids", ("input_ids", "mask"), attrs={"first": first, "count": count}),
        Node(MASK, "prefix_mask", ("mask",), attrs={"count": count}),
        Node(POSITIONS, "positions", (MASK, IDS)),
    ]
    renamed = {"input_ids": IDS, "mask": MASK, "positions": POSITIONS}
    epilogue = {n.name for n in banked.epilogue}
    leaving = next(n.name for n in reversed(banked.nodes) if n.block is not None)
    for node in banked.nodes:
        if node.name in epilogue and leaving not in renamed:
            nodes.append(Node(TEXT, "last_tokens", (leaving, "input_ids")))
            renamed[leaving] = TEXT
        nodes.append(replace(node, inputs=tuple(renamed.get(v, v) for v in node.inputs)))
    return replace(banked, nodes=tuple(nodes), prompts=())


@torch.no_grad()
def _with_keys(banked: Program) -> Program:
    """Keys and values as parameters of every attention node; positions begin behind them."""
    name, count = banked.prompts[0].name, banked.prompts[0].tokens
    cache: interpret.Cache = {}
    interpret.logits(float_cache(banked), torch.tensor([prompt_ids(banked, name)]), cache=cache)
    program = BankPrompt(())(banked)
    nodes, params = [], dict(program.params)
    for node in program.nodes:
        if "positions" in node.inputs:
            node = replace(node, attrs={**node.attrs, "offset": node.attrs.get("offset", 0) + count})
        if node.op == "attention":
            own = {f"prefix_{kind}": f"{node.name}.prefix_{kind}" for kind in ("key", "value")}
            params |= {own[role]: value[0] for role, value in zip(own, cache[node.name], strict=True)}
            node = replace(node, params={**node.params, **own})
        nodes.append(node)
    return replace(program, nodes=tuple(nodes), params=params)

"""Whether an adapter or a prompt was made for a model, as far as names, shapes and fingerprints can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.adapters.prompt_files import base_print, tokenizer_print
from tpvc.compiler.adapters.road import Road, check_layout
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Program, linears


def check_fits(road: Road, program: Program) -> None:
    """Refuse an adapter made for another model: a linear that is not there, or has another number of outputs."""
    outputs = {n.name: program.params[n.params["weight"]].shape[0] for n in linears(program.nodes)}
    for name, rotation in road.rotations.items():
        if name not in outputs:
            raise TpvcError(
                f"adapter '{road.name}' is for another model: it adapts '{name}', and this one has linears like"
                f" '{next(iter(outputs), 'none')}'"
            )
        if rotation.features != outputs[name]:
            raise TpvcError(
                f"adapter '{road.name}' is for another model: it has {rotation.features} outputs for '{name}', this"
                f" one has {outputs[name]}"
            )
        check_layout(rotation.variant, rotation.group, rotation.features, f"'{name}'")


def check_undivided(road: Road, made_for: Any, program: Program, divided: Sequence[str]) -> None:
    """Refuse an adapter of the float model that rotates outputs whose features a quantised model has divided by factors
    of their own, so that int8 activations are easier to round; one that was tuned on that very model is right.

    divided  names of linears, as tpvc.json tells them
    """
    turned = next((name for name in road.rotations if name in divided), None)
    if turned is not None and made_for != program.source.files:
        raise TpvcError(
            f"adapter '{road.name}' rotates '{turned}', whose outputs were divided when this model was quantised with"
            " int8 activations, and it was not tuned on this one; name it with --road when quantising, or tune it on"
            f" '{program.source.name}'"
        )


def check_tuned_for(prompts: Sequence[Prompt], program: Program, tokenizer: Any = None) -> None:
    """Refuse a prompt that says it was tuned for other weights, or, where `tokenizer` is given, for another one."""
    own = {
        "model": base_print(program) if any(p.base for p in prompts) else None,  # the weights are read for it
        "tokenizer": None if tokenizer is None else tokenizer_print(tokenizer),
    }
    for prompt in prompts:
        for what, theirs in (("model", prompt.base), ("tokenizer", prompt.tokenizer)):
            if None not in (theirs, own[what]) and theirs != own[what]:
                raise TpvcError(
                    f"prompt '{prompt.name}' was tuned for another {what} ({theirs[:12]}, this one is"
                    f" {own[what][:12]}); expected a prompt of this model, or the model that it was tuned for"
                )


def check_prompt_fits(prompt: Prompt, program: Program) -> None:
    """Refuse a prompt of another width than the model's embeddings, and one that leaves no room in its context."""
    table = next(n for n in program.nodes if n.op == "embed" and n.inputs[0].startswith("input_ids"))
    width, context = program.params[table.params["weight"]].shape[1], program.facts.context_length
    if prompt.values.shape[1] != width:
        raise TpvcError(
            f"prompt '{prompt.name}' is for another model: its vectors have {prompt.values.shape[1]} numbers"
            f" (token_dim), this model's embeddings {width}"
        )
    if prompt.tokens >= context:
        raise TpvcError(
            f"prompt '{prompt.name}' has {prompt.tokens} virtual tokens, which leaves no room for text in a context of"
            f" {context}"
        )

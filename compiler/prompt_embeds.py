"""A text behind a soft prompt as vectors, which is how vLLM takes soft prompts: `prompt_embeds`.

vLLM (--enable-prompt-embeds) has no adapter for soft prompts, but its completions accept the vectors of a whole prompt
in place of its tokens: [T, D] in the model's dtype, as torch.save writes it, in base64. They are the soft prompt's
values and the embeddings of the text's tokens, special tokens and chat template included. Where vLLM multiplies what it
is given by the embeddings' factor (Gemma 2; Gemma 3 has it in the lookup), they are without it.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler import frontends
from tpvc.compiler.adapters.prompt_start import embedded
from tpvc.compiler.engines import room
from tpvc.compiler.engines.text import Prompt, transformers_text
from tpvc.compiler.job import scale_dtype
from tpvc.compiler.program import prompt_ids

SCALED_BY_VLLM = ("gemma2",)
"""Types of model of which vLLM scales given embeddings as it scales those that it looks up."""


def prompt_embeds(
    model: str | Path, task: str, prompt: Prompt, *, max_tokens: int = 64, served: str | None = None
) -> dict[str, Any]:
    """The body of a request to /v1/completions of a vLLM server: `prompt` behind the soft prompt `task`.

    task    a soft prompt that the model carries, by name, or the directory of one
    prompt  a text as it stands, or the messages of a chat
    served  what the server calls the model; None: `model`
    """
    program, _, task = frontends.load_for(model, None, task)
    before = prompt_ids(program, task)
    encode, _ = transformers_text(frontends.tokenizer(program), str(model))
    ids = [*before, *encode(prompt)]
    max_tokens = room(program.facts.context_length, ids, max_tokens)
    vectors = embedded(program, torch.tensor(ids))
    if program.source.config["model_type"] in SCALED_BY_VLLM:
        vectors /= next(n.attrs["factor"] for n in program.prologue if n.op == "scale")
    return {
        "model": str(model) if served is None else served,
        "prompt_embeds": encoded(vectors.to(scale_dtype(program))),
        "max_tokens": max_tokens,
        "temperature": 0,
    }


def encoded(vectors: Tensor) -> str:
    """What vLLM decodes with torch.load(weights_only=True)."""
    buffer = io.BytesIO()
    torch.save(vectors.contiguous(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()

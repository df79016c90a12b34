"""Windows of tokens, each of which begins as every text does that the model is given.

A text is tokenised without special tokens. A window of L tokens is what the tokenizer puts before a text of its own
accord (its beginning of text, or nothing), and then the next tokens of the text: many models attend to the first token
above all, and know no text without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without added special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before plain text of its own accord: its beginning of text, or none."""
    plain, full = encode(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"]
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])


def room(begin: list[int], seqlen: int) -> int:
    """How many tokens of the text a window of `seqlen` has. TpvcError where there is not one to predict."""
    if seqlen < max(2, len(begin) + 1):
        raise TpvcError(
            f"windows of {seqlen} tokens were asked for; expected at least {max(2, len(begin) + 1)}, of which the"
            f" tokenizer begins a text with {len(begin)}"
        )
    return seqlen - len(begin)


def cut(ids: list[int], begin: list[int], seqlen: int) -> Tensor:
    """All whole windows that the tokens of a text fill, int64 [n, seqlen]."""
    step = room(begin, seqlen)
    windows = [begin + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]
    return torch.tensor(windows, dtype=torch.int64).view(-1, seqlen)

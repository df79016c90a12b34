"""Windows of tokens, each of which begins as every text does that the model is given.

A text is tokenised without special tokens. A window of L tokens is what the tokenizer puts before a text of its own
accord (its beginning of text, or nothing), and then the next tokens of the text: many models attend to the first token
above all, and know no text without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without added special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before plain text of its own accord: its beginning of text, or none."""
    return before(encode(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"])


def before(plain: Sequence[int], whole: Sequence[int]) -> list[int]:
    """What stands before the tokens `plain` of a text in `whole`, which has special tokens too."""
    starts = range(len(whole) - len(plain) + 1)
    return next((list(whole[:i]) for i in starts if list(whole[i : i + len(plain)]) == list(plain)), [])


def encode_behind(tokenizer: Any, text: str, begin: list[int]) -> list[int]:
    """Token ids of a text that is to stand behind `begin`, which it may spell itself, as chat templates do."""
    ids = encode(tokenizer, text)
    return ids[len(begin) :] if ids[: len(begin)] == begin else ids


def text_tokens(begin: list[int], seqlen: int) -> int:
    """How many tokens of the text a window of `seqlen` has. TpvcError where none could be predicted."""
    least = max(2, len(begin) + 1)
    if seqlen < least:
        own = f", and the tokenizer begins a text with {len(begin)} of its own" if begin else ""
        raise TpvcError(f"windows of {seqlen} tokens were asked for{own}; ask for at least {least}")
    return seqlen - len(begin)


def cut(ids: list[int], begin: list[int], seqlen: int) -> Tensor:
    """All whole windows that the tokens of a text fill, int64 [n, seqlen]."""
    step = text_tokens(begin, seqlen)
    windows = [begin + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]
    return torch.tensor(windows, dtype=torch.int64).view(-1, seqlen)


def too_short(name: str, ids: list[int], begin: list[int], count: int, seqlen: int) -> TpvcError:
    """What is wrong with a text of these tokens, of which `count` windows were asked for."""
    step = text_tokens(begin, seqlen)
    behind = f" behind the {len(begin)} that begin each" if begin else ""
    fewer = f" or ask for fewer or shorter windows (at most {len(ids) // step} of {seqlen})" if len(ids) >= step else ""
    return TpvcError(
        f"{name} holds {len(ids)} tokens, {count} windows of {seqlen} need {count * step}{behind}; use a longer"
        f" text{fewer}"
    )

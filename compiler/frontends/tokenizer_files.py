"""Tokenizers and chat templates as they lie beside a model: opened and rendered, and nothing of theirs is run.

A tokenizer whose config names a Python class of its own (`auto_map`) is refused: without `trust_remote_code=False`
transformers would ask at the terminal whether to run it. A chat template is Jinja in transformers' sandbox, which
cannot change what it is given and reaches no private attribute, no module and no file; here it must also end in time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpvc.compiler.errors import TpvcError

SECONDS = 10.0
"""For one rendering, which takes less than a thousandth of it. What is counted are lines of Python: a single product of
giant numbers or texts is not stopped."""


def opened(directory: Path, **options: Any) -> Any:
    """The transformers tokenizer in `directory`, never from a hub. TpvcError where there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)
        made.decode(made("a", verbose=False)["input_ids"])  # what its config says wrongly shows here
        names = list(made.chat_template) if isinstance(made.chat_template, dict) else []
    except BaseException as error:  # transformers' and tokenizers' own, and panics of the latter
        if not is_damage(error):
            raise
        raise TpvcError(
            f"{directory} has no usable tokenizer ({reason(error)}); expected tokenizer.json beside the weights"
        ) from error
    for name in names:
        if not str(name).replace("-", "_").isidentifier():  # it becomes the name of a file
            raise TpvcError(f"{directory} has a chat template called '{name!s:.60}'; expected letters, digits, - and _")
    return made


def is_damage(error: BaseException) -> bool:
    """Does a library say by this that it was given nonsense?"""
    return type(error).__name__ == "PanicException" or (
        isinstance(error, Exception) and not isinstance(error, MemoryError | TpvcError)
    )


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def rendered(tokenizer: Any, messages: Any, **options: Any) -> Any:
    """`apply_chat_template`. TpvcError for what the template refuses, or does not finish."""
    try:
        with _in_time():
            return tokenizer.apply_chat_template(list(messages), **options)
    except BaseException as error:  # whatever the template raises: a role it refuses, a message without text
        if not is_damage(error):
            raise
        raise TpvcError(
            f"the model's chat template refuses a conversation ({reason(error)}); use messages it takes, or plain text"
        ) from error


@contextmanager
def _in_time() -> Iterator[None]:
    """TimeoutError in what is called within, when it takes too long. No signal, so that it works in every thread."""
    end, before = time.monotonic() + SECONDS, sys.gettrace()

    def look(frame: Any, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it has not ended after {SECONDS:g} seconds")
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)

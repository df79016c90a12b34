"""Text to token ids and back, by the tokenizer that lies in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpvc.compiler.errors import TpvcError

Prompt = str | list[dict[str, str]]
"""Raw text, or chat messages [{"role": ..., "content": ...}] that go through the model's chat template."""


def has_template(folder: Path) -> bool:
    """Does the tokenizer that lies in `folder` know how to write a chat?"""
    if (folder / "chat_template.jinja").is_file():
        return True
    from tpvc.compiler.frontends.weights import read_json

    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def auto_tokenizer(folder: Path) -> Any:
    from tpvc.compiler.frontends.tokenizer_files import opened

    return opened(folder)


def transformers_text(tokenizer: Any, name: str) -> tuple[Any, Any]:
    from tpvc.compiler.windows import beginning, encode_behind

    def encode(prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            begin = beginning(tokenizer)
            return begin + encode_behind(tokenizer, prompt, begin)
        if not getattr(tokenizer, "chat_template", None):
            raise no_template(name)
        from tpvc.compiler.frontends.tokenizer_files import rendered

        return rendered(tokenizer, prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]

    def decoder() -> Callable[[int], str]:
        tokens: list[int] = []
        shown = ""

        def push(token: int) -> str:
            nonlocal shown
            tokens.append(token)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if text.endswith("\ufffd"):  # part of a character; the next token brings the rest
                return ""
            new, shown = text[len(shown) :], text
            return new

        return push

    return encode, decoder


def no_template(name: str) -> TpvcError:
    return TpvcError(f"{name} has no chat template; give the prompt as it stands with --raw")

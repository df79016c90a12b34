"""A folder for ONNX Runtime GenAI, in the stock runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpvc.compiler.engines import Engine
from tpvc.compiler.engines.genai_folder import adapter_file, genai_facts, virtual_ids
from tpvc.compiler.engines.text import Prompt, auto_tokenizer, no_template, transformers_text
from tpvc.compiler.errors import TpvcError


def open_genai(folder: Path, threads: int, adapter: str | None, task: str | None) -> Engine:
    import numpy as np
    import onnxruntime_genai as og

    from tpvc.compiler.frontends.fields import token_ids

    facts = genai_facts(folder)
    file = None if adapter is None else adapter_file(folder, adapter)
    before = virtual_ids(folder, task)
    with _told(folder, "load"):
        config = og.Config(str(folder))
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        model = og.Model(config)
        adapters = og.Adapters(model)
        if file is not None:
            adapters.load(str(file), adapter)
    eos = set(token_ids(facts, "eos_token_id"))

    def start(ids: list[int], length: int, **options: Any) -> og.Generator:
        with _told(folder, "run"):
            params = og.GeneratorParams(model)
            params.set_search_options(max_length=length, **options)
            generator = og.Generator(model, params)
            if adapter is not None:
                generator.set_active_adapter(adapters, adapter)
            generator.append_tokens(np.asarray(ids, np.int32))
        return generator

    def generate(
        ids: list[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0, stop: bool = True
    ) -> Iterator[int]:
        length = len(ids) + max_new_tokens
        sampling = {"temperature": temperature, "random_seed": seed, "top_k": 0, "top_p": 1.0} if temperature else {}
        least = {} if stop else {"min_length": length}
        generator = start(ids, length, do_sample=temperature > 0, **sampling, **least)
        for _ in range(max_new_tokens):
            with _told(folder, "run"):
                generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if stop and token in eos:
                return
            yield token

    last_only = False

    def logits(ids: list[int], first: int = 0) -> Any:
        nonlocal last_only
        length = min(len(ids) + 1, facts["context_length"])
        if not last_only:
            found = start(ids, length).get_output("logits")[0]
            last_only = len(found) < len(ids)
            found = found[first:]
        if last_only:  # one token after the other, then
            generator = start(ids[: first + 1], length)
            rows = [generator.get_output("logits")[0, -1]]
            for token in ids[first + 1 :]:
                generator.append_tokens(np.asarray([token], np.int32))
                rows.append(generator.get_output("logits")[0, -1])
            found = np.stack(rows)
        return found.astype(np.float32)

    encode, decoder = _text(folder, model)
    weights = folder / facts["decoder"]["filename"]
    return Engine(
        label="ONNX Runtime GenAI",
        vocab_size=facts["vocab_size"],
        context_length=facts["context_length"],
        size=sum(f.stat().st_size for f in folder.glob(f"{weights.name}*")),
        before=before,
        encode=lambda prompt: [*before, *encode(prompt)],
        generate=generate,
        decoder=decoder,
        logits=logits,
    )


def _text(folder: Path, model: Any) -> tuple[Callable[[Prompt], list[int]], Callable[[], Callable[[int], str]]]:
    """The folder's tokenizer as GenAI reads it; through transformers where GenAI cannot. It does not refuse word lists,
    but finds ids for their words that are none."""
    import onnxruntime_genai as og

    from tpvc.compiler.frontends.weights import read_json

    file = folder / "tokenizer.json"
    match read_json(file) if file.is_file() else {}:
        case {"model": {"type": "WordLevel"}}:
            return transformers_text(auto_tokenizer(folder), str(folder))
    try:
        tokenizer = og.Tokenizer(model)
    except RuntimeError:
        return transformers_text(auto_tokenizer(folder), str(folder))

    begin = _beginning(file) if file.is_file() else []

    def encode(prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            try:
                prompt = tokenizer.apply_chat_template(json.dumps(prompt), add_generation_prompt=True)
            except RuntimeError as error:
                raise no_template(str(folder)) from error
            return tokenizer.encode(prompt).tolist()
        ids = tokenizer.encode(prompt).tolist()
        return ids if ids[: len(begin)] == begin else begin + ids

    def decoder() -> Callable[[int], str]:
        return tokenizer.create_stream().decode

    return encode, decoder


def _beginning(file: Path) -> list[int]:
    """What the tokenizer in tokenizer.json begins a text with. GenAI's reader adds no special tokens, or, when told to,
    all that the file names, whatever its template says."""
    from tokenizers import Tokenizer

    from tpvc.compiler.frontends.tokenizer_files import is_damage
    from tpvc.compiler.windows import before

    try:
        made = Tokenizer.from_file(str(file))
    except BaseException as error:  # what the package has no words for is GenAI's to read or to refuse
        if not is_damage(error):
            raise
        return []
    return before(*(made.encode("a", add_special_tokens=special).ids for special in (False, True)))


@contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    """GenAI's errors as one sentence; it says `what` it could not do with the folder."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TpvcError(f"{folder}: ONNX Runtime GenAI cannot {what} this folder: {reason}") from error

"""From a prompt to a stream of text: in stock ONNX Runtime GenAI for its folders, in the interpreter for the rest.

Both runtimes stand behind one `Engine`, so that `tpvc run`, `tpvc bench` and `tpvc eval` treat them alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import ADAPTERS, MANIFEST

Prompt = str | list[dict[str, str]]
"""Raw text, or chat messages [{"role": ..., "content": ...}] that go through the model's chat template."""


DEVICES = ("auto", "cpu", "cuda", "hip")


@dataclass(frozen=True, eq=False)
class Engine:
    """A model that is loaded and can write.

    label      what runs it, for tables: "ONNX Runtime GenAI", "torch float32"
    encode     Prompt -> token ids; TpvcError for messages when the model has no chat template
    before     ids of the virtual tokens that `encode` puts first; none without a task
    generate   (ids, max_new_tokens, temperature, seed, stop) -> the tokens that follow, one by one; greedy at
               temperature 0; with stop=False the end-of-text token does not end it (speed measurements)
    decoder    () -> a function that turns one token after the other into text that can be printed
    logits     (ids of one window [L], first=0) -> float32 numpy [L - first, vocab], of the positions from `first` on
    """

    label: str
    vocab_size: int
    context_length: int
    size: int
    before: list[int]
    encode: Callable[[Prompt], list[int]]
    generate: Callable[..., Iterator[int]]
    decoder: Callable[[], Callable[[int], str]]
    logits: Callable[..., Any]


def is_genai(target: str | Path) -> bool:
    """Is `target` a folder for ONNX Runtime GenAI?"""
    return (Path(target) / "genai_config.json").is_file()


def is_package(target: str | Path) -> bool:
    """Is `target` a package of compiled Triton kernels?"""
    return (Path(target) / "triton.json").is_file()


def genai_facts(folder: Path) -> dict[str, Any]:
    """`model` of the folder's genai_config.json; TpvcError when it is damaged."""
    from tpvc.compiler.frontends.weights import read_json

    path = folder / "genai_config.json"
    match read_json(path):
        case {"model": {"vocab_size": int(), "context_length": int(), "decoder": {"filename": str(name)}} as model} if (
            Path(name).name == name
        ):
            return model
    raise TpvcError(f"{path} lacks what ONNX Runtime GenAI needs to know of the model; export the folder again")


def has_template(folder: Path) -> bool:
    """Does the tokenizer that lies in `folder` know how to write a chat?"""
    if (folder / "chat_template.jinja").is_file():
        return True
    from tpvc.compiler.frontends.weights import read_json

    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def cores() -> int:
    """Cores this process may use: the default number of threads of either runtime."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_engine(
    target: str,
    threads: int | None = None,
    adapter: str | None = None,
    task: str | None = None,
    device: str = "auto",
) -> Engine:
    """Load `target`: an exported folder, or whatever `tpvc.load` takes; with one of its adapters, or as the base model.

    `adapter` and `task` are names, or, except for exported folders, directories in PEFT's format: of a RoAd adapter,
    and of a soft prompt, whose virtual tokens are then put before whatever `encode` is given (a package has their keys
    and values instead). device: where a package runs, one of DEVICES; "auto" is the first GPU, or the CPU without one.

    TpvcError when it cannot be loaded, and for an adapter or a task that it does not have.
    """
    if device not in DEVICES:
        raise TpvcError(f"device '{device}' was asked for; expected one of {', '.join(DEVICES)}")
    if is_package(target):
        return _package(Path(target), threads or cores(), adapter, task, device)
    if device not in ("auto", "cpu"):
        raise TpvcError(
            f"{target} was to run on {device}; only packages of tpvc export --to triton do, this one runs on the CPU"
        )
    if is_genai(target):
        return _genai(Path(target), threads or cores(), adapter, task)
    return _interpreter(target, threads or cores(), adapter, task)


def room(context: int, ids: list[int], wanted: int) -> int:
    """How many of `wanted` new tokens fit behind `ids` in so many tokens of context; TpvcError when none does."""
    free = context - len(ids)
    if not ids:
        raise TpvcError("the prompt is empty: expected at least one token")
    if free < 1:
        raise TpvcError(f"the prompt has {len(ids)} tokens, the model's context holds {context}; shorten the prompt")
    return min(wanted, free)


def adapter_file(folder: Path, name: str) -> Path:
    """The file of the adapter called `name` in a GenAI folder; TpvcError for one that it does not have."""
    found = {p.stem: p for p in sorted((folder / ADAPTERS).glob("*.onnx_adapter"))}
    if name not in found:
        known = f"it has {', '.join(found)}" if found else "it has none"
        raise TpvcError(f"the model has no adapter '{name}'; {known}")
    return found[name]


MOST_IDS = 1 << 24
"""Ids, and virtual tokens, are fewer than this."""


def carried_prompts(folder: Path) -> dict[str, list[int]]:
    """{task: ids of its virtual tokens} of a GenAI folder; of a prompt that was folded into its graph, no ids."""
    from tpvc.compiler.frontends.weights import read_json

    path, found = folder / MANIFEST, {}
    manifest = read_json(path) if path.is_file() else {}
    match manifest:
        case {"folded": {"name": str(name)}}:
            found[name] = []
    listed = manifest.get("prompts", [])
    for prompt in listed if isinstance(listed, list) else [listed]:
        match prompt:
            case {"name": str(name), "first_id": int(first), "tokens": int(tokens)} if (
                0 <= first < MOST_IDS and 0 < tokens < MOST_IDS
            ):
                found[name] = list(range(first, first + tokens))
            case _:
                raise TpvcError(f"{path} lists a prompt without its name, ids and length; export the model again")
    return found


def virtual_ids(folder: Path, task: str | None) -> list[int]:
    """Ids of the virtual tokens of a task of a GenAI folder; none for None. TpvcError for one that it does not have."""
    if task is None:
        return []
    found = carried_prompts(folder)
    if found.get(task) == []:
        raise TpvcError(f"the prompt '{task}' is folded into this folder's graph, before every text; leave --task out")
    if task not in found:
        names = ", ".join(name for name, ids in found.items() if ids)
        raise TpvcError(f"the model has no task '{task}'; it has {names or 'none'}")
    return found[task]


def _genai(folder: Path, threads: int, adapter: str | None, task: str | None) -> Engine:
    import numpy as np
    import onnxruntime_genai as og

    from tpvc.compiler.frontends.fields import token_ids

    facts = genai_facts(folder)
    file = None if adapter is None else adapter_file(folder, adapter)
    before = virtual_ids(folder, task)
    try:
        config = og.Config(str(folder))
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        model = og.Model(config)
        adapters = og.Adapters(model)
        if file is not None:
            adapters.load(str(file), adapter)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise TpvcError(f"{folder}: ONNX Runtime GenAI cannot load this folder: {_first_line(error)}") from error
    eos = set(token_ids(facts, "eos_token_id"))

    def start(ids: list[int], length: int, **options: Any) -> og.Generator:
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

    encode, decoder = _genai_text(folder, model)
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


def _genai_text(folder: Path, model: Any) -> tuple[Callable[[Prompt], list[int]], Callable[[], Callable[[int], str]]]:
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

    def encode(prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            try:
                prompt = tokenizer.apply_chat_template(json.dumps(prompt), add_generation_prompt=True)
            except RuntimeError as error:
                raise _no_template(str(folder)) from error
        return [int(token) for token in tokenizer.encode(prompt)]

    def decoder() -> Callable[[int], str]:
        return tokenizer.create_stream().decode

    return encode, decoder


def _package(folder: Path, threads: int, adapter: str | None, task: str | None, device: str) -> Engine:
    """On a GPU, with the package's kernels; on a CPU, with their references."""
    import numpy as np
    import torch

    from tpvc.compiler.backends import triton
    from tpvc.compiler.backends.triton.engine import Draw
    from tpvc.compiler.backends.triton.engine import Engine as Slots
    from tpvc.kernels.driver import present

    torch.set_num_threads(threads)
    backend = present() if device == "auto" else None if device == "cpu" else device
    compute = triton.open_cpu(folder) if backend is None else triton.open_gpu(folder, backend)
    model, slots = compute.model, Slots(compute)
    capacity = slots.holds(adapter, task)  # unknown ones are refused now

    def following(ids: list[int], want: str, draws: Iterator[Draw]) -> Iterator[Any]:
        """What is wanted after `ids`, then after every token that is sent."""
        slot, found = slots.admit(ids, adapter, task, want, next(draws))
        try:
            while True:
                token = yield found
                found = slots.decode([slot], [token], want, [next(draws)])[0]
        finally:
            slots.release(slot)

    def generate(
        ids: list[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0, stop: bool = True
    ) -> Iterator[int]:
        source = torch.Generator().manual_seed(seed)
        draws = iter(lambda: Draw(temperature, 1.0, float(torch.rand((), generator=source))), None)
        state = following(ids, "sample" if temperature else "greedy", draws)
        token = int(next(state))
        for done in range(max_new_tokens):
            if stop and token in model.facts.eos:
                break
            yield token
            if done + 1 < max_new_tokens:
                token = int(state.send(token))
        state.close()

    def logits(ids: list[int], first: int = 0) -> Any:
        state = following(ids[: first + 1], "logits", iter(lambda: Draw(1.0, 1.0, 0.0), None))
        rows = [next(state).numpy()] + [state.send(token).numpy() for token in ids[first + 1 :]]
        state.close()
        return np.stack(rows)

    encode, decoder = transformers_text(auto_tokenizer(folder), str(folder))
    kind = str(model.dtype).removeprefix("torch.")
    return Engine(
        label=f"references of the Triton kernels, {kind}" if backend is None else f"Triton kernels, {kind}",
        vocab_size=model.facts.vocab_size,
        context_length=capacity,
        size=(folder / triton.WEIGHTS).stat().st_size,
        before=[],
        encode=encode,
        generate=generate,
        decoder=decoder,
        logits=logits,
    )


def _interpreter(target: str, threads: int, adapter: str | None, task: str | None) -> Engine:
    import torch

    from tpvc.compiler import interpret
    from tpvc.compiler.frontends import load_for, tokenizer
    from tpvc.compiler.program import adapter_id, grid_of, prompt_ids

    torch.set_num_threads(threads)
    program, adapter, task = load_for(target, adapter, task)
    row, before = torch.tensor([adapter_id(program, adapter)]), prompt_ids(program, task)
    facts = program.facts
    weight = interpret.in_memory(program)

    def generate(
        ids: list[int], max_new_tokens: int, temperature: float = 0.0, seed: int = 0, stop: bool = True
    ) -> Iterator[int]:
        source = torch.Generator().manual_seed(seed)
        prompt = torch.tensor(ids)
        return interpret.generate(program, prompt, max_new_tokens, weight, temperature, source, stop, adapter)

    def logits(ids: list[int], first: int = 0) -> Any:
        with torch.no_grad():
            return interpret.logits(program, torch.tensor([ids]), weight=weight, adapter_ids=row)[0, first:].numpy()

    text: list[Any] = []

    def pair() -> tuple[Callable[[Prompt], list[int]], Callable[[], Callable[[int], str]]]:
        if not text:
            text.extend(transformers_text(tokenizer(program), target))
        return text[0], text[1]

    integers = any(grid_of(p) for p in program.params.values())
    return Engine(
        label="torch float32, dequantised" if integers else "torch float32",
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        size=weight_bytes(program),
        before=before,
        encode=lambda prompt: [*before, *pair()[0](prompt)],
        generate=generate,
        decoder=lambda: pair()[1](),
        logits=logits,
    )


def weight_bytes(program: Any) -> int:
    """Bytes of the weight files a Program was loaded from; what its parameters hold where there is no such file."""
    source = program.source
    files = list(source.weights) if source else []
    if files and all(f.is_file() for f in files):
        return sum(f.stat().st_size for f in files)
    return sum(parameter_bytes(p) for p in program.params.values())


def parameter_bytes(parameter: Any) -> int:
    """Bytes a parameter needs when stored: codes, scales (2 bytes each) and zero points for an integer one."""
    from math import prod

    from tpvc.compiler.program import grid_of

    grid, shape = grid_of(parameter), tuple(parameter.shape)
    if grid is None:
        return prod(shape) * parameter.dtype.itemsize
    groups = 1 if grid.group == 0 else shape[0] * (shape[1] // grid.columns(shape[1]))
    zeros = 0 if grid.symmetric else groups * grid.bits // 8
    return prod(shape) * grid.bits // 8 + 2 * groups + zeros


def auto_tokenizer(folder: Path) -> Any:
    from tpvc.compiler.frontends.tokenizer_files import opened

    return opened(folder)


def transformers_text(tokenizer: Any, name: str) -> tuple[Any, Any]:
    def encode(prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer(prompt)["input_ids"]
        if not getattr(tokenizer, "chat_template", None):
            raise _no_template(name)
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


def _no_template(name: str) -> TpvcError:
    return TpvcError(f"{name} has no chat template; give the prompt as it stands with --raw")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

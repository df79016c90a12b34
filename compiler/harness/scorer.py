"""How likely a target finds an answer, and what it writes: all that lm_eval wants of a model, in the target's runtime.

A Program runs batches of like length, and only the positions that predict an answer pass the head. A folder for ONNX
Runtime GenAI and a package of Triton kernels take one question at a time: its prompt at once, then the answer's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler import frontends, interpret, measure
from tpvc.compiler.engines import Engine, cores, is_genai, is_package, open_engine
from tpvc.compiler.engines.text import auto_tokenizer
from tpvc.compiler.evaluate import CHUNK
from tpvc.compiler.program import Program, adapter_id, prompt_ids
from tpvc.compiler.tuning.examples import Encoded

TOKENS = 2048
"""Of a batch, padding included."""

Verdict = tuple[float, bool]
"""The sum of an answer's log-likelihoods in nats, and whether each of its tokens is the likeliest one."""


@dataclass(frozen=True, eq=False)
class Scorer:
    """A target that is loaded; `tokenizer` is a transformers one.

    context_length  tokens it can read: what stands before every text is not counted
    verdicts        (questions, done) -> the verdict on ids[answer:] of each, of at most context_length + 1 tokens;
                    `done` is called with how many have one
    generate        (ids, max_new_tokens, temperature, seed) -> the tokens that follow, up to an end of text
    """

    tokenizer: Any
    context_length: int
    verdicts: Callable[[Sequence[Encoded], Callable[[int], Any]], list[Verdict]]
    generate: Callable[[list[int], int, float, int], Iterator[int]]


def open_scorer(target: str, adapter: str | None = None, task: str | None = None, threads: int | None = None) -> Scorer:
    """Load `target`: whatever `tpvc eval` takes, under one of its adapters and behind one of its prompts."""
    threads = threads or cores()
    if is_genai(target) or is_package(target):
        return _of_engine(open_engine(target, threads, adapter, task), Path(target))
    torch.set_num_threads(threads)
    program, adapter, task = frontends.load_for(target, adapter, task)
    return of_program(program, adapter, task)


def of_program(program: Program, adapter: str | None = None, task: str | None = None) -> Scorer:
    row, before = adapter_id(program, adapter), prompt_ids(program, task)
    weight = measure.weights(program)

    def verdicts(questions: Sequence[Encoded], done: Callable[[int], Any]) -> list[Verdict]:
        found: list[Verdict] = [(0.0, True)] * len(questions)
        ready = 0
        for batch in _batches(questions, len(before)):
            with torch.no_grad():
                judged = _judge_batch(program, weight, row, before, [questions[i] for i in batch])
            for i, verdict in zip(batch, judged, strict=True):
                found[i] = verdict
            ready += len(batch)
            done(ready)
        return found

    def generate(ids: list[int], new: int, temperature: float, seed: int) -> Iterator[int]:
        source = torch.Generator().manual_seed(seed)
        prompt = torch.tensor(ids)
        return interpret.generate(program, prompt, new, weight, temperature, source, True, adapter, task)

    return Scorer(frontends.tokenizer(program), program.facts.context_length - len(before), verdicts, generate)


def _batches(questions: Sequence[Encoded], before: int) -> Iterator[list[int]]:
    """Numbers of questions, the longest first. Those that differ in the last token only stand together."""
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].ids), questions[i].ids))
    batch: list[int] = []
    inputs: set[tuple[int, ...]] = set()
    for i in order:
        read = questions[i].ids[:-1]
        longest = before + len(questions[(batch or [i])[0]].ids) - 1
        if batch and read not in inputs and (len(inputs) + 1) * longest > TOKENS:
            yield batch
            batch, inputs = [], set()
        batch.append(i)
        inputs.add(read)
    if batch:
        yield batch


def _judge_batch(
    program: Program, weight: interpret.Weight, adapter: int, before: list[int], questions: Sequence[Encoded]
) -> list[Verdict]:
    """Texts that are the same but for their last token are read once."""
    rows: dict[tuple[int, ...], int] = {}
    for q in questions:
        rows.setdefault(q.ids[:-1], len(rows))
    longest = len(before) + max(len(read) for read in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for read, i in rows.items():
        whole = [*before, *read]
        ids[i, : len(whole)] = torch.tensor(whole)
        mask[i, : len(whole)] = True
    body, head = interpret.at_head(program)
    values = {"input_ids": ids, "mask": mask, "positions": interpret.positions_of(mask, longest)}
    every = torch.full((len(rows),), adapter)
    hidden = interpret.run(body, {**values, "adapter_ids": every}, weight)
    where = [(rows[q.ids[:-1]], len(before) + t - 1) for q in questions for t in range(q.answer, len(q.ids))]
    picked = hidden[tuple(torch.tensor(where).T)]
    targets = torch.tensor([token for q in questions for token in q.ids[q.answer :]])
    held = {name: weight(name) for n in head for name in n.params.values()}
    judged = []
    for part, wanted in zip(
        *(x.split(max(1, CHUNK // program.facts.vocab_size)) for x in (picked, targets)), strict=True
    ):
        entering = {head[0].inputs[0]: part[None], "adapter_ids": every[:1]}
        judged.append(_judge(interpret.run(head, entering, held.__getitem__)[0], wanted))
    chances, likeliest = (torch.cat(x) for x in zip(*judged, strict=True))
    each = [len(q.ids) - q.answer for q in questions]
    return [
        (float(c.sum()), bool(best.all())) for c, best in zip(chances.split(each), likeliest.split(each), strict=True)
    ]


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits float32 [P, vocab], targets int64 [P] -> log-likelihoods float64 [P], bool [P]: is it the likeliest?"""
    chances = logits.log_softmax(-1)
    return chances.gather(-1, targets[:, None])[:, 0].double(), chances.argmax(-1) == targets


def _of_engine(engine: Engine, folder: Path) -> Scorer:
    before = len(engine.before)

    def verdicts(questions: Sequence[Encoded], done: Callable[[int], Any]) -> list[Verdict]:
        found: list[Verdict] = [(0.0, True)] * len(questions)
        first = last = None
        for ready, i in enumerate(sorted(range(len(questions)), key=lambda i: (questions[i].ids, questions[i].answer))):
            q = questions[i]
            if (first, last) != (q.answer, q.ids[:-1]):
                first, last = q.answer, q.ids[:-1]
                logits = torch.from_numpy(engine.logits([*engine.before, *last], before + first - 1))
            chances, likeliest = _judge(logits, torch.tensor(q.ids[first:]))
            found[i] = float(chances.sum()), bool(likeliest.all())
            done(ready + 1)
        return found

    def generate(ids: list[int], new: int, temperature: float, seed: int) -> Iterator[int]:
        return engine.generate([*engine.before, *ids], new, temperature, seed)

    tokenizer = auto_tokenizer(folder)
    return Scorer(tokenizer, engine.context_length - before, verdicts, generate)

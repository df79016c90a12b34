"""Measure any target, a Program or a folder for ONNX Runtime GenAI, against the original it was made from.

Every target computes in its own runtime; the protocol is that of tpvc.compiler.evaluate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler import frontends, interpret
from tpvc.compiler.engines import Engine, cores, is_genai, is_package, open_engine
from tpvc.compiler.engines.text import auto_tokenizer
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.evaluate import Perplexity, Predictor, pieces, predictor, read_text, score, text_windows
from tpvc.compiler.program import Program, adapter_id, prompt_ids
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.windows import beginning, encode, text_tokens

HELD_OUT = Path(__file__).with_name("held_out.txt")
"""An original English text of about 1,600 tokens that no calibration set of ours holds."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A target that is loaded; `tokenizer` is a transformers one."""

    target: str
    tokenizer: Any
    predictor: Predictor


def measure(
    target: str | Path,
    text: str | Path | None = None,
    *,
    against: str | Path | None = None,
    windows: int | None = None,
    seqlen: int | None = None,
    threads: int | None = None,
    adapter: str | None = None,
    task: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Perplexity of `target` (a GenAI folder, a package, or what `tpvc.load` takes), and its distance from an original.

    text     a UTF-8 file whose first windows are used; without one, a short built-in English text
    against  the original: it is measured on the same tokens, and `target` is compared with it
    windows  by default 40, or as many as the built-in text holds
    seqlen   tokens a window; by default 512, or 128 for the built-in text, and never more than the model's context
    adapter  one of the target's adapters, by name, or a PEFT directory: it is measured under that, the original under
             none
    task     likewise one of its soft prompts, which stands before every window

    {"text", "windows", "seqlen", "target", "perplexity", "stderr"}, "adapter" and "task" where given, and with an
    original "against": {"target", "perplexity", "stderr", "kl" (mean KL(original || target), nats a token), "top1"
    (share of the same likeliest token)}. The standard errors are over windows, nan for one. TpvcError for what cannot
    be loaded or compared, for an adapter or a task that the target lacks, and for a text or a context that is too
    short. A folder that gives the last token's logits only is run token by token.
    """
    threads = threads or cores()
    names = [(str(target), adapter, task), *([(str(against), None, None)] if against else [])]
    subjects = []
    for i, given in enumerate(names):
        progress("load", i, len(names), given[0])
        subjects.append(open_subject(given[0], threads, *given[1:]))
    progress("load", len(names), len(names), "")
    tokens = windows_of(subjects[0], text, windows, seqlen)
    found = compare(subjects[0], subjects[1] if against else None, tokens, progress)
    protocol = {"text": str(text) if text else "built-in", "windows": len(tokens), "seqlen": tokens.shape[1]}
    chosen = {key: value for key, value in (("adapter", adapter), ("task", task)) if value is not None}
    return {**protocol, **chosen, **found}


def open_subject(target: str, threads: int, adapter: str | None = None, task: str | None = None) -> Subject:
    """Load `target` for measuring, under one of its adapters and behind one of its prompts, or as the base model."""
    torch.set_num_threads(threads)
    if is_genai(target) or is_package(target):
        return Subject(target, auto_tokenizer(Path(target)), _runtime(open_engine(target, threads, adapter, task)))
    program, adapter, task = frontends.load_for(target, adapter, task)
    adapter_id(program, adapter), prompt_ids(program, task)  # unknown ones are refused before weights are read
    return Subject(target, frontends.tokenizer(program), predictor(program, weights(program), adapter, task))


def weights(program: Program) -> interpret.Weight:
    """The program's weights, in memory when they take less than a quarter of it."""
    floats = 4 * sum(math.prod(p.shape) for p in program.params.values())
    small = 4 * floats < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return interpret.in_memory(program) if small else interpret.from_files(program)


def _runtime(engine: Engine) -> Predictor:
    """An engine as score takes it: a window at a time."""

    def logits(tokens: Tensor) -> Iterator[Tensor]:
        fed = ([*engine.before, *window.tolist()] for window in tokens)
        windows = (torch.from_numpy(engine.logits(ids)[len(engine.before) : -1]) for ids in fed)
        return pieces(windows, engine.vocab_size)

    return Predictor(engine.vocab_size, engine.context_length - len(engine.before), logits)


def windows_of(
    subject: Subject, text: str | Path | None = None, windows: int | None = None, seqlen: int | None = None
) -> Tensor:
    """Windows of `text`, or of the built-in one, int64 [n, L]; TpvcError when they do not fit text or context."""
    context = subject.predictor.context_length
    if seqlen is None:
        seqlen = min(512 if text else 128, context)
    if seqlen > context:
        raise TpvcError(f"windows of {seqlen} tokens do not fit the model's context of {context}; lower --seqlen")
    if windows is None and text is None:
        held = len(encode(subject.tokenizer, read_text(HELD_OUT)))
        windows = max(1, held // text_tokens(beginning(subject.tokenizer), seqlen))
    elif windows is None:
        windows = 40
    return text_windows(text or HELD_OUT, subject.tokenizer, windows, seqlen)


def compare(
    subject: Subject, original: Subject | None, tokens: Tensor, progress: Progress | None = None
) -> dict[str, Any]:
    """{"target", "perplexity", "stderr"} on tokens int64 [n, L]; with an original also "against", as in `measure`."""
    reference = original.predictor if original else None
    found = score(subject.predictor, tokens, reference, progress, f"measure {Path(subject.target).name}")
    figures = {"target": subject.target, **_figures(found.perplexity)}
    if original is not None:
        distance = {"kl": found.divergence.kl, "top1": found.divergence.top1}
        figures["against"] = {"target": original.target, **_figures(found.reference), **distance}
    return figures


def _figures(perplexity: Perplexity) -> dict[str, float]:
    return {"perplexity": perplexity.value, "stderr": perplexity.stderr}

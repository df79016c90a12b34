"""`tpvc eval`: perplexity of a text, and what was lost against the original."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tpvc.compiler.cli import console
from tpvc.compiler.errors import TpvcError


@click.command(
    "eval",
    epilog="""\b
Examples:
  tpvc eval smollm2-w4 --text wiki.test.txt
  tpvc eval smollm2-w4 --against smollm2-135m --text wiki.test.txt --windows 40 --seqlen 512
  tpvc eval smollm2-onnx --against smollm2-135m          the exported folder, in its own runtime

\b
The first WINDOWS * SEQLEN tokens of FILE are cut into windows; every window predicts its own
tokens but the first. The standard error is over windows. KL is mean KL(original || target) in
nats a token; top-1 is how often both think the same token likeliest. Without --text a short
English text that is in no calibration set is used: enough to see that nothing broke, no more.
""",
)
@click.argument("target")
@click.option("--against", metavar="ORIGINAL", help="Also measure ORIGINAL, and the distance of TARGET from it.")
@click.option("--text", type=click.Path(path_type=Path, dir_okay=False), help="A UTF-8 text file.")
@click.option("--windows", type=click.IntRange(1), help="How many.  [default: 40, or what the built-in text holds]")
@click.option("--seqlen", type=click.IntRange(2), help="Tokens a window.  [default: 512, or 128 for the built-in text]")
@click.option("--threads", type=click.IntRange(1), help="Threads of the runtime.  [default: all cores]")
@console.json_option
def command(
    target: str,
    against: str | None,
    text: Path | None,
    windows: int | None,
    seqlen: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Perplexity of TARGET, distance from the original.

    TARGET is an exported folder, an artefact or a MODEL.
    """
    from tpvc.compiler.chat import cores

    threads = threads or cores()
    with console.Bars() as bars:
        subject = open_subject(target, threads)
        original = open_subject(against, threads) if against else None
        tokens = windows_of(subject, text, windows, seqlen)
        found = measure(subject, original, tokens, bars)
    found = {"text": str(text) if text else "built-in", "windows": len(tokens), "seqlen": tokens.shape[1], **found}
    if as_json:
        return console.print_json(found)
    console.out().print(
        results_table([found], f"{found['windows']} windows of {found['seqlen']} tokens, {found['text']} text")
    )


HELD_OUT = Path(__file__).with_name("held_out.txt")
"""An original English text of about 2,000 tokens that no calibration set of ours holds."""


@dataclass(frozen=True, eq=False)
class Subject:
    """Something to measure: a Program and how its parameters are read, or a GenAI folder's logits function.

    logits     ids of one window -> float32 numpy [L, vocab]
    """

    target: str
    tokenizer: Any
    vocab_size: int
    context_length: int
    logits: Callable[[list[int]], Any]
    program: Any = None
    weight: Any = None


def open_subject(target: str, threads: int) -> Subject:
    """Load `target` for measuring. Weights stay in memory when they take less than a quarter of it."""
    import torch

    from tpvc.compiler import chat, frontends, interpret

    torch.set_num_threads(threads)
    if chat.is_genai(target):
        engine = chat.open_engine(target, threads)
        tokenizer = chat.auto_tokenizer(Path(target))
        return Subject(target, tokenizer, engine.vocab_size, engine.context_length, engine.logits)
    program = frontends.load(target)
    floats = 4 * sum(math.prod(p.shape) for p in program.params.values())
    small = 4 * floats < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    weight = interpret.in_memory(program) if small else interpret.from_files(program)

    def logits(ids: list[int]) -> Any:
        with torch.no_grad():
            return interpret.logits(program, torch.tensor([ids]), weight=weight)[0].numpy()

    facts = program.facts
    return Subject(
        target, frontends.tokenizer(program), facts.vocab_size, facts.context_length, logits, program, weight
    )


def measure(subject: Subject, original: Subject | None, tokens: Any, progress: Any) -> dict[str, Any]:
    """Perplexity of `subject` on tokens int64 [n, L]; with an original, that one's too, KL and top-1 agreement."""
    from tpvc.compiler.evaluate import divergence

    found: dict[str, Any] = {"target": subject.target, **_perplexity(subject, tokens, progress)}
    if original is None:
        return found
    if subject.program and original.program:
        distance = divergence(
            subject.program, original.program, tokens, subject.weight, original.weight, _named(progress, "divergence")
        )
        kl, top1 = distance.kl, distance.top1
    else:
        kl, top1 = _divergence(subject, original, tokens, _named(progress, "divergence"))
    found["against"] = {"target": original.target, **_perplexity(original, tokens, progress), "kl": kl, "top1": top1}
    return found


def results_table(found: list[dict[str, Any]], title: str) -> Any:
    """A line for every measured target, after a line for the original."""
    made = console.table(title, "", "perplexity", "± standard error", "KL, nats/token", "same top-1")
    if against := found[0].get("against"):
        made.add_row(against["target"], f"{against['perplexity']:.2f}", f"{against['stderr']:.2f}", "0", "100 %")
    for row in found:
        far = row.get("against")
        distance = (f"{far['kl']:.4f}", f"{100 * far['top1']:.1f} %") if far else ("", "")
        made.add_row(row["target"], f"{row['perplexity']:.2f}", f"{row['stderr']:.2f}", *distance)
    return made


def windows_of(
    subject: Subject, text: Path | None = None, windows: int | None = None, seqlen: int | None = None
) -> Any:
    """Windows of `text`, or of the built-in held-out text, int64 [n, L]."""
    from tpvc.compiler.evaluate import encode, read_text, text_windows

    seqlen = min(seqlen or (512 if text else 128), subject.context_length) if seqlen is None else seqlen
    if seqlen > subject.context_length:
        raise TpvcError(
            f"windows of {seqlen} tokens do not fit the model's context of {subject.context_length}; lower --seqlen"
        )
    if text is None:
        windows = windows or max(1, len(encode(subject.tokenizer, read_text(HELD_OUT))) // seqlen)
    return text_windows(text or HELD_OUT, subject.tokenizer, windows or 40, seqlen)


def _perplexity(subject: Subject, tokens: Any, progress: Any) -> dict[str, float]:
    """{"perplexity", "stderr"}; the protocol of tpvc.compiler.evaluate, window by window for a runtime."""
    import torch

    from tpvc.compiler.evaluate import perplexity

    tell = _named(progress, f"perplexity of {Path(subject.target).name}")
    if subject.program:
        result = perplexity(subject.program, tokens, subject.weight, tell)
        return {"perplexity": result.value, "stderr": result.stderr}
    losses = []
    for i, window in enumerate(tokens):
        logits = torch.from_numpy(subject.logits(window.tolist())[:-1])
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).double())
        tell("", i + 1, len(tokens), "windows")
    nll = torch.stack(losses)
    value = nll.mean().exp().item()
    return {"perplexity": value, "stderr": value * nll.std().item() / math.sqrt(len(nll)) if len(nll) > 1 else math.nan}


def _divergence(subject: Subject, original: Subject, tokens: Any, tell: Any) -> tuple[float, float]:
    """(mean KL(original || subject) in nats a token, top-1 agreement) where one of the two is no Program."""
    import torch

    if subject.vocab_size != original.vocab_size:
        raise TpvcError(
            f"the two models have vocabularies of {subject.vocab_size} and {original.vocab_size} tokens; "
            "only models with the same one can be compared"
        )
    kl = agreed = 0.0
    for i, window in enumerate(tokens):
        q, p = (torch.from_numpy(s.logits(window.tolist())[:-1]).log_softmax(-1) for s in (subject, original))
        agreed += (p.argmax(-1) == q.argmax(-1)).double().mean().item()
        kl += (p.exp() * (p - q)).sum(-1).double().mean().item()
        tell("", i + 1, len(tokens), "windows")
    return kl / len(tokens), agreed / len(tokens)


def _named(progress: Any, stage: str) -> Any:
    return lambda _, done, total, note: progress(stage, done, total, note)

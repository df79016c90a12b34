"""`tpvc run`: a model that answers, token by token."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import click

from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import check_text, device_option
from tpvc.compiler.errors import TpvcError

LEAST = 1e-6
"""The lowest temperature above 0: logits divided by it are finite in float32."""


@click.command(
    "run",
    epilog="""\b
Examples:
  tpvc run smollm2-onnx "Why is the sky blue?"
  tpvc run smollm2-onnx                                  a small chat; Ctrl-D ends it
  tpvc run ./gpt2 --raw "Once upon a time" --temperature 0.8
  tpvc run smollm2-onnx "Why is the sky blue?" --adapter pirate
  tpvc run smollm2-w4 --task sentiment --raw "Review: a fine film
Sentiment:"
  cat question.txt | tpvc run smollm2-w4 --json

\b
An onnx folder of `tpvc export` runs in ONNX Runtime GenAI, a triton package on the GPU or,
without one, through its kernels' references; everything else through the reference interpreter
(torch, float32), which is slower but takes every model that tpvc can read.
""",
)
@click.argument("target")
@click.argument("prompt", required=False)
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: the likeliest token.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Of the draws at a temperature above 0.",
)
@click.option("--raw", is_flag=True, help="The prompt as it stands, without the chat template.")
@click.option(
    "--adapter",
    metavar="NAME",
    help="An adapter that TARGET carries, or, unless TARGET is exported, the folder of a RoAd adapter (PEFT's format)."
    "  [default: the base model]",
)
@click.option(
    "--task",
    metavar="NAME",
    help="Likewise a soft prompt, put before the prompt.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads of the runtime.  [default: all cores]")
@device_option
@console.json_option
def command(
    target: str,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    raw: bool,
    adapter: str | None,
    task: str | None,
    threads: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Let TARGET answer PROMPT.

    TARGET is an exported folder, an artefact or a MODEL.
    """
    if not math.isfinite(temperature) or 0 < temperature < LEAST:  # which a range of click's lets pass
        raise TpvcError(f"--temperature is {temperature}; expected 0, or a number from {LEAST} on")
    chat = prompt is None and console.interactive() and not as_json
    if prompt is None and not chat:
        prompt = _piped()
    check_text(prompt or "")

    from tpvc.compiler.engines import open_engine

    name = console.literal(target)
    with console.err().status(f"loading {name}") as status:

        def timing(stage: str, done: int, total: int, note: str) -> None:
            status.update(f"first start of {name} on this device: timing {stage}, {done} of {total} {note}")

        engine = open_engine(target, threads, adapter, task, device, timing)
    sampling = {"temperature": temperature, "seed": seed}
    if chat:
        return _chat(engine, raw, max_new_tokens, sampling)
    ids = engine.encode(prompt if raw else [{"role": "user", "content": prompt}])
    answer = reply(engine, ids, max_new_tokens, echo=not as_json, **sampling)
    if as_json:
        console.print_json({"target": target, "engine": engine.label, **answer})


def _piped() -> str:
    """The prompt on standard input."""
    try:
        prompt = sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise TpvcError(f"standard input is not UTF-8 at byte {error.start}; expected the prompt as text") from error
    if not prompt:
        raise TpvcError("no prompt was given: expected one as an argument, on standard input or in a terminal")
    return prompt


def reply(engine: Any, ids: list[int], max_new_tokens: int, echo: bool, **sampling: Any) -> dict[str, Any]:
    """Stream an answer to standard output (if `echo`) and return it with its figures."""
    from tpvc.compiler.engines import room

    limit = room(engine.context_length, ids, max_new_tokens)
    decode, text, tokens, first = engine.decoder(), [], [], 0.0
    start = time.perf_counter()
    for token in engine.generate(ids, limit, **sampling):
        first = first or time.perf_counter() - start
        tokens.append(token)
        text.append(decode(token))
        if echo:
            click.echo(text[-1], nl=False)
            sys.stdout.flush()
    rest = time.perf_counter() - start - first
    if echo:
        click.echo()
    return {
        "text": "".join(text),
        "tokens": tokens,
        "prompt_tokens": len(ids),
        "new_tokens": len(tokens),
        "first_token_seconds": first,
        "tokens_per_second": (len(tokens) - 1) / rest if len(tokens) > 1 and rest > 0 else None,
    }


def _chat(engine: Any, raw: bool, max_new_tokens: int, sampling: dict[str, Any]) -> None:
    click.echo(f"{engine.label}; Ctrl-D ends the chat", err=True)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
            check_text(line)
        except EOFError:
            return click.echo()
        except (UnicodeDecodeError, TpvcError):
            click.echo("tpvc: that line is not UTF-8; expected text", err=True)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        while len(messages) > 1 and not raw and _crowded(engine, messages, max_new_tokens):
            del messages[:2]  # the oldest question, and its answer
        try:
            answer = reply(engine, engine.encode(line if raw else messages), max_new_tokens, echo=True, **sampling)
        except TpvcError as error:
            click.echo(f"tpvc: {error}", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer["text"]})


def _crowded(engine: Any, messages: list[dict[str, str]], wanted: int) -> bool:
    """Whether the conversation leaves no room for an answer: for what was asked for, or a quarter of the context."""
    return engine.context_length - len(engine.encode(messages)) < min(wanted, engine.context_length // 4)

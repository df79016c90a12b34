"""`tpvc prompt embeds`: a text behind a soft prompt, for vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tpvc.compiler.cli import console
from tpvc.compiler.cli.options import check_text
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import replacing


@click.command(
    "embeds",
    epilog="""\b
Example:
  vllm serve smollm2-w4-vllm --enable-prompt-embeds
  tpvc prompt embeds smollm2-w4 "Review: a fine film" --raw --task sentiment --served smollm2-w4-vllm > request.json
  curl localhost:8000/v1/completions -H "Content-Type: application/json" -d @request.json

\b
vLLM has no soft prompts, but takes the vectors of a whole prompt in place of its tokens. The
request holds those of the soft prompt and, behind them, of the text, in the model's dtype.
""",
)
@click.argument("model")
@click.argument("text")
@click.option("--task", required=True, metavar="NAME", help="A soft prompt that MODEL carries, or the folder of one.")
@click.option("--raw", is_flag=True, help="The text as it stands, without the chat template.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--served", metavar="NAME", help="What the server calls the model.  [default: MODEL]")
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path, dir_okay=False), help="File, not standard output."
)
def command(
    model: str, text: str, task: str, raw: bool, max_new_tokens: int, served: str | None, out: Path | None
) -> None:
    """Write the request with which vLLM answers TEXT behind a soft prompt."""
    check_text(text)
    if out is not None and (out.exists() or not out.absolute().parent.is_dir()):
        raise TpvcError(f"'{out}' cannot be written; expected the name of a new file in a directory that exists")

    from tpvc.compiler.prompt_embeds import prompt_embeds

    with console.err().status(f"loading {console.literal(model)}"):
        prompt = text if raw else [{"role": "user", "content": text}]
        request = prompt_embeds(model, task, prompt, max_tokens=max_new_tokens, served=served)
    if out is None:
        return click.echo(json.dumps(request))
    with replacing(out) as partial:
        partial.write_text(json.dumps(request) + "\n", encoding="utf-8")

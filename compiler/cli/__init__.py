"""The command line: `tpvc`, one file a command. Every command is a thin skin over a Python function of the same shape.

Results go to standard output, everything else (progress, remarks, errors) to standard error. Bad input ends with one
sentence and exit code 2, Ctrl-C with 130, SIGTERM with 143. Nothing heavy is imported before a command runs, so that
--help is quick.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from typing import Any

import click

from tpvc import __version__
from tpvc.compiler.cli import (
    bench,
    console,
    demo,
    eval,
    export,
    finetune,
    importance,
    inspect,
    plan,
    prompt,
    quantize,
    road,
    run,
    verify,
)
from tpvc.compiler.errors import TpvcError, printable

INTERRUPTED, TERMINATED = 130, 143
BAD_INPUT = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM came: the same is to be done as when Ctrl-C is pressed."""


class Tpvc(console.Ordered):
    """A group whose errors are one sentence."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            sys.exit(super().main(*args, standalone_mode=False, **kwargs) or 0)
        except click.Abort as abort:
            if isinstance(abort.__cause__, EOFError):
                raise abort.__cause__ from None
            code = TERMINATED if isinstance(abort.__cause__, Terminated) else INTERRUPTED
            _fail(str(abort) or "interrupted", code)
        except click.exceptions.NoArgsIsHelpError as error:
            _fail(error.format_message(), BAD_INPUT, prefix="")
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "tpvc"
            _fail(f"{error.format_message().rstrip('.')} (see `{path} --help`)", BAD_INPUT)
        except click.ClickException as error:
            _fail(error.format_message(), BAD_INPUT)
        except TpvcError as error:
            _fail(str(error), BAD_INPUT)
        except Exception as error:
            sentence = _about_the_machine(error)
            if sentence is None:
                raise
            _fail(sentence, BAD_INPUT)


def _fail(sentence: str, code: int, prefix: str = "tpvc: ") -> None:
    click.echo(printable(prefix + sentence), err=True)
    sys.exit(code)


def _about_the_machine(error: Exception) -> str | None:
    """A sentence for what is no bug: no memory, a full disk, a path that may not be written. None for everything else.

    Libraries wrap the system's error in their own (safetensors: "I/O error: No space left on device (os error 28)").
    """
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, of a device
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))  # torch's, of the host
    ):
        return (
            "memory ran out; run the same command where there is more of it, or on another device (what quantize takes"
            " `tpvc plan` says, and fewer --nsamples or a shorter --seqlen take less)"
        )
    number = getattr(error, "errno", None)
    if number is None and (wrapped := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(wrapped[1])
    name = getattr(error, "filename", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return f"the disk is full{f' ({name})' if name else ''}; free some space and run the same command again"
    if number == errno.ENAMETOOLONG:
        return f"'{error.filename!s:.40}...' is longer than a file's name may be; check what was typed"
    if isinstance(error, RuntimeError) and str(error).startswith("Could not determine home"):  # pathlib, of ~someone
        return "a path begins with ~ and a name, and there is no such user; write the directory out"
    if isinstance(error, PermissionError) or number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{name or 'a file'} may not be opened: {os.strerror(number)}; choose a path that is yours"
    if number in (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOTCONN):
        where = name or "a file"
        return (
            f"{where} cannot be read or written: {os.strerror(number)}; see to the disk and run the same command again"
        )
    return None


@click.group(
    cls=Tpvc,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
First steps:
  tpvc demo                                             the whole way, on a small model
  tpvc quantize ./Llama-3.2-1B -o llama-w4              a folder that transformers loads
  tpvc export llama-w4 --to onnx -o llama-onnx          a folder that ONNX Runtime GenAI runs
  tpvc run llama-onnx "Why is the sky blue?"
  tpvc bench llama-onnx ./Llama-3.2-1B                  speed, memory and size, side by side

\b
A MODEL is a Hugging Face directory, a .gguf file, a name on the Hugging Face hub, an artefact of
`tpvc quantize`, or smollm2-135m (a demo model that is fetched when first used).
""",
)
@click.version_option(__version__, prog_name="tpvc")
def cli() -> None:
    """Quantise a language model with FlexRound and compile it to the hardware it will run on."""


for module in (demo, plan, quantize, export, road, prompt, importance, finetune, run, eval, bench, verify, inspect):
    cli.add_command(module.command)


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one does not wait
    raise Terminated


def main() -> None:
    """Entry point of the `tpvc` script."""
    signal.signal(signal.SIGTERM, _terminate)
    cli(prog_name="tpvc")

"""The command line in this process, and one artefact of every kind to point it at."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner


@pytest.fixture(scope="session")
def tpvc():
    """tpvc("inspect", path, ...) -> click's result, with exit_code, stdout and stderr."""
    from tpvc.compiler.cli import cli

    def call(*arguments, **options):
        return CliRunner().invoke(cli, [str(a) for a in arguments], **options)

    return call


@pytest.fixture(scope="session")
def ok(tpvc):
    """The same, for a command that must succeed with --json: the one object on standard output."""

    def call(*arguments, **options):
        result = tpvc(*arguments, "--json", **options)
        assert result.exit_code == 0, result.stderr + repr(result.exception)
        return json.loads(result.stdout)

    return call


@pytest.fixture(scope="session")
def refused(tpvc):
    """The same, for bad input: exit code 2 and the last line of standard error, which is the sentence."""

    def call(*arguments, code=2, **options):
        result = tpvc(*arguments, **options)
        assert result.exit_code == code, result.stderr + repr(result.exception)
        assert result.stdout == ""
        sentences = [x for x in result.stderr.splitlines() if x.startswith("tpvc: ")]
        assert len(sentences) == 1, result.stderr
        assert "Traceback" not in result.stderr
        return sentences[0].removeprefix("tpvc: ")

    return call


@pytest.fixture(scope="session")
def artefact(tmp_path_factory, ok, tiny_llama) -> Path:
    """tiny_llama rounded to nearest: 4 bits, 32 columns a scale."""
    out = tmp_path_factory.mktemp("artefacts") / "w4"
    ok("quantize", tiny_llama, "-o", out, "--method", "rtn", "--bits", 4, "--group-size", 32)
    return out


@pytest.fixture(scope="session")
def exported(tmp_path_factory, ok, artefact) -> Path:
    """The artefact as a folder for ONNX Runtime GenAI, computing in float32."""
    out = tmp_path_factory.mktemp("exports") / "onnx"
    ok("export", artefact, "-o", out, "--accuracy-level", 0)
    return out

"""Is what was written what was meant? Targets are read again, each as its own format says, and held against each other.

What cannot be shown is said to be not shown; the first difference is an error that names the number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Program
from tpvc.compiler.progress import Progress, silent

FORMATS = {"gptq": "GPTQ", "awq": "AWQ", "compressed-tensors": "compressed-tensors"}
"""quant_method -> what people call it."""


@dataclass(frozen=True)
class Finding:
    """Of `target`, its `subject` (files, numbers, logits) is proven, or is not for the reason that is `said`."""

    target: str
    kind: str
    subject: str
    proven: bool
    said: str


def verify(targets: Sequence[str | Path], *, logits: bool = True, progress: Progress = silent) -> tuple[Finding, ...]:
    """Findings about every target: a folder of `export`, an artefact, or any MODEL.

    files    have the hashes that tpvc.json lists
    numbers  of all targets are those of the first one that is a model: integers bit for bit, floats too, or rounded
             once where the format has fewer bits for them
    logits   of one short text, computed by each format's own runtime where it is installed, are those of the
             interpreter within a tolerance that is derived in `logits.py`

    TpvcError, one sentence, for a target that cannot be read and for the first difference.
    """
    from tpvc.compiler.verification import files
    from tpvc.compiler.verification.logits import Expected, check_logits

    named = [str(target) for target in targets]
    if not named:
        raise TpvcError("nothing was named; expected a folder of tpvc export, an artefact or a model")
    found: list[Finding] = []
    programs, reference = {}, None
    for target in dict.fromkeys(named):
        if (kind := folder_kind(target)) is None:
            programs[target] = program = _load(target)
            reference = reference or target
            kind = model_kind(program)
        say = _sayer(found, target, kind)
        say("files", *files.check(Path(target).expanduser()))
    expected = Expected.of(programs[reference]) if reference and logits else None
    for target in dict.fromkeys(named):
        kind = folder_kind(target) or model_kind(programs[target])
        say = _sayer(found, target, kind)
        if reference is None:
            say("numbers", False, "no model is among the targets that they could be compared with")
            continue
        say("numbers", True, _numbers(target, programs, reference, progress))
        if expected is None:
            say("logits", False, "they were not asked for")
            continue
        progress("logits", 0, 1, target)
        for proven, said in check_logits(target, programs.get(target), expected):
            say("logits", proven, said)
        progress("logits", 1, 1, "")
    return tuple(found)


def check_written(folder: Path, program: Program, progress: Progress = silent) -> None:
    """The numbers in a folder that was just written for `program`, read again. TpvcError for the first difference."""
    said = str(folder)
    programs = {"the model": program} | ({} if folder_kind(said) else {said: _load(said)})
    _numbers(said, programs, "the model", progress)


def _load(target: str) -> Program:
    from tpvc.compiler import frontends

    return frontends.load(target, integers=True)


def _sayer(found: list[Finding], target: str, kind: str) -> Callable[[str, bool, str], None]:
    return lambda subject, proven, said: found.append(Finding(target, kind, subject, proven, said))


def folder_kind(target: str) -> str | None:
    """What `export` made of a model that the frontends do not read; None for what they may."""
    path = Path(target).expanduser()
    if (path / "triton.json").is_file():
        return "Triton package"
    if (path / "model.onnx").is_file() or (path / "portable" / "model.onnx").is_file():
        return "ONNX folder"
    return None


def model_kind(program: Program) -> str:
    source = program.source
    if source.gguf is not None:
        return "GGUF file"
    method = (source.config.get("quantization_config") or {}).get("quant_method")
    return f"{FORMATS.get(method, method)} checkpoint" if method else "checkpoint"


def _numbers(target: str, programs: dict[str, Program], reference: str, progress: Progress) -> str:
    """Compare the numbers of a target with those of the reference; what is to be said when they agree."""
    from tpvc.compiler.verification import matrices, onnx_numbers, triton_numbers

    wanted, folder = programs[reference], Path(target).expanduser()
    if target == reference:
        return f"the reference: {matrices.read_all(wanted, progress)}"
    match folder_kind(target):
        case "ONNX folder":
            graphs = [path for path in (folder, folder / "portable") if (path / "model.onnx").is_file()]
            found = {str(path / "model.onnx"): onnx_numbers.read(path, wanted) for path in graphs}
        case "Triton package":
            found = {target: triton_numbers.read(folder, wanted)}
        case _:
            found = {target: matrices.of_program(programs[target], wanted)}
    counts = [str(matrices.compare(wanted, numbers, name, reference, progress)) for name, numbers in found.items()]
    return f"as in {reference}: {'; in portable/: '.join(counts)}"

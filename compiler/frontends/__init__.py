"""From what a user names to a verified Program: a checkpoint directory, a GGUF file, a hub id, or the demo model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.adapters.road import NAME, Road, check_name
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import ADAPTERS, MANIFEST, PROMPTS
from tpvc.compiler.program import Program
from tpvc.compiler.verify import verify

DEMO = "smollm2-135m"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "*.jinja"]
NOT_HUB_FILES = ["consolidated*"]
"""The weights again, in the layout of their authors' own code."""


def load(model: str | Path, *, integers: bool = False) -> Program:
    """The model that `model` names. Weights stay in their files until a node asks for them.

    integers  of a .gguf file are kept where they can be (`gguf_integers`), to be exported as they are, rather than
              dequantised, to be worked on; other models are what they say
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return verify(_directory(path, str(model)))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise TpvcError(f"{path} is a file, but not a .gguf; expected a checkpoint directory or a .gguf file")
        return verify(_gguf(path, str(model), integers))
    if str(model) == DEMO:
        from tpvc.compiler.frontends import demo

        return verify(_gguf(demo.fetch(), DEMO, integers))
    if HUB_ID.fullmatch(str(model)) and path.suffix.lower() not in (".gguf", ".safetensors"):
        return verify(_directory(_from_hub(str(model)), str(model)))
    raise TpvcError(
        f"there is no '{model}'; expected a checkpoint directory, a .gguf file, a hub id like 'owner/name', or '{DEMO}'"
    )


def tokenizer(program: Program) -> Any:
    """The transformers tokenizer of `program.source`, read from its files (never from a hub)."""
    from tpvc.compiler.frontends.tokenizer_files import opened

    if program.source is None:
        raise TpvcError("this program has no source directory to take a tokenizer from; load it from a checkpoint")
    directory = program.source.directory
    if program.source.gguf is not None:
        from tpvc.compiler.frontends import gguf

        return gguf.tokenizer(program.source.gguf)
    return opened(directory)


def manifest(program: Program) -> dict[str, Any] | None:
    """The tpvc.json beside the weights of `program`; None for weights that tpvc did not write."""
    path = program.source.directory / MANIFEST
    if program.source.gguf is not None or not path.is_file():
        return None
    from tpvc.compiler.frontends.weights import read_json

    found = read_json(path)
    return found if "tpvc" in found else None


def read_roads(program: Program, directories: Mapping[str, str | Path]) -> tuple[Road, ...]:
    """The RoAd adapters in {name: PEFT directory} for `program`."""
    from tpvc.compiler.adapters import road_files
    from tpvc.compiler.adapters.fits import check_undivided

    for name in directories:
        check_name(name)
    places = [Path(d).expanduser() for d in directories.values()]
    found = tuple(road_files.read(d, program, name) for name, d in zip(directories, places, strict=True))
    divided = (manifest(program) or {}).get("divided") if program.source else None
    for road, directory in zip(found, places, strict=True):
        if isinstance(divided, list):
            check_undivided(road, road_files.made_for(directory), program, divided)
    return found


def with_roads(program: Program, directories: Mapping[str, str | Path]) -> Program:
    """`program` with the RoAd adapters in {name: PEFT directory} beside its weights; ids in that order."""
    from tpvc.passes.bank_road import BankRoad

    return verify(BankRoad(read_roads(program, directories))(program), "BankRoad") if directories else program


def read_prompts(program: Program, directories: Mapping[str, str | Path]) -> tuple[Prompt, ...]:
    """The soft prompts in {name: PEFT directory} for `program`. TpvcError for one that says it is another model's."""
    from tpvc.compiler.adapters import prompt_files
    from tpvc.compiler.adapters.fits import check_tuned_for

    for name in directories:
        check_name(name)
    found = tuple(prompt_files.read(Path(d).expanduser(), name) for name, d in directories.items())
    check_tuned_for(found, program)
    return found


def with_prompts(program: Program, directories: Mapping[str, str | Path]) -> Program:
    """`program` with the soft prompts in {name: PEFT directory} beside its embeddings, in that order."""
    from tpvc.passes.bank_prompt import BankPrompt

    if directories and program.prompts:
        there = ", ".join(p.name for p in program.prompts)
        raise TpvcError(f"the model already carries soft prompts ({there}); expected one without")
    return verify(BankPrompt(read_prompts(program, directories))(program), "BankPrompt") if directories else program


def load_for(model: str | Path, adapter: str | None, task: str | None = None) -> tuple[Program, str | None, str | None]:
    """(the model, the names in it of `adapter` and `task`): what it carries, or a PEFT directory, put beside it."""
    program = load(model)
    if _is_directory(adapter, [a.name for a in program.adapters]):
        directory, adapter = adapter, _name_of(adapter, "adapter")
        program = with_roads(program, {adapter: directory})
    if _is_directory(task, [p.name for p in program.prompts]):
        directory, task = task, _name_of(task, "task")
        program = with_prompts(program, {task: directory})
    return program, adapter, task


def _is_directory(given: str | None, carried: list[str]) -> bool:
    return bool(given) and given not in carried and Path(given).expanduser().is_dir()


def _name_of(directory: str, otherwise: str) -> str:
    name = Path(directory).expanduser().resolve().name
    return name if NAME.fullmatch(name) else otherwise


def _directory(path: Path, name: str) -> Program:
    from tpvc.compiler.frontends import huggingface

    return _with_adapters(huggingface.load(path, name))


def _with_adapters(program: Program) -> Program:
    """The model with the adapters and soft prompts that its own tpvc.json lists; they lie in folders beside it."""
    listed = manifest(program) or {}
    program = with_roads(program, _beside(program, listed.get("adapters"), ADAPTERS))
    return with_prompts(program, _beside(program, listed.get("prompts"), PROMPTS))


def _beside(program: Program, listed: Any, folder: str) -> dict[str, Path]:
    """{name: directory} of the entries of a manifest."""
    if not isinstance(listed, list):
        return {}
    names = [entry["name"] for entry in listed if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
    if len(names) < len(listed) or not all(NAME.fullmatch(name) for name in names):
        raise TpvcError(
            f"{program.source.directory / MANIFEST} lists {folder} without a plain name; expected file names"
        )
    return {name: program.source.directory / folder / name for name in names}


def _gguf(path: Path, name: str, integers: bool) -> Program:
    from tpvc.compiler.frontends import gguf

    return gguf.load(path, name, integers)


def _from_hub(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=NOT_HUB_FILES))
    except Exception as error:  # the hub's client raises its own, requests', httpx' and the system's errors
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise TpvcError(
            f"there is no directory '{name}', and the hub did not give a model of that name ({reason});"
            " check the spelling or the network, or name a local checkpoint directory"
        ) from error

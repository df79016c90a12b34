"""What a folder for ONNX Runtime GenAI says of itself: its model, the adapters and the prompts that it carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import ADAPTERS, MANIFEST


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


def adapter_file(folder: Path, name: str) -> Path:
    """The file of the adapter called `name` in a GenAI folder; TpvcError for one that it does not have."""
    found = {p.stem: p for p in sorted((folder / ADAPTERS).glob("*.onnx_adapter"))}
    if name not in found:
        known = f"it has {', '.join(found)}" if found else "it has none"
        raise TpvcError(f"the model has no adapter '{name}'; {known}")
    return found[name]


MOST_IDS = 1 << 24
"""Ids, and virtual tokens, are fewer than this."""


def carried_prompts(folder: Path) -> dict[str, range]:
    """{task: ids of its virtual tokens} of a GenAI folder; of a prompt that was folded into its graph, no ids."""
    from tpvc.compiler.frontends.weights import read_json

    path, found = folder / MANIFEST, {}
    manifest = read_json(path) if path.is_file() else {}
    match manifest:
        case {"folded": {"name": str(name)}}:
            found[name] = range(0)
    listed = manifest.get("prompts", [])
    for prompt in listed if isinstance(listed, list) else [listed]:
        match prompt:
            case {"name": str(name), "first_id": int(first), "tokens": int(tokens)} if (
                0 <= first < MOST_IDS and 0 < tokens < MOST_IDS
            ):
                found[name] = range(first, first + tokens)
            case _:
                raise TpvcError(f"{path} lists a prompt without its name, ids and length; export the model again")
    return found


def virtual_ids(folder: Path, task: str | None) -> list[int]:
    """Ids of the virtual tokens of a task of a GenAI folder; none for None. TpvcError for one that it does not have."""
    if task is None:
        return []
    found = carried_prompts(folder)
    if task in found and not found[task]:
        raise TpvcError(f"the prompt '{task}' is folded into this folder's graph, before every text; leave --task out")
    if task not in found:
        names = ", ".join(name for name, ids in found.items() if ids)
        raise TpvcError(f"the model has no task '{task}'; it has {names or 'none'}")
    return list(found[task])

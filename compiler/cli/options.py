"""Options that several commands take: what was typed, as what the functions behind them want."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from tpvc.compiler.errors import TpvcError


def named_directories(option: str, given: tuple[str, ...]) -> dict[str, str]:
    """{name: directory} of ("NAME=DIR", ...); the directory's own name where none is given."""
    found: dict[str, str] = {}
    for item in given:
        name, equals, directory = item.partition("=")
        if not equals:
            name, directory = Path(item).name, item
        if name in found:
            raise TpvcError(f"found '{name}' twice ({option}); give each its own name, as in NAME=DIR")
        found[name] = directory
    return found


def check_device(device: str) -> None:
    """TpvcError unless torch can compute on `device`. Asks torch only about something else than the CPU."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TpvcError(f"device '{device}' cannot be used here ({reason}); expected cpu, or one torch has") from error


def road_argument(directory: Path) -> str:
    """What to type after --road for an adapter in `directory`."""
    from tpvc.compiler.adapters.road import NAME

    return quote(str(directory) if NAME.fullmatch(directory.name) else f"adapter={directory}")


def fields(option: str, given: tuple[str, ...]) -> dict[str, str] | None:
    """{"text": "sentence"} of ("text=sentence",), None of nothing; `option` says what is on either side."""
    found: dict[str, str] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key or not value or key in found:
            raise TpvcError(f"found {option.split()[0]} '{item}', expected {option}, each once")
        found[key] = value
    return found or None

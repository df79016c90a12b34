"""A recipe for a sum of task prompt vectors: what `tpvc prompt add` is told, or a YAML file in mergekit's manner.

    merge_method: ties                       # task_arithmetic, ties, dare_linear or dare_ties
    prompts:
      - prompt: ./sst2                       # a directory
        name: reviews                        # what to call it; default: as its directory
        parameters: {weight: 1.0, density: 0.5}
        data: ./sst2-dev.jsonl               # validation examples, where lambda is searched
      - prompt: ./trec
    base_prompt: ./other                     # whose start is added to; default: the first prompt's
    parameters: {lambda: 0.7, seed: 0}       # or lambda: search
    model: smollm2-135m                      # to search with

Paths are relative to the file. Only plain YAML is read (its safe subset), and what is not known, or said twice, is
refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpvc.compiler.adapters.combine_prompts import METHODS
from tpvc.compiler.errors import TpvcError, short

SEARCH = "search"
TOP = ("merge_method", "prompts", "base_prompt", "parameters", "model")
PROMPT = ("prompt", "name", "parameters", "data")
LONGEST, LONGEST_PATH, LONGEST_NAME = 1 << 20, 1024, 255
"""Characters of a recipe; bytes of a path in it, and of a file's name."""
DAMAGE = (RecursionError, ValueError, AttributeError, LookupError, TypeError, ArithmeticError)
"""What the reader of YAML raises, beside its own errors, for numbers, dates and texts that are none."""
LARGEST = 3e38
"""About the end of float32."""


@dataclass(frozen=True)
class Part:
    """One prompt of a sum. density: the share of its entries that ties and dare keep; data: validation examples."""

    name: str
    directory: Path
    weight: float = 1.0
    density: float | None = None
    data: Path | None = None


@dataclass(frozen=True)
class Recipe:
    """base: the prompt whose start is added to, None: the first part's. scale: lambda, None: searched with `model`."""

    method: str
    parts: tuple[Part, ...]
    base: Path | None = None
    scale: float | None = 1.0
    seed: int = 0
    model: str | None = None


def check(recipe: Recipe) -> None:
    """TpvcError for a recipe that asks for what cannot be, before anything is read."""
    if recipe.method not in METHODS:
        raise TpvcError(f"the method is '{recipe.method}'; expected one of {', '.join(METHODS)}")
    if not recipe.parts:
        raise TpvcError("no prompts were given; expected at least one")
    thinned = [p.name for p in recipe.parts if p.density is not None]
    if recipe.method == "task_arithmetic" and thinned:
        raise TpvcError(
            f"a density was given for '{thinned[0]}', and a plain sum drops nothing; leave it out, or use ties or dare"
        )
    if recipe.method.startswith("dare") and not thinned:
        raise TpvcError(
            "dare drops entries at random, and no density says which share is kept; give one, such as 0.2, or use a sum"
        )
    with_data = [p.name for p in recipe.parts if p.data is not None]
    if recipe.scale is not None and (recipe.model is not None or with_data):
        what = "a model was" if recipe.model is not None else f"examples for '{with_data[0]}' were"
        raise TpvcError(f"{what} given, which only a search of lambda reads; leave it out, or search")
    if recipe.scale is None and recipe.model is None:
        raise TpvcError("lambda is to be searched without a model; name the model that the prompts were tuned for")
    without = [p.name for p in recipe.parts if p.data is None]
    if recipe.scale is None and without:
        raise TpvcError(
            f"lambda is to be searched without examples for '{without[0]}'; name a file of validation examples for"
            " every prompt"
        )


def read(path: str | Path) -> Recipe:
    """The recipe in a YAML file. TpvcError, one sentence, for one that is not as it is described above."""
    import yaml

    path = Path(path)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise TpvcError(f"{path} is longer than a recipe; expected at most {LONGEST} characters")
        found = yaml.load(text, _loader())
    except (OSError, UnicodeDecodeError) as error:
        raise TpvcError(f"{path} cannot be read ({_reason(error)}); expected a recipe, a YAML file in UTF-8") from error
    except (yaml.YAMLError, *DAMAGE) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}," if mark else f"{path}"
        raise TpvcError(f"{where} is not plain YAML ({_reason(error)}); expected a recipe") from error
    top = _mapping(found, TOP, str(path))
    parameters = _mapping(top.get("parameters", {}), ("lambda", "seed"), f"parameters in {path}")
    prompts = top.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        raise TpvcError(f"{path} has no list 'prompts'; expected one entry for each prompt, such as '- prompt: ./sst2'")
    scale = parameters.get("lambda", 1.0)
    return Recipe(
        method=_text(top, "merge_method", str(path)) or "task_arithmetic",
        parts=tuple(_part(entry, path, number) for number, entry in enumerate(prompts, 1)),
        base=_beside(path, _text(top, "base_prompt", str(path))),
        scale=None if scale == SEARCH else _number(scale, "lambda", str(path), f"a number or '{SEARCH}'"),
        seed=_whole(parameters.get("seed", 0), str(path)),
        model=_model(path, _text(top, "model", str(path))),
    )


def _loader() -> type:
    """YAML's safe loader, which refuses a key that stands twice in a mapping: by itself it keeps the last. Anchors, of
    which a few lines make billions of values, are refused too."""
    import yaml

    class Once(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, f"found the alias '*{self.peek_event().anchor}'", mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):  # other keys are refused by the loader itself
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"found '{key.value}' twice", key.start_mark
                        )
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Once


def _part(entry: Any, path: Path, number: int) -> Part:
    where = f"prompt {number} in {path}"
    found = _mapping(entry, PROMPT, where)
    parameters = _mapping(found.get("parameters", {}), ("weight", "density"), f"parameters of {where}")
    directory = _beside(path, _text(found, "prompt", where))
    if directory is None:
        raise TpvcError(f"{where} has no 'prompt'; expected the directory of one")
    density = parameters.get("density")
    return Part(
        name=_text(found, "name", where) or os.path.basename(os.path.abspath(directory)),
        directory=directory,
        weight=_number(parameters.get("weight", 1.0), "weight", where),
        density=None if density is None else _number(density, "density", where),
        data=_beside(path, _text(found, "data", where)),
    )


def _mapping(value: Any, known: tuple[str, ...], where: str) -> Mapping[str, Any]:
    """A YAML mapping with no other keys than the known ones."""
    if not isinstance(value, dict):
        raise TpvcError(f"{where} holds {short(value)}; expected a mapping with {', '.join(known)}")
    for key in value:
        if key not in known:
            raise TpvcError(f"{where} says '{key!s:.60}', which is not known; expected {', '.join(known)}")
    return value


def _text(found: Mapping[str, Any], key: str, where: str) -> str | None:
    value = found.get(key)
    if key in found and not (isinstance(value, str) and value and value.isprintable()):
        raise TpvcError(f"{where} has {key} = {short(value)}; expected text")
    return value


def _number(value: Any, key: str, where: str, wanted: str = "a number") -> float:
    """A finite float; YAML reads 1e-3 as text, which needs its dot: 1.0e-3."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        raise TpvcError(f"{where} has {key} = {short(value)}; expected {wanted}, such as 0.5")
    return float(value)


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise TpvcError(f"{where} has seed = {short(value)}; expected a whole number from 0 to 2147483647")
    return value


def _beside(path: Path, given: str | None) -> Path | None:
    """`given` as seen from the recipe's folder."""
    given_bytes = b"" if given is None else os.fsencode(given)
    if len(given_bytes) > LONGEST_PATH or any(len(name) > LONGEST_NAME for name in given_bytes.split(b"/")):
        raise TpvcError(f"{path} names '{given:.40}...', which is longer than a file's name may be; check it")
    return None if given is None else path.parent / os.path.expanduser(given)


def _model(path: Path, given: str | None) -> str | None:
    """A directory or file beside the recipe, otherwise a name that means the same everywhere."""
    beside = _beside(path, given)
    return given if beside is None or not beside.exists() else str(beside)


def _reason(error: Exception) -> str:
    told = getattr(error, "strerror", None) or getattr(error, "problem", None) or str(error)
    return told.strip().splitlines()[0] if told.strip() else type(error).__name__

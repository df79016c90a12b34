"""What is done with tuned soft prompts: `prompt_vector`, `prompt_combine`, `prompt_negate`, `prompt_scale` and
`prompt_similarity`, each read top to bottom. Prompt directories go in and come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import tpvc
from tpvc.compiler import charts, frontends, interpret
from tpvc.compiler.adapters import combine_prompts, peft_directory, prompt_files, prompt_recipe
from tpvc.compiler.adapters.fits import check_tuned_for
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.adapters.prompt_recipe import Part, Recipe
from tpvc.compiler.adapters.search_scale import search
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.weights import read_json
from tpvc.compiler.identity import versions
from tpvc.compiler.output import ARTEFACT, check_apart, check_free, published, replacing
from tpvc.compiler.program import Program, prompt_ids
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.report import render
from tpvc.compiler.sha256 import sha256
from tpvc.compiler.tuning.data import encoded
from tpvc.compiler.tuning.examples import Encoded
from tpvc.compiler.tuning.loss import score_answers
from tpvc.compiler.tuning.prompt_tune import behind
from tpvc.passes.bank_prompt import ROWS, BankPrompt

STARTS = ("start", "prompt_embeddings", "origin_prompts", "init_prompts")
"""What the one tensor of a file with a start may be called."""
BATCH, MAX_LENGTH = 16, 512
"""Of the search: examples at once, and tokens of an example where the prompt does not say what it was tuned with."""
KEPT = 0.9
"""A task that keeps less than this of what its own prompt gets right is remarked on: one mean hides a collapse."""


def prompt_vector(
    directory: str | Path, out: str | Path, *, start: str | Path, overwrite: bool = False, progress: Progress = silent
) -> Path:
    """The prompt in `directory`, ours or PEFT's, with the values it was tuned from: what its vector needs.

    start  the directory of a prompt, whose start is taken or, where it has none, its values; or a .safetensors file
           with one tensor called start, prompt_embeddings, origin_prompts or init_prompts
    """
    out, directory, start = Path(out), Path(directory).expanduser(), Path(start).expanduser()
    _check_place(out, overwrite, directory, start)
    progress("load", 0, 1, str(directory))
    given = prompt_files.read(directory, peft_directory.named(directory))
    origin, record = _start(start)
    if origin.values.shape != given.values.shape:
        raise TpvcError(
            f"the start in {start} holds {list(origin.values.shape)} numbers, the prompt {list(given.values.shape)};"
            " expected the values that this prompt was tuned from"
        )
    combine_prompts.check_alike([given, origin])
    progress("load", 1, 1, "")
    made = Prompt(out.name, given.values, origin.values, given.base or origin.base, given.tokenizer or origin.tokenizer)
    return _written(made, out, overwrite, directory, [_part(given, directory)], {"method": "vector", "start": record})


def prompt_combine(recipe: Recipe, out: str | Path, *, overwrite: bool = False, progress: Progress = silent) -> Path:
    """A prompt of several, as `recipe` says: its start plus lambda times their combined vector.

    Where lambda is searched, the prompts' validation examples choose it: see tpvc.compiler.adapters.search_scale. Each
    file is read by the template, columns and labels that its prompt was tuned with.
    """
    out, parts = Path(out), recipe.parts
    prompt_recipe.check(recipe)
    read = [p.directory for p in parts] + [p.data for p in parts if p.data]
    _check_place(out, overwrite, *read, *(p for p in (recipe.base, recipe.model) if p))
    progress("load", 0, 1, ", ".join(p.name for p in parts))
    prompts = [prompt_files.read(p.directory, p.name) for p in parts]
    start, record = _start(parts[0].directory if recipe.base is None else recipe.base)
    remark = combine_prompts.check_together(prompts, start.values)
    combine_prompts.check_alike([*prompts, start])
    weights = [p.weight for p in parts]
    thinned = recipe.method != "task_arithmetic"
    densities = [1.0 if p.density is None else p.density for p in parts]
    vector = combine_prompts.vector_of(recipe.method, prompts, weights=weights, densities=densities, seed=recipe.seed)
    progress("load", 1, 1, "")

    def at(scale: float) -> Prompt:
        return combine_prompts.applied(out.name, prompts, start.values, vector, scale)

    remarks, scale, found = [remark] if remark else [], recipe.scale, None
    if scale is None and len(parts) == 1:
        scale = 1.0
        remarks.append(f"'{parts[0].name}' is one prompt, whose lambda is 1: nothing was searched")
    elif scale is None:
        found = _searched(recipe, prompts, at, progress)
        scale = found["lambda"]
        remarks += _losses(found)
    origin = {
        "method": recipe.method,
        "of": [p.name for p in parts],
        "weights": weights,
        "lambda": scale,
        "density": densities if thinned else None,
        "seed": recipe.seed if recipe.method.startswith("dare") else None,
        "start": record,
    }
    records = [
        {**_part(prompt, part.directory), "weight": part.weight} for prompt, part in zip(prompts, parts, strict=True)
    ]
    return _written(at(scale), out, overwrite, parts[0].directory, records, origin, remarks, found)


def prompt_negate(
    directory: str | Path, out: str | Path, *, overwrite: bool = False, progress: Progress = silent
) -> Path:
    """The prompt of the negated vector: start - tau, so that it is less of what was tuned."""
    return _scaled("negate", directory, -1.0, out, overwrite, progress)


def prompt_scale(
    directory: str | Path, factor: float, out: str | Path, *, overwrite: bool = False, progress: Progress = silent
) -> Path:
    """The prompt of `factor` times the vector: 0 is the start, 1 the prompt as it is, both bit for bit."""
    return _scaled("scale", directory, factor, out, overwrite, progress)


def prompt_similarity(directories: Mapping[str, str | Path], of: str = "vectors") -> dict[str, Any]:
    """Cosines of the task prompt vectors, or of the prompts themselves, in {name: directory} with each other.

    Returns {"of", "names", "flattened", "token_mean", "parts", "remarks"}; a matrix is a list of rows, in [-1, 1].
    """
    if of not in ("vectors", "prompts"):
        raise TpvcError(f"the similarity of '{of}' was asked for; expected vectors or prompts")
    prompts = [prompt_files.read(Path(d).expanduser(), name) for name, d in directories.items()]
    combine_prompts.check_alike(prompts)
    remark = combine_prompts.check_together(prompts) if of == "vectors" else None
    tensors = {p.name: p.vector if of == "vectors" else p.values for p in prompts}
    flattened, token_mean = combine_prompts.similarity(tensors)
    return {
        "tpvc": tpvc.__version__,
        "of": of,
        "names": list(tensors),
        "flattened": flattened,
        "token_mean": token_mean,
        "parts": [_part(p, Path(d).expanduser()) for p, d in zip(prompts, directories.values(), strict=True)],
        "remarks": [remark] if remark else [],
        "versions": versions("torch", "safetensors"),
    }


def similarity_page(found: Mapping[str, Any], path: Path) -> None:
    """Write what `prompt_similarity` found as a page with a heat map and both tables."""
    kinds = (
        ("Token mean", "Cosine of the means over the tokens, as in the paper.", found["token_mean"]),
        ("Flattened", "Cosine of all numbers, token by token.", found["flattened"]),
    )
    pictures = [(title, told, charts.heat(found["names"], matrix), matrix) for title, told, matrix in kinds]
    with replacing(path) as partial:
        render(partial, "report_similarity.html", {"manifest": found, "pictures": pictures})


def check_page(path: Path, overwrite: bool) -> None:
    """Refuse a page that cannot be written, or that would replace something without `overwrite`."""
    if path.suffix.lower() != ".html" or not path.absolute().parent.is_dir() or path.is_dir():
        raise TpvcError(f"'{path}' cannot hold the page; expected a name that ends in .html in a directory that exists")
    if path.exists() and not overwrite:
        raise TpvcError(f"'{path}' is there already; add --overwrite to replace it, or choose another name")


def _scaled(
    method: str, directory: str | Path, factor: float, out: str | Path, overwrite: bool, progress: Progress
) -> Path:
    out, directory = Path(out), Path(directory).expanduser()
    _check_place(out, overwrite, directory)
    progress("load", 0, 1, str(directory))
    given = prompt_files.read(directory, peft_directory.named(directory))
    made = combine_prompts.scale(out.name, given, factor)
    origin = {"method": method, "lambda": factor, "start": _start(directory)[1]}
    progress("load", 1, 1, "")
    return _written(made, out, overwrite, directory, [_part(given, directory)], origin)


def _check_place(out: Path, overwrite: bool, *sources: str | Path) -> None:
    for source in sources:
        check_apart(out, source)
    check_free(out, overwrite)


def _start(path: Path) -> tuple[Prompt, dict[str, Any]]:
    """(a prompt whose values are the start that `path` names, what a manifest says of it)."""
    if path.suffix.lower() != ".safetensors":
        prompt = prompt_files.read(path, peft_directory.named(path))
        own = prompt.start is not None
        tensor, file = (prompt.start, prompt_files.START) if own else (prompt.values, peft_directory.WEIGHTS)
        record = {"directory": peft_directory.named(path), "file": file, "sha256": sha256(path / file)}
        return Prompt(path.name, tensor, None, prompt.base, prompt.tokenizer), record
    if not path.is_file():
        raise TpvcError(f"there is no file {path}; expected the values that the prompt was tuned from")
    return Prompt(path.name, prompt_files.tensor(path, *STARTS)), {"file": path.name, "sha256": sha256(path)}


def _searched(
    recipe: Recipe, prompts: Sequence[Prompt], at: Callable[[float], Prompt], progress: Progress
) -> dict[str, Any]:
    """The table of a search and its lambda; `at` makes the prompt of a lambda. The weights are read once."""
    progress("load model", 0, 1, str(recipe.model))
    program = frontends.load(recipe.model)
    tokenizer = frontends.tokenizer(program)
    check_tuned_for(prompts, program, tokenizer)
    candidate = at(1.0)
    banked = BankPrompt((candidate,))(program)
    room = program.facts.context_length - candidate.tokens
    before = prompt_ids(banked, candidate.name)
    examples = [behind(before, _examples(program, tokenizer, part, room)) for part in recipe.parts]
    held = interpret.in_memory(program)
    progress("load model", 1, 1, "")

    def exact(values: Tensor, task: int) -> float:
        return score_answers(banked, lambda name: values if name == ROWS else held(name), examples[task], BATCH).exact

    progress("search", 0, 1, "each prompt by itself")
    alone = [exact(prompt.values, task) for task, prompt in enumerate(prompts)]
    tasks = range(len(prompts))
    found = search(lambda scale: [exact(at(scale).values, task) for task in tasks], len(tasks), progress)
    return {
        "model": program.source.name,
        "tasks": [p.name for p in prompts],
        "data": [{"name": p.data.name, "sha256": sha256(p.data)} for p in recipe.parts],
        "examples": [len(e) for e in examples],
        "alone": alone,
        "lambda": found.scale,
        "table": found.table,
    }


def _examples(program: Program, tokenizer: Any, part: Part, room: int) -> list[Encoded]:
    """The validation examples of a prompt, read as its tuning read them where its tpvc.json says how."""
    words, length = {}, MAX_LENGTH
    match prompt_files.made(part.directory):
        case {
            "options": {
                "template": str() | None as template,
                "columns": dict() | None as columns,
                "labels": dict() | None as labels,
                "max_length": int(longest),
            }
        } if all(isinstance(v, str) for v in (*(columns or {}).values(), *(labels or {}).values())):
            length = longest
            words = {"template": template, "columns": columns, "labels": labels}
    return encoded(program, tokenizer, part.data, min(length, room), **words)


def _losses(found: Mapping[str, Any]) -> list[str]:
    """A sentence for every task that the chosen lambda loses."""
    row = next((row for row in found["table"] if row["lambda"] == found["lambda"]), None)
    return [
        f"'{task}' keeps {100 * exact:.1f} % of right answers at lambda {found['lambda']:g}, its own prompt has"
        f" {100 * alone:.1f} %"
        for task, exact, alone in zip(found["tasks"], row["exact"], found["alone"], strict=True)
        if exact < KEPT * alone
    ]


def _part(prompt: Prompt, directory: Path) -> dict[str, Any]:
    """What a manifest says of a prompt that was used, with the sha256 of both its tensors' files."""
    start = directory / prompt_files.START
    return {
        "name": prompt.name,
        "tokens": prompt.tokens,
        "directory": peft_directory.named(directory),
        "sha256": prompt.origin["sha256"],
        "start": sha256(start) if start.is_file() else None,
    }


def _model(directory: Path) -> dict[str, Any]:
    """What a prompt's directory says of its base model, ours or PEFT's."""
    said = prompt_files.made(directory).get("base")
    if isinstance(said, dict):
        return {key: value for key, value in said.items() if key != "weights"}
    config = read_json(directory / peft_directory.CONFIG)
    return {
        "name": config.get("base_model_name_or_path"),
        "heads": config.get("num_attention_heads"),
        "layers": config.get("num_layers"),
    }


def _written(
    made: Prompt,
    out: Path,
    overwrite: bool,
    directory: Path,
    parts: Sequence[Mapping[str, Any]],
    origin: Mapping[str, Any],
    remarks: Sequence[str] = (),
    found: Mapping[str, Any] | None = None,
) -> Path:
    """Write a prompt whose base model is that of the prompt in `directory`; where that is its only part, it is of the
    same task, and its options say how that task's data is read."""
    extra = {
        "tpvc": tpvc.__version__,
        "options": prompt_files.made(directory).get("options") if len(parts) == 1 else None,
        "origin": dict(origin),
        "parts": list(parts),
        "remarks": list(remarks),
        "search": found,
        "trainables": made.values.numel(),
        "versions": versions("torch", "safetensors"),
    }
    with published(out, overwrite) as work:
        prompt_files.write(made, work / ARTEFACT, _model(directory), extra)
    return out

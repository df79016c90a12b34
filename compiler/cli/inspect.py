"""`tpvc inspect`: what a model, an artefact or an exported folder is made of."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from tpvc.compiler import units
from tpvc.compiler.cli import console
from tpvc.compiler.errors import printable


@click.command(
    "inspect",
    epilog="""\b
Examples:
  tpvc inspect smollm2-135m
  tpvc inspect smollm2-w4 --all           every linear with its grid
  tpvc inspect smollm2-onnx --json        operators, MatMulNBits layouts, files
  tpvc inspect adapters/legal             kind, base, linears, options it was tuned with
""",
)
@click.argument("target")
@click.option("--all", "everything", is_flag=True, help="List every linear.")
@console.json_option
def command(target: str, everything: bool, as_json: bool) -> None:
    """Family, grids, sizes and provenance of TARGET.

    TARGET is an exported folder, an artefact, a MODEL, an adapter, a soft prompt or an importance file. No weights are
    read.
    """
    from tpvc.compiler.cli.inspect_export import is_portable, onnx_facts, package_facts, portable_facts
    from tpvc.compiler.cli.inspect_trained import trained_facts
    from tpvc.compiler.engines import is_genai, is_package

    if is_genai(target):
        facts = onnx_facts(Path(target))
    elif is_portable(Path(target)):
        facts = portable_facts(Path(target))
    elif is_package(target):
        facts = package_facts(Path(target))
    else:
        facts = trained_facts(Path(target)) or program_facts(target)
    if as_json:
        return console.print_json(facts)
    show = console.out().print

    def plain(text: str) -> None:
        show(printable(text), markup=False)

    show(f"[bold]{console.literal(target)}[/]: {console.literal(facts['kind'])}")
    for name, value in facts["facts"].items():
        plain(f"  {name:<20} {value}")
    for title in ("grids", "operators", "adapters", "prompts", "matmulnbits", "kernels", "files"):
        if facts.get(title):
            show(_counts(title, facts[title]))
    if everything and facts.get("linears"):
        made = console.table("linears", "name", "shape", "grid")
        for row in facts["linears"]:
            made.add_row(row["name"], "x".join(map(str, row["shape"])), row["grid"])
        show(made)
    if facts.get("provenance"):
        show("\n[bold]provenance[/]")
        _provenance(plain, facts["provenance"])


def program_facts(target: str) -> dict[str, Any]:
    """Facts about a Program, JSON-able."""
    from math import prod

    from tpvc.compiler.frontends import load, manifest
    from tpvc.compiler.program import bank_params, grid_of, linears, rounded_cache, rounded_inputs
    from tpvc.compiler.weight_bytes import parameter_bytes

    program = load(target)
    rows, rounded = [], rounded_inputs(program)
    for node in linears(program.nodes):
        parameter = program.params[node.params["weight"]]
        grid = grid_of(parameter)
        dtype = str(getattr(parameter, "dtype", "")).removeprefix("torch.")
        said = str(grid) if grid else dtype
        if node.params["weight"] in rounded:
            kind, _, static = rounded[node.params["weight"]].partition("-")
            said += f", activations {kind} per {'tensor' if static else 'token'}"
        rows.append({"name": node.name, "shape": list(parameter.shape), "grid": said})
    source = program.source
    files = {path.relative_to(source.directory).as_posix(): path.stat().st_size for path in source.weights}
    described = asdict(program.facts)
    weights = [p for name, p in program.params.items() if name not in bank_params(program)]
    count = sum(prod(p.shape) for p in weights)
    described |= {
        "blocks": program.blocks,
        "nodes": len(program.nodes),
        "parameters": f"{count:,}",
        "weights on disk": units.size(sum(files.values())),
        "bits a weight, loaded": f"{8 * sum(map(parameter_bytes, weights)) / count:.2f}",
    }
    if rounded_cache(program):
        described["keys and values"] = "int8, a scale for every head of a token"
    provenance = manifest(program)
    return {
        "kind": "an artefact of tpvc" if provenance else "a model",
        "facts": described,
        "grids": dict(Counter(row["grid"] for row in rows)),
        "operators": dict(Counter(node.op for node in program.nodes).most_common()),
        "adapters": {a.name: _adapter(a) for a in program.adapters},
        "prompts": {p.name: f"{p.tokens} virtual tokens" for p in program.prompts},
        "linears": rows,
        "files": {name: units.size(count) for name, count in files.items()},
        "provenance": provenance,
    }


def _adapter(road: Any) -> str:
    kinds = sorted({f"{r.variant} in groups of {r.group}" for r in road.rotations.values()})
    return f"{', '.join(kinds)}, on {len(road.rotations)} linears, {road.trainables:,} numbers"


def _counts(title: str, values: dict[str, Any]) -> Any:
    made = console.table(f"\n{title}", "", "")
    for name, value in values.items():
        made.add_row(*(Text(printable(str(part))) for part in (name, value)))
    made.show_header = False
    return made


def _provenance(show: Any, manifest: dict[str, Any]) -> None:
    """What was made from what: an export, then the artefact that it was made from."""
    source = _mapping(manifest.get("source"))
    show(f"  made by tpvc {manifest.get('tpvc')}" + (f" from {source['name']}" if "name" in source else ""))
    passes = manifest.get("passes")
    if isinstance(passes, list) and passes:
        told = [_mapping(p) for p in passes]
        names = [f"{p.get('name')} ({p['grid']})" if "grid" in p else str(p.get("name")) for p in told]
        show(f"  passes: {', '.join(names)}")
    show(f"  options: {', '.join(f'{k}={v}' for k, v in _mapping(manifest.get('options')).items())}")
    for name, value in _mapping(manifest.get("calibration")).items():
        if isinstance(value, str | int | float):
            show(f"  calibration {name}: {value}")
    if made := _mapping(source.get("manifest")):
        _provenance(show, made)


def _mapping(value: Any) -> dict[str, Any]:
    """A part of a manifest, which anybody may have edited: an object, or nothing."""
    return value if isinstance(value, dict) else {}

"""report.html: what a quantisation did, for a person. One file, no network, light and dark; made from the manifest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

from tpvc.compiler import charts, units
from tpvc.compiler.errors import TpvcError


def write(path: Path, manifest: dict, timings: list[float]) -> None:
    """Write the report of `manifest` (the content of tpvc.json); `timings` are seconds per block, of this run.

    Whatever the manifest lacks is left out. TpvcError when the file cannot be written.
    """
    render(path, "report.html", _facts(manifest, timings))


def render(path: Path, template: str, facts: dict) -> None:
    """Write a page from one of the templates beside this file. TpvcError when it cannot be written."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("tpvc.compiler", "."), autoescape=True, trim_blocks=True)
    environment.filters |= {"size": units.size, "number": number_text, "seconds": units.seconds, "json": json_text}
    html = environment.get_template(template).render(**facts)
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise TpvcError(f"cannot write '{path}': {error.strerror or error}; free some space") from error


def _facts(manifest: dict, timings: list[float]) -> dict:
    """What the template reads."""
    blocks = [_block(record) for record in manifest.get("blocks", [])]
    numbers = [b["block"] for b in blocks]
    gains = [b["error_rtn"] / b["error"] for b in blocks if b["error_rtn"] and b["error"]]
    learned = any(b["curve"] for b in blocks)
    pictures = []
    if widths := _widths(manifest):
        pictures.append(("Bits of each group of linears", charts.tiles(*widths, "bits")))
    if blocks:
        series = [("round to nearest", [b["error_rtn"] for b in blocks])]
        if learned:
            series.append(("learned rounding", [b["error"] for b in blocks]))
        pictures.append(("Relative output error of each block", charts.lines(numbers, series)))
    if learned:
        flips = charts.bars(numbers, [b["flips"] for b in blocks], percent_text)
        pictures.append(("Codes that are not the nearest on their grid", flips))
    if any(timings):
        first = numbers[: len(timings)] if len(numbers) >= len(timings) else list(range(len(timings)))
        pictures.append(("Time for each block", charts.bars(first, list(timings), units.seconds)))
    curves = [(b["block"], charts.curve(b["curve"])) for b in blocks if len(b["curve"]) > 1]
    tuned = next((p for p in manifest.get("passes", []) if p.get("checks")), {})
    closing = tuned.get("checks", [])
    size = manifest.get("size", {})
    return {
        "name": Path(manifest.get("source", {}).get("name", "model")).name,
        "schemes": _schemes(blocks),
        "method": " → ".join(dict.fromkeys(p["name"] for p in manifest.get("passes", []))),
        "size": size,
        "ratio": size["float_bytes"] / size["bytes"] if size.get("bytes") and size.get("float_bytes") else None,
        "gain": median(gains) if gains and learned else None,
        "seconds": sum(timings) or None,
        "pictures": [(title, picture) for title, picture in pictures if picture],
        "curves": curves,
        "chosen_bits": manifest.get("chosen_bits"),
        "closing": closing,
        "closing_stopped": tuned.get("stopped"),
        "closing_curve": charts.curve(closing) if len(closing) > 1 else None,
        "blocks": blocks,
        "learned": learned,
        "manifest": manifest,
    }


def _block(record: dict) -> dict:
    """A block record with nothing missing and its mean share of flips, by weight."""
    linears = [{"grid": "", "bits": None, "flips": None, "shape": [0, 0], **entry} for entry in record["linears"]]
    counted = [(math.prod(e["shape"]), e["flips"]) for e in linears if e["flips"] is not None]
    weights = sum(n for n, _ in counted)
    flips = sum(n * f for n, f in counted) / weights if weights else None
    return {"error": None, "error_rtn": None, "curve": [], **record, "linears": linears, "flips": flips}


def _widths(manifest: dict) -> tuple[list[int], list[tuple[str, list[int | None]]]] | None:
    """(blocks, [(the linears of a group by the last parts of their names, their width in every block), ...]) where
    widths were chosen; None where one was given."""
    groups = manifest.get("chosen_bits", {}).get("groups", [])
    blocks = sorted({g["block"] for g in groups})
    found: dict[str, list[int | None]] = {}
    for g in groups:
        name = " ".join(n.rpartition(".")[2].removesuffix("_proj") for n in g["names"])
        found.setdefault(name, [None] * len(blocks))[blocks.index(g["block"])] = g["bits"]
    return (blocks, list(found.items())) if found else None


def _schemes(blocks: list[dict]) -> str:
    found = [entry["grid"] for block in blocks for entry in block["linears"] if entry["grid"]]
    return ", ".join(sorted(set(found), key=lambda grid: (-found.count(grid), grid)))


def number_text(value: float | None) -> str:
    """Three significant digits, a dash for None."""
    if value is None:
        return "–"
    return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:,.3g}"


def percent_text(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def json_text(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)

"""report.html of a tuned adapter: what it learned, as a page without scripts; made from its tpvc.json."""

from __future__ import annotations

from pathlib import Path

from tpvc.compiler import charts
from tpvc.compiler.report import percent_text, render


def write(path: Path, name: str, manifest: dict, model: str, seconds: float) -> None:
    """Write the report of the adapter `name`; `manifest` is its tpvc.json, `seconds` are those of this run."""
    checks, training = manifest["checks"], {step: loss for step, loss in manifest["curve"]}
    steps = [step for step, _, _ in checks]
    series = [("training", [training.get(step) for step in steps]), ("validation", [loss for _, loss, _ in checks])]
    facts = {
        "name": name,
        "kind": manifest["options"].get("variant", "soft prompt"),
        "model": Path(model).name or model,
        "manifest": manifest,
        "start": checks[0],
        "kept": next(check for check in checks if check[0] == manifest["kept_step"]),
        "seconds": seconds,
        "loss": charts.lines(steps, series, "step"),
        "exact": charts.bars(steps, [exact for _, _, exact in checks], percent_text, "step"),
    }
    render(path, "report_tuning.html", facts)

"""report.html of a fine-tuning: what the domain gained and general text lost; made from its tpvc.json."""

from __future__ import annotations

from pathlib import Path

from tpvc.compiler import charts, units
from tpvc.compiler.report import percent_text, render


def write(path: Path, name: str, manifest: dict, model: str, seconds: float) -> None:
    """Write the report of the fine-tuned `name`; `manifest` is its tpvc.json, `seconds` are those of this run."""
    facts = {
        "name": name,
        "model": Path(model).name or model,
        "manifest": manifest,
        "before": manifest["before"],
        "kept": next(check for check in manifest["checks"] if check[0] == manifest["kept_step"]),
        "perplexity": units.perplexity,
        "seconds": seconds,
        "pictures": [picture for picture in _pictures(manifest) if picture[2]],
    }
    render(path, "report_finetune.html", facts)


def _pictures(manifest: dict) -> list[tuple[str, str, str]]:
    """(title, what it shows, the picture, or nothing where there is nothing to show)."""
    checks, curve, drift = manifest["checks"], manifest["curve"], manifest["drift"]
    steps, blocks = [check[0] for check in checks], [block for block, _ in drift]
    losses = {point[0]: point[1] for point in curve}
    loss = [("training", [losses.get(s) for s in steps]), ("validation", [c[1] for c in checks])]
    before = [units.perplexity(manifest["before"][2])] * len(steps)
    general = [("before", before), ("fine-tuned", [units.perplexity(c[3]) for c in checks])]
    ratio = [("penalty / loss", [p[2] / p[1] if p[1] > 0 else None for p in curve])]
    alpha = manifest["coefficients"]
    return [
        (
            "Loss on the domain",
            "Nats a token: over the training batches since the last point, and over the validation data.",
            charts.lines(steps, loss, "step"),
        ),
        (
            "Perplexity of general text",
            "Over windows from which nothing was learned, as the domain is learned; and that of the model as it was. At"
            " step 0 a hierarchical run has learned general text.",
            charts.lines(steps, general, "step"),
        ),
        (
            "Penalty over loss",
            "Means between two points.",
            charts.lines([p[0] for p in curve], ratio, "step"),
        ),
        (
            "Drift of each block",
            "How far the trained linears are from the model as it was, of their own length.",
            charts.bars(blocks, [value for _, value in drift], _share),
        ),
        (
            "Layer coefficients",
            "How much more the penalty counts in one block than in another.",
            charts.bars(blocks, alpha, "{:.2g}".format) if alpha else "",
        ),
    ]


def _share(value: float | None) -> str:
    return percent_text(value) if not value or value >= 1e-3 else f"{100 * value:.1e} %"

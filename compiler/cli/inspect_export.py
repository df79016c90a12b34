"""What `tpvc inspect` says of exported folders: for ONNX Runtime GenAI, with a portable graph alone, Triton packages.
No weights are read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tpvc.compiler import units
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import ADAPTERS


def is_portable(folder: Path) -> bool:
    """Is it a folder of which a portable graph is all?"""
    return (folder / "portable" / "model.onnx").is_file() and not (folder / "config.json").is_file()


def portable_facts(folder: Path) -> dict[str, Any]:
    """Facts about a folder with a portable graph alone, JSON-able."""
    own = folder / "portable"
    return {
        "kind": "a portable graph of standard ONNX operators",
        **graph_facts(own / "model.onnx"),
        "files": {f"portable/{f.name}": units.size(f.stat().st_size) for f in sorted(own.iterdir()) if f.is_file()},
        "provenance": manifest_in(folder),
    }


def graph_facts(path: Path) -> dict[str, Any]:
    """Facts about an ONNX file: its versions, how often it has which operators, and how weights lie in MatMulNBits."""
    import onnx

    from tpvc.compiler.frontends.weights import is_file

    try:
        if not is_file(path):
            raise OSError("it is no regular file")
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own error types
        raise TpvcError(f"{path}: not a readable ONNX file: {str(error).strip() or type(error).__name__}") from error
    layouts: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            values = {a.name: a.i for a in node.attribute}
            zeros = "zero points" if len(node.input) > 3 and node.input[3] else "no zero points"
            level = values.get("accuracy_level", 0)
            sizes = f"{values.get('bits', 4)} bits, block {values.get('block_size')}"
            layouts[f"{sizes}, {zeros}, accuracy level {level}"] += 1
    return {
        "facts": {
            "opsets": ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import),
            "IR version": model.ir_version,
        },
        "operators": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        "matmulnbits": dict(layouts.most_common()),
    }


def onnx_facts(folder: Path) -> dict[str, Any]:
    """Facts about a folder for ONNX Runtime GenAI, JSON-able."""
    from tpvc.compiler.engines.genai_folder import carried_prompts, genai_facts

    config = genai_facts(folder)
    decoder = config["decoder"]
    graph = graph_facts(folder / decoder["filename"])
    return {
        "kind": "a folder for ONNX Runtime GenAI",
        "facts": {
            "type": config.get("type"),
            "vocab_size": config["vocab_size"],
            "context_length": config["context_length"],
            **{name: value for name, value in decoder.items() if isinstance(value, int)},
            **graph.pop("facts"),
        },
        **graph,
        "adapters": {f.stem: units.size(f.stat().st_size) for f in sorted((folder / ADAPTERS).glob("*.onnx_adapter"))},
        "prompts": {name: _ids(ids) for name, ids in carried_prompts(folder).items()},
        "files": {f.name: units.size(f.stat().st_size) for f in sorted(folder.iterdir()) if f.is_file()},
        "provenance": manifest_in(folder),
    }


def package_facts(folder: Path) -> dict[str, Any]:
    """Facts about a package of Triton kernels, JSON-able."""
    from tpvc.compiler.backends import triton
    from tpvc.compiler.frontends.weights import read_json
    from tpvc.kernels import package

    path = folder / triton.FILE
    found = read_json(path)
    try:
        made = {name: found[name] for name in ("format", "dtype", "cache", "capacity", "slots")}
        facts = {**made, **found["facts"], "steps": len(found["steps"])}
        operators = Counter(step["op"] for step in found["steps"])
        tasks = {task["name"]: f"{task['tokens']} virtual tokens" for task in found["tasks"]}
        adapters = {name: "chosen by row" for name in found["adapters"]}
    except (LookupError, TypeError, ValueError) as error:
        raise TpvcError(f"{path} is damaged ({error!r}); use an intact copy, or export the model again") from error
    kernels = package.read(folder / triton.KERNELS).entries
    return {
        "kind": "a package of Triton kernels",
        "facts": facts,
        "operators": dict(operators.most_common()),
        "adapters": adapters,
        "prompts": tasks,
        "kernels": {target: f"{n} binaries" for target, n in Counter(entry.target for entry in kernels).items()},
        "files": {f.name: units.size(f.stat().st_size) for f in sorted(folder.iterdir()) if f.is_file()},
        "provenance": manifest_in(folder),
    }


def _ids(ids: list[int]) -> str:
    return f"{len(ids)} virtual tokens, ids {ids[0]} to {ids[-1]}" if ids else "in the graph, before every text"


def manifest_in(folder: Path) -> dict[str, Any] | None:
    from tpvc.compiler.frontends.weights import read_json

    path = folder / "tpvc.json"
    return read_json(path) if path.is_file() else None

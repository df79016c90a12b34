"""What all rows start from: the float checkpoint, and the windows of tokens. Run by the environment "tpvc".

Its one argument is a JSON file: {"model", "layers" (null: all), "calibration", "test" (texts), "windows", "out"}, where
windows is {"calibration": [windows, tokens a window], "test": likewise}.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from tpvc.compiler import frontends
from tpvc.compiler.backends import huggingface
from tpvc.compiler.evaluate import text_windows


def main() -> None:
    said = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(said["out"])
    program = frontends.load(said["model"])
    tokenizer = frontends.tokenizer(program)
    for name, shape in said["windows"].items():
        save_file({"tokens": text_windows(said[name], tokenizer, *shape)}, out / f"{name}.safetensors")
    work = out / "float32.partial"
    shutil.rmtree(work, ignore_errors=True)
    huggingface.emit(program, work, tokenizer, {})
    if said["layers"] is not None:
        truncate(work, said["layers"])
    work.rename(out / "float32")


def truncate(folder: Path, layers: int) -> None:
    """Keep the first `layers` layers of a checkpoint in one file: a small model to try the harness with."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    number = re.compile(r"\.layers\.(\d+)\.")
    kept = {n: t for n, t in tensors.items() if not (found := number.search(n)) or int(found[1]) < layers}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()

"""A second opinion: perplexity of a packed folder in transformers, which shares no line with tpvc. Run by the
environment that packed it.

Its one argument is a JSON file: {"target", "test" (windows), "threads", "out"}.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

if find_spec("auto_round"):  # it makes itself known to transformers when it is imported
    import auto_round  # noqa: F401


def main() -> None:
    said = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(said["threads"])
    model = AutoModelForCausalLM.from_pretrained(said["target"], dtype=torch.float32, device_map="cpu").eval()
    losses = []
    with torch.inference_mode():
        for window in load_file(said["test"])["tokens"]:
            logits = model(window[None]).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).double())
    found = {"transformers_perplexity": torch.stack(losses).mean().exp().item()}
    Path(said["out"]).write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

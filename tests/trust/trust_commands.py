"""Every command that writes, on models so small that a run takes a second; and forks.py to run them with.

`inputs(folder)` makes what they read; `COMMANDS[name]` are the arguments, in which {model}, {text}, ... stand for it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

QUANTIZE = "quantize {model} --dataset {text} --nsamples 16 --seqlen 16 --iters 4 --group-size 32"
ASKED = "--data {examples} --template {{text}}? --label 0=no --label 1=yes --batch-size 2"
GENERAL = "--nsamples 20 --max-length 16 --batch-size 4"
FINETUNE = f"finetune {{model}} --data {{text}} --steps 6 {GENERAL}"

COMMANDS = {
    "quantize": QUANTIZE,
    "quantize rtn": "quantize {model} --method rtn --group-size 32",
    "quantize W8A8": f"{QUANTIZE} --scheme W8A8".replace("--group-size 32 ", ""),
    "quantize under adapters": f"{QUANTIZE} --road a={{road}} --prompt b={{prompt}}",
    "road tune": f"road tune {{model}} {ASKED} --steps 12 --lr 0.05",
    "road merge": "road merge {model} --road {road}",
    "road compose": "road compose interpolate a={road} b={road} --base {model}",
    "prompt tune": f"prompt tune {{model}} {ASKED} --steps 12 --virtual-tokens 4",
    "prompt add": "prompt add a={prompt} b={prompt} --scale 0.5",
    "prompt search": "prompt add a={prompt} b={prompt} --search --model {model} --data {examples} --data {examples}",
    "importance": f"importance {{model}} --data {{text}} --data {{text}} {GENERAL}",
    "importance fisher": f"importance {{model}} --data {{text}} --method fisher {GENERAL}",
    "finetune lora": f"{FINETUNE} --general {{text}}",
    "finetune weights": f"{FINETUNE} --importance {{importance}}",
    "finetune road": f"{FINETUNE} --train road_2 --method plain",
    "finetune merge": f"{FINETUNE} --method l2 --merge",
    "export onnx": "export {w4} --to onnx --portable --road a={road} --prompt b={prompt}",
    "export onnx task": "export {w4} --to onnx --prompt b={prompt} --task b",
    "export vllm": "export {w4} --to vllm --road a={road}",
    "export gptq": "export {w4} --to gptq",
    "export gptq_v2": "export {w4} --to gptq_v2",
    "export awq": "export {w4} --to awq",
    "export triton": "export {w4} --to triton --target hip:gfx942",
}
"""Without their -o."""

PAGES = {
    "prompt similarity": ("prompt similarity a={prompt} b={prompt}", "page.html"),
    "prompt embeds": ("prompt embeds {model} hello --raw --task {prompt}", "request.json"),
}
"""Commands that write one small file, and its name."""


def tiny_model(directory: Path, features: int) -> None:
    """A random Llama of two blocks, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=features,
        intermediate_size=2 * features,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>").save_pretrained(directory)


def inputs(folder: Path, forks: Forks, features: int = 64) -> dict[str, str]:
    """What the commands read, made in `folder`."""
    tiny_model(folder / "model", features)
    text = " ".join(f"The dog number {i} sleeps on, and the fox jumps over it." for i in range(60))
    (folder / "text.txt").write_text(text)
    lines = [{"text": f"{('day', 'fox')[i % 2]} {i}", "label": i % 2} for i in range(20)]
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {name: str(folder / name) for name in ("model", "road", "prompt", "importance", "w4")}
    found |= {"text": str(folder / "text.txt"), "examples": str(folder / "examples.jsonl")}
    for name, command in {
        "road": COMMANDS["road tune"],
        "prompt": COMMANDS["prompt tune"],
        "importance": f"importance {{model}} --data {{text}} --train weights {GENERAL}",
        "w4": COMMANDS["quantize rtn"],
    }.items():
        done = forks(arguments(command, found, folder / name), folder)
        assert done["code"] == 0, done["said"]
    return found


def arguments(command: str, found: dict[str, str], out: Path) -> list[str]:
    return [part.format(**found) for part in command.split()] + ["-o", str(out)]


def tree(path: Path) -> dict[str, bytes] | bytes | None:
    """Everything that lies at `path`."""
    if path.is_file():
        return path.read_bytes()
    if not path.exists():
        return None
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def library(folder: Path) -> Path | None:
    """faults.c compiled into `folder`, or None where there is no compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    made = folder / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-w", "-O1", "-o", str(made), str(HERE / "faults.c"), "-ldl"]
    subprocess.run(command, check=True)
    return made


class Forks:
    """forks.py in a process of its own: called with arguments and what is to go wrong."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def __call__(self, given: list[str], under: Path, **wrong: Any) -> dict[str, Any]:
        asked = {"arguments": given, "under": str(under), **wrong}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextmanager
def forking(library: Path, threads: int = 1) -> Iterator[Forks]:
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LD_PRELOAD": str(library)}
    own |= {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", str(HERE / "forks.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=plain | own)
    try:
        assert process.stdout.readline() == "ready\n"
        yield Forks(process)
    finally:
        process.stdin.close()
        process.wait()

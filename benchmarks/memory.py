"""Peak memory of quantising: round-to-nearest on a 1.1B-parameter bfloat16 checkpoint, FlexRound over growing depth.

    python benchmarks/memory.py

Checkpoints are synthetic (random weights in TinyLlama's shape, and narrower ones for FlexRound) and made in a temporary
directory. Every run is a process of its own; its peak resident size is compared with one that only imports.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}


def checkpoint(directory: Path, layers: int, shape: dict[str, int], vocab: int = 32000, tied: bool = False) -> int:
    """Write a sharded bfloat16 Llama checkpoint, one shard a block; returns its parameters."""
    directory.mkdir()
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    sizes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shards = [
        {
            "model.embed_tokens.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (vocab, hidden),
        }
    ]
    for i in range(layers):
        block = {f"self_attn.{n}.weight": s for n, s in sizes.items()} | {f"mlp.{n}.weight": s for n, s in mlp.items()}
        block |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        shards.append({f"model.layers.{i}.{n}": s for n, s in block.items()})
    if tied:
        del shards[0]["lm_head.weight"]
    index, count = {}, 0
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {n: torch.randn(s).mul_(s[-1] ** -0.5 if len(s) > 1 else 1).bfloat16() for n, s in shard.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
        count += sum(t.numel() for t in tensors.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "dtype": "bfloat16"}
    config |= {"num_hidden_layers": layers, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    config |= {"rope_theta": 10000.0, "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2, **shape}
    (directory / "config.json").write_text(json.dumps(config))
    _tokenizer(directory, vocab)
    return count


def _tokenizer(directory: Path, vocab: int) -> None:
    """A word-level tokenizer of the right size: sampling and round-to-nearest never look inside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{i}": i for i in range(1, vocab)}}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(directory)


def run(code: str) -> tuple[float, float]:
    """(peak resident GiB, seconds) of a fresh process."""
    tail = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + tail], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 2**20, time.perf_counter() - began


def main() -> None:
    imports = "import tpvc, tpvc.compiler.pipeline, transformers"
    base, _ = run(imports)
    print(f"imports alone: {base:.2f} GiB")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        count = checkpoint(root / "large", 22, LARGE)
        call = "tpvc.quantize({!r}, {!r}, method={!r}, dataset='self', steps=4, nsamples=16, seqlen=64)"
        peak, seconds = run(f"{imports}\n" + call.format(str(root / "large"), str(root / "rtn"), "rtn"))
        print(f"round-to-nearest, {count / 1e9:.2f}B parameters: {peak - base:.2f} GiB above imports, {seconds:.0f} s")
        for layers in (2, 4, 8, 16):
            name = f"small{layers}"
            checkpoint(root / name, layers, SMALL, vocab=2000)
            peak, seconds = run(f"{imports}\n" + call.format(str(root / name), str(root / f"q{layers}"), "flexround"))
            print(f"FlexRound, {layers} blocks: {peak - base:.2f} GiB above imports, {seconds:.0f} s")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()

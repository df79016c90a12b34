"""Which tool loads which quantised checkpoint, and computes what its integers mean.

    python benchmarks/who_loads.py --envs DIR -o who_loads [--only WORD] [--limit 240]

A small random Llama is quantised by the tools that such checkpoints come from, and read by every tool here. What the
integers mean is worked out bit by bit (`packed_layouts.py`) and computed in float32 by transformers' LlamaForCausalLM;
logits may differ from that by what `compiler/verification/logits.py` derives from the length of the sums and the
reader's dtype.

    right         logits within that tolerance
    wrong         it loads, and the logits are off: |found - meant| / |meant| over all of them
    refuses       an error that says what is not supported, or wanted (its words are in results.json)
    crashes       any other error
    needs a GPU   an error that asks for one
    no end        not done after --limit seconds of CPU

Tools live in environments of their own, which are made in DIR at the first run from `ENVIRONMENTS`. Every cell is a
process of its own, forked from one that has imported the tool.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from packed_layouts import meant

TORCH = "torch==2.13.0"
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "tpvc": (),
    "stock": (
        f"{TORCH} transformers==5.23.0 compressed-tensors==0.20.0 accelerate==1.15.0 gguf==0.19.0 onnx==1.23.2"
        " onnx-ir==1.1.0 onnxruntime==1.32.0 onnxruntime-genai==0.18.0",
    ),
    "llmcompressor": (f"{TORCH} llmcompressor==0.14.0.1",),
    "autoround": (f"{TORCH} auto-round==0.16.1 gguf==0.19.0",),
    "gptqmodel": (
        f"{TORCH} transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 packaging==26.3 protobuf==7.36.2 pillow==13.0.0"
        " requests==2.34.2 pypcre==0.6.4 tokenicer==0.0.14 logbar==0.4.15 ninja==1.13.2 datasets==5.1.0 dill"
        " pyarrow==26.0.1 torchao==0.18.0 defuser==0.0.28 device-smi==0.5.7 threadpoolctl setuptools==84.2.1",
        "--no-deps --no-build-isolation gptqmodel==7.7.0",
    ),
}
"""Name -> what pip is called with, one call after the other; none: the environment of this process. GPTQModel 7.7 asks
for torch 2.14.1, and is put beside 2.13.0 without its dependencies."""

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 288, "tie_word_embeddings": False}
IDS = [(i * 7 + 3) % 257 for i in range(24)]


@dataclass(frozen=True)
class Kind:
    """A row. writer: a key of `WRITERS` and of ENVIRONMENTS; base: the row whose checkpoint this one is a change of."""

    name: str
    writer: str
    options: dict[str, Any]
    base: str | None = None

    @property
    def folder(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def _compressed(name: str, **options: Any) -> Kind:
    return Kind(f"compressed-tensors {name}", "llmcompressor", options)


def _gptq(name: str, bits: int, sym: bool, desc_act: bool = False, form: str = "gptq", method: str = "gptq") -> Kind:
    options = {"bits": bits, "group_size": 32, "sym": sym, "desc_act": desc_act, "format": form, "method": method}
    return Kind(name, "gptqmodel", options)


def _round(name: str, form: str, bits: int, sym: bool) -> Kind:
    return Kind(name, "autoround", {"format": form, "bits": bits, "group_size": 32, "sym": sym})


KINDS: tuple[Kind, ...] = (
    _compressed("W4 g32 symmetric", bits=4, group=32, sym=True),
    _compressed("W4 g32 asymmetric", bits=4, group=32, sym=False),
    _compressed("W4 per channel symmetric", bits=4, group=None, sym=True),
    _compressed("W4 per channel asymmetric", bits=4, group=None, sym=False),
    _compressed("W8 per channel symmetric", bits=8, group=None, sym=True),
    _compressed("W3 g32 symmetric", bits=3, group=32, sym=True),
    _compressed("W2 g32 symmetric", bits=2, group=32, sym=True),
    _compressed("W2 g32 asymmetric", bits=2, group=32, sym=False),
    _compressed("W8A8 int8", bits=8, group=None, sym=True, rows=True),
    _gptq("GPTQ v1 W4 symmetric", 4, True),
    _gptq("GPTQ v1 W4 asymmetric", 4, False),
    _gptq("GPTQ v1 W4 symmetric, desc_act", 4, True, desc_act=True),
    _gptq("GPTQ v1 W4 asymmetric, desc_act", 4, False, desc_act=True),
    _gptq("GPTQ v1 W8 symmetric", 8, True),
    _gptq("GPTQ v1 W3 symmetric", 3, True),
    _gptq("GPTQ v1 W2 asymmetric", 2, False),
    _gptq("GPTQ v2 W4 symmetric", 4, True, form="gptq_v2"),
    _gptq("GPTQ v2 W4 asymmetric", 4, False, form="gptq_v2"),
    Kind("GPTQ W4 symmetric without qzeros", "without_zeros", {}, "GPTQ v1 W4 symmetric"),
    Kind("GPTQ W4 symmetric, v2 zero points under the name of v1", "misnamed", {}, "GPTQ v2 W4 symmetric"),
    _gptq("AWQ gemm W4 asymmetric (GPTQModel)", 4, False, form="gemm", method="awq"),
    _round("AWQ gemm W4 symmetric (AutoRound)", "auto_awq", 4, True),
    _round("AWQ gemm W4 asymmetric (AutoRound)", "auto_awq", 4, False),
    _round("AutoRound auto_gptq W4 symmetric", "auto_round:auto_gptq", 4, True),
    _round("AutoRound auto_gptq W4 asymmetric", "auto_round:auto_gptq", 4, False),
    _round("AutoRound auto_awq W4 asymmetric", "auto_round:auto_awq", 4, False),
    _round("AutoRound auto_round W2 symmetric", "auto_round", 2, True),
    Kind("GGUF Q4_0", "gguf", {"type": "Q4_0"}),
    Kind("GGUF Q4_1", "gguf", {"type": "Q4_1"}),
    Kind("GGUF Q8_0", "gguf", {"type": "Q8_0"}),
    Kind("GGUF Q4_K", "gguf", {"type": "Q4_K"}),
    Kind("tpvc quantize W4 g32 asymmetric", "tpvc", {"bits": 4, "group": 32}),
    Kind("tpvc export --to gptq", "tpvc", {"bits": 4, "group": 32, "symmetric": True, "to": "gptq"}),
    Kind("tpvc export --to awq", "tpvc", {"bits": 4, "group": 32, "to": "awq"}),
)

READERS: dict[str, Callable[[dict], str]] = {
    "tpvc": lambda config: "tpvc",
    "tpvc --to onnx": lambda config: "tpvc",
    "transformers": lambda config: {"gptq": "gptqmodel", "awq": "gptqmodel", "auto-round": "autoround"}.get(
        config.get("quantization_config", {}).get("quant_method"), "stock"
    ),
    "GPTQModel": lambda config: "gptqmodel",
    "GenAI builder": lambda config: "stock",
}
"""Column -> the environment that reads a checkpoint with this config.json; transformers has the package it asks for."""


# What runs in the tools' environments: writers.


def _tokens() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(1, 257, 64).tolist() for _ in range(16)]


def _write_llmcompressor(model: Path, out: Path, bits: int, group: int | None, sym: bool, rows: bool = False) -> None:
    """Round-to-nearest of llm-compressor, packed by compressed-tensors."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = QuantizationArgs(
        num_bits=bits, symmetric=sym, strategy="group" if group else "channel", group_size=group, type="int"
    )
    read = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True, type="int") if rows else None
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=read)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
    oneshot(model=loaded, recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    loaded.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


def _write_gptqmodel(model: Path, out: Path, method: str, **options: Any) -> None:
    import gptqmodel
    from gptqmodel.quantization import config as c

    kind = c.AWQConfig if method == "awq" and hasattr(c, "AWQConfig") else c.QuantizeConfig
    if method == "awq":
        options.pop("desc_act")
    asked = kind(**options, quant_method=method) if kind is c.QuantizeConfig else kind(**options)
    loaded = gptqmodel.GPTQModel.load(str(model), asked, device="cpu")
    loaded.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in _tokens()], batch_size=4)
    loaded.save(str(out))


def _write_autoround(model: Path, out: Path, format: str, **options: Any) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = AutoRound(loaded, tokenizer, iters=0, device_map="cpu", disable_opt_rtn=True, **options)
    made.quantize_and_save(str(out), format=format)


def _write_gguf(model: Path, out: Path, type: str) -> None:
    """By the gguf package; it only reads Q4_K, whose blocks are random bytes here, with small scales."""
    import gguf
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM

    kind, c = gguf.GGMLQuantizationType[type], json.loads((model / "config.json").read_text())
    out.mkdir()
    writer, random = gguf.GGUFWriter(out / "model.gguf", "llama"), np.random.default_rng(0)
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(c["hidden_size"] // c["num_attention_heads"])
    writer.add_vocab_size(c["vocab_size"])
    words = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    words += [f"<{i}>" for i in range(len(words), c["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["h e"])
    for name in ("bos", "eos"):
        getattr(writer, f"add_{name}_token_id")(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c["num_hidden_layers"])
    meant = {}
    for key, value in AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict().items():
        data = value.numpy()
        each = kind if key.endswith("_proj.weight") else gguf.GGMLQuantizationType.F32
        if each.name == "Q4_K":
            blocks = random.integers(0, 256, (len(data), data.shape[1] // 256, 144), dtype=np.uint8)
            scales = random.uniform(3e-4, 6e-4, blocks.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
            blocks[..., 0:2] = scales
            blocks[..., 2:4] = (scales.view(np.float16) * np.float16(7.5)).view(np.uint8)
            raw = blocks.reshape(len(data), -1)
        else:
            raw = gguf.quantize(np.ascontiguousarray(data), each)
        meant[key] = torch.from_numpy(np.array(gguf.dequantize(raw, each)))
        if "q_proj" in key or "k_proj" in key:
            heads = c["num_attention_heads" if "q_proj" in key else "num_key_value_heads"]
            half = len(raw) // heads // 2
            raw = raw.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(len(raw), -1)
        stem, _, suffix = key.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(raw), raw_dtype=each)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    torch.save(meant, out.with_suffix(".meant"))


def _write_tpvc(model: Path, out: Path, to: str | None = None, **options: Any) -> None:
    import tpvc

    rounded = out.with_suffix(".rounded") if to else out
    tpvc.quantize(model, rounded, method="rtn", head_bits=16, **options)
    if to:
        tpvc.export(rounded, out, to=to)


def _edited(base: Path, out: Path, tensors: Callable[[dict], dict], config: Callable[[dict], None]) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, out)
    path = next(out.glob("*.safetensors"))
    save_file(tensors(load_file(path)), path, metadata={"format": "pt"})
    for path in out.glob("*config.json"):
        told = json.loads(path.read_text())
        config(told.get("quantization_config", told))
        path.write_text(json.dumps(told))


def _write_without_zeros(base: Path, out: Path) -> None:
    _edited(base, out, lambda t: {n: v for n, v in t.items() if not n.endswith("qzeros")}, lambda config: None)


def _write_misnamed(base: Path, out: Path) -> None:
    def rename(config: dict) -> None:
        for key in ("checkpoint_format", "format"):
            if config.get(key) == "gptq_v2":
                config[key] = "gptq"

    _edited(base, out, lambda tensors: tensors, rename)


WRITERS: dict[str, tuple[str, Callable[..., None]]] = {
    "llmcompressor": ("llmcompressor", _write_llmcompressor),
    "gptqmodel": ("gptqmodel", _write_gptqmodel),
    "autoround": ("autoround", _write_autoround),
    "gguf": ("tpvc", _write_gguf),
    "tpvc": ("tpvc", _write_tpvc),
    "without_zeros": ("tpvc", _write_without_zeros),
    "misnamed": ("tpvc", _write_misnamed),
}
"""Name -> its environment, and the function."""


# Readers: (folder, a folder of their own) -> logits float32 [T or 1, vocab] of IDS, and the dtype they computed in.


def _forward(model: Any) -> tuple[np.ndarray, str]:
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS])).logits[0]
    return logits.float().numpy(), str(logits.dtype).removeprefix("torch.")


def _read_tpvc(folder: Path, own: Path) -> tuple[np.ndarray, str]:
    import torch

    from tpvc.compiler import frontends, interpret

    program = frontends.load(_model_file(folder), integers=True)
    with torch.no_grad():
        return interpret.logits(program, torch.tensor([IDS]))[0].numpy(), "float32"


def _read_tpvc_onnx(folder: Path, own: Path) -> tuple[np.ndarray, str]:
    import tpvc

    tpvc.export(_model_file(folder), own / "onnx", to="onnx", accuracy_level=0)
    return _onnx(own / "onnx" / "model.onnx")


def _read_transformers(folder: Path, own: Path) -> tuple[np.ndarray, str]:
    from transformers import AutoModelForCausalLM

    named = {"gguf_file": "model.gguf"} if (folder / "model.gguf").is_file() else {}
    return _forward(AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu", **named).eval())


def _read_gptqmodel(folder: Path, own: Path) -> tuple[np.ndarray, str]:
    from gptqmodel import GPTQModel

    return _forward(GPTQModel.load(str(_model_file(folder)), device="cpu").model)


def _read_builder(folder: Path, own: Path) -> tuple[np.ndarray, str]:
    """int4, with sums in float32 and the head, which is in float in the checkpoints, left out."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    name, given = (None, str(_model_file(folder)))
    options = ["int4_accuracy_level=1", "int4_nodes_to_exclude=/lm_head/MatMul"]
    (own / "cache").mkdir()
    place = name, given, str(own / "onnx"), "int4", "cpu", str(own / "cache")
    create_model(*place, **parse_extra_options(*place, options))
    return _onnx(own / "onnx" / "model.onnx")


def _model_file(folder: Path) -> Path:
    return folder / "model.gguf" if (folder / "model.gguf").is_file() else folder


def _onnx(path: Path) -> tuple[np.ndarray, str]:
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    ids = np.array([IDS])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(IDS))[None]}
    for slot in session.get_inputs():
        if slot.name not in feeds:
            feeds[slot.name] = np.zeros((1, slot.shape[1], 0, slot.shape[3]), np.float32)
    feeds = {slot.name: feeds[slot.name] for slot in session.get_inputs()}
    return session.run(["logits"], feeds)[0][0].astype(np.float32), "float32"


READING = {
    "tpvc": _read_tpvc,
    "tpvc --to onnx": _read_tpvc_onnx,
    "transformers": _read_transformers,
    "GPTQModel": _read_gptqmodel,
    "GenAI builder": _read_builder,
}
IMPORTS = {
    "tpvc": ("torch", "transformers", "tpvc.compiler.pipeline", "onnxruntime"),
    "stock": ("torch", "transformers", "onnxruntime", "onnxruntime_genai.models.builder"),
    "llmcompressor": ("torch", "transformers", "llmcompressor"),
    "autoround": ("torch", "transformers", "auto_round"),
    "gptqmodel": ("torch", "transformers", "datasets"),
}
"""What is imported once for all cells of an environment. Not GPTQModel itself, whose threads a fork would lose."""


def serve(environment: str, jobs: Path) -> None:
    """Do the jobs in processes forked from this one: {"result", "limit", and "write" or "read", ...}."""
    import importlib

    sys.path[0] = str(jobs.parent)  # not the folder of this file, whose modules other packages may find
    if environment == "gptqmodel":  # it counts half of the cores as workers, and with fewer than two it stops
        os.cpu_count = lambda: 4
    for name in IMPORTS[environment]:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    for job in json.loads(jobs.read_text()):
        child = os.fork()
        if child == 0:
            _child(job)
        status = os.waitpid(child, 0)[1]
        if not Path(job["result"]).exists():
            late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
            said = {"error": "no end" if late else "died", "said": f"wait status {status}"}
            Path(job["result"]).write_text(json.dumps(said))


def _child(job: dict) -> None:
    """Never returns."""
    result, own = Path(job["result"]), Path(job["own"])
    log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (job["limit"], job["limit"] + 5))
    signal.alarm(20 * job["limit"])
    try:
        if "write" in job:
            WRITERS[job["write"]][1](Path(job["from"]), Path(job["to"]), **job["options"])
            told = {}
        else:
            own.mkdir(parents=True)
            logits, dtype = READING[job["read"]](Path(job["from"]), own)
            np.save(result.with_suffix(".npy"), logits)
            told = {"dtype": dtype}
    except BaseException as error:
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()]
        told = {"error": type(error).__name__, "said": (lines or [""])[0], "all": str(error)[:2000]}
    result.write_text(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)


def reference(model: Path, folder: Path) -> tuple[np.ndarray, Callable[[str], float]]:
    """(logits float32 [T, vocab] of what a checkpoint means, the difference that a dtype may make)."""
    import torch
    from transformers import AutoModelForCausalLM

    from tpvc.compiler import frontends
    from tpvc.compiler.verification.logits import Expected
    from tpvc.passes.round_activations import RoundActivations

    weights, rounds = meant(folder)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    plain.load_state_dict(weights)

    def rounded(module: Any, given: tuple) -> tuple:
        x = given[0]
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        return ((x / scale).round().clamp(-128, 127) * scale,)

    if rounds:
        for name, module in plain.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(rounded)
    wanted = torch.from_numpy(_forward(plain)[0])
    program = frontends.load(model)
    program = RoundActivations("int8")(program) if rounds else program
    expected = Expected(program, torch.tensor(IDS), wanted)
    return wanted.numpy(), lambda dtype: expected.tolerance(getattr(torch, dtype))[0]


# The table.


def make_model(directory: Path) -> None:
    """A random Llama whose logits depend on all of its weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    for value in model.parameters():
        if value.ndim == 2:
            torch.nn.init.normal_(value, std=value.shape[1] ** -0.5)
    model.half().save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>").save_pretrained(directory)


def interpreter(name: str, folder: Path) -> str | None:
    """The environment's Python, made if it is missing; None where it cannot be made within ten minutes."""
    if not ENVIRONMENTS[name]:
        return sys.executable
    home = folder / name
    if not (home / "made").is_file():
        try:
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            for call in ENVIRONMENTS[name]:
                pip = [home / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile"]
                subprocess.run([*pip, *call.split()], check=True, timeout=600)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"environment {name} cannot be made: {error}", file=sys.stderr)
            return None
        (home / "made").touch()
    return str(home / "bin" / "python")


def work(name: str, envs: Path, out: Path, jobs: Sequence[dict]) -> None:
    python = interpreter(name, envs) if jobs else None
    if python is None:
        for job in jobs:
            Path(job["result"]).write_text(json.dumps({"error": "not installed", "said": ""}))
        return
    path = out / f"{name}.jobs.json"
    path.write_text(json.dumps(list(jobs)))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with open(out / f"{name}.log", "a") as log:
        subprocess.run([python, __file__, "--serve", name, path], env=os.environ | quiet, stdout=log, stderr=log)
    for job in jobs:
        if not Path(job["result"]).is_file():
            Path(job["result"]).write_text(json.dumps({"error": "died", "said": "the tool cannot be imported"}))


ASKS_GPU = re.compile(
    r"\b(no|not|requires?|needs?|without)\b.{0,40}\b(CUDA|GPU|XPU)\b|\b(CUDA|GPU|XPU)\b.{0,40}(unavailable|required|not)",
    re.I,
)
CLEAR = re.compile(
    r"support|require|install|expected|not implemented|not available|cannot be exported|no valid|must be"
)


def verdict(told: dict, found: Path, wanted: np.ndarray, allowed: Callable[[str], float]) -> dict:
    if "error" in told:
        if told["error"] in ("no end", "not installed"):
            return {"cell": told["error"], **told}
        if ASKS_GPU.search(told.get("all", "")):
            return {"cell": "needs a GPU", **told}
        clear = told["error"] == "TpvcError" or CLEAR.search(told["said"])
        return {"cell": "refuses" if clear else f"crashes ({told['error']})", **told}
    logits = np.load(found)
    meant = wanted[-len(logits) :]
    off, most = float(np.linalg.norm(logits - meant) / np.linalg.norm(meant)), float(np.abs(logits - meant).max())
    told = {**told, "relative": off, "largest": most, "allowed": allowed(told["dtype"])}
    return {"cell": "right" if most <= told["allowed"] else f"wrong ({off:.2g})", **told}


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, help="folder of the environments")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose name holds this word")
    parser.add_argument("--columns", default=",".join(READERS))
    parser.add_argument("--limit", type=int, default=240, help="seconds of CPU of a cell")
    asked = parser.parse_args()
    out, envs = asked.output.resolve(), asked.envs.resolve()
    out.mkdir(parents=True, exist_ok=True)
    model, columns = out / "model", asked.columns.split(",")
    if not model.is_dir():
        make_model(model)
    kinds = [kind for kind in KINDS if asked.only in kind.name]
    _make(kinds, model, out, envs, asked.limit)
    made = [kind for kind in kinds if (out / kind.folder).is_dir() and (out / f"{kind.folder}.made").is_file()]
    jobs: dict[str, list[dict]] = {}
    for kind in made:
        config = out / kind.folder / "config.json"
        config = json.loads(config.read_text()) if config.is_file() else {}
        for column in columns:
            own = out / "cells" / kind.folder / re.sub(r"\W+", "-", column)
            job = {"read": column, "from": str(out / kind.folder), "own": str(own), "limit": asked.limit}
            job["result"] = f"{own}.json"
            if not Path(job["result"]).is_file():
                shutil.rmtree(own, ignore_errors=True)
                own.parent.mkdir(parents=True, exist_ok=True)
                jobs.setdefault(READERS[column](config), []).append(job)
    for name, some in jobs.items():
        work(name, envs, out, some)
    table(kinds, made, columns, model, out)


def _make(kinds: Sequence[Kind], model: Path, out: Path, envs: Path, limit: int) -> None:
    """Write the checkpoints that are missing, changed ones last."""
    by_name = {kind.name: kind for kind in KINDS}
    wanted = {kind.name: kind for kind in kinds} | {k.base: by_name[k.base] for k in kinds if k.base}
    for last in (False, True):
        jobs: dict[str, list[dict]] = {}
        for kind in wanted.values():
            to, done = out / kind.folder, out / f"{kind.folder}.made"
            if (kind.base is not None) != last or done.is_file():
                continue
            shutil.rmtree(to, ignore_errors=True)
            base = out / by_name[kind.base].folder if kind.base else model
            job = {"write": kind.writer, "from": str(base), "to": str(to), "options": kind.options, "own": str(to)}
            job |= {"result": f"{to}.written.json", "limit": 3 * limit}
            Path(job["result"]).unlink(missing_ok=True)
            jobs.setdefault(WRITERS[kind.writer][0], []).append(job)
        for name, some in jobs.items():
            work(name, envs, out, some)
            for job in some:
                told, to = json.loads(Path(job["result"]).read_text()), Path(job["to"])
                if to.is_dir() and not (to / "config.json").is_file() and not (to / "model.gguf").is_file():
                    inner = next((p.parent for p in to.rglob("config.json")), None)  # AutoRound makes a folder inside
                    if inner is not None:
                        for path in list(inner.iterdir()):
                            path.rename(to / path.name)
                if "error" in told:
                    print(f"{to.name} cannot be written: {told['error']}: {told['said']}", file=sys.stderr)
                else:
                    Path(f"{to}.made").touch()


def table(kinds: Sequence[Kind], made: Sequence[Kind], columns: Sequence[str], model: Path, out: Path) -> None:
    results: dict[str, dict] = {}
    lines = ["| checkpoint | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for kind in kinds:
        if kind not in made:
            said = json.loads((out / f"{kind.folder}.written.json").read_text())
            results[kind.name] = {"not written": said}
            lines.append(f"| {kind.name} | not written: {said['error']} |" + " |" * (len(columns) - 1))
            continue
        wanted, allowed = reference(model, out / kind.folder)
        row = {}
        for column in columns:
            path = out / "cells" / kind.folder / (re.sub(r"\W+", "-", column) + ".json")
            row[column] = verdict(json.loads(path.read_text()), path.with_suffix(".npy"), wanted, allowed)
        results[kind.name] = row
        lines.append(f"| {kind.name} | " + " | ".join(row[column]["cell"] for column in columns) + " |")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Logits of one short text: the interpreter's on the reference, and those of each format's own runtime.

Tolerance. Two float32 evaluations differ by the order of their sums: a sum of K terms is off by about sqrt(K) u of its
size, u = 2^-24, in either of them, and what one product gets wrong the next ones carry on, so that these errors add up.
A runtime that keeps what it computes in 16 bits rounds every value of the graph by u = 2^-11 (float16) or 2^-8
(bfloat16) once more, and its weights; a row rounded to 8 bits may go to the other neighbour, 2^-7 of its largest value.
Such roundings are independent and add up as squares, and what follows may make them larger: twice the root of their sum
is what logits may be off by on average (root mean square, of that of the logits; what all of a token have in common is
left out, as probabilities do), and four times it, of the largest logit, what one of a vocabulary may be. The mean is
what tells a graph that lacks a part from one that is rounded.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.weights import read_json
from tpvc.compiler.output import MANIFEST
from tpvc.compiler.program import ROUNDERS, Program, folded_tokens, grid_of, rounded_cache

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."
TOKENS = 24
"""Of the text, at most."""
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

Said = tuple[bool, str]


@dataclass(frozen=True, eq=False)
class Expected:
    """ids int64 [T] of the text and the interpreter's logits float32 [T, vocab] of `program`; aside: what is to be
    said of them."""

    program: Program
    ids: torch.Tensor
    logits: torch.Tensor
    aside: str = ""

    @classmethod
    @torch.no_grad()
    def of(cls, program: Program) -> Expected:
        from tpvc.compiler import frontends, interpret

        try:
            ids = frontends.tokenizer(program).encode(TEXT)[:TOKENS]
        except TpvcError:  # no tokenizer lies beside the weights: any ids will do
            ids = [i * 7 % program.facts.vocab_size for i in range(TOKENS)]
        ids = torch.tensor(ids[: program.facts.context_length])
        return cls(program, ids, interpret.logits(program, ids[None])[0])

    @cached_property
    def in_float(self) -> Expected:
        """The same for a target that keeps keys and values in float."""
        from tpvc.passes.round_cache import float_cache

        if rounded_cache(self.program) is None:
            return self
        return replace(Expected.of(float_cache(self.program)), aside=", keys and values in float")

    def tolerance(self, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
        """How far one logit may be off, and how far all of them may on average (root mean square)."""
        sums, rounded = 0.0, 0.0
        for node in self.program.nodes:
            if node.op == "linear":
                sums += math.sqrt(self.program.params[node.params["weight"]].shape[1])
                rounded += ROUNDING[dtype] ** 2  # of its weights
            elif node.op == "attention":
                sums += math.sqrt(self.program.facts.head_dim) + math.sqrt(len(self.ids))
            else:
                sums += 1
            rounded += ROUNDING[dtype] ** 2 if node.op not in ROUNDERS else 2.0**-14
        largest, usual = self.logits.abs().max().item(), _spread(self.logits)
        ordered, root = 2 * sums * 2.0**-24 * largest, math.sqrt(rounded)
        return ordered + 4 * root * largest, ordered + 2 * root * usual + ROUNDING[dtype] * largest

    def check(self, found: torch.Tensor, target: str, runtime: str, dtype: torch.dtype = torch.float32) -> Said:
        """`found`: logits [T, vocab], or [1, vocab] of the last token."""
        wanted, (allowed, usually) = self.logits[-len(found) :], self.tolerance(dtype)
        off = (found.float() - wanted).abs()
        most, usual = off.max().item(), _spread(found.float() - wanted)
        if not most <= allowed:
            token, entry = divmod(int(off.nan_to_num(math.inf).argmax()), off.shape[1])
            place = len(self.ids) - len(found) + token + 1
            here, there = (logits[token, entry].item() for logits in (found, wanted))
            raise TpvcError(
                f"{runtime} computes from '{target}' the logit {here:.6g} of token id {entry} after {place} tokens, the"
                f" interpreter {there:.6g}; they may differ by {allowed:.2g}"
            )
        if not usual <= usually:
            raise TpvcError(
                f"{runtime} computes from '{target}' logits that are off by {usual:.2g} on average (root mean square),"
                f" of {_spread(wanted):.3g}; they may be by {usually:.2g}"
            )
        largest = wanted.abs().max().item()
        said = f"{runtime}{self.aside}: off by {most:.1e} at most, {usual:.1e} on average"
        return True, f"{said}; {allowed:.1e} and {usually:.1e} are allowed, the largest is {largest:.3g}"


def _spread(logits: torch.Tensor) -> float:
    """Root mean square of logits [T, vocab] about their mean for each token."""
    return (logits - logits.mean(-1, keepdim=True)).double().square().mean().sqrt().item()


def check_logits(target: str, program: Program | None, expected: Expected) -> Iterator[Said]:
    """One finding for every graph or runtime of a target; `program` for one that the frontends read."""
    folder = Path(target).expanduser()
    if (folder / "triton.json").is_file():
        yield _triton(folder, target, expected)
    elif program is not None:
        own = expected if rounded_cache(program) else expected.in_float
        yield _transformers(folder, target, program, own)
    else:
        graphs = {"": folder, "portable/": folder / "portable"}
        for name, path in graphs.items():
            if (path / "model.onnx").is_file():
                yield _onnx(path, target, name, expected.in_float)


def _onnx(folder: Path, target: str, name: str, expected: Expected) -> Said:
    """In ONNX Runtime on the CPU. MatMulNBits is asked to sum in float32, whatever accuracy level it is to run at."""
    import onnx
    import onnxruntime as ort

    told = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    if told.get("folded") or (folder.name == "portable" and _folded_above(folder)):
        return False, "a soft prompt is folded into the graph, which the reference has not"
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    levels = set()
    for attribute in (a for n in model.graph.node if n.op_type == "MatMulNBits" for a in n.attribute):
        if attribute.name == "accuracy_level":
            levels.add(attribute.i)
            attribute.i = 0
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    ids = expected.ids[None].numpy()
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for slot in session.get_inputs()[2:]:
            feeds[slot.name] = np.zeros((1, slot.shape[1], 0, slot.shape[3]), np.float32)
        found = torch.from_numpy(session.run(["logits"], feeds)[0][0])
    except Exception as error:  # ONNX Runtime's own error types, and inputs of another rank
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TpvcError(f"ONNX Runtime cannot run '{folder / 'model.onnx'}': {reason}") from error
    proven, said = expected.check(found, target, f"ONNX Runtime {ort.__version__}, {name}model.onnx")
    return proven, said + (" (summed in float32; not at accuracy level 4)" if 4 in levels else "")


def _folded_above(portable: Path) -> bool:
    path = portable.parent / MANIFEST
    return path.is_file() and bool(read_json(path).get("folded"))


def _triton(folder: Path, target: str, expected: Expected) -> Said:
    """Through the references of the package's kernels, with keys and values in int8 where both the package and the
    reference have them so, and else in the dtype of activations."""
    from tpvc.compiler.backends import triton
    from tpvc.compiler.backends.triton.engine import Engine
    from tpvc.compiler.backends.triton.on_torch import OnTorch

    model = triton.read(folder)
    if not (rounded_cache(expected.program) and model.cache == torch.int8):
        model, expected = replace(model, cache=model.dtype), expected.in_float
    found = Engine(OnTorch(model, 1, len(expected.ids))).admit(expected.ids.tolist())[1]
    kind = str(model.dtype).removeprefix("torch.")
    proven, said = expected.check(found[None], target, f"references of the kernels, {kind}", model.dtype)
    return proven, f"{said} (no kernel was run)"


READERS = {"compressed-tensors": "compressed_tensors", "gptq": "gptqmodel", "awq": "gptqmodel"}
"""quant_method -> the package through which transformers reads it."""


def _transformers(folder: Path, target: str, program: Program, expected: Expected) -> Said:
    method = (program.source.config.get("quantization_config") or {}).get("quant_method")
    options = read_json(folder / MANIFEST).get("options") if (folder / MANIFEST).is_file() else None
    made_for = options.get("to") if isinstance(options, dict) else None
    if program.source.gguf is not None:
        return False, "transformers dequantises a GGUF file by itself and was not asked"
    if made_for == "vllm":
        return False, "transformers does not read this layout, and vLLM was not asked"
    if folded_tokens(program):
        return False, "a soft prompt is folded in, which transformers does not know"
    if method is None and any(grid_of(p) is not None for p in program.params.values()):
        return False, "its config.json does not say how it is quantised, so transformers would take it for floats"
    package = READERS.get(method, "auto_round") if method else "transformers"
    if importlib.util.find_spec(package) is None:
        return False, f"transformers reads it through {package}, which is not installed"
    return _asked(folder, target, method, expected)


@torch.no_grad()
def _asked(folder: Path, target: str, method: str | None, expected: Expected) -> Said:
    import transformers

    dtype = torch.float32 if method in (None, "compressed-tensors") else torch.float16
    transformers.logging.set_verbosity_error()
    try:
        given = {"dtype": dtype, "attn_implementation": "eager"}
        given |= {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):  # bars and remarks of the readers
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, **given).eval()
            found = model(expected.ids[None]).logits[0]
    except Exception as error:  # whatever transformers, its readers and its hub client raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return False, f"transformers {transformers.__version__} does not load it: {reason[:200]}"
    return expected.check(found, target, f"transformers {transformers.__version__}", dtype)

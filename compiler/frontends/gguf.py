"""GGUF files (v2, v3; llama.cpp's format): the graph from the metadata, tensors dequantised one by one from the map.

Three things that llama.cpp's converter does to a checkpoint are undone, so that parameters are those of the Hugging
Face model: the q and k rows of `llama` files are interleaved for its rotary kernel; Gemma's norm weights are stored as
w + 1; and names are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import gguf_integers
from tpvc.compiler.frontends.architecture import Architecture, architecture
from tpvc.compiler.frontends.gguf_config import config as config_of
from tpvc.compiler.frontends.tokenizer_files import is_damage
from tpvc.compiler.program import Lazy, Program, QTensor, Source, linears

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF names to Hugging Face names, around and inside the blocks (blk.N -> model.layers.N)."""

GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
RENAMED = {
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
"""Where an architecture differs from INSIDE."""

DAMAGE = (ValueError, TypeError, KeyError, IndexError, ArithmeticError)
"""What nonsense in the metadata raises (a number where text should be, text that is not UTF-8)."""

AT_ONCE = 1 << 20
"""Numbers dequantised at a time: the package takes several times the memory of its result."""

MOST, MOST_NAMES = 1 << 22, 1 << 17
"""Texts in an array (a vocabulary has a tenth), and keys or tensors of a file: each takes kilobytes when it is read."""

NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class Reader(gguf.GGUFReader):
    """The package's reader, with every access checked against the length of the file."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if int(offset) + np.dtype(dtype).itemsize * int(count) > self.data.shape[0]:
            raise ValueError("the file ends inside its data")
        if type(self.data) is np.memmap:
            self.data = self.data.view(np.ndarray)  # the same map; slices of a memmap subclass are slow and large
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs, raw_type):
        """Numbers of an array as one part, and not each as one of its own, which takes a hundred times their bytes."""
        if raw_type == gguf.GGUFValueType.ARRAY:
            kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            inner = gguf.GGUFValueType(kind[0])
            if number := self.gguf_scalar_to_np.get(inner):
                values = self._get(orig_offs + 12, number, count[0])
                size = 12 + values.nbytes
                return size, [kind, count, values], [2], [gguf.GGUFValueType.ARRAY, inner][: 1 + bool(count[0])]
            if count[0] > MOST:
                raise ValueError(f"an array has {count[0]} texts, at most {MOST} are read")
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_fields(self, offs, count):
        return super()._build_fields(offs, _few(count, "keys"))

    def _build_tensor_info(self, offs, count):
        return super()._build_tensor_info(offs, _few(count, "tensors"))


def _few(count: int, what: str) -> int:
    if count > MOST_NAMES:
        raise ValueError(f"it states {count} {what}, at most {MOST_NAMES} are read")
    return count


def load(path: Path, name: str, integers: bool = False) -> Program:
    """The Program of one GGUF file; nothing but metadata is read.

    integers  keep the integers of a file whose blocks' linears are all of the types of `gguf_integers`; otherwise every
              tensor is dequantised

    Raises TpvcError for a damaged file, an architecture, a metadata key or a tensor that is not supported.
    """
    path = Path(path).absolute()
    reader = _open(path)
    tensors = {t.name: t for t in reader.tensors}
    try:
        _check_types(reader.tensors)
        shapes = {n: tuple(reversed(t.shape.tolist())) for n, t in tensors.items()}
        config = config_of(_metadata(reader), shapes, lambda n: _values(tensors[n]))
        arch = architecture(config)
        params = {}
        for tensor in reader.tensors:
            if tensor.name in NOT_WEIGHTS:
                continue
            target = parameter_name(tensor.name, config["model_type"])
            if target not in arch.shapes:
                raise TpvcError(
                    f"the GGUF has the tensor '{tensor.name}', which a '{config['model_type']}' model does "
                    "not have; this file is not supported"
                )
            if shapes[tensor.name] != arch.shapes[target]:
                raise TpvcError(
                    f"the GGUF has '{tensor.name}' of shape {shapes[tensor.name]}, expected {arch.shapes[target]}"
                )
            params[target] = Lazy(shapes[tensor.name], torch.float32, _reading(path, tensor, config))
        if missing := sorted(arch.shapes.keys() - params.keys()):
            raise TpvcError(
                f"the GGUF lacks the tensor '{missing[0]}', one of {len(missing)}; it is one part of a split "
                "model or damaged: expected a whole model in one file"
            )
        if integers:
            params |= _integers(tensors, arch, config)
    except TpvcError as error:
        raise TpvcError(f"{path.name}: {error}") from error
    except DAMAGE as error:
        raise TpvcError(f"{path.name}: its metadata is damaged ({error}); download it again") from error
    return Program(arch.nodes, params, arch.facts, Source(name, path.parent, config, (path,)))


def parameter_name(name: str, model_type: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, None if there is none: blk.3.attn_q.weight -> model.layers.3...."""
    stem, _, suffix = name.rpartition(".")
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{suffix}"
    inside = INSIDE | RENAMED.get(model_type, {})
    match stem.split("."):
        case ["blk", index, part] if part in inside:
            return f"model.layers.{index}.{inside[part]}.{suffix}"
    return None


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of q or k rows (or biases): row 2i + s of a head comes from row s * d/2 + i."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _open(path: Path) -> Reader:
    if not path.is_file():
        raise TpvcError(f"there is no file {path}; expected a .gguf model")
    try:
        reader = Reader(path)
        if reader.byte_order == "S":
            raise ValueError("its byte order is not this machine's")
    except OSError as error:
        raise TpvcError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the package raises ValueError, IndexError, KeyError, UnicodeDecodeError ... on damage
        raise TpvcError(
            f"{path.name} is not a readable GGUF file (version 2 or 3): {error}; it is truncated or damaged, "
            "download it again"
        ) from error
    return reader


def _metadata(reader: Reader) -> dict[str, Any]:
    """Scalars and per-layer arrays; the vocabulary is left in the file."""
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if field.types[0] != gguf.GGUFValueType.ARRAY or not key.startswith("tokenizer.")
    }


def _check_types(tensors: list) -> None:
    """Refuse a tensor type that the gguf package cannot dequantise, before anything is read."""
    for tensor in {t.tensor_type: t for t in tensors}.values():
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]), np.uint8), tensor.tensor_type)
        except NotImplementedError:
            raise TpvcError(
                f"the tensor '{tensor.name}' is stored as {tensor.tensor_type.name}, which cannot be "
                "dequantised; use a file of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K or Q6_K tensors"
            ) from None


def _values(tensor: gguf.ReaderTensor, rows: slice = slice(None)) -> np.ndarray:
    return gguf.dequantize(tensor.data[rows], tensor.tensor_type)


def _integers(tensors: dict[str, gguf.ReaderTensor], arch: Architecture, config: dict[str, Any]) -> dict[str, Lazy]:
    """The matrices that can be held as integers, where the linears of all blocks can be."""
    own = {parameter_name(n, config["model_type"]): t for n, t in tensors.items() if n not in NOT_WEIGHTS}
    inside = {n.params["weight"] for n in linears(n for n in arch.nodes if n.block is not None)}
    if any(gguf_integers.grid_of(own[name].tensor_type) is None for name in inside):
        return {}
    found = {}
    for name, tensor in own.items():
        grid, shape = gguf_integers.grid_of(tensor.tensor_type), arch.shapes[name]
        if grid is not None and len(shape) == 2:
            found[name] = Lazy(shape, torch.float16, _integer_reading(tensor, config), grid)
    return found


def _integer_reading(tensor: gguf.ReaderTensor, config: dict[str, Any]) -> Callable[[], QTensor]:
    heads = _permuted_heads(tensor, config)

    def read() -> QTensor:
        q = gguf_integers.qtensor(tensor.data, tensor.tensor_type)
        if not torch.isfinite(q.scale).all():
            raise TpvcError(f"the tensor '{tensor.name}' holds NaN or infinite values; the file is damaged")
        return q if heads is None else replace(q, codes=unpermute(q.codes, heads), scale=unpermute(q.scale, heads))

    return read


def _permuted_heads(tensor: gguf.ReaderTensor, config: dict[str, Any]) -> int | None:
    """Heads of a tensor whose rows llama.cpp interleaved, None for another."""
    part = tensor.name.split(".")[-2]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(part)
    return heads if config["model_type"] in ("llama", "mistral") else None


def _reading(path: Path, tensor: gguf.ReaderTensor, config: dict[str, Any]) -> Callable[[], torch.Tensor]:
    heads = _permuted_heads(tensor, config)
    plus_one = config["model_type"] in ("gemma2", "gemma3_text") and tensor.name.split(".")[-2].endswith("norm")

    def read() -> torch.Tensor:
        values = np.empty(tuple(reversed(tensor.shape.tolist())), np.float32)
        step = max(1, AT_ONCE * len(values) // max(values.size, 1))
        for start in range(0, len(values), step):
            values[start : start + step] = _values(tensor, slice(start, start + step))
        weight = torch.from_numpy(values)
        low, high = (float(v) for v in weight.aminmax())
        if not (low > float("-inf") and high < float("inf")):
            raise TpvcError(
                f"{path.name}: the tensor '{tensor.name}' holds NaN or infinite values; the file is damaged"
            )
        if heads is not None:
            weight = unpermute(weight, heads)
        return weight - 1 if plus_one else weight

    return read


DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""Splits (tokenizer.ggml.pre) that are GPT-2's after every digit was set apart; transformers leaves the digits out.

They are set apart by a regular expression and not by the tokenizers package's `Digits`, which means the same: ONNX
Runtime GenAI follows the one and passes over the other.
"""
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel splits by unless told not to."""

KNOWN_SPLITS = {"gpt-2", "llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken", "smaug-bpe", "dbrx"}
KNOWN_SPLITS |= {"qwen2", "deepseek-r1-qwen", "megrez", "gpt-4o"} | DIGITS_APART
BEGINNING = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"}
"""Splits whose files need not say that a text begins with a token of its own: llama.cpp adds it for them."""


def tokenizer(path: Path):
    """The transformers tokenizer that the file's metadata describes, with its chat template.

    Raises TpvcError when the file holds none or one whose way of splitting text is not known.
    """
    path = Path(path)
    try:
        metadata = {key: f.contents() for key, f in _open(path).fields.items() if key in (MODEL, SPLIT, BEGIN)}
    except DAMAGE as error:
        raise TpvcError(f"{path.name}: its metadata is damaged ({error}); download it again") from error
    if MODEL not in metadata:
        raise TpvcError(f"{path.name} holds no tokenizer; expected the metadata '{MODEL}'")
    split = metadata.get(SPLIT)
    if metadata[MODEL] == "gpt2" and split not in KNOWN_SPLITS:
        raise TpvcError(
            f"{path.name} splits text by {split!r} before merging, which is not known; known: "
            f"{', '.join(sorted(KNOWN_SPLITS))}"
        )
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoTokenizer

    try:
        where = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
        made = AutoTokenizer.from_pretrained(path.absolute().parent, **where)
    except BaseException as error:  # whatever transformers, and what it is built on, meets in a damaged vocabulary
        if not is_damage(error):
            raise
        raise TpvcError(f"transformers cannot build the tokenizer of {path.name}: {error}") from error
    if metadata[MODEL] == "gpt2" and split in BEGINNING and BEGIN not in metadata and made.bos_token is not None:
        made.add_bos_token = True
    if metadata[MODEL] == "gpt2" and split in DIGITS_APART:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in (r"\p{N}", GPT2_SPLIT)]
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    return made


MODEL, SPLIT, BEGIN = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"

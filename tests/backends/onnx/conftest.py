"""Small random models of every family, rounded to nearest, and two ways to run what was emitted."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch

from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.program import Grid, Program, QTensor, linears

SIZES = {
    "vocab_size": 97,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
}
OPT = {"model_type": "opt", "ffn_dim": 384, "word_embed_proj_dim": 192, "activation_function": "relu"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "llama-odd-heads": {"model_type": "llama", "head_dim": 12},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "phi3": {"model_type": "phi3", "sliding_window": 4},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 32,
        "sliding_window": 4,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 15.0,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    },
    "opt": OPT,
    "opt-350m-shape": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 64},
    "gpt2": {"model_type": "gpt2", "n_positions": 64, "n_embd": 192, "n_layer": 2, "n_head": 4},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.25, "hidden_act": "gelu", "num_attention_heads": 3},
    "gpt_neox-odd-rotation": {"model_type": "gpt_neox", "rotary_pct": 0.25, "hidden_act": "gelu"},
}


def round_to_nearest(weight: torch.Tensor, grid: Grid) -> QTensor:
    rows, columns = weight.shape
    runs = weight.reshape(1, 1, -1) if grid.group == 0 else weight.reshape(rows, -1, grid.columns(columns))
    top, half = 2**grid.bits - 1, 2 ** (grid.bits - 1)
    if grid.symmetric:
        scale = runs.abs().amax(-1, keepdim=True) / half
        zero = torch.full_like(scale, half)
    else:
        low, high = runs.amin(-1, keepdim=True).clamp(max=0), runs.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale).round()
    codes = (runs / scale + zero).round().clamp(0, top).to(torch.uint8).reshape(rows, columns)
    return QTensor(codes, scale[..., 0], None if grid.symmetric else zero[..., 0].to(torch.uint8), grid)


def build(family: str, grid: Grid | None = None, head: Grid | None = None, seed: int = 0, **fields) -> Program:
    """A random model; the linears of the blocks on `grid`, those outside (the head) on `head`."""
    drawn = architecture(SIZES | CONFIGS[family] | fields)
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in drawn.shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            table = any(part in name for part in ("embed", "wte", "wpe"))
            params[name] = values * (0.3 if table else shape[1] ** -0.5)
        else:
            params[name] = values * 0.1 + (name.endswith("weight") and "gemma" not in family)
    rounded = {}
    for node in linears(drawn.nodes):
        name, chosen = node.params["weight"], grid if node.block is not None else head
        if chosen is not None:
            rounded[name] = round_to_nearest(params[name], chosen)
    return Program(drawn.nodes, params, drawn.facts).with_params(rounded)


def session(directory: Path) -> ort.InferenceSession:
    """Plain ONNX Runtime on one thread; integer products that it fuses by itself stay in float32."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"])


def step(model: ort.InferenceSession, ids: torch.Tensor, mask: torch.Tensor, past: list | None = None):
    """(logits, the cache after it) for new tokens `ids` [B, T]."""
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()}
    for i, slot in enumerate(model.get_inputs()[2:]):
        empty = np.zeros((len(ids), slot.shape[1], 0, slot.shape[3]), np.float32)
        feeds[slot.name] = empty if past is None else past[i]
    logits, *cache = model.run(None, feeds)
    return torch.from_numpy(logits), cache


def tolerance(reference: torch.Tensor) -> float:
    """How far two correct float32 evaluations may lie apart.

    A logit passes 6 products a layer (qkv, scores, values, output, up, down) and the head; a sum of K terms is off by
    about sqrt(K) u of its size, u = 2^-24, in either evaluation, and what a product gets wrong the next ones carry on.
    """
    products, terms = 6 * 2 + 1, 384
    return 2 * products * terms**0.5 * 2**-24 * reference.abs().max().item()


@pytest.fixture(scope="session")
def tiny():
    return SimpleNamespace(
        build=build,
        families=tuple(CONFIGS),
        round_to_nearest=round_to_nearest,
        session=session,
        step=step,
        tolerance=tolerance,
    )


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", CONFIGS)

"""Reading a Hugging Face config.json: needed fields, fields with a neutral value, activation names, sizes.

Every function raises TpvcError naming the field. A field that would change the meaning of a model is never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpvc.compiler.errors import TpvcError, short
from tpvc.compiler.program import Facts

Config = Mapping[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
"""Activation names of configs -> kinds of the op table. The tanh forms differ in rounding only."""

NEUTRAL = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "use_bidirectional_attention": False,
    "alibi": False,
    "clip_qkv": None,
    "qk_layernorm": False,
    "use_qk_norm": False,
    "no_rope_layers": None,
    "num_experts": None,
    "num_local_experts": None,
    "rope_interleaved": False,
    "attention_multiplier": None,
    "residual_multiplier": None,
    "embedding_multiplier": None,
    "logits_scaling": None,
    "use_cla": False,
    "pruned_heads": None,
}
"""Fields that no supported family has; another value than this one (or nothing) means a different model."""


LARGEST, DEEPEST, WIDEST, LONGEST = 2**31 - 1, 1024, 1 << 16, 1 << 24
"""No number of a model is larger, no model has more layers, no head more features, no context more tokens: what is
reckoned from a config, before there is any tensor to hold it against, stays small."""


def _whose(config: Config) -> str:
    return f"the config of this '{config.get('model_type')}' model"


def need(config: Config, name: str, kind: type | tuple[type, ...] = int, most: int = LARGEST) -> Any:
    """The value of a field that has no safe default: a positive number of at most `most`, whole unless `kind` says
    otherwise."""
    value = config.get(name)
    if value is None:
        raise TpvcError(f"{_whose(config)} lacks the field '{name}'; add it to config.json")
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= most:
        raise TpvcError(f"{_whose(config)} has {name} = {short(value)}; expected a positive number of at most {most}")
    return value


def optional(config: Config, name: str, default: Any) -> Any:
    """The value of a field, `default` where it is absent (not where it is null)."""
    return config.get(name, default)


def size(config: Config, name: str, otherwise: int | None = None) -> int | None:
    """A positive whole number that may be absent or null: then `otherwise`."""
    return otherwise if config.get(name) is None else need(config, name)


def cap(config: Config, name: str, default: float | None) -> float | None:
    """A positive soft cap, or None where it is null."""
    value = optional(config, name, default)
    if value is not None and (
        not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= LARGEST
    ):
        raise TpvcError(f"{_whose(config)} has {name} = {short(value)}; expected a positive number or null")
    return value


def flag(config: Config, name: str, default: bool) -> bool:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise TpvcError(f"{_whose(config)} has {name} = {short(value)}; expected true or false")
    return value


def number(config: Config, name: str, default: float) -> float:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= LARGEST:
        raise TpvcError(f"{_whose(config)} has {name} = {short(value)}; expected a number, zero or more")
    return float(value)


def refuse(config: Config, **neutral: Any) -> None:
    """Raise unless every named field, and every one of NEUTRAL, is absent, null, empty or has its neutral value."""
    for name, harmless in {**NEUTRAL, **neutral}.items():
        value = config.get(name)
        if value is not None and value != harmless and value not in ([], {}):
            raise TpvcError(
                f"{_whose(config)} sets {name} = {short(value)}, which changes what the model computes and is not"
                f" supported (supported: {harmless!r} or absent)"
            )


def activation(config: Config, field: str, default: str | None = None) -> str:
    """The op table's name of the activation that `field` asks for."""
    name = optional(config, field, default)
    if name is None:
        raise TpvcError(f"{_whose(config)} lacks the field '{field}'; add it to config.json")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise TpvcError(f"{_whose(config)} sets {field} = {short(name)}; known activations: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def window(config: Config, default: int | None = None) -> int | None:
    """A sliding window in tokens (the token itself included), or None for full attention."""
    value = optional(config, "sliding_window", default)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST):
        raise TpvcError(
            f"{_whose(config)} has sliding_window = {short(value)}; expected a positive number of tokens or null"
        )
    return value


def layer_windows(config: Config, layers: int, window: int | None, default: list[str]) -> list[int | None]:
    """The window of every layer, from `layer_types` ("full_attention" or "sliding_attention") or from `default`."""
    kinds = config.get("layer_types") or default
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise TpvcError(f"{_whose(config)} has layer_types = {short(kinds)}; expected a list of {layers}, one a layer")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise TpvcError(
                f"{_whose(config)} has a layer of type {short(kind)}; known: full_attention, sliding_attention"
            )
        if kind == "sliding_attention" and window is None:
            raise TpvcError(f"{_whose(config)} has sliding_attention layers but no sliding_window in use; set one")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def token_ids(config: Config, name: str) -> tuple[int, ...]:
    """A token id or a list of them, as a tuple; empty when absent. Negative ids mean none."""
    value = config.get(name)
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if any(not isinstance(i, int) or isinstance(i, bool) or i > LARGEST for i in ids):
        raise TpvcError(f"the config has {name} = {short(value)}; expected a token id or a list of them")
    return tuple(i for i in ids if i >= 0)


def facts(
    config: Config,
    *,
    hidden: str = "hidden_size",
    layers: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
    context: str = "max_position_embeddings",
    kv_heads: int | None = None,
    head_dim: int | None = None,
) -> Facts:
    """Sizes and special tokens. The keyword arguments name the fields; kv_heads and head_dim are values."""
    width, count = need(config, hidden), need(config, heads)
    if head_dim is None:
        if width % count:
            raise TpvcError(f"{_whose(config)} has {width} features for {count} heads; expected a multiple")
        head_dim = width // count
    if head_dim > WIDEST:
        raise TpvcError(f"{_whose(config)} has heads of {head_dim} features; expected at most {WIDEST}")
    kv_heads = count if kv_heads is None else kv_heads
    if count % kv_heads:
        raise TpvcError(f"{_whose(config)} has {count} heads for {kv_heads} key/value heads; expected a multiple")
    return Facts(
        family=config["model_type"],
        vocab_size=need(config, "vocab_size"),
        hidden_size=width,
        layers=need(config, layers, most=DEEPEST),
        heads=count,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=need(config, context, most=LONGEST),
        bos=next(iter(token_ids(config, "bos_token_id")), None),
        eos=token_ids(config, "eos_token_id"),
        pad=next(iter(token_ids(config, "pad_token_id")), None),
    )

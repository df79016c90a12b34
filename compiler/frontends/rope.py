"""Rotary frequencies from a config: the attributes `inv_freq` and `magnitude` of the rope op.

Plain: theta^(-2i/d). `linear` divides every frequency by `factor` (position interpolation). `llama3` (Llama 3.1)
divides long wavelengths by `factor`, keeps short ones and blends between. `yarn` (Peng et al., 2023) blends by the
number of turns over the original context and multiplies cos and sin by an attention factor. All of these are fixed.
`dynamic` and `longrope` depend on the length of the sequence and are refused.

New configs hold one dict `rope_parameters`; older ones hold `rope_theta` and `rope_scaling` side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError, short
from tpvc.compiler.frontends.fields import Config, need

LARGEST = 1e15
"""Of a theta or a factor: far beyond all there are, and its powers are finite."""

KNOWN = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
"""Rope types and the keys that they read besides rope_theta and partial_rotary_factor."""


def attributes(
    config: Config,
    head_dim: int,
    *,
    theta_field: str = "rope_theta",
    partial_field: str = "partial_rotary_factor",
    default_partial: float = 1.0,
    known: Sequence[str] = tuple(KNOWN),
) -> dict[str, Any]:
    """{"inv_freq": float32-exact tuple [rotary_dim / 2], "magnitude": float, only where it is not 1}."""
    settings = parameters(config, theta_field, partial_field, default_partial)
    kind = settings["rope_type"]
    if not isinstance(kind, str) or kind not in known:
        raise TpvcError(
            f"the config of this '{config.get('model_type')}' model asks for rope type {short(kind)}, which is not"
            f" supported; supported: {', '.join(known)}"
        )
    extra = set(settings) - KNOWN[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unexpected = sorted(k for k in extra if settings[k] is not None and k != "original_max_position_embeddings")
    if unexpected:
        raise TpvcError(f"rope type {kind!r} does not know {unexpected}; expected only {sorted(KNOWN[kind])}")
    for name in KNOWN[kind] - {"truncate"}:
        if settings.get(name) is not None:
            _number(settings, name)
    rotary = int(head_dim * _number(settings, "partial_rotary_factor"))
    if rotary < 1 or rotary > head_dim:
        raise TpvcError(f"{rotary} of the {head_dim} features of a head would be rotated; expected 1 to {head_dim}")
    exponent = torch.arange(0, rotary, 2, dtype=torch.float32) / rotary
    plain = 1.0 / (_number(settings, "rope_theta") ** exponent)
    try:
        inv_freq, magnitude = SCALINGS[kind](plain, rotary, settings, config)
    except (ArithmeticError, ValueError):
        magnitude = math.nan
    if not (math.isfinite(magnitude) and inv_freq.isfinite().all()):
        raise TpvcError(f"rope type {kind!r} makes frequencies of {short(settings)} that are not finite; check them")
    values: dict[str, Any] = {"inv_freq": tuple(inv_freq.tolist())}
    return values if magnitude == 1.0 else values | {"magnitude": magnitude}


def parameters(config: Config, theta_field: str, partial_field: str, default_partial: float) -> dict[str, Any]:
    """One dict {rope_type, rope_theta, partial_rotary_factor, ...} from a new or an old config."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new and old and new != old:
        raise TpvcError("the config holds a rope_scaling and different rope_parameters; expected one of the two")
    given = new or old or {}
    if not isinstance(given, Mapping):
        raise TpvcError(f"rope_parameters is {short(given)}; expected a dict with rope_type and rope_theta")
    nested = [key for key, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise TpvcError(f"rope_parameters differ by layer type ({', '.join(nested)}), which is not supported")
    settings = dict(given)
    settings["rope_type"] = given.get("rope_type") or given.get("type") or "default"
    for key, names, default in (
        ("rope_theta", (theta_field, "rope_theta"), 10000.0),
        ("partial_rotary_factor", (partial_field, "partial_rotary_factor"), default_partial),
    ):
        if settings.get(key) is None:
            settings[key] = next((config[n] for n in names if config.get(n) is not None), default)
    return settings


def _number(settings: Mapping[str, Any], name: str) -> float:
    value = settings.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST:
        raise TpvcError(
            f"rope type {short(settings['rope_type'])} has {name} = {short(value)}; expected a positive number in"
            " config.json"
        )
    return value


def _original_length(settings: Mapping[str, Any], config: Config) -> int:
    name = "original_max_position_embeddings"
    if config.get(name):
        return need(config, name)
    return settings.get(name) or need(config, "max_position_embeddings")


def _plain(inv_freq: Tensor, rotary: int, settings: Mapping[str, Any], config: Config) -> tuple[Tensor, float]:
    return inv_freq, 1.0


def _linear(inv_freq: Tensor, rotary: int, settings: Mapping[str, Any], config: Config) -> tuple[Tensor, float]:
    return inv_freq / _number(settings, "factor"), 1.0


def _llama3(inv_freq: Tensor, rotary: int, settings: Mapping[str, Any], config: Config) -> tuple[Tensor, float]:
    factor, low, high = (_number(settings, n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise TpvcError(
            f"rope type 'llama3' has low_freq_factor {low} and high_freq_factor {high}; expected low < high"
        )
    turns = _original_length(settings, config) * inv_freq / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * inv_freq / factor + blend * inv_freq, 1.0


def _yarn(inv_freq: Tensor, rotary: int, settings: Mapping[str, Any], config: Config) -> tuple[Tensor, float]:
    length, theta = _original_length(settings, config), _number(settings, "rope_theta")
    factor = _number(settings, "factor")
    if theta <= 1:
        raise TpvcError(f"rope type 'yarn' has rope_theta = {theta}; expected a number above 1")

    def feature(turns: float) -> float:
        """The (fractional) frequency index that makes `turns` turns over the original context."""
        return rotary * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = feature(settings.get("beta_fast") or 32), feature(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary - 1)
    index = torch.arange(len(inv_freq), dtype=torch.float32)
    interpolate = ((index - first) / ((last - first) or 0.001)).clamp(0, 1)
    inv_freq = inv_freq / factor * interpolate + inv_freq * (1 - interpolate)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = settings.get("mscale"), settings.get("mscale_all_dim")
    if settings.get("attention_factor") is not None:
        return inv_freq, float(settings["attention_factor"])
    if numerator and denominator:
        return inv_freq, magnitude(numerator) / magnitude(denominator)
    return inv_freq, magnitude(1.0)


SCALINGS: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}

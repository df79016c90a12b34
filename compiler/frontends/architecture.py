"""From a config to an architecture: the table of the supported families, by `model_type`."""

from __future__ import annotations

from collections.abc import Callable

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.fields import Config
from tpvc.compiler.frontends.gemma import gemma2, gemma3
from tpvc.compiler.frontends.gpt2 import gpt2
from tpvc.compiler.frontends.gpt_neox import gpt_neox
from tpvc.compiler.frontends.graph import Architecture
from tpvc.compiler.frontends.llama import llama, mistral
from tpvc.compiler.frontends.opt import opt
from tpvc.compiler.frontends.phi3 import phi3
from tpvc.compiler.frontends.qwen import qwen2, qwen3

FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "phi3": phi3,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "opt": opt,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
}


def architecture(config: Config) -> Architecture:
    """The graph of a model from its config.json as a dict; TpvcError for an unknown type or an unsupported field."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise TpvcError(
            f"the config has model_type = {kind!r}; supported: {', '.join(FAMILIES)}"
            if kind
            else "the config has no model_type; expected the config.json of a causal language model"
        )
    return FAMILIES[kind](config)


__all__ = ["FAMILIES", "Architecture", "architecture"]

"""GPTQ checkpoints (AutoGPTQ, GPTQModel): what `quantization_config`, or quantize_config.json beside it, says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpvc.compiler.errors import short
from tpvc.compiler.frontends.packed_weights import Packing, Rule, check, packed
from tpvc.compiler.frontends.patterns import compiled
from tpvc.compiler.gptq_format import VERSIONS

SKIPPED, CHANGED = "-:", "+:"
"""How the keys of `dynamic` begin, regular expressions of names: modules left in float, and those with other fields."""


def packing(given: Mapping[str, Any]) -> Packing:
    """TpvcError for what is not read exactly. `desc_act` is left to the tensors: only they say whether columns were
    reordered. KeyError, TypeError or re.error for nonsense."""
    layout = given.get("checkpoint_format") or given.get("format") or "gptq"
    if given.get("is_marlin_format"):
        layout = "marlin"
    check(layout in VERSIONS, f"has the checkpoint_format {short(layout)}")
    check(given.get("pack_dtype") in (None, "int32"), f"packs into {short(given.get('pack_dtype'))}")
    said = given.get("dynamic") or {}
    tests = compiled(key.removeprefix(SKIPPED).removeprefix(CHANGED) for key in said)
    changes = [None if key.startswith(SKIPPED) else dict(changed) for key, changed in said.items()]
    return Packing(packed(layout, given), tuple(map(Rule, tests, changes)))

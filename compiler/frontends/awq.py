"""AWQ checkpoints (AutoAWQ, llm-compressor's and AutoRound's exports): what `quantization_config`, or quant_config.json
beside it, says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpvc.compiler.errors import short
from tpvc.compiler.frontends.packed_weights import Packing, check, packed

OLD_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}


def packing(given: Mapping[str, Any]) -> Packing:
    """TpvcError for what is not read exactly. Modules that were not converted hold a `weight`, so need no naming."""
    said = {OLD_NAMES.get(key, key): value for key, value in given.items()}
    layout = said.get("version") or said.get("format") or "gemm"
    check(str(layout).lower() == "gemm", f"has AWQ's layout {short(layout)}")
    return Packing(packed("awq", said | {"sym": not said.get("zero_point", True)}))

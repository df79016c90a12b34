"""AutoRound's own checkpoints: its `quantization_config` over the tensors of GPTQ or AWQ.

`packing_format` chooses: "auto_round:auto_awq" is AWQ's; "auto_round:auto_gptq" is GPTQ's version 1; "auto_round" and
its kernels' names, and "auto_round:gptqmodel", store zero points as they are, which is GPTQ's version 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tpvc.compiler.errors import short
from tpvc.compiler.frontends.packed_weights import Packing, Rule, check, packed
from tpvc.compiler.frontends.patterns import compiled

METHODS = ("auto-round", "intel/auto-round")
FORMATS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
    "auto_round": "gptq_v2",
    "auto_round:exllamav2": "gptq_v2",
    "auto_round:tritonv2": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
"""`packing_format` -> layout; one that begins "auto_round:auto_gptq:" or "auto_round:auto_awq:" names a kernel too."""

FLOAT_BITS = 16
"""`bits` from here on: left in float."""


def packing(given: Mapping[str, Any]) -> Packing:
    """TpvcError for what is not read exactly; TypeError or re.error for nonsense."""
    key = "packing_format" if given.get("packing_format") else "backend"  # what older releases wrote alone
    form = given.get(key)
    form = "auto_round:auto_gptq" if form in (None, "", "auto") else form
    layout = FORMATS.get(form) or FORMATS.get(":".join(str(form).split(":")[:2]))
    check(layout is not None, f"has AutoRound's {key} {short(form)}")
    check(given.get("data_type", "int").startswith("int"), f"has weights of type {short(given.get('data_type'))}")
    check((given.get("act_bits") or FLOAT_BITS) >= FLOAT_BITS, f"rounds activations to {given.get('act_bits')} bits")
    check(not given.get("rotation_config"), "rotates what linears read (rotation_config)")
    rules = []
    for name, changed in (given.get("extra_config") or {}).items():
        keep = (changed.get("bits") or 0) >= FLOAT_BITS
        rules.append((name, None if keep else dict(changed)))
    exact = [Rule(re.compile(re.escape(name) + "$"), changed) for name, changed in rules]
    loose = [(f".*(?:{name})", changed) for name, changed in rules if changed is None or changed]
    partly = [Rule(test, changed) for test, (_, changed) in zip(compiled(p for p, _ in loose), loose, strict=True)]
    return Packing(packed(layout, given), (*exact, *partly))

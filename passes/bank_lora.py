"""Put a low-rank update beside the weights: two thin linears next to every adapted one.

Before                                      After
    linear(W, b) -> readers                     linear(W, b) ------------------------ add -> readers
                                                linear(A) -> linear(B) -> scale(s) ---'

The weights are not touched, so they may be integers. The names of A and B are those of PEFT's modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tpvc.compiler.adapters.lora import Lora
from tpvc.compiler.program import Node, Program


@dataclass(frozen=True)
class BankLora:
    """The pass. The parameters it adds are `<linear>.lora_A.weight` [r, in] and `<linear>.lora_B.weight` [out, r]."""

    lora: Lora

    def __call__(self, program: Program) -> Program:
        nodes, params, stands_for = [], dict(program.params), {}
        for node in program.nodes:
            node = replace(node, inputs=tuple(stands_for.get(v, v) for v in node.inputs))
            nodes.append(node)
            update = self.lora.updates.get(node.name)
            if update is not None:
                nodes += _beside(node, update.scale)
                params |= {f"{node.name}.lora_A.weight": update.a, f"{node.name}.lora_B.weight": update.b}
                stands_for[node.name] = nodes[-1].name
        return replace(program, nodes=tuple(nodes), params=params)


def _beside(node: Node, scale: float) -> list[Node]:
    down, up, scaled, whole = (f"{node.name}.{part}" for part in ("lora_A", "lora_B", "lora_scale", "lora"))
    return [
        Node(down, "linear", node.inputs, {"weight": f"{down}.weight"}, {}, node.block),
        Node(up, "linear", (down,), {"weight": f"{up}.weight"}, {}, node.block),
        Node(scaled, "scale", (up,), {}, {"factor": scale}, node.block),
        Node(whole, "add", (node.name, scaled), {}, {}, node.block),
    ]

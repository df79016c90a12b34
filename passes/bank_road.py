"""Put adapters beside the weights: a `rotate` node after every adapted linear, with a bank of vectors.

Before                                      After
    linear -> readers                           linear -> rotate(adapter_ids) -> readers

The weights are not touched, so they may be integers, shared with the embedding, and serve many adapters at once: every
row of a batch names its own, -1 none. Adapters whose group sizes differ pair different outputs; they get a `rotate`
node for each size, one after the other, and a row passes unchanged through those that are not its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tpvc.compiler.adapters.fits import check_fits
from tpvc.compiler.adapters.road import Road
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Node, Program


@dataclass(frozen=True)
class BankRoad:
    """The pass. `roads` get the ids 0, 1, ... in order. TpvcError where a name repeats or an adapter does not fit."""

    roads: tuple[Road, ...]

    def __call__(self, program: Program) -> Program:
        if program.adapters:
            there = ", ".join(a.name for a in program.adapters)
            raise TpvcError(f"the model already carries adapters ({there}); expected one without")
        names = [road.name for road in self.roads]
        if len(set(names)) < len(names):
            raise TpvcError(f"two adapters have one name ({', '.join(names)}); give each its own, as in NAME=DIR")
        for road in self.roads:
            check_fits(road, program)
        nodes, params, stands_for = [], dict(program.params), {}
        for node in program.nodes:
            node = replace(node, inputs=tuple(stands_for.get(v, v) for v in node.inputs))
            nodes.append(node)
            for rotate, bank in self._after(node):
                nodes.append(rotate)
                params |= bank
                stands_for[node.name] = rotate.name
        return replace(program, nodes=tuple(nodes), params=params, adapters=self.roads)

    def _after(self, node: Node) -> list[tuple[Node, dict[str, torch.Tensor]]]:
        """The rotate nodes behind `node`, with their parameters; one for each group size that its adapters have."""
        own = [road.rotations.get(node.name) for road in self.roads]
        made, value = [], node.name
        for group in sorted({r.group for r in own if r is not None}):
            name = f"{node.name}.rotate" + (f".{len(made)}" if made else "")
            members = [i for i, r in enumerate(own) if r is not None and r.group == group]
            rows = tuple(members.index(i) if i in members else -1 for i in range(len(own)))
            cosine, sine = (torch.stack(v) for v in zip(*(own[i].vectors for i in members), strict=True))
            params = {"cosine": f"{name}.cosine", "sine": f"{name}.sine"}
            attrs = {"group": group, "rows": rows}
            rotate = Node(name, "rotate", (value, "adapter_ids"), params, attrs, node.block)
            made.append((rotate, {params["cosine"]: cosine, params["sine"]: sine}))
            value = name
        return made

"""Whether an adapter was made for a model, as far as names and shapes can tell."""

from __future__ import annotations

from tpvc.compiler.adapters.road import Road, check_layout
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Program, linears


def check_fits(road: Road, program: Program) -> None:
    """Refuse an adapter made for another model: a linear that is not there, or has another number of outputs."""
    outputs = {n.name: program.params[n.params["weight"]].shape[0] for n in linears(program.nodes)}
    for name, rotation in road.rotations.items():
        if name not in outputs:
            raise TpvcError(
                f"adapter '{road.name}' is for another model: it adapts '{name}', and this one has linears like"
                f" '{next(iter(outputs), 'none')}'"
            )
        if rotation.features != outputs[name]:
            raise TpvcError(
                f"adapter '{road.name}' is for another model: it has {rotation.features} outputs for '{name}', this"
                f" one has {outputs[name]}"
            )
        check_layout(rotation.variant, rotation.group, rotation.features, f"'{name}'")

"""Float parameters that passes made anew go back to the dtypes of the checkpoint they come from.

Folding a rotation, moving factors between weights and tuning leave float32; a checkpoint is written in its own dtypes,
rounded once.
"""

from __future__ import annotations

import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Lazy, Parameter, Program, grid_of, read


def store_dtypes(made: Program, source: Program) -> Program:
    """`made` with its float parameters in the dtypes in which `source` stores them, rounded when they are read.

    TpvcError, then, for a number that such a dtype cannot hold.
    """

    def lazy(name: str, parameter: Parameter, dtype: torch.dtype) -> Lazy:
        def make() -> torch.Tensor:
            value = read(parameter).to(dtype)
            if not bool(value.isfinite().all()):
                kind = str(dtype).removeprefix("torch.")
                raise TpvcError(
                    f"'{name}' has numbers now that {kind}, its dtype in the checkpoint, does not hold; use a"
                    " checkpoint in bfloat16"
                )
            return value

        return Lazy(tuple(parameter.shape), dtype, make)

    changed = {}
    for name, parameter in made.params.items():
        own = source.params.get(name)
        if own is not None and own is not parameter and grid_of(parameter) is None:
            changed[name] = lazy(name, parameter, own.dtype)
    return made.with_params(changed)

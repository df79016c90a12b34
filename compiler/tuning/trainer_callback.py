"""The penalty in transformers' own Trainer: a callback that uses the same importance file.

    trainer = Trainer(model=model, args=..., callbacks=[PenaltyCallback("model.importance", phi=0.05)], ...)

The model is the one that the file was made of, with weights of its own names (`--train weights`), or PEFT's LoRA around
it with the file's rank, targets and alpha = 2 r (`--train lora`). Training begins at theta*, which the callback puts
into the model, unless it goes on from a checkpoint. Behind the clipping and before every optimiser step, once for
however many batches were accumulated, the gradient of phi R is added to those of the parameters; `penalty` in the logs
is phi R. Sharded parameters (FSDP, DeepSpeed) and float16 with loss scaling are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.tuning import importance_file, lora_space, weight_space
from tpvc.compiler.tuning.importance_file import Importance
from tpvc.compiler.tuning.lora_space import A, B, LoraSpace
from tpvc.compiler.tuning.penalty import Penalty
from tpvc.compiler.tuning.phase import strength


class PenaltyCallback(TrainerCallback):
    """file  what `tpvc importance` wrote; phi  strength of the penalty, at least 0

    TpvcError for a damaged file, and when training begins for a model that it does not fit.
    """

    def __init__(self, file: str | Path, phi: float):
        strength(phi, None)
        self.found, self.phi, self.last = importance_file.read(Path(file)), phi, None
        self.space = self.penalty = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if args.fp16:
            raise TpvcError("the penalty was asked for with float16 loss scaling; use bf16 or float32")
        self.space = _space(model, self.found)
        device = str(next(iter(self.space.params.values())).device)
        anchor = {name: self._anchor(name, p, device) for name, p in self.space.params.items()}
        own = self.found.to(device)
        self.penalty = Penalty(anchor, own.omega, own.coefficients)
        if self.found.anchor and state.global_step == 0:
            with torch.no_grad():
                for name, p in self.space.params.items():
                    p.copy_(self.space.stored(anchor[name], name) if isinstance(self.space, _Weights) else anchor[name])

    def _anchor(self, name: str, p: Tensor, device: str) -> Tensor:
        """theta* of a parameter; where the file has none, which a Fisher file has not, what it is now."""
        if self.found.anchor:
            return self.found.anchor[name].to(device)
        return self.space.value(name).clone() if isinstance(self.space, _Weights) else p.detach().clone()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last = self.phi * self.penalty.add(self.space, self.phi)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        if logs is not None and self.last is not None and "loss" in logs:
            for kept in (logs, state.log_history[-1]):  # the history was written before callbacks are asked
                kept["penalty"] = float(self.last)


@dataclass(frozen=True, eq=False)
class _Weights:
    """A model's own parameters as tuning.space has them: as far as a penalty needs it. GPT-2's Conv1D is stored
    [in, out], Omega and theta* are [out, in]."""

    params: dict[str, Tensor]
    layers: dict[str, int]
    transposed: frozenset[str]

    def stored(self, value: Tensor, name: str) -> Tensor:
        return value.T if name in self.transposed else value

    def value(self, name: str, params: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.stored(self.params[name].detach(), name).float() if params is None else params[name]

    def add(self, name: str, gradient: Tensor) -> None:
        self.params[name].grad.add_(self.stored(gradient, name))


def _space(model: nn.Module, found: Importance) -> _Weights | LoraSpace:
    """The trained parameters of `model` by the names of the file."""
    train = found.about["train"]
    if train == weight_space.KIND:
        known = dict(model.named_parameters())
        names = list(dict.fromkeys([*found.anchor, *found.layers]))
        params = {name: _there(known, name) for name in names}
        modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
        transposed = frozenset(n for n, m in modules.items() if type(m).__name__ == "Conv1D" and n.endswith("weight"))
        space: _Weights | LoraSpace = _Weights(params, found.layers, transposed)
    elif train == lora_space.KIND:
        known, params = dict(model.named_parameters()), {}
        for target in found.layers:
            path = f"base_model.model.{target}"
            params[target + A] = _there(known, f"{path}.lora_A.default.weight")
            params[target + B] = _there(known, f"{path}.lora_B.default.weight")
            scale = model.get_submodule(path).scaling["default"]
            if scale != lora_space.SCALE:
                raise TpvcError(f"the adapter has alpha / r = {scale:g}; expected {lora_space.SCALE:g}, as in the file")
        # of the space only what a penalty needs: parameters, layers and scale
        space = LoraSpace(None, None, params, found.layers, lora_space.SCALE)
    else:
        raise TpvcError(f"the importance is of '{train}'; the Trainer can use that of weights and lora")
    for name, p in space.params.items():
        wanted = found.anchor[name].shape if found.anchor else None
        shape = space.stored(p, name).shape if isinstance(space, _Weights) else p.shape
        if not p.requires_grad or (wanted is not None and shape != wanted):
            raise TpvcError(
                f"'{name}' is {list(shape)} and {'' if p.requires_grad else 'not '}trained, the importance is of"
                f" {list(wanted or shape)}; expected the model that it was made of, and all of its tensors trained"
            )
    return space


def _there(known: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in known:
        raise TpvcError(
            f"the model has no parameter '{name}', which the importance is of; use the model that it was made of,"
            " and for lora an adapter of all its targets"
        )
    return known[name]

"""What `tpvc importance` writes: one safetensors file that fine-tuning runs of one model reuse.

    importance.<protected>   uint8, the shape of the protected tensor: Omega in log_codes, scaled to mean 1
    top.<protected>          float32 []
    anchor.<parameter>       theta*, where the general phase ended: every trained parameter, in the dtype that the model
                             stores it in, adapters in float32. None in a Fisher file, whose anchor is the model itself
    layer_norm, layer_count  float64, int64 [L]: norm of Omega before it was scaled, and elements, of every layer
    layer_coefficient        float32 [L]

Protected tensors are called by the model's parameter names (weights), by linears (the update of lora), and
`<linear>.road_theta` and `.road_alpha`. The metadata holds `tpvc`, a JSON object with what the file was made of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tpvc.compiler import json_text
from tpvc.compiler.errors import TpvcError, short
from tpvc.compiler.frontends.weights import stored_in
from tpvc.compiler.tuning.layer_coefficients import coefficients
from tpvc.compiler.tuning.log_codes import LogCodes, encode
from tpvc.compiler.tuning.space import Space

VERSION = 1
METHODS = ("path", "fisher")


@dataclass(frozen=True, eq=False)
class Importance:
    """omega      {protected name: LogCodes}
    anchor     {parameter: Tensor}; empty: the model as it was
    layers     {protected name: index into `alpha`}
    alpha      float32 [L], coefficients of layers; of a Fisher file all 1
    about      the metadata: version, method, base, train, targets, rank, seed, data, tokens, steps, rate, ...
    """

    omega: dict[str, LogCodes]
    anchor: dict[str, Tensor]
    layers: dict[str, int]
    alpha: Tensor
    about: dict[str, Any]

    def to(self, device: str) -> Importance:
        omega = {n: LogCodes(c.codes.to(device), c.top.to(device)) for n, c in self.omega.items()}
        return Importance(omega, self.anchor, self.layers, self.alpha, self.about)

    @property
    def coefficients(self) -> dict[str, float]:
        """{protected name: coefficient of its layer}."""
        return {name: float(self.alpha[layer]) for name, layer in self.layers.items()}


def write(
    path: Path,
    omega: Mapping[str, Tensor],
    space: Space,
    anchor: Mapping[str, Tensor],
    kind: str | None,
    about: Mapping[str, Any],
) -> None:
    """Write Omega, not yet scaled, of `space` and its anchor; the same input gives the same bytes.

    kind  of layer coefficients; None: all are 1
    """
    blocks = sorted(set(space.layers.values()))
    layers = {name: blocks.index(block) for name, block in space.layers.items()}
    squares = torch.zeros(len(blocks), dtype=torch.float64)
    counts = torch.zeros(len(blocks), dtype=torch.int64)
    total = 0.0
    for name, value in omega.items():
        squares[layers[name]] += value.double().square().sum().cpu()
        counts[layers[name]] += value.numel()
        total += float(value.double().sum())
    mean = total / int(counts.sum())
    norms = squares.sqrt()
    alpha = torch.ones(len(blocks)) if kind is None else coefficients(kind, norms, counts)
    tensors: dict[str, Tensor] = {}
    for name, value in omega.items():
        coded = encode(value / mean if mean > 0 else value)
        tensors |= {f"importance.{name}": coded.codes, f"top.{name}": coded.top}
    tensors |= {f"anchor.{name}": value.detach().cpu().contiguous() for name, value in anchor.items()}
    tensors |= {"layer_norm": norms, "layer_count": counts, "layer_coefficient": alpha}
    told = {**about, "version": VERSION, "layers": layers, "scale": mean}
    try:
        # one entry: safetensors writes several in an order of its own
        save_file(tensors, path, metadata={"tpvc": json.dumps(told, sort_keys=True)})
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)  # safetensors writes for the owner alone
    except (OSError, SafetensorError) as error:
        raise TpvcError(f"cannot write '{path}': {getattr(error, 'strerror', None) or error}") from error


def about(path: Path) -> dict[str, Any] | None:
    """The metadata of an importance file; None for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            told = json_text.parse((file.metadata() or {}).get("tpvc", "null"))
    except (SafetensorError, OSError, ValueError):
        return None
    return told if isinstance(told, dict) and "version" in told else None


def read(path: Path) -> Importance:
    """An importance file. TpvcError where it is missing, damaged, something else, or of a later version."""
    path = Path(path)
    if not path.is_file():
        raise TpvcError(f"there is no file {path}; expected what `tpvc importance` writes")
    told = about(path)
    if told is None:
        raise TpvcError(f"{path} is not an importance file, or damaged; expected what `tpvc importance` writes")
    if told["version"] != VERSION:
        found = short(told["version"])
        raise TpvcError(f"{path} is an importance file of version {found}; expected {VERSION}, make it again")
    try:
        tensors = {name: stored.read() for name, stored in stored_in(path).items()}
        layers, alpha = told["layers"], tensors["layer_coefficient"]
        _check_told(told, alpha)
        omega = {n: LogCodes(tensors[f"importance.{n}"], tensors[f"top.{n}"]) for n in layers}
        _check_codes(omega)
    except (KeyError, ValueError) as error:
        raise TpvcError(f"{path} is damaged ({error}); make it again with `tpvc importance`") from error
    anchor = {n.removeprefix("anchor."): t for n, t in tensors.items() if n.startswith("anchor.")}
    return Importance(omega, anchor, layers, alpha, told)


SAID = {"method": str, "base": str | None, "train": str, "targets": str | list, "rank": int | None, "layers": dict}
"""What the metadata says and others rely on -> its type."""


def _check_told(told: Mapping[str, Any], alpha: Tensor) -> None:
    """ValueError or KeyError for metadata that this module did not write."""
    for key, kind in SAID.items():
        if not isinstance(told[key], kind) or isinstance(told[key], bool):
            raise ValueError(f"its metadata has {key} = {short(told[key])}")
    if alpha.dtype != torch.float32 or alpha.ndim != 1:
        raise ValueError(f"layer_coefficient is {alpha.dtype} {list(alpha.shape)}")
    for name, layer in told["layers"].items():
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < len(alpha):
            raise ValueError(f"'{name:.60}' is in layer {short(layer)} of {len(alpha)}")


def _check_codes(omega: Mapping[str, LogCodes]) -> None:
    for name, coded in omega.items():
        if coded.codes.dtype != torch.uint8 or coded.top.dtype != torch.float32 or coded.top.ndim:
            raise ValueError(f"'{name:.60}' is {coded.codes.dtype} and {coded.top.dtype} {list(coded.top.shape)}")


def check_base(found: Importance, path: Path, base: str | None) -> None:
    """TpvcError where the file is another model's; `base` is the fingerprint of the model at hand."""
    if found.about["base"] != base:
        raise TpvcError(
            f"{path} was made of another model ({str(found.about['base'])[:12]}, this one is {str(base)[:12]});"
            " make one of this model with `tpvc importance`"
        )


def check_space(found: Importance, path: Path, space: Space) -> None:
    """TpvcError where the file has tensors of other names or shapes than `space`, which its metadata describes."""
    starts = {name: tuple(p.shape) for name, p in space.params.items()}
    expected = ({name: tuple(space.value(name).shape) for name in space.layers}, starts)
    omega = {name: tuple(coded.codes.shape) for name, coded in found.omega.items()}
    if (omega, {name: tuple(t.shape) for name, t in found.anchor.items()} or starts) != expected:
        raise TpvcError(
            f"{path} does not have the tensors that '{found.about['train']}' trains in this model; it was changed,"
            " make it again with `tpvc importance`"
        )

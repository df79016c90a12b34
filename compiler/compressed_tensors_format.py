"""How integer weights lie in a compressed-tensors checkpoint: names, layouts (both ways), `quantization_config`.

One module is one QTensor. Under `<module>.` stand (N = out, K = in features, G = scales a row):

    weight_packed      int32 [N, ceil(K * bits / 32)]   codes, dense (format "pack-quantized"); or
    weight             int8 [N, K]                      codes - 2^(bits-1)  (format "int-quantized")
    weight_scale       float [N, G], or [1] per tensor
    weight_shape       int64 [2]                        N, K; with weight_packed only
    weight_zero_point  int8, as weight_scale            zero - 2^(bits-1); or
                       int32 [ceil(N * bits / 32), G]   zero, packed along N
    input_scale        float [1]                        the grid of what the module reads, where it is a static one
    input_zero_point   int8 [1]

Which form is written is a matter of who can read it, checked against compressed-tensors 0.20 in transformers 5.23:

* Packed zero points (strategies "group" and "channel") are what vLLM reads. Transformers makes the empty tensor of the
  unpacked shape and refuses them. It does read plain int8 zero points with strategy "block": blocks of one row by g
  columns are groups of g. The tensors are otherwise the same.
* Integer weights of 8 bits beside activations rounded to int8 are written as bytes ("int-quantized"), as vLLM expects
  W8A8; all others stay packed. Activations that are rounded per token while the model runs leave no tensor. Those on
  one static grid have a zero point, which vLLM's int8 kernels take too; transformers gives `input_scale` the dtype of
  the model, so that it has to be exact in that of the weights' scales.
* A packed embedding does not load in transformers (no `weight` is left to initialise), an int8 one does; and as both
  modules then have a `weight`, a head tied to it is tied as ever, and the matrix is stored once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from tpvc.compiler.packing import pack, unpack, words
from tpvc.compiler.program import Grid, QTensor

METHODS = ("compressed-tensors",)
"""The `quant_method` of these tensors."""

Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> dtype and shape."""


_TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
ACTIVATIONS = {
    "int8": {**_TOKEN, "type": "int"},
    "fp8": {**_TOKEN, "type": "float"},
    "int8-static": {"num_bits": 8, "symmetric": False, "strategy": "tensor", "dynamic": False, "type": "int"},
}
"""How what a module reads is rounded -> its `input_activations`."""
INPUT_PARTS = ("input_scale", "input_zero_point")


def cache_scheme(head_dim: int) -> dict:
    """The `kv_cache_scheme` of keys and values in int8: every head's vector of every token has a scale of its own. What
    is quantised there is [B, heads, T, d], of which the strategy "token" would be a scale for all tokens of a head."""
    return {**_TOKEN, "type": "int", "strategy": "group", "group_size": head_dim}


@dataclass(frozen=True)
class Form:
    """packed: codes in 32-bit words, not one a byte; packed_zeros: zero points too, along the rows; activations: a key
    of `ACTIVATIONS`, or None: in float; inputs: (scale, zero point) of activations on a static grid."""

    packed: bool = True
    packed_zeros: bool = False
    activations: str | None = None
    inputs: tuple[float, int] | None = None

    @property
    def name(self) -> str:
        return "pack-quantized" if self.packed else "int-quantized"


def entries(shape: tuple[int, int], grid: Grid, scale_dtype: torch.dtype, form: Form) -> Entries:
    """The tensors of one module by local name; what `to_tensors` returns has exactly these dtypes and shapes."""
    n, k = shape
    scale = (1,) if grid.group == 0 else (n, k // grid.columns(k))
    out: Entries = {"weight_scale": (scale_dtype, scale)}
    if form.packed:
        out["weight_packed"] = (torch.int32, (n, words(k, grid.bits)))
        out["weight_shape"] = (torch.int64, (2,))
    else:
        out["weight"] = (torch.int8, (n, k))
    if not grid.symmetric and form.packed_zeros and grid.group != 0:
        out["weight_zero_point"] = (torch.int32, (words(n, grid.bits), scale[1]))
    elif not grid.symmetric:
        out["weight_zero_point"] = (torch.int8, scale)
    if form.inputs is not None:
        out |= {"input_scale": (scale_dtype, (1,)), "input_zero_point": (torch.int8, (1,))}
    return out


def to_tensors(q: QTensor, form: Form) -> dict[str, torch.Tensor]:
    """The module's tensors by local name. ValueError where a scale is not exact in `q.scale_dtype`."""
    bits, shape = q.grid.bits, entries(q.shape, q.grid, q.scale_dtype, form)["weight_scale"][1]
    scale = q.scale.to(q.scale_dtype)
    if not torch.equal(scale.float(), q.scale):
        raise ValueError(f"scales are not exact in {q.scale_dtype}")
    out = {"weight_scale": scale.reshape(shape)}
    if form.packed:
        out["weight_packed"] = pack(q.codes, bits)
        out["weight_shape"] = torch.tensor(q.shape)
    else:
        out["weight"] = _signed(q.codes, bits)
    if q.zero is not None and form.packed_zeros and q.grid.group != 0:
        out["weight_zero_point"] = pack(q.zero.T, bits).T.contiguous()
    elif q.zero is not None:
        out["weight_zero_point"] = _signed(q.zero, bits).reshape(shape)
    if form.inputs is not None:
        scale, zero = form.inputs
        out["input_scale"] = torch.tensor([scale], dtype=torch.float32).to(q.scale_dtype)
        out["input_zero_point"] = torch.tensor([zero], dtype=torch.int8)
        if out["input_scale"].item() != scale:
            raise ValueError(f"the scale of what it reads is not exact in {q.scale_dtype}")
    return out


def from_tensors(tensors: Mapping[str, torch.Tensor], grid: Grid) -> QTensor:
    """The inverse of `to_tensors`, for every form."""
    bits, scale = grid.bits, tensors["weight_scale"]
    if "weight_packed" in tensors:
        codes = unpack(tensors["weight_packed"], bits, int(tensors["weight_shape"][1]))
    else:
        codes = _unsigned(tensors["weight"], bits)
    scale_shape = (1, 1) if grid.group == 0 else (codes.shape[0], scale.numel() // codes.shape[0])
    zero = None
    if not grid.symmetric:
        zero = tensors["weight_zero_point"]
        if zero.dtype == torch.int32:
            zero = unpack(zero.T.contiguous(), bits, codes.shape[0]).T.contiguous()
        else:
            zero = _unsigned(zero, bits)
        zero = zero.reshape(scale_shape)
    return QTensor(codes, scale.float().reshape(scale_shape), zero, grid, scale.dtype)


def _signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return (codes - 2 ** (bits - 1)).view(torch.int8)


def _unsigned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return codes.view(torch.uint8) + 2 ** (bits - 1)


def quantization_config(
    modules: Mapping[str, tuple[Grid, int, Form]],
    ignore: Iterable[str],
    conv: Collection[str] = (),
    cache: dict | None = None,
) -> dict:
    """The `quantization_config` of config.json for integer modules {name: (grid, in features, form)}.

    The largest group that is packed or rounds activations has the target "Linear" and stands last, after the groups
    that name their modules (for compressed-tensors looks at them in order, and warns); `ignore` are the linears left in
    float; `cache` is a `cache_scheme`, None where keys and values stay in float.
    Modules in `conv` are no Linear there (GPT-2's Conv1D). The library would pass over them, and the model run with
    random weights; a key that it does not allow makes it refuse the checkpoint.
    """
    groups: dict[tuple, list[str]] = {}
    for name, (grid, columns, form) in modules.items():
        key = form.name, name in conv, grid, _weights(grid, columns, form), form.activations
        groups.setdefault(key, []).append(name)
    plain = [key for key in groups if not key[1] and (key[0] == "pack-quantized" or key[4])]  # no embedding among them
    widest = max(plain, key=lambda key: len(groups[key]), default=None)
    config_groups = {}
    for i, (key, names) in enumerate(sorted(groups.items(), key=lambda item: item[0] == widest)):
        form, is_conv, _, weights, activations = key
        config_groups[f"group_{i}"] = {
            "targets": ["Linear"] if key == widest else names,
            "format": form,
            "weights": {k: list(v) if isinstance(v, tuple) else v for k, v in weights},
            "input_activations": dict(ACTIVATIONS[activations]) if activations else None,
            "output_activations": None,
            **({"module_type": "Conv1D"} if is_conv else {}),
        }
    forms = {key[0] for key in groups}
    return {
        "quant_method": METHODS[0],
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": cache,
        "ignore": sorted(ignore),
        "config_groups": config_groups,
    }


def _weights(grid: Grid, columns: int, form: Form) -> tuple:
    """`weights` of a config group as sorted, hashable items."""
    args = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "dynamic": False, "observer": "minmax"}
    if grid.group == 0:
        args |= {"strategy": "tensor", "group_size": None}
    elif not grid.symmetric and form.packed and not form.packed_zeros:
        args |= {"strategy": "block", "group_size": None, "block_structure": (1, grid.columns(columns))}
    elif grid.group == -1:
        args |= {"strategy": "channel", "group_size": None}
    else:
        args |= {"strategy": "group", "group_size": grid.group}
    return tuple(sorted(args.items()))

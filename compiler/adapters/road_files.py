"""RoAd adapters as PEFT's directories: adapter_config.json and adapter_model.safetensors (peft 0.18 and later, ROAD).

Two float tensors [m] for every adapted linear, m = n/2, n or 2n outputs for road_1, road_2 and road_4; the path is that
of the module in transformers' causal language model, which is also the name of our node:

    base_model.model.model.layers.0.self_attn.q_proj.road_theta        base_model.model.<path>.road_alpha

One variant and one group size hold for the whole directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpvc.compiler.adapters import peft_directory
from tpvc.compiler.adapters.fits import check_fits
from tpvc.compiler.adapters.peft_directory import CONFIG, ROOT, WEIGHTS
from tpvc.compiler.adapters.road import STORED, Road, Rotation
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.weights import FLOATS, Stored, read_json
from tpvc.compiler.output import MANIFEST
from tpvc.compiler.program import Program, QTensor, linears
from tpvc.compiler.program import read as read_parameter
from tpvc.compiler.sha256 import sha256

PARTS = ("road_theta", "road_alpha")
VARIANT, GROUP = "road_1", 64
"""What a config without these fields means."""
WHAT = "a RoAd adapter"


def read(directory: Path, program: Program, name: str) -> Road:
    """The adapter in `directory`, called `name`, for `program`; theta and alpha as float32.

    TpvcError, one sentence, for whatever is not a whole RoAd adapter of finite numbers made for this model.
    """
    directory = Path(directory)
    variant, group = _layout(directory)
    found = _tensors(directory, program)
    if not found:
        raise TpvcError(f"{directory / WEIGHTS} holds no rotation; expected tensors like '{ROOT}<module>.{PARTS[0]}'")
    rotations = {}
    for path, parts in sorted(found.items()):
        theta, alpha = _pair(directory, path, parts, variant)
        rotations[path] = Rotation(variant, group, theta, alpha)
    origin = {
        "directory": peft_directory.named(directory),
        "sha256": sha256(directory / WEIGHTS),
        "variant": variant,
        "group": group,
    }
    order = [n.name for n in linears(program.nodes)]
    known = {n: rotations.pop(n) for n in order if n in rotations}
    road = Road(name, {**known, **rotations}, origin)
    check_fits(road, program)
    return road


def _layout(directory: Path) -> tuple[str, int]:
    """Variant and group size from adapter_config.json."""
    path, config = directory / CONFIG, peft_directory.read_config(directory, "ROAD", WHAT)
    variant, group = config.get("variant", VARIANT), config.get("group_size", GROUP)
    if not isinstance(variant, str) or variant not in STORED:
        meant = f"road_{variant}" if f"road_{variant}" in STORED else VARIANT
        raise TpvcError(f"{path} has variant = {variant!r}; expected one of {', '.join(STORED)}, perhaps '{meant}'")
    if not isinstance(group, int) or isinstance(group, bool) or group < 2 or group % 2:
        raise TpvcError(f"{path} has group_size = {group!r}; expected an even number, at least 2")
    return variant, group


def _tensors(directory: Path, program: Program) -> dict[str, dict[str, Stored]]:
    """{name of a linear: {"road_theta": ..., "road_alpha": ...}}; every tensor is used or refused."""
    path = directory / WEIGHTS
    names = [n.name for n in linears(program.nodes)]
    root = names[0].split(".")[0]
    whole = {f"{n.name}.{role}": param for n in program.nodes for role, param in n.params.items()}
    found: dict[str, dict[str, Stored]] = {}
    for key, stored in peft_directory.open_tensors(path, WHAT).items():
        module, _, part = key.removeprefix(ROOT).rpartition(".")
        if part in PARTS:
            home = found.setdefault(_known(module, names, root), {})
            if part in home:
                raise TpvcError(f"{path} holds both '{home[part].name}' and '{key}'; expected one of them")
            home[part] = stored
            continue
        own = _known(f"{module}.{part}".replace(".base_layer.", "."), whole, root)
        if not _copy(stored, program, whole.get(own)):
            raise TpvcError(
                f"{path} stores '{key}', a weight of its own beside the rotations (modules_to_save), which is not"
                " supported; train the adapter without modules_to_save"
            )
    return found


def _known(name: str, known: Iterable[str], root: str) -> str:
    """`name`, with `root` before it where only that is known: an adapter of the model without its head lacks it."""
    return f"{root}.{name}" if name not in known and f"{root}.{name}" in known else name


def _copy(stored: Stored, program: Program, name: str | None) -> bool:
    """Is this the model's own weight? PEFT stores the head's and the embedding's where the head is adapted."""
    if name is None or program.params[name].shape != stored.shape:
        return False
    own = read_parameter(program.params[name])
    return not isinstance(own, QTensor) and torch.equal(own.float(), stored.read().float())


def _pair(directory: Path, path: str, parts: Mapping[str, Stored], variant: str) -> tuple[Tensor, Tensor]:
    """theta and alpha of one linear, float32 [m]."""
    missing = [p for p in PARTS if p not in parts]
    if missing:
        have = next(iter(parts.values())).name
        raise TpvcError(
            f"{directory / WEIGHTS} holds '{have}' but no '{missing[0]}' beside it; expected both, use an intact copy"
        )
    theta, alpha = (parts[p] for p in PARTS)
    for stored in (theta, alpha):
        if stored.dtype not in FLOATS or len(stored.shape) != 1:
            raise TpvcError(
                f"tensor '{stored.name}' in {stored.path} is {stored.dtype} {list(stored.shape)};"
                f" expected one dimension of {', '.join(FLOATS)}"
            )
    if theta.shape != alpha.shape:
        raise TpvcError(
            f"{directory / WEIGHTS} has {theta.shape[0]} angles and {alpha.shape[0]} scales for '{path}';"
            " expected as many of both, use an intact copy"
        )
    if variant == "road_4" and theta.shape[0] % 2:
        raise TpvcError(
            f"tensor '{theta.name}' in {theta.path} has {theta.shape[0]} numbers; road_4 has two for every output,"
            " check the variant"
        )
    return theta.read().float(), alpha.read().float()


def write(road: Road, directory: Path, program: Program, extra: dict[str, Any]) -> None:
    """Write `road`, an adapter of `program`, as a directory that PEFT loads; the same adapter gives the same bytes.

    tpvc.json holds `extra`, the kind of artefact, and the base: its name and the hashes of its config and weights.
    TpvcError where rotations differ in variant or group, which one directory cannot say, or do not fit the program.
    """
    kinds = sorted({(r.variant, r.group) for r in road.rotations.values()})
    if len(kinds) != 1:
        told = ", ".join(f"{variant} in groups of {group}" for variant, group in kinds) or "none"
        raise TpvcError(f"adapter '{road.name}' has rotations of {told}; expected one variant and one group size")
    check_fits(road, program)
    ((variant, group),) = kinds
    source = program.source
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": None if source is None else source.name,
        "group_size": group,
        "inference_mode": True,
        "init_weights": True,
        "modules_to_save": None,
        "peft_type": "ROAD",
        "revision": None,
        "target_modules": peft_directory.targets(road.rotations, program),
        "task_type": "CAUSAL_LM",
        "variant": variant,
    }
    tensors = {}
    for path, rotation in road.rotations.items():
        for part, value in zip(PARTS, (rotation.theta, rotation.alpha), strict=True):
            tensors[f"{ROOT}{path}.{part}"] = value
    manifest = {**extra, "artefact": "road", "base": base(program)}
    peft_directory.write(directory, config, {WEIGHTS: tensors}, manifest)


def base(program: Program) -> dict[str, Any] | None:
    """Which model an adapter was made for, to look up; names and shapes are what is checked (`check_fits`)."""
    if program.source is None:
        return None
    config = json.dumps(dict(program.source.config), sort_keys=True)
    return {
        "name": program.source.name,
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "files": program.source.files,
    }


def made_for(directory: Path) -> Any:
    """What an adapter that tpvc wrote says of its model: the hashes of its files; None where nothing is said."""
    path = Path(directory) / MANIFEST
    said = read_json(path).get("base") if path.is_file() else None
    return said.get("files") if isinstance(said, dict) else None

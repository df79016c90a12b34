"""New soft prompts from the task prompt vectors of tuned ones (arXiv 2408.01119, section 3), closed over prompts.

    values = start + lambda * vector        vector float32 [n, D], one of

    task_arithmetic   sum_i w_i tau_i, the paper's; not a mean
    ties              Yadav et al., NeurIPS 2023, arXiv 2306.01708: of every tau its largest entries, of these the ones
                      whose sign is the sum's, and of these the mean
    dare_linear       Yu et al., ICML 2024, arXiv 2311.03099: entries of every tau dropped at random and the others
                      divided by the share that is kept, then the sum
    dare_ties         the same, and of the sum only entries whose sign is the sum's; not divided, as in mergekit

Everything is float32. lambda = 0 gives the start, and what is one of the prompts again gives its values, bit for bit:
start + (values - start) would not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.errors import TpvcError

METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


def check_alike(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that cannot be of one model, or differ in length."""
    if not prompts:
        raise TpvcError("no prompts were given; expected at least one")
    first = prompts[0]
    for other in prompts[1:]:
        if other.values.shape != first.values.shape:
            raise TpvcError(
                f"'{first.name}' has {_shape(first)}, '{other.name}' {_shape(other)}; expected prompts of one length"
                " and one model, tune them with the same --virtual-tokens"
            )
    for kind in ("base", "tokenizer"):
        known = [p for p in prompts if getattr(p, kind) is not None]
        for other in known[1:]:
            one, two = getattr(known[0], kind), getattr(other, kind)
            if one != two:
                what = "models" if kind == "base" else "tokenizers"
                raise TpvcError(
                    f"'{known[0].name}' and '{other.name}' were tuned for different {what} ({one[:12]} and {two[:12]});"
                    " expected prompts of one model, combine those"
                )


def check_together(prompts: Sequence[Prompt], start: Tensor | None = None) -> str | None:
    """Refuse prompts whose vectors have nothing to do with each other. Returns a remark where they, or the `start` that
    they are added to, began elsewhere: allowed, as in the paper (Table 1 there).
    """
    check_alike(prompts)
    names = [p.name for p in prompts]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise TpvcError(f"two prompts are called '{twice[0]}'; give each its own name, as in NAME=DIR")
    for prompt in prompts:
        _ = prompt.vector
    if start is not None and start.shape != prompts[0].values.shape:
        raise TpvcError(
            f"the start holds {list(start.shape)} numbers, '{names[0]}' {list(prompts[0].values.shape)}; expected a"
            " start of the prompts' own length and width"
        )
    apart = [f"'{p.name}'" for p in prompts if not torch.equal(p.start, prompts[0].start if start is None else start)]
    if not apart:
        return None
    told = f"{', '.join(apart)} {'was' if len(apart) == 1 else 'were'} tuned from another start than"
    if start is None:
        return f"{told} '{names[0]}', and vectors from different starts are less alike"
    return f"{told} the one that the vectors are added to, by which small models may lose a task; check each of them"


def scale(name: str, prompt: Prompt, factor: float) -> Prompt:
    """start + factor * tau."""
    vector = prompt.vector
    return applied(name, [prompt], prompt.start, vector, factor)


def vector_of(
    method: str,
    prompts: Sequence[Prompt],
    *,
    weights: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    seed: int = 0,
) -> Tensor:
    """The combined vector, float32 [n, D]. weights and densities: one for each prompt, in order; None: all 1."""
    if method not in METHODS:
        raise TpvcError(f"the method is '{method}'; expected one of {', '.join(METHODS)}")
    vectors = [p.vector for p in prompts]
    weights, densities = _ones(weights, prompts), _ones(densities, prompts, "densities")
    wrong = [d for d in densities if not 0 < d <= 1]
    if wrong:
        raise TpvcError(f"the density is {wrong[0]:g}; expected the share of entries to keep, above 0 and at most 1")
    if method == "task_arithmetic":
        return summed(vectors, weights)
    if method == "ties":
        return elected([trimmed(v, d) for v, d in zip(vectors, densities, strict=True)], weights, mean=True)
    generator = torch.Generator().manual_seed(seed)
    kept = [dropped(v, d, generator) for v, d in zip(vectors, densities, strict=True)]
    return summed(kept, weights) if method == "dare_linear" else elected(kept, weights, mean=False)


def applied(name: str, prompts: Sequence[Prompt], start: Tensor, vector: Tensor, scale: float) -> Prompt:
    """The prompt start + scale * vector, whose vector was made of those of `prompts`."""
    if not math.isfinite(scale):
        raise TpvcError(f"lambda is {scale:g}; expected a finite number")
    values = start + scale * vector
    if scale == 0:
        values = start
    for prompt in prompts:
        if scale == 1 and torch.equal(start, prompt.start) and torch.equal(vector, prompt.vector):
            values = prompt.values
    if not bool(values.isfinite().all()):
        raise TpvcError(
            f"{scale:g} times the vectors of {', '.join(p.name for p in prompts)} leaves float32; expected finite"
            " numbers, use less of them"
        )
    base, tokenizer = (
        next((getattr(p, kind) for p in prompts if getattr(p, kind) is not None), None)
        for kind in ("base", "tokenizer")
    )
    return Prompt(name, values.clone(), start.clone(), base, tokenizer)


def summed(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i tau_i."""
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        total = total + weight * vector
    return total


def trimmed(vector: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, 0 elsewhere: that share of all, at least one; of equal ones the first."""
    count = max(1, round(density * vector.numel()))
    kept = vector.flatten().abs().argsort(descending=True, stable=True)[:count]
    mask = torch.zeros(vector.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.view_as(vector), vector, torch.zeros(()))


def dropped(vector: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Every entry kept with probability `density` and divided by it, 0 elsewhere: the same in expectation."""
    kept = torch.rand(vector.shape, generator=generator) < density
    return torch.where(kept, vector / density, torch.zeros(()))


def elected(vectors: Sequence[Tensor], weights: Sequence[float], *, mean: bool) -> Tensor:
    """Sum of the w_i tau_i whose sign is that of their sum over all i, or their mean by |w_i|.

    Where the sum is 0, no sign is elected and the result is 0.
    """
    parts = torch.stack([weight * vector for vector, weight in zip(vectors, weights, strict=True)])
    sign = parts.sum(0).sign()
    agreeing = parts.sign() == sign
    total = (parts * agreeing).sum(0)
    if not mean:
        return total
    shares = torch.tensor(weights).abs().view(-1, 1, 1) * agreeing
    return torch.where(sign != 0, total / shares.sum(0), torch.zeros(()))


def similarity(vectors: Mapping[str, Tensor]) -> tuple[list[list[float]], list[list[float]]]:
    """Cosines of [n, D] tensors with each other: (of all their n D numbers, of their means over the n tokens).

    The first is what the paper's early versions show, the second its last. Taken in float64; self is exactly 1.
    """
    return _cosines({k: v.double().flatten() for k, v in vectors.items()}, "is zero"), _cosines(
        {k: v.double().mean(0) for k, v in vectors.items()}, "has the mean zero over its tokens"
    )


def _cosines(vectors: Mapping[str, Tensor], fault: str) -> list[list[float]]:
    rows = list(vectors.values())
    squares = [float((v * v).sum()) for v in rows]
    for name, square in zip(vectors, squares, strict=True):
        if square == 0:
            raise TpvcError(f"'{name}' {fault} and has no direction; expected a prompt that tuning has moved")
    return [
        [max(-1.0, min(1.0, float((x * y).sum()) / math.sqrt(a * b))) for y, b in zip(rows, squares, strict=True)]
        for x, a in zip(rows, squares, strict=True)
    ]


def _ones(given: Sequence[float] | None, prompts: Sequence[Prompt], what: str = "weights") -> list[float]:
    given = [1.0] * len(prompts) if given is None else [float(v) for v in given]
    if len(given) != len(prompts) or not all(map(math.isfinite, given)):
        told = ", ".join(f"{v:g}" for v in given) or "none"
        raise TpvcError(f"found the {what} {told} for {len(prompts)} prompts; expected one finite number for each")
    return given


def _shape(prompt: Prompt) -> str:
    return f"{prompt.tokens} virtual tokens of {prompt.values.shape[1]} numbers"

"""Soft prompts and task prompt vectors (Belanec et al., ECML PKDD 2025, arXiv 2408.01119): their data.

A soft prompt is n learned vectors that stand before a text where its embeddings do. Its task prompt vector is what
tuning added to the values it started from (section 3 there):

    tau = P - P0            P, P0, tau float32 [n, D]

P and P0 are kept, not tau: P0 + (P - P0) is not P in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tpvc.compiler.errors import TpvcError


@dataclass(frozen=True, eq=False)
class Prompt:
    """A soft prompt of one task.

    values     float32 [n, D]: what stands before the text, D the width of the token embeddings
    start      float32 [n, D]: the values it was tuned from; None where nobody kept them, as in PEFT's own directories
    base       what identifies the model it was made for (`prompt_files.base_print`); None: unknown
    tokenizer  likewise its tokenizer (`prompt_files.tokenizer_print`)
    origin     where it came from, for the manifest: {"directory", "sha256", ...}
    """

    name: str
    values: Tensor
    start: Tensor | None = None
    base: str | None = None
    tokenizer: str | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """n, its virtual tokens."""
        return self.values.shape[0]

    @property
    def vector(self) -> Tensor:
        """tau, float32 [n, D]. TpvcError for a prompt without its start."""
        if self.start is None:
            raise TpvcError(
                f"prompt '{self.name}' does not say which values it started from, so that its task prompt vector is"
                " unknown; name them with tpvc prompt vector --start"
            )
        return self.values - self.start

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"name": self.name, "tokens": self.tokens, **self.origin}

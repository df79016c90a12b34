"""Regular expressions from a checkpoint's config, which choose modules by name: refused where matching could take for
ever. Python's `re` tries every way to match, and `(a+)+$` has 2^n of them for n letters.

The ways are counted as the pattern is read: a repetition has LENGTH of them, as many as a module's name has letters, an
alternative as many as its branches together, and what stands side by side their product. A repetition of something that
can itself match in several ways is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

LENGTH = 32
MOST = 10**7
"""Ways of one pattern, and of all patterns of a config together: some tenths of a second for a name."""
PART = re.compile(
    r"(?P<open>\((?:\?(?::|=|!|<=|<!|>|P<\w+>|i\)))?)"
    r"|(?P<close>\))|(?P<branch>\|)"
    r"|(?P<repeat>(?:[*+?]|\{\d*,?\d*\})[?+]?)"
    r"|(?P<plain>\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[])",
    re.DOTALL,
)
"""One piece of a pattern: groups, a sign of repetition, or a character, an escape or a class."""


@dataclass
class _Group:
    """Ways of the branches that are done, and of the pieces of the one that is read."""

    done: int = 0
    pieces: list[int] = field(default_factory=list)

    @property
    def ways(self) -> int:
        total = 1
        for ways in self.pieces:
            total *= ways
        return self.done + total


def compiled(patterns: Iterable[str]) -> list[re.Pattern[str]]:
    """The patterns of one config. ValueError for one with which they have too many ways to match, or that is none."""
    total, found = 0, []
    for pattern in patterns:
        total += ways(pattern) if len(pattern) <= 1000 else MOST + 1
        if total > MOST:
            raise ValueError(f"the regular expression '{pattern:.60}' has too many ways to match")
        found.append(re.compile(pattern))
    return found


def ways(pattern: str) -> int:
    """In how many ways `pattern` can match, at most; MOST + 1 for a repetition of such, and for what is not known."""
    stack, at = [_Group()], 0
    while at < len(pattern):
        part = PART.match(pattern, at)
        if part is None:
            return MOST + 1
        at = part.end()
        match part.lastgroup:
            case "open" if part[0].endswith("i)"):
                pass
            case "open":
                if part[0] == "(" and pattern[at : at + 1] == "?":  # flags, comments, conditions
                    return MOST + 1
                stack.append(_Group())
            case "close" if len(stack) > 1:
                inner = stack.pop().ways
                stack[-1].pieces.append(inner)
            case "branch":
                stack[-1] = _Group(stack[-1].ways)
            case "repeat" if stack[-1].pieces:
                inner, sign = stack[-1].pieces.pop(), part[0].rstrip("?+") or part[0][0]
                stack[-1].pieces.append(_repeated(inner, sign))
            case "plain":
                stack[-1].pieces.append(1)
        if stack[-1].ways > MOST or len(stack) > 50:
            return MOST + 1
    return stack[0].ways if len(stack) == 1 else MOST + 1


def _repeated(inner: int, sign: str) -> int:
    if sign in ("?", ""):
        return inner + 1
    low, comma, _ = sign.strip("{}").partition(",")
    if sign[0] == "{" and low and not comma:  # exactly so often
        return inner ** min(int(low), 100) * max(int(low), 1)
    return LENGTH + int(low or 0) if inner == 1 and sign[0] == "{" else LENGTH if inner == 1 else MOST + 1

"""Regular expressions of a config: those that people write are taken, those that match for ever are not."""

import re
import time

import pytest

from tpvc.compiler.frontends.patterns import MOST, compiled, ways

NAMES = [f"model.layers.{i}.{part}" for i in range(4) for part in ("self_attn.q_proj", "mlp.gate_up_proj")]


@pytest.mark.parametrize(
    "pattern",
    [
        ".*lm_head",
        r".*self_attn\..*",
        r"model\.layers\.(0|1[0-9])\..*(gate|up|down)_proj$",
        r".*\.(?:18|19)\..*(gate|up|down).*",
        r"(?!.*mlp).*",
        r"model\.layers\.\d{1,2}\.mlp",
        "[](+)*]?model",
        "(?i)MODEL.*",
        "(?:model\\.)?layers",
    ],
)
def test_matches_as_ever(pattern):
    (made,) = compiled([pattern])
    assert [bool(made.match(n)) for n in NAMES] == [bool(re.match(pattern, n)) for n in NAMES]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(.*)*!",
        "(.*.*)*!",
        "(.|.)*$",
        "(?:(?:.+)?)+!",
        "(.?){50}!",
        ".*.*.*.*.*.*!",
        "(.|.)(.|.)" * 30,
        ".?" * 40 + "." * 20,
        "(?x)(a+) +",
        "(?#()(a+)+",
        "(?(1)a|b)",
        "(?:(?:(?:){60000}){60000}){60000}",
        "a" * 2000,
    ],
)
def test_refused(pattern):
    begin = time.monotonic()
    with pytest.raises((ValueError, re.error)):
        compiled([pattern])
    assert time.monotonic() - begin < 1


def test_many_patterns_are_counted_together():
    one = ".*.*.*x"
    assert ways(one) == 32**3
    compiled([one] * (MOST // 32**3))
    with pytest.raises(ValueError, match="ways"):
        compiled([one] * (MOST // 32**3 + 1))

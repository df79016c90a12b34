"""Numbers that a person can read."""

import math

from tpvc.compiler import units


def test_sizes():
    expected = {0: "0 B", 12: "12 B", 1_500: "1.5 kB", 12_345_678: "12.3 MB", 8.03e9: "8.03 GB", 3.2e12: "3200.00 GB"}
    assert {n: units.size(n) for n in expected} == expected


def test_seconds():
    expected = {0: "0.0 s", 0.0123: "12 ms", 0.9999: "1.0 s", 3.21: "3.2 s", 59.99: "1 min 00 s"}
    expected |= {245: "4 min 05 s", 754: "12 min 34 s", 3599.7: "1 h 00 min", 7322: "2 h 02 min"}
    assert {s: units.seconds(s) for s in expected} == expected


def test_perplexities():
    assert units.perplexity(0.0) == 1.0 and units.perplexity(700.0) == math.exp(700)
    assert units.perplexity(1e6) == math.inf

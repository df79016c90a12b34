"""What Python's JSON reader lets pass and ours does not."""

import pytest

from tpvc.compiler.json_text import DEEPEST, parse


def test_values_are_those_of_the_standard_reader():
    assert parse('{"a": [1, 2.5, null, true, "x"], "b": {"a": {}}}') == {"a": [1, 2.5, None, True, "x"], "b": {"a": {}}}
    assert parse("[" * DEEPEST + "]" * DEEPEST) is not None
    assert parse('{"limit": Infinity}') == {"limit": float("inf")}


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested deeper"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested deeper"),
        ("9" * 5000, "4300 digits"),
        ("{", "Expecting"),
        ("{" + ", ".join(f'"{i}": 0' for i in (*range(200_000), 199_999)) + "}", "'199999' stands twice"),
    ],
)
def test_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)

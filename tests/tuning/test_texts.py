"""Examples or text, by one rule; and which windows of general text are never learned."""

import json

import pytest

from tpvc.compiler import frontends
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.tuning.texts import holds_examples, read_domain, read_general, read_held_out


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    program = frontends.load(tiny_llama)
    return program, frontends.tokenizer(program)


def _lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.parametrize(
    ("name", "text", "examples"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n', True),
        ("b.jsonl", '\n{"text": "a", "label": 1}\n', True),
        ("c.jsonl", '{"text": "a"}\n', False),
        ("d.jsonl", "not json\n", False),
        ("e.csv", "text,label\na,b\n", True),
        ("f.tsv", "text\tlabel\na\tb\n", True),
        ("g.csv", "text,author\na,b\n", False),
        ("h.txt", "completion label", False),
        ("i.jsonl", "", False),
    ],
)
def test_what_holds_examples(tmp_path, name, text, examples):
    (tmp_path / name).write_text(text)
    assert holds_examples(tmp_path / name) is examples


def test_text_is_cut_into_windows_that_are_learned_whole(loaded, tmp_path):
    path = tmp_path / "domain.txt"
    path.write_text("The dog sleeps on, and the fox jumps. " * 60)
    found = read_domain(*loaded, path, None, 16, 0)
    assert {len(e.ids) for e in (*found.training, *found.checking)} == {16}
    assert {e.answer for e in found.training} == {1}
    assert len(found.checking) == (len(found.checking) + len(found.training)) // 10
    assert found.record["files"]["training"]["name"] == "domain.txt"
    assert read_domain(*loaded, path, None, 16, 1).digest != found.digest


def test_examples_are_examples(loaded, tmp_path):
    path = _lines(tmp_path / "d.jsonl", [{"prompt": f"What is {i}?", "completion": " a number"} for i in range(20)])
    found = read_domain(*loaded, path, None, 32, 0)
    assert found.record["kind"] == "examples" and len(found.training) == 18 and len(found.checking) == 2
    assert all(1 < e.answer < len(e.ids) for e in found.training)


def test_two_of_a_kind(loaded, tmp_path):
    path = _lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}] * 12)
    (tmp_path / "d.txt").write_text("the fox " * 100)
    for first, second in ((path, tmp_path / "d.txt"), (tmp_path / "d.txt", path)):
        with pytest.raises(TpvcError, match=r"d.jsonl holds examples and .*d.txt text, or nothing; expected two of a"):
            read_domain(*loaded, first, second, 32, 0)


def test_a_table_says_which_column_is_learned(loaded, tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("question,answer\n" + "what does the fox do,it jumps over the dog\n" * 200)
    with pytest.raises(TpvcError, match="no column completion, label, text or messages, and 'question' would be"):
        read_domain(*loaded, path, None, 16, 0)
    path.write_text("text,author\n" + "the fox jumps over the dog,nobody\n" * 200)
    assert read_domain(*loaded, path, None, 16, 0).record["kind"] == "text"


def test_a_file_that_is_not_there(loaded, tmp_path):
    for name in ("d.jsonl", "d.txt", "."):
        with pytest.raises(TpvcError, match="there is no file"):
            read_domain(*loaded, tmp_path / name, None, 16, 0)


def test_too_short(loaded, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("the fox")
    with pytest.raises(TpvcError, match="expected at least 64, a window"):
        read_domain(*loaded, path, None, 64, 0)
    path.write_text("the fox jumps " * 40)
    with pytest.raises(TpvcError, match="--validation file"):
        read_domain(*loaded, path, None, 32, 0)
    with pytest.raises(TpvcError, match="use a longer text"):
        read_general(*loaded, str(path), 100, 32, 0)
    with pytest.raises(TpvcError, match="expected at least 10"):
        read_general(*loaded, str(path), 9, 32, 0)


def test_every_tenth_window_of_general_text_is_kept_whatever_the_seed(loaded, tmp_path):
    path = tmp_path / "general.txt"
    path.write_text(" ".join(f"Number {i} is written with digits." for i in range(200)))
    found = read_general(*loaded, str(path), 35, 16, 0)
    assert len(found.training) == 32 and len(found.checking) == 3
    assert not {e.ids for e in found.checking} & {e.ids for e in found.training}
    assert [e.ids for e in read_general(*loaded, str(path), 35, 16, 9).checking] == [e.ids for e in found.checking]


def test_the_text_for_measuring(loaded):
    found = read_held_out(loaded[1], 64)
    assert len(found) > 5 and {len(e.ids) for e in found} == {64}

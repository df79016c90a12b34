"""Published sets are taken apart as they were put together, and what is not one of them is refused with its place."""

import json

import pytest

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.harness import data


def test_choices_are_the_texts_as_they_stood(task_data):
    """Spaces at their ends belong to them, as does what only looks like the next choice."""
    assert data.read("choices", task_data / "ARC-Easy" / "test.json") == [
        {"question": "How many legs has a spider?", "choices": ["two", "eight legs.", "none, it swims"], "label": 1},
        {
            "question": "What do bees make?\nThink of breakfast",
            "choices": ["honey ", "an Answer2 of wax", "milk"],
            "label": 0,
        },
        {"question": "Rivers run to", "choices": ["the sea", "  the moon", "nowhere"], "label": 0},
    ]


def test_solutions_stand_in_lines_of_their_own(task_data):
    rows = data.read("choices", task_data / "piqa_test.json")
    assert [row["choices"] for row in rows] == [
        ["two", "eight legs."],
        ["honey ", "an Answer2 of wax"],
        ["the sea", "  the moon"],
    ]


def test_blanks(task_data):
    begin = "The cup did not fit the box as the "
    assert data.read("blanks", task_data / "winogrande" / "test.json") == [
        {"contexts": [begin + "cup", begin + "box"], "ending": "was too big.", "label": 0}
    ]


def test_true_or_false(task_data):
    assert data.read("true_false", task_data / "boolq" / "test.json") == [
        {"question": "is water wet?", "label": 1},
        {"question": "do fish fly?", "label": 0},
    ]


def test_tables(task_data):
    assert data.read("sentences", task_data / "SST-2" / "dev.tsv") == [
        {"sentence": "a joy ", "label": 1},
        {"sentence": '\'"so-so" at best', "label": 0},
    ]
    assert data.read("pairs", task_data / "glue" / "RTE" / "dev.tsv") == [
        {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}
    ]


def test_a_file_is_found_in_the_folder_or_in_one_it_holds(task_data):
    assert data.find(task_data, ["nowhere.tsv", "SST-2/dev.tsv"]) == task_data / "SST-2" / "dev.tsv"
    assert data.find(task_data, ["RTE/dev.tsv"]) == task_data / "glue" / "RTE" / "dev.tsv"
    with pytest.raises(TpvcError, match=r"holds no a\.json or b\.json"):
        data.find(task_data, ["a.json", "b.json"])


def told(choices, answer):
    ask = f"Please choose the correct answer to the question: Why?\n\n{choices}"
    return json.dumps([{"instruction": ask, "answer": answer}])


@pytest.mark.parametrize(
    "kind, text, reason",
    [
        ("choices", "[", "is not JSON"),
        ("choices", "{}", "holds a dict; expected a list"),
        ("choices", "[]", "holds no question"),
        ("choices", "[3]", "question 1, is 3; expected an object with texts"),
        ("choices", json.dumps([{"instruction": "Why?", "answer": "answer1"}]), "question 1, is"),
        ("choices", told("Answer1: a Answer format: answer1/answer2", "answer1"), "its choices"),
        ("choices", told("Answer1: a Answer format: answer1", "answer2"), "is one of them"),
        ("blanks", told("Answer1: a Answer format: answer1", "answer1"), "blank"),
        ("true_false", told("Answer format: true/false", "true"), "by true or false"),
        ("sums", '{"question": "?", "answer": "1"}\n{"question": "?"}', "line 2, is"),
        ("sums", '{"question": "?", "answer": "1"}\nnull', "line 2, is None"),
        ("sentences", "good\tyes", "line 1, is"),
        ("pairs", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral", "line 2, is"),
    ],
)
def test_what_is_no_question_is_refused(tmp_path, kind, text, reason):
    path = tmp_path / "set"
    path.write_text(text)
    with pytest.raises(TpvcError) as error:
        data.read(kind, path)
    assert str(path) in str(error.value) and reason in str(error.value)

"""Examples from files, and their tokens."""

import json

import pytest

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.tuning.examples import Encoded, Example, encode_examples, read_examples
from tpvc.compiler.windows import encode

TEMPLATE = "Review: {text}\nSentiment:"
LABELS = {"0": "negative", "1": "positive"}


@pytest.fixture
def file(tmp_path):
    """file("a.csv", text or bytes) or file("a.jsonl", [records]) -> its path."""

    def write(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def refusal(file):
    """The sentence with which a file is refused."""

    def call(name, content, **options):
        path = file(name, content)
        with pytest.raises(TpvcError) as error:
            read_examples(path, **options)
        sentence = str(error.value)
        assert "\n" not in sentence.strip() and sentence.startswith(str(path))
        return sentence.removeprefix(str(path))

    return call


def test_prompt_and_completion_are_taken_as_they_stand(file):
    path = file("a.jsonl", [{"prompt": "2+2=", "completion": "4", "note": None}, {"prompt": "", "completion": " x\n"}])
    assert read_examples(path) == [Example("2+2=", "4"), Example("", " x\n")]


def test_text_and_label_without_a_template(file):
    records = [{"text": "good", "label": "yes"}, {"text": "bad", "label": 0}, {"text": "odd", "label": True}]
    assert read_examples(file("a.jsonl", records)) == [
        Example("good\n", " yes"),
        Example("bad\n", " 0"),
        Example("odd\n", " true"),
    ]


def test_labels_become_words(file):
    records = [{"text": "good", "label": 1}, {"text": "bad", "label": "0"}]
    path = file("a.jsonl", records)
    assert read_examples(path, template=TEMPLATE, labels=LABELS) == [
        Example("Review: good\nSentiment:", " positive"),
        Example("Review: bad\nSentiment:", " negative"),
    ]


def test_a_template_may_name_any_field_and_goes_before_the_prompt(file):
    path = file("a.jsonl", [{"a b": "x", "n": 3, "prompt": "unused", "completion": "c"}])
    assert read_examples(path, template="{a b} {n} {n}") == [Example("x 3 3", "c")]


@pytest.mark.parametrize("text", ["{label}", "{text.__class__}", "{0}", "{text!r:>30}", "\\g<0> \\1", "{}", "{{text}}"])
def test_what_stands_in_a_field_is_never_interpreted(file, text):
    path = file("a.jsonl", [{"text": text, "label": "secret"}])
    assert read_examples(path, template="<{text}>") == [Example(f"<{text}>", " secret")]


def test_csv_with_mark_quotes_and_lines_inside_a_cell(file):
    text = '\ufefftext,label\r\n"one, ""two""\nthree",1\r\n\r\n"\ttab",0\r\n'
    assert read_examples(file("a.csv", text), labels=LABELS) == [
        Example('one, "two"\nthree\n', " positive"),
        Example("\ttab\n", " negative"),
    ]


def test_tsv_with_renamed_columns(file):
    path = file("dev.TSV", "text\tsentence\tclass\nid, 1\tso good\t1\n")
    columns = {"text": "sentence", "label": "class"}
    assert read_examples(path, columns=columns, labels=LABELS) == [Example("so good\n", " positive")]


def test_jsonl_with_mark_empty_lines_and_a_line_separator(file):
    path = file("a.jsonl", '\ufeff\n{"prompt": "a\u2028b", "completion": "c"}\r\n\n')
    assert read_examples(path) == [Example("a\u2028b", "c")]


def test_one_column_may_be_two_fields(file):
    path = file("a.jsonl", [{"x": "hm", "completion": "c"}])
    assert read_examples(path, columns={"text": "x", "prompt": "x"}) == [Example("hm", "c")]


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    "name, content, options, parts",
    [
        ("a.jsonl", GOOD + "\n{'prompt'}\n", {}, [", line 3, is not JSON"]),
        ("a.jsonl", GOOD + "[" * 100000, {}, [", line 2, is not JSON"]),
        ("a.jsonl", GOOD + "[1]\n", {}, [", line 2, holds a list; expected an object with 'prompt'"]),
        ("a.jsonl", GOOD.encode() + b"\xff\n", {}, ["not UTF-8 in line 2"]),
        ("a.csv", b"text,label\na,1\n\xe9,1\n", {}, ["not UTF-8 in line 3"]),
        (
            "a.jsonl",
            [{"text": "a", "class": 1}],
            {},
            [", line 1, has no column 'label' or 'completion', it has 'text'"],
        ),
        ("a.jsonl", [{"prompt": "a"}], {}, [", line 1, has no column 'completion'"]),
        ("a.jsonl", [{"label": "a"}], {}, ["has no column 'prompt' or 'text', it has 'label'"]),
        ("a.jsonl", [{}], {}, ["it has none"]),
        ("a.csv", "sentence,label\na,1\n", {}, [", row 1, has no column 'prompt' or 'text'", "'sentence', 'label'"]),
        ("a.csv", "text,label\na,1\n", {"columns": {"label": "class"}}, ["row 1, has no column 'class'"]),
        ("a.csv", "text,label\na,1\n", {"template": "{title}"}, ["row 1, has no field 'title' for the template"]),
        ("a.csv", "text,label\na,1\n", {"template": "{text!r}"}, ["no field 'text!r'"]),
        ("a.csv", "text,label\na,1\nb,2\n", {"labels": LABELS}, ["row 2, has the label '2'; expected one of 0, 1,"]),
        ("a.csv", "text,label\na,1\nb, \n", {}, ["row 2, has an empty completion"]),
        ("a.csv", "text,label\na,1,2\n", {}, ["row 1, has 3 cells; expected 2"]),
        ("a.csv", "text,label\na\n", {}, ["row 1, has 1 cells; expected 2"]),
        ("a.csv", "text,text\na,1\n", {}, [" has two columns 'text'"]),
        ("a.tsv", 'text\tlabel\na\t1\n"b" c\t1\n', {}, ["row 2, cannot be read", "write jsonl"]),
        ("a.tsv", 'text\tlabel\n"never closed\t1\n', {}, ["row 1, cannot be read"]),
        ("a.jsonl", [{"prompt": "a", "completion": ""}], {}, ["line 1, has an empty completion"]),
        ("a.jsonl", [{"text": "a", "label": 0.5}], {}, ["has the label 0.5; expected text, a whole number"]),
        ("a.jsonl", [{"text": ["a"], "label": 1}], {}, ["""line 1, has ["a"] as 'text'; expected text or a number"""]),
        ("a.jsonl", [{"text": "a", "label": None}], {}, ["has null as 'label'"]),
        ("a.jsonl", GOOD, {"labels": LABELS}, ["has a completion, which words for labels do not apply to"]),
        ("a.jsonl", "\n", {}, [" holds no record"]),
        ("a.csv", "", {}, [" holds no record"]),
        ("a.csv", "text,label\n", {}, [" holds no record"]),
    ],
)
def test_bad_files_are_refused_in_one_sentence(refusal, name, content, options, parts):
    sentence = refusal(name, content, **options)
    assert all(part in sentence for part in parts), sentence


def test_missing_files_other_types_and_templates_without_a_place(tmp_path, file):
    with pytest.raises(TpvcError, match=r"there is no file .*nowhere\.jsonl"):
        read_examples(tmp_path / "nowhere.jsonl")
    with pytest.raises(TpvcError, match=r"a\.xlsx; expected a file of type \.jsonl, \.csv, \.tsv"):
        read_examples(file("a.xlsx", "x"))
    with pytest.raises(TpvcError, match="'Review:' has no place"):
        read_examples(file("a.jsonl", GOOD), template="Review:")


def test_a_completion_goes_on_where_the_prompt_ended():
    """SentencePiece style: a text begins with a space of the tokenizer's own, the middle of one does not."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    merges = [("▁", "a"), ("▁a", "s"), ("▁as", "k"), ("▁", "y"), ("▁y", "e"), ("▁ye", "s")]
    pieces = ["▁ask", "▁yes", *"▁askye", *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert tokenizer(" yes")["input_ids"] != [1]  # by itself it would begin with two spaces
    (found,) = encode_examples(tokenizer, [Example("ask", " yes")], 16, None)
    assert (found.ids, found.answer) == ((0, 1), 1)


def test_prompt_and_completion_are_tokenised_apart(tiny_tokenizer):
    prompt, completion = "The quick bro", "wn fox"
    (made,) = encode_examples(tiny_tokenizer, [Example(prompt, completion)], 64, eos=1)
    before, after = encode(tiny_tokenizer, prompt), encode(tiny_tokenizer, completion)
    assert made == Encoded((*before, *after, 1), len(before))
    assert before + after != encode(tiny_tokenizer, prompt + completion)  # the example tells the two apart
    (made,) = encode_examples(tiny_tokenizer, [Example(prompt, completion)], 64, eos=None)
    assert made.ids == (*before, *after)


def test_the_tokenizers_own_beginning_is_put_before_the_prompt(tiny_tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    begins = deepcopy(tiny_tokenizer)
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 1)]
    )
    assert begins("fox")["input_ids"] == [0, *encode(tiny_tokenizer, "fox"), 1]
    example = Example("The quick brown fox", " jumps")
    (made,) = encode_examples(begins, [example], 64, eos=1)
    prompt, answer = encode(tiny_tokenizer, example.prompt), encode(tiny_tokenizer, example.completion)
    assert made == Encoded((0, *prompt, *answer, 1), 1 + len(prompt))
    (cut,) = encode_examples(begins, [example], len(answer) + 3, eos=1)
    assert cut == Encoded((0, prompt[-1], *answer, 1), 2)
    (empty,) = encode_examples(begins, [Example("", " jumps")], 64, eos=1)
    assert empty == Encoded((0, *answer, 1), 1)


def test_long_examples_lose_the_beginning_of_the_prompt_only(tiny_tokenizer):
    example = Example("one two three four five six", " seven")
    (whole,) = encode_examples(tiny_tokenizer, [example], 64, eos=1)
    tail = len(whole.ids) - whole.answer
    for length in range(tail + 1, len(whole.ids)):
        (cut,) = encode_examples(tiny_tokenizer, [example], length, eos=1)
        assert cut == Encoded(whole.ids[-length:], length - tail)
    with pytest.raises(TpvcError, match=f"the completion of example 2 has {tail} tokens, which do not fit into {tail}"):
        encode_examples(tiny_tokenizer, [Example("a", "b"), example], tail, eos=1)
    with pytest.raises(TpvcError, match="example 1 has an empty prompt"):
        encode_examples(tiny_tokenizer, [Example("", "b")], 64, eos=1)
    assert encode_examples(tiny_tokenizer, [], 64, eos=1) == []

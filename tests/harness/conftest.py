"""Questions of our own in the layouts of the published sets, and what answers them."""

import json

import pytest

FACTS = (
    ("How many legs has a spider?", ("two", "eight legs.", "none, it swims"), 1),
    ("What do bees make?\nThink of breakfast", ("honey ", "an Answer2 of wax", "milk"), 0),
    ("Rivers run to", ("the sea", "  the moon", "nowhere"), 0),
)


def record(question, texts, right, kind="Answer", gap=" ", ask="answer to the question"):
    names = [f"{kind.lower()}{i + 1}" for i in range(len(texts))]
    listed = gap.join(f"{kind}{i + 1}: {text}" for i, text in enumerate(texts))
    form = "/".join(names)
    return {
        "instruction": f"Please choose the correct {ask}: {question}\n\n{listed}\n\nAnswer format: {form}",
        "input": "",
        "output": f"the correct answer is {names[right]}",
        "answer": names[right],
    }


@pytest.fixture(scope="session")
def task_data(tmp_path_factory):
    """One folder with a small set of every kind."""
    folder = tmp_path_factory.mktemp("data")

    def write(name, text):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    choices = [record(*fact) for fact in FACTS]
    for name in ("ARC-Easy", "ARC-Challenge", "openbookqa", "social_i_qa"):
        write(f"{name}/test.json", json.dumps(choices))
    solutions = [record(q, texts[:2], 0, "Solution", "\n\n", "solution to the question") for q, texts, _ in FACTS]
    write("piqa_test.json", json.dumps(solutions))
    blank = "fill in the blank to complete the given sentence"
    sentence = record(
        "The cup did not fit the box as the _ was too big.", ("cup", "box"), 0, "Option", " ", "answer to"
    )
    sentence["instruction"] = sentence["instruction"].replace("answer to:", f"answer to {blank}:")
    write("winogrande/test.json", json.dumps([sentence]))
    ask = "Please answer the following question with true or false, question: {}?\n\nAnswer format: true/false"
    told = [("is water wet", "true"), ("do fish fly", "false")]
    write("boolq/test.json", json.dumps([{"instruction": ask.format(q), "answer": a} for q, a in told]))
    sums = [{"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}.\n#### {2 * i}"} for i in range(1, 8)]
    for split in ("train", "test"):
        write(f"gsm8k/{split}.jsonl", "".join(json.dumps(s) + "\n" for s in sums))
    write("SST-2/dev.tsv", 'sentence\tlabel\na joy \t1\n\'"so-so" at best\t0\n')
    write("glue/RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n")
    return folder

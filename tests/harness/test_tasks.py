"""lm_eval asks a target, and gets what its own model of the same checkpoint says."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.instance import Instance

import tpvc
from tpvc.compiler import frontends, harness
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.harness import TASKS
from tpvc.compiler.program import linears

ASKED = [
    ("The quick brown", " fox jumps"),
    ("The quick brown", " fox sleeps"),
    ("Words are not. ", "digits"),
    ("", "Numbers such as 0"),
    ("<|endoftext|>def area", "(width, height)"),
    ("Rivers run to the sea. " * 60, " and back"),
    ("A", "B"),
    ("A", "C"),
]
TEXTS = ["Rivers run to the sea, and in 144 days the boat comes back. " * 30, "short", "<|endoftext|>begun"]


@pytest.fixture(scope="module")
def models(tiny_llama):
    from lm_eval.models.huggingface import HFLM

    from tpvc.compiler.harness.model import TpvcLM

    theirs = HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32", batch_size=3)
    return TpvcLM(tiny_llama, threads=1), theirs


def instances(kind, arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def a_token(tiny_llama):
    """What float32 rounding may change of one log-likelihood: sums as long as every matrix is wide, and attention over
    the context, twice for the two of a softmax and twice for two implementations; logits of at most 4."""
    program = frontends.load(tiny_llama)
    widths = sum(program.params[n.params["weight"]].shape[1] for n in linears(program.nodes))
    terms = widths + program.blocks * (program.facts.context_length + program.facts.head_dim)
    return 4 * terms * torch.finfo(torch.float32).eps * 4


def test_continuations(models, a_token):
    ours, theirs = (m.loglikelihood(instances("loglikelihood", ASKED), disable_tqdm=True) for m in models)
    for (_, text), (a, best), (b, theirs_best) in zip(ASKED, ours, theirs, strict=True):
        assert abs(a - b) <= len(text) * a_token and best == theirs_best
    assert len({round(a, 3) for a, _ in ours}) == len(ASKED)
    assert models[0].cut == 1


def test_whole_texts(models, a_token):
    given = [(text,) for text in TEXTS]
    ours, theirs = (m.loglikelihood_rolling(instances("loglikelihood_rolling", given)) for m in models)
    for text, a, b in zip(TEXTS, ours, theirs, strict=True):
        assert a < -1 and abs(a - b) <= len(text) * a_token


def test_greedy_writing(models):
    given = [
        (context, {"until": ["and"], "max_gen_toks": 20, "do_sample": False})
        for context in ("The quick", "Numbers", "Rivers " * 100)
    ]
    ours, theirs = (m.generate_until(instances("generate_until", given)) for m in models)
    assert ours == theirs and all(ours)


def test_writing_by_temperature(models):
    """A seed a request, the same in every run; a stop text ends it and is left out."""
    model = models[0]
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0, "top_p": 1.0}
    a, b = model.generate_until(instances("generate_until", [("The quick", options)] * 2))
    assert a != b and len(a) > 3
    assert [a, b] == model.generate_until(instances("generate_until", [("The quick", options)] * 2))
    until = {**options, "until": [a[2:4]]}
    assert model.generate_until(instances("generate_until", [("The quick", until)])) == [a[: a.index(a[2:4])]]


def test_what_it_cannot_do(models):
    """A choice among likely tokens means nothing to greedy decoding, more than one beam does."""
    model = models[0]
    greedy = {"max_gen_toks": 4, "do_sample": False, "top_p": 0.5}
    assert model.generate_until(instances("generate_until", [("The quick", greedy)]))[0]
    with pytest.raises(TpvcError, match="num_beams=4"):
        model.generate_until(instances("generate_until", [("The quick", {**greedy, "num_beams": 4})]))
    for options, told in (({"do_sample": True, "temperature": 1.0, "top_p": 0.5}, "top_p=0.5"), ({}, "256 new tokens")):
        with pytest.raises(TpvcError, match=told):
            model.generate_until(instances("generate_until", [("The quick", options)]))
    with pytest.raises(TpvcError, match="judge 1 to 256"):
        model.loglikelihood(instances("loglikelihood", [("The quick", "#" * 300)]))


def test_every_task_file_on_its_data(task_data, tiny_llama):
    names = [path.stem for path in sorted(TASKS.glob("*.yaml")) if not path.stem.startswith("_")]
    seen = []
    quick = [name for name in names if name != "gsm8k"]  # 256 new tokens do not fit into 256
    found = tpvc.evaluate_tasks(
        tiny_llama, quick, task_data=task_data, threads=1, progress=lambda *step: seen.append(step)
    )
    rows = {(row["task"], row["metric"]): row for row in found["scores"]}
    assert {task for task, _ in rows} == set(quick) and ("piqa", "acc_norm") in rows
    assert rows["arc_easy", "acc"]["examples"] == 3 and rows["winogrande", "acc"]["examples"] == 1
    assert all(0 <= row["value"] <= 1 for row in found["scores"])
    assert found["task_data"] == str(task_data) and found["cut"] == 0
    answers = 4 * 9 + 6 + 2 + 4 + 4 + 2  # four sets of three questions with three choices, PIQA, ..., RTE
    assert seen[0][0] == "load" and seen[-1][:3] == (f"score {tiny_llama.name}", answers, answers)
    with pytest.raises(TpvcError, match="256 new tokens"):
        tpvc.evaluate_tasks(tiny_llama, ["gsm8k"], task_data=task_data, threads=1)


def test_the_same_score_as_lm_evals_own_model(models, task_data, tiny_llama):
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"task_data": str(task_data)})
    theirs = evaluate(models[1], manager.load(["arc_easy", "piqa", "winogrande"]), log_samples=False)["results"]
    ours = tpvc.evaluate_tasks(tiny_llama, ["arc_easy", "piqa", "winogrande"], task_data=task_data, threads=1)
    for row in ours["scores"]:
        assert row["value"] == theirs[row["task"]][f"{row['metric']},none"]
        stderr = theirs[row["task"]][f"{row['metric']}_stderr,none"]
        assert row["stderr"] == stderr or (math.isnan(row["stderr"]) and not isinstance(stderr, float))


SAME = {
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "sst2": "glue/sst2/default.yaml",
    "rte": "glue/rte/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
"""Of our task files, and where lm_eval keeps the task of the same name."""
CALLED = {"{{goal}}": "{{question}}", "{{context}} {{question}}": "{{question}}", "question_stem": "question"}
"""What the same text is called in the set that lm_eval fetches, and in the one that LLM-Adapters publishes."""


@pytest.mark.parametrize("name", SAME)
def test_a_task_asks_and_judges_as_lm_evals(name):
    import lm_eval
    from lm_eval.tasks._yaml_loader import load_yaml

    ours = load_yaml(TASKS / f"{name}.yaml")
    theirs = load_yaml(Path(lm_eval.__file__).parent / "tasks" / SAME[name])
    assert ours["output_type"] == theirs["output_type"]
    assert [m["metric"] for m in ours["metric_list"]] == [m["metric"] for m in theirs["metric_list"]]
    assert ours.get("target_delimiter", " ") == theirs.get("target_delimiter", " ")
    assert ours.get("num_fewshot") == theirs.get("num_fewshot")
    assert ours.get("filter_list") == theirs.get("filter_list")
    if name != "winogrande":  # theirs are functions
        text = theirs["doc_to_text"]
        for theirs_name, our_name in CALLED.items():
            text = text.replace(theirs_name, our_name)
        assert ours["doc_to_text"] == text
    if name in ("sst2", "rte"):
        assert ours["doc_to_choice"] == theirs["doc_to_choice"]
    if name == "gsm8k":
        assert ours["generation_kwargs"]["until"] == theirs["generation_kwargs"]["until"]
        assert ours["metric_list"][0]["regexes_to_ignore"] == theirs["metric_list"][0]["regexes_to_ignore"]


def test_a_task_file_of_the_users(tmp_path, task_data, tiny_llama):
    """It may build on one of ours; here with few new tokens, after two worked examples."""
    path = tmp_path / "sums.yaml"
    path.write_text(
        f"include: {TASKS / 'gsm8k.yaml'}\ntask: sums\nnum_fewshot: 2\n"
        "generation_kwargs: {until: ['Question:'], max_gen_toks: 8, do_sample: false}\n"
    )
    found = tpvc.evaluate_tasks(tiny_llama, [str(path)], task_data=task_data, limit=3, threads=1)
    assert [(row["task"], row["filter"], row["examples"]) for row in found["scores"]] == [
        ("sums", "strict-match", 3),
        ("sums", "flexible-extract", 3),
    ]


def test_a_group_has_a_line_of_its_own(tmp_path, task_data, tiny_llama, monkeypatch):
    monkeypatch.setattr(harness, "TASKS", Path(shutil.copytree(TASKS, tmp_path / "tasks")))
    (tmp_path / "tasks" / "both.yaml").write_text(
        "group: both\ntask: [arc_easy, piqa]\naggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"
    )
    found = tpvc.evaluate_tasks(tiny_llama, ["both", "sst2"], task_data=task_data, threads=1)
    values = {row["task"]: row["value"] for row in found["scores"] if row["metric"] == "acc"}
    assert values["both"] == pytest.approx((values["arc_easy"] + values["piqa"]) / 2) and "sst2" in values


def test_bad_input(tmp_path, task_data, tiny_llama):
    broken = tmp_path / "broken.yaml"
    broken.write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.json}\ntest_split: test\n"
    )
    (tmp_path / "empty").mkdir()
    for tasks, data, told in (
        (["arc_easy"], tmp_path / "nowhere", "there is no folder"),
        (["arc_easy"], tmp_path / "empty", "holds no ARC-Easy/test.json or ARC-Easy_test.json"),
        (["hellaswag"], task_data, "neither a task nor a task file 'hellaswag'; with --task-data there are arc_"),
        ([str(broken)], task_data, "cannot load these tasks"),
        ([str(TASKS / "piqa.yaml")], None, "name its folder with --task-data"),
        ([], task_data, "0 tasks"),
    ):
        with pytest.raises(TpvcError, match=told):
            tpvc.evaluate_tasks(tiny_llama, tasks, task_data=data, threads=1)


def test_nothing_is_fetched(task_data, tiny_llama, monkeypatch):
    """With a folder, not even a name is looked up."""
    import socket

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    found = tpvc.evaluate_tasks(tiny_llama, ["sst2"], task_data=task_data, threads=1)
    assert json.dumps(found["scores"][0]["examples"]) == "2"

"""`tpvc eval --tasks`: questions instead of a text."""

import importlib.util
import json

import pytest

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three questions that are answered by true or false."""
    out = tmp_path_factory.mktemp("data")
    (out / "boolq").mkdir()
    ask = "Please answer the following question with true or false, question: {}?\n\nAnswer format: true/false"
    told = [("is water wet", "true"), ("do fish fly", "false"), ("is ice warm", "false")]
    (out / "boolq" / "test.json").write_text(json.dumps([{"instruction": ask.format(q), "answer": a} for q, a in told]))
    return out


@harness
def test_scores_beside_the_originals(tpvc, ok, artefact, exported, tiny_llama, folder):
    options = ["--tasks", "boolq_no_passage", "--task-data", folder, "--threads", 1]
    found = ok("eval", artefact, *options, "--against", tiny_llama)
    assert found["against"]["target"] == str(tiny_llama)
    assert [row["task"] for row in found["scores"]] == ["boolq_no_passage"]
    assert found["scores"][0]["examples"] == found["against"]["scores"][0]["examples"] == 3
    assert ok("eval", exported, *options)["scores"] == found["scores"]
    table = " ".join(tpvc("eval", artefact, *options, "--limit", 2, "--against", tiny_llama).stdout.split())
    assert f"task metric examples {artefact} ± {tiny_llama} ±" in table
    assert "boolq_no_passage acc 2 " in table


@harness
def test_missing_data_is_one_sentence(refused, artefact, tmp_path):
    told = refused("eval", artefact, "--tasks", "piqa,arc_easy", "--task-data", tmp_path)
    assert told == f"{tmp_path} holds no piqa/test.json or piqa_test.json; expected the data as it was published"


def test_options_that_do_not_go_together(refused, artefact, tmp_path):
    assert "leave --text" in refused("eval", artefact, "--tasks", "piqa", "--windows", 2)
    assert "are for --tasks" in refused("eval", artefact, "--limit", 2)


def test_without_lm_eval(refused, artefact, tmp_path, monkeypatch):
    from tpvc.compiler import harness

    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert "pip install 'tpvc[harness]'" in refused("eval", artefact, "--tasks", "piqa", "--task-data", tmp_path)

"""Recipes: what a file says, and what is refused by name."""

from pathlib import Path

import pytest

from tpvc.compiler.adapters.prompt_recipe import Part, Recipe, check, read
from tpvc.compiler.errors import TpvcError

FULL = """
merge_method: ties
prompts:
  - prompt: ./sst2
    parameters: {weight: 0.5, density: 0.2}
    data: dev/sst2.jsonl
  - prompt: /elsewhere/trec
    name: questions
    data: ../trec.tsv
base_prompt: other
parameters: {lambda: search, seed: 7}
model: smollm2-135m
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "recipe.yaml"

    return write


def test_everything_that_can_be_said(written, tmp_path):
    found = read(written(FULL))
    assert found == Recipe(
        method="ties",
        parts=(
            Part("sst2", tmp_path / "sst2", 0.5, 0.2, tmp_path / "dev/sst2.jsonl"),
            Part("questions", Path("/elsewhere/trec"), 1.0, None, tmp_path / "../trec.tsv"),
        ),
        base=tmp_path / "other",
        scale=None,
        seed=7,
        model="smollm2-135m",
    )
    check(found)


def test_what_is_not_said(written, tmp_path):
    found = read(written("prompts: [{prompt: a}, {prompt: b}]"))
    assert found == Recipe("task_arithmetic", (Part("a", tmp_path / "a"), Part("b", tmp_path / "b")))
    assert found.scale == 1.0 and read(written("prompts: [{prompt: a}]\nparameters: {lambda: -1}")).scale == -1.0


def test_a_model_beside_the_recipe_is_meant_before_a_name(written, tmp_path):
    text = "prompts: [{prompt: a, data: x.csv}]\nparameters: {lambda: search}\nmodel: tiny"
    assert read(written(text)).model == "tiny"
    (tmp_path / "tiny").mkdir()
    assert read(written(text)).model == str(tmp_path / "tiny")


ONE = "prompts: [{prompt: a}]\n"


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "holds None; expected a mapping with merge_method"),
        ("- a", r"holds \['a'\]; expected a mapping"),
        ("a: [", "line 1, is not plain YAML"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, is not plain YAML"),
        ("merge_method: ties", "has no list 'prompts'"),
        ("prompts: []", "has no list 'prompts'"),
        ("prompts: {prompt: a}", "has no list 'prompts'"),
        ("prompts: [a]", "prompt 1 in .* holds 'a'"),
        ("prompts: [{prompt: a}, {data: b}]", "prompt 2 in .* has no 'prompt'"),
        ("prompts: [{prompt: 3}]", "prompt 1 in .* has prompt = 3; expected text"),
        (
            "prompts: [{prompt: a, weight: 1}]",
            "prompt 1 in .* says 'weight', which is not known; expected prompt",
        ),
        ("prompts: [{prompt: a, parameters: {wieght: 1}}]", "parameters of prompt 1 in .* says 'wieght'"),
        ("prompts: [{prompt: a, parameters: {weight: heavy}}]", "prompt 1 in .* has weight = 'heavy'"),
        ("prompts: [{prompt: a, parameters: {weight: true}}]", "has weight = True; expected a number"),
        ("prompts: [{prompt: a, parameters: {density: .nan}}]", "has density = nan; expected a number"),
        (ONE + "models: x", "says 'models', which is not known; expected merge_method, prompts, base_prompt"),
        (ONE + "1: x", "says '1', which is not known"),
        (ONE + "parameters: {scale: 1}", "parameters in .* says 'scale'"),
        (ONE + "parameters: {lambda: find}", "has lambda = 'find'; expected a number or 'search'"),
        (ONE + "parameters: {lambda: .inf}", "has lambda = inf; expected"),
        (ONE + f"parameters: {{lambda: {10**400}}}", "has lambda = 1000.*; expected"),
        (ONE + "parameters: {seed: -1}", "has seed = -1; expected a whole number"),
        (ONE + "parameters: {seed: 0.5}", "has seed = 0.5; expected a whole number"),
        (ONE + "merge_method: [ties]", r"has merge_method = \['ties'\]; expected text"),
        (ONE + "merge_method: ties\n" + ONE, "line 3, is not plain YAML .found 'prompts' twice."),
        ("prompts: [{prompt: a, data: b, data: c}]", "found 'data' twice"),
        ('prompts: [{prompt: "a\\x00b"}]', "has prompt = 'a.x00b'; expected text"),
        ('prompts: [{prompt: "\\ud800"}]', "has prompt = '.ud800'; expected text"),
        (ONE + "model: !!timestamp x", "is not plain YAML"),
        (ONE + "base_prompt: null", "has base_prompt = None; expected text"),
    ],
)
def test_recipes_that_are_not_are_refused(written, text, told):
    with pytest.raises(TpvcError, match=told) as error:
        read(written(text))
    assert "recipe.yaml" in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TpvcError, match=r"none.yaml cannot be read"):
        read(tmp_path / "none.yaml")
    with pytest.raises(TpvcError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"prompts: \xe9")
    with pytest.raises(TpvcError, match=r"latin.yaml cannot be read"):
        read(tmp_path / "latin.yaml")


A, B = Part("a", Path("a")), Part("b", Path("b"), data=Path("b.csv"))
THIN = Part("a", Path("a"), density=0.5)


@pytest.mark.parametrize(
    "recipe, told",
    [
        (Recipe("slerp", (A,)), "the method is 'slerp'; expected one of task_arithmetic, ties"),
        (Recipe("ties", ()), "no prompts were given"),
        (Recipe("task_arithmetic", (A, THIN)), "a density was given for 'a', and a plain sum drops nothing"),
        (Recipe("ties", (A,), model="m"), "a model was given, which only a search of lambda reads"),
        (Recipe("ties", (A, B)), "examples for 'b' were given, which only a search"),
        (Recipe("ties", (B,), scale=None), "lambda is to be searched without a model"),
        (Recipe("ties", (B, A), scale=None, model="m"), "lambda is to be searched without examples for 'a'"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(recipe, told):
    with pytest.raises(TpvcError, match=told):
        check(recipe)


def test_thinned_sums_are_fine():
    check(Recipe("ties", (THIN,)))
    check(Recipe("dare_linear", (THIN, A)))

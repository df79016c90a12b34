"""`tpvc prompt`: arithmetic on prompt directories, each result one that PEFT and the same commands take."""

import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpvc.compiler import charts, prompt_pipeline
from tpvc.compiler.adapters import prompt_files
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.adapters.search_scale import SCALES
from tpvc.compiler.frontends import load, tokenizer
from tpvc.compiler.interpret import in_memory, logits
from tpvc.compiler.sha256 import sha256
from tpvc.passes.bank_prompt import BankPrompt

TOKENS, WIDTH = 4, 64


def drawn(seed, spread=1.0):
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)) * spread


def values(directory):
    return load_file(directory / "adapter_model.safetensors")["prompt_embeddings"]


def start_of(directory):
    return load_file(directory / "start.safetensors")["start"]


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load(tiny_llama)


@pytest.fixture(scope="module")
def prints(tiny_llama, llama):
    return {
        "base": prompt_files.base_print(llama),
        "tokenizer": prompt_files.tokenizer_print(tokenizer(llama)),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory, llama, prints):
    """written(name, values, start, options=...) -> a prompt of tiny_llama as a directory."""

    def write(name, values, start, options=None, **other):
        directory = tmp_path_factory.mktemp("prompts") / name
        extra = {} if options is None else {"options": options}
        prompt_files.write(
            Prompt(name, values, start, **{**prints, **other}), directory, prompt_files.about(llama), extra
        )
        return directory

    return write


@pytest.fixture(scope="module")
def pair(written):
    """Two tasks that were tuned from one start."""
    start = drawn(0, 0.1)
    return written("a", start + drawn(1), start), written("b", start + drawn(2), start)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, tiny_llama):
    """A directory of PEFT's own."""
    import peft
    from transformers import AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("peft") / "theirs"
    torch.manual_seed(5)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).save_pretrained(directory)
    return directory


def test_a_sum_is_a_prompt_with_its_parts_told(ok, llama, pair, tmp_path):
    a, b = pair
    made = ok("prompt", "add", a, f"other={b}", "--scale", 0.5, "--weight", 1, "--weight", -2, "-o", tmp_path / "s")
    start = start_of(a)
    wanted = start + 0.5 * ((values(a) - start) - 2 * (values(b) - start))
    assert torch.equal(values(tmp_path / "s"), wanted) and torch.equal(start_of(tmp_path / "s"), start)
    manifest = made["manifest"]
    assert manifest == json.loads((tmp_path / "s" / "tpvc.json").read_text())
    assert manifest["artefact"] == "prompt" and manifest["base"]["weights"] == prompt_files.base_print(llama)
    digest = sha256(a / "start.safetensors")
    assert manifest["origin"] == {
        "method": "task_arithmetic",
        "of": ["a", "other"],
        "weights": [1, -2],
        "lambda": 0.5,
        "density": None,
        "seed": None,
        "start": {"directory": "a", "file": "start.safetensors", "sha256": digest},
    }
    assert manifest["parts"][1] == {
        "name": "other",
        "tokens": TOKENS,
        "directory": "b",
        "sha256": sha256(b / "adapter_model.safetensors"),
        "start": digest,
        "weight": -2,
    }
    assert manifest["remarks"] == [] and manifest["search"] is None
    assert str(tmp_path) not in (tmp_path / "s" / "tpvc.json").read_text()
    config = json.loads((tmp_path / "s" / "adapter_config.json").read_text())
    assert config == json.loads((a / "adapter_config.json").read_text())


def test_a_sum_is_one_to_go_on_with_in_peft_and_in_tpvc(ok, tiny_llama, pair, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    ok("prompt", "add", *pair, "-o", tmp_path / "sum")
    ok("prompt", "add", tmp_path / "sum", f"minus={pair[1]}", "--weight", 1, "--weight", -1, "-o", tmp_path / "back")
    torch.testing.assert_close(values(tmp_path / "back"), values(pair[0]))
    ids = torch.tensor([[5, 9, 77]])
    with torch.no_grad():
        wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "sum")
        wanted = wrapped.eval()(input_ids=ids).logits[0, -3:]
    banked = BankPrompt((prompt_files.read(tmp_path / "sum", "sum"),))(load(tiny_llama))
    found = logits(banked, torch.cat((torch.arange(384, 384 + TOKENS), ids[0]))[None])[0, -3:]
    # four products of up to 128 terms in each of two layers and the head's, added up in another order
    torch.testing.assert_close(found, wanted, rtol=0, atol=(4 * 2 + 1) * 128 * 2**-24 * float(wanted.abs().max()))


def test_ends_of_lambda_are_bit_for_bit(ok, pair, tmp_path):
    a, _ = pair
    ok("prompt", "add", *pair, "--scale", 0, "-o", tmp_path / "zero")
    assert torch.equal(values(tmp_path / "zero"), start_of(a))
    ok("prompt", "add", a, "-o", tmp_path / "one")
    ok("prompt", "scale", a, 1, "-o", tmp_path / "same")
    for made in ("one", "same"):
        assert (tmp_path / made / "adapter_model.safetensors").read_bytes() == (
            a / "adapter_model.safetensors"
        ).read_bytes()


def test_negate_and_scale(ok, pair, tmp_path):
    a, _ = pair
    start, vector = start_of(a), values(a) - start_of(a)
    made = ok("prompt", "negate", a, "-o", tmp_path / "minus")
    assert torch.equal(values(tmp_path / "minus"), start - vector)
    assert made["manifest"]["origin"]["method"] == "negate" and made["manifest"]["origin"]["lambda"] == -1
    ok("prompt", "scale", a, "-0.5", "-o", tmp_path / "half")
    assert torch.equal(values(tmp_path / "half"), start - 0.5 * vector)
    assert torch.equal(start_of(tmp_path / "half"), start)
    whole = ok("prompt", "add", a, tmp_path / "minus", "-o", tmp_path / "none")
    assert whole["manifest"]["remarks"] == []
    # a vector, its negative's and both sums are rounded once each, at most as large as start and vector together
    most = float(start.abs().max() + vector.abs().max())
    torch.testing.assert_close(values(tmp_path / "none"), start, rtol=0, atol=4 * 2**-24 * most)


def test_a_prompt_is_called_as_its_directory_from_within(ok, pair, tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(f"prompts: [{{prompt: {pair[0]}/.}}]")
    monkeypatch.chdir(pair[0])
    assert ok("prompt", "negate", ".", "-o", tmp_path / "x")["manifest"]["parts"][0]["name"] == "a"
    assert ok("prompt", "similarity", ".", pair[1])["names"] == ["a", "b"]
    assert ok("prompt", "merge", tmp_path / "r.yaml", "-o", tmp_path / "y")["manifest"]["origin"]["of"] == ["a"]


def test_the_same_command_gives_the_same_bytes(ok, pair, tmp_path):
    for out in ("x", "y"):
        ok("prompt", "add", *pair, "--method", "dare", "--density", 0.5, "--seed", 3, "-o", tmp_path / out)
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    made = ok("prompt", "add", *pair, "--method", "dare", "--density", 0.5, "--seed", 4, "-o", tmp_path / "z")
    assert not torch.equal(values(tmp_path / "x"), values(tmp_path / "z"))
    assert made["manifest"]["origin"]["density"] == [0.5, 0.5] and made["manifest"]["origin"]["seed"] == 4


def test_a_recipe_and_the_options_are_one_road(ok, pair, tmp_path):
    a, b = pair
    (tmp_path / "near").symlink_to(a)
    (tmp_path / "r.yaml").write_text(
        f"merge_method: ties\nprompts:\n- prompt: ./near\n  name: a\n  parameters: {{density: 0.3, weight: 2}}\n"
        f"- prompt: {b}\n  parameters: {{density: 0.3}}\nparameters: {{lambda: 0.7}}\n"
    )
    ok("prompt", "merge", tmp_path / "r.yaml", "-o", tmp_path / "merged")
    options = ("--method", "ties", "--density", 0.3, "--weight", 2, "--weight", 1, "--scale", 0.7)
    ok("prompt", "add", f"a={tmp_path / 'near'}", b, *options, "-o", tmp_path / "added")
    assert contents(tmp_path / "merged") == contents(tmp_path / "added")
    vectors = [values(d) - start_of(d) for d in pair]
    assert not torch.equal(values(tmp_path / "added"), start_of(a) + 0.7 * (2 * vectors[0] + vectors[1]))


def test_another_start_is_used_and_said(ok, tpvc, written, pair, tmp_path):
    a, b = pair
    other = written("other", drawn(7), drawn(8))
    made = ok("prompt", "add", a, b, "--start", other, "-o", tmp_path / "s")
    assert torch.equal(start_of(tmp_path / "s"), drawn(8))
    wanted = drawn(8) + ((values(a) - start_of(a)) + (values(b) - start_of(b)))
    assert torch.equal(values(tmp_path / "s"), wanted)
    (remark,) = made["manifest"]["remarks"]
    assert remark.startswith("'a', 'b' were tuned from another start than the one that the vectors are added to")
    assert made["manifest"]["origin"]["start"]["directory"] == "other"
    result = tpvc("prompt", "add", a, b, "--start", other, "-o", tmp_path / "s", "--overwrite")
    assert result.exit_code == 0 and remark in result.stderr and "next    tpvc run MODEL --task" in result.stdout


def test_a_prompt_of_pefts_gets_its_start(ok, refused, written, theirs, tmp_path):
    assert "does not say which values it started from" in refused("prompt", "negate", theirs, "-o", tmp_path / "out")
    save_file({"origin_prompts": drawn(3).bfloat16(), "more": torch.ones(1)}, tmp_path / "start.safetensors")
    made = ok("prompt", "vector", theirs, "--start", tmp_path / "start.safetensors", "-o", tmp_path / "file")
    assert torch.equal(values(tmp_path / "file"), values(theirs))
    assert torch.equal(start_of(tmp_path / "file"), drawn(3).bfloat16().float())
    assert made["manifest"]["origin"]["start"]["file"] == "start.safetensors"
    assert made["manifest"]["base"]["weights"] is None and made["manifest"]["base"]["layers"] == 2

    known, bare = written("known", drawn(4), drawn(5)), written("bare", drawn(6), None)
    made = ok("prompt", "vector", theirs, "--start", known, "-o", tmp_path / "known")
    assert torch.equal(start_of(tmp_path / "known"), drawn(5)), "the start of a prompt that has one"
    assert made["manifest"]["base"]["weights"] == prompt_files.read(known, "x").base, "it is of the same model"
    ok("prompt", "vector", theirs, "--start", bare, "-o", tmp_path / "bare")
    assert torch.equal(start_of(tmp_path / "bare"), drawn(6)), "the values of one that has none"
    ok("prompt", "vector", tmp_path / "file", "--start", bare, "-o", tmp_path / "again")  # ours, with another start
    assert torch.equal(start_of(tmp_path / "again"), drawn(6))
    ok("prompt", "negate", tmp_path / "known", "-o", tmp_path / "minus")


def test_similarity_is_told_drawn_and_exact(ok, tpvc, pair, tmp_path):
    a, b = pair
    ok("prompt", "negate", a, "-o", tmp_path / "minus")
    found = ok("prompt", "similarity", a, b, tmp_path / "minus", "-o", tmp_path / "page.html")
    assert found["names"] == ["a", "b", "minus"] and found["of"] == "vectors" and found["remarks"] == []
    for matrix in (found["flattened"], found["token_mean"]):
        assert [matrix[i][i] for i in range(3)] == [1, 1, 1]
        assert matrix[0][2] == pytest.approx(-1, abs=1e-6)
    x, y = (values(d).double() - start_of(d).double() for d in pair)
    cosine = torch.nn.functional.cosine_similarity
    assert found["flattened"][0][1] == pytest.approx(float(cosine(x.flatten(), y.flatten(), 0)), abs=1e-6)
    assert found["token_mean"][0][1] == pytest.approx(float(cosine(x.mean(0), y.mean(0), 0)), abs=1e-6)
    page = (tmp_path / "page.html").read_text()
    HTMLParser().feed(page)
    assert page.count("<svg") == 2 and f"{found['token_mean'][0][1]:.4f}" in page and "<script" not in page
    prompts = ok("prompt", "similarity", a, b, "--of", "prompts")
    assert prompts["flattened"][0][1] != found["flattened"][0][1]
    shown = tpvc("prompt", "similarity", a, f"[b]={b}", "-o", tmp_path / "page.html", "--overwrite").stdout
    assert "cosine of token means" in shown and f"{found['flattened'][0][1]:.3f}" in shown
    assert shown.count("[b]") == 4 and "\\[b]" not in shown  # a row and a column of both tables


def test_prompts_without_a_start_are_alike_as_prompts_only(ok, refused, theirs, pair):
    found = ok("prompt", "similarity", theirs, pair[0], "--of", "prompts")
    assert found["parts"][0]["start"] is None
    assert "does not say which values it started from" in refused("prompt", "similarity", theirs, pair[0])


def test_a_heat_map_lies_in_its_picture_and_names_are_text():
    picture = charts.heat(
        ["<b>", "a name that is longer than others", "c"], [[1, -0.5, 0], [-0.5, 1, 0.2], [0, 0.2, 1]]
    )
    width, height = (int(v) for v in re.search(r'viewBox="0 0 (\d+) (\d+)"', picture).groups())
    cells = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" fill="([^"]*)"', picture)
    assert len(cells) == 9 and all(float(x) + float(w) <= width for x, _, w, _, _ in cells)
    assert all(float(y) + float(h) <= height for _, y, _, h, _ in cells)
    assert cells[1][4] == "var(--plain)" and cells[0][4] == "var(--accent)"
    assert "&lt;b&gt;" in picture and "<b>" not in picture and ">-0.50</text>" in picture


# ---- the search for lambda


@pytest.fixture(scope="module")
def endless(tmp_path_factory, tiny_llama):
    """tiny_llama without an end of text, so that an answer may be one token."""
    directory = tmp_path_factory.mktemp("models") / "endless"
    shutil.copytree(tiny_llama, directory)
    for file in ("config.json", "generation_config.json"):
        found = json.loads((directory / file).read_text())
        found["eos_token_id"] = None
        (directory / file).write_text(json.dumps(found))
    return directory


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, endless, pair):
    """Two files of examples that the sum answers at lambda 0.5, and neither at 0 nor at 1: the texts with that property
    where the float model is surest."""
    program = load(endless)
    words, start = tokenizer(program), start_of(pair[0])
    total = sum(values(d) - start for d in pair)
    banked = [BankPrompt((Prompt("p", start + scale * total),))(program) for scale in (0, 0.5, 1)]
    held = [in_memory(p) for p in banked]
    sure = []
    for text in map("".join, itertools.product("abcdefghijklmnopqrstuvwxyz", "aeiou ", ":?")):
        ids = words(text, add_special_tokens=False)["input_ids"]
        fed = torch.tensor([[*range(384, 384 + TOKENS), *ids]])
        before, middle, after = (logits(p, fed, weight=w)[0, -1] for p, w in zip(banked, held, strict=True))
        token, answer = int(middle.argmax()), words.decode([int(middle.argmax())])
        margin = min(float(middle.topk(2).values.diff().abs()), *(float(x.max() - x[token]) for x in (before, after)))
        if answer.strip() and words(text + answer, add_special_tokens=False)["input_ids"] == [*ids, token]:
            sure.append((margin, text, answer))
    sure.sort(reverse=True)
    assert sure[7][0] > 0, "otherwise there is nothing to search with"
    folder, files = tmp_path_factory.mktemp("data"), []
    for number in (0, 1):
        files.append(folder / f"{'ab'[number]}.jsonl")
        lines = [json.dumps({"prompt": t, "completion": c}) for _, t, c in sure[number:8:2]]
        files[number].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def test_a_search_reads_validation_examples_and_the_weights_once(ok, tpvc, endless, pair, tasks, tmp_path, monkeypatch):
    read, built = [], []
    reader, builder = prompt_pipeline.encoded, prompt_pipeline.interpret.in_memory
    monkeypatch.setattr(prompt_pipeline, "encoded", lambda *a, **w: read.append(a[2]) or reader(*a, **w))
    monkeypatch.setattr(prompt_pipeline.interpret, "in_memory", lambda *a: built.append(1) or builder(*a))
    search = ("--search", "--model", endless, "--data", tasks[0], "--data", tasks[1])
    made = ok("prompt", "add", *pair, *search, "-o", tmp_path / "s")["manifest"]
    assert read == tasks and built == [1]
    table = made["search"]["table"]
    assert [row["lambda"] for row in table] == SCALES and all(len(row["exact"]) == 2 for row in table)
    assert table[10]["exact"] == [1, 1], "lambda 0.5 answers everything"
    assert table[0]["mean"] < 1 and table[20]["mean"] < 1, "and the ends do not"
    chosen = next(row["lambda"] for row in table if row["mean"] == 1)
    assert made["origin"]["lambda"] == made["search"]["lambda"] == chosen
    assert made["search"]["tasks"] == ["a", "b"] and made["search"]["examples"] == [4, 4]
    assert made["search"]["data"][0] == {"name": "a.jsonl", "sha256": sha256(tasks[0])}
    start = start_of(pair[0])
    vectors = [values(d) - start for d in pair]
    assert torch.equal(values(tmp_path / "s"), start + chosen * (vectors[0] + vectors[1]))

    (tmp_path / "r.yaml").write_text(
        f"prompts:\n- {{prompt: {pair[0]}, data: {tasks[0]}}}\n- {{prompt: {pair[1]}, data: {tasks[1]}}}\n"
        f"parameters: {{lambda: search}}\nmodel: {endless}\n"
    )
    shown = tpvc("prompt", "merge", tmp_path / "r.yaml", "-o", tmp_path / "merged")
    assert shown.exit_code == 0 and "own prompt" in shown.stdout and "100.0 %" in shown.stdout
    assert contents(tmp_path / "merged") == contents(tmp_path / "s")


def test_nothing_right_is_1_and_a_prompt_by_itself_too(ok, tiny_llama, pair, tasks, tmp_path):
    search = ("--search", "--model", tiny_llama, "--data", tasks[0])  # its answers end, as these never do
    made = ok("prompt", "add", *pair, *search, "--data", tasks[1], "-o", tmp_path / "s")["manifest"]
    assert made["origin"]["lambda"] == 1 and {row["mean"] for row in made["search"]["table"]} == {0}
    made = ok("prompt", "add", pair[0], *search, "-o", tmp_path / "one")["manifest"]
    assert made["origin"]["lambda"] == 1 and made["search"] is None
    assert made["remarks"] == ["'a' is one prompt, whose lambda is 1: nothing was searched"]
    assert torch.equal(values(tmp_path / "one"), values(pair[0]))


def test_examples_are_read_as_the_prompt_was_tuned(ok, endless, pair, tasks, written, tmp_path):
    """The same examples as columns of other names, with words for labels."""
    records = [json.loads(line) for line in tasks[0].read_text().splitlines()]
    rows = [{"q": r["prompt"], "x": str(i)} for i, r in enumerate(records)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "template": "{text}",
        "columns": {"text": "q", "label": "x"},
        "labels": {str(i): f"word{i}" for i in range(len(records))},
        "max_length": 32,
    }
    first = written("a", values(pair[0]), start_of(pair[0]), options)
    search = ("--search", "--model", endless, "--data", tmp_path / "rows.jsonl", "--data", tasks[1])
    made = ok("prompt", "add", first, pair[1], *search, "-o", tmp_path / "s")["manifest"]
    assert made["search"]["examples"] == [4, 4]
    assert made["search"]["table"][10]["exact"] == [0, 1]
    right = {**options, "labels": {str(i): r["completion"].removeprefix(" ") for i, r in enumerate(records)}}
    first = written("a", values(pair[0]), start_of(pair[0]), right)
    search = ("--search", "--model", endless, "--data", tmp_path / "rows.jsonl", "--data", tasks[1])
    made = ok("prompt", "add", first, pair[1], *search, "-o", tmp_path / "t")["manifest"]
    wanted = sum(r["completion"][0] == " " for r in records) / 4
    assert made["search"]["table"][10]["exact"][0] == wanted

    first = written("a", start_of(pair[0]) - (values(pair[0]) - start_of(pair[0])), start_of(pair[0]), right)
    ok("prompt", "negate", first, "-o", tmp_path / "twice")  # a task is read alike after its vector was changed
    made = ok("prompt", "add", tmp_path / "twice", pair[1], *search, "-o", tmp_path / "u")["manifest"]
    assert made["search"]["examples"] == [4, 4]
    plain = written("a", values(pair[0]), start_of(pair[0]), {"max_length": "long", "template": 5})
    ok("prompt", "add", plain, pair[1], *search[:4], tasks[0], *search[5:], "-o", tmp_path / "v")


def test_a_task_that_is_lost_is_said(ok, endless, pair, written, tasks, tmp_path):
    """`lost` answers everything by itself: it is the sum at lambda 0.5, and stands in for a task of the pair."""
    start = start_of(pair[0])
    middle = start + 0.5 * sum(values(d) - start for d in pair)
    lost = written("lost", middle, start)
    away = written("away", start + 5 * drawn(11), start)
    (tmp_path / "hard.jsonl").write_text('{"prompt": "a", "completion": " word"}\n')
    search = ("--search", "--model", endless, "--data", tasks[0], "--data", tmp_path / "hard.jsonl")
    made = ok("prompt", "add", lost, away, *search, "-o", tmp_path / "s")["manifest"]
    assert made["search"]["alone"] == [1, 0]
    row = next(r for r in made["search"]["table"] if r["lambda"] == made["origin"]["lambda"])
    assert row["exact"][0] < 0.9
    (remark,) = made["remarks"]
    assert remark.startswith(f"'lost' keeps {100 * row['exact'][0]:.1f} % of right answers at lambda")


# ---- refusals


def test_what_is_refused_leaves_nothing(refused, endless, written, pair, tasks, tmp_path):
    a, b = pair

    def no(*arguments):
        said = refused("prompt", *arguments, "-o", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        return said

    other = written("b", drawn(1), drawn(2), base="f" * 64)
    assert "'a' and 'b' were tuned for different models" in no("add", a, other)
    assert "'a' and 'b' were tuned for different tokenizers" in no("add", a, written("b", *values2(), tokenizer="f"))
    assert "is not a directory" in no("add", a, tmp_path / "none")
    assert "found 'a' twice" in no("add", a, a)
    short = written("short", drawn(1)[:2], drawn(2)[:2])
    assert "'a' has 4 virtual tokens of 64 numbers, 'short' 2 virtual tokens" in no("add", a, short)
    assert "expected a start of the prompts' own length" in no("add", a, b, "--start", short)
    assert "'a' and 'b' were tuned for different models" in no("add", a, "--start", other)
    assert "does not say which values it started from" in no("add", a, written("bare", drawn(1), None))
    assert "found 1 times --weight for 2 prompts" in no("add", a, b, "--weight", 1)
    assert "found the weights nan, 1" in no("add", a, b, "--weight", "nan", "--weight", 1)
    assert "lambda is inf; expected a finite number" in no("add", a, b, "--scale", "inf")
    assert "lambda is -inf; expected a finite number" in no("scale", a, "-inf")
    assert "found a seed for ties" in no("add", a, b, "--method", "ties", "--seed", 3)
    assert "'half' is not a valid float" in no("scale", a, "half")
    for command in ("add", "negate"):
        assert "is longer than a file's name may be" in no(command, "a" * 300)
        assert "there is no such user" in no(command, "~nobody-of-this-name/a")
    assert "a density was given for 'a', and a plain sum drops nothing" in no("add", a, b, "--density", 0.5)
    assert "no density says which share is kept" in no("add", a, b, "--method", "dare")
    assert "the density is 2" in no("add", a, b, "--method", "ties", "--density", 2)
    assert "'slerp' is not one of" in no("add", a, b, "--method", "slerp")
    assert "Missing argument 'DIR...'" in no("add")
    assert "cannot be read" in no("merge", tmp_path / "none.yaml")
    assert "there is no file" in no("vector", a, "--start", tmp_path / "none.safetensors")
    assert "the start in" in no("vector", a, "--start", short)
    assert "'a' and 'b' were tuned for different models" in no("vector", a, "--start", other)
    bad = short / "bad.safetensors"
    for tensors, told in (
        ({"x": drawn(1)}, "holds x; expected one tensor called start or prompt_embeddings"),
        ({"start": drawn(1), "init_prompts": drawn(1)}, "holds init_prompts, start; expected one tensor called"),
        ({"start": drawn(1)[0]}, "is F32 [64]; expected"),
        ({f"w{i}": drawn(i) for i in range(9)}, "holds w0, w1, w2, w3, 5 more; expected one tensor called start or"),
        ({"start": drawn(1) / 0}, "holds NaN or Inf"),
    ):
        save_file(tensors, bad)
        assert told in no("vector", a, "--start", bad)

    search = ("add", a, b, "--search")
    data = ("--data", tasks[0], "--data", tasks[1])
    assert "searched without a model" in no(*search, *data)
    assert "searched without examples for 'a'" in no(*search, "--model", endless)
    assert "found 1 times --data for 2 prompts" in no(*search, "--model", endless, "--data", tasks[0])
    assert "found both --scale and --search" in no(*search, "--scale", 1)
    assert "a model was given, which only a search" in no("add", a, b, "--model", endless)
    assert "examples for 'a' were given, which only a search" in no("add", a, b, *data)
    both = [written(n, drawn(1), drawn(2), base="f" * 64) for n in "ab"]
    said = no("add", *both, "--search", "--model", endless, *data)
    assert "prompt 'a' was tuned for another model (ffffffffffff, " in said
    both = [written(n, drawn(1), drawn(2), tokenizer="f" * 64) for n in "ab"]
    said = no("add", *both, "--search", "--model", endless, *data)
    assert "prompt 'a' was tuned for another tokenizer (ffffffffffff, " in said


def values2():
    return drawn(1), drawn(2)


def test_a_search_refuses_other_models_and_missing_files(refused, endless, pair, tasks, written, tmp_path):
    search = ("prompt", "add", *pair, "--search", "--model", endless, "--data", tasks[0], "--data")
    assert "there is no file" in refused(*search, tmp_path / "none.jsonl", "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    narrow = [written(n, torch.ones(2, 8), torch.zeros(2, 8), base=None) for n in "ab"]
    said = refused("prompt", "add", *narrow, *search[4:], tasks[1], "-o", tmp_path / "out")
    assert "its vectors have 8 numbers" in said and list(tmp_path.iterdir()) == []


def test_outputs_are_apart_and_replaced_only_when_asked(ok, refused, pair, tmp_path):
    a, b = pair
    assert "which would be lost" in refused("prompt", "add", a, b, "-o", b)
    assert "which would be lost" in refused("prompt", "negate", a, "-o", a.parent)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    assert "did not write" in refused("prompt", "negate", a, "-o", tmp_path / "mine")
    ok("prompt", "negate", a, "-o", tmp_path / "out")
    before = contents(tmp_path / "out")
    assert "add --overwrite" in refused("prompt", "scale", a, 2, "-o", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    ok("prompt", "scale", a, 2, "-o", tmp_path / "out", "--overwrite")
    assert contents(tmp_path / "out") != before
    page = ("prompt", "similarity", a, b, "-o")
    assert "ends in .html" in refused(*page, tmp_path / "page.txt")
    assert "ends in .html" in refused(*page, tmp_path / "none" / "page.html")
    (tmp_path / "page.html").write_text("mine")
    assert "is there already" in refused(*page, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out", "page.html"]


def test_help_has_examples(tpvc):
    for name in ("vector", "add", "negate", "scale", "similarity", "merge"):
        result = tpvc("prompt", name, "--help")
        assert result.exit_code == 0 and f"tpvc prompt {name} " in result.stdout

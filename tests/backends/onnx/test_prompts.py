"""Soft prompts in the emitted folder: virtual tokens, keys and values, a constant prefix of the portable graph."""

import numpy as np
import onnxruntime_genai as og
import pytest
import torch

from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.backends.onnx import emit
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.interpret import generate, in_memory, logits
from tpvc.compiler.program import Grid, prompt_ids
from tpvc.compiler.verify import verify
from tpvc.passes.bank_prompt import BankPrompt, embeddings
from tpvc.passes.fold_prompt import FoldPrompt

TEXT = torch.randint(3, 97, (3, 8), generator=torch.Generator().manual_seed(4))
GRIDS = Grid(4, 32, False), Grid(8, -1, True)


def drawn(program, name, tokens, seed=0):
    site = next(n for n in program.nodes if n.op == "embed" and n.inputs[0] == "input_ids")
    width = program.params[site.params["weight"]].shape[1]
    size = 0.3 * (width**0.5 if embeddings(program).op == "scale" else 1)
    return Prompt(name, torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * size)


def rounded(tiny, family):
    grid = Grid(4, -1, True) if family == "llama-odd-heads" else GRIDS[0]
    return tiny.build(family, grid, GRIDS[1])


def tasks_of(program):
    return verify(BankPrompt((drawn(program, "a", 5), drawn(program, "b", 3, 1)))(program))


def padded(rows):
    """ids and mask, padded on the right as GenAI does."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.as_tensor(row), 1
    return ids, mask


def test_rows_with_their_own_prompts_or_none(family, tiny, tmp_path):
    program = tasks_of(rounded(tiny, family))
    emit(program, tmp_path, None, accuracy_level=0, portable=True)
    rows = [[*prompt_ids(program, t), *TEXT[i].tolist()] for i, t in enumerate(("b", None, "a"))]
    expected = [logits(program, torch.tensor([row]), weight=in_memory(program))[0] for row in rows]
    limit = tiny.tolerance(torch.cat(expected))
    ids, mask = padded(rows)
    got, _ = tiny.step(tiny.session(tmp_path), ids, mask)
    for i, wanted in enumerate(expected):
        assert (got[i, 0] - wanted[-1]).abs().max() <= limit
    got, _ = tiny.step(tiny.session(tmp_path / "portable"), ids, mask)
    for i, wanted in enumerate(expected):
        assert (got[i, : len(wanted)] - wanted).abs().max() <= limit


def test_keys_of_a_folded_prompt(family, tiny, tmp_path):
    """Rows of unlike length, then single tokens, through both graphs; and one long row given in two parts."""
    program = rounded(tiny, family)
    folded = verify(FoldPrompt(drawn(program, "a", 5), "kv")(program))
    emit(folded, tmp_path, None, accuracy_level=0, portable=True)
    held = in_memory(folded)
    rows = [TEXT[0, :6], TEXT[1, :3], TEXT[2, :5]]
    ids, mask = padded(rows)
    whole = [torch.cat((row, TEXT[i, 6:8])) for i, row in enumerate(rows)]
    expected = [logits(folded, row[None], weight=held)[0] for row in whole]
    limit = tiny.tolerance(torch.cat(expected))
    for directory in (tmp_path, tmp_path / "portable"):
        model = tiny.session(directory)
        got, past = tiny.step(model, ids, mask)
        assert past[0].shape[2] == 6, "the cache holds the text alone"
        for i, row in enumerate(rows):
            found = got[i, 0] if directory == tmp_path else got[i, len(row) - 1]
            assert (found - expected[i][len(row) - 1]).abs().max() <= limit
        if directory == tmp_path:
            continue
        seen = mask
        for t in (6, 7):
            seen = torch.cat((seen, torch.ones(3, 1)), 1)
            got, past = tiny.step(model, TEXT[:, t : t + 1], seen, past)
            for i, row in enumerate(rows):
                assert (got[i, 0] - expected[i][len(row) + t - 6]).abs().max() <= limit
    model = tiny.session(tmp_path)
    got, past = tiny.step(model, TEXT[:1, :4], torch.ones(1, 4))
    got, past = tiny.step(model, TEXT[:1, 4:6], torch.ones(1, 6), past)
    assert (got[0, 0] - expected[0][5]).abs().max() <= limit
    for t in (6, 7):
        got, past = tiny.step(model, TEXT[:1, t : t + 1], torch.ones(1, t + 1), past)
        assert (got[0, 0] - expected[0][t]).abs().max() <= limit


def test_a_constant_prefix_in_the_portable_graph(family, tiny, tmp_path):
    """A batch padded on the left, then decoding; the cache holds the prompt."""
    program = rounded(tiny, family)
    folded = verify(FoldPrompt(drawn(program, "a", 5), "prefix")(program))
    emit(folded, tmp_path, None, accuracy_level=0, portable=True)
    assert [p.name for p in tmp_path.iterdir()] == ["portable"]
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, :3] = False
    expected = logits(folded, TEXT, mask, weight=in_memory(folded))
    limit = tiny.tolerance(expected[mask])
    model = tiny.session(tmp_path / "portable")
    got, past = tiny.step(model, TEXT[:, :6], mask[:, :6])
    assert past[0].shape[2] == 5 + 6
    parts = [got]
    for t in (6, 7):
        got, past = tiny.step(model, TEXT[:, t : t + 1], mask[:, : t + 1], past)
        parts.append(got)
    assert (torch.cat(parts, 1) - expected)[mask].abs().max() <= limit


def test_genai_will_not_take_a_constant_prefix(tiny, tmp_path):
    program = rounded(tiny, "llama")
    with pytest.raises(TpvcError, match="fold it as kv"):
        emit(FoldPrompt(drawn(program, "a", 5), "prefix")(program), tmp_path, None)
    assert not list(tmp_path.iterdir())


def greedy(directory, ids, count):
    model = og.Model(str(directory))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + count, min_length=len(ids) + count, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.asarray(ids, np.int32))
    found = []
    for _ in range(count):
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_genai_writes_what_the_interpreter_does(kind, tiny, tmp_path):
    program = rounded(tiny, kind)
    prompt, ids = drawn(program, "a", 5), TEXT[0]
    banked, folded = BankPrompt((prompt,))(program), FoldPrompt(prompt, "kv")(program)
    wanted = list(generate(banked, ids, 24, task="a", stop_at_eos=False))
    assert wanted != list(generate(program, ids, 24, stop_at_eos=False))
    for name, made, fed in (("rows", banked, [*prompt_ids(banked, "a"), *ids.tolist()]), ("kv", folded, ids.tolist())):
        (tmp_path / name).mkdir()
        emit(made, tmp_path / name, None, accuracy_level=0)
        assert greedy(tmp_path / name, fed, 24) == wanted, name


@pytest.mark.slow
def test_demo_model_in_genai(tiny, tmp_path):
    """A prompt of 20 vocabulary rows before each of 4 texts, 32 greedy tokens, as virtual tokens and as keys."""
    from tpvc.compiler import frontends
    from tpvc.compiler.adapters import prompt_start
    from tpvc.compiler.program import dense, linears

    program = frontends.load("smollm2-135m")
    tokenizer = frontends.tokenizer(program)
    weights = [n.params["weight"] for n in linears(program.nodes) if n.block is not None]
    program = program.with_params(
        {name: tiny.round_to_nearest(dense(program.params[name]), Grid(4, 64, False)) for name in weights}
    )
    prompt, _ = prompt_start.start(program, tokenizer, "vocab", 20, 1)
    banked, folded = BankPrompt((prompt,))(program), FoldPrompt(prompt, "kv")(program)
    held, before = in_memory(banked), prompt_ids(banked, "start")
    for name, made in (("rows", banked), ("kv", folded)):
        (tmp_path / name).mkdir()
        emit(made, tmp_path / name, None, accuracy_level=0)
    for text in ("The capital of France is", "def fibonacci(n):", "Water boils at", "In the year 1969"):
        ids = tokenizer.encode(text)
        wanted = list(generate(banked, torch.tensor(ids), 32, held, task="start", stop_at_eos=False))
        assert greedy(tmp_path / "rows", [*before, *ids], 32) == wanted, text
        assert greedy(tmp_path / "kv", ids, 32) == wanted, text

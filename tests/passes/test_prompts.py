"""Soft prompts in the graph: as extra rows, as a constant prefix, as keys and values; all equal PEFT's forward."""

from dataclasses import replace

import pytest
import torch
import transformers as hf

from tpvc.compiler.adapters import prompt_files
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import generate, in_memory, logits
from tpvc.compiler.program import Grid, bank_params, dense, grid_of, linears, prompt_ids
from tpvc.compiler.verify import verify
from tpvc.passes.bank_prompt import BankPrompt
from tpvc.passes.fold_prompt import FORMS, FoldPrompt
from tpvc.passes.round_to_nearest import quantize as to_nearest

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama-tied": lambda: hf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral-window": lambda: hf.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "phi3": lambda: hf.Phi3Config(**SIZES, num_key_value_heads=2),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=4),
    "opt": lambda: hf.OPTConfig(**OPT, max_position_embeddings=64, word_embed_proj_dim=32),
    "opt-narrow-embedding": lambda: hf.OPTConfig(
        **OPT, max_position_embeddings=64, word_embed_proj_dim=20, do_layer_norm_before=False
    ),
    "gpt2": lambda: hf.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SIZES),
}
TEXT = 9


def model_of(name, directory):
    torch.manual_seed(list(CONFIGS).index(name))
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return model, load(directory)


def width(program):
    return program.params[next(n for n in program.nodes if n.op == "embed").params["weight"]].shape[1]


def drawn(program, name, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Prompt(name, torch.randn(tokens, width(program), generator=generator) * 0.3)


def tolerance(program, length, wanted):
    """Worst-case linear accumulation of float32 rounding along the longest path, relative to the largest logit, twice:
    two implementations are compared. See tests/frontends/test_families.py."""
    terms = sum(
        program.params[n.params["weight"]].shape[1]
        if n.op == "linear"
        else (length + program.facts.head_dim if n.op == "attention" else 4)
        for n in program.nodes
    )
    return 2 * terms * torch.finfo(torch.float32).eps * float(wanted.abs().max())


def text(rows=2, seed=5):
    return torch.randint(3, 97, (rows, TEXT), generator=torch.Generator().manual_seed(seed))


def alone(program, ids, name):
    """Logits of one row of text [T] behind the prompt called `name`, without a cache or padding."""
    fed = torch.cat((torch.tensor(prompt_ids(program, name), dtype=torch.int64), ids))
    return logits(program, fed[None])[0, -len(ids) :]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_form_equals_peft(name, tmp_path):
    import peft

    model, program = model_of(name, tmp_path / "model")
    prompt = drawn(program, "task", 6)
    prompt_files.write(prompt, tmp_path / "prompt", prompt_files.about(program), {})
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "prompt").eval()
    ids = text()
    wanted = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -TEXT:]
    limit = tolerance(program, TEXT + 6, wanted)
    assert limit < 1e-2 * float(wanted.abs().max())
    without = logits(program, ids)
    assert float((without - wanted).abs().max()) > 100 * limit, "the prompt matters"

    banked = verify(BankPrompt((prompt,))(program))
    fed = torch.cat((torch.tensor(prompt_ids(banked, "task")).expand(2, -1), ids), 1)
    torch.testing.assert_close(logits(banked, fed)[:, -TEXT:], wanted, rtol=0, atol=limit)
    torch.testing.assert_close(logits(banked, ids), without, rtol=0, atol=0)
    for form in FORMS:
        folded = verify(FoldPrompt(prompt, form)(program))
        torch.testing.assert_close(logits(folded, ids), wanted, rtol=0, atol=limit)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_padding_and_caches_change_nothing(name, tmp_path):
    """Rows of a batch padded on the left, on the right and on both sides, all at once and in steps."""
    _, program = model_of(name, tmp_path)
    prompt = drawn(program, "task", 5)
    ids, mask = text(4), torch.ones(4, TEXT, dtype=torch.bool)
    mask[1, :4] = mask[2, -3:] = mask[3, :2] = mask[3, -2:] = False
    banked = BankPrompt((prompt,))(program)
    rows = [alone(banked, ids[i][mask[i]], "task") for i in range(4)]
    limit = tolerance(program, TEXT + 5, torch.cat(rows))
    for form in FORMS:
        folded = FoldPrompt(prompt, form)(program)
        whole = logits(folded, ids, mask)
        cache, steps, held = {}, [], in_memory(folded)
        for start, stop in ((0, 4), (4, 5), (5, 7), (7, 9)):
            steps.append(logits(folded, ids[:, start:stop], mask[:, :stop], held, cache))
        for found in (whole, torch.cat(steps, 1)):
            for i, wanted in enumerate(rows):
                torch.testing.assert_close(found[i][mask[i]], wanted, rtol=0, atol=limit)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "opt", "gpt2"])
@torch.no_grad()
def test_rows_of_a_batch_have_their_own_prompts_or_none(name, side, tmp_path):
    _, program = model_of(name, tmp_path)
    banked = verify(BankPrompt((drawn(program, "a", 6), drawn(program, "b", 2, 1)))(program))
    tasks, texts = ["b", None, "a", "b"], [ids[: TEXT - i] for i, ids in enumerate(text(4))]
    fed = [torch.tensor([*prompt_ids(banked, t), *ids.tolist()]) for t, ids in zip(tasks, texts, strict=True)]
    total = max(map(len, fed))
    ids, mask = torch.zeros(4, total, dtype=torch.int64), torch.zeros(4, total, dtype=torch.bool)
    for i, row in enumerate(fed):
        own = slice(total - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, own], mask[i, own] = row, True
    whole, cache, steps = logits(banked, ids, mask), {}, []
    for start, stop in ((0, 3), (3, 8), (8, total)):
        steps.append(logits(banked, ids[:, start:stop], mask[:, :stop], cache=cache))
    rows = [alone(banked, t, name) for t, name in zip(texts, tasks, strict=True)]
    limit = tolerance(program, total, torch.cat(rows))
    for found in (whole, torch.cat(steps, 1)):
        for i, wanted in enumerate(rows):
            torch.testing.assert_close(found[i][mask[i]][-len(wanted) :], wanted, rtol=0, atol=limit)


@torch.no_grad()
def test_generation_is_the_same_in_every_form(tmp_path):
    _, program = model_of("llama", tmp_path)
    prompt, ids = drawn(program, "task", 7), text(1)[0]
    wanted = list(generate(BankPrompt((prompt,))(program), ids, 12, task="task", stop_at_eos=False))
    plain = list(generate(program, ids, 12, stop_at_eos=False))
    assert wanted != plain
    for form in FORMS:
        assert list(generate(FoldPrompt(prompt, form)(program), ids, 12, stop_at_eos=False)) == wanted


@torch.no_grad()
def test_keys_come_from_the_integers_of_a_rounded_model(tmp_path):
    _, program = model_of("llama", tmp_path)
    weights = [n.params["weight"] for n in linears(program.nodes)]
    rounded = program.with_params(
        {w: to_nearest(dense(program.params[w]), Grid(3, 16, False), torch.float32) for w in weights}
    )
    prompt, ids = drawn(program, "task", 5), text(1)
    wanted = alone(BankPrompt((prompt,))(rounded), ids[0], "task")
    folded = FoldPrompt(prompt, "kv")(rounded)
    assert all(grid_of(folded.params[w]) for w in weights)
    limit = tolerance(program, TEXT + 5, wanted)
    torch.testing.assert_close(logits(folded, ids)[0], wanted, rtol=0, atol=limit)
    mixed = rounded.with_params({n: p for n, p in FoldPrompt(prompt, "kv")(program).params.items() if "prefix" in n})
    mixed = replace(folded, params=mixed.params)
    assert float((logits(mixed, ids)[0] - wanted).abs().max()) > 10 * limit, "float keys are others"


def test_a_bank_is_replaced_and_taken_out(tmp_path):
    _, program = model_of("llama", tmp_path)
    a, b = drawn(program, "a", 3), drawn(program, "b", 4, 1)
    both = BankPrompt((a, b))(program)
    assert prompt_ids(both, "a") == [97, 98, 99] and prompt_ids(both, "b") == [100, 101, 102, 103]
    assert prompt_ids(both, None) == []
    assert bank_params(both) == {"virtual_tokens.rows"}
    assert BankPrompt((b,))(both).prompts == (b,)
    again = BankPrompt(())(both)
    assert again.nodes == program.nodes and again.params.keys() == program.params.keys() and again.prompts == ()
    for form in FORMS:
        assert FoldPrompt(a, form)(both).nodes == FoldPrompt(a, form)(program).nodes


def test_what_does_not_fit_is_refused(tmp_path):
    _, program = model_of("llama", tmp_path)
    good = drawn(program, "a", 3)

    def refused(work):
        with pytest.raises(TpvcError) as error:
            work()
        return str(error.value)

    assert "one name (a, a)" in refused(lambda: BankPrompt((good, good))(program))
    assert "24 numbers (token_dim), this model's embeddings 32" in refused(
        lambda: BankPrompt((Prompt("x", torch.zeros(3, 24)),))(program)
    )
    assert "context of 64" in refused(lambda: BankPrompt((Prompt("x", torch.zeros(64, 32)),))(program))
    assert "expected one of prefix, kv" in refused(lambda: FoldPrompt(good, "rows")(program))
    assert "no task 'b'; it has a" in refused(lambda: prompt_ids(BankPrompt((good,))(program), "b"))
    for form in FORMS:
        folded = FoldPrompt(good, form)(program)
        assert "folded into this model already" in refused(lambda folded=folded: FoldPrompt(good, "kv")(folded))

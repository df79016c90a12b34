"""The engine computes what the interpreter does: every family through the references, one through the kernels."""

from dataclasses import replace

import pytest
import torch
import transformers as hf

from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.adapters.road import Road, Rotation
from tpvc.compiler.backends.triton.engine import Draw, Engine
from tpvc.compiler.backends.triton.model import model_of
from tpvc.compiler.backends.triton.on_torch import OnTorch
from tpvc.compiler.backends.triton.steps import steps
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import generate, in_memory, logits
from tpvc.compiler.program import Grid, dense, linears, prompt_ids
from tpvc.kernels.launch import with_triton
from tpvc.passes.bank_prompt import BankPrompt
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.fold_prompt import FoldPrompt
from tpvc.passes.round_to_nearest import quantize as to_nearest

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama-tied-biases": lambda: hf.LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral-window": lambda: hf.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "phi3": lambda: hf.Phi3Config(**SIZES, num_key_value_heads=2),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=4),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **SIZES,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "opt": lambda: hf.OPTConfig(**OPT, max_position_embeddings=64, word_embed_proj_dim=20, do_layer_norm_before=False),
    "gpt2": lambda: hf.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SIZES),
}
TEXTS = ([5, 9, 33, 71, 12], [40, 41, 3], [8, 8, 90, 17, 66, 23, 51])


def program_of(name, directory, bits=None):
    """A random model; with `bits` its linears, head and tied embedding are integers."""
    torch.manual_seed(list(CONFIGS).index(name))
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    program = load(directory)
    if bits is None:
        return program
    weights = {n.params["weight"] for n in linears(program.nodes)}
    grid = Grid(bits, 16 if all(program.params[w].shape[1] % 16 == 0 for w in weights) else -1, False)
    return program.with_params({w: to_nearest(dense(program.params[w]), grid, torch.float32) for w in weights})


def tolerance(program, length, wanted):
    """Worst-case linear accumulation of float32 rounding along the longest path, twice: two implementations. See
    tests/frontends/test_families.py."""
    terms = sum(
        program.params[n.params["weight"]].shape[1]
        if n.op == "linear"
        else (length + program.facts.head_dim if n.op == "attention" else 4)
        for n in program.nodes
    )
    return 2 * terms * torch.finfo(torch.float32).eps * float(wanted.abs().max())


def adapter(program, name, seed):
    generator, rotations = torch.Generator().manual_seed(seed), {}
    for node in linears(n for n in program.nodes if n.block is not None):
        theta, alpha = torch.randn(2, program.params[node.params["weight"]].shape[0] // 2, generator=generator)
        rotations[node.name] = Rotation("road_1", 16, theta / 2, 1 + alpha / 10)
    return Road(name, rotations)


def engine_of(program, slots=4, capacity=32, run=None, cache=None):
    return Engine(OnTorch(model_of(program, cache=cache), slots, capacity, run))


def follow(program, engine, tokens, adapters=(), tasks=(), count=4):
    """Rows of their own length, adapter and prompt: logits of every step against the interpreter's, alone."""
    adapters, tasks = (list(x) + [None] * (len(tokens) - len(x)) for x in (adapters, tasks))
    weight = in_memory(program)
    names = [a.name for a in program.adapters]
    texts = [[*prompt_ids(program, t), *ids] for t, ids in zip(tasks, tokens, strict=True)]
    rows = [engine.admit(*given) for given in zip(tokens, adapters, tasks, strict=True)]
    slots, found = [slot for slot, _ in rows], [logit for _, logit in rows]
    for _ in range(count):
        step = []
        for i in range(len(slots)):
            own = torch.tensor([names.index(adapters[i]) if adapters[i] else -1])
            wanted = logits(program, torch.tensor([texts[i]]), weight=weight, adapter_ids=own)[0, -1]
            limit = tolerance(program, len(texts[i]), wanted)
            torch.testing.assert_close(found[i], wanted, rtol=0, atol=limit)
            step.append(int(wanted.argmax()))
            texts[i].append(step[i])
        found = engine.decode(slots, step)
    return slots


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_family_through_the_references(name, bits, tmp_path):
    program = program_of(name, tmp_path, bits)
    follow(program, engine_of(program), TEXTS)


@torch.no_grad()
def test_rows_with_their_own_adapters_and_prompts(tmp_path):
    program = program_of("llama", tmp_path, 3)
    program = BankRoad((adapter(program, "x", 1), adapter(program, "y", 2)))(program)
    values = torch.randn(7, 32, generator=torch.Generator().manual_seed(3)) * 0.3
    program = BankPrompt((Prompt("a", values[:4]), Prompt("b", values[4:])))(program)
    engine = engine_of(program, slots=3, capacity=24)
    slots = follow(program, engine, TEXTS, ("y", None, "x"), ("b", "a", None))
    # a prompt's keys and values are there already, unless an adapter turns its tokens too
    assert [engine.lengths[s] for s in slots] == [3 + 5 + 4, 3 + 4, 7 + 4]
    engine.release(slots[1])
    follow(program, engine, [TEXTS[1]], ("x",), ("a",), count=2)
    assert [engine.lengths[s] for s in (slots[0], slots[2])] == [12, 11]


@torch.no_grad()
def test_the_kernels_write_the_interpreters_tokens(tmp_path):
    """Triton's interpreter, float32, integers in every linear, an adapter: greedy tokens."""
    program = program_of("llama", tmp_path, 4)
    program = BankRoad((adapter(program, "x", 1),))(program)
    program = BankPrompt((Prompt("p", torch.randn(3, 32, generator=torch.Generator().manual_seed(3)) * 0.3),))(program)
    engine = engine_of(program, slots=2, capacity=16, run=with_triton)
    for ids, name, task in ((TEXTS[0], "x", None), (TEXTS[1], None, "p"), (TEXTS[1], "x", "p")):
        given = torch.tensor([*prompt_ids(program, task), *ids])
        wanted = list(generate(program, given, 4, adapter=name, stop_at_eos=False))
        slot, token = engine.admit(ids, name, task, "greedy")
        written = [int(token)]
        for _ in range(3):
            written.append(int(engine.decode([slot], written[-1:], "greedy")))
        assert written == wanted
        engine.release(slot)


def test_groups_that_no_power_of_2_counts_are_refused(tmp_path):
    """By `plan` too, which asks for the steps and no kernel."""
    program = program_of("llama", tmp_path, 4)
    program = BankRoad((adapter(program, "x", 1),))(program)
    nodes = [replace(n, attrs={**n.attrs, "group": 12}) if n.op == "rotate" else n for n in program.nodes]
    with pytest.raises(TpvcError, match="pairs inside groups of 12 outputs; the kernels turn groups of a power of 2"):
        steps(replace(program, nodes=tuple(nodes)))


@torch.no_grad()
def test_drawn_tokens(tmp_path):
    """Through the kernels as through the references; a row that draws nothing takes the likeliest."""
    program = program_of("llama", tmp_path, 4)
    draws = [Draw(0.8, 0.9, u) for u in (0.03, 0.5, 0.97)]
    found = []
    for run in (None, with_triton):
        engine = engine_of(program, slots=4, capacity=16, run=run)
        slots = [engine.admit(ids)[0] for ids in (*TEXTS, TEXTS[0])]
        before = engine.decode(slots, [7, 8, 9, 10]).argmax(-1)
        again = engine_of(program, slots=4, capacity=16, run=run)
        slots = [again.admit(ids)[0] for ids in (*TEXTS, TEXTS[0])]
        drawn = again.decode(slots, [7, 8, 9, 10], "sample", [*draws, Draw(1e-4, 0.0, 0.0)])
        assert drawn[3] == before[3]
        found.append(drawn)
    assert torch.equal(*found) and not torch.equal(found[0], before)


@torch.no_grad()
def test_an_int8_cache(tmp_path):
    """Kernels as references; logits off by what codes of 127 steps a vector do: below a tenth of their range here."""
    program = program_of("llama", tmp_path, 4)
    plain = engine_of(program, 1, 16)
    engines = [engine_of(program, 1, 16, run, torch.int8) for run in (None, with_triton)]
    assert engines[0].compute.caches[0].key.dtype == torch.int8
    exact, *found = [e.decode([e.admit(TEXTS[0])[0]], [7]) for e in (plain, *engines)]
    torch.testing.assert_close(*found, rtol=0, atol=tolerance(program, 6, exact))
    error = (found[0] - exact).abs().max()
    assert 0 < error < 0.1 * exact.abs().max()


def test_steps_are_fused(tmp_path):
    program = program_of("llama", tmp_path)
    ops = [s.op for s in steps(program)]
    block = ["linear", "linear", "linear", "attend", "linear", "norm", "linear", "linear", "gated", "linear", "norm"]
    assert ops == ["embed", "norm", *block, *block, "linear"]
    model = model_of(program)
    joined = ["linear", "attend", "linear", "norm", "linear", "gated", "linear", "norm"]
    assert [s.op for s in model.steps] == ["embed", "norm", *joined, *joined, "linear"]
    assert model.steps[2].attrs["widths"] == (32, 16, 16)


def test_linears_that_differ_stay_apart(tmp_path):
    """Other bits for v, and an adapter on one of two."""
    program = program_of("llama", tmp_path, 4)
    v = next(n for n in linears(program.nodes) if n.name.endswith("v_proj"))
    value = to_nearest(dense(program.params[v.params["weight"]]), Grid(8, 16, False), torch.float32)
    own = adapter(program, "x", 1)
    turned = {name: r for name, r in own.rotations.items() if name.endswith("up_proj")}
    program = BankRoad((Road("x", turned),))(program.with_params({v.params["weight"]: value}))
    outputs = [len(s.outputs) for s in model_of(program).steps if s.op == "linear"]
    assert outputs == [2, 1, 1, 1, 1, 1, 3, 1, 1, 1, 1, 1]
    follow(program, engine_of(program), TEXTS, ("x",))


def test_what_does_not_fit_is_refused(tmp_path):
    program = program_of("llama", tmp_path)
    engine = engine_of(program, slots=1, capacity=4)

    def refused(work):
        with pytest.raises(TpvcError) as error:
            work()
        return str(error.value)

    assert "a context of 64" in refused(lambda: engine_of(program, capacity=65))
    assert "0 slots" in refused(lambda: engine_of(program, slots=0))
    assert "has 5 tokens; expected 1 to 4" in refused(lambda: engine.admit([1] * 5))
    assert "no adapter 'x'; it has none" in refused(lambda: engine.admit([1], "x"))
    assert "no task 'x'" in refused(lambda: engine.admit([1], None, "x"))
    slot, _ = engine.admit([1, 2, 3, 4])
    assert "all 1 slots are in use" in refused(lambda: engine.admit([1]))
    assert "holds 4 tokens" in refused(lambda: engine.decode([slot], [0]))
    engine.release(slot)
    assert f"slot {slot} is not in use" in refused(lambda: engine.decode([slot], [0]))
    assert f"slot {slot} is not in use" in refused(lambda: engine.release(slot))


@pytest.mark.parametrize(
    ("form", "says"), [("kv", "has the keys and values of a prompt"), ("prefix", "is a .*no kernel")]
)
def test_what_no_kernel_computes_is_refused(tiny_llama, form, says):
    program = load(tiny_llama)
    prompt = Prompt("task", torch.zeros(3, program.facts.hidden_size))
    with pytest.raises(TpvcError, match=says):
        steps(FoldPrompt(prompt, form)(program))

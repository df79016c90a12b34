"""The engine computes what the interpreter does: every family through the references, one through the kernels."""

import pytest
import torch
import transformers as hf

from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.adapters.road import Road, Rotation
from tpvc.compiler.backends.triton.engine import Engine, model_of
from tpvc.compiler.backends.triton.steps import steps
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import generate, in_memory, logits
from tpvc.compiler.program import Grid, dense, linears, prompt_ids
from tpvc.kernels.launch import with_triton
from tpvc.passes.bank_prompt import BankPrompt
from tpvc.passes.bank_road import BankRoad
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


def follow(program, engine, tokens, adapters=(), tasks=(), count=4):
    """Rows of their own length, adapter and prompt: logits of every step against the interpreter's, alone."""
    adapters, tasks = (list(x) + [None] * (len(tokens) - len(x)) for x in (adapters, tasks))
    weight = in_memory(program)
    names = [a.name for a in program.adapters]
    texts = [[*prompt_ids(program, t), *ids] for t, ids in zip(tasks, tokens, strict=True)]
    rows = [engine.admit(*given) for given in zip(tokens, adapters, tasks, strict=True)]
    slots, found = [slot for slot, _ in rows], [logit for _, logit in rows]
    for _ in range(count):
        step = torch.zeros(engine.slots, dtype=torch.int64)
        for i, slot in enumerate(slots):
            own = torch.tensor([names.index(adapters[i]) if adapters[i] else -1])
            wanted = logits(program, torch.tensor([texts[i]]), weight=weight, adapter_ids=own)[0, -1]
            limit = tolerance(program, len(texts[i]), wanted)
            torch.testing.assert_close(found[i], wanted, rtol=0, atol=limit)
            step[slot] = int(wanted.argmax())
            texts[i].append(int(step[slot]))
        after = engine.decode(step)
        found = [after[slot] for slot in slots]
    return slots


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_family_through_the_references(name, bits, tmp_path):
    program = program_of(name, tmp_path, bits)
    follow(program, Engine(model_of(program), slots=4, capacity=32), TEXTS)


@torch.no_grad()
def test_rows_with_their_own_adapters_and_prompts(tmp_path):
    program = program_of("llama", tmp_path, 3)
    program = BankRoad((adapter(program, "x", 1), adapter(program, "y", 2)))(program)
    values = torch.randn(7, 32, generator=torch.Generator().manual_seed(3)) * 0.3
    program = BankPrompt((Prompt("a", values[:4]), Prompt("b", values[4:])))(program)
    engine = Engine(model_of(program), slots=3, capacity=24)
    slots = follow(program, engine, TEXTS, ("y", None, "x"), ("b", "a", None))
    # rows come and go while others stay
    engine.release(slots[1])
    kept = [engine.lengths[s].item() for s in (slots[0], slots[2])]
    follow(program, engine, [TEXTS[1]], ("x",), ("a",), count=2)
    assert [engine.lengths[s].item() for s in (slots[0], slots[2])] == [n + 2 for n in kept]


@torch.no_grad()
def test_the_kernels_write_the_interpreters_tokens(tmp_path):
    """Triton's interpreter, float32, integers in every linear, an adapter: greedy tokens."""
    program = program_of("llama", tmp_path, 4)
    program = BankRoad((adapter(program, "x", 1),))(program)
    engine = Engine(model_of(program), slots=2, capacity=16, run=with_triton)
    for ids, name in ((TEXTS[0], "x"), (TEXTS[1], None)):
        slot, found = engine.admit(ids, name)
        wanted = list(generate(program, torch.tensor(ids), 4, adapter=name, stop_at_eos=False))
        written = []
        for _ in range(4):
            step = torch.zeros(2, dtype=torch.int64)
            step[slot] = engine.greedy(found[None])[0]
            written.append(int(step[slot]))
            found = engine.decode(step)[slot]
        assert written == wanted
        engine.release(slot)


def test_steps_are_fused(tmp_path):
    program = program_of("llama", tmp_path)
    ops = [s.op for s in steps(program)]
    block = ["linear", "linear", "linear", "attend", "linear", "norm", "linear", "linear", "gated", "linear", "norm"]
    assert ops == ["embed", "norm", *block, *block, "linear"]


def test_what_does_not_fit_is_refused(tmp_path):
    program = program_of("llama", tmp_path)
    engine = Engine(model_of(program), slots=1, capacity=4)

    def refused(work):
        with pytest.raises(TpvcError) as error:
            work()
        return str(error.value)

    assert "beyond the model's context of 64" in refused(lambda: Engine(model_of(program), capacity=65))
    assert "has 5 tokens; expected 1 to 4" in refused(lambda: engine.admit([1] * 5))
    assert "no adapter 'x'; it has none" in refused(lambda: engine.admit([1], "x"))
    assert "no task 'x'" in refused(lambda: engine.admit([1], None, "x"))
    slot, _ = engine.admit([1, 2, 3, 4])
    assert "all 1 slots are in use" in refused(lambda: engine.admit([1]))
    assert "holds 4 tokens" in refused(lambda: engine.decode(torch.zeros(1, dtype=torch.int64)))
    engine.release(slot)
    assert f"slot {slot} is not in use" in refused(lambda: engine.release(slot))

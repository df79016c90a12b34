"""Adapters beside integer weights, in ONNX Runtime and in GenAI, against the interpreter."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
import torch

from tpvc.compiler.adapters.road import STORED, Road, Rotation
from tpvc.compiler.backends.onnx import emit
from tpvc.compiler.backends.onnx.adapters import write_file
from tpvc.compiler.interpret import generate, in_memory, logits
from tpvc.compiler.program import Grid, linears
from tpvc.compiler.verify import verify
from tpvc.passes.bank_road import BankRoad

BITS = (Grid(4, 16, False), Grid(8, -1, True))
PROMPT = torch.randint(3, 97, (4, 9), generator=torch.Generator().manual_seed(1))
CASES = {
    "road_1 everywhere": ("llama", (("road_1", 16, ""), ("road_1", 16, ""))),
    "road_1 on q and v": ("qwen2", (("road_1", 32, "q_proj v_proj"), ("road_1", 32, "q_proj v_proj"))),
    "adjacent pairs": ("llama3", (("road_1", 2, ""), ("road_2", 2, ""))),
    "road_2": ("mistral", (("road_2", 16, ""), ("road_2", 16, "up_proj down_proj k_proj"))),
    "road_4": ("qwen3", (("road_4", 8, ""), ("road_1", 8, ""))),
    "three groups": (
        "llama",
        (("road_1", 64, "q_proj o_proj"), ("road_2", 4, "k_proj o_proj"), ("road_4", 12, "q_proj")),
    ),
    "rows in order": ("phi3", (("road_1", 32, "proj"), ("road_2", 32, "proj"))),
    "rows in another order": ("gpt_neox", (("road_1", 16, ""), ("road_1", 16, "query_key_value"))),
    "biases": ("opt", (("road_2", 48, "_proj"), ("road_1", 48, "fc"))),
    "sums fused with norms": ("gemma2", (("road_1", 64, "o_proj down_proj"), ("road_4", 64, "down_proj"))),
    "attention in parts": ("llama-odd-heads", (("road_1", 4, ""), ("road_4", 4, ""))),
}


def random_road(program, name, variant, group, targets, seed):
    """Angles of some tenths and scales near 1 for the linears whose names hold one of `targets`; "" is every one of
    the blocks."""
    generator = torch.Generator().manual_seed(seed)
    rotations = {}
    for node in linears(program.nodes):
        if node.block is None if not targets else not any(t in node.name for t in targets.split()):
            continue
        m = int(program.params[node.params["weight"]].shape[0] * STORED[variant])
        theta, alpha = torch.randn(2, m, generator=generator)
        rotations[node.name] = Rotation(variant, group, theta * 0.3, 1 + alpha * 0.1)
    return Road(name, rotations)


def adapted(tiny, family, specs, bits=BITS, **fields):
    program = tiny.build(family, *bits, **fields)
    roads = (random_road(program, f"task{i}", *spec, seed=i) for i, spec in enumerate(specs))
    return verify(BankRoad(tuple(roads))(program))


def step(tiny, model, ids, mask, adapters=None, past=None):
    """As tiny.step, with adapter ids fed when they are given."""
    feeds = {} if adapters is None else {"adapter_ids": np.array(adapters, np.int64)}

    class Fed:
        get_inputs = model.get_inputs

        @staticmethod
        def run(names, given):
            return model.run(names, given | feeds)

    return tiny.step(Fed, ids, mask, past)


def kinds(directory):
    graph = onnx.load(directory / "model.onnx", load_external_data=False).graph
    return Counter(n.op_type for n in graph.node)


@pytest.mark.parametrize("case", CASES)
def test_mixed_rows_in_onnxruntime(case, tiny, tmp_path):
    """Every row its own adapter or none, over a cache; the GenAI graph padded on the right, the twin on the left.

    A rotation adds two products of float32, far below the sums that the tolerance is made for.
    """
    family, specs = CASES[case]
    program = adapted(tiny, family, specs)
    emit(program, tmp_path, None, accuracy_level=0, portable=True, all_logits=True)
    weight, ids = in_memory(program), [len(specs) - 1, -1, 0, 1]
    for directory, left in ((tmp_path, False), (tmp_path / "portable", True)):
        model, cache = tiny.session(directory), {}
        assert [i.name for i in model.get_overridable_initializers()] == ["adapter_ids"]
        assert "adapter_ids" not in [i.name for i in model.get_inputs()]
        mask = torch.ones(4, 9)
        if left:
            mask[2, :3] = 0
        expected = logits(program, PROMPT, mask, weight, cache, torch.tensor(ids))
        got, past = step(tiny, model, PROMPT, mask, ids)
        assert ((got - expected) * mask[..., None]).abs().max() <= tiny.tolerance(expected)
        mask = torch.cat((mask, torch.ones(4, 1)), 1)
        expected = logits(program, PROMPT[:, :1], mask, weight, cache, torch.tensor(ids))
        got, past = step(tiny, model, PROMPT[:, :1], mask, ids, past)
        assert (got - expected).abs().max() <= tiny.tolerance(expected)


@pytest.mark.parametrize("case", CASES)
def test_without_ids_it_is_the_base_model(case, tiny, tmp_path):
    """Bit for bit in the GenAI graph and in the twin; one id stands for all rows."""
    family, specs = CASES[case]
    base, program = tiny.build(family, *BITS), adapted(tiny, family, specs)
    for name, given in (("base", base), ("adapted", program)):
        (tmp_path / name).mkdir()
        emit(given, tmp_path / name, None, portable=True, all_logits=True)
    for part in ("", "portable"):
        plain, model = (tiny.session(tmp_path / name / part) for name in ("base", "adapted"))
        expected, _ = tiny.step(plain, PROMPT, torch.ones(4, 9))
        got, _ = tiny.step(model, PROMPT, torch.ones(4, 9))
        assert torch.equal(got, expected)
        one, _ = step(tiny, model, PROMPT, torch.ones(4, 9), [1])
        all_rows, _ = step(tiny, model, PROMPT, torch.ones(4, 9), [1] * 4)
        assert torch.equal(one, all_rows) and not torch.equal(one, got)


def test_rows_padded_on_the_right(tiny, tmp_path):
    """The last real token of rows of two lengths, as GenAI pads them; the head is adapted too."""
    program = adapted(tiny, "llama", (("road_1", 14, "lm_head"), ("road_2", 16, "")), vocab_size=98)
    emit(program, tmp_path, None, accuracy_level=0)
    mask = torch.ones(4, 9)
    mask[1, 6:] = 0
    got, _ = step(tiny, tiny.session(tmp_path), PROMPT, mask, [0, 1, -1, 0])
    expected = logits(program, PROMPT, adapter_ids=torch.tensor([0, 1, -1, 0]))
    assert (got[:, 0] - expected[torch.arange(4), torch.tensor([8, 5, 8, 8])]).abs().max() <= tiny.tolerance(expected)


def extra(tiny, tmp_path, family, spec, **options):
    """Operators that an adapter adds to the GenAI graph: {kind: count}."""
    for name, program in (("base", tiny.build(family, *BITS)), ("adapted", adapted(tiny, family, (spec, spec)))):
        (tmp_path / name).mkdir()
        emit(program, tmp_path / name, None, **options)
    base, found = kinds(tmp_path / "base"), kinds(tmp_path / "adapted")
    assert not base - found
    return dict(found - base)


def test_a_turn_is_three_nodes(tiny, tmp_path):
    """q, k and v are packed as without adapters, so five rotations a layer; the rest is shared by all: the block of a
    row, and its positions for every number of groups (24 in qkv, gate and up; 12 in o and down)."""
    turns = 2 * 5
    found = extra(tiny, tmp_path, "llama", ("road_1", 16, ""))
    shared = {"Add": 1, "Shape": 1, "Expand": 1, "Gather": 2}
    assert found == {"RotaryEmbedding": turns, "Reshape": 2 * turns, **shared}


def test_a_turn_with_a_reflection_is_six_nodes(tiny, tmp_path):
    turns = 2 * 5
    found = extra(tiny, tmp_path, "llama", ("road_4", 16, ""))
    shared = {"Shape": 1, "Expand": 1, "Gather": 2}
    assert found == {"RotaryEmbedding": 2 * turns, "Reshape": 2 * turns, "Mul": turns, "Add": turns + 1, **shared}


def test_road_2_whose_outputs_agree_is_a_mere_turn(tiny, tmp_path):
    """What decides is the numbers: a road_2 adapter with one angle for both outputs of a pair."""
    program = tiny.build("llama", *BITS)
    one = random_road(program, "one", "road_1", 16, "", 0)

    def both(v):
        return v.view(-1, 1, 8).expand(-1, 2, -1).reshape(-1)

    two = {n: Rotation("road_2", 16, both(r.theta), both(r.alpha)) for n, r in one.rotations.items()}
    emit(BankRoad((Road("two", two),))(program), tmp_path, None)
    assert kinds(tmp_path)["RotaryEmbedding"] == 2 * 5


PACKED = [("qwen2", "q_proj v_proj"), ("qwen2", "k_proj"), ("phi3", "qkv_proj")]


@pytest.mark.parametrize(("kind", "targets"), PACKED)
def test_projections_are_packed_where_only_some_are_adapted(kind, targets, tiny, tmp_path):
    """Also those that are one matrix in the checkpoint: one rotation a layer, and nothing taken apart."""
    found = extra(tiny, tmp_path, kind, ("road_1", 32, targets))
    assert found == {"RotaryEmbedding": 2, "Reshape": 4, "Add": 1, "Shape": 1, "Expand": 1, "Gather": 1}


def test_projections_of_two_groups_are_not_packed(tiny, tmp_path):
    program = adapted(tiny, "llama", (("road_1", 16, "q_proj"), ("road_1", 32, "k_proj")))
    emit(program, tmp_path, None)
    base = kinds(tmp_path)
    assert (base["RotaryEmbedding"], base["MatMulNBits"]) == (2 * 2, 2 * 7 + 1)


def test_prompts_longer_than_the_tables(tiny, tmp_path):
    """RotaryEmbedding takes no sequence longer than its caches: ours counts groups, not tokens."""
    program = adapted(tiny, "llama", (("road_1", 96, "o_proj"),), max_position_embeddings=512)
    emit(program, tmp_path, None, accuracy_level=0)
    ids = torch.randint(3, 97, (2, 400), generator=torch.Generator().manual_seed(2))
    got, _ = step(tiny, tiny.session(tmp_path), ids, torch.ones(2, 400), [0, -1])
    expected = logits(program, ids, adapter_ids=torch.tensor([0, -1]))[:, -1:]
    assert (got - expected).abs().max() <= tiny.tolerance(expected)


def test_an_adapter_that_is_not_there_stops_the_run(tiny, tmp_path):
    emit(adapted(tiny, "llama", (("road_1", 16, ""),)), tmp_path, None, portable=True)
    for directory in (tmp_path, tmp_path / "portable"):
        with pytest.raises(Exception, match="out of data bounds"):
            step(tiny, tiny.session(directory), PROMPT, torch.ones(4, 9), [0, 1, -1, 0])


def files(directory):
    return sorted(p.name for p in (directory / "adapters").iterdir())


def test_adapter_files_in_onnxruntime(tiny, tmp_path):
    program = adapted(tiny, "llama", (("road_1", 16, ""), ("road_4", 16, "")))
    emit(program, tmp_path, None)
    assert files(tmp_path) == ["task0.onnx_adapter", "task1.onnx_adapter"]
    model = tiny.session(tmp_path)
    for i, name in enumerate(files(tmp_path)):
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(tmp_path / "adapters" / name))
        options.add_active_adapter(adapter)

        class Active:
            get_inputs = model.get_inputs

            @staticmethod
            def run(names, feeds, options=options):
                return model.run(names, feeds, options)

        got, _ = tiny.step(Active, PROMPT, torch.ones(4, 9))
        assert torch.equal(got, step(tiny, model, PROMPT, torch.ones(4, 9), [i])[0])


def test_the_same_program_gives_the_same_bytes(tiny, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        emit(adapted(tiny, "llama", (("road_1", 16, ""), ("road_4", 16, ""))), tmp_path / name, None, portable=True)
    a, b = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in "ab"
    )
    assert a == b


def test_the_twin_is_standard(tiny, tmp_path):
    emit(adapted(tiny, "llama", (("road_1", 16, ""), ("road_4", 16, ""))), tmp_path, None, portable=True)
    proto = onnx.load(tmp_path / "portable" / "model.onnx", load_external_data=False)
    assert {n.domain for n in proto.graph.node} == {""}
    onnx.checker.check_model(tmp_path / "portable" / "model.onnx", full_check=True)


TASKS = (("road_1", 16, ""), ("road_2", 16, "q_proj down_proj"))


def generator_of(directory, rows=1, length=60):
    model = og.Model(str(directory))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length, batch_size=rows)
    return model, og.Generator(model, params)


def test_switching_by_name_in_genai(tiny, tmp_path):
    """Greedy tokens equal the interpreter's while the best leads by more than two evaluations may differ; it does."""
    program = adapted(tiny, "llama3", TASKS)
    emit(program, tmp_path, None, accuracy_level=0)
    weight, prompt, answers = in_memory(program), PROMPT[0], []
    for i, name in enumerate((None, "task0", "task1"), -1):
        model, generator = generator_of(tmp_path)
        if name is not None:
            adapters = og.Adapters(model)
            adapters.load(str(tmp_path / "adapters" / f"{name}.onnx_adapter"), name)
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(prompt.numpy().astype(np.int32))
        for _ in range(16):
            generator.generate_next_token()
        expected = list(generate(program, prompt, 16, weight=weight, stop_at_eos=False, adapter=name))
        path = torch.cat((prompt, torch.tensor(expected)))[None]
        scores = logits(program, path, weight=weight, adapter_ids=torch.tensor([i]))[0]
        best = scores[8:-1].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 2 * tiny.tolerance(scores), "a near tie: choose another seed"
        assert generator.get_sequence(0).tolist()[9:] == expected
        answers.append(expected)
    assert len({tuple(a) for a in answers}) == 3


def test_mixed_rows_in_genai(tiny, tmp_path):
    """By a file that holds an id for every row. `set_model_input` is no way there: GenAI drops, without a word, what it
    is given for an input that has a default."""
    program = adapted(tiny, "llama3", TASKS)
    emit(program, tmp_path, None, accuracy_level=0)
    ids, rows = torch.tensor([1, -1, 0, 1]), tmp_path / "rows.onnx_adapter"
    write_file(rows, ids.tolist())
    model, generator = generator_of(tmp_path, rows=4)
    adapters = og.Adapters(model)
    adapters.load(str(rows), "rows")
    generator.set_active_adapter(adapters, "rows")
    generator.append_tokens(PROMPT.numpy().astype(np.int32))
    first = torch.from_numpy(generator.get_logits().copy()).reshape(4, -1)
    expected, base = (logits(program, PROMPT, adapter_ids=given)[:, -1] for given in (ids, None))
    assert (first - expected).abs().max() <= tiny.tolerance(expected)
    assert ((expected - base).abs().amax(-1) > 2 * tiny.tolerance(expected)).tolist() == (ids >= 0).tolist()
    for _ in range(8):
        generator.generate_next_token()
    for row, name in enumerate(("task1", None, "task0", "task1")):
        expected = list(generate(program, PROMPT[row], 8, stop_at_eos=False, adapter=name))
        assert generator.get_sequence(row).tolist()[9:] == expected

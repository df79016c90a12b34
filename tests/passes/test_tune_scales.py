"""The closing step on small random models: it begins where block-wise rounding ended, gets nearer, touches no code."""

import math
from dataclasses import replace

import pytest
import torch

from tpvc.compiler import interpret
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.ops import OPS
from tpvc.compiler.program import NORMS, Grid, QTensor, dense, linears, read
from tpvc.compiler.quick import QUICK
from tpvc.compiler.store import BlockStore
from tpvc.passes.block import EXACT, Block, embedded, spread
from tpvc.passes.round_to_nearest import RoundToNearest, quantize
from tpvc.passes.tune_scales import Streams, Tunable, TuneScales

WINDOWS = torch.randint(3, 96, (40, 16), generator=torch.Generator().manual_seed(1))
FRESH = torch.randint(3, 96, (16, 16), generator=torch.Generator().manual_seed(2))


GEMMA = {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16}
"""Beside the config of `model`; its norms multiply by their weight + 1."""


@pytest.fixture(
    params=[({}, Grid(3, 16, False)), ({}, Grid(4, -1, True)), ({}, Grid(3, 0, False)), (GEMMA, Grid(3, 16, True))],
    ids=lambda p: f"{p[0].get('model_type', 'llama')} {p[1]}",
)
def rounded(request, model, tmp_path):
    """(float Program, the same rounded to nearest, a store that ends with the float stream)."""
    fields, grid = request.param
    exact = model(num_hidden_layers=3, **fields)
    program = RoundToNearest(grid, BlockStore.open(tmp_path / "nearest", {}))(exact)
    ids = spread(len(WINDOWS), 0)
    with torch.no_grad():
        stream = embedded(exact, WINDOWS, ids)
        for index in range(exact.blocks):
            block = Block(exact, index, "cpu")
            stream = block.outputs(stream, block.weights, ids, EXACT)
    store = BlockStore.open(tmp_path / "blocks", {})
    store.save(exact.blocks - 1, {}, {}, {"exact": stream})
    return exact, program, store


def tune(rounded, path, **options) -> TuneScales:
    how = {"rounds": 4, "batch": 4, "lr": 3e-3, "held_out": 8} | options
    return TuneScales(windows=WINDOWS, blocks=rounded[2], store=BlockStore.open(path, {}), **how)


def divergence(program, wanted) -> float:
    """Mean KL(wanted || program) over fresh tokens."""
    with torch.no_grad():
        p, q = (interpret.logits(x, FRESH).log_softmax(-1) for x in (wanted, program))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_logits_come_nearer_on_tokens_that_no_step_saw(rounded, tmp_path):
    exact, program, _ = rounded
    assert divergence(tune(rounded, tmp_path / "t")(program), exact) < divergence(program, exact)


def test_only_scales_and_norms_move(rounded, tmp_path):
    _, program, _ = rounded
    tuned = tune(rounded, tmp_path / "t")(program)
    for name, parameter in program.params.items():
        before, after = read(parameter), read(tuned.params[name])
        if isinstance(before, QTensor):
            assert torch.equal(before.codes, after.codes) and before.grid == after.grid
            assert (before.zero is None) == (after.zero is None)
            assert before.zero is None or torch.equal(before.zero, after.zero)
            assert not torch.equal(before.scale, after.scale)
        else:
            assert torch.equal(before, after) == ("norm" not in name)
            assert before.dtype == after.dtype


def test_step_0_is_the_model_as_it_was(rounded, tmp_path, monkeypatch):
    """Factors of one change no bit, and the loss is the KL of the two models' logits."""
    monkeypatch.setattr("tpvc.compiler.quick.has_units", lambda device: False)  # products in float32
    exact, program, _ = rounded
    model = Tunable.of(program, "cpu")
    for name, value in model.tuned().items():
        before = read(program.params[name])
        same = (value.scale, before.scale) if isinstance(value, QTensor) else (value, before)
        assert torch.equal(*same)
    rate_0 = tune(rounded, tmp_path / "t", lr=0.0)
    rate_0(program)
    kl = rate_0.checks()[0][1]
    with torch.no_grad():
        p, q = (interpret.logits(x, WINDOWS[32:]).double().log_softmax(-1) for x in (exact, program))
    # float32 logits of size up to 10 through 3 blocks of 7 products of up to 64 terms, in another order
    assert abs(kl - float((p.exp() * (p - q)).sum(-1).mean())) <= 3 * 7 * 64 * 2**-24 * 10


def test_a_run_that_diverges_keeps_the_best_and_says_so(rounded, tmp_path):
    """A rate that throws every scale out of what float32 holds; from the start on, nothing can be kept."""
    _, program, _ = rounded
    told = []
    wild = replace(tune(rounded, tmp_path / "t", lr=1e4, rounds=10), progress=lambda *now: told.append(now))
    tuned = wild(program)
    step = wild.stopped()
    assert step is not None and step < wild.schedule.steps
    assert any("the best until then is kept" in note for *_, note in told)
    norms = {n.params["weight"] for n in program.nodes if n.op in NORMS}
    best = min(wild.checks(), key=lambda c: c[1])
    if best[0] == 0:
        assert all(torch.equal(read(tuned.params[n]), read(program.params[n])) for n in norms)
    broken = program.with_params({n: read(program.params[n]) * math.inf for n in norms})
    with pytest.raises(TpvcError, match="not finite before the closing step"):
        tune(rounded, tmp_path / "broken")(broken)
    whole = tune(rounded, tmp_path / "whole", rounds=1)
    whole(program)
    assert whole.stopped() is None


def test_gradients_are_those_of_finite_differences(rounded, monkeypatch):
    """In the direction of the gradient; float16 scales would hide small steps, these are float32."""
    monkeypatch.setattr("tpvc.compiler.quick.has_units", lambda device: False)  # products in float32
    _, program, store = rounded
    model = Tunable.of(program, "cpu")
    rows = Streams(program, WINDOWS, store).rows([0, 1, 2])
    model.divergence(*rows).backward()
    norm = torch.stack([t.grad.square().sum() for t in model.factors.values()]).sum().sqrt()
    values, step = [], 3e-3
    for sign in (1, -1):
        with torch.no_grad():
            moved = {n: sign * step * t.grad / norm for n, t in model.factors.items()}
            values.append(float(replace(model, factors=moved).divergence(*rows)))
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float(norm), rel=0.02)  # curvature to the third order, and float32 sums


def test_a_resumed_run_equals_an_uninterrupted_one(rounded, tmp_path):
    class Stop(Exception):
        pass

    def stop_half_way(stage, done, total, note):
        if 2 * done >= total:
            raise Stop

    _, program, _ = rounded
    whole = tune(rounded, tmp_path / "whole")(program)
    with pytest.raises(Stop):
        tune(rounded, tmp_path / "part", progress=stop_half_way)(program)
    part = tune(rounded, tmp_path / "part")(program)
    for name in program.params:
        a, b = read(whole.params[name]), read(part.params[name])
        assert torch.equal(*((a.scale, b.scale) if isinstance(a, QTensor) else (a, b)))


def test_a_finished_run_needs_no_stream(rounded, tmp_path):
    """The head's integers come after it and take the streams away."""
    _, program, store = rounded
    tuned = tune(rounded, tmp_path / "t")(program)
    for file in store.directory.glob("stream-*"):
        file.unlink()
    again = tune(rounded, tmp_path / "t")(program)
    name = next(n for n, p in program.params.items() if isinstance(read(p), QTensor))
    assert torch.equal(read(tuned.params[name]).scale, read(again.params[name]).scale)


def test_a_factor_of_a_norm_multiplies_what_leaves_it(rounded):
    """Also where the norm adds one to its weight: in float32, where a + 1 rounds twice."""
    model = Tunable.of(rounded[1], "cpu")
    norms = [n for n in rounded[1].nodes if n.op in NORMS and n.params["weight"] in model.factors]
    assert norms
    for node in norms:
        name = node.params["weight"]
        x = torch.randn(5, read(rounded[1].params[name]).numel(), generator=torch.Generator().manual_seed(3))
        before = OPS[node.op].compute(x, weight=model.weight(name), **node.attrs)
        with torch.no_grad():
            model.factors[name].fill_(0.5)
            after = OPS[node.op].compute(x, weight=model.weight(name), **node.attrs)
        assert torch.allclose(after, before * math.exp(0.5), rtol=2**-21, atol=0)


def test_blocks_of_few_bits_are_multiplied_quickly_and_others_are_not(model):
    """A grid for every block: 8 bits, 3 and 8."""
    program = model(num_hidden_layers=3)
    for index, bits in enumerate((8, 3, 8)):
        names = [n.params["weight"] for n in linears(program.block(index))]
        program = program.with_params({n: quantize(read(program.params[n]), Grid(bits, 16, True)) for n in names})
    assert list(Tunable.of(program, "cpu").ops) == [OPS, QUICK, OPS, QUICK]


def test_a_run_that_comes_to_no_number_leaves_what_was_best(rounded, tmp_path):
    """Factors of exp(1000) in its first steps: the model is the rounded one."""
    _, program, _ = rounded
    wild = tune(rounded, tmp_path / "t", lr=1e3)
    for name, value in wild(program).params.items():
        before, after = read(program.params[name]), read(value)
        assert torch.equal(*((before.scale, after.scale) if isinstance(before, QTensor) else (before, after)))
    assert [step for step, _ in wild.checks()] == [0]


def test_what_is_judged_is_what_is_stored(rounded):
    """Under any factors."""
    model = Tunable.of(rounded[1], "cpu")
    with torch.no_grad():
        for seed, factor in enumerate(model.factors.values()):
            factor.copy_(0.1 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(seed)))
        for name, stored in model.tuned().items():
            assert torch.equal(dense(stored), model.weight(name))


def test_scales_and_norms_keep_their_dtype(rounded, tmp_path):
    program = rounded[1]
    short = {}
    for name, parameter in program.params.items():
        value = read(parameter)
        if isinstance(value, QTensor):
            short[name] = replace(value, scale=value.scale.bfloat16().float(), scale_dtype=torch.bfloat16)
        else:
            short[name] = value.bfloat16() if "norm" in name else value
    tuned = tune(rounded, tmp_path / "t")(program.with_params(short))
    for name in short:
        value = read(tuned.params[name])
        if isinstance(value, QTensor):
            assert torch.equal(value.scale.bfloat16().float(), value.scale)
        elif "norm" in name:
            assert value.dtype == torch.bfloat16

"""Programs that round activations: the engine against the interpreter, step by step and to the end."""

import pytest
import torch
import transformers as hf

from tpvc.compiler import ops
from tpvc.compiler.adapters.road import Road, Rotation
from tpvc.compiler.backends import triton
from tpvc.compiler.backends.triton import asked, candidates, shapes_of
from tpvc.compiler.backends.triton.engine import Engine
from tpvc.compiler.backends.triton.forward import STEPS, bank_of
from tpvc.compiler.backends.triton.model import model_of
from tpvc.compiler.backends.triton.on_torch import OnTorch
from tpvc.compiler.backends.triton.steps import steps
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.interpret import in_memory, logits
from tpvc.compiler.program import Grid, dense, linears
from tpvc.kernels.launch import with_triton
from tpvc.kernels.linear import turned
from tpvc.kernels.round_rows import Rows
from tpvc.kernels.targets import parse
from tpvc.passes.bank_road import BankRoad
from tpvc.passes.round_activations import RoundActivations
from tpvc.passes.round_to_nearest import quantize as to_nearest

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
TEXTS = ([5, 9, 33, 71, 12], [40, 41, 3])
GRIDS = {
    "W8A8": ("int8", Grid(8, -1, True)),
    "W4A8": ("int8", Grid(4, 32, False)),
    "W4AFP8": ("fp8", Grid(4, -1, False)),
}
CASES = [(scheme, adapted, None) for scheme in ("W8A8", "W4A8") for adapted in (False, True)]
CASES += [("W8A8", False, with_triton), ("W4A8", True, with_triton)]


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    """A random Llama with biases and an adapter."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return load(directory)


def rounded(program, kind, grid, adapted=False):
    """With integers in the blocks' linears and 8 bits in the head."""
    made = {}
    for node in linears(program.nodes):
        name = node.params["weight"]
        on = Grid(8, -1, True) if node.block is None else grid
        made[name] = to_nearest(dense(program.params[name]), on, torch.float32)
    program = program.with_params(made)
    program = program if kind is None else RoundActivations(kind)(program)
    if not adapted:
        return program
    generator, rotations = torch.Generator().manual_seed(1), {}
    for node in linears(n for n in program.nodes if n.block is not None):
        theta, alpha = torch.randn(2, program.params[node.params["weight"]].shape[0] // 2, generator=generator)
        rotations[node.name] = Rotation("road_1", 16, theta / 2, 1 + alpha / 10)
    return BankRoad((Road("x", rotations),))(program)


def found_and_wanted(program, run=None):
    """Logits [texts, vocab] of a token after each text, by the engine and by the interpreter."""
    names = [a.name for a in program.adapters]
    owners = ["x", None] if names else [None, None]
    engine = Engine(OnTorch(model_of(program), 2, 16, run))
    slots = [engine.admit(ids, owner)[0] for ids, owner in zip(TEXTS, owners, strict=True)]
    found = engine.decode(slots, [7, 8])
    weight, wanted = in_memory(program), []
    for ids, owner, token in zip(TEXTS, owners, (7, 8), strict=True):
        own = torch.tensor([names.index(owner) if owner else -1])
        wanted.append(logits(program, torch.tensor([[*ids, token]]), weight=weight, adapter_ids=own)[0, -1])
    return found, torch.stack(wanted)


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("scheme,adapted,run", CASES, ids=lambda v: getattr(v, "__name__", str(v)))
@torch.no_grad()
def test_the_engine_computes_what_the_interpreter_does(scheme, adapted, run, floats):
    """A value on an edge may go to both sides of it, which costs one step of one number, where rounding costs all of
    them: float32 sums of K <= 96 terms are off by sqrt(K) 2^-24, over 14 products; that near to an edge, at 127 steps,
    is a share of 0.0021 of all values. Rounding costs step / sqrt(12) each, a flip a step: 0.16 of what rounding
    costs, rms."""
    kind, grid = GRIDS[scheme]
    found, wanted = found_and_wanted(rounded(floats, kind, grid, adapted), run)
    _, without = found_and_wanted(rounded(floats, None, grid, adapted))
    share = 2 * 127 * 14 * 96**0.5 * 2**-24
    assert share < 0.0021 * 1.01
    smooth = 14 * 96 * 2**-24 * float(wanted.abs().max())
    assert rms(found - wanted) <= smooth + (12 * share) ** 0.5 * rms(wanted - without)


@pytest.mark.parametrize("scheme", GRIDS)
@torch.no_grad()
def test_every_step_is_its_op(scheme, floats, monkeypatch):
    """Given what it is given: codes and scales bit for bit, products of them to float32's last digits."""
    kind, grid = GRIDS[scheme]
    program = rounded(floats, kind, grid, adapted=True)
    seen = []
    for name in ("round_rows", "linear"):
        compute = STEPS[name]

        def watched(now, step, x, compute=compute):
            seen.append((now, step, x, compute(now, step, x)))
            return seen[-1][-1]

        monkeypatch.setitem(STEPS, name, watched)
    Engine(OnTorch(model_of(program), 1, 16)).admit(TEXTS[0], "x")
    assert sum(len(s.outputs) for _, s, x, _ in seen if isinstance(x, Rows)) == 14
    for now, step, x, y in seen:
        if step.op == "round_rows":
            assert torch.equal(y.codes.float() * y.scale[:, None], ops.round_rows(x, kind=kind))
        elif isinstance(x, Rows):
            value = x.codes.float() * x.scale[:, None]
            names = zip(*(step.params[role].split("+") for role in ("weight", "bias")), strict=True)
            weights, biases = zip(*([dense(program.params[n]) for n in pair] for pair in names), strict=True)
            weight, y = torch.cat(weights), y if torch.is_tensor(y) else torch.cat(y, 1)
            wanted = ops.linear(value, weight=weight, bias=torch.cat(biases))
            size = float((value.abs() @ weight.abs().T).max() + 1)
            bank, ids = bank_of(now.model, step), now.batch.turns[tuple(step.attrs["rows"])]
            # a turn adds two products by numbers below 2
            assert float((y - turned(wanted, bank, ids)).abs().max()) <= 4 * 2 * (96 + 4) * 2**-24 * size


def test_steps_share_a_rounding(floats):
    program = rounded(floats, "int8", GRIDS["W8A8"][1])
    made = [s.op for s in steps(program)]
    block = ["round_rows", "linear", "linear", "linear", "attend", "round_rows", "linear", "norm"]
    block += ["round_rows", "linear", "linear", "gated", "round_rows", "linear", "norm"]
    assert made == ["embed", "norm", *block, *block, "linear"]


def test_what_is_compiled(floats):
    program = rounded(floats, "int8", GRIDS["W4A8"][1], adapted=True)
    model = model_of(program, torch.float16)
    sorts = {sort for sort, _ in asked(model, 32, shapes_of((1,)))[1] if not sort.startswith("attention")}
    assert sum(sort.endswith("rows int8") for sort in sorts) == len(sorts) - 1  # all but the head
    found = candidates(model, 32)
    kernels = {variant.kernel for group in found.values() for way in group for variant in way}
    assert {"round_rows:round_row", "linear_a8:slab_product_a8", "linear:slab_product"} <= kernels
    assert any("rows int8 rows 16" in key for key in found)


def test_what_kernels_cannot_do_is_refused_before_a_file_is_written(floats, tmp_path):
    def refused(kind, grid, targets="cuda:90"):
        with pytest.raises(TpvcError) as error:
            triton.emit(rounded(floats, kind, grid), tmp_path, None, parse(targets), torch.float16)
        assert not any(tmp_path.iterdir())
        return str(error.value)

    assert "q_proj' has rows rounded to int8 and groups of 16 columns" in refused("int8", Grid(4, 16, True))
    assert "rows rounded to fp8 and weights of 8 bits" in refused("fp8", Grid(8, -1, True))
    said = refused("fp8", Grid(4, -1, True), "cuda:90,cuda:80,hip:gfx942")
    assert "which cuda:80, hip:gfx942 cannot multiply" in said and "choose among cuda:89, cuda:90" in said
    with pytest.raises(TpvcError, match="q_proj' has rows rounded to int8 and a matrix in float"):
        model_of(RoundActivations("int8")(floats))

"""What a plan says of a runtime is what its backend does, over a grid of options."""

import itertools
import re

import pytest
import torch

from tpvc.compiler.backends import huggingface
from tpvc.compiler.backends.huggingface.layout import layout
from tpvc.compiler.backends.triton.model import model_of
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.plan.runtimes import matrices, verdicts
from tpvc.compiler.program import Grid, linears
from tpvc.kernels.targets import parse
from tpvc.passes.round_to_nearest import quantize as nearest


def of(program, **options):
    return {(v.runtime, v.to): v for v in verdicts(program, **options)}


def real(program):
    """The program with integers of random weights in place of headers."""
    torch.manual_seed(0)
    made = {}
    for name, p in program.params.items():
        value = torch.randn(p.shape) / 8
        made[name] = value.half() if p.grid is None else nearest(value, p.grid, torch.float16)
    return program.with_params(made)


OPTIONS = list(itertools.product((2, 3, 4, 5, 8), (-1, 8, 32, 64), (True, False), (None, "int8", "int8-static")))


@pytest.mark.parametrize("bits,group,symmetric,activations", OPTIONS)
def test_what_cannot_be_written_is_what_the_backends_refuse(headers, imagine_all, bits, group, symmetric, activations):
    program = headers(Grid(bits, group, symmetric), activations)
    found, held = of(imagine_all(program), targets=parse("cuda:80")), real(program)

    def refused(write):
        try:
            write()
        except TpvcError:
            return True
        return False

    for name, to in (("GPTQ version 2", "gptq_v2"), ("AWQ", "awq")):
        assert (found[name, to].bytes is None) == refused(lambda to=to: huggingface.PACKED[to](held))
    assert (found["vLLM", "vllm"].bytes is None) == refused(lambda: layout(held, "vllm"))
    triton = next(v for (_, to), v in found.items() if to == "triton")
    assert (triton.bytes is None) == refused(lambda: model_of(held, torch.float16))
    assert found["ONNX Runtime GenAI", "onnx"].loads == "yes"


def test_vllm(headers, imagine_all):
    def vllm(*grid, activations=None, **config):
        return of(imagine_all(headers(Grid(*grid), activations, **config)))["vLLM", "vllm"]

    whole = vllm(4, 64, True)
    assert (whole.loads, whole.change) == ("yes", None) and "Marlin" in whole.path and "filled" not in whole.path
    odd = vllm(4, 32, False, hidden_size=96, intermediate_size=256)
    assert odd.loads == "yes" and "192x96 is filled up" in odd.path
    assert vllm(4, 16, True).change == "--group-size 128"
    assert vllm(4, 16, True, hidden_size=64, intermediate_size=192).change == "--group-size 64"
    assert vllm(3, 64, True).loads == vllm(8, 64, False).loads == "perhaps"
    assert vllm(8, -1, True, activations="int8").loads == "yes"
    static = vllm(8, -1, True, activations="int8-static")
    assert static.loads == "yes" and static.path == "CUTLASS, int8 on a static grid with a zero point"
    assert vllm(8, -1, False, activations="int8").change == "--group-size -1 --sym"
    assert vllm(4, 128, True, activations="fp8").path.startswith("CUTLASS W4A8 on Hopper")
    assert vllm(4, 64, True, activations="fp8").loads == "no"
    assert vllm(4, 0, True).change == "--group-size -1"


def test_linears_that_vllm_joins_have_to_be_on_one_grid(headers, imagine_all):
    program = headers(Grid(4, 64, True))
    key = next(n.params["weight"] for n in linears(program.nodes) if "k_proj" in n.name)
    other = headers(Grid(8, 64, True)).params[key]
    found = of(imagine_all(program.with_params({key: other})))
    assert found["vLLM", "vllm"].loads == "no" and "k_proj" in found["vLLM", "vllm"].path
    assert re.search(r"vLLM refuses different grids for .*k_proj", found["GPTQ", "gptq"].path)


def test_marlins_groups(headers, imagine_all):
    whole, odd = (of(imagine_all(headers(Grid(4, group, True)))) for group in (64, 16))
    for key in (("GPTQ", "gptq"), ("AWQ", "awq")):
        assert whole[key].path.endswith("vLLM's Marlin")
        assert odd[key].path.endswith("vLLM refuses groups of 16")


def test_gptq_version_1_depends_on_numbers(headers, imagine_all):
    assert of(imagine_all(headers(Grid(4, 64, True))))["GPTQ", "gptq"].change is None
    asymmetric = of(imagine_all(headers(Grid(4, 64, False))))["GPTQ", "gptq"]
    assert asymmetric.change == "--sym, or --to gptq_v2" and "vLLM refuses" in asymmetric.path


def test_onnx_layouts_and_their_speed(headers, imagine_all):
    def onnx(*grid, level=4, **config):
        return of(imagine_all(headers(Grid(*grid), **config)), accuracy_level=level)["ONNX Runtime GenAI", "onnx"]

    assert "4 bits in blocks of 64; GroupQueryAttention" in onnx(3, 64, True).path
    assert onnx(8, 64, True).change is None
    assert onnx(8, 64, True, level=0).change.startswith("--accuracy-level 4")
    assert "filled up" in onnx(4, 24, True, hidden_size=96).path
    assert "level" in onnx(4, 64, True, level=3).path and onnx(4, 64, True, level=3).loads == "no"


def test_triton_targets(headers, imagine_all):
    def triton(*grid, targets="cuda:80,hip:gfx1100", **options):
        found = verdicts(imagine_all(headers(Grid(*grid), **options)), targets=parse(targets))
        return {v.runtime: v for v in found if v.to == "triton"}

    assert triton(4, 64, True)["Triton"].loads == "yes"
    assert triton(3, 64, True)["Triton, hip:gfx1100"].change == "--bits 4 or --bits 2"
    assert triton(3, 64, True)["Triton, cuda:80"].loads == "yes"
    fp8 = triton(4, -1, True, activations="fp8", targets="cuda:80,cuda:90")
    assert (fp8["Triton, cuda:80"].loads, fp8["Triton, cuda:90"].loads) == ("no", "yes")
    assert "multiple of 16" in triton(4, 8, True)["Triton"].path


def test_matrices(headers):
    found = matrices(headers(Grid(4, 64, True), "int8"))
    assert len(found) == 14
    assert {(m.outputs, m.columns) for m in found} == {(128, 128), (64, 128), (384, 128), (128, 384)}
    assert {m.rows for m in found} == {"int8"}

import pytest
import torch

from tpvc.compiler.compressed_tensors_format import Form, entries, from_tensors, quantization_config, to_tensors
from tpvc.compiler.program import Grid, QTensor

FORMS = [Form(), Form(packed=False), Form(packed_zeros=True)]
GRIDS = [Grid(bits, group, symmetric) for bits in (2, 3, 8) for group in (0, -1, 10) for symmetric in (True, False)]


def random_codes(grid: Grid, scale_dtype: torch.dtype = torch.float16) -> QTensor:
    g = torch.Generator().manual_seed(grid.bits)
    scale = (1, 1) if grid.group == 0 else (7, 30 // grid.columns(30))
    top = 2**grid.bits
    return QTensor(
        torch.randint(top, (7, 30), generator=g).to(torch.uint8),
        torch.randn(scale, generator=g).to(scale_dtype).float(),
        None if grid.symmetric else torch.randint(top, scale, generator=g).to(torch.uint8),
        grid,
        scale_dtype,
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_there_and_back(grid, form):
    was = random_codes(grid)
    tensors = to_tensors(was, form)
    announced = entries(was.shape, grid, was.scale_dtype, form)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == announced
    now = from_tensors(tensors, grid)
    assert torch.equal(now.codes, was.codes) and torch.equal(now.scale, was.scale)
    assert (now.zero is None) == grid.symmetric and (grid.symmetric or torch.equal(now.zero, was.zero))
    assert now.scale.dtype == torch.float32 and now.scale_dtype == was.scale_dtype
    assert torch.equal(now.dequantize(), was.dequantize())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_library_dequantises_the_same(grid, form):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationConfig

    was = random_codes(grid, torch.float32)
    config = QuantizationConfig.model_validate(quantization_config({"m": (grid, 30, form)}, []))
    (scheme,) = config.config_groups.values()
    reader = compressors.BaseCompressor.get_value_from_registry(form.name)
    # One product of a difference of integers, exact, and a float32: rounded once by both.
    assert torch.equal(reader.decompress(to_tensors(was, form), scheme)["weight"], was.dequantize())


def test_the_most_common_group_targets_the_class_and_stands_last():
    common, other = (Grid(4, 32, True), 64, Form()), (Grid(3, -1, True), 64, Form())
    head = (Grid(8, -1, True), 64, Form(packed=False))
    modules = {"a": common, "b": common, "c": other, "embed": head, "lm_head": head}
    config = quantization_config(modules, ["z", "y"])
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [["c"], ["embed", "lm_head"], ["Linear"]]
    assert config["format"] == "mixed-precision" and config["ignore"] == ["y", "z"]


def test_rows_of_two_lengths_with_a_zero_point_a_row_are_two_groups():
    grid = Grid(4, -1, False)
    config = quantization_config({"a": (grid, 64, Form()), "b": (grid, 96, Form()), "c": (grid, 64, Form())}, [])
    blocks = [group["weights"]["block_structure"] for group in config["config_groups"].values()]
    assert blocks == [[1, 96], [1, 64]]


def test_scales_that_would_be_rounded_are_refused():
    q = random_codes(Grid(4, 10, True), torch.float32)
    with pytest.raises(ValueError, match="not exact"):
        to_tensors(QTensor(q.codes, q.scale, None, q.grid, torch.bfloat16), Form())

"""The quickest tiles win, what cannot run is passed over, and the answer is measured once."""

import pytest
import torch

from tpvc.compiler.backends.triton import asked, shapes_of, tiles
from tpvc.compiler.backends.triton.engine import Engine
from tpvc.compiler.backends.triton.model import model_of
from tpvc.compiler.backends.triton.on_torch import OnTorch
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import load
from tpvc.compiler.program import Grid, dense, linears
from tpvc.kernels.launch import Config
from tpvc.passes.round_to_nearest import quantize as to_nearest


@pytest.fixture(scope="module")
def model(tiny_llama):
    program = load(tiny_llama)
    names = [n.params["weight"] for n in linears(program.nodes)]
    grid = Grid(4, 32, False)
    return model_of(program.with_params({n: to_nearest(dense(program.params[n]), grid, torch.float32) for n in names}))


def test_the_quickest_that_runs_is_taken(model):
    launches = []

    def run(launch):
        if launch.constants.get("BLOCK_N") in (64, 256):
            raise TpvcError("the package has no such binary")
        launches.append(launch)

    def seconds(work):
        launches.clear()
        work(run)
        return 1 / launches[0].constants["BLOCK_N"]  # wider is quicker here

    _, choices = asked(model, 16, shapes_of((1,)))
    found = tiles.chosen(choices, seconds)
    assert found.keys() == choices.keys()
    linears = {key: config for key, config in found.items() if key[0].startswith("in ")}
    assert {rows for _, rows in linears} == {1, 16, 128}
    assert {config.block_n for config in linears.values()} == {128}
    others = {key: config for key, config in found.items() if key not in linears}
    assert others and all(config == list(choices[key])[1] for key, config in others.items())  # the first has 64

    def nothing(work):
        raise TpvcError("the package has no such binary")

    with pytest.raises(TpvcError, match="no such binary"):
        tiles.chosen(choices, nothing)

    launched = []
    Engine(OnTorch(model, 1, 16, launched.append, found)).admit([1, 2, 3])
    products = [launch for launch in launched if launch.kernel == "linear:slab_product"]
    assert products and all(launch.constants["BLOCK_N"] == 128 for launch in products)


def test_it_is_measured_once_and_a_damaged_answer_again(tmp_path):
    found, calls = {("in 4", 1): Config(1, 64, 2, 4, 2)}, []
    choices = {key: {config: None} for key, config in found.items()}

    def measure():
        calls.append(1)
        return found

    path = tmp_path / "deep" / "tiles.json"
    assert tiles.kept(path, choices, measure) == tiles.kept(path, choices, measure) == found and len(calls) == 1
    path.write_text("{")
    assert tiles.kept(path, choices, measure) == found and len(calls) == 2
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]


def test_an_answer_for_fewer_rows_is_measured_again(tmp_path):
    one, path, calls = Config(1, 64, 2, 4, 2), tmp_path / "tiles.json", []
    few, many = ({("in 4", rows): {one: None} for rows in counts} for counts in ((1,), (1, 2)))

    def measured(choices):
        def measure():
            calls.append(len(choices))
            return {key: next(iter(works)) for key, works in choices.items()}

        return tiles.kept(path, choices, measure)

    assert measured(few).keys() == few.keys() and measured(many).keys() == many.keys()
    measured(few), measured(many)  # what there is for many does for few
    assert calls == [1, 2]
    assert measured({("in 4", 1): {Config(1, 128, 2, 4, 2): None}})["in 4", 1].block_n == 128  # no candidate any more


def test_a_place_that_cannot_be_written_to_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    found = {("in 4", 1): Config(1, 64, 2, 4, 2)}
    choices = {key: {config: None} for key, config in found.items()}
    assert tiles.kept(tmp_path / "file" / "tiles.json", choices, lambda: found) == found


def test_another_package_or_device_has_its_own_answer(tmp_path):
    (tmp_path / "a.json").write_text("a")
    (tmp_path / "b.json").write_text("b")
    names = {tiles.file_of(tmp_path / f, d) for f in ("a.json", "b.json") for d in ("H100", "H200")}
    assert len(names) == 4

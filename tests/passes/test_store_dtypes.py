"""What passes made anew is written in the dtypes of the checkpoint, or refused."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Grid, read
from tpvc.passes.round_to_nearest import quantize
from tpvc.passes.store_dtypes import store_dtypes

NORM, LINEAR = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def short(model):
    program = model()
    return replace(program, params={name: p.to(torch.float16) for name, p in program.params.items()})


def test_what_changed_is_rounded_once_and_the_rest_is_the_same(short):
    made = short.with_params({NORM: read(short.params[NORM]).float() + 2**-12, "new": torch.ones(2)})
    stored = store_dtypes(made, short)
    assert torch.equal(read(stored.params[NORM]), read(made.params[NORM]).half())
    assert stored.params[LINEAR] is short.params[LINEAR] and stored.params["new"] is made.params["new"]


def test_integers_stay(short):
    made = short.with_params({LINEAR: quantize(read(short.params[LINEAR]), Grid(4, 16, True))})
    assert store_dtypes(made, short).params[LINEAR] is made.params[LINEAR]


def test_a_number_that_the_dtype_does_not_hold_is_refused_when_it_is_read(short):
    stored = store_dtypes(short.with_params({NORM: read(short.params[NORM]).float() * 1e5}), short)
    with pytest.raises(TpvcError, match="has numbers now that float16, its dtype in the checkpoint"):
        read(stored.params[NORM])

"""What a run of quantize is to do is checked before anything is read or written."""

import pytest

import tpvc
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.job import default_group


def test_default_group_divides_every_weight(tiny_llama):
    assert default_group(tpvc.load(tiny_llama)) == 64


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "gptq"}, "expected flexround or rtn"),
        ({"recipe": "slow"}, "fast, default, best, lrq, paper"),
        ({"head_bits": 1}, "head bits is 1"),
        ({"seqlen": 1}, "windows of 1 token"),
        ({"group": 48}, "32, 64"),
        ({"bits": 9}, "2 to 8"),
    ],
)
def test_bad_options_are_one_sentence_before_any_work(tiny_llama, tmp_path, options, says):
    with pytest.raises(TpvcError) as error:
        tpvc.quantize(tiny_llama, tmp_path / "out", **options)
    assert says in str(error.value)
    assert list(tmp_path.iterdir()) == []

"""The promises on real weights: learned rounding beats rounding to nearest on the packed, reloaded artefact.

Fetches the demo model; minutes on two cores: `pytest -m slow tests/test_demo_model.py`.
"""

import pytest
import torch

from tpvc.compiler import evaluate, frontends, interpret
from tpvc.compiler.frontends import demo
from tpvc.compiler.measure import HELD_OUT
from tpvc.compiler.pipeline import quantize

pytestmark = pytest.mark.slow
GRIDS = [(4, -1), (3, -1), (3, 64), (2, 64)]


@pytest.fixture(scope="module")
def tokens():
    program = frontends.load(demo.fetch())
    return evaluate.text_windows(HELD_OUT, frontends.tokenizer(program), 6, 256)


def perplexity(artefact, tokens) -> float:
    program = frontends.load(artefact)
    return evaluate.perplexity(program, tokens, interpret.in_memory(program)).value


@pytest.mark.parametrize(("bits", "group"), GRIDS)
def test_learned_rounding_beats_nearest(tokens, tmp_path, bits, group):
    options = {"bits": bits, "group": group, "head_bits": 16, "nsamples": 64, "seqlen": 256}
    nearest = perplexity(quantize("smollm2-135m", tmp_path / "rtn", method="rtn", **options), tokens)
    learned = perplexity(quantize("smollm2-135m", tmp_path / "flex", steps=25, **options), tokens)
    assert learned < nearest


@torch.no_grad()
def test_transformers_reads_the_artefact_as_we_do(tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    artefact = quantize("smollm2-135m", tmp_path / "rtn", method="rtn", bits=4, group=64)
    theirs = AutoModelForCausalLM.from_pretrained(artefact, dtype=torch.float32)
    ours = interpret.logits(frontends.load(artefact), tokens[:1])
    wanted = theirs(tokens[:1]).logits
    # 30 blocks of 4 products over at most 1536 terms, each rounded to 2^-24 of the running sum
    assert float((ours - wanted).abs().max()) <= 30 * 4 * 1536**0.5 * 2**-24 * float(wanted.abs().max())

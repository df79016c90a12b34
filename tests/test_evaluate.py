"""Perplexity and divergence against formulas written out, on a small random Program."""

import math

import pytest
import torch

from tpvc.compiler import evaluate
from tpvc.compiler.adapters.road import Road, Rotation
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.interpret import in_memory, logits
from tpvc.compiler.program import Program, linears
from tpvc.compiler.verify import verify
from tpvc.passes.bank_road import BankRoad

VOCAB = 61


def tiny(seed=0, kind="llama", **changes):
    config = {
        "model_type": kind,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": True,
    }
    config |= changes
    arch = architecture(config)
    generator = torch.Generator().manual_seed(seed)
    params = {n: torch.randn(s, generator=generator) * 0.3 for n, s in arch.shapes.items()}
    return verify(Program(arch.nodes, params, arch.facts))


def windows(n, length, seed=3):
    return torch.randint(0, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


class Letters:
    """A tokenizer of one token a character, which ends a text with token 0."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [ord(c) % VOCAB for c in text]
        return {"input_ids": [*ids, 0] if add_special_tokens else ids}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk", [1 << 24, 7 * VOCAB])
def test_perplexity_is_its_definition(monkeypatch, kind, chunk):
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    program, tokens = tiny(kind=kind), windows(6, 17)
    with torch.no_grad():
        chances = logits(program, tokens).double().log_softmax(-1)
    nll = -chances[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].mean(-1)
    found = evaluate.perplexity(program, tokens, in_memory(program))
    # float32 sums of at most 61 terms of a size of about 10 each: 61 * 10 * 2^-24 = 4e-5
    assert torch.tensor(found.nll).double() == pytest.approx(nll, abs=4e-5)
    assert found.value == pytest.approx(math.exp(nll.mean()), rel=4e-5)
    assert found.stderr == pytest.approx(found.value * nll.std().item() / math.sqrt(6), rel=1e-3)


def test_one_window_has_no_standard_error():
    assert math.isnan(evaluate.perplexity(tiny(), windows(1, 9)).stderr)


@pytest.mark.parametrize("chunk", [1 << 24, 5 * VOCAB])
def test_divergence_is_its_definition(monkeypatch, chunk):
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    program, reference, tokens = tiny(1), tiny(2), windows(5, 12)
    with torch.no_grad():
        q, p = (logits(x, tokens)[:, :-1].double().log_softmax(-1) for x in (program, reference))
    found = evaluate.divergence(program, reference, tokens)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def test_divergence_from_itself_is_nothing():
    assert evaluate.divergence(tiny(), tiny(), windows(5, 12)) == evaluate.Divergence(0.0, 1.0)


def test_only_models_of_one_vocabulary_are_compared():
    with pytest.raises(TpvcError, match="61 and 40"):
        evaluate.divergence(tiny(), tiny(vocab_size=40), windows(2, 8) % 40)


def test_progress_counts_windows(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 3 * VOCAB)
    seen = []
    evaluate.perplexity(tiny(), windows(6, 8), progress=lambda *step: seen.append(step))
    assert seen == [("perplexity", i, 6, "windows") for i in range(7)]


def test_score_is_both_of_them_in_one_go():
    """The same numbers: every model computes the same batches, and sums run in the same order."""
    program, reference, tokens = tiny(1), tiny(2), windows(5, 12)
    found = evaluate.score(evaluate.predictor(program), tokens, evaluate.predictor(reference))
    assert found.perplexity == evaluate.perplexity(program, tokens)
    assert found.reference == evaluate.perplexity(reference, tokens)
    assert found.divergence == evaluate.divergence(program, reference, tokens)


def test_an_adapter_is_scored_by_its_name():
    """The head is adapted too, which lies behind the cut; without a name it is the base model."""
    program, tokens = tiny(1, tie_word_embeddings=False, vocab_size=60), windows(5, 12) % 60
    generator = torch.Generator().manual_seed(4)
    rotations = {}
    for node in linears(program.nodes):
        theta, alpha = torch.randn(2, program.params[node.params["weight"]].shape[0] // 2, generator=generator)
        rotations[node.name] = Rotation("road_1", 4, theta / 2, 1 + alpha / 10)
    adapted = verify(BankRoad((Road("task", rotations),))(program))
    found = evaluate.score(evaluate.predictor(adapted, adapter="task"), tokens).perplexity
    chances = logits(adapted, tokens, adapter_ids=torch.zeros(5, dtype=torch.int64)).double().log_softmax(-1)
    nll = -chances[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].mean(-1)
    # As above: float32 sums of at most 61 terms of a size of about 10 each
    assert torch.tensor(found.nll).double() == pytest.approx(nll, abs=4e-5)
    assert evaluate.perplexity(adapted, tokens).nll == evaluate.perplexity(program, tokens).nll != found.nll
    with pytest.raises(TpvcError, match="no adapter 'other'; it has task"):
        evaluate.predictor(adapted, adapter="other")


def test_any_function_that_gives_logits_is_scored(monkeypatch):
    """A runtime that takes a window at a time; pieces of one batch and of one window belong together."""
    monkeypatch.setattr(evaluate, "CHUNK", 5 * VOCAB)
    program, tokens = tiny(1), windows(6, 17)

    def one_by_one(given):
        return evaluate.pieces((logits(program, window[None])[0, :-1] for window in given), VOCAB)

    runtime = evaluate.Predictor(VOCAB, 64, one_by_one)
    found = evaluate.score(runtime, tokens, evaluate.predictor(program))
    # As above: float32 sums of at most 61 terms of a size of about 10 each
    assert found.perplexity.nll == pytest.approx(found.reference.nll, abs=4e-5)
    assert abs(found.divergence.kl) < 4e-5


def test_text_windows_are_the_first_tokens_without_special_ones(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one line\nanother – line\n", encoding="utf-8")
    expected = [ord(c) % VOCAB for c in "one line\nanother"]
    found = evaluate.text_windows(path, Letters(), 2, 8)
    assert found.dtype == torch.int64
    assert found.tolist() == [expected[:8], expected[8:]]


def test_bad_texts_are_one_clear_error(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("short")
    with pytest.raises(TpvcError, match=r"holds 5 tokens, 2 windows of 4 need 8; .*at most 1 of 4"):
        evaluate.text_windows(path, Letters(), 2, 4)
    with pytest.raises(TpvcError, match="expected at least 1 window of 2"):
        evaluate.text_windows(path, Letters(), 0, 4)
    with pytest.raises(TpvcError, match="cannot be read"):
        evaluate.text_windows(tmp_path / "absent.txt", Letters(), 1, 4)
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(TpvcError, match="not UTF-8 at byte 3"):
        evaluate.text_windows(path, Letters(), 1, 4)


def test_windows_that_the_model_cannot_take():
    with pytest.raises(TpvcError, match="context of 64"):
        evaluate.perplexity(tiny(), windows(1, 65))
    with pytest.raises(TpvcError, match="tokenizer is not this model's"):
        evaluate.perplexity(tiny(vocab_size=20), windows(4, 16))
    for shape in ((0, 8), (3, 1)):
        with pytest.raises(TpvcError, match="expected at least 1 window of 2"):
            evaluate.divergence(tiny(), tiny(), windows(*shape))

"""Windows begin as every text does that the model is given, wherever they are cut."""

from copy import deepcopy

import pytest
import torch

from tpvc.compiler import frontends
from tpvc.compiler.calibration import calibrate, interleaved
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.evaluate import text_windows
from tpvc.compiler.tuning.texts import read_held_out, windows
from tpvc.compiler.windows import beginning, cut, encode, encode_behind, text_tokens

TEXT = "The dog sleeps on, and the fox jumps. " * 60


@pytest.fixture(scope="module")
def loaded(tiny_llama, tiny_tokenizer):
    """A model, its tokenizer, and one that begins every text with token 0 and ends it with token 1."""
    from tokenizers.processors import TemplateProcessing

    begins = deepcopy(tiny_tokenizer)
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 1)]
    )
    return frontends.load(tiny_llama), tiny_tokenizer, begins


def test_the_beginning_is_what_stands_before_a_text(loaded):
    _, plain, begins = loaded
    assert beginning(plain) == []
    assert beginning(begins) == [0]
    assert encode(begins, "fox") == encode(plain, "fox")


def test_every_window_begins_with_it_and_goes_on_where_the_last_one_ended():
    assert cut(list(range(10, 18)), [], 4).tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert cut(list(range(10, 18)), [0], 4).tolist() == [[0, 10, 11, 12], [0, 13, 14, 15]]
    assert cut([10], [0], 4).shape == (0, 4)


def test_windows_have_a_token_to_predict():
    assert text_tokens([0], 2) == 1
    for begin, seqlen in (([], 1), ([0, 5], 2)):
        with pytest.raises(TpvcError, match=f"ask for at least {seqlen + 1}"):
            text_tokens(begin, seqlen)


def test_text_for_measuring_calibration_and_tuning(loaded, tmp_path):
    program, plain, begins = loaded
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    ids = encode(plain, TEXT)
    expected = torch.tensor([[0, *ids[7 * i : 7 * i + 7]] for i in range(6)])
    assert torch.equal(text_windows(path, begins, 6, 8), expected)
    assert torch.equal(calibrate(program, begins, str(path), 6, 8, 0).tokens, expected)
    learned = windows(program, begins, path, 8)
    assert [e.ids for e in learned[:6]] == [tuple(w) for w in expected.tolist()]
    assert {e.answer for e in learned} == {1} and len(learned) == len(ids) // 7
    with pytest.raises(TpvcError, match=f"at most {len(ids) // 7} of 8"):
        text_windows(path, begins, 10_000, 8)


def test_documents_that_spell_their_beginning(loaded, tmp_path):
    program, plain, begins = loaded
    path = tmp_path / "chats.jsonl"
    path.write_text("".join('{"text": "<|endoftext|>' + TEXT + '"}\n' for _ in range(2)))
    ids = encode(plain, TEXT)
    found = calibrate(program, begins, str(path), 4, 8, 0).tokens
    assert found.tolist() == [[0, *ids[7 * i : 7 * i + 7]] for i in range(4)]
    assert [list(e.ids) for e in windows(program, begins, path, 8)[:4]] == found.tolist()
    assert encode_behind(begins, "<|endoftext|>fox", []) == [0, *encode(begins, "fox")]


def test_text_that_comes_with_tpvc_for_measuring(loaded):
    _, plain, begins = loaded
    with_it, without = (read_held_out(t, n) for t, n in ((begins, 17), (plain, 16)))
    assert [e.ids[1:] for e in with_it] == [e.ids for e in without]
    assert {(e.ids[0], e.answer) for e in with_it} == {(0, 1)}


def test_built_in_and_sampled_text(loaded):
    program, plain, begins = loaded
    assert interleaved([[10, 11, 12], [20, 21]], [0], 3).tolist() == [[0, 10, 11], [0, 20, 21]]
    found = calibrate(program, begins, "builtin", 5, 16, 0).tokens
    assert set(found[:, 0].tolist()) == {0}
    assert torch.equal(found[:, 1:], calibrate(program, plain, "builtin", 5, 15, 0).tokens)
    sampled = calibrate(program, begins, "self", 5, 16, 0).tokens
    assert set(sampled[:, 0].tolist()) == {0} and int(sampled[:, 1].min()) > 1

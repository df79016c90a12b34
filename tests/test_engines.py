"""The two runtimes behind `Engine`: text in pieces, room in the context, sizes."""

import json
import shutil

import pytest
import torch
import transformers

import tpvc
from tpvc.compiler.engines import open_engine, room
from tpvc.compiler.engines.genai import _text
from tpvc.compiler.errors import TpvcError

TEXT = "Wer früh aufsteht, sieht Ѩ 日本 🦊 and more."


def pieces(decode, ids):
    return [decode(i) for i in ids]


@pytest.fixture(scope="module")
def engines(tmp_path_factory, tiny_llama):
    from tpvc.compiler.export_pipeline import export

    out = tmp_path_factory.mktemp("chat") / "onnx"
    export(tiny_llama, out)
    return open_engine(str(tiny_llama), 1), open_engine(str(out), 1)


def test_streamed_pieces_make_the_text(engines):
    """No piece holds half a character, though the tokenizer's tokens do."""
    for engine in engines:
        ids = engine.encode(TEXT)
        parts = pieces(engine.decoder(), ids)
        assert "".join(parts) == TEXT
        assert len(ids) > len(TEXT) / 2
        assert not any("\ufffd" in p for p in parts)


def test_both_encode_alike(engines):
    a, b = engines
    messages = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "x"}]
    assert a.encode(TEXT) == b.encode(TEXT)
    assert a.encode(messages) == b.encode(messages)


@pytest.mark.parametrize("pair", ["$A $B", "$A <|im_end|> $B"])
def test_both_begin_a_text_as_the_tokenizer_does(tmp_path, tiny_llama, pair):
    """A raw prompt gets the beginning of text and nothing else that the file names; a chat has it from its template."""
    from tokenizers.processors import TemplateProcessing

    from tpvc.compiler.export_pipeline import export

    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", pair=pair, special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 1)]
    )
    tokenizer.chat_template = "<|endoftext|>" + tokenizer.chat_template
    tokenizer.save_pretrained(source)
    export(source, tmp_path / "onnx")
    a, b = open_engine(str(source), 1), open_engine(str(tmp_path / "onnx"), 1)
    messages = [{"role": "user", "content": TEXT}]
    plain = tokenizer.encode(TEXT, add_special_tokens=False)
    assert a.encode(TEXT) == b.encode(TEXT) == [0, *plain]
    assert a.encode(messages) == b.encode(messages)
    assert a.encode(messages)[0] == 0 and a.encode(messages).count(0) == 1
    assert a.encode("<|endoftext|>" + TEXT) == b.encode("<|endoftext|>" + TEXT) == [0, *plain]


def test_facts_agree(engines, tiny_llama):
    a, b = engines
    assert (a.vocab_size, a.context_length) == (b.vocab_size, b.context_length) == (384, 256)
    assert a.size == (tiny_llama / "model.safetensors").stat().st_size
    assert abs(a.size - b.size) < 1e5


def test_logits_agree(engines):
    """Both are the float model: what differs is the order of sums of up to 128 float32 terms, three in each block."""
    import numpy as np

    a, b = (engine.logits(engines[0].encode(TEXT)) for engine in engines)
    assert a.shape == b.shape
    assert np.abs(a - b).max() < 128 * 6 * np.finfo(np.float32).eps * np.abs(a).max()


def test_an_unstopped_run_gives_every_token(engines):
    for engine in engines:
        assert len(list(engine.generate([5, 6, 7], 40, stop=False))) == 40


def test_room(engines):
    engine = engines[0]
    assert room(engine.context_length, [1] * 10, 20) == 20
    assert room(engine.context_length, [1] * 250, 20) == 6
    with pytest.raises(TpvcError, match="context holds 256"):
        room(engine.context_length, [1] * 256, 1)
    with pytest.raises(TpvcError, match="empty"):
        room(engine.context_length, [], 1)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory, write_adapter, tiny_llama):
    """Two adapters over one integer base: the artefact and its folder for GenAI, which computes in float32."""
    out = tmp_path_factory.mktemp("deployed")
    roads = {name: write_adapter(tiny_llama, out / name, seed) for seed, name in enumerate(("loud", "calm"))}
    artefact = tpvc.quantize(tiny_llama, out / "w4", method="rtn", group=32, roads=roads)
    return artefact, tpvc.export(artefact, out / "onnx", accuracy_level=0)


def test_adapters_by_name(deployed):
    """Both runtimes write and score alike under each adapter, and each adapter otherwise than the others.

    Logits: sums of up to 128 float32 terms, three in each block, as above.
    """
    ids = [5, 6, 7, 200, 9, 30]
    seen = []
    for name in (None, "loud", "calm"):
        a, b = (open_engine(str(target), 1, name) for target in deployed)
        scores = a.logits(ids)
        bound = 128 * 6 * torch.finfo(torch.float32).eps * abs(scores).max()
        assert abs(scores - b.logits(ids)).max() < bound
        assert all(abs(scores - other).max() > 100 * bound for other in seen)
        assert list(a.generate(ids, 12)) == list(b.generate(ids, 12))
        seen.append(scores)


def test_unknown_adapters(deployed, tiny_llama, tmp_path):
    for target in deployed:
        with pytest.raises(TpvcError, match=r"^the model has no adapter 'load'; it has (calm, loud|loud, calm)$"):
            open_engine(str(target), 1, "load")
    plain = tmp_path / "plain"
    tpvc.export(tiny_llama, plain)
    for target in (tiny_llama, plain):
        with pytest.raises(TpvcError, match=r"^the model has no adapter 'loud'; it has none$"):
            open_engine(str(target), 1, "loud")


def test_a_folder_that_is_not_one(tmp_path):
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"type": "llama"}}))
    with pytest.raises(TpvcError, match="lacks what ONNX Runtime GenAI needs"):
        open_engine(str(tmp_path))


def test_a_word_list_is_read_through_transformers(tmp_path):
    """GenAI takes it without an error, and finds id -1 for its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "sky": 2, "is": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    encode, decoder = _text(tmp_path, None)
    assert encode("the sky is blue") == [1, 2, 3, 0]
    assert "sky" in decoder()(2)

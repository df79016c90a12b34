"""Windows of calibration text from every kind of source, on a model and a tokenizer small enough to follow."""

import csv
import hashlib
import json
import sys
import types
from itertools import chain

import pytest
import torch

from tpvc.compiler import sample as sampling
from tpvc.compiler.calibration import builtin, calibrate, interleaved
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.evaluate import text_windows
from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.interpret import logits
from tpvc.compiler.program import Program
from tpvc.compiler.sample import batch_size, sample
from tpvc.compiler.verify import verify
from tpvc.compiler.windows import encode

VOCAB = 264
TEXTS = ["A first document, with words. ", "Zweites Stück: größer! ", "and the last one, 12345 and so on and on. "]


def bytewise(chat=False):
    """A byte-level tokenizer without merges, of the kind that real models come with: 3 special tokens, 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(["<s>", "</s>", "<pad>", *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if chat:
        tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return bytewise()


@pytest.fixture(scope="module")
def program():
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    }
    arch = architecture(config)
    generator = torch.Generator().manual_seed(0)
    params = {n: torch.randn(s, generator=generator) * 0.5 for n, s in arch.shapes.items()}
    return verify(Program(arch.nodes, params, arch.facts))


def jsonl(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n", encoding="utf-8")


def table(path, header, rows, delimiter=","):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.table(columns), path)


def text_of(calibration, tokenizer):
    return tokenizer.decode(calibration.tokens.flatten(), clean_up_tokenization_spaces=False)


def test_a_text_file_gives_the_windows_that_evaluation_takes(program, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(TEXTS) + "\n  \n\nend", encoding="utf-8")
    found = calibrate(program, tokenizer, str(path), 3, 16, 0)
    assert found.tokens.dtype == torch.int64
    assert torch.equal(found.tokens, text_windows(path, tokenizer, 3, 16))
    assert found.origin == {
        "dataset": str(path),
        "files": {"text.txt": hashlib.sha256(path.read_bytes()).hexdigest()},
        "tokens": 48,
        "sampled_tokens": 0,
        "sha256": hashlib.sha256(b"".join(int(t).to_bytes(8, "little") for t in found.tokens.flatten())).hexdigest(),
        "nsamples": 3,
        "seqlen": 16,
        "seed": 0,
    }
    json.dumps(found.origin)


FILES = {
    "mark.txt": (lambda p: p.write_text("".join(TEXTS), encoding="utf-8-sig"), None),
    "mark.jsonl": (
        lambda p: p.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS), encoding="utf-8-sig"),
        None,
    ),
    "text.jsonl": (lambda p: jsonl(p, [{"text": t, "id": 1} for t in TEXTS]), None),
    "pairs.jsonl": (lambda p: jsonl(p, [{"prompt": t[:5], "completion": t[5:]} for t in TEXTS]), None),
    "chats.jsonl": (lambda p: jsonl(p, [{"messages": [{"role": "user", "content": t}]} for t in TEXTS]), None),
    "text.csv": (lambda p: table(p, ["id", "text"], [[i, t] for i, t in enumerate(TEXTS)]), ["text"]),
    "first.csv": (lambda p: table(p, ["id", "review"], [[i, t] for i, t in enumerate(TEXTS)]), ["review"]),
    "pairs.csv": (
        lambda p: table(p, ["prompt", "completion"], [[t[:5], t[5:]] for t in TEXTS]),
        ["prompt", "completion"],
    ),
    "text.tsv": (lambda p: table(p, ["text"], [[TEXTS[0]], [""], *([t] for t in TEXTS[1:])], "\t"), ["text"]),
    "text.parquet": (lambda p: parquet(p, n=[1, 2, 3], text=TEXTS), ["text"]),
    "first.parquet": (lambda p: parquet(p, n=[1, 2, 3, 4], body=[TEXTS[0], None, *TEXTS[1:]]), ["body"]),
    "chats.parquet": (
        lambda p: parquet(p, messages=[[{"role": "user", "content": t}] for t in TEXTS]),
        ["messages"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_documents_are_concatenated_in_order(program, tokenizer, tmp_path, name):
    make, columns = FILES[name]
    make(tmp_path / name)
    found = calibrate(program, tokenizer, str(tmp_path / name), 5, 16, 0)
    assert text_of(found, tokenizer) == "".join(TEXTS).encode()[:80].decode()
    assert found.origin.get("columns") == columns
    assert list(found.origin["files"]) == [name]


def test_messages_go_through_the_chat_template(program, tmp_path):
    path = tmp_path / "chats.jsonl"
    jsonl(path, [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}])
    tokenizer = bytewise(chat=True)
    found = calibrate(program, tokenizer, str(path), 1, 26, 0)
    assert text_of(found, tokenizer) == "<s>user: hi</s><s>assistant: yes</s>"
    assert found.tokens[0, 0] == 0


BAD = {
    "short.txt": (lambda p: p.write_text("0123456789"), "holds 10 tokens, 4 windows of 8 need 32"),
    "empty.txt": (lambda p: p.write_text(""), "holds 0 tokens"),
    "latin.txt": (lambda p: p.write_bytes(b"caf\xe9" * 40), "not UTF-8 at byte 3"),
    "latin.jsonl": (lambda p: p.write_bytes(b'{"text": "caf\xe9"}'), "not UTF-8"),
    "latin.csv": (lambda p: p.write_bytes(b"text\ncaf\xe9\n"), "not UTF-8"),
    "broken.jsonl": (lambda p: p.write_text('{"text": "fine"}\n{"text": \n'), "line 2 is not JSON"),
    "other.jsonl": (lambda p: p.write_text('{"body": "words"}\n'), r"line 1 has the fields \['body'\]"),
    "list.jsonl": (lambda p: p.write_text("[1, 2]\n"), "line 1 has a list"),
    "numbers.csv": (lambda p: p.write_text("a,b\n1,2\n"), "none of text"),
    "header.csv": (lambda p: p.write_text("text\n"), "holds 0 tokens"),
    "empty.csv": (lambda p: p.write_text(""), "none of text"),
    "broken.parquet": (lambda p: p.write_bytes(b"PAR1 or not"), "not a readable parquet"),
    "text.docx": (lambda p: p.write_bytes(b"PK"), "expected a file of type .txt, .md, .jsonl"),
    "absent.txt": (lambda p: None, "there is no file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_clear_error(program, tokenizer, tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    make, says = BAD[name]
    make(tmp_path / name)
    with pytest.raises(TpvcError, match=says) as error:
        calibrate(program, tokenizer, str(tmp_path / name), 4, 8, 0)
    assert "\n" not in str(error.value)


def test_a_conversation_that_the_template_refuses(program, tmp_path):
    path = tmp_path / "chats.jsonl"
    jsonl(path, [{"messages": [{"role": "user", "content": "hi"}]}, {"messages": []}])
    with pytest.raises(TpvcError, match="line 2: the model's chat template refuses"):
        calibrate(program, bytewise(chat=True), str(path), 4, 26, 0)


def test_sizes_are_checked(program, tokenizer):
    with pytest.raises(TpvcError, match="expected at least 1 window"):
        calibrate(program, tokenizer, "builtin", 0, 8, 0)
    with pytest.raises(TpvcError, match="context is 128"):
        calibrate(program, tokenizer, "builtin", 1, 129, 0)


def test_a_tokenizer_of_another_model(program, tmp_path):
    (tmp_path / "t.txt").write_text("words " * 20)
    with pytest.raises(TpvcError, match="not this model's"):
        calibrate(program, lambda text, **_: {"input_ids": [VOCAB] * len(text)}, str(tmp_path / "t.txt"), 2, 8, 0)


def test_interleaving_mixes_every_prefix_and_loses_only_the_last_tail():
    domains = [list(range(0, 41)), list(range(100, 122)), list(range(200, 205))]
    found = interleaved(domains, [], 4)
    assert found.shape == (17, 4)  # 10 + 5 + 1 whole windows; tails of 1, 2 and 1 tokens make one more
    assert found[-1].tolist() == [40, 120, 121, 204]
    assert sorted(found.flatten().tolist()) == sorted(chain(*domains))
    for index, share in enumerate((10, 5, 1)):
        for length in range(1, 17):
            among = int((found[:length, 0] // 100 == index).sum())
            assert abs(among - share * length / 16) <= 1
    assert interleaved([[1, 2, 3]], [], 4).shape == (0, 4)


def test_built_in_text_mixes_its_domains(program, tokenizer):
    found = calibrate(program, tokenizer, "builtin", 12, 64, 0)
    texts = builtin()
    assert list(texts) == sorted(texts)
    assert list(found.origin["files"]) == list(texts)
    assert found.origin["sampled_tokens"] == 0
    begins = [tokenizer.decode(encode(tokenizer, text)[:64]) for text in texts.values()]
    windows = [tokenizer.decode(w) for w in found.tokens]
    assert sum(b in windows for b in begins) >= len(texts) - 1
    assert torch.equal(found.tokens, calibrate(program, tokenizer, "builtin", 12, 64, 5).tokens)


def test_what_the_built_in_text_lacks_is_sampled(program, tokenizer, monkeypatch):
    monkeypatch.setattr("tpvc.compiler.calibration.builtin", lambda: {"a.txt": "a" * 40, "b.txt": "b" * 30})
    found = calibrate(program, tokenizer, "builtin", 10, 8, seed=3)
    assert found.tokens.shape == (10, 8)
    assert found.origin["sampled_tokens"] == 2 * 8
    assert found.origin["tokens"] == 80
    assert tokenizer.decode(found.tokens[:8].flatten()).strip("ab") == ""
    assert torch.equal(found.tokens[8:], sample(program, tokenizer, 2, 8, seed=3))


def test_sampling_is_seeded_and_starts_with_ordinary_tokens(program, tokenizer):
    seen = []
    found = calibrate(program, tokenizer, "self", 70, 20, 1, progress=lambda *step: seen.append(step))
    assert found.origin["sampled_tokens"] == 1400
    assert found.origin["files"] == {}
    assert torch.equal(found.tokens, calibrate(program, tokenizer, "self", 70, 20, 1).tokens)
    assert not torch.equal(found.tokens, calibrate(program, tokenizer, "self", 70, 20, 2).tokens)
    assert found.tokens[:, 0].min() >= 3
    assert found.tokens.max() < 259  # rows of the table past the tokenizer's vocabulary never occur
    assert seen[-1][:3] == ("sampling", 1400, 1400)


def test_sampling_follows_the_model(program, tokenizer):
    """Mean surprise of the sampled tokens is the mean entropy of the model's predictions, to 6 standard errors."""
    tokens = sample(program, tokenizer, 64, 32, seed=0)
    with torch.no_grad():
        chances = logits(program, tokens)[:, :-1, :259].log_softmax(-1)
    surprise = -chances.gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(chances.exp() * chances).sum(-1)
    difference = (surprise - entropy).flatten()
    assert difference.mean().abs() < 6 * difference.std() / len(difference) ** 0.5


def test_large_models_are_read_anew_and_give_the_same(program, tokenizer, monkeypatch):
    held = sample(program, tokenizer, 3, 12, seed=0)
    monkeypatch.setattr(sampling, "HELD", 0)
    assert torch.equal(sample(program, tokenizer, 3, 12, seed=0), held)
    monkeypatch.setattr(sampling, "CACHE", 0)
    assert batch_size(program, 12) == 1


def test_names_need_the_datasets_package(program, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TpvcError, match="neither builtin, self nor a file"):
        calibrate(program, tokenizer, "wikitext", 2, 8, 0)


def test_names_go_to_the_datasets_package(program, tokenizer, monkeypatch):
    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "gone":
            raise RuntimeError("no such data set\nand a long story")
        return [{"text": t} for t in TEXTS]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = calibrate(program, tokenizer, "owner/set:part", 5, 16, 0)
    assert text_of(found, tokenizer) == "".join(TEXTS).encode()[:80].decode()
    assert calls == [("owner/set", "part", "train", True)]
    with pytest.raises(TpvcError, match=r"cannot be loaded \(no such data set\)"):
        calibrate(program, tokenizer, "gone", 5, 16, 0)


def test_the_built_in_text_is_large_and_does_not_repeat_itself():
    texts = builtin()
    assert len(texts) >= 6
    assert sum(len(text.split()) for text in texts.values()) >= 14_000
    lines = [line for text in texts.values() for line in text.splitlines() if len(line) > 60]
    assert len(set(lines)) > 0.98 * len(lines)


def test_the_built_in_text_holds_20000_tokens_of_the_demo_model():
    from tpvc.compiler.frontends import demo, gguf

    path = demo.cached()
    if path is None:
        pytest.skip("the demo model is not in the cache")
    tokenizer = gguf.tokenizer(path)
    assert sum(len(encode(tokenizer, text)) for text in builtin().values()) >= 20_000

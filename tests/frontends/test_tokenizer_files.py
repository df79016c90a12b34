"""Tokenizers that want to run code, and templates that do not end."""

import json
import sys

import pytest

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import tokenizer_files
from tpvc.compiler.frontends.tokenizer_files import opened, rendered


@pytest.fixture
def directory(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def changed(directory, **fields):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_code_beside_a_tokenizer_is_not_run(directory, tmp_path, monkeypatch):
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    changed(directory, auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks unless it is told
    with pytest.raises(TpvcError, match="no usable tokenizer"):
        opened(directory)
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


def test_a_damaged_tokenizer_is_one_sentence(directory):
    whole = json.loads((directory / "tokenizer.json").read_text())
    for broken in ([], whole | {"model": {"type": "BPE"}}, whole | {"added_tokens": [{"id": 0}]}, "x" * 100):
        (directory / "tokenizer.json").write_text(json.dumps(broken))
        with pytest.raises(TpvcError, match="no usable tokenizer"):
            opened(directory)


def test_a_size_that_is_none_shows_when_it_is_opened(directory):
    changed(directory, model_max_length="many")
    with pytest.raises(TpvcError, match="no usable tokenizer"):
        opened(directory)


def test_templates_are_called_by_plain_names(directory):
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    changed(directory, chat_template=[{"name": "default", "template": "x"}, {"name": "../../x", "template": "y"}])
    with pytest.raises(TpvcError, match=r"template called '\.\./\.\./x'"):
        opened(directory)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{% for x in range(999999999) %}{% endfor %}",
        "{{ messages[7].content.x }}",
    ],
)
def test_the_sandbox_holds(directory, template):
    made = opened(directory)
    made.chat_template = template
    with pytest.raises(TpvcError, match="template refuses"):
        rendered(made, [{"role": "user", "content": "x"}], tokenize=False)


def test_a_template_without_end(directory, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "SECONDS", 0.2)
    made = opened(directory)
    made.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    before = sys.gettrace()
    with pytest.raises(TpvcError, match=r"has not ended after 0\.2 seconds"):
        rendered(made, [{"role": "user", "content": "x"}], tokenize=False)
    assert sys.gettrace() is before

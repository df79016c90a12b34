"""What is called with every tree: the readers of tpvc as its commands use them. Each returns, or raises TpvcError."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import seeds
import torch

from tpvc.compiler import documents, frontends
from tpvc.compiler.adapters import prompt_files, prompt_recipe, road_files
from tpvc.compiler.calibration import chat_text
from tpvc.compiler.cli import inspect, inspect_export, inspect_trained
from tpvc.compiler.engines.genai_folder import virtual_ids
from tpvc.compiler.engines.text import auto_tokenizer, has_template, transformers_text
from tpvc.compiler.errors import TpvcError
from tpvc.compiler.frontends import gguf, huggingface
from tpvc.compiler.frontends.architecture import architecture
from tpvc.compiler.frontends.weights import read_json, stored_in
from tpvc.compiler.program import read
from tpvc.compiler.sha256 import sha256
from tpvc.compiler.tuning import examples, importance_file, texts
from tpvc.compiler.verification import files
from tpvc.compiler.verify import verify
from tpvc.compiler.windows import encode

Call = Callable[[Path], object]


def safetensors(root: Path) -> None:
    for stored in stored_in(root / "file.safetensors").values():
        stored.read()


def config(root: Path) -> None:
    architecture(read_json(root / "config.json"))


def checkpoint(root: Path) -> None:
    program = verify(huggingface.load(root, "m"))
    inside = root.resolve()
    for path in program.source.weights:  # a name in an index is not a way out; links that lie in the tree are followed
        assert inside in (path.parent.resolve() / path.name).parents, path
    for parameter in program.params.values():
        read(parameter)


def gguf_file(root: Path) -> None:
    for integers in (False, True):
        program = verify(gguf.load(root / "model.gguf", "m", integers))
        for parameter in program.params.values():
            read(parameter)


def artefact(root: Path) -> None:
    frontends.load(root)
    files.check(root)
    told = inspect.program_facts(str(root))
    if told["provenance"]:
        inspect._provenance(str, told["provenance"])


def told(path: Path) -> None:
    """What `inspect` says of it, whether or not it can be used."""
    with suppress(TpvcError):
        inspect_trained.trained_facts(path)


def importance(root: Path) -> None:
    path = root / "file.safetensors"
    told(path)
    found = importance_file.read(path)
    importance_file.check_base(found, path, None)
    for codes in found.omega.values():
        assert codes.dense.shape == codes.codes.shape
    assert set(found.coefficients) == set(found.omega)


def _file(root: Path) -> Path:
    return next((p for p in sorted(root.iterdir()) if p.name.startswith("file.")), root / "file.txt")


def text(root: Path) -> None:
    path = _file(root)
    texts.holds_examples(path)
    found, chars = documents.documents(path, lambda messages: chat_text(SPEAKER, messages)), 0
    sha256(path)
    for document in found.texts:
        encode(SPEAKER, document)
        chars += len(document)
        if chars > 1 << 20:  # as calibration stops when it has enough
            return


def examples_file(root: Path) -> None:
    path = _file(root)
    texts.holds_examples(path)
    found = examples.read_examples(path)
    examples.read_examples(path, template="{text}: ", columns={"text": "text"}, labels={"0": "no", "1": "yes"})
    examples.encode_examples(SPEAKER, found, 64, 1)


def recipe(root: Path) -> None:
    prompt_recipe.check(prompt_recipe.read(root / "file.yaml"))


def genai(root: Path) -> None:
    inspect_export.onnx_facts(root)
    has_template(root)
    virtual_ids(root, "task")


def tokenizer(root: Path) -> None:
    found = auto_tokenizer(root)
    has_template(root)
    encode_text, decoder = transformers_text(found, "m")
    ids = encode_text("one two")
    push = decoder()
    for token in ids[:4]:
        push(token)
    chat_text(found, [{"role": "user", "content": "one"}])
    encode_text([{"role": "user", "content": "one"}])


class Speaker:
    """Stands in for a tokenizer where the reader of texts is meant: bytes, and refusal of what is no text."""

    chat_template = None

    def __call__(self, text, **_):
        if isinstance(text, list | tuple):
            return {"input_ids": [list(t.encode()) for t in text]}
        return {"input_ids": list(text.encode())}


SPEAKER = Speaker()


def calls(work: Path) -> dict[str, Call]:
    """Reader -> what is called. `work`: where a model lies that adapters and packages are held against."""
    from tpvc.compiler.backends import triton
    from tpvc.compiler.backends.triton.engine import Engine
    from tpvc.compiler.verification import onnx_numbers, triton_numbers
    from tpvc.kernels import package

    own = seeds.program(work)
    packed = seeds.packed(work)

    def road(root: Path) -> None:
        told(root)
        road_files.made_for(root)
        frontends.with_roads(own, {"one": root})

    def prompt(root: Path) -> None:
        told(root)
        frontends.with_prompts(own, {"one": root})
        found = prompt_files.read(root, "one")
        prompt_files.made(root)
        if found.start is not None:
            assert found.vector.isfinite().all()

    def package_folder(root: Path) -> None:
        for _, reading in triton_numbers.read(root, packed):
            reading()
        package.read(root / "kernels")
        Engine(triton.open_cpu(root)).admit([1, 2, 3])

    def onnx(root: Path) -> None:
        genai(root)
        for _, reading in onnx_numbers.read(root, packed):
            reading()

    return {
        "safetensors": safetensors,
        "config": config,
        "checkpoint": checkpoint,
        "quantised": checkpoint,
        "road": road,
        "prompt": prompt,
        "artefact": artefact,
        "importance": importance,
        "gguf": gguf_file,
        "package": package_folder,
        "onnx": onnx,
        "tokenizer": tokenizer,
        "parquet": text,
        "text": text,
        "examples": examples_file,
        "recipe": recipe,
    }


SHARES = {
    "safetensors": 22,
    "config": 24,
    "checkpoint": 10,
    "quantised": 6,
    "road": 4,
    "prompt": 5,
    "artefact": 2,
    "importance": 6,
    "gguf": 6,
    "package": 2,
    "onnx": 1,
    "tokenizer": 0.2,
    "parquet": 3,
    "text": 6,
    "examples": 6,
    "recipe": 3,
}
"""Of all cases: what is quick to read has more."""

torch.set_num_threads(1)

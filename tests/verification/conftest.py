"""One small model in every format that can be verified, and a way to flip a bit in one of them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpvc.compiler import frontends
from tpvc.compiler.backends import onnx, triton
from tpvc.compiler.backends.huggingface import emit
from tpvc.compiler.program import Grid, dense, linears
from tpvc.compiler.sha256 import sha256
from tpvc.passes.round_to_nearest import quantize

FORMATS = ("transformers", "vllm", "gptq", "gptq_v2", "awq", "onnx", "triton")


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_llama):
    """{format: directory} of one rounded model: 4 bits asymmetric in blocks, an 8-bit head; `made["program"]` too.

    The Triton package is made for no GPU, so that nothing has to be compiled.
    """
    folder, program = tmp_path_factory.mktemp("formats"), frontends.load(tiny_llama)
    tokenizer, changed = frontends.tokenizer(program), {}
    for node in linears(program.nodes):
        grid = Grid(8, -1, True) if node.block is None else Grid(4, 32, False)
        q = quantize(dense(program.params[node.params["weight"]]), grid, torch.float16)
        changed[node.params["weight"]] = q if q.zero is None else replace(q, zero=q.zero.clamp(min=1))
    program = program.with_params(changed)
    for name in FORMATS:
        out = folder / name
        out.mkdir()
        if name == "onnx":
            onnx.emit(program, out, tokenizer, portable=True)
            manifest(out)
        elif name == "triton":
            triton.emit(program, out, tokenizer, (), torch.float16)
            manifest(out)
        else:
            emit(program, out, tokenizer, {"options": {"to": name}}, runtime=name)
    return {name: folder / name for name in FORMATS} | {"program": program}


def manifest(folder):
    """tpvc.json with the hashes that the files have now."""
    path = folder / "tpvc.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    files = {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file() and p != path}
    path.write_text(json.dumps(told | {"files": files}))


@pytest.fixture(scope="session")
def with_hashes():
    return manifest


@pytest.fixture(scope="session")
def flip():
    """flip(directory, tensor, index): change the lowest bit of one byte of a tensor in model.safetensors."""

    def change(folder, name, index=0):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors[name].view(-1).view(torch.uint8)[index] ^= 1
        save_file(tensors, path, metadata={"format": "pt"})

    return change

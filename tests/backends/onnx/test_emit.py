"""What the emitted folder computes, against the interpreter: every family in ONNX Runtime and in GenAI."""

import json

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
import torch

from tpvc.compiler.backends.onnx import emit
from tpvc.compiler.interpret import generate, in_memory, logits
from tpvc.compiler.program import Grid, Lazy, dense, grid_of, linears

GRIDS = {
    "llama": (Grid(4, 64, False), Grid(8, -1, True)),
    "llama3": (Grid(3, 48, True), Grid(4, 32, False)),
    "llama-odd-heads": (Grid(4, 16, False), Grid(8, 64, False)),
    "mistral": (Grid(2, 32, False), Grid(3, -1, False)),
    "qwen2": (Grid(5, -1, False), Grid(4, 24, False)),
    "qwen3": (Grid(8, 0, True), None),
    "phi3": (Grid(4, -1, True), Grid(6, 0, True)),
    "gemma2": (Grid(3, 64, False), Grid(2, 64, False)),
    "gemma3": (Grid(4, 32, True), Grid(8, -1, True)),
    "opt": (Grid(4, 12, False), Grid(8, -1, True)),
    "opt-350m-shape": (Grid(4, 32, True), Grid(5, 32, True)),
    "gpt2": (Grid(7, 96, False), None),
    "gpt_neox": (Grid(3, 64, False), Grid(8, -1, True)),
    "gpt_neox-odd-rotation": (Grid(4, 0, False), Grid(8, -1, False)),
}
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "Dear Sir,",
    "2 + 2 =",
    "The three primary colours are",
    "In the year 1969",
)
PROMPT = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(1))


def families_with_float(family):
    return [(None, None), GRIDS[family]]


def test_prefill_and_decode_in_onnxruntime(family, tiny, tmp_path):
    """Float32 sums: the last token of prompts of several lengths, then single tokens over the cache."""
    for i, (grid, head) in enumerate(families_with_float(family)):
        program = tiny.build(family, grid, head)
        (tmp_path / str(i)).mkdir()
        emit(program, tmp_path / str(i), None, accuracy_level=0)
        model = tiny.session(tmp_path / str(i))
        expected = logits(program, PROMPT, weight=in_memory(program))[0]
        for length in (1, 4, 9):
            got, past = tiny.step(model, PROMPT[:, :length], torch.ones(1, length))
            assert got.shape == (1, 1, 97)
            assert (got[0, 0] - expected[length - 1]).abs().max() <= tiny.tolerance(expected)
        for t in range(9, 12):
            got, past = tiny.step(model, PROMPT[:, t : t + 1], torch.ones(1, t + 1), past)
            assert (got[0, 0] - expected[t]).abs().max() <= tiny.tolerance(expected)


def test_int8_activations_cost_what_is_stated(family, tiny, tmp_path):
    """accuracy_level 4 rounds the input of every integer product to int8, block by block.

    The largest of 16 to 128 normal values is about 2.6 of their rms, so the rounding error is 2.6 / 127 / sqrt(12), or
    0.6 % of it; independent errors of the 4 products of a layer that follow each other and of the head add up by
    squares. Products of two activations have longer tails than normal values: a factor of 3.
    """
    program = tiny.build(family, *GRIDS[family])
    emit(program, tmp_path, None, all_logits=True)
    expected = logits(program, PROMPT, weight=in_memory(program))
    got, _ = tiny.step(tiny.session(tmp_path), PROMPT, torch.ones(1, 12))
    error = (got - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert 0 < error <= 3 * 0.006 * (4 * 2 + 1) ** 0.5


def test_portable_twin(family, tiny, tmp_path):
    """Standard operators only; a batch padded on the left, then decoding with the grown cache."""
    program = tiny.build(family, *GRIDS[family])
    emit(program, tmp_path, None, accuracy_level=0, portable=True)
    proto = onnx.load(tmp_path / "portable" / "model.onnx", load_external_data=False)
    assert {n.domain for n in proto.graph.node} == {""}
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 21)]
    onnx.checker.check_model(tmp_path / "portable" / "model.onnx")
    fast = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert [i.name for i in proto.graph.input] == [i.name for i in fast.graph.input]
    assert [o.name for o in proto.graph.output] == [o.name for o in fast.graph.output]

    model, weight, cache = tiny.session(tmp_path / "portable"), in_memory(program), {}
    ids = torch.cat((PROMPT[:, :9], PROMPT[:, 3:]))
    mask = torch.ones(2, 9)
    mask[1, :3] = 0
    expected = logits(program, ids, mask, weight, cache)
    got, past = tiny.step(model, ids, mask)
    assert ((got - expected) * mask[..., None]).abs().max() <= tiny.tolerance(expected)
    mask = torch.cat((mask, torch.ones(2, 1)), 1)
    expected = logits(program, ids[:, :1], mask, weight, cache)
    got, _ = tiny.step(model, ids[:, :1], mask, past)
    assert (got - expected).abs().max() <= tiny.tolerance(expected)


def run_genai(directory, prompts, new):
    """(logits of the prompts' last tokens, the sequences) by greedy search."""
    model = og.Model(str(directory))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=60, batch_size=len(prompts))
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompts if len(prompts) > 1 else prompts[0], np.int32))
    first = generator.get_logits().copy().reshape(len(prompts), -1)
    for _ in range(new):
        if not generator.is_done():
            generator.generate_next_token()
    return torch.from_numpy(first), [generator.get_sequence(i).tolist() for i in range(len(prompts))]


def test_greedy_tokens_in_genai(family, tiny, tmp_path):
    """Equal tokens are owed only while the best token leads by more than the two evaluations may differ; it does."""
    program = tiny.build(family, *GRIDS[family])
    emit(program, tmp_path, None, accuracy_level=0)
    weight = in_memory(program)
    expected = list(generate(program, PROMPT[0], 32, weight=weight))
    path = torch.cat((PROMPT[0], torch.tensor(expected, dtype=torch.int64)))[None]
    scores = logits(program, path, weight=weight)[0]
    best = scores[11:].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 2 * tiny.tolerance(scores), "a near tie: choose another seed"
    first, (sequence,) = run_genai(tmp_path, PROMPT.tolist(), 32)
    assert (first[0] - scores[11]).abs().max() <= tiny.tolerance(scores)
    assert sequence[12:] == expected


@pytest.mark.parametrize("kind", ["llama", "opt", "llama-odd-heads"])
@pytest.mark.parametrize("short", [5, 9])
def test_batches_in_genai(kind, short, tiny, tmp_path):
    """Rows of one length, and of two lengths padded on the right, as GenAI's tokenizer pads."""
    program = tiny.build(kind, *GRIDS[kind])
    emit(program, tmp_path, None, accuracy_level=0)
    rows = [PROMPT[0, :9], PROMPT[0, 2 : 2 + short]]
    prompts = [row.tolist() + [program.facts.pad] * (9 - len(row)) for row in rows]
    first, sequences = run_genai(tmp_path, prompts, 10)
    for row, got, sequence in zip(rows, first, sequences, strict=True):
        scores = logits(program, row[None])[0, -1]
        assert (got - scores).abs().max() <= tiny.tolerance(scores)
        expected = list(generate(program, row, 10))
        assert sequence[9 : 9 + len(expected)] == expected


def test_a_prompt_in_two_parts_in_genai(tiny, tmp_path):
    program = tiny.build("llama", *GRIDS["llama"])
    emit(program, tmp_path, None, accuracy_level=0)
    model = og.Model(str(tmp_path))
    generator = og.Generator(model, og.GeneratorParams(model))
    for part in (PROMPT[0, :7], PROMPT[0, 7:]):
        generator.append_tokens(part.numpy().astype(np.int32))
    scores = logits(program, PROMPT)[0, -1]
    assert np.abs(generator.get_logits().reshape(-1) - scores.numpy()).max() <= tiny.tolerance(scores)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 32, 64, 48, -1, 0])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_grids(bits, group, symmetric, tiny, tmp_path):
    """Every width and group in blocks, head and tied embedding; both graphs, float32 sums."""
    grid = Grid(bits, group, symmetric)
    program = tiny.build("llama", grid, grid, num_hidden_layers=1)
    emit(program, tmp_path, None, accuracy_level=0, portable=True, all_logits=True)
    expected = logits(program, PROMPT)
    for directory in (tmp_path, tmp_path / "portable"):
        got, _ = tiny.step(tiny.session(directory), PROMPT, torch.ones(1, 12))
        assert (got - expected).abs().max() <= tiny.tolerance(expected)


def test_lazy_parameters_and_equal_bytes(tiny, tmp_path):
    """Parameters that lie in files are read when they are written; the same program gives the same bytes."""
    program = tiny.build("qwen2", *GRIDS["qwen2"])
    lazy = {n: Lazy(tuple(p.shape), torch.float32, lambda p=p: p, grid_of(p)) for n, p in program.params.items()}
    for name, given in (("a", program), ("b", program.with_params(lazy))):
        (tmp_path / name).mkdir()
        emit(given, tmp_path / name, None)
    for file in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_tokenizer_in_genai(tiny, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<s>", "</s>", *(chr(c) for c in range(33, 127)), "Ġ"]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    emit(tiny.build("llama", vocab_size=98), tmp_path, tokenizer)
    genai = og.Tokenizer(og.Model(str(tmp_path)))
    text = "a b(c)"
    assert genai.encode(text).tolist() == tokenizer.encode(text)
    assert genai.decode(genai.encode(text)) == text
    messages = [{"role": "user", "content": "hi"}]
    template = genai.apply_chat_template(json.dumps(messages), add_generation_prompt=False)
    assert template == tokenizer.apply_chat_template(messages, tokenize=False) == "<s>user: hi</s>"


@pytest.mark.slow
def test_demo_model_in_genai(tiny, tmp_path):
    """64 greedy tokens after each of 8 prompts, the weights rounded to 4 bits and the head to 8, float32 sums."""
    from tpvc.compiler import frontends

    program = frontends.load("smollm2-135m")
    tokenizer = frontends.tokenizer(program)
    rounded = {}
    for node in linears(program.nodes):
        grid, name = Grid(4, 64, False) if node.block is not None else Grid(8, -1, True), node.params["weight"]
        rounded[name] = tiny.round_to_nearest(dense(program.params[name]), grid)
    program = program.with_params(rounded)
    emit(program, tmp_path, tokenizer, accuracy_level=0)
    model, weight = og.Model(str(tmp_path)), in_memory(program)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + 64)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(ids, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        expected = list(generate(program, torch.tensor(ids), 64, weight=weight))
        assert generator.get_sequence(0).tolist()[len(ids) :][: len(expected)] == expected, prompt

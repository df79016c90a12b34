"""Every answer's log-likelihood is its definition, whatever stands beside it in a batch, in every runtime."""

import pytest
import torch

import tpvc
from tpvc.compiler import frontends, interpret
from tpvc.compiler.harness import scorer
from tpvc.compiler.program import adapter_id, linears
from tpvc.compiler.tuning.examples import Encoded

QUESTIONS = [
    Encoded((5, 6, 7, 8), 3),
    Encoded((5, 6, 7, 9), 3),
    Encoded((5, 6, 7, 9), 1),
    Encoded((5, 6, 7, 8, 30, 31, 32, 33, 34), 4),
    Encoded((200, 5), 1),
    Encoded(tuple(range(40, 120)), 60),
]


def rounding(program, longest, logits):
    """Float32 sums along the longest path: every matrix adds as many terms as it has columns, every attention as many
    as it sees positions and has features a head. A log-likelihood is off by twice what a logit is, in each runtime."""
    widths = sum(program.params[n.params["weight"]].shape[1] for n in linears(program.nodes))
    terms = widths + program.blocks * (longest + program.facts.head_dim)
    return 4 * terms * torch.finfo(torch.float32).eps * float(logits.abs().max())


def by_definition(program, question, adapter=None, task=None):
    """(log-likelihood, is every token the likeliest, what rounding may change), from the logits of one row alone."""
    from tpvc.compiler.program import prompt_ids

    before = prompt_ids(program, task)
    ids = torch.tensor([[*before, *question.ids]])
    row = torch.tensor([adapter_id(program, adapter)])
    with torch.no_grad():
        logits = interpret.logits(program, ids, adapter_ids=row)[0, len(before) + question.answer - 1 : -1]
    targets = torch.tensor(question.ids[question.answer :])
    chance = logits.log_softmax(-1).gather(-1, targets[:, None]).double().sum().item()
    limit = len(targets) * rounding(program, ids.shape[1], logits)
    return chance, bool((logits.argmax(-1) == targets).all()), limit


def agree(found, program, **chosen):
    seen = []
    for question, (chance, likeliest) in zip(QUESTIONS, found, strict=True):
        wanted, best, limit = by_definition(program, question, **chosen)
        assert abs(chance - wanted) <= limit and likeliest == best
        assert limit < 1e-2 * len(question.ids[question.answer :])
        seen.append(chance)
    return seen


@pytest.mark.parametrize("tokens", [1, 100, 2048])
def test_a_program(tiny_llama, monkeypatch, tokens):
    monkeypatch.setattr(scorer, "TOKENS", tokens)
    steps = []
    found = scorer.open_scorer(str(tiny_llama), threads=1).verdicts(QUESTIONS, steps.append)
    agree(found, frontends.load(tiny_llama))
    assert steps == sorted(steps) and steps[-1] == len(QUESTIONS)


def test_what_a_model_would_write_is_the_likeliest(tiny_llama):
    made = scorer.open_scorer(str(tiny_llama), threads=1)
    written = list(made.generate([5, 6, 7], 8, 0.0, 0))
    whole = (5, 6, 7, *written)
    (_, likeliest), (_, other) = made.verdicts([Encoded(whole, 3), Encoded((*whole[:-1], whole[-1] - 1), 3)], print)
    assert likeliest and not other


def test_a_text_is_read_once(tiny_llama, monkeypatch):
    """Two questions that differ in their last token, and one about more of the same text, are one row."""
    rows = []
    run = interpret.run

    def counted(nodes, values, *rest, **options):
        rows.append(len(values["input_ids"]) if "input_ids" in values else 0)
        return run(nodes, values, *rest, **options)

    monkeypatch.setattr(interpret, "run", counted)
    scorer.open_scorer(str(tiny_llama), threads=1).verdicts(QUESTIONS[:3], print)
    assert sum(rows) == 1


def test_the_head_is_given_what_fits(tiny_llama, monkeypatch):
    monkeypatch.setattr(scorer, "CHUNK", 3 * 384)
    agree(scorer.open_scorer(str(tiny_llama), threads=1).verdicts(QUESTIONS, print), frontends.load(tiny_llama))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, write_adapter, tiny_llama):
    """An artefact with an adapter, and its folder for GenAI, which gives the last token's logits only."""
    out = tmp_path_factory.mktemp("adapted")
    roads = {"loud": write_adapter(tiny_llama, out / "loud")}
    artefact = tpvc.quantize(tiny_llama, out / "w4", method="rtn", group=32, roads=roads)
    return artefact, tpvc.export(artefact, out / "onnx", accuracy_level=0)


def test_artefacts_and_folders(adapted):
    artefact, folder = adapted
    program = frontends.load(artefact)
    seen = {}
    for name in (None, "loud"):
        for target in (artefact, folder):
            found = scorer.open_scorer(str(target), adapter=name, threads=1).verdicts(QUESTIONS, print)
            seen[target, name] = agree(found, program, adapter=name)
    assert all(abs(a - b) > 1e-2 for a, b in zip(seen[artefact, None], seen[artefact, "loud"], strict=True))


def test_a_folder_reads_a_prompt_at_once(adapted, monkeypatch):
    """After the first look: what stands before an answer in one go, then token by token."""
    import onnxruntime_genai as og

    made, lengths = og.Generator, []

    class Counted:
        def __init__(self, *options):
            self.inner = made(*options)

        def append_tokens(self, ids):
            lengths.append(len(ids))
            self.inner.append_tokens(ids)

        def get_output(self, name):
            return self.inner.get_output(name)

    monkeypatch.setattr(og, "Generator", Counted)
    opened = scorer.open_scorer(str(adapted[1]), threads=1)
    opened.verdicts([QUESTIONS[3]], print)
    opened.verdicts([QUESTIONS[3]], print)
    assert lengths == [8] + 2 * [4, 1, 1, 1, 1]

"""What a soft prompt costs: time to the first token, and of every later one, in each form.

    python benchmarks/prompt_first_token.py ARTEFACT -o prompt_first_token [--virtual-tokens 100] [--cpu-time]

ARTEFACT is a directory that `tpvc quantize` made. A random prompt of the embeddings' size stands before texts of
several lengths; all forms are measured turn by turn in one run, on one thread. "none" is the text without a prompt.

GenAI        tokens: ids before the text; rewound: the same, fed once and kept while texts come and go
             (`Generator.rewind_to`); kv: folded in, the caller feeds the text alone
interpreter  tokens; prefix: a constant prefix of the graph; kv
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import torch

from tpvc.compiler import frontends, interpret
from tpvc.compiler.adapters.prompt import Prompt
from tpvc.compiler.adapters.prompt_start import embedded
from tpvc.compiler.backends.onnx import emit
from tpvc.compiler.program import Program, prompt_ids
from tpvc.passes.bank_prompt import BankPrompt
from tpvc.passes.fold_prompt import FoldPrompt

LENGTHS = (16, 64, 256)
DECODED = 32


def model_of(program: Program, directory: Path) -> og.Model:
    if not (directory / "genai_config.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        emit(program, directory, None)
    config = og.Config(str(directory))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    return og.Model(config)


def generator_of(model: og.Model, length: int) -> og.Generator:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    return og.Generator(model, params)


def genai_forms(program: Program, prompt: Prompt, out: Path) -> dict[str, Callable]:
    """{form: ids of a text -> (seconds to the first token, seconds a later one)}."""
    banked, folded = BankPrompt((prompt,))(program), FoldPrompt(prompt, "kv")(program)
    rows, keys = model_of(banked, out / "rows"), model_of(folded, out / "kv")
    before = prompt_ids(banked, prompt.name)

    def timed(generator: og.Generator, ids: list[int]) -> tuple[float, float]:
        began = CLOCK()
        generator.append_tokens(np.asarray(ids, np.int32))
        generator.generate_next_token()
        first = CLOCK() - began
        for _ in range(DECODED):
            generator.generate_next_token()
        return first, (CLOCK() - began - first) / DECODED

    def fresh(model: og.Model, front: list[int]) -> Callable:
        return lambda ids: timed(generator_of(model, len(front) + len(ids) + DECODED + 2), [*front, *ids])

    def rewound(ids: list[int]) -> tuple[float, float]:
        generator = generator_of(rows, len(before) + len(ids) + DECODED + 2)
        generator.append_tokens(np.asarray([*before, *ids], np.int32))
        generator.generate_next_token()
        generator.rewind_to(len(before))
        return timed(generator, ids)

    return {"none": fresh(rows, []), "tokens": fresh(rows, before), "rewound": rewound, "kv": fresh(keys, [])}


def interpreter_forms(program: Program, prompt: Prompt) -> dict[str, Callable]:
    banked = BankPrompt((prompt,))(program)
    before = prompt_ids(banked, prompt.name)
    held = interpret.in_memory(program)

    def timed(made: Program, front: list[int]) -> Callable:
        own = {name: p for name, p in made.params.items() if name not in program.params}

        def run(ids: list[int]) -> tuple[float, float]:
            began = CLOCK()
            with torch.no_grad():
                cache: interpret.Cache = {}
                weight = lambda name: own[name] if name in own else held(name)  # noqa: E731
                interpret.logits(made, torch.tensor([[*front, *ids]]), weight=weight, cache=cache)
            return CLOCK() - began, float("nan")

        return run

    prefix, keys = (FoldPrompt(prompt, form)(program) for form in ("prefix", "kv"))
    return {
        "none": timed(program, []),
        "tokens": timed(banked, before),
        "prefix": timed(prefix, []),
        "kv": timed(keys, []),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--virtual-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, for machines that do other work too")
    args = parser.parse_args()
    global CLOCK
    CLOCK = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(1)
    program = frontends.load(args.artefact)
    generator = torch.Generator().manual_seed(0)
    table = embedded(program, torch.arange(min(5000, program.facts.vocab_size)))
    values = torch.randn(args.virtual_tokens, table.shape[1], generator=generator) * table.std()
    prompt = Prompt("task", values)
    runs = {
        "GenAI": genai_forms(program, prompt, Path(args.out)),
        "interpreter": interpreter_forms(program, prompt),
    }
    for runtime, forms in runs.items():
        print(f"\n| {runtime}, text tokens | " + " | ".join(forms) + " | a later token |")
        print("|---|" + "---|" * (len(forms) + 1))
        for length in LENGTHS:
            ids = torch.randint(100, 5000, (length,), generator=generator).tolist()
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
            for turn in range(args.rounds + 1):
                for name, form in forms.items():
                    seconds = form(ids)
                    if turn:  # the first one warms up
                        found[name].append(seconds)
            first = {n: 1e3 * statistics.median(s[0] for s in v) for n, v in found.items()}
            later = {n: 1e3 * statistics.median(s[1] for s in v) for n, v in found.items()}
            cells = [f"{v:.1f} ms ({v / first['tokens']:.2f})" for v in first.values()]
            rest = ", ".join(f"{n} {v:.2f}" for n, v in later.items()) if runtime == "GenAI" else ""
            print(f"| {length} | " + " | ".join(cells) + f" | {rest} |", flush=True)


if __name__ == "__main__":
    main()

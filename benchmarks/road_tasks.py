"""RoAd against LoRA on real tasks, at equal steps: accuracy on test data, several seeds, mean and deviation.

    python benchmarks/road_tasks.py --data FOLDER -o road_tasks [--tasks sst2,trec,rte] [--methods road_1,lora] ...

FOLDER is described in tasks.py.
Every run writes one line to OUT/results.jsonl and its adapter beside it; what is there is not run again, so several
processes may share the work by --tasks. Without --tasks to run, --table prints what there is.

What the model is asked, and what accuracy means, is in tasks.py. LoRA is PEFT's, r = 8, alpha 16, on the same
linears of the same model, trained by the same loop on the same batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tasks import BATCH, LABELS, TEMPLATES, accuracy, first_tokens, prepare, read

from tpvc.compiler import frontends, interpret
from tpvc.compiler.adapters import road_files
from tpvc.compiler.program import Program, dense
from tpvc.compiler.quick import quick_linear
from tpvc.compiler.store import BlockStore
from tpvc.compiler.tuning.loop import Schedule, tune
from tpvc.compiler.tuning.loss import Answers, answer_logits, batch_of, by_length
from tpvc.compiler.tuning.road_tune import road_tune
from tpvc.passes.bank_road import BankRoad


def lora(program: Program, paths: dict, task: str, tokenizer, steps: int, lr: float, seed: int, work: Path):
    """Train PEFT's LoRA with our loop; returns (batch -> logits, trained numbers, what `tune` returned)."""
    import peft
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**{k: v for k, v in program.source.config.items() if k != "architectures"})
    model = transformers.LlamaForCausalLM(config).float().eval()
    state = {name: dense(p) for name, p in program.params.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for module in wrapped.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = lambda x, m=module: quick_linear(x, weight=m.weight, bias=m.bias)
    params = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}

    def logits_of(batch):
        hidden = wrapped.base_model.model.model(batch.ids, attention_mask=batch.mask.long()).last_hidden_state
        return model.lm_head(hidden[batch.predicts])

    training, checking = (read(task, paths[p], tokenizer, program) for p in ("train", "validation"))

    def loss(indices):
        batch = batch_of([training[i] for i in indices])
        return torch.nn.functional.cross_entropy(logits_of(batch), batch.targets)

    @torch.no_grad()
    def validate():
        total, tokens = 0.0, 0
        for part in by_length(checking, 16):
            batch = batch_of(part)
            total += torch.nn.functional.cross_entropy(logits_of(batch), batch.targets, reduction="sum").item()
            tokens += len(batch.targets)
        return Answers(total / tokens, 0.0, len(checking))

    store = BlockStore.open(work, {"task": task, "steps": steps, "lr": lr, "seed": seed}, replace=True)
    schedule = Schedule(steps, BATCH[task], lr, 0.1, seed)
    result = tune(params, {}, [len(e.ids) for e in training], loss, validate, schedule, store)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(result.best[name])
    return logits_of, sum(p.numel() for p in params.values()), result


def run(model: str, task: str, method: str, seed: int, args: argparse.Namespace) -> dict:
    out = Path(args.out)
    program = frontends.load(model)
    tokenizer = frontends.tokenizer(program)
    paths = prepare(task, Path(args.data), out / "data")
    choices = first_tokens(task, tokenizer)
    test = read(task, paths["test"], tokenizer, program)
    label = f"{args.tag}{task}-{method}-{seed}"
    began = time.perf_counter()
    record = {"task": task, "method": method, "seed": seed, "model": model, "steps": args.steps, "batch": BATCH[task]}
    if method == "base":
        weight = interpret.in_memory(program)
        found = accuracy(lambda b: answer_logits(program, weight, b), test, choices)
    elif method == "lora":
        work = out / "lora" / label
        logits_of, numbers, result = lora(program, paths, task, tokenizer, args.steps, args.lora_lr, seed, work)
        record |= {"trained": numbers, "lr": args.lora_lr, "kept_step": result.step}
        record["validation_loss"] = min(c[1] for c in result.checks)
        record["train_seconds"] = time.perf_counter() - began
        found = accuracy(logits_of, test, choices)
    else:
        directory = road_tune(
            model,
            paths["train"],
            out / "adapters" / label,
            validation=paths["validation"],
            template=TEMPLATES[task],
            labels=LABELS[task],
            variant=method,
            steps=args.steps,
            batch_size=BATCH[task],
            lr=args.road_lr,
            max_length=256,
            seed=seed,
            overwrite=True,
        )
        record["train_seconds"] = time.perf_counter() - began
        told = json.loads((directory / "tpvc.json").read_text())
        record |= {"trained": told["trainables"], "lr": args.road_lr, "kept_step": told["kept_step"]}
        record["validation_loss"] = min(c[1] for c in told["checks"])
        adapter = road_files.read(directory, program, label)
        banked = BankRoad((adapter,))(program)
        weight = interpret.in_memory(banked)
        found = accuracy(lambda b: answer_logits(banked, weight, b, adapter=0), test, choices)
    return {**record, "accuracy": found, "test": len(test)}


def table(records: list[dict]) -> str:
    tasks = list(dict.fromkeys(r["task"] for r in records))
    methods = list(dict.fromkeys((r["model"], r["method"]) for r in records))
    lines = ["| | trained | " + " | ".join(tasks) + " |", "|---|---|" + "---|" * len(tasks)]
    for model, method in methods:
        own = [r for r in records if (r["model"], r["method"]) == (model, method)]
        cells = []
        for task in tasks:
            values = [100 * r["accuracy"] for r in own if r["task"] == task]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread} ({len(values)})" if values else "")
        trained = next((f"{r['trained']:,}" for r in own if "trained" in r), "")
        lines.append(f"| {method} on {Path(model).name} | {trained} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--model", default="smollm2-135m", help="a float or a quantised model")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--methods", default="base,road_1,road_2,road_4,lora")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--road-lr", type=float, default=3e-3)
    parser.add_argument("--lora-lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tag", default="", help="put before the names of adapters, when --model is another one")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = Path(args.out) / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    keys = ("task", "method", "seed", "model", "steps", "lr")

    def there() -> list[dict]:
        return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    for seed in map(int, args.seeds.split(",")):
        for task in filter(None, args.tasks.split(",")):
            for method in args.methods.split(","):
                if method == "base" and seed != int(args.seeds.split(",")[0]):
                    continue
                lr = {"base": None, "lora": args.lora_lr}.get(method, args.road_lr)
                wanted = (task, method, seed, args.model, args.steps, lr)
                if any(tuple(r.get(k) for k in keys) == wanted for r in there()):
                    continue
                record = run(args.model, task, method, seed, args)
                with results.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(json.dumps(record), flush=True)
    if args.table:
        print(table(there()))


if __name__ == "__main__":
    main()

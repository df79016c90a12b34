"""Decode throughput of one batch whose rows have adapters of their own: our RoAd bank, batched LoRA, PEFT's RoAd.

    python benchmarks/road_serving.py
    python benchmarks/road_serving.py --isolated
    python benchmarks/road_serving.py --device cuda --dtype bfloat16

A batch of 1, 2, 4, 8 and 16 rows, each row with another adapter of all linears of the blocks:

    none            tpvc's interpreter without adapters
    RoAd            the same with a bank of road_1, groups of 64
    LoRA            the same with LoRA of rank 8, y + bmm(bmm(x, A[ids]), B[ids]): the paper's baseline
    transformers    LlamaForCausalLM of transformers, the same weights in the same memory, without adapters
    PEFT RoAd       that model with the same rotations in PEFT and `adapter_names`, which loops over adapters in Python

All five decode turn by turn after a prompt of 32 tokens, the same tokens for all, a key-value cache each; a step is the
median over --steps after two warm-up steps, and every ratio is one of medians. Before anything is timed, logits of both
RoAds and of both models without adapters are compared. In bfloat16 and float16 PEFT's adapters are cast to the model's
dtype: left in float32, as PEFT makes them, a mixed batch is an error. Ours stay in float32 there.

--isolated: one token a row through one linear, then through what the adapters add to it, timed one after the other, so
that the adapters' cost is seen apart from the weights'. As many copies of the layer take turns as fill --footprint MB,
so that weights and adapters come from memory and not from a cache, as in a model. "LoRA, gathered" has A[ids] and
B[ids] ready, which a server with a fixed batch could keep; the other two gather in every step.

--cpu-time, for a machine that is busy with other work: counts the time that one thread was given, not the wall's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

from tpvc.compiler import frontends
from tpvc.compiler.adapters.road import Road, Rotation
from tpvc.compiler.interpret import Cache, Weight, in_memory, logits
from tpvc.compiler.ops import OPS, Op, rotate
from tpvc.compiler.program import Node, Program, linears
from tpvc.passes.bank_road import BankRoad

GROUP, RANK, PROMPT, WARM_UP = 64, 8, 32, 2
SHAPES = ((576, 1536), (2048, 8192), (4096, 11008))
"""(inputs, outputs) of --isolated."""

Step = Callable[[Tensor], Tensor]
"""Token ids [B, T] to logits [B, T, vocab]; keeps its own cache."""


def rotation(features: int, seeded: torch.Generator) -> Rotation:
    """road_1, angles and scales a little off the identity."""
    theta, alpha = (torch.randn(features // 2, generator=seeded) * 0.05 for _ in range(2))
    return Rotation("road_1", GROUP, theta, alpha + 1)


def lora(y: Tensor, x: Tensor, ids: Tensor, *, a: Tensor, b: Tensor) -> Tensor:
    """y [B, T, n] of x [B, T, k] plus every row's own low-rank product; a [adapters, k, r], b [adapters, r, n]."""
    return y + torch.bmm(torch.bmm(x, a[ids]), b[ids])


OPS["lora"] = Op(lora, 3, ("a", "b"))  # of this benchmark only: it runs in the same loop as everything else


def adapted(program: Program) -> tuple[Node, ...]:
    """The linears that get adapters."""
    return tuple(n for n in linears(program.nodes) if n.block is not None)


def with_lora(program: Program, count: int, weight: Weight, seeded: torch.Generator) -> tuple[Program, dict]:
    """(the program with a `lora` node after every adapted linear, its parameters)."""
    wanted, nodes, held, stands_for = {n.name for n in adapted(program)}, [], {}, {}
    for node in program.nodes:
        node = replace(node, inputs=tuple(stands_for.get(v, v) for v in node.inputs))
        nodes.append(node)
        if node.name in wanted:
            base, name = weight(node.params["weight"]), f"{node.name}.lora"
            outputs, inputs = base.shape
            a = torch.randn(count, inputs, RANK, generator=seeded) * inputs**-0.5
            b = torch.randn(count, RANK, outputs, generator=seeded) * 0.01
            held |= {f"{name}.a": a.to(base), f"{name}.b": b.to(base)}
            params = {role: f"{name}.{role}" for role in "ab"}
            nodes.append(Node(name, "lora", (node.name, node.inputs[0], "adapter_ids"), params, {}, node.block))
            stands_for[node.name] = name
    empty = tuple(Road(str(i), {}) for i in range(count))  # logits() lets only ids of RoAd's adapters through
    return replace(program, nodes=tuple(nodes), adapters=empty), held


def ours(program: Program, weight: Weight, ids: Tensor | None) -> Step:
    cache: Cache = {}
    return lambda tokens: logits(program, tokens, weight=weight, cache=cache, adapter_ids=ids)


def theirs(model: nn.Module, names: list[str] | None) -> Step:
    from transformers import DynamicCache

    cache = DynamicCache()
    extra = {} if names is None else {"adapter_names": names}
    return lambda tokens: model(input_ids=tokens, past_key_values=cache, use_cache=True, **extra).logits


def transformers_model(program: Program, weight: Weight, device: str, dtype: torch.dtype) -> nn.Module:
    """LlamaForCausalLM over the tensors that `weight` holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{k: v for k, v in program.source.config.items() if k not in ("dtype", "architectures")})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {name: weight(name) for name in program.params}
    missing = model.load_state_dict(state, strict=False, assign=True).missing_keys
    assert not set(missing) - {"lm_head.weight"}, missing
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    assert all(p.device.type == torch.device(device).type and p.dtype == dtype for p in model.parameters())
    return model.eval()


def peft_model(model: nn.Module, roads: tuple[Road, ...], dtype: torch.dtype) -> nn.Module:
    """`model`, wrapped in place, with an adapter for each of `roads`."""
    from peft import RoadConfig, get_peft_model

    ends = sorted({name.rsplit(".", 1)[-1] for name in roads[0].rotations})
    config = RoadConfig(variant="road_1", group_size=GROUP, target_modules=ends, task_type="CAUSAL_LM")
    keep = {"autocast_adapter_dtype": dtype == torch.float32}
    wrapped = get_peft_model(model, config, adapter_name=roads[0].name, **keep)
    for road in roads[1:]:
        wrapped.add_adapter(road.name, config, **keep)
    for road in roads:
        for name, own in road.rotations.items():
            layer = model.get_submodule(name)
            layer.road_theta[road.name].data.copy_(own.theta)
            layer.road_alpha[road.name].data.copy_(own.alpha)
    return wrapped.eval()


def now(args: argparse.Namespace) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if args.cpu_time else time.perf_counter()


def check(found: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Both RoAds, and both models without adapters, must agree; the sums of 30 blocks round differently."""
    for one, other in (("RoAd", "PEFT RoAd"), ("none", "transformers")):
        scale = float(found[one].float().abs().max())
        gap = float((found[one].float() - found[other].float()).abs().max()) / scale
        assert one == "none" or not torch.equal(found[one], found["none"]), "the adapters do nothing"
        print(f"logits of {one} and {other} differ by {gap:.1e} of the largest")
        assert gap < (1e-3 if dtype == torch.float32 else 0.1), "they are not the same model"


def whole_model(args: argparse.Namespace, dtype: torch.dtype) -> None:
    program, seeded = frontends.load(args.model), torch.Generator().manual_seed(0)
    count = max(args.rows)
    weight = in_memory(program, args.device, dtype)
    outputs = {n.name: weight(n.params["weight"]).shape[0] for n in adapted(program)}
    roads = tuple(Road(f"t{i}", {k: rotation(n, seeded) for k, n in outputs.items()}) for i in range(count))
    banked = BankRoad(roads)(program)
    bank = {k: v.to(args.device) for k, v in banked.params.items() if k not in program.params}
    low_rank, pairs = with_lora(program, count, weight, seeded)
    extra = bank | pairs

    def joined(name: str) -> Tensor:
        return extra[name] if name in extra else weight(name)

    plain = transformers_model(program, weight, args.device, dtype)
    wrapped = peft_model(transformers_model(program, weight, args.device, dtype), roads, dtype)

    names, table = ("none", "RoAd", "LoRA", "transformers", "PEFT RoAd"), []
    for rows in args.rows:
        ids = torch.arange(rows, device=args.device)
        steps = (
            ours(program, weight, None),
            ours(banked, joined, ids),
            ours(low_rank, joined, ids),
            theirs(plain, None),
            theirs(wrapped, [roads[i].name for i in range(rows)]),
        )
        contenders = dict(zip(names, steps, strict=True))
        tokens = torch.randint(3, program.facts.vocab_size, (rows, PROMPT + args.steps + WARM_UP), generator=seeded)
        tokens = tokens.to(args.device)
        found = {name: step(tokens[:, :PROMPT])[:, -1] for name, step in contenders.items()}
        if rows == args.rows[0] or rows == count:
            check(found, dtype)
        times: dict[str, list[float]] = {name: [] for name in names}
        for t in range(PROMPT, tokens.shape[1]):
            for name, step in contenders.items():
                began = now(args)
                step(tokens[:, t : t + 1])
                times[name].append(now(args) - began)
        table.append((rows, {name: sorted(t[WARM_UP:]) for name, t in times.items()}))
        print(f"{rows} rows: {', '.join(f'{n} {median(t) * 1e3:.1f} ms' for n, t in table[-1][1].items())}", flush=True)

    print("\nms a step (its quartiles); tokens/s of the batch")
    print("| rows = adapters |" + "".join(f" {name} |" for name in names))
    print("|---|" + "---|" * len(names))
    for rows, times in table:
        cells = (
            f" {median(t) * 1e3:.1f} ({t[len(t) // 4] * 1e3:.1f}-{t[-1 - len(t) // 4] * 1e3:.1f});"
            f" {rows / median(t):.1f} |"
            for t in times.values()
        )
        print(f"| {rows} |" + "".join(cells))
    print("\nratios of throughput; in parentheses what the adapters add to a step, in ms")
    print("| rows | RoAd / none | LoRA / none | RoAd / LoRA | PEFT RoAd / transformers | RoAd / PEFT RoAd |")
    print("|---|---|---|---|---|---|")
    for rows, times in table:
        m = {name: median(t) for name, t in times.items()}

        def against(one: str, base: str, m: dict[str, float] = m) -> str:
            return f"{m[base] / m[one]:.2f} x ({(m[one] - m[base]) * 1e3:+.1f})"

        print(
            f"| {rows} | {against('RoAd', 'none')} | {against('LoRA', 'none')} | {m['LoRA'] / m['RoAd']:.2f} x"
            f" | {against('PEFT RoAd', 'transformers')} | {m['PEFT RoAd'] / m['RoAd']:.2f} x |"
        )


def isolated(args: argparse.Namespace, dtype: torch.dtype) -> None:
    print("us: median of the linear, and of what is added behind it")
    print("| inputs -> outputs | rows | linear | RoAd | LoRA | LoRA, gathered | LoRA / RoAd | gathered / RoAd |")
    print("|---|---|---|---|---|---|---|---|")
    seeded, place = torch.Generator().manual_seed(0), {"device": args.device, "dtype": dtype}
    count = max(args.rows)
    attrs = {"group": GROUP, "rows": tuple(range(count))}
    for inputs, outputs in SHAPES:
        layers = []
        for _ in range(max(2, args.footprint * 2**20 // (inputs * outputs * dtype.itemsize))):
            w = torch.empty(outputs, inputs, **place).uniform_(-(inputs**-0.5), inputs**-0.5)
            vectors = zip(*(rotation(outputs, seeded).vectors for _ in range(count)), strict=True)
            c, s = (torch.stack(v).to(args.device) for v in vectors)
            a, b = torch.randn(count, inputs, RANK, **place), torch.randn(count, RANK, outputs, **place)
            layers.append((w, c, s, a, b))
        for rows in args.rows:
            ids, x = torch.arange(rows, device=args.device), torch.randn(rows, 1, inputs, **place)
            gathered = [(a[ids], b[ids]) for *_, a, b in layers]
            times: dict[str, list[float]] = {k: [] for k in ("linear", "RoAd", "LoRA", "gathered")}
            for i in range(args.warm_up + args.repeats):
                w, c, s, a, b = layers[i % len(layers)]
                ready_a, ready_b = gathered[i % len(layers)]
                for name in ("RoAd", "LoRA", "gathered"):
                    began = now(args)
                    y = nn.functional.linear(x, w)
                    between = now(args)
                    if name == "RoAd":
                        rotate(y, ids, cosine=c, sine=s, **attrs)
                    elif name == "LoRA":
                        lora(y, x, ids, a=a, b=b)
                    else:
                        y + torch.bmm(torch.bmm(x, ready_a), ready_b)
                    ended = now(args)
                    if i >= args.warm_up:
                        times["linear"].append(between - began)
                        times[name].append(ended - between)
            m = {name: median(t) * 1e6 for name, t in times.items()}
            cells = "".join(f" {m[n]:.0f} ({m[n] / m['linear']:.1%}) |" for n in ("RoAd", "LoRA", "gathered"))
            ratios = f" {m['LoRA'] / m['RoAd']:.2f} x | {m['gathered'] / m['RoAd']:.2f} x |"
            print(f"| {inputs} -> {outputs} | {rows} | {m['linear']:.0f} |{cells}{ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a Llama checkpoint")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isolated", action="store_true", help="one linear instead of the model")
    parser.add_argument("--repeats", type=int, default=60, help="of --isolated")
    parser.add_argument("--warm-up", type=int, default=8, help="of --isolated")
    parser.add_argument("--footprint", type=int, default=256, help="MB of weights that --isolated goes through")
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine: CPU seconds of one thread")
    args = parser.parse_args()
    if args.cpu_time:
        if args.device != "cpu":
            parser.error("--cpu-time sees nothing of a GPU's work")
        args.threads = 1
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        (isolated if args.isolated else whole_model)(args, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()

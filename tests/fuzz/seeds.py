"""Small valid inputs of every reader, made by the writers of tpvc and of the formats' own packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from mutate import Tree
from safetensors.torch import save

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "mscale": 1.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, dict] = {
    "llama": {"model_type": "llama", "rope_scaling": LLAMA3, "hidden_act": "silu", "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 0},
    "qwen3": {"model_type": "qwen3", "rope_parameters": YARN, "layer_types": ["full_attention"]},
    "phi3": {"model_type": "phi3", "sliding_window": None, "partial_rotary_factor": 0.5},
    "gemma2": {
        "model_type": "gemma2",
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "sliding_window": 8,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "opt": {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "n_inner": None},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 10000, "hidden_act": "gelu"},
}


def tree_of(directory: Path) -> Tree:
    found = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in found}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def config(family: str) -> dict:
    return SIZES | CONFIGS[family]


def checkpoint(family: str, sharded: bool = False) -> Tree:
    """A random model of a family, with its tokens' file."""
    from tpvc.compiler.frontends.architecture import architecture

    drawn = architecture(config(family))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in drawn.shapes.items():
        stored = shape[::-1] if name in drawn.transposed else shape
        tensors[name] = torch.randn(stored, generator=generator).to(torch.bfloat16 if "norm" in name else torch.float32)
    tree: Tree = {"config.json": _json(config(family)), "generation_config.json": _json({"eos_token_id": [2, 5]})}
    if not sharded:
        return tree | {"model.safetensors": save(tensors, {"format": "pt"})}
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    shards = {f: save({n: tensors[n] for n in names if where[n] == f}) for f in set(where.values())}
    return tree | shards | {"model.safetensors.index.json": _json({"metadata": {"total_size": 1}, "weight_map": where})}


def program(work: Path, family: str = "llama"):
    from tpvc.compiler import frontends

    directory = work / f"model-{family}"
    lay(checkpoint(family), directory)
    return frontends.load(directory)


def lay(tree: Tree, directory: Path) -> None:
    for name, data in tree.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)


def rounded(given, grid):
    """Its linears in the blocks as integers."""
    from tpvc.compiler.program import dense, linears
    from tpvc.passes.round_to_nearest import quantize

    names = [n.params["weight"] for n in linears(given.nodes) if n.block is not None]
    return given.with_params({n: quantize(dense(given.params[n]), grid, torch.float16) for n in names})


def quantised(work: Path) -> list[Tree]:
    """Checkpoints in compressed-tensors', GPTQ's, AWQ's and AutoRound's layouts."""
    from tpvc.compiler.backends import huggingface
    from tpvc.compiler.program import Grid
    from tpvc.passes.round_activations import RoundActivations
    from tpvc.passes.round_cache import RoundCache

    model, found = program(work), []
    plans = [(Grid(4, 16, False), "transformers"), (Grid(3, -1, True), "vllm"), (Grid(8, 0, True), "transformers")]
    plans += [(Grid(4, 16, False), "vllm"), (Grid(4, 16, True), "gptq"), (Grid(8, 16, False), "gptq_v2")]
    for number, (grid, runtime) in enumerate([*plans, (Grid(4, 16, False), "awq")]):
        out = work / f"q{number}"
        huggingface.emit(rounded(model, grid), out, None, {"tpvc": "0"}, runtime=runtime)
        tree = tree_of(out)
        for name in ("tpvc.json", "generation_config.json"):
            tree.pop(name, None)
        found.append(tree)
    names = frozenset(n for n, p in rounded(model, Grid(8, -1, True)).params.items() if getattr(p, "grid", None))
    rows = RoundActivations("int8", names)(rounded(model, Grid(8, -1, True)))
    huggingface.emit(RoundCache()(rows), work / "q-rows", None, {})
    found.append({n: d for n, d in tree_of(work / "q-rows").items() if n in ("config.json", "model.safetensors")})
    whole = RoundActivations("int8-static", names, dict.fromkeys(names, (0.0625, -3)))(
        rounded(model, Grid(8, -1, True))
    )
    huggingface.emit(whole, work / "q-static", None, {})
    found.append({n: d for n, d in tree_of(work / "q-static").items() if n in ("config.json", "model.safetensors")})
    gptq = next(t for t in found if b'"gptq"' in t["config.json"])
    told = json.loads(gptq["config.json"])
    settings = told.pop("quantization_config")
    found.append(
        gptq | {"config.json": _json(told), "quantize_config.json": _json(settings | {"dynamic": {"-:lm": {}}})}
    )
    auto = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": 16,
        "sym": True,
        "extra_config": {"lm_head": {"bits": 16}},
    }
    found.append(gptq | {"config.json": _json(told | {"quantization_config": auto})})
    return found


def roads(work: Path) -> list[Tree]:
    """RoAd adapters of all variants for the llama, with its directory's name before, and a LoRA, which is none."""
    from tpvc.compiler.adapters import lora_files, road_files
    from tpvc.compiler.adapters.lora import Lora, Update
    from tpvc.compiler.adapters.road import STORED, Road, Rotation
    from tpvc.compiler.program import linears

    model, found = program(work), []
    names = [n for n in linears(model.nodes) if n.block is not None]
    for variant in STORED:
        rotations = {}
        for node in names:
            outputs = model.params[node.params["weight"]].shape[0]
            numbers = {"road_1": outputs // 2, "road_2": outputs, "road_4": 2 * outputs}[variant]
            rotations[node.name] = Rotation(variant, 4, torch.zeros(numbers), torch.ones(numbers))
        out = work / variant
        road_files.write(Road("one", rotations), out, model, {})
        found.append(tree_of(out))
    updates = {
        n.name: Update(
            torch.zeros(2, model.params[n.params["weight"]].shape[1]),
            torch.zeros(model.params[n.params["weight"]].shape[0], 2),
            2.0,
        )
        for n in names
    }
    lora_files.write(Lora("two", 2, 4, updates), work / "lora", model, {})
    return [*found, tree_of(work / "lora")]


def prompts(work: Path) -> list[Tree]:
    from tpvc.compiler.adapters import prompt_files
    from tpvc.compiler.adapters.prompt import Prompt

    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    about = {"name": "m", "heads": 2, "layers": 1, "family": "llama"}
    options = {"template": "{text}\n", "columns": {"text": "t"}, "labels": {"0": "no"}, "max_length": 32}
    for name, start in (("with", values * 0), ("without", None)):
        prompt_files.write(Prompt(name, values, start), work / name, about, {"options": options})
    return [tree_of(work / "with"), {n: d for n, d in tree_of(work / "without").items() if n != "tpvc.json"}]


def artefacts(work: Path) -> list[Tree]:
    """What `tpvc quantize` leaves: weights, adapters, prompts and tpvc.json beside each other."""
    from tpvc.compiler.adapters.prompt import Prompt
    from tpvc.compiler.adapters.road import Road, Rotation
    from tpvc.compiler.backends import huggingface
    from tpvc.compiler.program import Grid, linears
    from tpvc.passes.bank_prompt import BankPrompt
    from tpvc.passes.bank_road import BankRoad

    model = rounded(program(work), Grid(4, 16, False))
    turns = {
        n.name: Rotation("road_1", 4, torch.zeros(16), torch.ones(16))
        for n in linears(model.nodes)
        if "o_proj" in n.name
    }
    model = BankPrompt((Prompt("task", torch.ones(2, 32)),))(BankRoad((Road("one", turns),))(model))
    told = {
        "artefact": "checkpoint",
        "tpvc": "0",
        "source": {
            "name": "m",
            "files": {"model.safetensors": "ab" * 32},
            "manifest": {"source": {"name": "n"}, "passes": []},
        },
        "adapters": [{"name": "one"}],
        "prompts": [{"name": "task", "tokens": 2}],
        "options": {"bits": 4, "to": "vllm"},
        "passes": [{"name": "RoundToNearest", "grid": "W4"}],
        "calibration": {"dataset": "builtin", "tokens": 10},
        "blocks": [{"block": 0, "linears": [], "error": 0.1, "error_rtn": 0.2}],
    }
    huggingface.emit(model, work / "artefact", None, told)
    return [tree_of(work / "artefact")]


def importances(work: Path) -> list[Tree]:
    from tpvc.compiler.tuning import importance_file

    path = work / "one.importance.safetensors"
    omega = {"a.weight": torch.rand(4, 4), "b.weight": torch.rand(4)}
    about = {"method": "path", "base": None, "train": "weights", "targets": "all", "rank": None, "data": {}}
    layers = SimpleNamespace(layers={"a.weight": 0, "b.weight": 1})
    importance_file.write(path, omega, layers, {"a.weight": torch.zeros(4, 4)}, "normalised", about)
    return [{"file.safetensors": path.read_bytes()}]


def ggufs(work: Path) -> list[Tree]:
    """llama with float and with integer blocks, gemma2, gemma3 and qwen2, and a tokenizer's arrays."""
    import gguf
    import numpy as np

    from tpvc.compiler.frontends.architecture import architecture
    from tpvc.compiler.frontends.gguf import INSIDE, OUTSIDE, RENAMED

    kinds = gguf.GGMLQuantizationType
    found = []
    for family, kind in (
        ("llama", kinds.F32),
        ("llama", kinds.Q8_0),
        ("gemma2", kinds.F16),
        ("gemma3_text", kinds.F16),
        ("qwen2", kinds.Q4_0),
        ("phi3", kinds.F32),
    ):
        drawn = architecture(config(family) | {"rope_scaling": None, "attention_bias": family == "qwen2" or None})
        path = work / f"{family}-{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, family.removesuffix("_text"))
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(32)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_key_length(32)
        writer.add_value_length(32)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        if family == "gemma2":
            writer.add_attn_logit_softcapping(20.0)
            writer.add_final_logit_softcapping(10.0)
        if family.startswith("gemma"):
            writer.add_sliding_window(8)
        if family == "llama" and kind == kinds.F32:
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list([f"t{i}" for i in range(40)])
        writer.add_token_types([1] * 40)
        writer.add_token_merges(["t 0", "t 1"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages }}")
        inside = INSIDE | RENAMED.get(family, {})
        names = {f"{hf}": own for own, hf in OUTSIDE.items()} | {
            f"model.layers.0.{hf}": f"blk.0.{own}" for own, hf in inside.items()
        }
        rng = np.random.default_rng(0)
        for name, shape in drawn.shapes.items():
            stem, _, suffix = name.rpartition(".")
            if stem not in names:
                continue
            value = rng.standard_normal(shape).astype(np.float32)
            own = kind if len(shape) == 2 else kinds.F32
            data = (
                value.astype(np.float16)
                if own == kinds.F16
                else value
                if own == kinds.F32
                else gguf.quantize(value, own)
            )
            writer.add_tensor(f"{names[stem]}.{suffix}", data, raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found.append({"model.gguf": path.read_bytes()})
    return found


def packages(work: Path) -> list[Tree]:
    """A Triton package with made-up binaries: nothing is compiled here."""
    from tpvc.compiler.backends import triton
    from tpvc.kernels.aot import Binary, Built, Kept, Resources, Variant
    from tpvc.kernels.targets import named

    variant = Variant(
        "tiny:sum", (("x", "*fp16"), ("bias", "none"), ("n_rows", "i32")), (("BLOCK", 256),), 4, 2, ("x",)
    )
    took = Resources(32, 0, 0, 0, 0, 100, 0, 0, 4)
    code = Binary(variant, named("cuda:90"), b"\x7fELF", "sum", 4, 512, (0, 1, 0), True, took, "3.7.1", "ab" * 32)
    built = Built((Kept(code, (("sum", (0,)),)),), ())
    found = []
    for number, model in enumerate((program(work), packed(work), prompted(work))):
        out = work / f"package{number}"
        out.mkdir()
        with (
            mock.patch("tpvc.kernels.aot.build", return_value=built),
            mock.patch.object(triton, "candidates", return_value={}),
        ):
            triton.emit(model, out, None, [named("cuda:90")], torch.float16, capacity=16)
        found.append(tree_of(out))
    return found


def packed(work: Path):
    from tpvc.compiler.program import Grid

    return rounded(program(work), Grid(4, 16, False))


def prompted(work: Path):
    from tpvc.compiler.adapters.prompt import Prompt
    from tpvc.passes.bank_prompt import BankPrompt

    return BankPrompt((Prompt("task", torch.ones(2, 32)),))(program(work, "qwen2"))


def onnx_folders(work: Path) -> list[Tree]:
    from tpvc.compiler.backends import onnx

    out = work / "onnx"
    out.mkdir()
    onnx.emit(packed(work), out, None)
    told = {
        "prompts": [{"name": "task", "first_id": 40, "tokens": 2}],
        "source": {"name": "m"},
        "options": {"to": "onnx"},
    }
    return [tree_of(out) | {"tpvc.json": _json(told)}]


def tokenizers(work: Path) -> list[Tree]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        ["one two", "three"], trainers.BpeTrainer(vocab_size=60, special_tokens=["<s>", "</s>"], show_progress=False)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
    wrapped.save_pretrained(work / "tokenizer")
    tree = tree_of(work / "tokenizer")
    told = json.loads(tree["tokenizer_config.json"])
    code = b"import os\nos.system('touch was_run')\n"
    remote = told | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    named = told | {
        "chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "../../evil", "template": "x"}]
    }
    plain = {n: d for n, d in tree.items() if n != "chat_template.jinja"}
    return [
        tree,
        tree | {"tokenizer_config.json": _json(remote), "evil.py": code, "config.json": _json({"model_type": "llama"})},
        plain | {"tokenizer_config.json": _json(named)},
    ]


def parquets(work: Path) -> list[Tree]:
    import pyarrow
    import pyarrow.parquet

    tables = [
        {"text": ["one two", "three", None]},
        {"prompt": ["a", "b"], "completion": ["c", "d"]},
        {"messages": [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]},
        {"n": [1, 2], "body": ["x", "y"]},
    ]
    found = []
    for number, columns in enumerate(tables):
        for codec in ("snappy", "zstd", "none"):
            path = work / f"{number}-{codec}.parquet"
            pyarrow.parquet.write_table(pyarrow.table(columns), path, compression=codec, row_group_size=2)
            found.append({"file.parquet": path.read_bytes()})
    return found


TEXTS: list[Tree] = [
    {"file.txt": "plain text, möglichst kurz\n".encode()},
    {
        "file.jsonl": b'{"text": "one"}\n{"prompt": "a", "completion": "b"}\n\n'
        b'{"messages": [{"role": "user", "content": "x"}]}\n'
    },
    {"file.csv": b'id,text\n1,"one, two"\n2,three\n'},
    {"file.csv": b"prompt,completion\na,b\n"},
    {"file.tsv": b"n\tbody\n1\tone\n"},
]
EXAMPLES: list[Tree] = [
    {"file.jsonl": b'{"prompt": "a", "completion": "b"}\n{"text": "c", "label": 1}\n{"text": "d", "label": true}\n'},
    {"file.csv": b'text,label\n"one, two",0\nthree,1\n'},
    {"file.tsv": b"prompt\tcompletion\na\tb\n"},
]
RECIPES: list[Tree] = [
    {
        "file.yaml": b"merge_method: ties\nprompts:\n  - prompt: ./a\n    name: one\n"
        b"    parameters: {weight: 1.0, density: 0.5}\n    data: ./dev.jsonl\n  - prompt: ./b\nbase_prompt: ./c\n"
        b"parameters: {lambda: search, seed: 3}\nmodel: smollm2-135m\n"
    },
    {"file.yaml": b"a: &a [x, x]\nb: &b [*a, *a, *a]\nprompts: *b\n"},
]

SEEDS: dict[str, Callable[[Path], list[Tree]]] = {
    "safetensors": lambda work: [{"file.safetensors": checkpoint(f)["model.safetensors"]} for f in ("llama", "gpt2")],
    "config": lambda work: [{"config.json": _json(config(f))} for f in CONFIGS],
    "checkpoint": lambda work: [*(checkpoint(f) for f in CONFIGS), *(checkpoint(f, True) for f in ("llama", "gpt2"))],
    "quantised": quantised,
    "road": roads,
    "prompt": prompts,
    "artefact": artefacts,
    "importance": importances,
    "gguf": ggufs,
    "package": packages,
    "onnx": onnx_folders,
    "tokenizer": tokenizers,
    "parquet": parquets,
    "text": lambda work: TEXTS,
    "examples": lambda work: EXAMPLES,
    "recipe": lambda work: RECIPES,
}
"""Reader -> its seeds; `work` is an empty directory to make them in."""

"""The ONNX backend: a folder that stock ONNX Runtime GenAI runs, and on request a twin in standard operators only.

model.onnx, model.onnx.data     MatMulNBits, GroupQueryAttention; logits of the last new token
genai_config.json, tokenizer files
adapters/NAME.onnx_adapter      for every adapter, what to feed for it; the numbers lie in the graphs
portable/model.onnx, .data      operators of the ONNX standard, opset 21; the same names; logits of every new token

A prompt that is a constant prefix of the program (`passes.fold_prompt`) goes into the portable graph only.
Keys and values stay in float: the int8 cache of GroupQueryAttention wants scales that are known beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Node, Program, constant_prefix, folded_tokens
from tpvc.passes.round_cache import float_cache


def emit(
    program: Program,
    directory: Path,
    tokenizer: Any,
    *,
    accuracy_level: int = 4,
    portable: bool = False,
    all_logits: bool = False,
) -> None:
    """Write the folder. `directory` exists and is empty; after an error it holds rubbish that the caller removes.

    accuracy_level  4: activations rounded to int8 in every MatMulNBits, which the fast kernels want; 0: float32
    portable        write `portable/` too
    all_logits      logits [B, T, vocab] of every new token, for scoring; otherwise [B, 1, vocab], of the last one
    tokenizer       anything with `save_pretrained`, or None
    TpvcError with the node's name, before any file is written, for what has no exact lowering.
    """
    from tpvc.compiler.backends.onnx import adapters, genai_config
    from tpvc.compiler.backends.onnx.check import check
    from tpvc.compiler.backends.onnx.fusions import NOTHING, plan
    from tpvc.compiler.backends.onnx.genai import GENAI
    from tpvc.compiler.backends.onnx.graph import MICROSOFT, OPSET
    from tpvc.compiler.backends.onnx.standard import STANDARD

    program = float_cache(program)
    check(program, GENAI, accuracy_level)
    if not constant_prefix(program):
        fused = plan(program)
        domains = {"": OPSET, MICROSOFT: 1}
        head = None if all_logits else head_of(program)
        _write(program, directory, GENAI, fused, domains, accuracy_level, head)
        genai_config.write(program, directory, share_buffer=bool(fused.attention) and not folded_tokens(program))
        adapters.write_files(program, directory)
    elif not portable:
        raise TpvcError(
            "ONNX Runtime GenAI fills its cache itself, so that a prompt cannot be a constant prefix there; fold it as"
            " kv, or ask for the portable graph"
        )
    if portable:
        (directory / "portable").mkdir()
        _write(program, directory / "portable", STANDARD, NOTHING, {"": OPSET}, accuracy_level, None)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def head_of(program: Program) -> Node | None:
    """The linear after the last block from which on nothing but its own result is used, or None."""
    nodes = program.epilogue
    start = next((i for i, n in enumerate(nodes) if n.op == "linear"), None)
    if start is None:
        return None
    own = {nodes[start].name, "adapter_ids"}
    for node in nodes[start + 1 :]:
        if not own.issuperset(node.inputs):
            return None
        own.add(node.name)
    return nodes[start]


def _write(
    program: Program,
    directory: Path,
    table: Mapping,
    fused: Any,
    domains: Mapping[str, int],
    accuracy_level: int,
    head: Node | None,
) -> None:
    """model.onnx and its data: one node after the other, those that went into an earlier one left out."""
    import onnx_ir as ir

    from tpvc.compiler.backends.onnx.adapters import INPUT, add_input
    from tpvc.compiler.backends.onnx.genai import last_token
    from tpvc.compiler.backends.onnx.graph import Graph
    from tpvc.compiler.backends.onnx.standard import Context

    ids, flows = ir.DataType.INT64, ir.DataType.FLOAT
    with Graph(directory, domains) as graph:
        c = Context(program, graph, fused, accuracy_level)
        c.values["input_ids"] = graph.input("input_ids", ids, ("batch_size", "sequence_length"))
        c.values["mask"] = graph.input("attention_mask", ids, ("batch_size", "total_sequence_length"))
        if program.adapters:
            c.values[INPUT] = add_input(graph)
        for node in program.nodes:
            if node.name in fused.absorbed:
                continue
            if node is head:
                c.values[node.inputs[0]] = last_token(c, c.values[node.inputs[0]])
            c.values[node.name] = table[node.op](c, node)
        tokens = "sequence_length" if head is None else 1
        last = program.nodes[-1].name
        graph.output(c.values[last], "logits", flows, ("batch_size", tokens, c.widths[last]))
        for layer, cache in enumerate(c.caches):
            for kind, value, past in zip(("key", "value"), cache, graph.inputs[2 + 2 * layer :], strict=False):
                length = "cached_sequence_length" if constant_prefix(program) else "total_sequence_length"
                shape = ("batch_size", past.shape[1], length, past.shape[3])
                graph.output(value, f"present.{layer}.{kind}", flows, shape)
        graph.save()

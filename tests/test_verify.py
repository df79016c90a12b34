"""Every illegal Program is refused by the node's name and the fact; legal ones come back as they are."""

from dataclasses import replace

import pytest
import torch

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.program import Facts, Node, Program
from tpvc.compiler.verify import ports, verify

FACTS = Facts("test", 10, 4, 2, 2, 1, 2, 16, None, (), None)
PARAMS = {"table": torch.zeros(10, 4), "norm": torch.ones(4), "square": torch.zeros(4, 4), "half": torch.zeros(2, 4)}


def block(i: int, x: str) -> list[Node]:
    at = {"block": i}
    return [
        Node(f"{i}.norm", "rms_norm", (x,), {"weight": "norm"}, {"eps": 1e-5}, **at),
        Node(f"{i}.q", "linear", (f"{i}.norm",), {"weight": "square"}, **at),
        Node(f"{i}.k", "linear", (f"{i}.norm",), {"weight": "half"}, **at),
        Node(f"{i}.v", "linear", (f"{i}.norm",), {"weight": "half"}, **at),
        Node(f"{i}.rope", "rope", (f"{i}.q", "positions"), {}, {"head_dim": 2, "inv_freq": (1.0,)}, **at),
        Node(
            f"{i}.attention",
            "attention",
            (f"{i}.rope", f"{i}.k", f"{i}.v", "mask"),
            {},
            {"heads": 2, "kv_heads": 1, "scale": 1.0},
            **at,
        ),
        Node(f"{i}.out", "add", (x, f"{i}.attention"), **at),
    ]


def legal() -> Program:
    head = Node("logits", "linear", ("1.out",), {"weight": "table"})
    nodes = [Node("embed", "embed", ("input_ids",), {"weight": "table"}), *block(0, "embed"), *block(1, "0.out"), head]
    return Program(tuple(nodes), PARAMS, FACTS)


def changed(which: str, **fields) -> Program:
    program = legal()
    return replace(program, nodes=tuple(replace(n, **fields) if n.name == which else n for n in program.nodes))


def test_a_legal_program_is_returned():
    program = legal()
    assert verify(program) is program
    assert program.blocks == 2
    assert [n.name for n in program.prologue] == ["embed"]
    assert [n.name for n in program.epilogue] == ["logits"]
    assert ports(program, 1) == ("0.out", "1.out")


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("0.norm", {"op": "rmsnorm"}, "op is not in the table"),
        ("1.norm", {"name": "0.norm"}, "already taken"),
        ("0.out", {"inputs": ("embed",)}, "takes 2"),
        ("0.q", {"inputs": ("1.norm",)}, "not defined before"),
        ("0.norm", {"attrs": {}}, "lacks the attribute 'eps'"),
        ("0.norm", {"attrs": {"eps": 1e-5, "momentum": 0.1}}, "unknown attribute 'momentum'"),
        ("0.q", {"params": {}}, "lacks the parameter 'weight'"),
        ("0.q", {"params": {"weight": "missing"}}, "does not hold"),
        ("0.q", {"params": {"weight": "square", "bias": "half"}}, "bias has shape"),
        ("0.rope", {"attrs": {"head_dim": 2, "inv_freq": (1.0, 0.5)}}, "rotates more"),
        ("0.attention", {"attrs": {"heads": 3, "kv_heads": 2, "scale": 1.0}}, "do not share"),
        ("0.attention", {"attrs": {"heads": 2, "kv_heads": 2, "scale": 1.0}}, "features"),
        ("0.out", {"inputs": ("embed", "0.k")}, "features"),
        ("1.norm", {"block": 3}, "block 3 follows"),
        ("1.norm", {"inputs": ("0.attention",)}, "from inside block 0"),
    ],
)
def test_what_is_illegal_is_named(name, fields, says):
    with pytest.raises(TpvcError) as error:
        verify(changed(name, **fields), after="SomePass")
    assert says in str(error.value)
    assert "SomePass" in str(error.value)


def test_a_block_that_reads_two_values_has_no_port():
    program = changed("1.out", inputs=("embed", "1.attention"))
    with pytest.raises(TpvcError, match="exactly one"):
        ports(verify(program), 1)

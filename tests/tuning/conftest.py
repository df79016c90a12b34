"""The tiny model as a Program; and a regression small enough to know the answer, with what phases need of it."""

from types import SimpleNamespace

import pytest
import torch

from tpvc.compiler.interpret import run
from tpvc.compiler.program import Facts, Node, Program
from tpvc.compiler.tuning.importance import record
from tpvc.compiler.tuning.space import make_space

OUT, IN, ROWS = 16, 32, 64
FACTS = Facts("toy", 4, IN, 1, 1, 1, IN, 8, None, (), None)


@pytest.fixture
def regression():
    """regression(kind, rank=4, seed=0, out=16, in_=32) -> what a test asks for: see Regression."""
    return Regression


class Regression:
    """y = x W^T must become x (W + U)^T for a low-rank U; loss: mean over rows and outputs of the squared error."""

    def __init__(self, kind, rank=4, seed=0, out=OUT, in_=IN, noise=0.0):
        draw = torch.Generator().manual_seed(seed)
        weight = torch.randn(out, in_, generator=draw) / in_**0.5
        self.x = torch.randn(ROWS, in_, generator=draw)
        update = torch.randn(out, 4, generator=draw) @ torch.randn(4, in_, generator=draw) / in_**0.5
        self.y = self.x @ (weight + update).T + noise * torch.randn(ROWS, out, generator=draw)
        node = Node("proj", "linear", ("x",), {"weight": "proj.weight"}, {}, 0)
        self.program = Program((node,), {"proj.weight": weight}, FACTS)
        self.space = make_space(self.program, kind, "all-linear", rank, seed)
        self.held = self.program.params.__getitem__
        self.name = next(iter(self.space.layers))

    def loss(self, program, weight, rows=slice(None)):
        values = {"x": self.x[rows][None], "adapter_ids": torch.tensor([self.space.adapter])}
        return (run(program.nodes, values, weight)[0] - self.y[rows]).square().mean()

    def now(self, rows=slice(None)):
        with torch.no_grad():
            return float(self.loss(*self.space.weight(self.held, torch.float32), rows))

    def gradients(self, rows=slice(None)):
        """dL/d(value) by protected name; leaves the parameters' gradients behind."""
        for p in self.space.params.values():
            p.grad = None
        leaves = self.space.opened()
        self.loss(*self.space.seen(self.held, torch.float32, leaves), rows).backward()
        found = {n: self.space.gradient(leaves, n).clone() for n in self.space.layers}
        self.space.spread(leaves)
        return found

    def params(self):
        return {n: p.detach().clone() for n, p in self.space.params.items()}

    def learn(self, optimizer, steps, rows=lambda step: slice(None), two_sided=False):
        """Record `steps` steps; returns SimpleNamespace(omega, moved, start, end, drop on the batches seen)."""
        omega = {n: torch.zeros_like(self.space.value(n)) for n in self.space.layers}
        start, first, drop = self.params(), self.now(), 0.0
        for step in range(steps):
            own, before, was = self.gradients(rows(step)), self.params(), self.now(rows(step))
            optimizer.step()
            drop += was - self.now(rows(step))
            if two_sided:
                after = self.gradients(rows(step))
                own = {n: (g + after[n]) / 2 for n, g in own.items()}
            record(omega, self.space, own, before)
        moved = self.space.value(self.name) - self.space.value(self.name, start)
        return SimpleNamespace(
            omega=omega[self.name], moved=moved, start=start, drop=drop, loss_drop=first - self.now()
        )

    def optimizer(self, kind, lr):
        params = list(self.space.params.values())
        return torch.optim.SGD(params, lr) if kind == "sgd" else torch.optim.AdamW(params, lr, weight_decay=0)


@pytest.fixture
def tiny_program(tiny_llama):
    from tpvc.compiler import frontends

    return frontends.load(tiny_llama)

"""Data parallelism over the processes that torchrun starts: every one computes its share of a batch.

Gradients are sums over tokens divided by the tokens of the whole batch, so that adding them up gives what one process
would have found, but for the order of additions. All processes then take the same step. Process 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tpvc.compiler.output import working
from tpvc.compiler.program import Lazy, QTensor
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.store import BlockStore


@dataclass(frozen=True)
class Ranks:
    """This process's number, and how many there are."""

    rank: int = 0
    count: int = 1

    def own(self, indices: list[int]) -> list[int]:
        """The part of a batch that is this process's; it may be empty."""
        return indices[self.rank :: self.count]

    def total(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def told(self, progress: Progress) -> Progress:
        return progress if self.rank == 0 else silent

    @contextmanager
    def published(self, out: Path, own: AbstractContextManager[Path]) -> Iterator[Path]:
        """`own`, of tpvc.compiler.output, entered by process 0; the others get the same working directory."""
        if self.rank:
            self.wait()
            yield working(out)
            return
        with own as work:
            self.wait()
            yield work

    def store(self, directory: Path, fingerprint: dict, replace: bool = False) -> SharedStore:
        """BlockStore.open by process 0, then seen by all."""
        if self.rank == 0:
            BlockStore.open(directory, fingerprint, replace)
        self.wait()
        return SharedStore(BlockStore(directory), self)


@dataclass(frozen=True, eq=False)
class SharedStore:
    """A BlockStore that all processes read, and process 0 writes to when all have come there."""

    inner: BlockStore
    ranks: Ranks

    def finished(self, block: int) -> tuple[dict[str, Lazy], dict] | None:
        return self.inner.finished(block)

    def streams(self, block: int) -> dict[str, Tensor]:
        return self.inner.streams(block)

    def save(
        self, block: int, params: Mapping[str, QTensor], record: dict, streams: Mapping[str, Tensor] | None
    ) -> None:
        self.ranks.wait()
        if self.ranks.rank == 0:
            self.inner.save(block, params, record, streams)
        self.ranks.wait()

    def clear(self) -> None:
        self.ranks.wait()
        if self.ranks.rank == 0:
            self.inner.clear()


def is_first() -> bool:
    """Whether this process is the one that writes and speaks, as torchrun says in the environment."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """Those that torchrun says in the environment; one where it says nothing. Over gloo, and nccl on CUDA devices."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:  # "cuda" is then the process's own device
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(torch.distributed.get_rank(), count)
    finally:
        torch.distributed.destroy_process_group()

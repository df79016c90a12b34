"""Data parallelism over the processes that torchrun starts: every one computes its share of a batch.

Gradients are sums over tokens divided by the tokens of the whole batch, so that adding them up gives what one process
would have found, but for the order of additions. All processes then take the same step. Process 0 writes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.output import working
from tpvc.compiler.program import Lazy, QTensor
from tpvc.compiler.progress import Progress, silent
from tpvc.compiler.store import BlockStore

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others; it is between two blocks that they wait longest."""

Batch = TypeVar("Batch", Tensor, list)


@dataclass(frozen=True)
class Ranks:
    """This process's number, how many there are, and where they exchange tensors.

    Where a process has ended, or is not heard of for PATIENCE, the others find out in what they do together: TpvcError.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    def own(self, batch: Batch) -> Batch:
        """The part of a batch, a list or the rows of a tensor, that is this process's; it may be empty."""
        return batch[self.rank :: self.count]

    def total(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.count > 1:
            with _together():
                for tensor in tensors:
                    torch.distributed.all_reduce(tensor)

    def whole(self, loss: Tensor, params: Iterable[Tensor]) -> None:
        """Of a loss and its gradients, computed on this process's part of a batch, make those of the batch."""
        self.total([loss.detach(), *(p.grad for p in params if p.grad is not None)])

    def summed(self, value: float) -> float:
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        self.total([total])
        return total.item()

    def joined(self, rows: Tensor, places: Sequence[int], count: int) -> Tensor:
        """[count, ...], the same for all, of what each of them has: `rows` in these places. No bit changes.

        Every place is one process's; all others add a zero there.
        """
        if self.count == 1:
            return rows
        made = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype, device=self.device)
        made[list(places)] = rows.to(self.device)
        self.total([made])
        return made.to(rows.device)

    def dealt(self, rows: Tensor, count: int) -> Tensor:
        """`joined`, where the rows are those that `own` gives."""
        return self.joined(rows, range(self.rank, count, self.count), count)

    def each(self, work: Sequence[Callable[[], float]]) -> list[float]:
        """What the calls return, each made by one process."""
        found = [call() for call in self.own(list(work))]
        return found if self.count == 1 else self.dealt(torch.tensor(found, dtype=torch.float64), len(work)).tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            with _together():
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

    def store(self, directory: Path, fingerprint: dict, replace: bool = False, divided: bool = False) -> SharedStore:
        """BlockStore.open by process 0, then seen by all. divided: of streams every process has a share."""
        if self.rank == 0:
            BlockStore.open(directory, fingerprint, replace)
        self.wait()
        return SharedStore(BlockStore(directory), self, self.rank if divided else 0)


ALONE = Ranks()
"""A process that shares with none: nothing is exchanged, and no bit differs from code that knows no processes."""


@dataclass(frozen=True, eq=False)
class SharedStore:
    """A BlockStore that all processes read, and process 0 writes to when all have come there.

    share  whose streams this process keeps and finds: its own number, or 0 where process 0's are everybody's
    """

    inner: BlockStore
    ranks: Ranks
    share: int = 0

    def finished(self, block: int) -> tuple[dict[str, Lazy], dict] | None:
        return self.inner.finished(block)

    def streams(self, block: int, *names: str) -> dict[str, Tensor]:
        return self.inner.streams(block, *names, share=self.share)

    def save(
        self, block: int, params: Mapping[str, QTensor], record: dict, streams: Mapping[str, Tensor] | None
    ) -> dict[str, Lazy]:
        """The shares of the streams come first: where the block is finished, all of them are there."""
        if self.share and streams is not None:
            self.inner.keep(block, streams, self.share)
        self.ranks.wait()
        if self.ranks.rank == 0:
            saved = self.inner.save(block, params, record, streams)
        self.ranks.wait()
        return saved if self.ranks.rank == 0 else self.inner.finished(block)[0]

    def clear(self) -> None:
        self.ranks.wait()
        if self.ranks.rank == 0:
            self.inner.clear()


TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What it tells every process beside WORLD_SIZE."""


def processes() -> int:
    """How many torchrun started, as it says in the environment. TpvcError for half of what it says there."""
    told = os.environ.get("WORLD_SIZE", "1")
    if told != "1" and (lacking := [name for name in TORCHRUN if not os.environ.get(name)]):
        found = f"WORLD_SIZE is {told} in the environment, and {', '.join(lacking)} not set"
    elif not told.isdecimal() or int(told) < 1:
        found = f"WORLD_SIZE is '{told}' in the environment"
    else:
        return int(told)
    raise TpvcError(f"{found}; start several processes with torchrun, or one with WORLD_SIZE unset")


def is_first() -> bool:
    """Whether this process is the one that writes and speaks, as torchrun says in the environment."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """Those that torchrun says in the environment; one where it says nothing. Over gloo, and nccl on CUDA devices."""
    count = processes()
    if count == 1:
        yield Ranks()
        return
    where = torch.device(device)
    if where.index is not None:
        raise TpvcError(f"found device '{device}' for {count} processes; each takes one of its own, write {where.type}")
    if where.type == "cuda":  # "cuda" is then the process's own device
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _together():
        if not torch.distributed.is_initialized():  # once in a process: torchrun's store remembers
            torch.distributed.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=PATIENCE)
            atexit.register(torch.distributed.destroy_process_group)
    own = Ranks(torch.distributed.get_rank(), count, device)
    own.wait()  # what comes before, such as looking whether an output is free, is over for all
    yield own


@contextmanager
def _together() -> Iterator[None]:
    """Around what ends only where all processes take part."""
    try:
        yield
    except RuntimeError as error:
        raise TpvcError(
            "another process of this run has ended or is not heard of any more; see what it said, the same command"
            " goes on where this one stopped"
        ) from error

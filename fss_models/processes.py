"""One process or many, as torchrun starts them."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from fss_models.errors import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among all of them.

    Attributes:
        rank: 0 ... count - 1.
        count: how many there are.
        device: of this process.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of one shape from every process, on the CPU."""
        if self.count == 1:
            return [tensor]
        sent = tensor.to(self.device)
        gathered = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(gathered, sent)
        return [t.cpu() for t in gathered]

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return float(torch.stack(self.gather(torch.tensor(value, dtype=torch.float64))).sum())

    def union(self, texts: list[str]) -> list[str]:
        """The different texts of all processes, sorted."""
        gathered: list[list[str]] = [texts] * self.count
        if self.count > 1:
            dist.all_gather_object(gathered, texts)
        return sorted({text for part in gathered for text in part})

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A UserError of one process in the block is raised in all. Collective at its end, so nothing inside may be."""
        error: UserError | None = None
        try:
            yield
        except UserError as caught:
            error = caught
        if self.total(error is not None):
            errors = [error] * self.count
            if self.count > 1:
                dist.all_gather_object(errors, error)
            raise next(e for e in errors if e is not None)

    def barrier(self) -> None:
        """Waits for all."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """The process group of torchrun's environment, until the program ends: NCCL on GPUs, gloo on CPUs; one process
    without it.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        kind = torch.device(chosen)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}: {str(error).splitlines()[0]}") from None
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: there is no CUDA GPU here")
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(0, 1, kind)
        return
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
    if not dist.is_initialized():  # for good: in torchrun's store a second group would wait for ever
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
        atexit.register(_leave)
    yield Processes(dist.get_rank(), count, kind)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()

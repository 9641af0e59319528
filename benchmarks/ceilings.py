"""What this machine can do at most, measured in the running process: moving memory, multiplying and adding."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch

MEMORY = ("read", "copy", "write")
COMPUTE = ("fma", "screen")  # float32 products; bfloat16 products where kernels screen with them
KINDS = MEMORY + COMPUTE
MOVED = 1.15  # a ceiling that differs by more before and after a run is named in its result


def native() -> ModuleType:
    """The developer's module with the ceilings."""
    try:
        return importlib.import_module("fss_kernels._native")
    except ImportError as error:
        command = "FSS_KERNELS_BUILD=native python setup.py build_ext --inplace"
        raise RuntimeError(f"the ceilings need the module fss_kernels._native: run `{command}`") from error


def buffer(size: int) -> torch.Tensor:
    """About ``size`` bytes from PyTorch's allocator, every page touched: the memory that ops work on."""
    return torch.ones(max(2, size // 4), dtype=torch.float32)


class Ceilings:
    """Timers of the ceilings; the reading pattern that is fastest on this machine is found once."""

    def __init__(self, threads: int, size: int = 256 << 20) -> None:
        self.native, self.threads, self.size = native(), threads, size
        data = buffer(size).numpy()
        fastest = [min(self._read(data, p) for _ in range(3)) for p in range(self.native.read_patterns)]
        self.pattern = int(np.argmin(fastest))

    def _read(self, data: np.ndarray, pattern: int) -> float:
        return self.native.read_seconds(data, self.threads, pattern)

    def timers(self, flops: int = 0) -> dict[str, Callable[[torch.Tensor], float]]:
        """Kind -> seconds to move all bytes of a buffer: read it, copy one half to the other, or write it; or, whatever
        the buffer, to do ``flops``."""

        def copy(data: torch.Tensor) -> float:
            half = data.numel() // 2
            return self.native.copy_seconds(data[:half].numpy(), data[half : 2 * half].numpy(), self.threads)

        return {
            "read": lambda data: self._read(data.numpy(), self.pattern),
            "copy": copy,
            "write": lambda data: self.native.write_seconds(data.numpy(), self.threads),
            "fma": lambda data: flops * 1e-9 / self.native.fma_gflops(self.threads),
            "screen": lambda data: flops * 1e-9 / self.native.screen_gflops(self.threads),
        }

    def measure(self) -> dict[str, float]:
        """Medians in GB/s and GFLOP/s."""
        settle()
        data = buffer(self.size)
        gigabytes = data.nbytes * 1e-9
        timers = self.timers(10**9)
        return {
            **{f"{k}_gbps": gigabytes / statistics.median(timers[k](data) for _ in range(7)) for k in MEMORY},
            **{f"{k}_gflops": 1 / statistics.median(timers[k](data) for _ in range(3)) for k in COMPUTE},
        }


def moved(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """One line that names the ceilings which differ before and after a run; none when all are as they were."""
    names = [k for k in before if max(before[k], after[k]) > MOVED * min(before[k], after[k])]
    changes = ", ".join(f"{k} {before[k]:.1f} before and {after[k]:.1f} after" for k in names)
    says = "milliseconds depend on when they were taken; ratios and shares of the roof are paired by round and stand"
    return [f"the machine's speed changed during the run, {changes}: {says}"] if names else []


def settle() -> None:
    """Waits until PyTorch's threads, which spin for a while after their last task, have gone to sleep."""
    time.sleep(0.01)

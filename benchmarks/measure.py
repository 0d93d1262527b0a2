"""Time and memory of a call."""

import ctypes
import gc
import platform
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Cost:
    """What a call took.

    Attributes:
        seconds: Median over repetitions.
        bytes: Most memory held during the call beyond what was held before it.
    """

    seconds: float
    bytes: int


def median_seconds(call: Callable[[], object], budget: float = 5.0, most: int = 15) -> float:
    """Median time of a call, repeated for about `budget` seconds; the first call counts only if it takes them all."""
    times = []
    while len(times) < 2 or (sum(times) < budget and len(times) <= most):
        if times and times[0] > budget:
            break
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


class _Allocations(TorchDispatchMode):
    """Bytes of all tensors that are made while it is open and not yet gone, and the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {}  # storages, so that none counts twice

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, torch.Tensor):  # unless it was made here, it was there before
                self.known.setdefault(each.untyped_storage()._cdata, each.untyped_storage())
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in self.known:
                self._add(each.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            self.known.pop(key, None)
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def allocated_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors that a call makes and has at a time, the same every time, as the process's memory is not.

    What an operation takes for itself and gives back is not seen.
    """
    with _Allocations() as allocations:
        call()
    return allocations.most


def peak_bytes(call: Callable[[], object]) -> int:
    """Most memory held during a call beyond what was held before it: the GPU's, or the process's on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    _give_back()
    before, peak, done = _resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(0, peak - before)


def cost(call: Callable[[], object]) -> Cost:
    """Time and memory of a call; memory first, while the allocator holds nothing for it."""
    memory = peak_bytes(call)
    return Cost(median_seconds(call), memory)


def _give_back() -> None:
    """Have the C library return freed memory: what an earlier call left would hide what this one needs."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Median time of each call, all of them made once per round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}

"""Engines: where the parts of a sweep are run."""

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from tracedensity.extras import extra
from tracedensity.model import Transformer
from tracedensity.study.contexts import Context
from tracedensity.study.work import Done, Part, Work, Worker

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h

_AT_ONCE = 2048
"""Parts that Ray has at a time, so that a corpus of any length fits into memory."""

_MEMORY = {"": ("sys/fs/cgroup", "memory.max"), "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes")}
"""Where Linux says how much memory a group of processes may take: today, and before there was one tree of groups."""

_IDLE = 300
"""Seconds that a process waits for another sweep."""

_PROCESS = 2**29
"""Bytes that a process takes beside its model."""

_workers: dict[tuple[object, ...], Worker] = {}  # of this process, by what they do: one model is held


def here(worker: Worker, parts: Iterable[Part]) -> Iterator[Done]:
    """One part after another, in this process."""
    yield from map(worker, parts)


def in_processes(work: Work, parts: Iterable[Part], n_workers: int) -> Iterator[Done]:
    """Several parts at a time, in processes that each load the model; as they get done.

    Raises:
        ChildProcessError: If a process was killed, as a system out of memory does.
    """
    from loky import get_reusable_executor
    from loky.process_executor import TerminatedWorkerError

    executor: Any = get_reusable_executor(max_workers=n_workers, timeout=_IDLE)
    waiting, running = iter(parts), set[Any]()
    try:
        while True:
            # two for each process: none is idle while rows are written, and nothing piles up where that is slow
            for part in islice(waiting, 2 * n_workers - len(running)):
                running.add(executor.submit(_run, work, part, os.getpid()))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for each in done:
                yield each.result()
    except TerminatedWorkerError as error:
        raise ChildProcessError(
            "a process of the sweep was killed, as systems do when memory runs out; what is finished is kept. Run the "
            "same again with fewer `workers`."
        ) from error
    except BaseException:  # what is under way would be done for nobody
        executor.shutdown(kill_workers=True)
        raise


def _run(work: Work, part: Part, parent: int) -> Done:
    if not _workers:
        Thread(target=_end_with, args=(parent,), daemon=True).start()
        _keep_freed_memory()
    if work.key not in _workers:
        held = [each.model for each in _workers.values() if each.work.model_key == work.model_key]
        _workers.clear()
        _workers[work.key] = Worker(work, *held)
    return _workers[work.key](part)


def usual_workers(model: Transformer) -> int:
    """As many as there are cores, if as many copies of the model fit into half of the memory."""
    from loky import cpu_count

    if model.device.type != "cpu":
        return 1
    n_bytes = sum(weight.numel() * weight.element_size() for weight in model.model.parameters())
    return max(1, min(cpu_count(), _main_memory() // 2 // (n_bytes + _PROCESS)))


def _main_memory(system: Path = Path("/")) -> int:
    """Bytes that this process may take: those of the machine, or of its container or job where that may take fewer."""
    found = [psutil.virtual_memory().total]
    with suppress(OSError):
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds not in _MEMORY:
                continue
            root, name = _MEMORY[kinds]
            for group in (Path(path), *Path(path).parents):
                with suppress(OSError, ValueError):  # "max" is no limit
                    found.append(int(Path(f"{system}/{root}/{group}/{name}").read_text()))
    return min(found)


def _keep_freed_memory() -> None:
    """Have glibc keep for the next result what the last one took, in place of asking the kernel for fresh pages.

    For processes of a sweep's own: a sixth of their time went into such pages.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if (mallopt := getattr(libc, "mallopt", None)) is not None:
        mallopt(_MMAP_THRESHOLD, 2**25)  # the highest that it takes
        mallopt(_TRIM_THRESHOLD, 2**30)


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, however it went."""
    try:
        process = psutil.Process(parent)  # which another process of its number, later, is not
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    except psutil.Error:
        pass
    os._exit(1)


def on_ray(work: Work, parts: Iterable[Part], n_workers: int, n_gpus: float) -> Iterator[Done]:
    """Several parts at a time, on the machines of a Ray cluster; as they get done.

    Args:
        work: What to do; the name of the model must mean the same on every machine.
        parts: The parts.
        n_workers: Actors, each of which has the model once.
        n_gpus: GPUs of each; an actor may have a share of one.
    """
    ray, data = extra("ray", "ray", "sweeps on a cluster"), extra("ray.data", "ray", "sweeps on a cluster")
    ours = not ray.is_initialized()
    if ours:
        ray.init(logging_level="warning", log_to_driver=False)
    context = data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        waiting = iter(parts)
        while some := [*islice(waiting, _AT_ONCE)]:
            yield from _by_actors(data, work, some, n_workers, n_gpus)
    finally:
        context.enable_progress_bars = shown
        if ours:
            ray.shutdown()


def _by_actors(data: Any, work: Work, parts: Sequence[Part], n_workers: int, n_gpus: float) -> Iterator[Done]:
    """Some parts, by actors that live as long as these take."""
    rows = [{"number": part.number, "first": part.first, "contexts": _written(part)} for part in parts]
    done = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Actor,
        batch_size=1,
        fn_constructor_args=(work,),
        compute=data.ActorPoolStrategy(size=min(n_workers, len(rows))),
        num_cpus=work.threads,
        num_gpus=n_gpus or None,
    )
    for batch in done.iter_batches(batch_size=None, batch_format="numpy"):
        for row in zip(*(batch[name] for name in ("files", "content", "n_prompts", "n_errors")), strict=True):
            yield _unpacked(*row)


class Actor:
    """A worker as Ray Data has it: rows of a batch in, rows of a batch out."""

    def __init__(self, work: Work) -> None:
        _keep_freed_memory()
        self.worker = Worker(work)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"files": [], "content": [], "n_prompts": [], "n_errors": []}
        for number, first, contexts in zip(batch["number"], batch["first"], batch["contexts"], strict=True):
            done = self.worker(Part(int(number), int(first), _read(str(contexts))))
            found["files"].append(json.dumps({name: len(content) for name, content in done.files.items()}))
            found["content"].append(b"".join(done.files.values()))
            found["n_prompts"].append(done.n_prompts)
            found["n_errors"].append(done.n_errors)
        return found


def _unpacked(files: Any, content: Any, n_prompts: Any, n_errors: Any) -> Done:
    """What a part's row holds."""
    found, start, content = {}, 0, bytes(content)
    for name, length in json.loads(str(files)).items():
        found[name] = content[start : start + length]
        start += length
    return Done(found, int(n_prompts), int(n_errors))


def _written(part: Part) -> str:
    return json.dumps([asdict(context) for context in part.contexts])


def _read(contexts: str) -> tuple[Context, ...]:
    found = (Context(**context) for context in json.loads(contexts))
    return tuple(
        context if isinstance(context.prompt, str) else replace(context, prompt=tuple(context.prompt))
        for context in found
    )

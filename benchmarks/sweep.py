"""What a sweep gains over a loop of `td.density`, and whether its memory grows with the number of prompts.

    python -m benchmarks.sweep [--models NAMES] [--no-ray] [--no-memory]

Prompts are pieces of this repository's documentation, all equally long. Loops and sweeps run the same prompts with the
same options. There are two loops: one of nothing but `td.density`, and one that measures what the tables of a sweep
hold beside faithfulness as well (`also`). They have as many threads of PyTorch as there are cores, a sweep as many
processes of one thread; one worker is the process that runs the loops. All take turns, since machines that are shared
change their speed, and have been at work before their time is taken: what processes take to start is the same for a
million. Ray (extra `ray`), whose actors start anew for each sweep, is measured by what a sweep of 16 parts for each of
them takes more than one of 2 parts. Memory is the peak of a process of its own.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import tracedensity as td
from tracedensity.model import as_transformer
from tracedensity.study.table import ALSO

ROOT = Path(__file__).parents[1]
LOOPS = {"loop of td.density": (), "loop with also=": ALSO}
"""What is measured beside faithfulness in each loop."""

_PART = 32
_ON_RAY = ((1, 0), (2, -1), (16, 1))  # parts for each actor, and how they count: the first sweep loads Ray
_GROWTH = 1.05
_TOLERANCE = 1e-5


def prompts_of(model: Any, n_tokens: int, n: int) -> list[list[int]]:
    """Pieces of the documentation as tokens, from its start again where it ends."""
    transformer = as_transformer(model)
    text = "\n".join(path.read_text() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]))
    ids, length = transformer.pieces(text), n_tokens - len(transformer.beginning)
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    return [[*transformer.beginning, *pieces[number % len(pieces)]] for number in range(n)]


class Rounds:
    """The loop and sweeps of one model, in turn and each of the same prompts: machines that are shared change speed.

    Attributes:
        seconds: What each has taken, by what it is; loops are `LOOPS`.
        n_prompts: How many prompts it has run.
        apart: The largest difference of a sweep's faithfulness from the loop's.
        same: Whether sizes were the same.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name, self.options = name, options
        self.model = td.load_model(name, device="cpu")
        self.seconds: dict[object, float] = defaultdict(float)
        self.n_prompts: dict[object, int] = defaultdict(int)
        self.apart, self.same = 0.0, True

    def rate(self, what: object) -> float:
        """Prompts per second."""
        return self.n_prompts[what] / self.seconds[what]

    def loops(self, prompts: list[list[int]]) -> list[td.DensityCurve]:
        """Curves of prompts, one after another."""
        torch.set_num_threads(os.cpu_count() or 1)
        curves: list[td.DensityCurve] = []
        for what, also in LOOPS.items():
            begun = time.perf_counter()
            curves = [td.density(self.model, prompt, also=also, **self.options) for prompt in prompts]
            self._count(what, time.perf_counter() - begun, len(prompts))
        return curves

    def sweep(
        self, prompts: list[list[int]], engine: str, workers: int, curves: list[td.DensityCurve], sign: int = 1
    ) -> None:
        """A sweep, whose first prompts are compared with these curves; its time is added, or taken away."""
        given = {"workers": workers, "engine": engine, "progress": False, "part_size": _PART, **self.options}
        with tempfile.TemporaryDirectory() as folder:
            done = td.sweep(self.name, prompts, folder, **given)
            self._count((engine, workers), sign * done.seconds, sign * done.n_made)
            table = done.table()
        for curve, heights, sizes in zip(curves, table["faithfulness"], table["sizes"], strict=False):
            same = np.array_equal(sizes, curve.sizes.numpy())
            self.same &= same
            apart = float(np.abs(np.asarray(heights) - curve.faithfulness.numpy()).max()) if same else np.inf
            self.apart = float(np.maximum(self.apart, apart))  # NaN stays

    def restart(self) -> None:
        """Forget what was measured."""
        self.seconds.clear()
        self.n_prompts.clear()

    def show(self, engine: str, cores: int) -> None:
        """Print what an engine has done."""
        for workers in dict.fromkeys((1, cores)):
            rate = self.rate((engine, workers))
            shown = f"{engine}, {workers} worker{'s' * (workers > 1)}"
            plain, full = (rate / self.rate(loop) for loop in LOOPS)
            print(
                f"  sweep, {shown:18} {rate:6.2f} prompts per second, {plain:.2f} and {full:.2f} x the loops, "
                f"{1e6 / rate * workers / 3600:.0f} core hours for a million"
            )
        gain = self.rate((engine, cores)) / self.rate((engine, 1))
        print(f"  {engine}: {cores} workers do {gain:.2f} times what one does", flush=True)

    def _count(self, what: object, seconds: float, n: int) -> None:
        self.seconds[what] += seconds
        self.n_prompts[what] += n


def peak(name: str, n: int, n_tokens: int) -> int:
    """Peak memory in MiB of a process of its own that sweeps `n` prompts."""
    script = (
        "import resource, sys, tempfile, tracedensity as td; from benchmarks.sweep import prompts_of\n"
        "name, n, n_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]); model = td.load_model(name)\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    td.sweep(model, prompts_of(model, n_tokens, n), folder, progress=False, baselines=False, part_size=32)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, name, str(n), str(n_tokens)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(
    models: Annotated[str, typer.Option(help="Bundled names or folders.")] = "books-gpt2,books-llama",
    tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 40,
    n: Annotated[int | None, typer.Option("--n", help="Prompts of a round; by default a part for each core.")] = None,
    n_loop: Annotated[int, typer.Option(help="Prompts of a round's loop, the first ones.")] = 12,
    rounds: Annotated[int, typer.Option(help="How often loop and sweeps take turns.")] = 5,
    baselines: Annotated[bool, typer.Option(help="Random and inverse circuits as well.")] = False,
    ray: Annotated[bool, typer.Option(help="Ray as well.")] = True,
    memory: Annotated[bool, typer.Option(help="Peak memory of 64 and of 512 prompts as well.")] = True,
) -> None:
    """Print prompts per second of a loop and of sweeps, and their largest difference, which must be small."""
    cores = os.cpu_count() or 1
    n = n or _PART * cores
    if n * rounds < 2 * _PART * cores:
        raise SystemExit(f"`--n` times `--rounds` must be at least {2 * _PART * cores}, got {n * rounds}.")
    if ray and find_spec("ray") is None:
        print("Ray is left out: it is not installed")
        ray = False
    all_same = flat = True
    print(f"torch {torch.__version__}, {cores} cores, {rounds} rounds of {n} prompts of {tokens} tokens")
    for name in models.split(","):
        found = Rounds(name, {"baselines": baselines})
        prompts = prompts_of(found.model, tokens, n * rounds)
        for workers in (1, cores):
            found.sweep(prompts[: _PART * cores], "local", workers, [])
        found.loops(prompts[:1])
        found.restart()
        for start in range(0, n * rounds, n):
            some = prompts[start : start + n]
            curves = found.loops(some[:n_loop])
            for workers in (1, cores):
                found.sweep(some, "local", workers, curves)
        print(f"\n{name}")
        for loop in LOOPS:
            print(f"  {loop:25} {found.rate(loop):6.2f} prompts per second")
        found.show("local", cores)
        if ray:
            curves = found.loops(prompts[:n_loop])
            for workers, (parts, sign) in product((1, cores), _ON_RAY):
                some = prompts_of(found.model, tokens, parts * workers * _PART)
                found.sweep(some, "ray", workers, curves, sign)
            found.show("ray", cores)
        print(f"  {'the same' if found.same else 'OTHER'} sizes as the loop, faithfulness to {found.apart:.0e}")
        all_same &= found.same and found.apart <= _TOLERANCE
        if memory:
            few, many = peak(name, 64, tokens), peak(name, 512, tokens)
            print(f"  peak memory of one process: {few} MiB for 64 prompts, {many} MiB for 512")
            flat &= many <= _GROWTH * few
    if not flat:
        raise SystemExit("memory grows with the number of prompts")
    if not all_same:
        raise SystemExit("sweeps have not found what the loop has found")


if __name__ == "__main__":
    typer.run(main)

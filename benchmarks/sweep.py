"""What a sweep gains over a loop of `td.density`, and whether its memory grows with the number of prompts.

    python -m benchmarks.sweep [--models NAMES] [--no-ray] [--no-memory]

Prompts are pieces of this repository's documentation, all equally long. The loop and the sweep run the same prompts
with the same options; the loop has as many threads of PyTorch as there are cores, the sweep as many processes of one
thread. Both have been at work before their time is taken: what processes take to start is the same for a million. Half
of the loop is run before the sweeps and half after them, since machines that are shared change their speed. Memory is
the peak of a process of its own that sweeps 64 or 512 prompts. Ray (extra `ray`) runs actors on this machine; what it
takes to start is measured with a few prompts, and taken off.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import tracedensity as td
from tracedensity.model import as_transformer

ROOT = Path(__file__).parents[1]
_PART = 32
_TOLERANCE = 1e-5


def prompts_of(model: Any, n_tokens: int, n: int) -> list[list[int]]:
    """Pieces of the documentation as tokens, from its start again where it ends."""
    transformer = as_transformer(model)
    text = "\n".join(path.read_text() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]))
    ids, length = transformer.pieces(text), n_tokens - len(transformer.beginning)
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    return [[*transformer.beginning, *pieces[number % len(pieces)]] for number in range(n)]


def rate(name: str, prompts: list[list[int]], workers: int, engine: str, options: dict[str, Any]) -> tuple[float, Any]:
    """Prompts per second of a sweep, and its table."""
    given = {"workers": workers, "engine": engine, "progress": False, "part_size": _PART, **options}
    few = prompts[: _PART * workers]
    with tempfile.TemporaryDirectory() as folder:
        first = td.sweep(name, few, f"{folder}/few", **given)
        done = td.sweep(name, prompts, f"{folder}/all", **given)
        # actors start anew each time, while processes of this machine stay for the next sweep
        if engine == "ray":
            return (len(prompts) - len(few)) / (done.seconds - first.seconds), done.table()
        return len(prompts) / done.seconds, done.table()


def loop_of(model: Any, prompts: list[list[int]], options: dict[str, Any]) -> tuple[list[td.DensityCurve], float]:
    """Curves of prompts, one after another, and the seconds that they took."""
    begun = time.perf_counter()
    return [td.density(model, prompt, **options) for prompt in prompts], time.perf_counter() - begun


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
    n: Annotated[int, typer.Option("--n", help="Prompts.")] = 256,
    n_loop: Annotated[int, typer.Option(help="Prompts of the loop, the first ones.")] = 32,
    baselines: Annotated[bool, typer.Option(help="Random and inverse circuits as well.")] = False,
    ray: Annotated[bool, typer.Option(help="Ray as well.")] = True,
    memory: Annotated[bool, typer.Option(help="Peak memory of 64 and of 512 prompts as well.")] = True,
) -> None:
    """Print prompts per second of a loop and of sweeps, and their largest difference, which must be small."""
    all_same = True
    cores = os.cpu_count() or 1
    options: dict[str, Any] = {"baselines": baselines}
    print(f"torch {torch.__version__}, {cores} cores, {n} prompts of {tokens} tokens")
    for name in models.split(","):
        model = td.load_model(name, device="cpu")
        prompts = prompts_of(model, tokens, n)
        torch.set_num_threads(cores)
        td.density(model, prompts[0], **options)
        curves, before = loop_of(model, prompts[: n_loop // 2], options)
        engines = [("local", 1), ("local", cores), *([("ray", 1), ("ray", cores)] if ray else [])]
        swept = {each: rate(name, prompts, each[1], each[0], options) for each in engines}
        torch.set_num_threads(cores)
        others, after = loop_of(model, prompts[n_loop // 2 : n_loop], options)
        curves, loop = curves + others, n_loop / (before + after)
        print(f"\n{name}\n  loop of td.density        {loop:6.2f} prompts per second")
        for (engine, workers), (found, table) in swept.items():
            apart = max(
                float(np.abs(np.asarray(heights) - curve.faithfulness.numpy()).max())
                for heights, curve in zip(table["faithfulness"], curves, strict=False)
            )
            same = all(
                np.array_equal(sizes, curve.sizes.numpy()) for sizes, curve in zip(table["sizes"], curves, strict=False)
            )
            all_same &= same and apart <= _TOLERANCE
            shown = f"{engine}, {workers} worker{'s' * (workers > 1)}"
            print(
                f"  sweep, {shown:18} {found:6.2f} prompts per second, {found / loop:.2f} x the loop, "
                f"{1e6 / found * workers / 3600:.0f} core hours for a million; "
                f"{'the same' if same else 'OTHER'} sizes, faithfulness to {apart:.0e}"
            )
        for engine in dict.fromkeys(engine for engine, _ in engines):
            gain = swept[engine, cores][0] / swept[engine, 1][0]
            print(f"  {engine}: {cores} workers do {gain:.2f} times what one does")
        if memory:
            few, many = peak(name, 64, tokens), peak(name, 512, tokens)
            print(f"  peak memory of one process: {few} MiB for 64 prompts, {many} MiB for 512")
    if not all_same:
        raise SystemExit("sweeps have not found what the loop has found")


if __name__ == "__main__":
    typer.run(main)

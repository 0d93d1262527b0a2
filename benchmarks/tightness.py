"""How small circuits get, by several estimators at equal budget, and what that costs.

    python -m benchmarks.tightness --model PATH/TO/stories260K --reference PATH/TO/strace

For each prompt, threshold and way of running circuits: the published estimator's first crossing (greedy by norm,
bracketed to 2% or one edge), and what is left of it after spending a budget of plain forward passes. Sizes are numbers
of edges; with all skip connections kept these are not counted, in no column. The last rows are geometric means of
ratios.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import tracedensity as td
from benchmarks.measure import median_seconds
from tracedensity.estimation import BEST
from tracedensity.gauge import Gauge
from tracedensity.graph import flatten, unflatten
from tracedensity.ground import Ground
from tracedensity.model import as_transformer
from tracedensity.refinement import refined
from tracedensity.run import Conditions, run_shares
from tracedensity.search import GRADIENT_PASSES, Search, SpentError
from tracedensity.setting import token_setting

OTHERS = (
    "Once there was a little cat who liked to",
    "Sam went to the store with his mom. He saw a big",
    "The dog ran fast. Anna ran after the",
    "Lucy was sad because her doll was",
    "Ben and Mia like to play in the garden. They found a small",
    "One day the sun was shining and the birds were",
    "Jack had a red ball. He gave the ball to his friend. His friend was very",
    "The old man sat under the tree and",
)
"""Prompts for models of stories that are not in the reference set."""


def removed_at_random(search: Search, start: Tensor) -> None:
    """Chunks in random order, no gradients: each is taken away if the circuit stands it; half as large next time.

    When no edge can go any more, all over again.
    """
    chosen, length = start, max(1, int(start.sum()) // 8)
    while True:
        edges = chosen.nonzero()[:, 0]
        edges = edges[torch.randperm(len(edges), generator=search.generator)]
        gone = 0
        for chunk in edges.split(length):
            fewer = search._without(chosen, [chunk], lambda core: core)
            chosen, gone = (fewer, gone + 1) if fewer is not None else (chosen, gone)
        if not gone and length == 1:
            chosen, length = start, max(1, int(start.sum()) // 8)
        elif not gone:
            length //= 2


def learned(search: Search, target: float) -> None:
    """Shares learned by gradient, with noise that makes them all or nothing (Edge Pruning, L0 by concrete variables).

    Steps of Adam for three quarters of the budget; then the shortest circuit in the order of what was learned.
    """
    ground, temperature, rate = search.grounds[0], 2 / 3, 0.3
    scores = torch.full((len(search.free),), 3.0)
    first, second, price = torch.zeros_like(scores), torch.zeros_like(scores), 0.01
    for step in range(1, int(0.75 * search.budget) // GRADIENT_PASSES + 1):
        noise = torch.rand(len(scores), generator=search.generator).clamp(1e-6, 1 - 1e-6)
        kept = torch.sigmoid((scores + noise.logit()) / temperature)
        shares = unflatten(ground.graph, kept[None], 0.0)
        search.passes += GRADIENT_PASSES
        values, slopes = run_shares(ground.setting, ground.graph, shares, ground.conditions, ground.gauge.with_loss)
        slope = flatten(ground.graph, {kind: value[0] for kind, value in slopes.items()})
        open_share = torch.sigmoid(scores)
        gradient = slope * kept * (1 - kept) / temperature + price * open_share * (1 - open_share)
        faithful = float(ground.gauge.faithfulness(values[""].cpu()[:, None])) >= target
        price *= math.exp(0.05 if faithful else -0.05)
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        scores -= rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        scores.clamp_(-8, 8)
    order = scores.argsort(descending=True)
    order = order[search.free[order]]
    n_open = int((scores[order] > 0).sum())
    for factor in (1.0, 0.5, 0.7, 0.85, 1.2, 1.5, 2.0, 3.0):  # faithfulness is not monotone: where it is likely first
        kept = torch.zeros_like(search.free)
        kept[order[: int(factor * n_open)]] = True
        search.tried(kept[None])
    search.shortest(order)


def spent(search: Search, work: Callable[[], None]) -> int:
    """Size of the best circuit when the budget is spent on some work."""
    with suppress(SpentError):
        work()
    return search.size(search.best)


def measured(model: Any, prompt: Any, keep_residual: bool, budgets: list[int], thresholds: list[float]) -> Any:
    """One row per threshold and budget: sizes by estimator, and seconds of the refinement."""
    transformer = as_transformer(model)
    setting = token_setting(transformer, prompt, None, -1, 0)
    graph = td.TokenGraph.of(transformer, setting.prompts.tokens.shape[1])
    ground = Ground(graph, Conditions(False, keep_residual), Gauge.of(setting, graph, "tv"))
    options: dict[str, Any] = {"thresholds": thresholds, "keep_residual": keep_residual, "baselines": False}
    published = td.density(model, prompt, **options)
    best = td.density(model, prompt, method="best", **options)
    below: dict[int, Any] = {}
    for threshold in thresholds:
        start = published.circuit(faithfulness=threshold)
        greedy = flatten(graph, start.kept) & ground.free
        of_best = flatten(graph, best.circuit(faithfulness=threshold).kept) & ground.free
        for budget in budgets:
            begin = time.perf_counter()
            alone = refined([ground], start, threshold, budget=budget, seed=0)
            seconds = time.perf_counter() - begin
            chained = refined(
                [ground], best.circuit(faithfulness=threshold), threshold, budget=budget, seed=0,
                below=below.get(budget),
            )  # fmt: skip
            below[budget] = chained
            random, shares = (Search([ground], threshold, budget, 0) for _ in range(2))
            random.tried(greedy[None])
            yield {
                "threshold": threshold, "budget": budget, "edges": graph.n_edges,
                "greedy": int(greedy.sum()), "best": int(of_best.sum()), "refined": alone.n_edges,
                "curve": min(alone.n_edges, chained.n_edges),
                "random": spent(random, lambda: removed_at_random(random, greedy)),  # noqa: B023
                "learned": spent(shares, lambda: learned(shares, threshold)),  # noqa: B023
                "seconds": seconds,
            }  # fmt: skip


def main(
    model: Annotated[str, typer.Option(help="A bundled name, or a folder.")] = "books-llama",
    reference: Annotated[Path | None, typer.Option(help="Folder with the reference set's .json files.")] = None,
    prompts: Annotated[list[str] | None, typer.Option(help="Prompts in place of the usual ones.")] = None,
    budgets: Annotated[str, typer.Option(help="Plain forward passes per threshold.")] = "400,4000",
    thresholds: Annotated[str, typer.Option(help="Faithfulnesses, 1 - TV.")] = "0.8,0.9",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to PyTorch.")] = 1,
) -> None:
    """Print a row per prompt, threshold and budget, then geometric means over prompts of greedy / other size."""
    if threads:
        torch.set_num_threads(threads)
    loaded = td.load_model(model, device="cpu")
    groups = {"other": list(prompts or OTHERS)}
    if reference is not None:
        groups["reference"] = [json.loads(path.read_text())["prefix"] for path in sorted(reference.glob("*_*.json"))]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {loaded.cfg.model_name}")
    print(f"best: the shortest of {', '.join(map(str, BEST['token']))}; refined: td.refine from greedy;")
    print("curve: as in td.density(method='best', refine=True), each threshold from the one below\n")
    names = ["greedy", "best", "refined", "curve", "random", "learned"]
    print(
        f"{'skips':8}{'prompt':26}{'F':>5}{'budget':>7}{'edges':>8}" + "".join(f"{n:>9}" for n in names) + "  seconds"
    )
    ratios: dict[Any, list[list[float]]] = defaultdict(list)
    for keep in (False, True):
        for group, texts in groups.items():
            for text in texts:
                rows = measured(
                    loaded, text, keep, [int(b) for b in budgets.split(",")], [float(t) for t in thresholds.split(",")]
                )
                for row in rows:
                    sizes = "".join(f"{row[name]:>9,}" for name in names)
                    print(
                        f"{'kept' if keep else 'strict':8}{text[:24]:26}{row['threshold']:>5}{row['budget']:>7}"
                        f"{row['edges']:>8,}{sizes}{row['seconds']:>9.2f}", flush=True,
                    )  # fmt: skip
                    key = ("kept" if keep else "strict", group, row["threshold"], row["budget"])
                    ratios[key].append([math.log(row["greedy"] / max(1, row[name])) for name in names])
    print("\ngeometric means of greedy / other")
    for key, logs in ratios.items():
        means = torch.tensor(logs).mean(0).exp().tolist()
        skips, group, threshold, budget = key
        print(f"{skips:8}{group:26}{threshold:>5}{budget:>7}{'':8}" + "".join(f"{mean:>9.2f}" for mean in means))
    for skips, threshold, budget in dict.fromkeys((key[0], *key[2:]) for key in ratios):
        logs = [row for key, rows in ratios.items() if (key[0], *key[2:]) == (skips, threshold, budget) for row in rows]
        means = torch.tensor(logs).mean(0).exp().tolist()
        print(f"{skips:8}{'all':26}{threshold:>5}{budget:>7}{'':8}" + "".join(f"{mean:>9.2f}" for mean in means))
    with torch.no_grad():
        batch = as_transformer(loaded).tokens(groups["other"][0])[None]
        print(f"\na plain forward pass of the first prompt: {median_seconds(lambda: loaded(batch)) * 1e3:.2f} ms")


if __name__ == "__main__":
    typer.run(main)

"""How good each method's scores of the component graph are: beside measured effects, and by the circuits they give.

    python -m benchmarks.methods

Measured effects are those of the method "exact", one run per edge. "Pearson" is the correlation with them, "Spearman"
that of the ranks by size, "top 10%" how many of the largest tenth are the same. Scores without a sign are compared with
sizes of effects. "CPR" (higher is better) and "CMD" (lower is better) are areas over the benchmark's sizes, of circuits
of the best edges, connected or not; "time" is over that of eap.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import pandas as pd
import torch
import typer
from safetensors.torch import load_file

import tracedensity as td
from benchmarks.measure import in_turns
from tracedensity.choices import ComponentMethod
from tracedensity.graph import flatten

SHARED = Path(__file__).parents[2] / "shared" / "models"
METHODS = get_args(ComponentMethod)
COLUMNS = ("Pearson", "Spearman", "top 10%", "CPR", "CMD")
ROUNDS = 3


def load(name: str) -> Any:
    """A bundled model, a folder, or a model that lies beside the checkout."""
    folder = SHARED / name
    if not folder.is_dir():
        return td.load_model(name, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    if (shape := config.get("hooked_transformer_config")) is None:
        return td.load_model(folder, device="cpu")
    from benchmarks.lens import HookedTransformer, HookedTransformerConfig

    model = HookedTransformer(HookedTransformerConfig(**shape, device="cpu"))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)  # it has no mask buffers
    return model


def agreement(scores: td.Scores, exact: td.Scores) -> tuple[float, float, float]:
    """Correlation with measured effects, rank correlation with their sizes, and the share of the top tenth."""

    def column(values: Any) -> pd.Series:
        return pd.Series(flatten(scores.graph, values).double().numpy())

    size, measured = column(scores.importance()), column(exact.importance())
    linear = column(scores.values).corr(column(exact.values)) if scores.helpful else size.corr(measured)
    n_best = len(size) // 10
    shared = size.nlargest(n_best).index.intersection(measured.nlargest(n_best).index)
    return linear, size.rank().corr(measured.rank()), len(shared) / n_best


def areas(model: Any, task: td.Task, scores: td.Scores) -> tuple[float, float]:
    """CPR of the ranking by signed effects, and CMD of the one by size."""
    signed, by_size = (
        td.evaluate(model, task, scores.rank("top", signed=signed), metrics="logit_diff") for signed in (True, False)
    )
    return signed.cpr(), by_size.cmd()


def block(model: Any, task: td.Task, ablation: str) -> None:
    """Measure and print the rows of all methods."""
    scores: dict[str, td.Scores] = {}

    def score(method: str) -> None:
        scores[method] = td.attribute(model, task, graph="component", method=method, ablation=ablation)

    calls: dict[str, Callable[[], None]] = {method: partial(score, method) for method in METHODS}
    once = {"exact": calls.pop("exact")}
    seconds = in_turns(calls, ROUNDS) | in_turns(once, rounds=1)
    print(f"{'':20}" + "".join(f"{name:>10}" for name in (*COLUMNS, "time")))
    for method in METHODS:
        row = (*agreement(scores[method], scores["exact"]), *areas(model, task, scores[method]))
        cells = "".join(f"{value:>10.3f}" for value in row)
        print(f"  {method:18}{cells}{seconds[method] / seconds['eap']:>10.1f}", flush=True)
    print()


def main(
    models: Annotated[str, typer.Option(help="Bundled names, folders, or names in ../shared/models.")] = ",".join(
        ["books-gpt2", "books-llama", *(name for name in ("stories260K", "random-gpt2-4l") if (SHARED / name).is_dir())]
    ),
    tasks: Annotated[str, typer.Option(help="Names of generated tasks.")] = "pronoun,induction",
    ablations: Annotated[str, typer.Option(help="What absent edges carry.")] = "counterfactual,zero",
    n: Annotated[int, typer.Option(help="Pairs that the model solves.")] = 10,
    seed: Annotated[int, typer.Option(help="For the pairs.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to PyTorch.")] = 0,
) -> None:
    """Print one table for each model, task that it can take, and ablation."""
    if threads:
        torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    for name in models.split(","):
        model = load(name)
        for task_name in tasks.split(","):
            try:
                share = td.tasks.make(task_name, model, n=100, seed=seed).solved(model).accuracy
                task = td.tasks.make(task_name, model, n=n, seed=seed, solved=True)
            except ValueError as error:
                print(f"{name}, {task_name}: {error}\n")
                continue
            for ablation in ablations.split(","):
                print(f"{name}, {task_name} (the model solves {share:.0%}), {ablation}, {n} pairs")
                block(model, task, ablation)


if __name__ == "__main__":
    typer.run(main)

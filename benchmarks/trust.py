"""How much of a small circuit is luck: sizes, and faithfulness where the circuit was not looked for.

    python -m benchmarks.trust
    python -m benchmarks.trust --model PATH/TO/stories260K --prompt "Tim had a big brown dog."

For each prompt four circuits that reach the threshold at home: the published estimator's, what a search leaves of it,
the same at ten times the budget, and one that a search was asked to make robust (`td.density(..., robust=True)`). The
columns: edges; faithfulness at home; under mean and under resample ablation; on prompts with words swapped, on average;
with a token prepended; the largest overlap (Jaccard) with what other seeds find, and what chance exceeds in one case of
twenty (searches only). A robust circuit was asked to stand all of these but resample ablation, with other words and
another token than those that it is checked with here.
"""

from statistics import mean
from typing import Annotated, Any

import torch
import typer

import tracedensity as td

PROMPTS = (
    "When John and Mary went to the garden, John gave a flower to",
    "The king went to the window and the queen went to the",
    "said the old man, and shook his",
    "The boy and the girl walked along the river to the",
)


def row(model: Any, circuit: td.Circuit, n_seeds: int) -> list[str]:
    """What a check says of a circuit."""
    found = circuit.check(model, n_random=0, n_seeds=n_seeds, seed=1)  # searches draw with seed 0
    reached = dict(found.situations)
    prompts = [name for name in reached if name.startswith("prompt")]
    prepended = [name for name in prompts if name.endswith("prepended")]
    swapped = [name for name in prompts if name not in prepended]
    columns = [[next(iter(reached))], ["ablation: mean"], ["ablation: resample"], swapped, prepended]
    shown = [f"{mean(reached[name] for name in names):>10.3f}" if names else f"{'':>10}" for names in columns]
    again = [each for each in found.overlaps if each.other.startswith("search")]
    best = max(again, key=lambda each: each.jaccard) if again else None
    return [*shown, f"{best.jaccard:>10.2f}{best.null_high:>10.2f}" if best else ""]


def main(
    model: Annotated[str, typer.Option(help="A bundled name, or a folder.")] = "books-llama",
    prompt: Annotated[list[str] | None, typer.Option(help="Prompts in place of the usual ones.")] = None,
    faithfulness: Annotated[float, typer.Option(help="What circuits have to reach.")] = 0.8,
    budget: Annotated[int, typer.Option(help="Plain forward passes of a search, per situation.")] = 400,
    seeds: Annotated[int, typer.Option(help="Searches that circuits are compared with.")] = 2,
) -> None:
    """Print a table per prompt."""
    torch.set_num_threads(1)
    loaded = td.load_model(model, device="cpu")
    print(f"torch {torch.__version__}, {loaded.cfg.model_name}, faithfulness {faithfulness}, budget {budget}\n")
    names = ("edges", "home", "mean", "resample", "swapped", "prepended", "overlap", "null")
    for text in prompt or PROMPTS:
        print(f"{text}\n{'':24}" + "".join(f"{name:>10}" for name in names))
        options: dict[str, Any] = {"thresholds": [faithfulness], "baselines": False}
        published = td.density(loaded, text, **options)
        tight = td.density(loaded, text, refine=True, budget=budget, robust=True, **options)
        assert tight.robust is not None
        longer = td.density(loaded, text, refine=True, budget=10 * budget, **options)
        circuits = {
            "published (norm)": published, "searched": tight, "searched, 10 x budget": longer, "robust": tight.robust,
        }  # fmt: skip
        for name, curve in circuits.items():
            circuit = curve.circuit(faithfulness=faithfulness)
            print(f"{name:24}{circuit.n_edges:>10,}" + "".join(row(loaded, circuit, seeds)), flush=True)
        print()


if __name__ == "__main__":
    typer.run(main)

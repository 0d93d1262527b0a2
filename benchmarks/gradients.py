"""What gradient scores of the token graph cost, and what path their integral should be taken along.

python -m benchmarks.gradients --models PATH/TO/stories260K,books-gpt2,books-llama,random-gpt2-small
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import tracedensity as td
from benchmarks.density import build, prompt_of
from benchmarks.measure import in_turns
from benchmarks.tightness import OTHERS
from tracedensity.estimation import density
from tracedensity.extract import rank_edges
from tracedensity.gauge import Gauge
from tracedensity.graph import flatten
from tracedensity.ground import Ground
from tracedensity.model import as_transformer
from tracedensity.provenance import Provenance
from tracedensity.run import Conditions, run_shares
from tracedensity.search import Search
from tracedensity.setting import gradients_at_once, token_setting

STEPS = 5
THRESHOLDS = (0.8, 0.9)
PATHS = (
    "all together",
    "heads and MLPs, skips kept",
    "layer by layer, others kept",
    "layers, lowest first",
    "layers, highest first",
)


def forward_backward(model: Any, prompt: Tensor, n_runs: int) -> None:
    """Plain runs with gradients at the embedding, as many at once as scoring takes."""
    transformer = as_transformer(model)
    at_once = min(n_runs, gradients_at_once(transformer, len(prompt)))
    for _ in range(-(-n_runs // at_once)):
        held: list[Tensor] = []

        def leaf(value: Tensor, held: list[Tensor] = held) -> Tensor:
            held.append(value.detach().requires_grad_())
            return held[-1]

        with transformer.frozen():
            logits = transformer.logits(prompt[None].repeat(at_once, 1), {("embed", 0): leaf}, differentiable=True)
            with torch.enable_grad():
                total = logits.log_softmax(-1)[:, 0].sum()
            torch.autograd.grad(total, held)


def costs(name: str, tokens: list[int]) -> Iterator[str]:
    model = build(name, "cpu")
    for n_tokens in tokens:
        if n_tokens > model.cfg.n_ctx:
            continue
        prompt = prompt_of(model, n_tokens)
        calls = {
            "one": lambda: forward_backward(model, prompt, 1),  # noqa: B023
            "all": lambda: forward_backward(model, prompt, STEPS),  # noqa: B023
            "eap": lambda: td.attribute(model, prompt, method="eap"),  # noqa: B023
            "eap-ig": lambda: td.attribute(model, prompt, method="eap-ig", steps=STEPS),  # noqa: B023
        }
        times = in_turns(calls, rounds=7)
        yield (
            f"{model.cfg.model_name[-20:]:22}{n_tokens:>7}{times['one'] * 1e3:>10.1f}ms"
            f"{times['eap'] / times['one']:>8.2f}{times['eap-ig'] / times['all']:>8.2f}"
        )


def scores_along(ground: Ground, path: str, n_steps: int) -> dict[str, Tensor]:
    """Mean gradients at the middles of the steps of a path, times the way that each edge goes on it."""
    graph, n_layers = ground.graph, ground.setting.model.n_layers
    middles = ((torch.arange(n_steps) + 0.5) / n_steps).tolist()
    layers = [None] if path in ("all together", "heads and MLPs, skips kept") else range(n_layers)
    total = {kind: torch.zeros(shape) for kind, shape in graph.shapes.items()}
    for layer in layers:
        for middle in middles:
            kept = {}
            for kind, shape in graph.shapes.items():
                share = torch.ones(1, *shape)
                if path == "all together" or not kind.startswith("resid"):
                    share[:, slice(None) if layer is None else layer] = middle
                    if layer is not None and path == "layers, lowest first":
                        share[:, layer + 1 :] = 0
                    if layer is not None and path == "layers, highest first":
                        share[:, :layer] = 0
                kept[kind] = share
            _, slopes = run_shares(ground.setting, graph, kept, ground.conditions, ground.gauge.with_loss)
            for kind, slope in slopes.items():
                where = slice(None) if layer is None else layer
                total[kind][where] += slope[0][where] / n_steps
    return {kind: value.abs() for kind, value in total.items()}


def crossings(model: Any, text: str, path: str, keep_residual: bool) -> list[int]:
    """Sizes of the shortest circuits at the thresholds, in the greedy order of such scores."""
    setting = token_setting(as_transformer(model), text, None, -1, 0)
    graph = td.TokenGraph.of(setting.model, setting.prompts.tokens.shape[1])
    ground = Ground(graph, Conditions(False, keep_residual), Gauge.of(setting, graph, "tv"))
    n_steps = 2 if path.startswith("layer") else 2 * setting.model.n_layers  # as many runs along each path
    scores = scores_along(ground, path, n_steps)
    ranking = rank_edges(graph, scores, "greedy", Provenance.of(setting, "path"))
    found = []
    for threshold in THRESHOLDS:
        search = Search([ground], threshold, 10_000, 0)
        order = flatten(graph, ranking.rank).argsort()
        search.shortest(torch.zeros_like(search.free), order[search.free[order]])
        found.append(search.size(search.best))
    return found


def main(
    models: Annotated[str, typer.Option(help="Bundled names, folders, or random-gpt2-small.")] = (
        "books-gpt2,books-llama,random-gpt2-small"
    ),
    tokens: Annotated[str, typer.Option(help="Lengths of the prompt.")] = "16,64,256",
    paths_of: Annotated[str, typer.Option(help="Model for the comparison of paths.")] = "books-llama",
) -> None:
    """Print times over those of forward-backward passes, and first crossings over those of greedy by norm."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread; times over forward-backward passes, per step\n")
    print(f"{'model':22}{'tokens':>7}{'one pass':>12}{'eap':>8}{'eap-ig':>8}")
    for name in models.split(","):
        for line in costs(name, [int(n) for n in tokens.split(",")]):
            print(line, flush=True)
    model = build(paths_of, "cpu")
    print(f"\n{paths_of}: first crossings, geometric mean over {len(OTHERS)} prompts of path / greedy by norm")
    print(f"{'skips':8}{'path':34}" + "".join(f"{threshold:>8}" for threshold in THRESHOLDS))
    for keep in (False, True):
        plain = []
        for text in OTHERS:
            curve = density(model, text, thresholds=THRESHOLDS, keep_residual=keep, baselines=False)
            circuits = [curve.circuit(faithfulness=threshold) for threshold in THRESHOLDS]
            counted = [sum(n for k, n in c.composition().items() if not keep or k[:5] != "resid") for c in circuits]
            plain.append(counted)
        for path in PATHS:
            logs = [
                [math.log(size / norm) for size, norm in zip(crossings(model, text, path, keep), norms, strict=True)]
                for text, norms in zip(OTHERS, plain, strict=True)
            ]
            means = torch.tensor(logs).mean(0).exp().tolist()
            print(f"{'kept' if keep else 'strict':8}{path:34}" + "".join(f"{mean:>8.2f}" for mean in means), flush=True)


if __name__ == "__main__":
    typer.run(main)

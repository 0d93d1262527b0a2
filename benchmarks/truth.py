"""How near the estimators come to the smallest circuit, on graphs so small that every circuit can be run.

python -m benchmarks.truth
"""

import warnings
from collections import defaultdict
from typing import Annotated, Any

import torch
import typer

import tracedensity as td
from benchmarks.lens import HookedTransformer, HookedTransformerConfig, parameters_of
from tracedensity.estimation import BEST

# layers, heads, tokens, MLPs
SHAPES = ((1, 2, 3, True), (2, 1, 2, True), (1, 3, 4, True), (2, 2, 2, False), (2, 1, 3, False), (3, 1, 2, False),
          (2, 3, 2, False))  # fmt: skip
THRESHOLDS = (0.5, 0.8, 0.9, 0.95)


def tiny_model(shape: tuple[int, int, int, bool], norm: str | None, seed: int) -> Any:
    """Random weights, large enough for predictions to depend on the prompt."""
    n_layers, n_heads, _, has_mlp = shape
    config = HookedTransformerConfig(
        n_layers=n_layers, n_heads=n_heads, d_model=8, d_head=4, n_ctx=8, d_vocab=12, act_fn="gelu_new",
        d_mlp=12 if has_mlp else None, attn_only=not has_mlp, normalization_type=norm, final_rms=norm == "RMS",
        init_weights=False, device="cpu", model_name=f"tiny-{seed}",
    )  # fmt: skip
    model = HookedTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            fan_in = parameter.shape[-2] if parameter.dim() > 1 else 9
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            if name.split(".")[-2].startswith("ln") and name.endswith("w"):
                parameter.add_(1)
    return model.eval()


def main(
    seeds: Annotated[int, typer.Option(help="Models per shape and norm.")] = 10,
    budgets: Annotated[str, typer.Option(help="Plain forward passes of td.refine.")] = "400,4000,20000",
) -> None:
    """Print, per threshold and estimator, the share of cases solved exactly, and mean and largest ratio of sizes."""
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.set_num_threads(1)
    sizes: dict[tuple[float, str], list[tuple[int, int]]] = defaultdict(list)
    options: dict[str, Any] = {"thresholds": THRESHOLDS, "baselines": False}
    for seed in range(seeds):
        for shape in SHAPES:
            for norm in ("LN", "RMS", None):
                model = tiny_model(shape, norm, seed)
                prompt = torch.randint(12, (shape[2],), generator=torch.Generator().manual_seed(seed))
                truth = td.density(model, prompt, method="exhaustive", **options)
                best = td.density(model, prompt, method="best", **options)
                n_edges = truth.n_edges
                curves = {
                    method: td.density(model, prompt, method=method, sizes=range(n_edges), **options)
                    for method in BEST["token"]
                }
                for threshold in THRESHOLDS:
                    true = truth.minimal_size(threshold)
                    found = {name: curve.minimal_size(threshold) for name, curve in curves.items()}
                    found["best"] = best.minimal_size(threshold)
                    start = best.circuit(faithfulness=threshold)
                    for budget in map(int, budgets.split(",")):
                        refined = td.refine(model, prompt, start, threshold, budget=budget)
                        found[f"refined, {budget}"] = refined.n_edges
                    for name, size in found.items():
                        sizes[threshold, name].append((max(true, 1), max(size, 1)))
    n_cases = seeds * len(SHAPES) * 3
    print(f"{n_cases} models of 9 to 18 edges, torch {torch.__version__}\n")
    print(f"{'F':>5}  {'estimator':20}{'exact':>8}{'mean ratio':>12}{'largest':>9}")
    for (threshold, name), pairs in sizes.items():
        exact = sum(true == size for true, size in pairs) / len(pairs)
        ratios = [size / true for true, size in pairs]
        print(f"{threshold:>5}  {name:20}{exact:>8.1%}{sum(ratios) / len(ratios):>12.3f}{max(ratios):>9.2f}")


if __name__ == "__main__":
    typer.run(main)

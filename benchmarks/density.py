"""What a density curve costs, as ratios to one plain forward pass of the same model and prompt.

    python -m benchmarks.density

Each row is measured in one go, forward pass included, so that a busy machine changes its ratios little.
"""

import math
from typing import Annotated, Any

import torch
import typer

import tracedensity as td
from benchmarks.measure import Cost, cost, median_seconds
from tracedensity.evaluation import paper_sizes

RANDOM_GPT2 = "random-gpt2-small"


def build(name: str, device: str) -> Any:
    """A bundled model, or one of GPT-2 small's shape with random weights."""
    if name != RANDOM_GPT2:
        return td.load_model(name, device=device)
    from benchmarks.lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=12, d_model=768, n_heads=12, d_head=64, d_mlp=3072, n_ctx=1024, d_vocab=50257,
        act_fn="gelu_new", normalization_type="LN", model_name=name, seed=0, device=device,
    )  # fmt: skip
    return HookedTransformer(cfg)


def prompt_of(model: Any, n_tokens: int) -> torch.Tensor:
    """Random tokens: how long an operation takes does not depend on them."""
    generator = torch.Generator().manual_seed(n_tokens)
    return torch.randint(model.cfg.d_vocab, (n_tokens,), generator=generator)


def measured(model: Any, n_tokens: int) -> tuple[float, dict[str, Cost]]:
    """Seconds of a plain forward pass, and the cost of each operation."""
    prompt = prompt_of(model, n_tokens)
    batch = prompt[None].to(next(model.parameters()).device)
    with torch.no_grad():
        forward = median_seconds(lambda: model(batch))
    ranking = td.attribute(model, prompt).rank()
    sizes = paper_sizes(ranking.n_edges)[:-1]
    operations = {
        "norm": lambda: td.attribute(model, prompt, method="norm"),
        "flow": lambda: td.attribute(model, prompt, method="flow"),
        "rank": lambda: td.attribute(model, prompt, method="random").rank(),
        "26 sizes": lambda: td.evaluate(model, prompt, ranking, sizes),
        "density": lambda: td.density(model, prompt),
    }
    costs = {name: cost(call) for name, call in operations.items()}
    with torch.no_grad():  # once more, in case the machine has become busier or quieter meanwhile
        forward = (forward + median_seconds(lambda: model(batch))) / 2
    return forward, costs


def main(
    models: Annotated[str, typer.Option(help="Bundled names, folders, or random-gpt2-small.")] = (
        f"books-gpt2,books-llama,{RANDOM_GPT2}"
    ),
    tokens: Annotated[str, typer.Option(help="Lengths of the prompt.")] = "16,64,256",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves it to PyTorch.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Print one table: time of each operation over that of a forward pass, and its peak memory in MiB."""
    if threads:
        torch.set_num_threads(threads)
    lengths = [int(n) for n in tokens.split(",")]
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    print("times the plain forward pass (peak memory beside the weights, MiB)\n")
    header = ["norm", "flow", "rank", "26 sizes", "density"]
    print(f"{'model':18}{'tokens':>7}{'edges':>11}{'forward':>10}" + "".join(f"{name:>16}" for name in header))
    for name in models.split(","):
        model = build(name, device)
        rows = {}
        for n_tokens in lengths:
            forward, costs = rows[n_tokens] = measured(model, n_tokens)
            cells = "".join(f"{costs[h].seconds / forward:>8.1f} ({costs[h].bytes / 2**20:>5.0f})" for h in header)
            n_edges = td.attribute(model, prompt_of(model, n_tokens), method="random").graph.n_edges
            print(f"{name:18}{n_tokens:>7}{n_edges:>11,}{forward * 1e3:>8.1f}ms" + cells, flush=True)
        if len(lengths) > 1:
            short, long = min(lengths), max(lengths)
            growth = math.log(long / short)
            exponents = [math.log(rows[long][1][h].seconds / rows[short][1][h].seconds) / growth for h in header]
            forward = math.log(rows[long][0] / rows[short][0]) / growth
            cells = "".join(f"{exponent:>8.2f}{'':8}" for exponent in exponents)
            print(f"{name:18}{'growth exponent':>18}{forward:>10.2f}  {cells}\n", flush=True)


if __name__ == "__main__":
    typer.run(main)

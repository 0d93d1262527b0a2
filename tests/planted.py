"""Tables like those of sweeps, of which the answer is known."""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from tracedensity.evaluation import RELATIVE_SIZES
from tracedensity.study.table import TABLES, text_hash

N_EDGES = 100_000


def curve(middle: float, steepness: float = 1.5, n_edges: int = N_EDGES) -> tuple[list[int], list[float]]:
    """Sizes and faithfulness that rise through one half at 10 ** middle of all edges."""
    sizes = np.unique([int(share * n_edges) for share in RELATIVE_SIZES])
    height = 1 / (1 + np.exp(-steepness * (np.log10(np.maximum(sizes, 0.5) / n_edges) - middle)))
    height[-1] = 1.0
    return sizes.tolist(), height.tolist()


def planted(
    n: int = 200,
    seed: int = 0,
    *,
    per_document: int = 4,
    density: Callable[[Mapping[str, np.ndarray], np.random.Generator], np.ndarray] | None = None,
    text_seed: int = 0,
) -> pd.DataFrame:
    """Prompts with covariates that are drawn at random, and a density that may depend on them.

    Args:
        n: Prompts.
        seed: Of everything but the texts.
        per_document: Prompts of a document.
        density: From covariates to what is the log10 of the share at which faithfulness is one half.
        text_seed: Tables of one such seed have the same texts.
    """
    generator = np.random.default_rng(seed)
    texts = [" ".join(map(str, row)) for row in np.random.default_rng(text_seed).integers(100, 999, size=(n, 12))]
    covariates: dict[str, np.ndarray] = {
        "entropy": generator.gamma(4, 1, n),
        "surprisal": generator.gamma(3, 1, n),
        "rarity_target": generator.gamma(5, 0.5, n),
        "rarity_top": generator.gamma(5, 0.5, n),
        "rarity_expected": generator.gamma(5, 0.5, n),
        "kl_unigram": generator.gamma(3, 1, n),
        "margin": generator.beta(2, 5, n),
        "top_probability": generator.beta(3, 5, n),
        "n_tokens": np.random.default_rng(text_seed).integers(14, 18, n).astype(float),
    }
    middle = generator.normal(-1.5, 0.4, n) if density is None else density(covariates, generator)
    curves = [curve(float(each)) for each in middle]
    columns = {column.name: None for column in TABLES["prompts"]} | {
        **covariates,
        "index": np.arange(n),
        "id": [f"p{number}" for number in range(n)],
        "document": [f"d{number // per_document}" for number in range(n)],
        "text": texts,
        "text_hash": [text_hash(text) for text in texts],
        "tokens": [generator.integers(0, 50, int(length)).tolist() for length in covariates["n_tokens"]],
        "sizes": [sizes for sizes, _ in curves],
        "faithfulness": [heights for _, heights in curves],
        "auc": [
            float(np.trapezoid(1 - np.array(heights), np.log10(np.maximum(sizes, 0.5)))) for sizes, heights in curves
        ],
        "n_edges": N_EDGES,
        "from_first": [[size // 5 for size in sizes] for sizes, _ in curves],
        "entered": [generator.integers(1, N_EDGES, 20).tolist() for _ in range(n)],
        "graph": "token",
    }
    table = pd.DataFrame(columns)
    table["n_tokens"] = table["n_tokens"].astype(int)
    return table

"""Tables like those of sweeps, of which the answer is known."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tracedensity.curve import crossings
from tracedensity.evaluation import RELATIVE_SIZES
from tracedensity.study.folder import MANIFEST, sweep_of
from tracedensity.study.table import SCHEMA, TABLES, schema, text_hash

N_EDGES = 100_000


def curve(middle: float, steepness: float = 1.5, n_edges: int = N_EDGES) -> tuple[list[int], list[float]]:
    """Sizes and faithfulness that rise through one half at 10 ** middle of all edges."""
    sizes = np.unique([int(share * n_edges) for share in RELATIVE_SIZES])
    height = 1 / (1 + np.exp(-steepness * (np.log10(np.maximum(sizes, 0.5) / n_edges) - middle)))
    height[-1] = 1.0
    return sizes.tolist(), height.tolist()


def bent(middle: float) -> tuple[list[int], list[float]]:
    """Sizes and faithfulness that rise steeply up to 10 ** (middle - 1) of all edges, and less behind."""
    sizes, _ = curve(middle)
    x = np.log10(np.maximum(sizes, 0.5) / N_EDGES)
    return sizes, np.interp(x, [x[0], min(max(middle - 1, -4.5), -0.3), 0.0], [0.0, 0.8, 1.0]).tolist()


def straight(middle: float) -> tuple[list[int], list[float]]:
    """Sizes and faithfulness that rises evenly over log10 of size, from a height that depends on middle."""
    sizes, _ = curve(middle)
    x = np.log10(np.maximum(sizes, 0.5) / N_EDGES)
    return sizes, np.interp(x, [x[0], 0.0], [min(max(1.9 + middle, 0.0), 0.6), 1.0]).tolist()


def planted(
    n: int = 200,
    seed: int = 0,
    *,
    per_document: int = 4,
    density: Callable[[Mapping[str, np.ndarray], np.random.Generator], np.ndarray] | None = None,
    text_seed: int = 0,
    shape: Callable[[float], tuple[list[int], list[float]]] = curve,
) -> pd.DataFrame:
    """Prompts with covariates that are drawn at random, and a density that may depend on them.

    Args:
        n: Prompts.
        seed: Of everything but the texts.
        per_document: Prompts of a document.
        density: From covariates to what is the log10 of the share at which faithfulness is one half.
        text_seed: Tables of one such seed have the same texts.
        shape: Sizes and faithfulness, from that share.
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
    curves = [shape(float(each)) for each in middle]
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
        "auc_of_edges": [float(np.trapezoid(1 - np.array(each[1:]), np.log10(sizes[1:]))) for sizes, each in curves],
        "n_edges": N_EDGES,
        "from_first": [[size // 5 for size in sizes] for sizes, _ in curves],
        "entered": [generator.integers(1, N_EDGES, 20).tolist() for _ in range(n)],
        "graph": "token",
    }
    table = pd.DataFrame(columns)
    table["n_tokens"] = table["n_tokens"].astype(int)
    return table


def by_rarity(covariates: Any, generator: np.random.Generator) -> np.ndarray:
    """Density that depends on the rarity of the target alone."""
    return 0.4 * (covariates["rarity_target"] - 2.5) - 1.5 + generator.normal(0, 0.2, len(covariates["entropy"]))


def nested(slope: float, n: int = 40, seed: int = 0) -> pd.DataFrame:
    """Contexts of 4, 8 and 16 tokens for each of `n` targets, whose log10 of size changes by `slope` per doubling."""
    generator = np.random.default_rng(seed)
    rows = []
    for target in range(n):
        own = generator.normal(-1.5, 0.3)
        for place, length in enumerate((4, 8, 16)):
            sizes, heights = curve(own + slope * place + generator.normal(0, 0.05))
            rows.append({
                "id": f"t{target}:{length}", "group": f"t{target}", "document": f"d{target // 4}", "error": None,
                "n_tokens": length + 1, "sizes": sizes, "faithfulness": heights, "n_edges": N_EDGES,
                "entered": [1], "auc": -np.log10(np.interp(0.5, heights, np.maximum(sizes, 1))),
            })  # fmt: skip
    return pd.DataFrame(rows)


COMPONENTS = [f"a0.h{head}" for head in range(18)] + ["r0.attn", "r0.mlp"]


def write_sweep(
    folder: Path, table: pd.DataFrame, thresholds: tuple[float, ...] = (0.5, 0.8, 0.9), shallow: bool = True
) -> None:
    """The folder of a sweep that has these prompts, with what follows from their curves.

    Args:
        folder: The folder.
        table: The prompts.
        thresholds: Faithfulnesses of the table of that name.
        shallow: Whether small circuits predict what is frequent.
    """
    reached, points = [], []
    for row in table.to_dict("records"):
        keys: dict[str, Any] = {name: row[name] for name in ("index", "id", "document")}
        sizes, heights = np.array(row["sizes"]), np.array(row["faithfulness"])
        for threshold in thresholds:
            first, stable = crossings(torch.tensor(heights), threshold)
            size, stable_size = int(sizes[first]), int(sizes[stable])
            reached.append({
                **keys, "threshold": threshold, "size": size, "stable_size": stable_size, "fraction": size / N_EDGES,
                "stable_fraction": stable_size / N_EDGES, "per_token": size / row["n_tokens"], "n_components": 20,
                "component_share": 1.0, "faithfulness": heights[first],
            })  # fmt: skip
        for share in RELATIVE_SIZES:
            size = int(share * N_EDGES)
            height = float(heights[sizes.tolist().index(size)])
            points.append({
                **keys, "share": share, "size": size, "faithfulness": height, "random": height**3, "top1": height > 0.5,
                "nucleus": height, "entropy": 2.0, "unigram_tv": 0.3 + 0.5 * height * shallow, "by_part": [size, 0, 0],
                "by_quarter": [size, 0, 0, 0],
            })  # fmt: skip
    coarse = np.array([np.trapezoid(1 - np.array(each), np.log10(RELATIVE_SIZES)) for each in table["faithfulness"]])
    prompts = table.assign(auc_coarse=coarse, auc_random=coarse + 1)
    about = {"components": COMPONENTS, "parts": ["heads", "MLPs", "skip connections"]}
    for name, rows in {"prompts": prompts, "thresholds": pd.DataFrame(reached), "points": pd.DataFrame(points)}.items():
        columns = schema(name)
        known = rows.reindex(columns=columns.names).astype(object).where(lambda each: each.notna(), None)
        made = pa.Table.from_pylist(known.to_dict("records"), columns.with_metadata({
            "tracedensity": json.dumps({"table": name, "schema": SCHEMA, "sweep": sweep_of(about)}),
        }))  # fmt: skip
        (folder / name).mkdir(parents=True)
        pq.write_table(made, folder / name / "part-00000.parquet")
    (folder / MANIFEST).write_text(json.dumps({"schema": SCHEMA, **about}))

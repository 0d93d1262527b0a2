"""Covariates: what is known of a prompt and its prediction that its density may depend on."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pandas import DataFrame

from tracedensity.alert import alert
from tracedensity.curve import crossings, require_thresholds
from tracedensity.model import Transformer, as_transformer
from tracedensity.setting import rows_at_once
from tracedensity.study.counts import Counts
from tracedensity.study.grid import grid_area
from tracedensity.study.statistics import codes, strata_of
from tracedensity.study.table import prediction_row

NUMERIC: Mapping[str, str] = {
    "entropy": "entropy of the prediction (nats)",
    "margin": "probability of the best token minus that of the second",
    "top_probability": "probability of the best token",
    "surprisal": "surprisal of the target (nats)",
    "rarity_target": "rarity of the target (-log10 of its frequency)",
    "rarity_top": "rarity of the best token (-log10 of its frequency)",
    "rarity_expected": "expected rarity of the prediction (-log10 of frequency)",
    "kl_unigram": "KL of the prediction to the token frequencies (nats)",
    "n_tokens": "length of the prompt (tokens)",
    "repetition": "share of tokens that came before",
    "seen_bigram": "whether the last two tokens came before",
    "word_length": "mean length of words (characters)",
    "type_token_ratio": "distinct words over words",
    "gzip_ratio": "size of the text compressed by zlib over its own (bytes)",
}
"""Covariates that are numbers, and what they are."""

SIZES: Mapping[str, str] = {
    "fraction": "edges of the circuit over all edges",
    "size": "edges of the circuit",
    "per_token": "edges of the circuit per token",
    "component_share": "share of components with an edge in the circuit, positions united",
    "later_fraction": "edges of the circuit over all edges, both without those that leave the first token",
}
"""The ways in which the size of a circuit is counted."""

AREAS: Mapping[str, str] = {
    "area": "area under 1 - faithfulness over log10 of the share of edges, from 1e-5 to 1",
    "auc": "the same as the density papers' code has it, in which it jumps where 1e-5 of all edges is one",
    "auc_of_edges": "the same over sizes of at least one edge, whose range grows with the graph",
}
"""The ways in which all sizes are taken together."""

OUTCOMES: Mapping[str, str] = {**AREAS, **SIZES}
"""What may depend on covariates."""

READ = ("text", "tokens")
"""Columns that covariates of texts and tokens are made of."""

_RARITIES = ("rarity_target", "rarity_top", "rarity_expected", "kl_unigram")
"""Covariates that counts are needed for."""


def with_covariates(table: DataFrame, *, counts: Counts | None = None, model: object = None) -> DataFrame:
    """The prompts of a sweep with covariates beside them; those that failed are left out.

    Args:
        table: Prompts, from `td.read_sweep`.
        counts: Counts of tokens of a corpus, for rarities if the sweep had none.
        model: The model of the sweep, or its name, for what of these depends on whole predictions, which the table does
            not hold; it is run once on each prompt. Without it these stay unknown.

    Raises:
        ValueError: If it is no such table; if rarities are known already, of other counts; if the counts are those of
            another tokenizer; if the model is not that of the sweep, or comes without counts.
    """
    require_prompts(table, READ)
    if model is not None and counts is None:
        raise ValueError("`model` must come with `counts`: it is for how rare the tokens of whole predictions are.")
    if counts is not None:
        require_prompts(table, ("top_token", "target", *_RARITIES))
        _require_same(table, counts)
    found: Any = table[table["error"].isna()].reset_index(drop=True)  # pandas' own types are too wide to be of use
    found.attrs = dict(table.attrs)
    tokens = [np.asarray(each) for each in found["tokens"]]
    words = [text.split() or [""] for text in found["text"]]
    found["repetition"] = [1 - len(np.unique(each)) / len(each) for each in tokens]
    found["seen_bigram"] = [float(_seen(each)) for each in tokens]
    found["word_length"] = [float(np.mean([*map(len, each)])) for each in words]
    found["type_token_ratio"] = [len(set(each)) / len(each) for each in words]
    found["gzip_ratio"] = [_compressed(text) for text in found["text"]]
    if counts is not None:
        transformer = None if model is None else _model_of(table, model, counts)
        if found["rarity_top"].notna().any():  # of the same counts: the sweep has done all of this
            return found
        largest = max(int(found["top_token"].max()), int(found["target"].max() if found["target"].notna().any() else 0))
        if largest >= len(counts.of_token):
            raise ValueError(
                f"`counts` must be of the tokens of this sweep, got {len(counts.of_token)} for token {largest}."
            )
        found["rarity_top"] = counts.rarity(found["top_token"].to_numpy(int))
        known = found["target"].notna()
        found.loc[known, "rarity_target"] = counts.rarity(found.loc[known, "target"].to_numpy(int))
        found.attrs["counts"] = {"name": counts.name, "digest": counts.digest}
        if transformer is not None:
            _add_predicted(found, counts, transformer)
    return found


def require_prompts(given: object, columns: Sequence[str] = ("document", "n_edges")) -> None:
    """Raise a ValueError if it is no table of prompts, or lacks columns beside those of curves."""
    if not isinstance(given, DataFrame):
        raise ValueError(
            f"`table` must be the prompts of a sweep, `td.read_sweep(folder)`, got a {type(given).__name__}."
        )
    needed = dict.fromkeys(["sizes", "faithfulness", "error", *columns])
    if missing := [name for name in needed if name not in given.columns]:
        raise ValueError(
            f"`table` must be the prompts of a sweep, `td.read_sweep(folder)`, got one without the columns {missing}."
        )
    table: Any = given
    if not len(table) or table["error"].notna().all():
        raise ValueError("`table` must have prompts with numbers, got none.")


def unique_prompts(table: DataFrame, columns: Sequence[str] = ()) -> Any:
    """Prompts by their text, those that were run, each once; an alert says how many have the text of another.

    The table must have these columns beside those of curves.
    """
    require_prompts(table, ("text_hash", *columns))
    known: Any = table[table["error"].isna()]
    found = known.drop_duplicates("text_hash")
    if len(found) < len(known):
        alert(f"{len(known) - len(found)} of {len(known)} prompts have the text of another and are left out.")
    return found.set_index("text_hash")


def asked_outcomes(table: DataFrame, outcomes: Sequence[str] | None) -> list[str]:
    """The outcomes to look at: by default all that a sweep tells.

    Raises:
        ValueError: If they are none, or a string in place of several.
    """
    if isinstance(outcomes, str) or (outcomes is not None and not len(outcomes)):
        raise ValueError(f"`outcomes` must be one or more of {list(OUTCOMES)}, such as ('area',), got {outcomes!r}.")
    return known_outcomes(table) if outcomes is None else [*outcomes]


def outcome_of(table: Any, name: str, threshold: float | int = 0.9) -> Float[np.ndarray, " row"]:
    """A density of each prompt: an area, or the log10 of a size at a threshold, counted in one of several ways.

    What needs no edge counts as needing one, so that logarithms are finite.

    Args:
        table: Prompts, from `td.read_sweep`.
        name: One of `OUTCOMES`.
        threshold: Faithfulness to reach. Sizes are known to 2% at the thresholds of the sweep; at others, and where
            faithfulness falls again, the smallest circuit that was run and reaches it counts.

    Raises:
        ValueError: If there is no such outcome, or the sweep does not tell.
    """
    require_prompts(table, _NEEDED.get(name, ()))
    if name in ("auc", "auc_of_edges"):
        return table[name].to_numpy(float)
    if name == "area":
        return np.array([grid_area(*row) for row in zip(table["sizes"], table["faithfulness"], strict=True)])
    if name not in SIZES:
        raise ValueError(f"`outcome` must be one of {list(OUTCOMES)}, got {name!r}.")
    if name not in known_outcomes(table):
        raise ValueError(
            f"`outcome` must be one that the sweep tells, {known_outcomes(table)}, got {name!r}: tokens are no nodes "
            "there, or a prompt is a token alone, whose row may be left out."
        )
    require_thresholds((threshold,))
    curves = zip(table["sizes"], table["faithfulness"], strict=True)
    point = np.array([crossings(torch.tensor(heights), float(threshold))[0] for _, heights in curves])
    return np.log10(_COUNTED[name](table, point))


def known_outcomes(table: Any) -> list[str]:
    """The outcomes that a sweep tells: on the component graph, no edge leaves a token, and all leave a lone one."""
    told = "from_first" in table.columns and table["from_first"].notna().all()
    told = told and all(own < n for own, n in zip(_from_first(table), table["n_edges"], strict=True))
    return [name for name in OUTCOMES if name != "later_fraction" or told]


def _at(table: Any, column: str, point: Int[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """The entry of a list at a point of each prompt's curve."""
    return np.array([float(each[own]) for each, own in zip(table[column], point, strict=True)])


def _sizes(table: Any, point: Int[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    return np.maximum(_at(table, "sizes", point), 1)


def _components(table: Any, point: Int[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    entered = zip(table["entered"], _sizes(table, point), strict=True)
    return np.array([max((np.asarray(each) <= own).sum(), 1) / len(each) for each, own in entered])


def _later(table: Any, point: Int[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    later = _at(table, "sizes", point) - _at(table, "from_first", point)
    return np.maximum(later, 1) / (table["n_edges"].to_numpy(float) - _from_first(table))


def _from_first(table: Any) -> Float[np.ndarray, " row"]:
    """Edges of each whole graph that leave the first token."""
    return np.array([float(each[-1]) for each in table["from_first"]])


_COUNTED: Mapping[str, Callable[[Any, np.ndarray], np.ndarray]] = {
    "fraction": lambda table, point: _sizes(table, point) / table["n_edges"].to_numpy(float),
    "size": _sizes,
    "per_token": lambda table, point: _sizes(table, point) / table["n_tokens"].to_numpy(float),
    "component_share": _components,
    "later_fraction": _later,
}


_NEEDED: Mapping[str, tuple[str, ...]] = {
    "auc": ("auc",), "auc_of_edges": ("auc_of_edges",), "fraction": ("n_edges",), "per_token": ("n_tokens",),
    "component_share": ("entered",), "later_fraction": ("n_edges",),
}  # fmt: skip
"""Columns of outcomes beside those of curves; that of `later_fraction` may be left out, as it is of some graphs."""


def held_for(covariate: str) -> str:
    """What is held while prompts are exchanged to try a covariate, of `strata_held`."""
    return "domain" if covariate == "n_tokens" else "" if covariate in NUMERIC else "length"


def strata_held(table: Any) -> dict[str, Int[np.ndarray, " row"]]:
    """Strata of prompts by what is held: length and domain of the text (""), or one of them."""
    length, domain = table["n_tokens"].to_numpy(float), codes(table["domain"].fillna("").to_numpy())
    return {"": strata_of(length, domain=domain), "length": strata_of(length), "domain": domain}


def numbers(table: Any) -> dict[str, Float[np.ndarray, " row"]]:
    """Covariates that are known of at least some prompts, and differ, as columns of numbers.

    A domain is a column of its own, 1 where a prompt is of it, if there are several.
    """
    columns = {name: table[name].to_numpy(float, na_value=np.nan) for name in NUMERIC if name in table.columns}
    if "domain" in table.columns and table["domain"].nunique(dropna=False) > 1:
        labels = table["domain"].fillna("none").to_numpy(str)
        columns |= {f"domain={label}": (labels == label).astype(float) for label in np.unique(labels)}
    return {name: values for name, values in columns.items() if len(np.unique(values[np.isfinite(values)])) > 1}


def _seen(tokens: np.ndarray) -> bool:
    """Whether the last two tokens stand next to each other earlier."""
    if len(tokens) < 3:
        return False
    return bool(((tokens[:-2] == tokens[-2]) & (tokens[1:-1] == tokens[-1])).any())


def _compressed(text: str) -> float:
    raw = text.encode("utf-8", "replace")
    return len(zlib.compress(raw, 9)) / max(1, len(raw))


def _require_same(table: Any, counts: Counts) -> None:
    """Raise a ValueError if rarities are known of other counts."""
    known = table.attrs.get("counts") or table.attrs.get("sweep", {}).get("counts")
    if table["rarity_top"].isna().all() or (known and known["digest"] == counts.digest):
        return
    of = f"{known['name']!r} ({known['digest']})" if known else "others"
    raise ValueError(
        f"`counts` must be left out, since rarities are known of the counts of {of}, got those of {counts.name!r} "
        f"({counts.digest}): to change them, sweep again with other counts."
    )


def _model_of(table: Any, model: object, counts: Counts) -> Transformer:
    """The model that a sweep was made with.

    Raises:
        ValueError: If it is another one, or the counts are not of its tokens.
    """
    transformer = as_transformer(model)
    known = [] if "fingerprint" not in table.columns else sorted({*table["fingerprint"].dropna()})
    if known and known != [transformer.fingerprint()]:
        raise ValueError(
            f"`model` must be that of the sweep, with the fingerprint {', '.join(known)}, got one with "
            f"{transformer.fingerprint()}."
        )
    if len(counts.of_token) != transformer.d_vocab:
        raise ValueError(
            f"`counts` must be of the model's own tokens, {transformer.d_vocab}, got {len(counts.of_token)}."
        )
    return transformer


def _add_predicted(table: Any, counts: Counts, model: Transformer) -> None:
    """Fill in what depends on whole predictions."""
    # copied: arrays of a table that was read cannot be written to, of which torch warns
    prompts = [torch.from_numpy(np.array(each, dtype=np.int64)).to(model.device) for each in table["tokens"]]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    rows: dict[int, dict[str, float | None]] = {}
    while order:
        n_rows = rows_at_once(model, len(prompts[order[min(len(order), 64) - 1]]))
        some, order = order[:n_rows], order[n_rows:]
        with model.unchanged():
            found = model.run_ahead([prompts[number] for number in some], [])
        for number, logits in zip(some, found, strict=True):
            rows[number] = prediction_row(logits, None, counts, model)
    for name in _RARITIES[2:]:
        table[name] = [rows[number][name] for number in range(len(table))]

"""What answers are made of: the tables of all sweeps, intervals, verdicts and the page's tables."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

import tracedensity as td
from studies.corpora import NULL, TRAINED
from tracedensity.plot.theme import COLOURS, percent
from tracedensity.study.statistics import codes, holm, interval, rank_correlations, resampled

T = TypeVar("T", bound=Hashable)

SIGNIFICANT = 0.05

HUES: Mapping[str, str] = {
    name: COLOURS[hue] for name, hue in zip((*TRAINED, NULL), ("head", "mlp", "circuit", "residual"), strict=True)
}
"""The colour of each model."""

PERMUTATIONS = 10_000
"""As many as studies draw if nothing is said."""

_NAMED = 3
"""So many sweeps, of twice as many at most, are named where a rule holds for some of them."""

Row = dict[str, Any]
Estimate = tuple[float, float, float]  # and its interval
Holds = dict[str, dict[str, bool]]  # what was asked, and of which sweep it is so


@dataclass(frozen=True)
class Finding:
    """An answer.

    Attributes:
        verdict: What the rule says, in a line.
        details: Of which sweeps each thing that was asked is so, as Markdown.
        table: The numbers, as Markdown.
        figures: By what they are of; the main one by nothing.
        also: Other numbers that the page asks for, by name.
    """

    verdict: str
    details: str
    table: str
    figures: Mapping[str, go.Figure]
    also: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweeps:
    """The tables of all sweeps.

    Attributes:
        folder: Where the sweeps are.
        n_draws: How often documents are resampled.
    """

    folder: Path
    n_draws: int = 2000

    @cached_property
    def trained(self) -> list[str]:
        """The trained models that were swept."""
        return [name for name in TRAINED if self.path(name).is_dir()]

    @property
    def models(self) -> list[str]:
        """These, and the null control."""
        return [*self.trained, NULL]

    def path(self, model: str, corpus: str = "wikitext", kind: str = "norm") -> Path:
        return self.folder / f"{model}-{corpus}-{kind}"

    def rows(self, model: str, corpus: str = "wikitext", kind: str = "norm", table: str = "prompts") -> Any:
        """A table of a sweep, without prompts that have an error."""
        found: Any = td.read_sweep(self.path(model, corpus, kind), table)
        return found[found["error"].isna()].reset_index(drop=True) if "error" in found.columns else found

    def interval(self, values: Any, document: Any, of: Callable[[Any], Any]) -> tuple[float, float]:
        """The interval of a statistic, over documents."""
        values = np.asarray(values, float)
        return interval([float(of(values[draw])) for draw in self._draws(document)])

    def correlation(self, both: Float[np.ndarray, "row 2"], document: Any) -> Estimate:
        again = [float(rank_correlations(both[draw])[0, 1]) for draw in self._draws(document)]
        return float(rank_correlations(both)[0, 1]), *interval(again)

    def _draws(self, document: Any) -> Iterable[Any]:
        return resampled(codes(np.asarray(document)), self.n_draws, 0)


def of_sweep(model: str, corpus: str) -> str:
    """What a sweep is called where it is named."""
    return model if corpus == "wikitext" else f"{model} on {corpus}"


def verdict_of(holds: Holds) -> str:
    """From what was asked, and of which sweeps it is so, a verdict and what it depends on.

    It depends, where something that was asked is so of all sweeps, or all that was asked is so of some sweep.
    """
    sweeps = dict.fromkeys(sweep for where in holds.values() for sweep in where)
    said = {
        "everywhere": _everywhere(holds),
        "nowhere": [name for name, where in holds.items() if not any(where.values())],
        "all of it": [sweep for sweep in sweeps if all(where.get(sweep, False) for where in holds.values())],
    }
    if len(said["everywhere"]) == len(holds):
        return "Reproduced"
    if not said["everywhere"] and not said["all of it"]:
        return "Not reproduced"
    return "It depends: " + "; ".join(f"{where} {', '.join(names)}" for where, names in said.items() if names)


def word_of(holds: Holds) -> str:
    """The verdict without what it depends on."""
    return verdict_of(holds).partition(":")[0]


def details_of(holds: Holds, untrained: Holds) -> str:
    """Of which sweeps each thing that was asked is so; and what is so of the null control, made by no training."""
    kinds: dict[str, list[str]] = {}
    for name, where in holds.items():
        kinds.setdefault(_where(where), []).append(name)
    if control := _everywhere(untrained):
        kinds[f"with {NULL} weights as well"] = control
    return "\n".join(f"* {where}: {', '.join(names)}" for where, names in kinds.items())


def _everywhere(holds: Holds) -> list[str]:
    """What is so of all sweeps."""
    return [name for name, where in holds.items() if all(where.values())]


def _where(where: Mapping[str, bool]) -> str:
    """For which sweeps something is so."""
    yes, no = ([name for name, each in where.items() if each is wanted] for wanted in (True, False))
    if not no or not yes:
        return "no" if no else "yes"
    if len(where) > 2 * _NAMED:
        return f"in {len(yes)} of {len(where)}"
    return f"only for {' and '.join(yes)}" if len(yes) <= len(no) else f"yes, but for {' and '.join(no)}"


def corrected(found: Mapping[T, Any], names: Sequence[str], n_permutations: int) -> dict[T, Any]:
    """The tables of several studies, p values corrected for the number of all tests in them.

    Raises:
        ValueError: If there are so many tests that the least p of so many permutations would not do.
    """
    tables = {key: each.table for key, each in found.items()}
    p = [table[name].to_numpy(float) for table in tables.values() for name in names]
    n_tests = int(np.isfinite(np.concatenate(p)).sum())
    if n_tests / (1 + n_permutations) > SIGNIFICANT / 2:
        raise ValueError(f"{n_tests} tests need more than {n_permutations} permutations.")
    together = iter(np.split(holm(np.concatenate(p)), np.cumsum([len(each) for each in p])[:-1]))
    return {key: table.assign(**{f"{name}_holm": next(together) for name in names}) for key, table in tables.items()}


def table_of(rows: Sequence[Row]) -> str:
    """Rows as Markdown; all have the same columns."""
    head = [" | ".join(rows[0]), "|".join(["---"] * len(rows[0]))]
    return "\n".join(f"| {line} |" for line in [*head, *(" | ".join(map(str, row.values())) for row in rows)])


def each_of(models: Iterable[str], said: Callable[[str], str]) -> str:
    """What is said of each model."""
    return "; ".join(f"{model} {said(model)}" for model in models)


def as_percent(each: Estimate) -> str:
    return f"{each[0]:.2%} ({each[1]:.2%} to {each[2]:.2%})"


def as_number(each: Estimate, form: str = ".2f") -> str:
    return f"{each[0]:{form}} ({each[1]:{form}} to {each[2]:{form}})"


def star(p: float) -> str:
    """A star for what is significant."""
    return "*" if p < SIGNIFICANT else ""


def shares() -> dict[str, Any]:
    """A logarithmic axis of shares."""
    ticks = [10.0**-power for power in range(5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [percent(each) for each in ticks]}

"""(d) Do rarer tokens need more?"""

from itertools import product
from typing import Any

import tracedensity as td
from studies.corpora import CORPORA, NULL, TARGET
from studies.findings.answer import (
    PERMUTATIONS,
    SIGNIFICANT,
    Finding,
    Holds,
    Row,
    Sweeps,
    as_number,
    corrected,
    details_of,
    of_sweep,
    table_of,
    verdict_of,
)

_RARITIES = {
    "rarity_target": "rarity of the target", "rarity_top": "rarity of the prediction",
    "rarity_expected": "expected rarity",
    "entropy": "entropy",
}  # fmt: skip
_PERMUTATIONS = 3 * PERMUTATIONS  # for so many tests
_OUTCOMES = {"area": "area", "fraction": f"share at {TARGET:g}"}


def find(sweeps: Sweeps) -> Finding:
    """Correlations of density with three rarities, plain and given entropy."""
    rows: list[Row] = []
    holds: Holds = {}
    untrained: Holds = {}
    found: dict[tuple[str, str], Any] = {}
    for model, corpus in product(sweeps.models, CORPORA):
        found[model, corpus] = td.study.factors(
            sweeps.rows(model, corpus), outcomes=[*_OUTCOMES], threshold=TARGET,
            n_bootstrap=sweeps.n_draws, n_permutations=_PERMUTATIONS,
        )  # fmt: skip
    for (model, corpus), table in corrected(found, ("p", "partial_p"), _PERMUTATIONS).items():
        known: Any = table.set_index(["outcome", "covariate"])
        for outcome, called in _OUTCOMES.items():
            row: Row = {"model": model, "text": corpus, "density": called}
            for covariate, name in _RARITIES.items():
                each, said = known.loc[(outcome, covariate)], []
                for kind, given in (("", ""), ("partial_", " given entropy")):
                    significant = each[f"{kind}p_holm"] < SIGNIFICANT
                    above, below = each[f"{kind}low"] > 0, each[f"{kind}high"] < 0
                    estimate = each[f"{kind}rho"], each[f"{kind}low"], each[f"{kind}high"]
                    said.append(as_number(estimate) + "*" * bool(significant and (above or below)))
                    if covariate != "entropy":
                        where = f"{of_sweep(model, corpus)} by {called}"
                        asked = untrained if model == NULL else holds
                        asked.setdefault(f"{name}{given}", {})[where] = bool(significant and above)
                row[name] = "<br>".join(said)
            rows.append({**row, "contexts": int(known["n"].max())})
    figure = next(iter(found.values())).plot("area")
    return Finding(verdict_of(holds), details_of(holds, untrained), table_of(rows), {"": figure})

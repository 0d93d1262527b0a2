"""(c) Are the same inputs dense for different models?"""

import tracedensity as td
from studies.corpora import CORPORA, NULL
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
    table_of,
    verdict_of,
)

PAPERS = 0.52
"""The mean correlation of the papers' ten models."""

_FAMILIES = {"books-gpt2": "GPT-2", "books-llama": "Llama", "stories260K": "Llama"}


def find(sweeps: Sweeps) -> Finding:
    """Correlations of areas between models, plain, given lengths, and given entropies and rarities too."""
    tables = {corpus: {model: sweeps.rows(model, corpus) for model in sweeps.models} for corpus in CORPORA}
    found = {}
    for corpus in CORPORA:
        others = {model: sweeps.rows(model, corpus, "flow") for model in sweeps.models}
        found[corpus] = td.study.compare(tables[corpus], others=others, n_bootstrap=sweeps.n_draws)
    tests = corrected(found, ("p", "length_p", "partial_p"), PERMUTATIONS)
    rows: list[Row] = []
    holds: Holds = {}
    untrained: Holds = {}
    for corpus, table in tests.items():
        for row in table.to_dict("records"):
            plain, length, partial = (
                (row[f"{kind}rho"], row[f"{kind}low"], row[f"{kind}high"]) for kind in ("", "length_", "partial_")
            )
            pair = f"{row['a']}, {row['b']}"
            rows.append({
                "models": pair, "text": corpus, "correlation": as_number(plain),
                "given lengths": as_number(length), "its p": f"{row['length_p_holm']:.2g}",
                "given entropies and rarities too": as_number(partial), "p of that": f"{row['partial_p_holm']:.2g}",
                "ceiling": f"{row['ceiling_low']:.2f} to {row['ceiling_high']:.2f}", "contexts": row["n"],
            })  # fmt: skip
            where = f"{row['a']} with {row['b']}" + " on books" * (corpus == "books")
            for name, kind in (("given lengths", "length"), ("beyond entropy and rarity", "partial")):
                significant = row[f"{kind}_low"] > 0 and row[f"{kind}_p_holm"] < SIGNIFICANT
                asked = untrained if NULL in (row["a"], row["b"]) else holds
                asked.setdefault(name, {})[where] = significant
    # means of these alone, with their intervals
    trained = {
        corpus: td.study.compare(
            {model: tables[corpus][model] for model in sweeps.trained}, n_bootstrap=sweeps.n_draws, n_permutations=0,
            families={model: _FAMILIES[model] for model in sweeps.trained},
        )
        for corpus in CORPORA
    }  # fmt: skip
    means = {corpus: as_number((each.mean, each.low, each.high)) for corpus, each in trained.items()}
    means["families"] = "; ".join(
        f"{row['pairs']} families {as_number((row['mean'], row['low'], row['high']))} on {corpus}"
        for corpus, each in trained.items()
        for row in each.families.to_dict("records")
    )
    average = sum(each.mean for each in trained.values()) / len(trained)
    verdict = f"{verdict_of(holds)}; {average:.2f} on average (papers: {PAPERS})"
    return Finding(verdict, details_of(holds, untrained), table_of(rows), {"": found["wikitext"].plot()}, means)

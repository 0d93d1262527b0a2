"""(f) Are there two phases, construction and refinement?"""

from typing import Any

import numpy as np
import plotly.graph_objects as go

import tracedensity as td
from studies.corpora import CORPORA, NULL
from studies.findings.answer import (
    Estimate,
    Finding,
    Holds,
    Row,
    Sweeps,
    as_number,
    details_of,
    of_sweep,
    table_of,
    verdict_of,
)
from tracedensity.study.inventory import shortest_path

NEARER = 0.05
"""Total variation distance by which small circuits are nearer to the frequencies of tokens to count as shallow."""


def find(sweeps: Sweeps) -> Finding:
    """Where mean curves break, and whether small circuits predict what is frequent."""
    rows: list[Row] = []
    holds: Holds = {}
    untrained: Holds = {}
    figures: dict[str, go.Figure] = {}
    for corpus in CORPORA:
        null = None
        for model in (NULL, *sweeps.trained):
            found = td.study.contents(sweeps.path(model, corpus), n_bootstrap=sweeps.n_draws, n_null=0)
            circuits, random = found.phases["circuits"], found.phases.get("random")
            table: Any = found.by_size
            lasting = table["share"][~(table["top1"] < 0.5)[::-1].cummax()[::-1]]
            share, nearer = _nearer(sweeps, model, corpus)
            rows.append({
                "model": model, "text": corpus, "break": _break(circuits),
                "three pieces": _pieces(circuits),
                "break of random circuits": "not run" if random is None else _break(random),
                "top token in half from": f"{lasting.iloc[0]:.2%}",
                "nearest to the frequencies at": f"{share:.2%}", "nearer than the model by": as_number(nearer),
                "contexts": found.n,
            })  # fmt: skip
            bent = circuits.break_at is not None and circuits.found >= 0.95 and circuits.slopes[0] > circuits.slopes[-1]
            where, asked = of_sweep(model, corpus), untrained if model == NULL else holds
            asked.setdefault("steep, then flat", {})[where] = bent
            if null is None:
                null = circuits
            else:
                apart = null.break_at is None or circuits.high < null.low or circuits.low > null.high
                holds.setdefault(f"broken elsewhere than with {NULL} weights", {})[where] = bent and apart
                figures = figures or {"": found.plot("phases"), "predictions": found.plot("prediction")}
            asked.setdefault("small circuits nearer to the frequencies", {})[where] = nearer[1] > NEARER
    return Finding(verdict_of(holds), details_of(holds, untrained), table_of(rows), figures)


def _pieces(each: Any) -> str:
    """Where the mean curve breaks if it may break twice, and how steep its pieces are."""
    if len(each.breaks) < 2:
        return "no better"
    places = " and ".join(f"{place:.2%}" for place in each.breaks)
    return f"at {places}; {', '.join(f'{slope:.2f}' for slope in each.all_slopes)}"


def _nearer(sweeps: Sweeps, model: str, corpus: str) -> tuple[float, Estimate]:
    """At which size circuits predict what is nearest to the frequencies, and how much nearer than the model.

    Among sizes that can lead from an embedding to the prediction. The best of these is taken in each resampling anew:
    the largest of several means is, on average, a little too large.
    """
    points, prompts = sweeps.rows(model, corpus, table="points"), sweeps.rows(model, corpus)
    far = points.pivot(index="index", columns="share", values="unigram_tv")
    distance = far.to_numpy(float)
    able = np.array(far.columns) * float(prompts["n_edges"].median()) >= shortest_path(prompts)
    nearer = distance[:, -1:] - distance[:, able]
    best = int(nearer.mean(0).argmax())
    document = prompts.set_index("index").loc[far.index, "document"]
    interval = sweeps.interval(nearer, document, lambda some: some.mean(0).max())
    return float(np.array(far.columns)[able][best]), (float(nearer.mean(0)[best]), *interval)


def _break(each: Any) -> str:
    if each.break_at is None:
        return "none"
    where = f"{each.break_at:.2%} ({each.low:.2%} to {each.high:.2%}) in {each.found:.0%}"
    edge = ", the end of the search" * each.at_edge
    return f"{where}{edge}; {each.slopes[0]:.2f}, then {each.slopes[-1]:.2f}"

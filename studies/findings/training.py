"""(g) How density goes over training, of which the papers say nothing."""

import numpy as np

import tracedensity as td
from studies.findings.answer import SIGNIFICANT, Finding, Row, Sweeps, as_number, star, table_of


def find(sweeps: Sweeps) -> Finding:
    """The area at each checkpoint."""
    found = td.study.trend(sweeps.folder / "steps", n_bootstrap=sweeps.n_draws)
    rows: list[Row] = []
    changes = []
    for row in found.table.to_dict("records"):
        mean, change, rho = (
            (row[middle], row[f"{kind}low"], row[f"{kind}high"])
            for middle, kind in (("mean", ""), ("change", "change_"), ("rho", "rho_"))
        )
        first = np.isnan(row["p"])
        rows.append({
            "checkpoint": row["name"], "area": as_number(mean),
            "change": "" if first else as_number(change) + star(row["p_holm"]),
            "correlation with the last": as_number(rho), "entropy": f"{row['entropy']:.2f}", "contexts": row["n"],
        })  # fmt: skip
        if not first:
            changes.append("up" if row["change"] > 0 else "down")
            changes[-1] = changes[-1] if row["p_holm"] < SIGNIFICANT else "no clear change"
    verdict = f"The area, from checkpoint to checkpoint: {', '.join(changes)}"
    return Finding(verdict, "", table_of(rows), {"": found.plot()})

"""The findings: numbers with intervals and null controls, figures, and verdicts by rules, for `page.md` to say.

The page says which rules were changed when, and what had been seen by then.
"""

from collections.abc import Callable, Mapping

from studies.findings.answer import Finding, Sweeps
from studies.findings.dense import dense
from studies.findings.dynamic import dynamic
from studies.findings.long import long
from studies.findings.phases import phases
from studies.findings.rare import rare
from studies.findings.shared import shared
from studies.findings.training import training

FINDINGS: Mapping[str, Callable[[Sweeps], Finding]] = {
    "a": dense, "b": dynamic, "c": shared, "d": rare, "e": long, "f": phases, "g": training,
}  # fmt: skip
"""By their letters."""

__all__ = ["FINDINGS", "Finding", "Sweeps"]

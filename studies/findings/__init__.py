"""The findings: numbers with intervals and null controls, figures, and verdicts by rules, for `page.md` to say.

The page says which rules were changed when, and what had been seen by then.
"""

from collections.abc import Callable, Mapping

from studies.findings import dense, dynamic, long, phases, rare, shared, training
from studies.findings.answer import Finding, Sweeps

FINDINGS: Mapping[str, Callable[[Sweeps], Finding]] = {
    "a": dense.find, "b": dynamic.find, "c": shared.find, "d": rare.find, "e": long.find, "f": phases.find,
    "g": training.find,
}  # fmt: skip
"""By their letters."""

__all__ = ["FINDINGS", "Finding", "Sweeps"]

"""Studies: density over a corpus, what it goes with, and what circuits hold."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracedensity.study.associations import Factors, factors
    from tracedensity.study.bisection import Bisection, target
    from tracedensity.study.comparison import Comparison, compare
    from tracedensity.study.counts import Counts, count_tokens
    from tracedensity.study.covariates import with_covariates
    from tracedensity.study.inventory import Contents, contents
    from tracedensity.study.knees import Thresholds, thresholds
    from tracedensity.study.nested import Lengths, lengths
    from tracedensity.study.series import Trend, checkpoints, trend
    from tracedensity.study.shapley import ShapValues, shap_values

# As in the package above: nothing is imported before it is used, and no module is named like a function.
_PUBLIC = {
    "Bisection": "bisection",
    "Comparison": "comparison",
    "Contents": "inventory",
    "Counts": "counts",
    "Factors": "associations",
    "Lengths": "nested",
    "ShapValues": "shapley",
    "Thresholds": "knees",
    "Trend": "series",
    "checkpoints": "series",
    "compare": "comparison",
    "contents": "inventory",
    "count_tokens": "counts",
    "factors": "associations",
    "lengths": "nested",
    "shap_values": "shapley",
    "target": "bisection",
    "thresholds": "knees",
    "trend": "series",
    "with_covariates": "covariates",
}

__all__ = [
    "Bisection",
    "Comparison",
    "Contents",
    "Counts",
    "Factors",
    "Lengths",
    "ShapValues",
    "Thresholds",
    "Trend",
    "checkpoints",
    "compare",
    "contents",
    "count_tokens",
    "factors",
    "lengths",
    "shap_values",
    "target",
    "thresholds",
    "trend",
    "with_covariates",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tracedensity.study' has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(import_module(f"tracedensity.study.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

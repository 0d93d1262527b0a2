"""How much of a language model does one prediction need, which part, and why?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracedensity import plot, study, tasks
    from tracedensity.activations import Activations, capture
    from tracedensity.checks import completeness, minimality
    from tracedensity.curve import DensityCurve
    from tracedensity.estimation import density
    from tracedensity.evaluation import Evaluation, evaluate
    from tracedensity.exchange import read_benchmark, write_benchmark, write_graphml
    from tracedensity.extract import Ranking
    from tracedensity.files import load
    from tracedensity.graph.circuit import Certificate, Circuit
    from tracedensity.graph.component import ComponentGraph
    from tracedensity.graph.token import TokenGraph
    from tracedensity.loading import load_model
    from tracedensity.model import ModelReport, check_model, offload_activations
    from tracedensity.planning import Plan, plan
    from tracedensity.refinement import refine
    from tracedensity.reporting import Report, report
    from tracedensity.routing import Flow, trace_flow
    from tracedensity.score import Scores, attribute
    from tracedensity.study.folder import read_sweep
    from tracedensity.study.sweep import Sweep, sweep
    from tracedensity.task import Examples, Task
    from tracedensity.tight import TightCurve
    from tracedensity.trust import Check
    from tracedensity.unembedding import TopTokens, top_tokens

__version__ = "0.1.0"

# Public name -> module that defines it. Nothing is imported before a name is used: torch and
# TransformerLens take seconds. No module is named like a public function: importing it would put it in the
# function's place.
_PUBLIC = {
    "Activations": "activations",
    "Certificate": "graph.circuit",
    "Check": "trust",
    "Circuit": "graph.circuit",
    "ComponentGraph": "graph.component",
    "DensityCurve": "curve",
    "Evaluation": "evaluation",
    "Examples": "task",
    "Flow": "routing",
    "ModelReport": "model",
    "Plan": "planning",
    "Ranking": "extract",
    "Report": "reporting",
    "Scores": "score",
    "Sweep": "study.sweep",
    "Task": "task",
    "TightCurve": "tight",
    "TokenGraph": "graph.token",
    "TopTokens": "unembedding",
    "attribute": "score",
    "capture": "activations",
    "check_model": "model",
    "completeness": "checks",
    "density": "estimation",
    "evaluate": "evaluation",
    "load": "files",
    "load_model": "loading",
    "minimality": "checks",
    "offload_activations": "model",
    "plan": "planning",
    "read_benchmark": "exchange",
    "read_sweep": "study.folder",
    "refine": "refinement",
    "report": "reporting",
    "sweep": "study.sweep",
    "top_tokens": "unembedding",
    "trace_flow": "routing",
    "write_benchmark": "exchange",
    "write_graphml": "exchange",
}

__all__ = [
    "Activations",
    "Certificate",
    "Check",
    "Circuit",
    "ComponentGraph",
    "DensityCurve",
    "Evaluation",
    "Examples",
    "Flow",
    "ModelReport",
    "Plan",
    "Ranking",
    "Report",
    "Scores",
    "Sweep",
    "Task",
    "TightCurve",
    "TokenGraph",
    "TopTokens",
    "attribute",
    "capture",
    "check_model",
    "completeness",
    "density",
    "evaluate",
    "load",
    "load_model",
    "minimality",
    "offload_activations",
    "plan",
    "plot",
    "read_benchmark",
    "read_sweep",
    "refine",
    "report",
    "study",
    "sweep",
    "tasks",
    "top_tokens",
    "trace_flow",
    "write_benchmark",
    "write_graphml",
]


def __getattr__(name: str) -> Any:
    if name in ("plot", "study", "tasks"):
        return import_module(f"tracedensity.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tracedensity' has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(import_module(f"tracedensity.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

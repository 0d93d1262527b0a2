"""Captions: what figures say of the thing that they are about."""

from tracedensity.curve import DensityCurve
from tracedensity.graph.circuit import Circuit
from tracedensity.graph.token import TokenGraph
from tracedensity.plot.theme import percent, plain, quoted
from tracedensity.provenance import Provenance


def asked(provenance: Provenance) -> str:
    """The task and its size, or the prompt in quotation marks; still to be a `label`."""
    task = provenance.named_task
    if task is None:
        return quoted(provenance.prompt)
    unit = "prompt" if task.corrupted is None else "pair"
    return f"{plain(task.name)} ({len(task):,} {unit}{'s' * (len(task) != 1)})"


def predicted(curve: DensityCurve, length: int = 50) -> str:
    """The task and its size, or the prediction and its prompt; still to be a `label`."""
    if curve.provenance.named_task is not None:
        return asked(curve.provenance)
    return f"{quoted(curve.top_text, 20)} after {quoted(curve.provenance.prompt, length)}"


def found(circuit: Circuit) -> str:
    """How a circuit was found, on which model; still to be a `label`."""
    searched = circuit.certificate is not None and not circuit.certificate.minimum
    return "searched from " * searched + scored(circuit.provenance)


def scored(provenance: Provenance) -> str:
    """How edges were scored, on which model; still to be a `label`."""
    return f"{plain(provenance.method)} on {plain(provenance.model)}"


def size_of(circuit: Circuit) -> str:
    """Size and faithfulness, on two lines; still to be a `label`."""
    measured = "not run" if circuit.faithfulness is None else f"faithfulness {circuit.faithfulness:.3f}"
    size = f"{circuit.n_edges:,} of {circuit.graph.n_edges:,} edges ({percent(circuit.fraction)})"
    return f"Circuit of {size},\n{measured}"


def about(circuit: Circuit) -> list[str]:
    """What a circuit was chosen for, and how it is run; still to be a `label`."""
    made = circuit.provenance
    metric = made.metric if circuit.faithfulness is None else circuit.metric
    usual = ("", "tv", "zero") if isinstance(circuit.graph, TokenGraph) else ("",)  # goes without saying
    return [
        asked(made),
        found(circuit),
        *([f"metric {plain(metric)}"] * (metric not in usual)),
        *([f"{plain(circuit.ablation)} ablation"] * (circuit.ablation not in usual)),
        *(["all skips kept when run"] * circuit.keep_residual),
        *(["absent attention edges not ablated"] * (circuit.attention == "open")),
    ]

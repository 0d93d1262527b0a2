"""Gauges: how faithful circuits are, by a metric and by what counts as none and as all of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tracedensity.faithfulness import CONVERSIONS, METRICS, faithfulness, kl_divergence
from tracedensity.graph import Graph
from tracedensity.metric import Metric, measure_circuits, named_metric
from tracedensity.run import Conditions, Measure, run_masks
from tracedensity.setting import Setting


@dataclass(frozen=True, eq=False)
class Gauge:
    """What is measured of circuits in a setting, and how it becomes a share of what the model does.

    Attributes:
        metric: Name of the metric.
        measure: The metric as a function of logits, under the name "".
        setting: Where circuits are run.
        full: The metric of the model on each example; None where the metric compares with the model by itself.
        empty: That of the circuit without edges, likewise.
        also: Names of what else is measured.
    """

    metric: str
    measure: Measure
    setting: Setting
    full: Float[Tensor, " example"] | None = None
    empty: Float[Tensor, " example"] | None = None
    also: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, setting: Setting, graph: Graph, metric: str | Metric | None, also: Mapping[str, str | Metric] | None = None
    ) -> "Gauge":
        """The gauge of a metric, by default that of the task or total variation distance, and of others beside it."""
        also = also or {}
        if metric is None:
            metric = named_metric(None, setting.examples)[0] if setting.asked else "tv"
        name = metric if isinstance(metric, str) else named_metric(metric, setting.examples)[0]
        if name in CONVERSIONS:
            return cls(name, measure_of(setting, {"": name, **also}), setting, also=tuple(also))
        measure = measure_of(setting, {"": named_metric(metric, setting.examples)[1], **also})
        full = measure(setting.clean_logits[None], slice(None))[""][0].cpu()
        return cls(name, measure, setting, full, empty_values(setting, graph, measure)[""], tuple(also))

    @property
    def tells(self) -> bool:
        """Whether it tells the model from the circuit without edges; else there is nothing to take shares of."""
        return self.full is None or self.empty is None or differ(self.full, self.empty)

    def faithfulness(self, values: Float[Tensor, "circuit example"]) -> Float[Tensor, " circuit"]:
        """Faithfulness of circuits on all examples together."""
        if self.full is None or self.empty is None:
            return faithfulness(self.metric, values).double().mean(1)
        return recovered(values.double().mean(1), self.full, self.empty)

    def with_loss(self, logits: Float[Tensor, "circuit example d_vocab"], part: slice) -> dict[str, Tensor]:
        """The metric, and a loss that falls as faithfulness rises and has a gradient everywhere.

        It is KL(model || circuit) for metrics that compare predictions: total variation is flat where the two have
        nothing in common, agreement almost everywhere. For others it is minus the share that is recovered.
        """
        values = self.measure(logits, part)[""]
        if self.full is None or self.empty is None:
            return {"": values, "loss": kl_divergence(self.setting.clean_logits[part], logits)}
        return {"": values, "loss": -values / float(self.full.double().mean() - self.empty.double().mean())}


def recovered(
    values: Float[Tensor, "*circuit"], full: Float[Tensor, " example"], empty: Float[Tensor, " example"]
) -> Float[Tensor, "*circuit"]:
    """Mean metrics as shares of the way from the empty circuit, 0, to the model, 1.

    Raises:
        ValueError: If the two are as good as equal.
    """
    top, bottom = full.double().mean(), empty.double().mean()
    if not differ(full, empty):
        raise ValueError(
            f"`metric` must tell the model from the circuit without edges, got {float(top):.4g} for both: faithfulness "
            "is a share of their difference. Take another metric, task or ablation."
        )
    return (values - bottom) / (top - bottom)


def differ(full: Float[Tensor, " example"], empty: Float[Tensor, " example"]) -> bool:
    """Whether mean metrics are far enough apart for shares of their difference to mean something."""
    top, bottom = float(full.double().mean()), float(empty.double().mean())
    return abs(top - bottom) > 1e-6 * (1 + abs(top))


def measure_of(setting: Setting, metrics: Mapping[str, str | Metric]) -> Measure:
    """Metrics as functions of the logits of circuits on some of the examples."""

    def measured(logits: Float[Tensor, "circuit example d_vocab"], part: slice) -> dict[str, Tensor]:
        some = setting.examples[part]
        return {
            name: METRICS[metric](setting.clean_logits[part], logits)
            if isinstance(metric, str)
            else measure_circuits(metric, logits, some)
            for name, metric in metrics.items()
        }

    return measured


def empty_values(setting: Setting, graph: Graph, measure: Measure) -> dict[str, Float[Tensor, " example"]]:
    """The circuit without edges, measured: under most ablations that is no plain run on anything."""
    nothing = {kind: torch.zeros(1, *shape, dtype=torch.bool) for kind, shape in graph.shapes.items()}
    values = run_masks(setting, graph, nothing, Conditions(ablation=setting.ablation), measure)
    return {name: value[0].cpu() for name, value in values.items()}

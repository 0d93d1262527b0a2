"""Gauges: how faithful circuits are, by a metric and by what counts as none and as all of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tracedensity.faithfulness import CONVERSIONS, METRICS, faithfulness, kl_divergence
from tracedensity.graph import Graph
from tracedensity.metric import Metric, measure_circuits, named_metric
from tracedensity.run import Conditions, run_masks
from tracedensity.setting import Setting

_AT_ONCE = 2**24
"""Logits that are measured at a time, which takes up to ten times their memory."""


@dataclass(frozen=True, eq=False)
class Measuring:
    """Metrics of circuits in a setting; it is called with their logits on some of the examples.

    Attributes:
        setting: Where the circuits are run.
        metrics: The metrics by name.
    """

    setting: Setting
    metrics: Mapping[str, str | Metric]
    _known: dict[Callable[[Tensor], tuple[Tensor, ...]], tuple[Tensor, ...]] = field(default_factory=dict, init=False)

    def __call__(self, logits: Float[Tensor, "circuit example d_vocab"], part: slice) -> dict[str, Tensor]:
        some = self.setting.examples[part]
        return {
            name: METRICS[metric].measured(logits, *self.known(metric, part))
            if isinstance(metric, str)
            else measure_circuits(metric, logits, some)
            for name, metric in self.metrics.items()
        }

    def known(self, metric: str, part: slice) -> tuple[Tensor, ...]:
        """What a metric has to know of the model's predictions; worked out once where there is one of them."""
        make = METRICS[metric].known  # which several metrics have in common
        if len(self.setting.examples) > 1:
            return make(self.setting.clean_logits[part])
        if make not in self._known:
            self._known[make] = make(self.setting.clean_logits)
        return self._known[make]


def measured_together(
    several: Sequence[Measuring], owner: Int[Tensor, " row"], logits: Float[Tensor, "row d_vocab"]
) -> dict[str, Float[Tensor, " row"]]:
    """The same metrics of circuits of several settings, each with one example.

    Args:
        several: Who measures.
        owner: Which of them measures each row.
        logits: Predictions of circuits.
    """
    n_rows = max(1, _AT_ONCE // logits.shape[1])
    found: dict[str, Tensor] = {}
    for name, metric in several[0].metrics.items():
        if isinstance(metric, str):
            of_each = [each.known(metric, slice(None)) for each in several]
            known = [torch.cat(each) for each in zip(*of_each, strict=True)]
            values = [
                METRICS[metric].measured(some, *(each[whose] for each in known))
                for some, whose in zip(logits.split(n_rows), owner.split(n_rows), strict=True)
            ]
            found[name] = torch.cat(values)
        else:
            rows = [(owner == number).nonzero()[:, 0] for number in range(len(several))]
            values = [
                measure_circuits(metric, logits[own][:, None], each.setting.examples)[:, 0]
                for each, own in zip(several, rows, strict=True)
            ]
            found[name] = torch.cat(values)[torch.cat(rows).argsort()]
    return found


@dataclass(frozen=True, eq=False)
class Gauge:
    """What is measured of circuits in a setting, and how it becomes a share of what the model does.

    Attributes:
        metric: Name of the metric.
        measure: The metric, under the name "", and what else is measured.
        setting: Where circuits are run.
        full: The metric of the model on each example; None where the metric compares with the model by itself.
        empty: That of the circuit without edges, likewise.
        also: Names of what else is measured.
    """

    metric: str
    measure: Measuring
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
            return cls(name, Measuring(setting, {"": name, **also}), setting, also=tuple(also))
        measure = Measuring(setting, {"": named_metric(metric, setting.examples)[1], **also})
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


def empty_values(setting: Setting, graph: Graph, measure: Measuring) -> dict[str, Float[Tensor, " example"]]:
    """The circuit without edges, measured: under most ablations that is no plain run on anything."""
    nothing = {kind: torch.zeros(1, *shape, dtype=torch.bool) for kind, shape in graph.shapes.items()}
    values = run_masks(setting, graph, nothing, Conditions(ablation=setting.ablation), measure)
    return {name: value[0].cpu() for name, value in values.items()}

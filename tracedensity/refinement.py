"""Refinement: circuits made as small as a budget of runs can make them, each one measured."""

from collections.abc import Sequence
from operator import index
from typing import SupportsIndex

import torch

from tracedensity.alert import alert
from tracedensity.choices import Attention
from tracedensity.evaluation import require_options, setting_for
from tracedensity.extract import Ranking
from tracedensity.gauge import Gauge
from tracedensity.graph import unflatten
from tracedensity.graph.circuit import Certificate, Circuit
from tracedensity.ground import Ground
from tracedensity.metric import Metric
from tracedensity.model import as_transformer
from tracedensity.provenance import Provenance
from tracedensity.run import Conditions
from tracedensity.search import Search


@torch.inference_mode(False)  # where the user is in it: there are no gradients there
def refine(
    model: object,
    prompt: object,
    circuit_or_ranking: Circuit | Ranking,
    faithfulness: float = 0.9,
    *,
    budget: SupportsIndex = 400,
    seed: SupportsIndex = 0,
    metric: str | Metric | None = None,
    ablation: str | None = None,
    keep_residual: bool | None = None,
    attention: Attention | str | None = None,
    position: int = -1,
    batch_size: int | None = None,
) -> Circuit:
    """Look for the smallest circuit that is faithful enough, and return it with a certificate.

    No search proves that a circuit is the smallest, unless it could run all smaller ones (`td.density(...,
    method="exhaustive")` does on small graphs). This one returns a circuit that was run and reached the target, and
    says what else it measured: whether any single edge could go.

    1. A circuit *grows* from nothing: the edges whose gradients promise most are tried one by one, in one batch,
       and the best of them enter together if that is better still. Heads and MLPs enter with the skip connections
       that feed them. This finds what is really small in a few dozen runs. (A circuit that is given and falls short is
       what grows.)
    2. If that does not reach the target soon, the given circuit is *pruned*: split into chunks by gradient, each of
       which is taken away in a run of its own; those that can go go together, as many as can. Gradients are taken again
       on what is left.
    3. Single edges are *swept* until none of them can go alone.
    4. Until the budget is spent, some edges at random are taken out and others grow in their place (ruin and
       recreate); a circuit of the same size or less, now and then of one edge more, takes the place of the old one.

    What was run once is remembered and costs nothing again.

    Edges are never dropped because they look dead: queries and keys are no edges of the token graph, so that an edge
    whose target cannot reach the output can matter all the same.

    Args:
        model: The model, or a name for `load_model`.
        prompt: The prompt, or on the component graph the task.
        circuit_or_ranking: Where to start: a circuit, or a ranking, whose first circuit that is faithful enough it is.
        faithfulness: What the circuit has to reach, in (0, 1].
        budget: Runs that may be spent, in plain forward passes over the prompt or all of the task's examples; a run
            with gradients counts 3. It is never exceeded.
        seed: For whatever is drawn at random. The same seed gives the same circuit.
        metric: What faithfulness means, see `td.density`; by default as the circuit says, or the ranking's scores.
        ablation: What replaces an absent edge; by default as for the circuit or the ranking.
        keep_residual: Keep all skip connections without counting them; by default as the circuit says, else no.
        attention: As for `td.evaluate`.
        position: Which prediction of the prompt is explained.
        batch_size: Circuits per forward pass.

    Returns:
        The smallest circuit found, measured, with `Circuit.certificate`. If nothing smaller was found it is the start,
        or all edges if the start is not faithful enough. Interrupted (Ctrl-C), the best so far, with a warning.

    Raises:
        ValueError: If an argument is not as described, or a value inside the model is not finite.

    References:
        Chunked removal: delta debugging (Zeller, Hildebrandt 2002). Gradients of shares of edges: attribution patching
        (arXiv 2310.10348), and Edge Pruning (2406.16778), which learns such shares.
    """
    if not isinstance(circuit_or_ranking, Circuit | Ranking):
        raise ValueError(
            f"`circuit_or_ranking` must be a circuit or a ranking, got {type(circuit_or_ranking).__name__}."
        )
    given, graph = circuit_or_ranking, circuit_or_ranking.graph
    require_options(graph, attention, keep_residual, batch_size)
    about = given if isinstance(given, Circuit) else given.circuit(0)
    transformer = as_transformer(model)
    ablation = about.ablation if ablation is None else ablation
    keeps = about.keep_residual if keep_residual is None else keep_residual
    setting = setting_for(transformer, graph, prompt, ablation, position, about.provenance.seed)
    conditions = Conditions(False, keeps, attention or about.attention, setting.ablation)
    gauge = Gauge.of(setting, graph, about.metric if metric is None else metric)
    found = refined([Ground(graph, conditions, gauge, batch_size)], given, faithfulness, budget=budget, seed=seed)
    if was_interrupted(found) and (known := found.certificate) is not None:
        alert(
            f"interrupted after {known.passes} of {known.budget} passes: this is the best circuit so far, of "
            f"{known.n_candidates} edges."
        )
    return found


def refined(
    grounds: Sequence[Ground],
    start: Circuit | Ranking,
    faithfulness: float,
    *,
    budget: SupportsIndex,
    seed: SupportsIndex,
    below: Circuit | None = None,
    left_out: float = 0.0,
) -> Circuit:
    """`refine` on several grounds, on all of which the circuit has to be faithful.

    Args:
        grounds: Where circuits are tried. What the circuit says of itself is about the first.
        start: Where to start.
        faithfulness: What the circuit has to reach everywhere.
        budget: Runs that may be spent; each ground counts.
        seed: For whatever is drawn at random.
        below: A circuit that is less faithful, from which to grow one that is enough, in place of from nothing.
        left_out: Share of edges, drawn at random, that are not to be used for that.

    Returns:
        The circuit; of a search that was interrupted (which its certificate says), the best so far.
    """
    budget, seed = whole(budget, "budget"), whole(seed, "seed")
    if isinstance(faithfulness, bool) or not isinstance(faithfulness, float | int) or not 0 < faithfulness <= 1:
        raise ValueError(f"`faithfulness` must be above 0 and at most 1, got {faithfulness!r}.")
    first, once = grounds[0], sum(ground.price for ground in grounds)
    if budget < 2 * once:
        raise ValueError(f"`budget` must be at least {2 * once} passes, to measure two circuits, got {budget}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be from 0 to 2**63 - 1, got {seed}.")
    # something is left over for the last run, in which the circuit is measured by itself, as others will measure it
    search = Search(grounds, float(faithfulness), budget - once, seed)
    interrupted = False
    try:
        search.go(start, below, left_out)
    except KeyboardInterrupt:
        interrupted = True
    made = start.provenance  # the prompt, and even the model, may be others than those of the start
    measured = float(first.tried(search.best[None]).faithfulness)
    several = len(grounds) > 1
    worst = min([measured, *(float(ground.tried(search.best[None]).faithfulness) for ground in grounds[1:])])
    certificate = Certificate(
        float(faithfulness), budget, search.passes + once, seed, search.start_size, search.size(search.best),
        unflatten(first.graph, search.needed, False), search.minimum, interrupted,
        tuple(ground.name for ground in grounds) if several else (), worst if several else None,
    )  # fmt: skip
    return Circuit(
        first.graph,
        unflatten(first.graph, search.best, False),
        Provenance.of(first.setting, made.method, made.seed, made.metric),
        ablation=first.conditions.ablation,
        keep_residual=first.conditions.keep_residual,
        attention=first.conditions.attention,
        metric=first.gauge.metric,
        faithfulness=measured,
        certificate=certificate,
    )


def was_interrupted(circuit: Circuit) -> bool:
    """Whether the search that found it was cut short by Ctrl-C."""
    return circuit.certificate is not None and circuit.certificate.interrupted


def whole(value: SupportsIndex, name: str) -> int:
    """A whole number.

    Raises:
        ValueError: If it is none.
    """
    try:
        return index(value)
    except TypeError as error:
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.") from error

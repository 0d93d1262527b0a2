"""Metrics: how close the prediction of a circuit is to the model's."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Each metric compares the predictions of circuits with those of the model, whose axes may be fewer or of length 1.
Full = Float[Tensor, "*#batch d_vocab"]
Logits = Float[Tensor, "*#batch d_vocab"]

NUCLEI = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
"""Masses of the nuclei that `nucleus_recovery` compares."""


@dataclass(eq=False)
class Comparison:
    """A metric, called with the model's logits and the circuits'.

    Attributes:
        known: What it has to know of the model's logits, each a tensor of the same batch: the same for all circuits.
        measured: The metric of the circuits' logits, given this.
    """

    known: Callable[[Tensor], tuple[Tensor, ...]]
    measured: Callable[..., Tensor]

    def __call__(self, full: Full, circuit: Logits) -> Float[Tensor, "..."]:
        return self.measured(circuit, *self.known(full))


def _given(known: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Callable[..., Tensor]], Comparison]:
    def compared(measured: Callable[..., Tensor]) -> Comparison:
        comparison = Comparison(known, measured)
        comparison.__doc__ = measured.__doc__
        return comparison

    return compared


def _probabilities(full: Full) -> tuple[Full]:
    return (full.softmax(-1),)


@_given(_probabilities)
def total_variation(circuit: Logits, p: Full) -> Float[Tensor, "..."]:
    """Half the L1 distance of the two distributions: 0 if equal, 1 if disjoint."""
    return (p - circuit.softmax(-1)).abs().sum(-1) / 2


@_given(lambda full: (full.log_softmax(-1),))
def kl_divergence(circuit: Logits, full_log: Full) -> Float[Tensor, "..."]:
    """KL(full || circuit) in nats."""
    return (full_log.exp() * (full_log - circuit.log_softmax(-1))).sum(-1).clamp(min=0.0)


@_given(_probabilities)
def jensen_shannon(circuit: Logits, p: Full) -> Float[Tensor, "..."]:
    """Jensen-Shannon divergence in nats, at most ln 2."""
    q = circuit.softmax(-1)
    middle = (p + q) / 2
    half = torch.special.entr(middle).sum(-1)
    return (half - (torch.special.entr(p).sum(-1) + torch.special.entr(q).sum(-1)) / 2).clamp(min=0.0)


@_given(lambda full: (full.argmax(-1),))
def same_top1(circuit: Logits, top: Int[Tensor, "*#batch"]) -> Float[Tensor, "..."]:
    """1 where the most probable token is the model's, else 0."""
    return (circuit.argmax(-1) == top).to(circuit.dtype)


def _nuclei(logits: Logits) -> tuple[Int[Tensor, "... d_vocab"], Int[Tensor, "... nucleus"]]:
    """Tokens by falling probability, and the length of each nucleus."""
    probability, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    return order, _lengths(probability.cumsum(-1))


@_given(_nuclei)
def nucleus_recovery(
    circuit: Logits, order: Int[Tensor, "*#batch d_vocab"], length: Int[Tensor, "*#batch nucleus"]
) -> Float[Tensor, "..."]:
    """The largest of the masses in `NUCLEI` whose nucleus is the same list of tokens in the same order; 0 if none.

    The nucleus of mass c is the shortest prefix of the tokens, most probable first, that holds at least
    c. Each is cut on its own distribution. Not monotone in the circuit's size by construction.
    """
    shape = torch.broadcast_shapes(order.shape, circuit.shape)
    order, length, circuit = order.expand(shape), length.expand(*shape[:-1], -1), circuit.expand(shape)
    # what has another token on top recovers nothing: most small circuits
    some = (circuit.gather(-1, order[..., :1]) >= circuit.amax(-1, keepdim=True))[..., 0]
    found = circuit.new_zeros(shape[:-1])
    if some.any():
        found[some] = _recovered(order[some], length[some], circuit[some]).to(found.dtype)
    return found


def _recovered(
    order: Int[Tensor, "circuit d_vocab"],
    length: Int[Tensor, "circuit nucleus"],
    logits: Float[Tensor, "circuit d_vocab"],
) -> Float[Tensor, " circuit"]:
    """`nucleus_recovery`, given the model's order and the lengths of its nuclei.

    Takes the circuits' probabilities in the model's order: their own order is the same as far as each is the largest of
    those that are left. Sorting them all would take several times as long.
    """
    d_vocab, n_told = logits.shape[-1], int(length.max())
    probability = logits.double().softmax(-1).gather(-1, order)
    beyond = probability.new_full((len(logits), 1), -1.0)  # the largest behind the longest nucleus
    if n_told < d_vocab:
        beyond = probability[:, n_told:].amax(-1, keepdim=True)
    probability = torch.cat([probability[:, :n_told], beyond], dim=-1)
    left = probability.flip(-1).cummax(-1).values.flip(-1)[:, 1:]
    agree = (probability[:, :-1] > left).long().cumprod(-1).sum(-1, keepdim=True)  # length of the common prefix
    circuit_length = torch.searchsorted(probability[:, :-1].cumsum(-1), _cuts(probability)).clamp(max=d_vocab - 1) + 1
    # where the prefix ends between two that are equal, the one with the lower number comes first
    tie = torch.nn.functional.pad(probability[:, :-1] == left, (0, 1)).gather(-1, agree)
    if tie.any():
        circuit_order, circuit_length = _nuclei(logits)
        agree = (circuit_order == order).long().cumprod(-1).sum(-1, keepdim=True)
    same = (circuit_length == length) & (length <= agree)
    masses = torch.tensor([0.0, *NUCLEI], dtype=torch.float64, device=logits.device)
    return masses[(same * torch.arange(1, len(NUCLEI) + 1, device=logits.device)).amax(-1)]


@_given(_nuclei)
def nucleus_size(
    circuit: Logits, order: Int[Tensor, "*#batch d_vocab"], length: Int[Tensor, "*#batch nucleus"]
) -> Float[Tensor, "..."]:
    """Number of tokens in the largest nucleus that is recovered; 0 if none."""
    recovered = nucleus_recovery.measured(circuit, order, length)
    masses = torch.tensor(NUCLEI, dtype=circuit.dtype, device=circuit.device)
    which = (recovered[..., None] == masses).long().argmax(-1, keepdim=True)
    found = length.expand(*recovered.shape, -1).gather(-1, which)[..., 0]
    return torch.where(recovered > 0, found, 0).to(circuit.dtype)


def _lengths(mass: Float[Tensor, "... d_vocab"]) -> Int[Tensor, "... nucleus"]:
    """Length of each nucleus, from the mass of all prefixes."""
    return torch.searchsorted(mass.contiguous(), _cuts(mass)).clamp(max=mass.shape[-1] - 1) + 1


def _cuts(mass: Float[Tensor, "... some"]) -> Float[Tensor, "... nucleus"]:
    return torch.tensor(NUCLEI, dtype=mass.dtype, device=mass.device).expand(*mass.shape[:-1], -1).contiguous()


def entropy(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
    """Entropy of the prediction in nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


METRICS: dict[str, Comparison] = {
    "tv": total_variation,
    "kl": kl_divergence,
    "js": jensen_shannon,
    "top1": same_top1,
    "nucleus": nucleus_recovery,
    "nucleus_size": nucleus_size,
    "entropy": Comparison(lambda full: (), entropy),
}

CONVERSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tv": lambda value: 1 - value,
    "js": lambda value: 1 - value / math.log(2),
    "kl": lambda value: (-value).exp(),
    "top1": lambda value: value,
    "nucleus": lambda value: value / NUCLEI[-1],
}
"""How a metric becomes a share between 0 and 1 of the model's prediction that is kept."""


def faithfulness(metric: str, values: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """A metric's values as shares of the model's prediction that are kept, 1 being all.

    ``1 - TV``; ``1 - JS / ln 2``; ``exp(-KL)``; top-1 agreement as it is; nucleus recovery over the
    largest mass that is looked at, 0.99.

    Raises:
        ValueError: If the metric is no measure of faithfulness.
    """
    if metric not in CONVERSIONS:
        raise ValueError(f"`metric` must be one of {list(CONVERSIONS)}, got {metric!r}.")
    return CONVERSIONS[metric](values)

"""Pooling: circuits that several curves want measured are run in the same batches."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tracedensity.extract import Ranking
from tracedensity.gauge import measured_together
from tracedensity.graph import Rows
from tracedensity.graph.token import TokenGraph
from tracedensity.ground import Ground
from tracedensity.model import require_finite
from tracedensity.run import Conditions, beside, flushed_denormals, in_order, run_family, slices, without
from tracedensity.setting import rows_at_once

T = TypeVar("T")

FAILURES = (ValueError, RuntimeError, MemoryError)
"""What a prompt may fail with, by itself; PyTorch has no other name for a CPU's memory that is full."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Circuits of one ranking that are to be measured.

    Attributes:
        ground: Where they are run.
        ranking: What they are circuits of.
        sizes: Numbers of edges.
        conditions: How they are run.
    """

    ground: Ground
    ranking: Ranking
    sizes: Int[Tensor, " point"]
    conditions: Conditions

    def answer(self) -> "Answer":
        """What the gauge measures, each circuit on each example."""
        ground = self.ground
        found = run_family(
            ground.setting, ground.graph, self.ranking.rank, self.sizes, self.conditions, ground.gauge.measure,
            ground.batch_size,
        )  # fmt: skip
        return {name: values.cpu() for name, values in found.items()}

    @property
    def graph(self) -> TokenGraph | None:
        """The graph, where runs on prompts of any length can be rows of one batch; None where they cannot."""
        graph, setting = self.ground.graph, self.ground.setting
        alone = self.ground.batch_size is not None or setting.ablation != "zero" or len(setting.prompts) > 1
        return graph if isinstance(graph, TokenGraph) and not alone else None


Answer: TypeAlias = Mapping[str, Float[Tensor, "point example"]]
"""Metrics of circuits on examples, that of faithfulness under the name ""."""

Asking: TypeAlias = Generator[Asked, Answer, T]
"""What asks for circuits one time after another, and then has a result."""


def alone(asking: Asking[T]) -> T:
    """The result of one that asks."""
    reply = None
    while True:
        try:
            asked = next(asking) if reply is None else asking.send(reply)
        except StopIteration as end:
            return end.value
        reply = asked.answer()


def together(askings: Iterable[Asking[T]], n_rows: int) -> Iterator[T]:
    """The results of many that ask, in their order.

    Some of them are at work at a time: as soon as one is done, another begins. What these ask for at the same time is
    run together, so that a batch is full also where each of them wants only a few circuits.

    Args:
        askings: What asks.
        n_rows: So many rows of a batch are wanted at a time.
    """
    waiting = enumerate(askings)
    active: dict[int, tuple[Asking[T], Asked]] = {}
    done: dict[int, T] = {}
    turn, exhausted = 0, False
    while True:
        while not exhausted and sum(len(asked.sizes) for _, asked in active.values()) < n_rows:
            number, asking = next(waiting, (-1, None))
            if asking is None:
                exhausted = True
            else:
                _advance(number, asking, None, active, done)
        while turn in done:
            yield done.pop(turn)
            turn += 1
        if not active:
            return
        for (number, (asking, _)), reply in zip([*active.items()], _answers([*active.values()]), strict=True):
            _advance(number, asking, reply, active, done)


def _advance(
    number: int,
    asking: Asking[T],
    reply: Answer | Exception | None,
    active: dict[int, tuple[Asking[T], Asked]],
    done: dict[int, T],
) -> None:
    active.pop(number, None)
    try:
        if reply is None:
            asked = next(asking)
        else:
            asked = asking.throw(reply) if isinstance(reply, Exception) else asking.send(reply)
        active[number] = asking, asked
    except StopIteration as end:
        done[number] = end.value


def _answers(active: Sequence[tuple[object, Asked]]) -> list[Answer | Exception]:
    """What each asks for, or why it is not to be had."""
    answers: dict[int, Answer | Exception] = {}
    pools: dict[object, list[int]] = {}
    for number, (_, asked) in enumerate(active):
        graph = asked.graph
        # whether a circuit is a complement, or keeps skip connections, may differ from row to row
        model, metrics = id(asked.ground.setting.model), asked.ground.gauge.measure.metrics
        measured = tuple((name, each if isinstance(each, str) else id(each)) for name, each in metrics.items())
        key = number if graph is None else (model, measured, asked.conditions.attention, replace(graph, n_pos=1))
        pools.setdefault(key, []).append(number)
    for numbers in pools.values():
        some = [active[number][1] for number in numbers]
        try:
            replies = _pooled(some) if some[0].graph is not None and len(some) > 1 else [some[0].answer()]
            answers |= dict(zip(numbers, replies, strict=True))
        except FAILURES:  # a value that is not finite, or too long a prompt: of which?
            answers |= {number: _answer(asked) for number, asked in zip(numbers, some, strict=True)}
    return [answers[number] for number in range(len(active))]


def _answer(asked: Asked) -> Answer | Exception:
    try:
        return asked.answer()
    except FAILURES as error:
        return error


def _pooled(asked: Sequence[Asked]) -> list[Answer]:
    """Circuits of the same model on prompts of their own, as rows of the same batches.

    Prompts of similar length go together; the shorter ones of a batch are padded behind, where nothing reaches their
    predictions.
    """
    by_length = sorted(range(len(asked)), key=lambda number: len(_prompt(asked[number])))
    owner = torch.cat([torch.full((len(asked[number].sizes),), number) for number in by_length])
    size = torch.cat([asked[number].sizes for number in by_length])
    model, longest = asked[0].ground.setting.model, len(_prompt(asked[by_length[-1]]))
    measured: dict[str, list[Tensor]] = {}
    with flushed_denormals():
        for part in slices(len(owner), rows_at_once(model, longest)):
            for name, values in _run(asked, owner[part], size[part]).items():
                measured.setdefault(name, []).append(values.cpu())
    rows = {name: torch.cat(parts)[:, None] for name, parts in measured.items()}
    return [{name: values[owner == number] for name, values in rows.items()} for number in range(len(asked))]


def _run(
    asked: Sequence[Asked], owner: Int[Tensor, " row"], size: Int[Tensor, " row"]
) -> dict[str, Float[Tensor, " row"]]:
    """What is measured of circuits, each on the prompt of its owner."""
    owners, local = owner.unique(return_inverse=True)
    some = [asked[number] for number in owners.tolist()]
    model, conditions, graph = some[0].ground.setting.model, [each.conditions for each in some], some[0].graph
    assert graph is not None
    prompts = [_prompt(each) for each in some]
    n_pos, device = max(map(len, prompts)), model.device
    graph, local = replace(graph, n_pos=n_pos), local.to(device)
    tokens = torch.stack([pad(prompt, (0, n_pos - len(prompt))) for prompt in prompts])[local]
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)[local]
    rank = {kind: _side_by_side(some, kind, n_pos).to(device) for kind in graph.shapes}

    def of_rows(flags: list[bool]) -> Bool[Tensor, " row"] | bool:
        return torch.tensor(flags, device=device)[local] if len({*flags}) > 1 else flags[0]

    inverse = of_rows([each.inverse for each in conditions])
    keeps_all = {kind: of_rows([each.keeps_all(kind) for each in conditions]) for kind in graph.shapes}

    def dropped(kind: str, where: int) -> Tensor | None:
        if (keeps := keeps_all[kind]) is True:
            return None
        absent = without(rank[kind][:, where][local], size.to(device), inverse)
        return absent if keeps is False else absent & ~beside(keeps, absent)

    logits = model.logits(tokens, graph.edits(dropped, Rows(model, len(local), last[:1], {})), last=last)
    require_finite(logits, "the logits of circuits")
    return measured_together([each.ground.gauge.measure for each in some], local, logits)


def _prompt(asked: Asked) -> Int[Tensor, " pos"]:
    return asked.ground.setting.prompts.tokens[0]


def _side_by_side(asked: Sequence[Asked], kind: str, n_pos: int) -> Int[Tensor, "prompt ..."]:
    """Ranks of prompts of several lengths, of which the shorter ones have no edges behind their end."""
    axes = (2, 3) if kind == "head" else (1,)

    def widened(rank: Tensor) -> Tensor:
        missing = [n_pos - rank.shape[axis] if axis in axes else 0 for axis in range(rank.dim())]
        return pad(rank, [side for each in reversed(missing) for side in (0, each)], value=-1)

    return torch.stack([in_order(widened(each.ranking.rank[kind]), each.conditions) for each in asked])

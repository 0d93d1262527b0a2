"""The search for small circuits, within a budget of runs."""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracedensity.extract import Ranking
from tracedensity.graph import flatten
from tracedensity.graph.circuit import Circuit
from tracedensity.ground import Ground, Mask, Trial

GRADIENT_PASSES = 3
"""What a run with gradients counts in plain forward passes: the backward pass takes about two of them."""

_ROUNDING = 1e-6
"""Faithfulness of the whole graph is 1 up to this."""

# How a search goes about it. `python -m benchmarks.tightness` prints what comes of it.
_OFFERED = 6  # edges that are tried one by one when a circuit grows
_MERGED = 5  # at most so many of them enter together
_RESTING = 6  # rounds for which an edge that has just been flipped is not flipped back
_CHUNKS = 16  # parts that are taken away one by one when a circuit is pruned
_TOGETHER = 16  # edges that are taken away one by one in a run when single edges are tried
_GROWTH = 0.25, 500  # share of the budget for growing a circuit from nothing, and most passes for it
_RENEWALS = 0.9  # share of attempts at something smaller that ruin and recreate; the others exchange single edges
_DETOUR = 0.5  # share of renewals that may end with one edge more than the best circuit
_SWAPS = 64  # pairs of edges of which one is swapped for the other in a run
_PATIENCE = 4  # swaps without improvement after which exchanging edges is given up
_EXCHANGE = 400  # most passes for one attempt at it
_SMALL = 64  # edges of a graph on which it may be of use to run all circuits of few edges
_TINY = 24  # edges of a graph on which walks find more than renewals
_AT_ONCE = 2**12
_RESERVE = 0.2  # share of the budget that may be kept for trying single edges in the end


class SpentError(Exception):
    """The budget is spent."""


class Search:
    """A search for a small circuit: what it has spent, and the best that it has found.

    Circuits are masks of edges in canonical order; edges that the conditions keep anyhow are in none of them.

    Attributes:
        passes: What has been spent, in plain forward passes.
        reserve: Of what is left, what is kept for trying single edges in the end.
        best: The smallest circuit that reached the target, the first of equals.
        needed: Edges of it without which it was run and fell short.
        start_size: Its size at the start.
        n_run_out: All circuits of fewer edges than this were run.
    """

    def __init__(self, grounds: Sequence[Ground], target: float, budget: int, seed: int) -> None:
        self.grounds, self.graph, self.budget = grounds, grounds[0].graph, budget
        self.target = min(target, 1 - _ROUNDING)
        self.generator = torch.Generator().manual_seed(seed)
        self.price = sum(ground.price for ground in grounds)
        self.free, self.skips = grounds[0].free, grounds[0].skips
        self.passes = self.reserve = 0
        self.best = self.free.clone()
        self.needed = torch.zeros_like(self.free)
        self.start_size = self.size(self.best)
        self.n_run_out = 0
        self._known: dict[bytes, tuple[float, float]] = {}  # faithfulness and loss of all that was run

    # -- runs --------------------------------------------------------------------------------------

    @property
    def left(self) -> int:
        return self.budget - self.passes - self.reserve

    @property
    def minimum(self) -> bool:
        """Whether all circuits smaller than the best were run."""
        return self.n_run_out >= self.size(self.best)

    def size(self, kept: Mask) -> int:
        return int(kept.sum())

    def tried(self, kept: Bool[Tensor, "circuit edge"]) -> Trial:
        """Run circuits that were not run before; the best is remembered.

        Raises:
            SpentError: If not all of them could be run. Those that could have been.
        """
        keys = [hashlib.blake2b(row, digest_size=16).digest() for row in np.packbits(kept.numpy(), axis=1)]
        new: dict[bytes, int] = {}
        for number, key in enumerate(keys):
            if key not in self._known:
                new.setdefault(key, number)
        affordable = [*new.values()][: max(0, self.left // self.price)]
        if affordable:
            self._known |= self._run(kept[affordable], [keys[number] for number in affordable])
        known = [number for number, key in enumerate(keys) if key in self._known]
        values = torch.tensor([self._known[keys[number]] for number in known], dtype=torch.float64).view(-1, 2)
        trial = Trial(values[:, 0], values[:, 1])
        self._remember(kept[known], trial)
        if len(known) < len(keys):
            raise SpentError
        return trial

    def _run(self, kept: Bool[Tensor, "circuit edge"], keys: Sequence[bytes]) -> dict[bytes, tuple[float, float]]:
        """Faithfulness and loss of each circuit."""
        self.passes += len(kept) * self.price
        trial = self.grounds[0].tried(kept)
        for ground in self.grounds[1:]:
            trial = trial.and_also(ground.tried(kept))
        return dict(zip(keys, zip(trial.faithfulness.tolist(), trial.loss.tolist(), strict=True), strict=True))

    def _remember(self, kept: Bool[Tensor, "circuit edge"], trial: Trial) -> None:
        faithful = self.faithful(trial)
        fell_short = kept[~faithful]
        gone = self.best & ~fell_short
        self.needed |= gone[(gone.sum(1) == 1) & ~(fell_short & ~self.best).any(1)].any(0)
        enough = faithful.nonzero()[:, 0]
        if not len(enough):
            return
        found = kept[enough[kept[enough].sum(1).argmin()]]
        if self.size(found) < self.size(self.best):
            self.best, self.needed = found.clone(), torch.zeros_like(self.free)
            sweep = self.price * (self.size(found) * 5 // 4 + GRADIENT_PASSES)
            self.reserve = sweep if sweep <= _RESERVE * self.budget else 0

    def faithful(self, trial: Trial) -> Bool[Tensor, " circuit"]:
        return trial.faithfulness >= self.target

    def slopes(self, kept: Mask) -> Float[Tensor, " edge"]:
        """Gradient of the loss by what is kept of each edge; adding an edge of negative slope helps, to first order."""
        if self.left < GRADIENT_PASSES * self.price:
            raise SpentError
        self.passes += GRADIENT_PASSES * self.price
        total = self.grounds[0].slopes(kept)
        for ground in self.grounds[1:]:
            total = total + ground.slopes(kept)
        return total

    def fed(self, core: Bool[Tensor, "*circuit edge"]) -> Bool[Tensor, "*circuit edge"]:
        """Circuits with the skip connections that their heads and MLPs need."""
        return self.graph.fed(core) & self.free

    # -- the search --------------------------------------------------------------------------------

    def go(self, start: Circuit | Ranking, below: Circuit | None, left_out: float) -> None:
        """Search until the budget is spent or all smaller circuits were run."""
        with suppress(SpentError):
            self._look(start, below, left_out)
        self.reserve = 0
        if self.minimum:
            self.needed = self.best.clone()
        elif not torch.equal(self.needed, self.best):
            with suppress(SpentError):
                self.swept(self.best)

    def _look(self, start: Circuit | Ranking, below: Circuit | None, left_out: float) -> None:
        begin = self._begin(start)
        if begin is None and below is None and isinstance(start, Circuit):
            below = start
        core = torch.zeros_like(self.free) if below is None else flatten(self.graph, below.kept) & self.free
        share, most = _GROWTH
        resting = None
        if left_out:
            resting = (torch.rand(len(core), generator=self.generator) < left_out).nonzero()[:, 0]
        found = self.grown(core & ~self.skips, min(share * self.budget, most), fed=True, resting=resting)
        if found is not None:
            found, _ = self.swept(found)
        if found is None or self.left // 4 >= most:
            self.pruned(self.free if begin is None else begin, math.inf if found is None else self.left // 4)
        found, losses = self.swept(self.best)
        while not self.minimum:
            if self.size(self.free) <= _SMALL:
                self.exhausted()
            if self.size(self.free) <= _TINY and self._draw() < 0.9:
                before = self.passes
                self.wandered()
                if self.passes > before:
                    continue  # it met something new
            if self.size(found) > self.size(self.best) + 1:
                found, losses = self.swept(self.best)
            improve = self.renewed if self._draw() < _RENEWALS else self.exchanged
            found, losses = improve(found, losses)

    def _begin(self, start: Circuit | Ranking) -> Mask | None:
        """The given circuit, or the first of the ranking that is faithful enough; None if none is."""
        if isinstance(start, Circuit):
            begin = flatten(self.graph, start.kept) & self.free
            begin = begin if bool(self.faithful(self.tried(begin[None]))) else None
        else:
            order = flatten(self.graph, start.rank).argsort()
            begin = self.shortest(order[self.free[order]])
        if begin is not None:
            self.start_size = self.size(begin)
        return begin

    def shortest(self, order: Int[Tensor, " free"]) -> Mask | None:
        """A circuit with as few as possible of the edges first in an order: three rounds of brackets."""
        low, high = 0, len(order)
        found = None
        for _ in range(3):
            ratio = math.log(max(high, 1) / max(low, 1))
            sizes = {round(max(low, 1) * math.exp(ratio * part / 9)) for part in range(1, 9)} - {low, high}
            if not sizes:
                break
            some = sorted(sizes)
            kept = torch.zeros(len(some), len(self.free), dtype=torch.bool)
            for number, size in enumerate(some):
                kept[number, order[:size]] = True
            enough = self.faithful(self.tried(kept)).nonzero()[:, 0].tolist()
            if enough:
                found, high = kept[enough[0]], some[enough[0]]
                low = some[enough[0] - 1] if enough[0] else low
            else:
                low = some[-1]
        return found

    def grown(
        self,
        core: Mask,
        allowance: float | int,
        *,
        fed: bool,
        most: int | None = None,
        resting: Int[Tensor, " resting"] | None = None,
    ) -> Mask | None:
        """Let a circuit grow until it is faithful enough.

        Args:
            core: Where to start.
            allowance: Passes that may be spent on it.
            fed: Whether heads and MLPs come with the skip connections that feed them. Gradients are then taken with all
                skip connections, since nothing can be promised by what has nothing to read.
            most: Give up beyond this size.
            resting: Edges that are not to be used.

        Returns:
            The circuit; None if it is not to be had.
        """

        def whole(core: Bool[Tensor, "*circuit edge"]) -> Bool[Tensor, "*circuit edge"]:
            return self.fed(core) if fed else core

        usable = self.free & ~self.skips if fed else self.free.clone()
        if resting is not None:
            usable[resting] = False
        flipped_until = torch.zeros(len(core), dtype=torch.long)
        start, turn, wider = self.passes, 0, False
        trial = self.tried(whole(core)[None])
        if self.faithful(trial).any():
            return whole(core)
        loss = float(trial.loss)
        while self.passes - start < allowance and (most is None or self.size(whole(core)) <= most):
            turn += 1
            slopes = self.slopes(core | self.skips if fed else core)
            rested = flipped_until < turn
            absent = (~core & usable & rested).nonzero()[:, 0]
            offered = absent[slopes[absent].argsort()[: _OFFERED * (4 if wider else 1)]]
            present = (core & usable & rested).nonzero()[:, 0]
            harmful = present[slopes[present].argsort(descending=True)[: 2 if len(present) > 3 else 0]]
            units = torch.cat([offered, harmful])
            if not len(units):
                return None
            flips = [*units.split(1), offered[:2], offered[:4]]
            singles = self._flipped(core, flips, whole, loss)
            good = singles.gain[: len(units)].argsort(descending=True)[:_MERGED]
            good = good[singles.improvement[: len(units)][good] > 1e-4]
            found = singles
            if len(good) > 1:
                merges = [units[good[:count]] for count in range(2, len(good) + 1)]
                found = singles.and_also(self._flipped(core, merges, whole, loss))
            if found.enough.any():
                return whole(found.cores[found.smallest_enough])
            best = int(found.gain.argmax())
            if found.improvement[best] <= 1e-3 and not wider:
                wider = True
                continue
            wider = False
            flipped_until[found.cores[best] ^ core] = turn + _RESTING
            core, loss = found.cores[best], float(found.losses[best])
        return None

    def _flipped(
        self, core: Mask, flips: Sequence[Int[Tensor, " _"]], whole: Callable[[Tensor], Tensor], loss: float
    ) -> "_Flipped":
        """Circuits in which some edges are flipped, run."""
        cores = core.repeat(len(flips), 1)
        for number, edges in enumerate(flips):
            cores[number, edges] = ~cores[number, edges]
        circuits = whole(cores)
        trial = self.tried(circuits)
        grown = (circuits.sum(1) - whole(core).sum()).double()
        return _Flipped(cores, trial.loss, loss - trial.loss, grown, self.faithful(trial))

    def pruned(self, circuit: Mask, allowance: float | int) -> Mask:
        """Take away chunks of heads and MLPs, with the skip connections that only they needed.

        Where the circuit with just the skip connections that feed it is not faithful, skip connections are edges like
        any others.

        Args:
            circuit: A circuit that is faithful enough.
            allowance: Passes that may be spent on it.
        """
        start = self.passes
        by_core = bool(self.faithful(self.tried(self.fed(circuit & ~self.skips)[None])))
        chosen = circuit & ~self.skips if by_core else circuit

        def whole(core: Bool[Tensor, "*circuit edge"]) -> Bool[Tensor, "*circuit edge"]:
            return self.fed(core) if by_core else core

        finer = 1.0
        while self.size(chosen) > _CHUNKS and self.passes - start < allowance:
            edges = chosen.nonzero()[:, 0]
            edges = edges[self.slopes(whole(chosen))[edges].argsort(descending=True)]
            length = max(1, int(len(edges) * finer / _CHUNKS))
            fewer = self._without(chosen, list(edges.split(length))[:_CHUNKS], whole)
            if fewer is not None:
                chosen = fewer
            elif length == 1:
                break
            else:
                finer /= 2
        return whole(chosen)

    def swept(self, circuit: Mask) -> tuple[Mask, Float[Tensor, " edge"]]:
        """Take away single edges until none can go alone.

        Returns:
            The circuit, and the loss of the circuit without each of its edges.
        """
        while True:
            losses = torch.zeros(len(circuit), dtype=torch.float64)
            edges = circuit.nonzero()[:, 0]
            if not len(edges):
                return circuit, losses
            edges = edges[self.slopes(circuit)[edges].argsort(descending=True)]
            before = self.size(circuit)
            for some in edges.split(_TOGETHER):
                some = some[circuit[some]]
                if not len(some):
                    continue
                fewer = self._without(circuit, list(some.split(1)), lambda core: core, losses)
                circuit = circuit if fewer is None else fewer
            if self.size(circuit) == before:
                return circuit, losses

    def _without(
        self,
        chosen: Mask,
        chunks: Sequence[Int[Tensor, " _"]],
        whole: Callable[[Tensor], Tensor],
        losses: Float[Tensor, " edge"] | None = None,
    ) -> Mask | None:
        """Take away each chunk by itself, then those that can go together, the least missed first; None if none can.

        Args:
            chosen: The circuit.
            chunks: Its parts.
            whole: What is run for such a choice of edges.
            losses: Where the loss without each chunk is written.
        """
        cores = chosen.repeat(len(chunks), 1)
        for number, chunk in enumerate(chunks):
            cores[number, chunk] = False
        trial = self.tried(whole(cores))
        can_go = self.faithful(trial)
        if losses is not None:
            for number, chunk in enumerate(chunks):
                losses[chunk] = trial.loss[number]
        least_missed = [number for number in trial.loss.argsort().tolist() if can_go[number]]
        if len(least_missed) < 2:
            return cores[least_missed[0]] if least_missed else None
        together = torch.stack([cores[least_missed[:count]].all(0) for count in range(2, len(least_missed) + 1)])
        enough = self.faithful(self.tried(whole(together))).nonzero()[:, 0]
        return together[int(enough[-1])] if len(enough) else cores[least_missed[0]]

    def renewed(self, circuit: Mask, losses: Float[Tensor, " edge"]) -> tuple[Mask, Float[Tensor, " edge"]]:
        """Take some edges out, those that are missed less more often, and let others grow in their place.

        Returns:
            A circuit of the same size or smaller, now and then of one edge more than the best (a way out of a dead
            end), and its losses; or the given ones.
        """
        limit = max(self.size(circuit), self.size(self.best) + (self._draw() < _DETOUR))
        fed = bool(self.skips.any()) and self._draw() < 0.5
        core = circuit & ~self.skips if fed else circuit
        edges = core.nonzero()[:, 0]
        if not len(edges):
            return circuit, losses
        edges = edges[losses[edges].argsort()]
        most = max(2, min(len(edges), round(len(edges) / 3)))
        count = min(len(edges), (1 if fed else 2) + int(self._draw() * (most - 1)))
        chances = torch.exp(-torch.arange(len(edges)) / (0.6 * len(edges) + 1))
        out = edges[chances.multinomial(count, generator=self.generator)]
        ruin = core.clone()
        ruin[out] = False
        resting = out if self._draw() < 0.5 else None
        # skip connections that were swept away come back with what they feed, to be swept away again
        room = limit + (2 if fed else -1)
        found = self.grown(ruin, 90, fed=fed, most=room, resting=resting)
        if found is None or self.size(found) > room + 1:
            return circuit, losses
        found, found_losses = self.swept(found)
        return (found, found_losses) if self.size(found) <= limit else (circuit, losses)

    def exchanged(self, circuit: Mask, losses: Float[Tensor, " edge"]) -> tuple[Mask, Float[Tensor, " edge"]]:
        """Look for a circuit of one edge less: swap edges for others, the best swap first, until it is faithful.

        A swap is made even if it is for the worse; what was swapped rests for a while.

        Returns:
            The circuit and its losses; or the given ones.
        """
        state = circuit.clone()
        edges = state.nonzero()[:, 0]
        edges = edges[losses[edges].argsort()]
        # mostly one edge less; now and then several, since there may be faithful circuits of fewer but not of those
        count = 1 + int((len(edges) - 1) * self._draw() ** 3)
        chances = torch.exp(-torch.arange(len(edges)).double() / count)
        out = edges[chances.multinomial(count, generator=self.generator)]
        state[out] = False
        rests_until = torch.zeros(len(state), dtype=torch.long)
        rests_until[out] = 2
        start, turn, lowest, since = self.passes, 0, math.inf, 0
        while since < _PATIENCE and self.passes - start < _EXCHANGE:
            turn += 1
            usable = self.free & (rests_until < turn)
            inside, outside = (state & usable).nonzero()[:, 0], (~state & usable).nonzero()[:, 0]
            if len(inside) * len(outside) > _SWAPS:
                slopes = self.slopes(state)
                outside = outside[slopes[outside].argsort()[: 2 * _SWAPS // 12]]
                inside = inside[slopes[inside].argsort(descending=True)[: _SWAPS // len(outside)]]
            swaps = torch.cartesian_prod(inside, outside)
            if not len(swaps):
                break
            candidates = state.repeat(len(swaps), 1)
            number = torch.arange(len(swaps))
            candidates[number, swaps[:, 0]] = False
            candidates[number, swaps[:, 1]] = True
            trial = self.tried(candidates)
            if self.faithful(trial).any():
                return self.swept(candidates[int(trial.faithfulness.argmax())])
            best = int(trial.loss.argmin())
            state = candidates[best]
            rests_until[swaps[best]] = turn + 2 + int(self._draw() * 4)
            since = 0 if float(trial.loss[best]) < lowest else since + 1
            lowest = min(lowest, float(trial.loss[best]))
        return circuit, losses

    def wandered(self) -> None:
        """Walk to and fro across the target on a small graph: from a random circuit, half the single flips being run.

        Where the circuit is faithful, the edge goes that is missed least; where not, the flip is made that helps most.
        What was flipped rests for a while.
        """
        free = self.free.nonzero()[:, 0]
        n_free, lowest = len(free), max(1, self.n_run_out)
        state = torch.zeros_like(self.free)
        size = lowest + int(self._draw() * max(1, self.size(self.best) - lowest))
        state[free[torch.randperm(n_free, generator=self.generator)[:size]]] = True
        faithful, rests_until = False, torch.zeros(n_free, dtype=torch.long)
        for turn in range(4 * n_free):
            movable = rests_until <= turn
            if faithful or self.size(state) >= self.size(self.best):
                movable &= state[free]
            drawn = movable & (torch.rand(n_free, generator=self.generator) < 0.5)
            movable = drawn if drawn.any() else movable
            moves = free[movable]
            if not len(moves):
                break
            candidates = state.repeat(len(moves), 1)
            number = torch.arange(len(moves))
            candidates[number, moves] = ~candidates[number, moves]
            trial = self.tried(candidates)
            best = int(trial.loss.argmin())
            state, faithful = candidates[best], bool(self.faithful(trial)[best])
            rests_until[movable.nonzero()[best]] = turn + 2 + int(self._draw() * 4)

    def exhausted(self) -> None:
        """Run all circuits of few edges, smallest first, as far as a third of what is left goes.

        On small graphs that may be all that are smaller than the best, which then is the smallest there is.
        """
        free = self.free.nonzero()[:, 0]
        while not self.minimum:
            sizes = range(self.n_run_out, self.size(self.best))
            n_circuits = [math.comb(len(free), size) for size in sizes]
            allowance = self.left // self.price
            if n_circuits[0] > allowance // 3 and sum(n_circuits) > allowance:
                return
            combined = combinations(range(len(free)), self.n_run_out)
            while some := list(islice(combined, _AT_ONCE)):
                kept = torch.zeros(len(some), len(self.free), dtype=torch.bool)
                chosen = free[torch.tensor(some, dtype=torch.long).view(len(some), -1)]
                kept[torch.arange(len(some))[:, None], chosen] = True
                self.tried(kept)
            self.n_run_out += 1

    def _draw(self) -> float:
        return float(torch.rand((), generator=self.generator))


@dataclass(frozen=True, eq=False)
class _Flipped:
    """Circuits that differ from one in a few edges.

    Attributes:
        cores: What was chosen.
        losses: Their losses.
        improvement: How much less that is.
        grown: How many edges more they have.
        enough: Which are faithful enough.
    """

    cores: Bool[Tensor, "circuit edge"]
    losses: Float[Tensor, " circuit"]
    improvement: Float[Tensor, " circuit"]
    grown: Float[Tensor, " circuit"]
    enough: Bool[Tensor, " circuit"]

    @property
    def gain(self) -> Float[Tensor, " circuit"]:
        """Improvement for its price, which counts by its root: an edge that brings two skips along is not three."""
        return torch.where(self.grown > 0, self.improvement / self.grown.clamp(min=1).sqrt(), self.improvement + 0.01)

    @property
    def smallest_enough(self) -> int:
        return int(self.grown.masked_fill(~self.enough, torch.inf).argmin())

    def and_also(self, other: "_Flipped") -> "_Flipped":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Flipped(*(torch.cat(pair) for pair in pairs))

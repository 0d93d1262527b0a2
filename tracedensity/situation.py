"""Situations: other conditions and other prompts under which a circuit can be run."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import get_args

import torch
from jaxtyping import Int
from torch import Tensor

from tracedensity.ablate import ordinary_tokens
from tracedensity.alert import alert
from tracedensity.choices import Ablation, Change, TokenAblation
from tracedensity.evaluation import setting_for
from tracedensity.gauge import Gauge
from tracedensity.graph import Graph, flatten, unflatten
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.ground import Ground
from tracedensity.metric import Metric
from tracedensity.model import Transformer
from tracedensity.task import Task
from tracedensity.tasks import WORDS

USUAL: tuple[Change, ...] = ("mean", "swap", "prepend")
"""What `td.density(..., robust=True)` asks of a circuit beside its own conditions (drawn tokens cost eight times as
much)."""

_WORD = re.compile("[A-Za-z]+")

_N_SWAPS = 2
"""Prompts that are made by swapping words."""


@dataclass(frozen=True, eq=False)
class Home:
    """Where a circuit is at home: what its situations are changes of.

    Attributes:
        model: The model.
        subject: The prompt or task.
        ground: How circuits are run on it.
        metric: What faithfulness means.
        seed: For whatever is drawn at random.
    """

    model: Transformer
    subject: Tensor | Task
    ground: Ground
    metric: str | Metric
    seed: int = 0

    def situations(
        self,
        changes: Iterable[Change | str],
        *,
        prompts: Sequence[object] = (),
        swaps: Mapping[str, str] | None = None,
    ) -> list[Ground]:
        """Its own situation, then others, as far as there are any.

        Args:
            changes: Names of ablations; ``"swap"``: names and nouns of the prompt swapped for others; ``"prepend"``: a
                token put before it. The circuit's own ablation, and what a prompt does not allow, is left out; so is,
                with a warning, where the metric does not tell the model from the circuit without edges.
            prompts: Prompts or tasks of the user's, on the token graph as long as the circuit's own.
            swaps: Words to swap for others, in place of those that are drawn.

        Raises:
            ValueError: If there is no such change, or a prompt does not fit.
        """
        changes = list(changes)
        unknown = [each for each in changes if each not in get_args(Change)]
        if unknown:
            raise ValueError(f"`robust` must be some of {list(get_args(Change))}, got {unknown}.")
        if swaps is not None and not (isinstance(swaps, Mapping) and self._text is not None):
            raise ValueError(
                "`swaps` must be a dictionary of words of a prompt, each with the one that takes its place, got "
                + (f"{swaps!r}." if self._text is not None else "some for a task or for tokens that are no text.")
            )
        found = [self._ablated(each) for each in self._ablations() if each in changes]
        found += [self._prompted(_shown(each), each) for each in prompts]
        if (text := self._text) is not None and ("swap" in changes or swaps is not None):
            others = self._drawn(text) if swaps is None else [self._swapped(text, swaps)]
            found += [self._prompted(repr(other), self._ids(other)) for other in others]
        if "prepend" in changes and self._prompt is not None and self._has_room(self._prompt):
            found.append(self._prepended(self._prompt))
        for each in found:
            if not each.gauge.tells:
                alert(
                    f"{each.name} was left out: by {each.gauge.metric} the model is there what the circuit without "
                    "edges is."
                )
        own = replace(self.ground, name=f"own: {self.ground.conditions.ablation} ablation")
        return [own, *(each for each in found if each.gauge.tells)]

    def required(self, changes: Iterable[Change | str] | str) -> list[Ground]:
        """Situations in which a circuit has to be faithful.

        Raises:
            ValueError: If there is none beside its own.
        """
        changes = [changes] if isinstance(changes, str) else list(changes)
        found = self.situations(changes)
        if len(found) == 1:
            raise ValueError(
                f"`robust` must name something else than the circuit's own situation that there is for this prompt or "
                f"task, got {changes}. Ablations here are {self._ablations()}."
            )
        return found

    # -- ablations ---------------------------------------------------------------------------------

    def _ablations(self) -> list[str]:
        own = self.ground.conditions.ablation
        if isinstance(self.ground.graph, TokenGraph):
            # a single token has no others whose mean it could carry
            known = list(get_args(TokenAblation)) if self.ground.graph.n_pos > 1 else ["zero"]
        else:
            several = isinstance(self.subject, Task) and len(self.subject) > 1
            paired = isinstance(self.subject, Task) and self.subject.corrupted is not None
            possible = {"counterfactual": paired, "mean-positional": several}
            known = [each for each in get_args(Ablation) if possible.get(each, True)]
        return [each for each in known if each != own]

    def _ablated(self, ablation: str) -> Ground:
        return replace(self._ground(self.subject, ablation), name=f"ablation: {ablation}")

    def _ground(self, subject: object, ablation: str | None = None, graph: Graph | None = None) -> Ground:
        own = self.ground
        ablation = own.conditions.ablation if ablation is None else ablation
        graph = own.graph if graph is None else graph
        setting = setting_for(self.model, graph, subject, ablation, -1, self.seed)
        conditions = replace(own.conditions, ablation=ablation)
        return Ground(graph, conditions, Gauge.of(setting, graph, self.metric), own.batch_size)

    # -- prompts -----------------------------------------------------------------------------------

    @cached_property
    def _prompt(self) -> Int[Tensor, " pos"] | None:
        """The tokens of a plain prompt, as far as they matter; None for tasks."""
        if isinstance(self.subject, Tensor):
            return self.subject
        if self.subject.name or len(self.subject) > 1:
            return None
        prompts = self.ground.setting.prompts
        return prompts.tokens[0, : int(prompts.last[0]) + 1].cpu()

    @cached_property
    def _text(self) -> str | None:
        """The prompt as text, if it is one and the tokenizer reads it back as it was."""
        if self._prompt is None or self.model.model.tokenizer is None:
            return None
        ids = self._prompt.tolist()
        special = set(getattr(self.model.model.tokenizer, "all_special_ids", []))
        text = self.model.model.tokenizer.decode([token for token in ids if token not in special])
        return text if text and self._ids(text).tolist() == ids else None

    def _ids(self, text: str) -> Int[Tensor, " pos"]:
        return self.model.tokens(text).cpu()

    def _prompted(self, name: str, prompt: object) -> Ground:
        if isinstance(self.ground.graph, TokenGraph):
            tokens = self.model.tokens(prompt)
            if len(tokens) != self.ground.graph.n_pos:
                raise ValueError(
                    f"`prompts` must be as long as the circuit's own on the token graph, {self.ground.graph.n_pos} "
                    f"tokens, got {len(tokens)} for {name}: an edge leads from one place in the prompt to another."
                )
        return replace(self._ground(prompt), name=f"prompt: {name}")

    def _swapped(self, text: str, swaps: Mapping[str, str]) -> str:
        """The prompt with words swapped as the user says."""
        other = _with_words(text, swaps)
        tied = isinstance(self.ground.graph, TokenGraph)
        if other == text or (tied and self._ends(other) != self._ends(text)):
            raise ValueError(
                "`swaps` must change words of the prompt, one by one, and leave the number of tokens of each, in all "
                f"{len(self._ids(text))}, as it is, got {other!r} of {len(self._ids(other))}."
            )
        return other

    def _drawn(self, text: str) -> list[str]:
        """Prompts in which each name and noun stands for another one, that is as many tokens long; at most two."""
        random, found, ends = Random(f"swap {self.seed}"), [], self._ends(text)

        def fits(swaps: Mapping[str, str]) -> bool:
            other = _with_words(text, swaps)
            return len(self._ids(other)) == ends[-1] and self._ends(other) == ends

        for _ in range(10 * _N_SWAPS):
            swaps: dict[str, str] = {}
            for word in dict.fromkeys(_WORD.findall(text)):
                others = sorted(set().union(*[kind for kind in WORDS if word in kind][:1]) - {word, *swaps.values()})
                random.shuffle(others)
                fitting = (other for other in others if fits({word: other}))
                if (other := next(fitting, None)) is not None:
                    swaps[word] = other
            other = _with_words(text, swaps)
            if swaps and other not in found and fits(swaps):
                found.append(other)
            if not swaps or len(found) == _N_SWAPS:
                break
        return found

    def _ends(self, text: str) -> list[int]:
        """How many tokens there are up to the end of each word, and in all."""
        ends = [match.end() for match in _WORD.finditer(text)]
        return [len(self._ids(text[:end])) for end in (*ends, len(text))]

    def _has_room(self, prompt: Int[Tensor, " pos"]) -> bool:
        """Whether a longer prompt is one that the model takes, and the edges of the graph can be found in."""
        graph = self.ground.graph
        tied = isinstance(graph, ComponentGraph) and graph.n_pos is not None
        return len(prompt) < self.model.n_ctx and not tied

    def _prepended(self, prompt: Int[Tensor, " pos"]) -> Ground:
        """A token drawn at random before the prompt, behind the token that begins a sequence.

        On the token graph what leads from it and to it is kept, so that all edges together are the model on the longer
        prompt.
        """
        ids = prompt.tolist()
        special = set(getattr(self.model.model.tokenizer, "all_special_ids", []))
        place = int(bool(ids) and ids[0] in special)
        pool = ordinary_tokens(self.model)
        generator = torch.Generator().manual_seed(self.seed)
        token = int(pool[torch.randint(len(pool), (1,), generator=generator)])
        longer = torch.tensor([*ids[:place], token, *ids[place:]])
        name = f"prompt: {self.model.texts([token])[0]!r} prepended"
        graph = self.ground.graph
        if not isinstance(graph, TokenGraph):
            return replace(self._ground(longer), name=name)
        wider = replace(graph, n_pos=graph.n_pos + 1)
        return replace(self._ground(longer, graph=wider), places=_places(graph, wider, place), name=name)


def _places(graph: TokenGraph, wider: TokenGraph, place: int) -> Int[Tensor, " edge"]:
    """Where the edges of a graph stand in that of a prompt with one more token at some place."""
    numbers = unflatten(wider, torch.arange(wider.n_edges), -1)
    old = [pos for pos in range(wider.n_pos) if pos != place]
    kept = {}
    for kind, number in numbers.items():
        number = number[:, :, old][..., old] if kind == "head" else number[:, old]
        kept[kind] = number
    return flatten(graph, kept)


def _with_words(text: str, swaps: Mapping[str, str]) -> str:
    return _WORD.sub(lambda match: swaps.get(match[0], match[0]), text)


def _shown(prompt: object) -> str:
    return str(prompt) if isinstance(prompt, Task) else repr(prompt)

"""Tasks: prompts with a question, in pairs of clean and corrupted, one or a batch of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracedensity.model import Prompt, Transformer, as_transformer

if TYPE_CHECKING:
    import pandas as pd

Prompts: TypeAlias = Prompt | Sequence[Any]
"""One prompt or several: text, token ids, a ``[batch, pos]`` tensor, or a list of texts or of lists of ids."""

Words: TypeAlias = str | SupportsIndex | Tensor | np.ndarray | Sequence[Any]
"""One token per pair, or several that count alike: text, id, a list of them (or of lists), or a tensor of ids."""


@dataclass(frozen=True, eq=False)
class Examples:
    """A task as a model reads it: token ids only, padded on the right, cut after the position that is asked about.

    Attention is causal, so padding on the right can neither be attended to nor shift a position: every number is
    that of the prompt alone.

    Attributes:
        tokens: Clean prompts.
        last: Where each prompt ends, which is where its prediction is read.
        corrupted: Their corrupted counterparts, as long as they are; None if there are none.
        answer: Tokens that are right, -1 where a row has fewer than others; None if nothing is asked.
        distractor: Tokens that are wrong, likewise.
        clean_logits: What the model predicts on the clean prompts; None before it has run.
    """

    tokens: Int[Tensor, "example pos"]
    last: Int[Tensor, " example"]
    corrupted: Int[Tensor, "example pos"] | None = None
    answer: Int[Tensor, "example option"] | None = None
    distractor: Int[Tensor, "example other"] | None = None
    clean_logits: Float[Tensor, "example d_vocab"] | None = None

    @classmethod
    def of_prompt(cls, tokens: Int[Tensor, " pos"]) -> "Examples":
        """One prompt, nothing asked."""
        return cls(tokens[None], torch.tensor([len(tokens) - 1], device=tokens.device))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice | Tensor) -> "Examples":
        """Some of the examples."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: None if value is None else value[part] for name, value in values.items()}
        return Examples(**chosen)

    @property
    def real(self) -> Bool[Tensor, "example pos"]:
        """Which tokens are none of the padding."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) <= self.last[:, None]

    def parts(self, size: int) -> Iterator[slice]:
        """Consecutive slices of at most `size` examples, of nearly equal length."""
        n_parts = -(-len(self) // max(1, size))
        ends = [len(self) * i // n_parts for i in range(n_parts + 1)]
        return (slice(start, end) for start, end in pairwise(ends))


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts and what is asked about them.

    Attributes:
        clean: Prompts, as texts or as token ids ``[batch, pos]`` (lists of unequal length are padded on the right).
        corrupted: A counterfactual for each, just as long in tokens; what edges carry when they are ablated. None
            for tasks that are only run with other ablations.
        answer: The right next token of each prompt, as text or id; several that count alike may be given per prompt.
        distractor: The wrong one. The logit difference is answer minus distractor.
        attention_mask: 1 for tokens, 0 for padding, where ids come padded on either side.
        position: The token whose successor is asked for, counted in the prompt without its padding.
        name: What to call the task; "" is a plain prompt, in which nothing is asked.
        vocabulary: Hash of the tokenizer that made the ids; "" if unknown. A model with another one is refused.

    Raises:
        ValueError: If there is not one of each per prompt, or pairs differ in length.
    """

    clean: Any
    corrupted: Any = None
    answer: Any = None
    distractor: Any = None
    attention_mask: Any = None
    position: int = -1
    name: str = "task"
    vocabulary: str = ""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "position", index(self.position))
        except TypeError as error:
            raise ValueError(f"`position` must be a whole number, got {self.position!r}.") from error
        mask = None if self.attention_mask is None else _mask(self.attention_mask)
        clean = _prompts(self.clean, mask, "clean")
        settled: dict[str, Any] = {"clean": clean, "attention_mask": None}
        if self.corrupted is not None:
            settled["corrupted"] = corrupted = _prompts(self.corrupted, mask, "corrupted")
            if len(corrupted) != len(clean):
                raise ValueError(
                    f"`corrupted` must hold one prompt for each clean one, got {len(corrupted)} for {len(clean)}."
                )
            for number, (one, other) in enumerate(zip(clean, corrupted, strict=True)):
                if not isinstance(one, str) and not isinstance(other, str) and len(one) != len(other):
                    raise ValueError(_unequal(number, len(one), len(other), ""))
        for name in ("answer", "distractor"):
            if getattr(self, name) is not None:
                settled[name] = words = _words(getattr(self, name), name, len(clean))
                if len(words) != len(clean):
                    raise ValueError(f"`{name}` must hold one entry per prompt, got {len(words)} for {len(clean)}.")
        if self.distractor is not None and self.answer is None:
            raise ValueError("`distractor` must come with an `answer`, got none.")
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, part: SupportsIndex | slice | Sequence[SupportsIndex] | Tensor) -> "Task":
        """Some of the pairs: one by its number, a slice, a list of numbers, or a tensor of numbers or booleans.

        Raises:
            IndexError: If there is no pair of a number.
            ValueError: If none is left.
        """
        everyone = range(len(self))
        if isinstance(part, slice):
            numbers = list(everyone[part])
        elif isinstance(part, Tensor | np.ndarray | Sequence):
            try:
                chosen = torch.as_tensor(part)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"`part` must be numbers or truth values of pairs, got {part!r}.") from error
            if chosen.dtype == torch.bool and chosen.shape != (len(self),):
                raise IndexError(f"`part` must have one truth value per pair, {len(self)}, got {list(chosen.shape)}.")
            places = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen.reshape(-1)
            numbers = [_place(number, everyone) for number in places.tolist()]
        else:
            numbers = [_place(part, everyone)]
        if not numbers:
            raise ValueError("`part` must leave at least one pair, got none.")

        def some(values: tuple[Any, ...] | None) -> Any:
            return None if values is None else tuple(values[i] for i in numbers)

        return replace(
            self, clean=some(self.clean), corrupted=some(self.corrupted), answer=some(self.answer),
            distractor=some(self.distractor),
        )  # fmt: skip

    def __repr__(self) -> str:
        pairs = ("pair" if self.corrupted is not None else "prompt") + "s" * (len(self) != 1)
        first = repr(self.clean[0])
        return f"Task({self.name!r}, {len(self)} {pairs}, clean[0]={first if len(first) < 90 else first[:80] + '...'})"

    def examples(self, model: Transformer) -> Examples:
        """Token ids for a model.

        Raises:
            ValueError: If the task was made for another tokenizer, a word is not a single token, ids are outside
                the vocabulary, or the tokens of a pair differ in number.
        """
        if self.vocabulary and self.vocabulary != model.vocabulary:
            raise ValueError(
                f"`task` must be made for the tokenizer of {model.name}, got one made for another: "
                "make it anew with this model, or give its prompts as text."
            )
        clean = [model.tokens(prompt, self.position) for prompt in self.clean]
        corrupted = None
        if self.corrupted is not None:
            corrupted = [model.tokens(prompt) for prompt in self.corrupted]
            whole = [len(model.tokens(prompt)) for prompt in self.clean]
            for number, (length, other) in enumerate(zip(whole, corrupted, strict=True)):
                if length != len(other):
                    raise ValueError(_unequal(number, length, len(other), f" ({self.clean[number]!r})"))
            corrupted = _padded([ids[: len(one)] for ids, one in zip(corrupted, clean, strict=True)])
        answer, distractor = (_options(getattr(self, name), name, model) for name in ("answer", "distractor"))
        if answer is not None and distractor is not None:
            both = (answer[:, :, None] == distractor[:, None]) & (answer[:, :, None] >= 0)
            if both.any():
                number, option, _ = both.nonzero()[0].tolist()
                token = model.texts([int(answer[number, option])])[0]
                raise ValueError(f"`distractor` must hold no answer, got {token!r} as both in pair {number}.")
        last = torch.tensor([len(ids) - 1 for ids in clean], device=model.device)
        return Examples(_padded(clean), last, corrupted, answer, distractor)

    def solved(self, model: object) -> "Solved":
        """How well a model does: which of its predictions prefer the answer to the distractor.

        Without distractors a prediction is right if its most probable token is an answer.

        Raises:
            ValueError: If the task has no answers, or does not fit the model.
        """
        transformer = as_transformer(model)
        examples = self.examples(transformer)
        if examples.answer is None:
            raise ValueError("`task` must have answers to be solved, got none.")
        rows = []
        for part in examples.parts(64):
            some = examples[part]
            logits = transformer.logits(some.tokens, last=some.last)
            assert some.answer is not None
            if some.distractor is not None:
                rows.append(log_odds(logits, some.answer, some.distractor))
            else:
                answer = some.answer.where(some.answer >= 0, some.answer[:, :1])  # padding repeats the first
                others = logits.scatter(-1, answer, -torch.inf)
                rows.append(logits.gather(-1, answer).max(-1).values - others.max(-1).values)
        return Solved(torch.cat(rows).cpu())

    def where_solved(self, model: object) -> "Task":
        """The pairs that a model solves.

        Raises:
            ValueError: If it solves none.
        """
        solved = self.solved(model)
        if not solved.solved.any():
            raise ValueError(f"`model` must solve at least one of the {len(self)} pairs of {self.name!r}, got none.")
        return self[solved.solved]

    def of_length(self, model: object, n_tokens: int | None = None) -> "Task":
        """The pairs whose prompts have a number of tokens, up to the position asked about.

        Edges can be told apart by position only where all prompts are equally long.

        Args:
            model: A model, or a name for `load_model`; its tokenizer counts.
            n_tokens: The number; by default the most common one, the smaller of equals.

        Raises:
            ValueError: If no pair has it.
        """
        lengths = self.examples(as_transformer(model)).last.cpu() + 1
        n_tokens = int(lengths.mode().values) if n_tokens is None else n_tokens
        if not (lengths == n_tokens).any():
            raise ValueError(f"`n_tokens` must be one of {sorted(set(lengths.tolist()))}, got {n_tokens}.")
        return self[lengths == n_tokens]

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per pair; answers of which there is one per pair by themselves, else as tuples."""
        import pandas as pd

        columns = {}
        for name in ("clean", "corrupted", "answer", "distractor"):
            if (values := getattr(self, name)) is not None:
                single = name in ("answer", "distractor") and all(len(each) == 1 for each in values)
                columns[name] = [each[0] for each in values] if single else list(values)
        return pd.DataFrame(columns)

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class Solved:
    """How well a model does on a task.

    Attributes:
        logit_difference: Of each pair, answer minus distractor; without distractors, answer minus the best
            other token.
    """

    logit_difference: Float[Tensor, " example"]

    @property
    def solved(self) -> Bool[Tensor, " example"]:
        """Which pairs the model solves."""
        return self.logit_difference > 0

    @property
    def accuracy(self) -> float:
        """Share of the pairs that the model solves."""
        return float(self.solved.double().mean())

    @property
    def mean_logit_difference(self) -> float:
        return float(self.logit_difference.double().mean())

    def __repr__(self) -> str:
        return (
            f"Solved({int(self.solved.sum())} of {len(self.solved)} pairs ({self.accuracy:.0%}), "
            f"mean logit difference {self.mean_logit_difference:.2f})"
        )


def as_task(prompt_or_task: object) -> Task:
    """The task itself, or a prompt as a task in which nothing is asked."""
    return prompt_or_task if isinstance(prompt_or_task, Task) else Task(clean=prompt_or_task, name="")


def several_prompts(given: Any, attention_mask: Any = None) -> tuple[str | tuple[int, ...], ...] | None:
    """The prompts that are given, without their padding; None where it is one, without a mask.

    Args:
        given: One prompt, or a task; or several: texts, lists of ids, a ``[batch, pos]`` tensor.
        attention_mask: 1 for tokens and 0 for padding, on either side.

    Raises:
        ValueError: If these are no prompts, or the mask does not fit.
    """
    if isinstance(given, Task):
        if attention_mask is not None:
            raise ValueError("`attention_mask` must be left to the task, which has one of its own.")
        return None
    many = getattr(given, "ndim", 1) > 1
    if isinstance(given, Sequence) and not isinstance(given, str):
        many = any(isinstance(each, str | Sequence) or getattr(each, "ndim", 0) for each in given)
    if not many and attention_mask is None:
        return None
    return _prompts(given, None if attention_mask is None else _mask(attention_mask), "prompt")


def log_odds(
    logits: Float[Tensor, "row d_vocab"], answer: Int[Tensor, "row option"], distractor: Int[Tensor, "row other"]
) -> Float[Tensor, " row"]:
    """``log p(any answer) - log p(any distractor)``: with one of each, the difference of their logits."""
    return _log_sum(logits, answer) - _log_sum(logits, distractor)


def _log_sum(logits: Tensor, options: Tensor) -> Tensor:
    chosen = logits.gather(-1, options.clamp(min=0))
    if options.shape[-1] == 1:
        return chosen[:, 0]
    return chosen.masked_fill(options < 0, -torch.inf).logsumexp(-1)


# -- reading what the user gives ------------------------------------------------------------------


def _prompts(given: Any, mask: Tensor | None, name: str) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(given, str):
        given = [given]
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if isinstance(given, Tensor):
        given = given[None] if given.dim() == 1 else given
        if given.dim() != 2 or given.is_floating_point() or given.dtype == torch.bool:
            raise ValueError(
                f"`{name}` must be texts or token ids [batch, pos], got {given.dtype} of shape {list(given.shape)}."
            )
        if mask is not None and mask.shape != given.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `{name}`, {list(given.shape)}, got {list(mask.shape)}."
            )
        rows = given.tolist()
        if mask is not None:
            rows = [
                [i for i, real in zip(row, keep, strict=True) if real] for row, keep in zip(rows, mask, strict=True)
            ]
        given = rows
    elif mask is not None:
        raise ValueError(f"`attention_mask` must come with `{name}` as a tensor [batch, pos], got {_kind(given)}.")
    try:
        given = list(given)
    except TypeError as error:
        raise ValueError(f"`{name}` must be texts or token ids [batch, pos], got {_kind(given)}.") from error
    if given and all(hasattr(each, "__index__") and not isinstance(each, Tensor) for each in given):
        given = [given]  # one prompt, as a list of ids
    prompts = []
    for each in given:
        if not isinstance(each, str):
            try:
                each = tuple(index(i) for i in each)
            except TypeError as error:
                raise ValueError(f"`{name}` must be texts or token ids [batch, pos], got {_kind(each)}.") from error
        if not each:
            raise ValueError(f"`{name}` must hold at least one token per prompt, got none in prompt {len(prompts)}.")
        prompts.append(each)
    if not prompts:
        raise ValueError(f"`{name}` must hold at least one prompt, got none.")
    return tuple(prompts)


def _words(given: Any, name: str, n_prompts: int) -> tuple[tuple[str | int, ...], ...]:
    """For each prompt the tokens that count as its answer."""
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    if isinstance(given, str) or hasattr(given, "__index__"):
        given = [given] * n_prompts if n_prompts == 1 else [given]
    try:
        given = list(given)
    except TypeError as error:
        raise ValueError(f"`{name}` must be tokens, as texts or ids, got {_kind(given)}.") from error
    rows = []
    for each in given:
        try:
            options = [each] if isinstance(each, str) or hasattr(each, "__index__") else list(each)
            row = tuple(option if isinstance(option, str) else index(option) for option in options)
        except TypeError as error:
            raise ValueError(f"`{name}` must be tokens, as texts or ids, got {_kind(each)}.") from error
        row = tuple(option for option in row if option != -1)
        if not row:
            raise ValueError(f"`{name}` must hold at least one token per prompt, got none for prompt {len(rows)}.")
        rows.append(row)
    return tuple(rows)


def _mask(given: Any) -> Bool[Tensor, "batch pos"]:
    try:
        mask = torch.as_tensor(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`attention_mask` must be numbers [batch, pos], got {_kind(given)}.") from error
    if mask.dim() == 1:
        mask = mask[None]
    real = mask.bool()
    edges = real.long().diff(dim=1).abs().sum(1)
    if mask.dim() != 2 or not real.any(1).all() or (edges > 1).any():
        raise ValueError("`attention_mask` must be [batch, pos], 1 for tokens and 0 for padding at one end of a row.")
    return real


def _options(rows: tuple[tuple[str | int, ...], ...] | None, name: str, model: Transformer) -> Tensor | None:
    if rows is None:
        return None
    # a token that is given twice, perhaps with and without its space, counts once
    found = [list(dict.fromkeys(model.single_token(option, name) for option in row)) for row in rows]
    ids = torch.full((len(rows), max(map(len, found))), -1, dtype=torch.long)
    for number, row in enumerate(found):
        ids[number, : len(row)] = torch.tensor(row)
    return ids.to(model.device)


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _unequal(number: int, clean: int, corrupted: int, text: str) -> str:
    return (
        f"`corrupted` must be as long as `clean`, pair by pair, got {corrupted} tokens for {clean} in pair "
        f"{number}{text}: a position would be compared with another one."
    )


def _place(number: SupportsIndex, everyone: range) -> int:
    try:
        return everyone[index(number)]
    except IndexError as error:
        raise IndexError(
            f"`part` must be a pair from {-len(everyone)} to {len(everyone) - 1}, got {number}."
        ) from error
    except TypeError as error:
        raise TypeError(f"`part` must be a number, a slice or numbers of pairs, got {_kind(number)}.") from error


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"

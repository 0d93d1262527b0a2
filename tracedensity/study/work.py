"""Work: what a sweep does with some of its prompts, from contexts to the files that hold their rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from tracedensity.ablate import ordinary_tokens
from tracedensity.curve import DensityCurve
from tracedensity.estimation import Estimation, density, was_cut_short
from tracedensity.files import circuit_file, curve_file, versions
from tracedensity.loading import load_model
from tracedensity.model import Site, Transformer, as_transformer
from tracedensity.model.offload import offload_activations
from tracedensity.pooling import FAILURES, Asking
from tracedensity.score.flow import MEASURES, contribution_sites
from tracedensity.setting import rows_at_once
from tracedensity.study.contexts import Context
from tracedensity.study.counts import Counts
from tracedensity.study.table import (
    ALSO,
    SCHEMA,
    TABLES,
    Row,
    TableName,
    context_row,
    curve_rows,
    keys_of,
    prediction_row,
    schema,
)

T = TypeVar("T")

Files: TypeAlias = dict[str, bytes]
"""Files by their paths in the folder of a sweep, in the order in which they are to be written."""


@dataclass(frozen=True, eq=False)
class Done:
    """What comes of a part.

    Attributes:
        files: Its files.
        n_prompts: How many prompts it has.
        n_errors: How many of them have an error in place of numbers.
    """

    files: Files
    n_prompts: int
    n_errors: int


_AHEAD = 16
"""Prompts that are run together before they are scored, at most."""

FIXED = ("sizes", "also", "per_example", "batch_size")
"""Options of `td.density` that a sweep has none of, or sets itself."""


@dataclass(frozen=True)
class Part:
    """Some of the prompts of a sweep, whose rows are in files of their own.

    Attributes:
        number: Which part.
        first: Number of its first prompt.
        contexts: The prompts.
    """

    number: int
    first: int
    contexts: tuple[Context, ...]

    def path(self, table: str) -> str:
        """Where its rows of a table are, in the folder of the sweep."""
        return f"{table}/part-{self.number:05d}.parquet"


@dataclass(frozen=True, eq=False)
class Work:
    """What is done with every part: the same, wherever it is done.

    Attributes:
        model: Name or folder of the model, or the model itself.
        identity: What must be the same wherever it is loaded, see `identity_of`.
        loading: How it is loaded, as `load_model` takes it.
        options: Options of `td.density`, all of them.
        sweep: What the files say of the sweep that they belong to.
        counts: Counts of tokens, for how rare they are.
        curves: Whether to keep the curve of each prompt, its ranking in it.
        circuits: Faithfulnesses whose circuits are kept.
        threads: Threads of PyTorch, on which the last digits depend.
        offload: Whether gradients wait in main memory, see `td.offload_activations`.
    """

    model: Any
    identity: Mapping[str, str]
    loading: Mapping[str, Any]
    options: Mapping[str, Any]
    sweep: str
    counts: Counts | None = None
    curves: bool = False
    circuits: tuple[float, ...] = ()
    threads: int = 1
    offload: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from other work."""
        return self.sweep, self.offload, self.model_key

    @property
    def model_key(self) -> tuple[object, ...]:
        """What tells its model from others, so that a process may keep it for other work."""
        return str(self.model), *self.identity.values(), repr(sorted(self.loading.items()))

    def kept(self, number: int) -> list[str]:
        """Files of a prompt's own."""
        circuits = [f"circuits/{number:07d}-{each!r}.safetensors" for each in self.circuits]
        return [*([f"curves/{number:07d}.safetensors"] if self.curves else []), *circuits]


def identity_of(model: Transformer) -> dict[str, str]:
    """What numbers depend on: hashes of weights and tokenizer, and, for their last digits, what runs them and where."""
    return {
        "fingerprint": model.fingerprint(),
        "tokenizer": model.tokenization,
        "held_by": type(model.model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def density_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `td.density` as JSON can hold them, those that were not given by their defaults.

    Raises:
        TypeError: If there is no such option, or a sweep has none of it.
        ValueError: If it cannot be written down.
    """
    known = {
        name: each.default for name, each in signature(density).parameters.items() if each.kind == each.KEYWORD_ONLY
    }
    usual = {name: default for name, default in known.items() if name not in (*FIXED, "attention_mask")}
    for name, value in given.items():
        if name not in usual:
            raise TypeError(f"`sweep` has no option {name!r}; those of `density` that it takes are {', '.join(usual)}.")
        if callable(value):
            raise ValueError(f"`{name}` must be a name in a sweep, which writes down how it was made, got a function.")
        try:
            usual[name] = _plain(value)
        except TypeError as error:
            raise ValueError(
                f"`{name}` must be numbers or names in a sweep, which writes down how it was made, got a "
                f"{type(value).__name__}."
            ) from error
    try:
        if isinstance(usual["thresholds"], str):
            raise TypeError
        usual["thresholds"] = tuple(map(float, usual["thresholds"]))  # 1 and 1.0 are one threshold
    except (TypeError, ValueError) as error:
        raise ValueError(f"`thresholds` must be several numbers, got {usual['thresholds']!r}.") from error
    if type(usual["position"]) is not int:
        raise ValueError(f"`position` must be a whole number, got {usual['position']!r}.")
    return usual


def _plain(value: Any) -> Any:
    """An option without types of numpy and of PyTorch, and without tuples.

    Raises:
        TypeError: If JSON cannot hold it.
    """
    return json.loads(json.dumps(value, default=lambda each: each.tolist() if hasattr(each, "tolist") else [*each]))


@dataclass(eq=False)
class Worker:
    """Does the work, part after part, with one model.

    Attributes:
        work: What to do.
        loaded: The model, if it is loaded already.
    """

    work: Work
    loaded: Transformer | None = None

    @cached_property
    def model(self) -> Transformer:
        """The model, loaded when it is first needed.

        Raises:
            ValueError: If it is another one than the sweep was begun with.
        """
        if self.loaded is not None:
            return self.loaded
        model = as_transformer(load_model(self.work.model, **self.work.loading))
        for what, found in identity_of(model).items():
            if found != self.work.identity[what]:
                raise ValueError(
                    f"`model` must be the same for all workers, got {what} {found!r} for {self.work.model!r} and "
                    f"{self.work.identity[what]!r} elsewhere."
                )
        return model

    @cached_property
    def estimation(self) -> Estimation:
        """How curves are made.

        Raises:
            ValueError: If an option is not as `td.density` describes it.
        """
        counts = self.work.counts
        also = (*ALSO, *([] if counts is None else [counts.distance()]))
        # a prompt has been cut at its position when it was read
        rest: dict[str, Any] = {"sizes": (), "per_example": False, "batch_size": None, "position": -1}
        return Estimation(self.model, **{**self.work.options, **rest}, also=also)

    def try_options(self) -> None:
        """Score two tokens, as every prompt will be.

        Raises:
            ValueError: If an option is not as `td.density` describes it, or does not fit the model.
        """
        tokens = ordinary_tokens(self.model)[:2].to(self.model.device)
        with torch.inference_mode(False), self.model.unchanged():
            next(self.estimation.curve(tokens), None)

    def __call__(self, part: Part) -> Done:
        """Run a part."""
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(self.work.threads)
            with torch.inference_mode(False), offload_activations(self.work.offload), self.model.unchanged():
                return self._done(part)
        finally:
            torch.set_num_threads(threads)

    def _done(self, part: Part) -> Done:
        files: Files = {}
        rows: dict[TableName, list[Row]] = {"thresholds": [], "points": [], "prompts": []}
        read = [self._read(context) for context in part.contexts]
        made, logits = self._made(read, part.first)
        for place, (context, known) in enumerate(zip(part.contexts, read, strict=True)):
            keys, result = {**keys_of(part.first + place, context)}, made[place]
            own: Row = {
                **context_row(context, known.tokens, known.target, self.model),
                "model": self.model.name,
                "fingerprint": self.model.fingerprint(),
                "versions": " ".join(f"{name} {each}" for name, each in versions().items()),
            }
            if (each := logits[place]) is not None:
                own |= prediction_row(each, known.target, self.work.counts, self.model)
            if isinstance(result, str):
                own["error"] = result
            else:
                own |= result.rows["prompts"][0]
                for table in ("thresholds", "points"):
                    rows[table] += [{**keys, **row} for row in result.rows[table]]
                files |= result.files
            rows["prompts"].append({**keys, **own})
        # the file of prompts comes last: where it is, the others are
        files |= {part.path(table): self._parquet(table, rows[table], part) for table in rows}
        return Done(files, len(part.contexts), sum(row["error"] is not None for row in rows["prompts"]))

    def _read(self, context: Context) -> "_Read":
        if context.error:
            return _Read(None, None, context.error)
        try:
            tokens = self.model.tokens(context.prompt, self.work.options["position"])
            return _Read(tokens, self._target(context, tokens), "")
        except ValueError as error:
            return _Read(None, None, str(error))

    def _target(self, context: Context, tokens: Int[Tensor, " pos"]) -> int | None:
        """The token that comes next: the first that the tokenizer makes of the target behind the prompt.

        Raises:
            ValueError: If the target is no token.
        """
        target = context.target
        if target is None or self.work.options["position"] != -1:
            return None
        if not isinstance(target, str):
            return self.model.single_token(target, "target")
        if isinstance(context.prompt, str):
            whole = self.model.pieces(context.prompt + target)
            before = self.model.pieces(context.prompt)
            if whole[: len(before)] == before and len(whole) > len(before):
                return whole[len(before)]
        return next(iter(self.model.pieces(target)), None)

    def _made(self, read: Sequence["_Read"], first: int) -> tuple[list["_Result | str"], list[Tensor | None]]:
        """What comes of each prompt, or why nothing does, and what the model predicts after it."""
        made: list[_Result | str] = [each.error for each in read]
        logits: list[Tensor | None] = [None] * len(read)
        numbers: list[int] = []

        def result(number: int) -> Asking[_Result]:
            curve = yield from self.estimation.curve(read[number].tokens, logits[number])
            if was_cut_short(curve):  # the best so far would be taken for what a whole search finds
                raise KeyboardInterrupt
            return _Result(curve_rows(curve), self._kept(first + number, curve))

        def asking() -> Iterator[Asking[_Result | str]]:
            for some in self._batches(read):
                ahead = self._run_ahead([read[number].tokens for number in some])
                for place, number in enumerate(some):
                    if ahead is not None:
                        logits[number] = ahead[place]
                    # where all together fail, one of them does, and its own run will say why
                    elif (alone := self._run_ahead([read[number].tokens])) is not None:
                        logits[number] = alone[0]
                    numbers.append(number)
                    yield _safely(result(number))

        for place, each in enumerate(self.estimation.together(asking())):
            made[numbers[place]] = each
        return made, logits

    def _run_ahead(self, prompts: Sequence[Tensor | None]) -> Tensor | None:
        """What is predicted after prompts that are run ahead; None where one of them fails."""
        try:
            return self.model.run_ahead([tokens for tokens in prompts if tokens is not None], self._sites)
        except FAILURES:
            return None

    def _batches(self, read: Sequence["_Read"]) -> Iterator[list[int]]:
        """Prompts of similar length, as many as can be run at once."""
        lengths = {number: len(each.tokens) for number, each in enumerate(read) if each.tokens is not None}
        order = sorted(lengths, key=lengths.__getitem__)
        while order:
            longest = lengths[order[min(len(order), _AHEAD) - 1]]
            n_rows = min(_AHEAD, rows_at_once(self.model, longest, len(self._sites)))
            yield order[:n_rows]
            order = order[n_rows:]

    @cached_property
    def _sites(self) -> list[Site]:
        """What scoring will ask for of each prompt; nothing where it takes gradients, or another precision."""
        options = self.work.options
        plain = (options["method"] or "norm") in MEASURES and options["graph"] == "token"
        return contribution_sites(self.model) if plain and self.model.dtype == self.model.full_dtype else []

    def _kept(self, number: int, curve: DensityCurve) -> Files:
        """Files of one prompt."""
        curves = [curve_file(curve)] if self.work.curves else []
        circuits = [circuit_file(curve.circuit(faithfulness=each)) for each in self.work.circuits]
        return dict(zip(self.work.kept(number), [*curves, *circuits], strict=True))

    def _parquet(self, table: str, rows: list[Row], part: Part) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        about = {"table": table, "schema": SCHEMA, "sweep": self.work.sweep, "part": part.number, "first": part.first}
        columns = [column.name for column in TABLES[table]]
        full = [{name: row.get(name) for name in columns} for row in rows]
        made = pa.Table.from_pylist(full, schema(table).with_metadata({"tracedensity": json.dumps(about)}))
        written = pa.BufferOutputStream()
        pq.write_table(made, written, write_page_checksum=True)
        return written.getvalue().to_pybytes()


@dataclass(frozen=True, eq=False)
class _Read:
    """A prompt as the model reads it.

    Attributes:
        tokens: Its token ids, up to the position that is explained; None if it cannot be read.
        target: The token that comes next, if that is known.
        error: Why it cannot be read.
    """

    tokens: Int[Tensor, " pos"] | None
    target: int | None
    error: str


@dataclass(frozen=True, eq=False)
class _Result:
    """What comes of a prompt.

    Attributes:
        rows: Its rows of each table, without the columns by which they belong together.
        files: Its files.
    """

    rows: Mapping[TableName, list[Row]]
    files: Files


def _safely(asking: Asking[T]) -> Asking[T | str]:
    """The same, whose failure is what comes of it."""
    try:
        return (yield from asking)
    except FAILURES as error:
        return str(error) or type(error).__name__

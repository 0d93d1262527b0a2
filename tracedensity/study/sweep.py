"""Sweeps: density curves of all prompts of a corpus, as tables on disk that a killed run leaves whole."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from operator import index
from os import PathLike
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tracedensity.choices import Engine
from tracedensity.loading import load_model
from tracedensity.model import as_transformer
from tracedensity.model.offload import is_offloading
from tracedensity.study.contexts import Context, Corpus, Cut
from tracedensity.study.counts import Counts, count_tokens
from tracedensity.study.engines import here, in_processes, on_ray, usual_workers
from tracedensity.study.folder import Folder, read_sweep, sweep_of
from tracedensity.study.progress import bar_of, skip
from tracedensity.study.table import TableName, named_in
from tracedensity.study.work import Done, Part, Work, Worker, density_options, identity_of

if TYPE_CHECKING:
    import pandas as pd

PART_SIZE = 64
"""Prompts of a part, unless something else is said."""

_RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
"""Where torchrun and Slurm's srun say which of how many runs one is."""

_TASK = "SLURM_ARRAY_TASK_"
"""How variables begin in which Slurm says which task of an array one is."""

_FEW = 200
"""So many prompts are done before a second process has loaded its model."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep has done.

    Attributes:
        path: Its folder.
        n_prompts: Prompts that this run was about.
        n_made: How many of them it ran; the others were there.
        n_errors: How many of these have an error in place of numbers.
        seconds: What that took.
    """

    path: Path
    n_prompts: int
    n_made: int
    n_errors: int
    seconds: float

    def table(self, name: TableName | str = "prompts") -> "pd.DataFrame":
        """Its rows, see `read_sweep`."""
        return read_sweep(self.path, name)

    def __str__(self) -> str:
        made = f"{self.n_made:,} of {self.n_prompts:,} prompts run"
        rate = f" in {self.seconds:.0f} s, {self.n_made / self.seconds:.1f} per second" if self.n_made else ""
        errors = f"; {self.n_errors:,} have an error, see the column `error`" if self.n_errors else ""
        return f"{made}{rate}{errors}. The tables are in {self.path}."


def sweep(
    model: object,
    prompts: object,
    out: str | PathLike[str],
    *,
    context_words: int | None = None,
    context_tokens: int | Sequence[int] | None = None,
    per_document: int | None = None,
    column: str | None = None,
    counts: Counts | str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    limit: int | None = None,
    shard: str | tuple[int, int] | None = None,
    engine: Engine | str = "local",
    workers: int | None = None,
    gpus: float | int = 0,
    threads: int = 1,
    part_size: int = PART_SIZE,
    curves: bool = False,
    circuits: float | int | Sequence[float | int] = (),
    resume: bool = True,
    retry_errors: bool = False,
    progress: bool | None = None,
    loading: Mapping[str, Any] | None = None,
    **options: Any,
) -> Sweep:
    """Density of all prompts of a corpus: one row per prompt, per threshold and per size, in Parquet files.

    Prompts are run in parts of 64, those of similar length of a part in the same batches. The rows of a part are in
    files of their own, written beside and renamed: however a run ends, what is finished stays, and the same call goes
    on where it ended. The rows are, byte for byte, those of a run that nothing stopped, whoever ran them.

    Args:
        model: A name or folder for `load_model`; or a model, which is run in this process only.
        prompts: One or several ``.txt``, ``.jsonl``, ``.csv`` or ``.parquet`` files; a DataFrame; or a list of prompts
            or of dictionaries. In a text file each line is a prompt, unless contexts are cut out of it, as they can be
            out of any file of text. Tables have their prompts in `column`, and may have ``id``, ``document``,
            ``domain``, ``group`` and ``target``.
        out: The folder to write: new, or that of the same sweep.
        context_words: Cut text into contexts of so many words, the next word being the target.
        context_tokens: Or into contexts of so many tokens; several numbers give nested contexts of one target.
        per_document: At most so many pieces of each document.
        column: The column of prompts in tables; by default ``prompt``, ``text`` or ``content``.
        counts: Counts of tokens, or text files to count them in, for how rare the tokens of a prediction are.
        limit: Only the first so many prompts.
        shard: ``"i/n"``, for the i-th of n runs, from 0, that share the parts among them without talking to each other;
            ``"auto"`` to read it from what Slurm or torchrun say.
        engine: ``"local"``, or ``"ray"`` for a Ray cluster, which needs the extra ``tracedensity[ray]``.
        workers: Processes, or actors of Ray, each with the model once. By default one for each core, but one for a
            model that is no name, on an accelerator or too large for more, and for few prompts.
        gpus: GPUs of each actor of Ray.
        threads: Threads of PyTorch in each. Last digits depend on it.
        part_size: Prompts of a part: what is run together, and lost if a run is killed.
        curves: Whether to write the curve of each prompt, with its ranking, to a file that `td.load` reads.
        circuits: Faithfulnesses whose circuits are written as well.
        resume: Whether `out` may hold a part of the sweep already.
        retry_errors: Whether parts in which a prompt has an error are run again, for errors that were the machine's,
            such as a GPU whose memory somebody else had.
        progress: Whether to show it, with rate and time left; by default in a terminal or notebook.
        loading: How the model is loaded, as `load_model` takes it: ``{"device": "cuda"}``.
        options: Any options of `td.density` for one prompt but `sizes`, `also`, `per_example` and `batch_size`.

    Returns:
        What was done; `Sweep.table` reads the rows.

    Raises:
        ValueError: If an argument is not as described, or `out` holds something else, such as a sweep with other
            options. A prompt that is not as described is a row with its error.
        OSError: If something cannot be written.
    """
    options = density_options(options)
    loading = dict(loading or {})
    named = isinstance(model, str | os.PathLike)
    if loading and not named:
        raise ValueError("`loading` must be left out for a model that is loaded already.")
    numbers = {"limit": limit, "workers": workers, "threads": threads, "part_size": part_size}
    for name, number in numbers.items():
        if number is not None and (not hasattr(number, "__index__") or index(number) < 1):
            raise ValueError(f"`{name}` must be at least 1 and a whole number, got {number!r}.")
    limit, workers, threads, part_size = map(_index, numbers.values())  # as JSON and PyTorch know them
    if engine not in get_args(Engine):
        raise ValueError(f"`engine` must be one of {list(get_args(Engine))}, got {engine!r}.")
    if not named and (engine == "ray" or (workers or 1) > 1):
        raise ValueError(
            "`model` must be a name or a folder for several processes, each of which loads it, got a model. Save it in "
            "a folder, or take `workers=1`."
        )
    if not 0 <= gpus < inf:
        raise ValueError(f"`gpus` must be 0 or more for each actor, a share of one such as 0.5 among them, got {gpus}.")
    if gpus and engine != "ray":
        raise ValueError(
            '`gpus` must be left out without `engine="ray"`, whose actors they are for. `loading={"device": "cuda"}` '
            "puts the model of this machine on a GPU."
        )
    mine = _shard(shard)
    cut = Cut(_index(context_words), _numbers(context_tokens), _index(per_document))
    if cut and options["position"] != -1:
        raise ValueError(
            f"`position` must be left out where text is cut, got {options['position']}: a context ends before its "
            "target."
        )
    corpus = Corpus.of(prompts, cut, column)
    try:
        kept = tuple(map(float, [circuits] if isinstance(circuits, float | int) else circuits))
        wrong = isinstance(circuits, str) or not all(0 < each <= 1 for each in kept)
    except (TypeError, ValueError):
        kept, wrong = (), True
    if wrong:
        raise ValueError(f"`circuits` must be faithfulnesses above 0 and at most 1, got {circuits!r}.")
    if counts is not None and not isinstance(counts, Counts):
        counts = [counts] if isinstance(counts, str | PathLike) else [*counts]
        if not counts or not all(map(isfile, counts)):
            raise ValueError(f"`counts` must be counts, or text files that are there, got {[*map(str, counts)]}.")

    transformer = as_transformer(load_model(model, **loading))
    if counts is not None and not isinstance(counts, Counts):
        counts = count_tokens(transformer, *counts)
    if counts is not None and len(counts.of_token) != transformer.d_vocab:
        raise ValueError(
            f"`counts` must be of the model's own tokens, {transformer.d_vocab}, got {len(counts.of_token)}."
        )
    identity = identity_of(transformer)
    if engine == "ray" and "device" not in loading:
        identity["device"] = "cuda" if gpus else "cpu"  # of actors, whatever this machine has
    about = {
        "model": transformer.name,
        **identity,
        **named_in(transformer, options["graph"]),
        "prompts": corpus.about,
        "counts": None if counts is None else {"name": counts.name, "digest": counts.digest},
        "options": options,
        "part_size": part_size,
        "threads": threads,
        "curves": curves,
        "circuits": kept,
    }
    work = Work(
        model, identity, loading, options, sweep_of(about), counts=counts, curves=curves, circuits=kept,
        threads=threads, offload=is_offloading(),
    )  # fmt: skip
    worker = Worker(work, transformer)
    worker.try_options()  # what is wrong for every prompt is refused before anything is written
    n_prompts = n_wanted = 0
    for part in _parts(corpus.contexts(transformer), part_size, limit, (0, 1)):
        n_wanted += len(part.contexts)
        n_prompts += len(part.contexts) if part.number % mine[1] == mine[0] else 0
    if not n_wanted:
        raise ValueError(
            "`prompts` must hold at least one prompt, got none: no text is long enough to be cut, or all is empty."
        )
    folder = Folder.of(out, about, resume)
    folder.tidy()
    folder.want(n_wanted)
    if workers is None:
        few = part_size if options["refine"] else _FEW  # a search takes longer than starting a process
        workers = 1 if not named or n_prompts <= few else usual_workers(transformer)
    n_made = n_errors = 0
    begun = time.monotonic()
    with bar_of(n_prompts, "prompt", progress) as bar:

        def missing() -> Iterator[Part]:
            for part in _parts(corpus.contexts(transformer), part_size, limit, mine):
                if folder.has(part, work, retry_errors):
                    skip(bar, len(part.contexts))
                else:
                    yield part

        for done in _run(engine, worker, missing(), workers, gpus):
            folder.add(done.files)
            n_made, n_errors = n_made + done.n_prompts, n_errors + done.n_errors
            bar.update(done.n_prompts)
    return Sweep(folder.path, n_prompts, n_made, n_errors, time.monotonic() - begun)


def _run(engine: str, worker: Worker, parts: Iterable[Part], workers: int, gpus: float | int) -> Iterator[Done]:
    if engine == "ray":
        return on_ray(worker.work, parts, workers, gpus)
    return here(worker, parts) if workers == 1 else in_processes(worker.work, parts, workers)


def _parts(contexts: Iterator[Context], size: int, limit: int | None, shard: tuple[int, int]) -> Iterator[Part]:
    """The parts of a shard, of which the last may have fewer prompts."""
    contexts = islice(contexts, limit)
    number = 0
    while some := tuple(islice(contexts, size)):
        if number % shard[1] == shard[0]:
            yield Part(number, number * size, some)
        number += 1


def _shard(given: str | tuple[int, int] | None) -> tuple[int, int]:
    if given is None:
        return 0, 1
    if given == "auto":
        if (found := _said()) is None:
            raise ValueError(
                '`shard` must be written out where neither Slurm nor torchrun say it, "0/8" for the first of eight.'
            )
        given = found
    try:
        number, of = map(int, given.split("/")) if isinstance(given, str) else map(index, given)
    except (TypeError, ValueError) as error:
        raise ValueError(f'`shard` must be like "0/8", the first of eight, got {given!r}.') from error
    if of < 1:
        raise ValueError(f"`shard` must be of at least one run, got {given!r}.")
    if not 0 <= number < of:
        raise ValueError(f"`shard` must be from 0/{of} to {of - 1}/{of}, got {given!r}.")
    return number, of


def _said() -> tuple[int, int] | None:
    """Which of how many runs this is, by what Slurm and torchrun say; each task of an array may be several."""
    said = os.environ
    ranks = [(_number(rank), _number(of)) for rank, of in _RANKS if rank in said and of in said][:1]
    if _TASK + "ID" in said:
        task = _number(_TASK + "ID")
        first, last, step = (
            _number(_TASK + name) if _TASK + name in said else usual
            for name, usual in (("MIN", 0), ("MAX", task), ("STEP", 1))
        )
        n_tasks = (last - first) // step + 1
        if _TASK + "COUNT" in said and _number(_TASK + "COUNT") != n_tasks:
            raise ValueError(
                f"`shard` must be written out where the array is a list: it has {said[_TASK + 'COUNT']} tasks from "
                f'{first} to {last}, and nobody would run what those between should. "0/2" is the first of two.'
            )
        ranks.insert(0, ((task - first) // step, n_tasks))
    if not ranks:
        return None
    place, total = 0, 1
    for number, of in ranks:
        place, total = place * of + number, total * of
    return place, total


def _number(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except ValueError as error:
        raise ValueError(
            f'`shard` must be written out, such as "0/8": {variable} must be a number, got {os.environ[variable]!r}.'
        ) from error


def _numbers(given: Any) -> tuple[int, ...]:
    if given is None:
        return ()
    try:
        if isinstance(given, str):
            raise TypeError
        return tuple(map(index, given)) if isinstance(given, Iterable) else (index(given),)
    except TypeError as error:
        raise ValueError(f"`context_tokens` must be a whole number or several, got {given!r}.") from error


def _index(given: Any) -> Any:
    """A whole number as JSON can hold it; anything else as it is."""
    return index(given) if hasattr(given, "__index__") and not isinstance(given, bool) else given

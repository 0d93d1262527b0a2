"""Contexts: the prompts of a sweep, read from files or cut out of text, one after another."""

import csv
import hashlib
import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import index
from os import PathLike
from os.path import isfile
from pathlib import Path
from typing import Any

from pandas import DataFrame, Series, isna
from pandas.api.types import is_scalar

from tracedensity.model import Transformer

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
"""Files that prompts are read from; what is called otherwise may be text that is cut into them."""

_COLUMNS = ("prompt", "text", "content")
"""Where a table has its prompts, if nothing else is said: the first of these that it has."""

_ROWS = 1024
"""Rows of a Parquet file that are read together."""

_ROWS_APART = 32
"""So many first rows, if each may have columns of its own, must lack the prompt for a table to be refused."""

_LONGEST = 2**31 - 1
"""Characters in a cell of a CSV file; by itself, Python reads 2 ** 17."""

_BEGINNING = 2**13
"""Bytes in which a file that is no text shows it."""

_NO_TEXT = "the {} must be text that UTF-8 can write; the file has other bytes here."

_TITLE = re.compile(r"\s*= [^=].* =\s*")  # of an article, as WikiText writes it
_HEADING = re.compile(r"\s*=( =)+ .* =( =)+\s*")  # of a part of one


class _NoColumnError(ValueError):
    """A row without the column of prompts."""


@dataclass(frozen=True)
class Context:
    """One prompt of a sweep, and what is known of it.

    Attributes:
        id: Its name among all.
        prompt: Text or token ids.
        target: What comes next where it was taken from: text, which is read up to its first token, or a token id.
        document: What it was taken from. Contexts of one document are alike: intervals and cross-validation keep them
            together.
        source: The file.
        domain: What kind of text it is, if that was said.
        group: Contexts of one group have the same target and differ in how far back they reach.
        error: Why it could not be read; "" if it could.
    """

    id: str
    prompt: str | tuple[int, ...] = ""
    target: str | int | None = None
    document: str = ""
    source: str = ""
    domain: str = ""
    group: str = ""
    error: str = ""


@dataclass(frozen=True)
class Cut:
    """How text becomes contexts.

    A paragraph, which is a line, is cut into pieces that do not overlap, from its beginning; what is too short for one
    is left out, so that no context reaches over two paragraphs.

    Attributes:
        words: Words (what spaces part) of a context; the next word is its target.
        tokens: Tokens of a context, without one that begins a sequence; the next one is the target. Several numbers
            give several contexts for each target.
        per_document: At most so many pieces of each document.
    """

    words: int | None = None
    tokens: tuple[int, ...] = ()
    per_document: int | None = None

    def __post_init__(self) -> None:
        numbers = {"context_words": self.words, "per_document": self.per_document}
        numbers |= {"context_tokens": min(self.tokens)} if self.tokens else {}
        for name, number in numbers.items():
            whole = hasattr(number, "__index__") and not isinstance(number, bool)
            if number is not None and not (whole and index(number) >= 1):
                raise ValueError(f"`{name}` must be at least 1 and a whole number, got {number!r}.")
        if self.words is not None and self.tokens:
            raise ValueError("give one of `context_words` and `context_tokens`: a context is counted in one of them.")
        if self.per_document is not None and not self:
            raise ValueError("`per_document` must come with `context_words` or `context_tokens`: nothing is cut.")
        if len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"`context_tokens` must be different numbers, got {list(self.tokens)}.")

    def __bool__(self) -> bool:
        return self.words is not None or bool(self.tokens)

    def pieces(
        self, document: Context, number: int, line: str, model: Transformer, taken: dict[str, int]
    ) -> Iterator[Context]:
        """The contexts of a paragraph.

        Args:
            document: What the text is.
            number: Which of its paragraphs it is.
            line: The paragraph.
            model: Whose tokens are counted.
            taken: How many pieces documents have had, which grows.
        """
        name, whole = f"{document.id}:{number}", document.document or document.id
        if not _is_text(line):
            yield replace(document, id=name, prompt="", document=whole, error=_NO_TEXT.format("prompt"))
            return
        if self.per_document is not None and taken.get(whole, 0) >= self.per_document:
            return
        for piece, some in enumerate(self._by_words(line) if self.words is not None else self._by_tokens(line, model)):
            if self.per_document is not None and taken.get(whole, 0) >= self.per_document:
                return
            taken[whole] = taken.get(whole, 0) + 1
            several = len(some) > 1
            for prompt, target in some:
                length = f":{len(prompt) - len(model.beginning)}" if several else ""
                yield replace(
                    document, id=f"{name}:{piece}{length}", prompt=prompt, target=target, document=whole,
                    group=f"{name}:{piece}" if several else "",
                )  # fmt: skip

    def _by_words(self, line: str) -> Iterator[list[tuple[str, str]]]:
        words, step = line.split(), (self.words or 0) + 1
        for start in range(0, len(words) - step + 1, step):
            *context, target = words[start : start + step]
            yield [(" ".join(context), " " + target)]

    def _by_tokens(self, line: str, model: Transformer) -> Iterator[list[tuple[tuple[int, ...], int]]]:
        ids, longest = model.pieces(line), max(self.tokens)
        for start in range(0, len(ids) - longest, longest + 1):
            end = start + longest
            yield [((*model.beginning, *ids[end - length : end]), ids[end]) for length in self.tokens]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Where contexts come from; they are read anew each time, and never all held at once.

    Attributes:
        given: Files; or prompts, a table of them or a list of records among them.
        cut: How their text becomes contexts; a false one if each is a prompt as it is.
        column: Where tables have their prompts.
    """

    given: tuple[Path, ...] | Sequence[Any]
    cut: Cut
    column: str | None = None

    @classmethod
    def of(cls, prompts: object, cut: Cut, column: str | None = None) -> "Corpus":
        """The contexts of what a user gives.

        Args:
            prompts: Files, one or several; a pandas DataFrame; or a list of prompts (texts or token ids) or of
                dictionaries like the rows of one.
            cut: How text becomes contexts.
            column: Which column holds the prompts.

        Raises:
            ValueError: If it is none of these.
        """
        if isinstance(prompts, str | PathLike):
            prompts = [Path(prompts)]
        if isinstance(prompts, DataFrame):
            prompts = prompts.set_axis([*map(str, prompts.columns)], axis=1).to_dict(orient="records")
        elif isinstance(prompts, Series):
            prompts = prompts.tolist()
        if not isinstance(prompts, Sequence) or not len(prompts):
            raise ValueError(
                "`prompts` must be a file, several files, a DataFrame or a list of prompts, got "
                + ("none." if isinstance(prompts, Sequence) else f"a {type(prompts).__name__}.")
            )
        paths: list[Any] = list(prompts)
        if any(isinstance(each, PathLike) or _is_file(each) for each in paths):
            if wrong := [each for each in paths if not isinstance(each, str | PathLike)]:
                raise ValueError(
                    f"`prompts` must be files only or prompts only, got files and a {type(wrong[0]).__name__}."
                )
            return cls(tuple(_file(Path(each), cut) for each in paths), cut, column)
        if all(isinstance(each, str) and each.endswith(SUFFIXES) and not set(each) & set(" \n") for each in paths):
            raise ValueError(f"`prompts` must be files that exist, or prompts, got {paths[0]!r}, which does not exist.")
        return cls(prompts, cut, column)

    def contexts(self, model: Transformer) -> Iterator[Context]:
        """All of them, in an order that is always the same."""
        if self._files is None:
            yield from self._of_rows(("prompts", "", None), enumerate(self.given), model)
            return
        names = _distinct(self._files)
        for path, name in zip(self._files, names, strict=True):
            if (read := _READERS.get(path.suffix)) is None:
                yield from self._of_text(path, name, model)
            else:
                yield from self._of_rows((name, name, path), read(path), model)

    @property
    def _files(self) -> tuple[Path, ...] | None:
        return self.given if isinstance(self.given, tuple) and isinstance(self.given[0], Path) else None

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the contexts are made of, as what JSON can hold: the same for the same contexts, wherever files are."""
        if self._files is None:
            digest = hashlib.sha256()
            for each in self.given:
                digest.update(json.dumps(each, default=_plain, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            sources = [{"name": "prompts", "sha256": digest.hexdigest()}]
        else:
            names = _distinct(self._files)
            sources = [{"name": name, "sha256": _sha256(path)} for path, name in zip(self._files, names, strict=True)]
        return {
            "sources": sources,
            "context_words": self.cut.words,
            "context_tokens": list(self.cut.tokens),
            "per_document": self.cut.per_document,
            "column": self.column,
        }

    def _of_text(self, path: Path, name: str, model: Transformer) -> Iterator[Context]:
        """Each line of a text file, or what its documents are cut into.

        Documents begin where WikiText, which begins with one, has the title of an article; or else behind empty lines,
        in which there are no spaces either. Titles are no text. Where no line is long enough for a context, lines are
        taken for those of wrapped paragraphs, between which there are empty lines, and the file for one document.
        """
        if not self.cut:
            for number, line in enumerate(_lines(path)):
                if line.strip():
                    own = f"{name}:{number}"
                    yield Context(own, prompt=line, document=own, source=name)
            return
        cut = False
        for context in self._of_lines(path, name, model):
            cut = True
            yield context
        if not cut:
            taken: dict[str, int] = {}
            for number, paragraph in enumerate(_paragraphs(path)):
                yield from self.cut.pieces(Context(name, source=name), number, paragraph, model, taken)

    def _of_lines(self, path: Path, name: str, model: Transformer) -> Iterator[Context]:
        """What the documents of a text file are cut into, line by line."""
        first = next((line for line in _lines(path) if line.strip()), "")
        with_titles = _TITLE.fullmatch(first)  # a formula in other text may look like one
        number = paragraph = 0
        taken: dict[str, int] = {}
        for line in _lines(path):
            # a line of spaces sets verses apart, and must not make documents of one book
            if _TITLE.fullmatch(line) if with_titles else not line:
                number, paragraph = number + bool(paragraph), 0
                taken.clear()
            elif line.strip() and not (with_titles and _HEADING.fullmatch(line)):
                yield from self.cut.pieces(Context(f"{name}:{number}", source=name), paragraph, line, model, taken)
                paragraph += 1

    def _of_rows(
        self, place: tuple[str, str, Path | None], rows: Iterable[tuple[int, Any]], model: Transformer
    ) -> Iterator[Context]:
        """Prompts of a table or list, or what each text of it is cut into."""
        name, source, path = place
        taken: dict[str, int] = {}
        enough = _ROWS_APART if path is None or path.suffix == ".jsonl" else 1
        held: list[Context] = []  # the first rows, as long as none has the column of prompts
        lacking, looking = "", True
        for number, row in rows:
            own = f"{name}:{number}"
            try:
                context = self._of_row(row, own, source)
            except ValueError as error:
                context = Context(own, document=own, source=source, error=str(error))
                if looking:
                    held.append(context)
                    lacking = lacking or str(error) * isinstance(error, _NoColumnError)
                    if len(held) < enough:
                        continue
                    if lacking:
                        break
                    context = held.pop()
            else:
                looking = False
            yield from held
            held = []
            if self.cut and isinstance(context.prompt, str) and not context.error:
                for paragraph, line in enumerate(context.prompt.splitlines()):
                    yield from self.cut.pieces(context, paragraph, line, model, taken)
            else:
                yield context
        if held and lacking:  # all others would say the same
            where = "" if path is None else f"{path}: "
            raise ValueError(f"`prompts`: {where}{lacking} Say which it is with `column`.")
        yield from held

    def _of_row(self, row: Any, name: str, source: str) -> Context:
        if isinstance(row, ValueError):
            raise row
        if not isinstance(row, Mapping):
            return Context(name, _prompt(row), document=name, source=source)
        columns = _COLUMNS if self.column is None else (self.column,)
        column = next((each for each in columns if each in row), None)
        if column is None:
            raise _NoColumnError(f"the column of prompts must be one of {list(columns)}, got {list(row)[:8]}.")
        own = _text(row.get("id")) or name
        return Context(
            own,
            _prompt(row[column]),
            _target(row.get("target")),
            document=_text(row.get("document")) or own,
            source=source,
            domain=_text(row.get("domain")),
            group=_text(row.get("group")),
        )


def _file(path: Path, cut: Cut) -> Path:
    if not isfile(path):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(
            f"`prompts` must be files, got {str(path)!r}, which {what}. Prompts themselves go in a list without files."
        )
    with path.open("rb") as file:
        beginning = file.read(_BEGINNING)
    if beginning.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise ValueError(
            f"`prompts` must be UTF-8, got {str(path)!r}, which is UTF-16. `iconv -f UTF-16 -t UTF-8` makes it that."
        )
    if path.suffix not in SUFFIXES:
        if not cut:
            raise ValueError(
                f"`prompts` must be files that end in one of {', '.join(SUFFIXES)}, got {str(path)!r}. Any other file "
                "of text needs `context_words` or `context_tokens`, to be cut into prompts."
            )
        if b"\0" in beginning:
            raise ValueError(f"`prompts` must be files of text, got {str(path)!r}, which has bytes that are none.")
    return path


def _distinct(paths: Sequence[Path]) -> list[str]:
    """Names of files; where two are called alike, with a number."""
    names: list[str] = []
    for path in paths:
        own = written(path.name)
        name, number = own, 2
        while name in names:
            name, number = f"{own}#{number}", number + 1
        names.append(name)
    return names


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _lines(path: Path) -> Iterator[str]:
    # bytes that are no UTF-8 are kept apart, so that only what has them is an error
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for line in file:
            yield line.rstrip("\n")


def _paragraphs(path: Path) -> Iterator[str]:
    """What stands between empty lines, each on one line."""
    for empty, lines in groupby(_lines(path), lambda line: not line.strip()):
        if not empty:
            yield " ".join(line.strip() for line in lines)


def _of_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    for line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = ValueError(f"the line is no JSON ({error}).")
        yield number, row
        number += 1


def _of_csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        longest = csv.field_size_limit(_LONGEST)
        try:
            # strict: a quote that nothing closes would take all that is left
            yield from enumerate(csv.DictReader(file, strict=True))
        except csv.Error as error:
            raise ValueError(f"`prompts` must be CSV files, got {str(path)!r}, which is none ({error}).") from error
        finally:
            csv.field_size_limit(longest)


def _of_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"`prompts` must be Parquet files, got {str(path)!r}, which is none ({error}).") from error
    with file:
        batches = file.iter_batches(batch_size=_ROWS)
        try:
            yield from enumerate(row for batch in batches for row in batch.to_pylist())
        except (pa.ArrowException, OSError) as error:  # behind its footer, which was read first
            raise ValueError(f"`prompts` must be whole Parquet files, got {str(path)!r}, damaged ({error}).") from error


_READERS = {".jsonl": _of_jsonl, ".csv": _of_csv, ".parquet": _of_parquet}


def _prompt(given: Any) -> str | tuple[int, ...]:
    if isinstance(given, str):
        return given
    if _missing(given):
        raise ValueError("the prompt is missing.")
    try:
        if isinstance(given, bytes):
            raise TypeError
        return tuple(index(each) for each in (given.tolist() if hasattr(given, "tolist") else given))
    except TypeError as error:
        raise ValueError(f"the prompt must be text or token ids, got a {type(given).__name__}.") from error


def _target(given: Any) -> str | int | None:
    if _missing(given):
        return None
    if isinstance(given, str):
        if not _is_text(given):
            raise ValueError(_NO_TEXT.format("target"))
        return given
    try:
        return index(_whole(given))
    except TypeError as error:
        raise ValueError(f"the target must be text or a token id, got {given!r}.") from error


def _whole(value: Any) -> Any:
    """The whole number that pandas makes a float of, where others of its column are missing; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _missing(value: Any) -> bool:
    return not value if isinstance(value, str) else bool(is_scalar(value) and isna(value))


def _text(value: Any) -> str:
    value = _whole(value)
    return "" if _missing(value) else written(str(value))


def written(text: str) -> str:
    """Text as it can be written: what is no character becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _is_text(text: str) -> bool:
    return written(text) == text


def _is_file(given: Any) -> bool:
    return isinstance(given, str) and given.endswith(SUFFIXES) and isfile(given)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)

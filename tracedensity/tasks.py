"""Tasks to be had: pairs of prompts made for the tokenizer of any model, or read from a file.

The generators fill templates with words that the tokenizer holds as single tokens, so that clean and corrupted
prompts are equally long, position by position. The same seed gives the same pairs, and fewer of them are the first of
more. No pair comes twice. How many of them a model really solves, and by how much, says `Task.solved`:
``td.tasks.ioi(model).solved(model)``; with ``solved=True`` only those are kept.
"""

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple, TypeAlias

from tracedensity.model import Prompt, Transformer, as_transformer
from tracedensity.task import Task

_AT_ONCE = 1024
"""Candidates that are looked at together."""

_TRIES = 20
"""Candidates that are drawn at most, per pair that is asked for (of 32 pairs at least, where they must be solved)."""


def ioi(
    model: object,
    n: int = 32,
    *,
    seed: int = 0,
    solved: bool = False,
    corruption: Literal["third", "swap"] = "third",
) -> Task:
    """Indirect object identification: "When Mary and John went to the store, John gave the book to" -> " Mary".

    The distractor is the subject, " John". The indirect object is mentioned first or second, by chance.

    Args:
        model: A model, or a name for `load_model`; its tokenizer decides on the names.
        n: Number of pairs.
        seed: Decides on the pairs.
        solved: Whether to keep only pairs that the model solves, its answer's logit above the distractor's.
        corruption: What becomes of the subject's second mention: a third name (the default), after which nothing
            says whom to prefer; or the other name (``"swap"``), which makes the distractor right.

    Raises:
        ValueError: If the tokenizer has too few names, or there are not `n` pairs (that the model solves).
    """
    if corruption not in ("third", "swap"):
        raise ValueError(f"`corruption` must be 'third' or 'swap', got {corruption!r}.")
    transformer = _reader(model, "ioi")
    names = _held(transformer, (_WOMEN + _MEN).split(), 3 if corruption == "third" else 2, "names")

    def draw(random: Random) -> _Pair:
        indirect, subject, *third = random.sample(names, 3 if corruption == "third" else 2)
        first, second = random.sample((indirect, subject), 2)
        template = random.choice(_IOI)
        rest = {"place": random.choice(_PLACES.split()), "thing": random.choice(_THINGS.split())}

        def prompt(giver: str) -> str:
            return template.format(first=first, second=second, giver=giver, **rest)

        return _Pair(prompt(subject), prompt(*third or [indirect]), (f" {indirect}",), (f" {subject}",))

    return _drawn("ioi", transformer, draw, n, seed, solved)


def greater_than(model: object, n: int = 32, *, seed: int = 0, solved: bool = False) -> Task:
    """Greater-than: "The war lasted from the year 1732 to the year 17" -> a year after 32.

    Answers are all tokens of two digits above the year that it began in, distractors are all others. The corrupted war
    began in "01", so that nearly every year is possible.

    Args:
        model: A model, or a name for `load_model`; its tokenizer must read a year as century and two digits.
        n: Number of pairs.
        seed: Decides on the pairs.
        solved: Whether to keep only pairs that the model solves, answers together more probable than distractors.

    Raises:
        ValueError: If the tokenizer reads years otherwise, or there are not `n` pairs (that the model solves).
    """
    transformer = _reader(model, "greater_than")
    two_digits = [f"{year:02}" for year in range(100) if _is_single(transformer, f"{year:02}")]

    def starts(century: int) -> list[str]:
        """Years of a century that are read as that century and two digits, and have years before and after them."""
        since = f"since the year {century}"
        if not _is_single(transformer, f" {century}") or not _follows(transformer, since, "01"):
            return []
        return [year for year in two_digits[1:-1] if year > "01" and _follows(transformer, since, year)]

    years = {}
    if "01" in two_digits:
        years = {century: some for century in range(11, 19) if (some := starts(century))}
    if not years:
        raise ValueError(
            f"`model` must have a tokenizer that reads a year as two tokens, century and two digits, got "
            f"{transformer.texts(transformer.tokens('since 1732')[-4:])} at the end of 'since 1732' with "
            f"{transformer.name}. Take another task."
        )

    def draw(random: Random) -> _Pair:
        century = random.choice(sorted(years))
        start = random.choice(years[century])
        event = random.choice(_EVENTS.split())
        clean, corrupted = (
            f"The {event} lasted from the year {century}{year} to the year {century}" for year in (start, "01")
        )
        later = tuple(year for year in two_digits if year > start)
        return _Pair(clean, corrupted, later, tuple(year for year in two_digits if year <= start))

    return _drawn("greater_than", transformer, draw, n, seed, solved)


def agreement(model: object, n: int = 32, *, seed: int = 0, solved: bool = False) -> Task:
    """Agreement of subject and verb in number: "The keys near the box" -> " are", not " is".

    The noun between them, of the other number, attracts the wrong verb. In the corrupted prompt the subject has the
    other number, and the distractor is right.

    Args:
        model: A model, or a name for `load_model`; its tokenizer decides on nouns and verbs.
        n: Number of pairs.
        seed: Decides on the pairs.
        solved: Whether to keep only pairs that the model solves, its answer's logit above the distractor's.

    Raises:
        ValueError: If the tokenizer has too few words, or there are not `n` pairs (that the model solves).
    """
    transformer = _reader(model, "agreement")
    nouns = _held(transformer, _couples(_NOUNS), 2, "nouns in both numbers")
    verbs = _held(transformer, _couples(_VERBS), 1, "verbs in both numbers")

    def draw(random: Random) -> _Pair:
        subject, attractor = random.sample(nouns, 2)
        verb = random.choice(verbs)
        number = random.randrange(2)  # of the subject: 0 is singular
        between = random.choice(_BETWEEN)
        clean, corrupted = (f"The {subject[i]} {between} the {attractor[1 - number]}" for i in (number, 1 - number))
        return _Pair(clean, corrupted, (f" {verb[number]}",), (f" {verb[1 - number]}",))

    return _drawn("agreement", transformer, draw, n, seed, solved)


def pronoun(model: object, n: int = 32, *, seed: int = 0, solved: bool = False) -> Task:
    """Gendered pronouns: "So Mary is a very good friend, isn't" -> " she", not " he".

    Also " She", " her" and their counterparts, as the template asks for. The corrupted prompt has a name, or a word
    such as "mother", of the other gender.

    Args:
        model: A model, or a name for `load_model`; its tokenizer decides on names and pronouns.
        n: Number of pairs.
        seed: Decides on the pairs.
        solved: Whether to keep only pairs that the model solves, its answer's logit above the distractor's.

    Raises:
        ValueError: If the tokenizer has too few words, or there are not `n` pairs (that the model solves).
    """
    transformer = _reader(model, "pronoun")
    people = _held(transformer, _couples(_PEOPLE), 0, "persons")
    persons = [[couple[gender] for couple in people] for gender in range(2)]
    at_least = 0 if people else 1
    names = [
        _held(transformer, _WOMEN.split(), at_least, "names of women"),
        _held(transformer, _MEN.split(), at_least, "names of men"),
    ]
    slots = {"{name}": names, "{person}": persons}
    templates = [
        (text, pronouns.split(), words)
        for text, pronouns in _PRONOUN
        for slot, words in slots.items()
        if slot in text and all(words) and all(_is_single(transformer, f" {word}") for word in pronouns.split())
    ]
    if not templates:
        raise ValueError(
            f"`model` must hold pronouns of both genders as single tokens, got none with {transformer.name}. "
            "Take another task."
        )

    def draw(random: Random) -> _Pair:
        text, pronouns, words = random.choice(templates)
        gender = random.randrange(2)
        rest = {"place": random.choice(_PLACES.split()), "thing": random.choice(_THINGS.split())}
        clean, corrupted = (
            text.format(name=word, person=word, **rest)
            for word in (random.choice(words[gender]), random.choice(words[1 - gender]))
        )
        return _Pair(clean, corrupted, (f" {pronouns[gender]}",), (f" {pronouns[1 - gender]}",))

    return _drawn("pronoun", transformer, draw, n, seed, solved)


def capitals(model: object, n: int = 32, *, seed: int = 0, solved: bool = False) -> Task:
    """Capitals of countries: "The capital of France is the city of" -> " Paris".

    The corrupted prompt asks for another country, whose capital is the distractor.

    Args:
        model: A model, or a name for `load_model`; its tokenizer decides on countries and cities.
        n: Number of pairs.
        seed: Decides on the pairs.
        solved: Whether to keep only pairs that the model solves, its answer's logit above the distractor's.

    Raises:
        ValueError: If the tokenizer has too few words, or there are not `n` pairs (that the model solves).
    """
    transformer = _reader(model, "capitals")
    known = _held(transformer, _couples(_CAPITALS), 2, "countries and their capitals")

    def draw(random: Random) -> _Pair:
        (country, city), (other, its_city) = random.sample(known, 2)
        text = random.choice(_CAPITAL)
        return _Pair(text.format(country), text.format(other), (f" {city}",), (f" {its_city}",))

    return _drawn("capitals", transformer, draw, n, seed, solved)


def docstring(model: object, n: int = 32, *, seed: int = 0, solved: bool = False) -> Task:
    """Docstrings: which argument of a Python function is described next.

    The function is defined with four arguments, and its docstring describes the first two: the answer is the third,
    the distractor another of the four. The corrupted definition has four other names; the docstring is the same.

    Args:
        model: A model, or a name for `load_model`; its tokenizer decides on the names of arguments.
        n: Number of pairs.
        seed: Decides on the pairs.
        solved: Whether to keep only pairs that the model solves, its answer's logit above the distractor's.

    Raises:
        ValueError: If the tokenizer has too few words, or there are not `n` pairs (that the model solves).
    """
    transformer = _reader(model, "docstring")
    names = _held(transformer, _ARGUMENTS.split(), 8, "names of arguments")

    def draw(random: Random) -> _Pair:
        chosen = random.sample(names, 8)
        arguments, others = chosen[:4], chosen[4:]
        function, *said = (random.choice(_THINGS.split()) for _ in range(6))
        text = (
            f'def {function}(self, {{}}, {{}}, {{}}, {{}}):\n    """{said[0]} for the {said[1]}\n\n'
            f"    :param {arguments[0]}: the {said[2]}\n    :param {arguments[1]}: {said[3]} and {said[4]}\n    :param"
        )
        distractor = random.choice([*arguments[:2], arguments[3]])
        return _Pair(text.format(*arguments), text.format(*others), (f" {arguments[2]}",), (f" {distractor}",))

    return _drawn("docstring", transformer, draw, n, seed, solved)


def induction(model: object, n: int = 32, *, seed: int = 0, solved: bool = False, length: int = 10) -> Task:
    """Induction on random tokens: A B C ... Y Z A B C ... Y -> Z.

    The sequence comes twice, the second time without its end, which is the answer; the distractor is another of its
    tokens. In the corrupted prompt the token that Z followed the first time is one that comes nowhere else.

    Args:
        model: A model, or a name for `load_model`. It needs no tokenizer.
        n: Number of pairs.
        seed: Decides on the pairs.
        solved: Whether to keep only pairs that the model solves, its answer's logit above the distractor's.
        length: Number of tokens of the sequence, all different and none of the tokenizer's special ones.

    Raises:
        ValueError: If the sequence does not fit the model, or there are not `n` pairs (that the model solves).
    """
    transformer = as_transformer(model)
    start, ordinary = _plain_tokens(transformer)
    longest = min((transformer.n_ctx - len(start) + 1) // 2, len(ordinary) - 1)
    if not 3 <= length <= longest:
        raise ValueError(
            f"`length` must be from 3 to {longest}, which context and vocabulary of {transformer.name} allow, "
            f"got {length}."
        )

    def draw(random: Random) -> _Pair:
        *sequence, other = random.sample(ordinary, length + 1)
        again = sequence[:-1]
        corrupted = [*sequence[:-2], other, sequence[-1], *again]
        distractor = random.choice(sequence[:-2])
        return _Pair((*start, *sequence, *again), (*start, *corrupted), (sequence[-1],), (distractor,))

    return _drawn("induction", transformer, draw, n, seed, solved)


_GENERATORS: dict[str, Callable[..., Task]] = {
    "ioi": ioi,
    "greater_than": greater_than,
    "agreement": agreement,
    "pronoun": pronoun,
    "capitals": capitals,
    "docstring": docstring,
    "induction": induction,
}

NAMES: tuple[str, ...] = tuple(_GENERATORS)
"""The tasks that `make` knows."""


def make(name: str, model: object, **options: Any) -> Task:
    """The task of a name, one of `NAMES`; the options are those of the function of that name.

    Raises:
        ValueError: If there is no such task, or that function raises one.
    """
    if name not in _GENERATORS:
        raise ValueError(f"`name` must be a task, got {name!r}. There are {', '.join(NAMES)}.")
    return _GENERATORS[name](model, **options)


# -- files ----------------------------------------------------------------------------------------


def from_csv(
    path: str | os.PathLike[str],
    model: object = None,
    *,
    clean: str = "clean",
    corrupted: str | None = "corrupted",
    answer: str | None = "answer",
    distractor: str | None = "distractor",
    name: str | None = None,
) -> Task:
    """A task from a CSV file (UTF-8, commas) with a header and one pair per row.

    A cell is text, its spaces kept: answers mostly begin with one. A JSON list such as ``[464, 3290]`` is a prompt in
    token ids, or several answers that count alike; a number is an id in a column named ``..._idx`` only. The columns
    ``correct_idx`` and ``incorrect_idx`` of public benchmarks are answer and distractor where those are not found.

    Args:
        path: The file.
        model: A model, or a name for `load_model`. With one, lengths and words are checked now, row by row, and the
            task is bound to its tokenizer; without, when the task is used.
        clean: Name of the column with the prompts.
        corrupted: That of their counterfactuals; None for none. The column may be missing.
        answer: That of the right next tokens; None if nothing is asked, no distractor either.
        distractor: That of the wrong ones; None for none. The column may be missing.
        name: What to call the task; by default the file's name.

    Raises:
        ValueError: If a column or a value is missing, a pair is of unequal length, or the model cannot read a row.
        FileNotFoundError: If there is no such file.
    """
    file = _content(path)
    try:
        lines = csv.reader(StringIO(file, newline=""), strict=True)
        table = [(f"row {number}", cells) for number, cells in enumerate(lines, 1) if cells]  # the header is row 1
    except csv.Error as error:
        raise ValueError(f"`path` must be a CSV file, got {str(path)!r}, which is damaged ({error}).") from error
    header = table[0][1] if table else []
    rows = []
    for where, cells in table[1:]:
        if len(cells) != len(header):
            raise ValueError(
                f"`path` must have as many cells in every row as in its header, {len(header)}, got {len(cells)} in "
                f"{str(path)!r}, {where}. Put quotes around text with commas."
            )
        rows.append((where, {key: _cell(key, cell) for key, cell in zip(header, cells, strict=True)}))
    columns = {"clean": clean, "corrupted": corrupted, "answer": answer, "distractor": distractor}
    return _from_rows(path, rows, model, columns, name)


def from_jsonl(
    path: str | os.PathLike[str],
    model: object = None,
    *,
    clean: str = "clean",
    corrupted: str | None = "corrupted",
    answer: str | None = "answer",
    distractor: str | None = "distractor",
    name: str | None = None,
) -> Task:
    """A task from a file with one JSON object per line.

    Prompts are texts or lists of token ids; answers and distractors are texts, ids, or lists of them that count alike.
    All else is as in `from_csv`.

    Raises:
        ValueError: If a key or a value is missing, a pair is of unequal length, or the model cannot read a line.
        FileNotFoundError: If there is no such file.
    """
    rows = []
    for number, line in enumerate(_content(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(
                f"`path` must hold one JSON object per line, got {line[:40]!r} in {str(path)!r}, line {number}."
            )
        rows.append((f"line {number}", row))
    columns = {"clean": clean, "corrupted": corrupted, "answer": answer, "distractor": distractor}
    return _from_rows(path, rows, model, columns, name)


_ALSO = {"answer": "correct_idx", "distractor": "incorrect_idx"}
"""What public benchmarks call these columns."""


def _from_rows(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[str, dict[str, Any]]],
    model: object,
    columns: Mapping[str, str | None],
    name: str | None,
) -> Task:
    """The task in a table, of which each row comes with the words that say where it is."""
    file = repr(str(path))
    if not rows:
        raise ValueError(f"`path` must hold at least one prompt, got {file}, which has none.")
    known = list(dict.fromkeys(key for _, row in rows for key in row))
    transformer = None if model is None else as_transformer(model)
    values: dict[str, Any] = {}
    found: dict[str, str] = {}
    for role, column in columns.items():
        named_by_user = column != role
        if column is None or (role == "distractor" and "answer" not in found and not named_by_user):
            continue
        here = [key for key in (column, *([] if named_by_user else [_ALSO.get(role)])) if key in known]
        if not here and (named_by_user or role in ("clean", "answer")):
            raise ValueError(f"`{role}` must be a column of {file}, got {column!r}. It has {', '.join(known)}.")
        if here:
            found[role] = str(here[0])
            values[role] = [
                _checked(row.get(found[role]), role, transformer, f"{file}, {where}, column {found[role]!r}")
                for where, row in rows
            ]
    for (where, _), one, other in zip(rows, values["clean"], values.get("corrupted", []), strict=False):
        lengths = [_length(prompt, transformer) for prompt in (one, other)]
        if None not in lengths and lengths[0] != lengths[1]:
            raise ValueError(
                f"`path` must hold pairs of equal length, got {lengths[1]} tokens in column {found['corrupted']!r} for "
                f"{lengths[0]} in column {found['clean']!r} in {file}, {where}."
            )
    vocabulary = "" if transformer is None else transformer.vocabulary
    return Task(**values, name=Path(path).stem if name is None else name, vocabulary=vocabulary)


def _content(path: str | os.PathLike[str]) -> str:
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"`path` must be a file, got {str(path)!r}, which {what}.")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # as spreadsheets write it, with a mark at the beginning
    except UnicodeDecodeError as error:
        raise ValueError(f"`path` must be a text file in UTF-8, got {str(path)!r}.") from error


def _cell(column: str, cell: str) -> Any:
    if column.endswith("_idx") or cell.startswith("["):
        try:
            return json.loads(cell)
        except ValueError:
            pass  # text that begins with a bracket
    return cell


def _checked(value: Any, role: str, transformer: Transformer | None, where: str) -> Any:
    """A value of a file, if it is what its role asks for."""
    is_prompt = role in ("clean", "corrupted")
    if value is None or value in ("", []):
        raise ValueError(f"`{role}` must be given in every row, got nothing in {where}.")
    options = value if isinstance(value, list) else [value]
    if is_prompt:
        sound = isinstance(value, str) or (value is options and all(map(_is_id, options)))
    else:
        sound = all(isinstance(option, str) or _is_id(option) for option in options)
    if not sound:
        expected = "text or a list of token ids" if is_prompt else "a token, as text or id, or a list of them"
        raise ValueError(f"`{role}` must be {expected}, got {value!r} in {where}.")
    if transformer is not None:
        try:
            if is_prompt:
                transformer.tokens(value)
            else:
                for option in options:
                    transformer.single_token(option, role)
        except ValueError as error:
            raise ValueError(f"{error} It is in {where}.") from error
    return value


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _length(prompt: str | list[int], transformer: Transformer | None) -> int | None:
    """Number of tokens; None for text that there is no model to read."""
    if transformer is not None:
        return len(transformer.tokens(prompt))
    return None if isinstance(prompt, str) else len(prompt)


# -- pairs ----------------------------------------------------------------------------------------

_Entry: TypeAlias = Any  # a word, or a couple of words


class _Pair(NamedTuple):
    clean: Prompt
    corrupted: Prompt
    answer: tuple[str | int, ...]
    distractor: tuple[str | int, ...]


def _drawn(
    name: str, transformer: Transformer, draw: Callable[[Random], _Pair], n: int, seed: int, solved: bool
) -> Task:
    """The first `n` pairs that are drawn, are new, fit the tokenizer, and are solved if that is asked for."""
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    random = Random(f"{name} {seed}")
    seen: set[tuple[Prompt, Prompt]] = set()
    kept: list[_Pair] = []
    n_new = 0
    n_drawn = min(max(n, 32), _AT_ONCE) if solved else min(n, _AT_ONCE)  # few may be solved, and the model runs on many
    for _ in range(-(-_TRIES * n // n_drawn)):
        new, n_before = [], len(seen)
        for pair in (draw(random) for _ in range(n_drawn)):
            prompts = pair.clean, pair.corrupted
            if prompts not in seen and _fits(transformer, pair):
                new.append(pair)
            seen.add(prompts)
        n_new += len(new)
        if n_drawn == _AT_ONCE and len(seen) == n_before:
            break  # there are hardly any more
        if new and solved:
            kept += [new[i] for i in _task(name, transformer, new).solved(transformer).solved.nonzero()[:, 0].tolist()]
        else:
            kept += new
        if len(kept) >= n:
            task = _task(name, transformer, kept[:n])
            task.examples(transformer)  # raises where a pair is of unequal length
            return task
    if solved and n_new >= n:
        raise ValueError(
            f"`n` must be at most the number of pairs that {transformer.name} solves, {len(kept)} of the {n_new} of "
            f"{name!r} that were tried, got {n}. Ask for fewer, or take another task or model."
        )
    raise ValueError(
        f"`n` must be at most the number of different pairs of {name!r} that the tokenizer of {transformer.name} "
        f"allows, about {n_new}, got {n}. Ask for fewer."
    )


def _task(name: str, transformer: Transformer, pairs: Sequence[_Pair]) -> Task:
    clean, corrupted, answer, distractor = zip(*pairs, strict=True)
    return Task(clean, corrupted, answer, distractor, name=name, vocabulary=transformer.vocabulary)


def _fits(transformer: Transformer, pair: _Pair) -> bool:
    """Whether prompts are equally long, and answer and distractor are read as tokens of their own after them."""
    clean, corrupted = transformer.tokens(pair.clean), transformer.tokens(pair.corrupted)
    return len(clean) == len(corrupted) and all(
        any(_follows(transformer, pair.clean, option) for option in options)
        for options in (pair.answer, pair.distractor)
    )


def _follows(transformer: Transformer, prompt: Prompt, word: str | int) -> bool:
    """Whether the tokenizer reads a word after a prompt as one more token."""
    if not isinstance(prompt, str) or not isinstance(word, str):
        return True
    whole = [*transformer.tokens(prompt).tolist(), transformer.single_token(word)]
    return transformer.tokens(prompt + word).tolist() == whole


# -- words ----------------------------------------------------------------------------------------


def _reader(model: object, task: str) -> Transformer:
    transformer = as_transformer(model)
    if transformer.model.tokenizer is None:
        raise ValueError(
            f"`model` must have a tokenizer for the task {task!r}, got none with {transformer.name}. "
            "The task 'induction' needs none."
        )
    return transformer


def _held(transformer: Transformer, entries: Sequence[_Entry], at_least: int, what: str) -> list[_Entry]:
    """The words, or couples of words, that are single tokens after a space."""
    held = [
        entry
        for entry in entries
        if all(_is_single(transformer, f" {word}") for word in ([entry] if isinstance(entry, str) else entry))
    ]
    if len(held) < at_least:
        raise ValueError(
            f"`model` must hold at least {at_least} {what} of this task as single tokens, got {len(held)} of "
            f"{len(entries)} with {transformer.name}. Take another task, or a model with a larger vocabulary."
        )
    return held


def _is_single(transformer: Transformer, word: str) -> bool:
    try:
        transformer.single_token(word)
    except ValueError:
        return False
    return True


def _couples(text: str) -> list[tuple[str, str]]:
    """Couples of words written as ``one/other``."""
    return [(one, other) for one, other in (entry.split("/") for entry in text.split())]


def _plain_tokens(transformer: Transformer) -> tuple[list[int], list[int]]:
    """Ids that the model's prompts begin with, and those that stand for text; all where there is no tokenizer."""
    tokenizer: Any = transformer.model.tokenizer
    if tokenizer is None:
        return [], list(range(transformer.d_vocab))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    begin = transformer.tokens("a").tolist()[:1]
    # embeddings are often padded to a round number that the tokenizer does not reach
    ordinary = [i for i in range(min(transformer.d_vocab, len(tokenizer))) if i not in special]
    return [i for i in begin if i in special], ordinary


_IOI = (
    "When {first} and {second} went to the {place}, {giver} gave the {thing} to",
    "After {first} and {second} met at the {place}, {giver} handed the {thing} to",
    "One day {first} and {second} were at the {place}, and {giver} wanted to give the {thing} to",
    "Once upon a time, {first} and {second} went to the {place}. {giver} gave a big {thing} to",
    "Then {first} and {second} had a long talk about the {thing}. At the {place}, {giver} said to",
    "While {first} and {second} sat near the {place}, {giver} showed the {thing} to",
)

_PRONOUN = (
    ("So {name} is a very good friend, isn't", "she he"),
    ("At the {place} we saw {name}, and there", "she he"),
    ("When {name} came back from the {place},", "she he"),
    ("Once upon a time, there was a little child named {name}. Every day,", "she he"),
    ("One day {name} saw a big {thing}. It was so nice that", "she he"),
    ("One day {name} went to the {place}. At the {place},", "she he"),
    ("One day {name} went to the {place} to play.", "She He"),
    ("We asked {name} about the {thing}.", "She He"),
    ("In the {place}, {name} lost", "her his"),
    ("At home {name} put the {thing} on", "her his"),
    ("The {person} came back from the {place}, because", "she he"),
    ("When the {person} saw the {thing},", "she he"),
    ("The {person} went to the {place}.", "She He"),
    ("At the {place} the {person} lost", "her his"),
)

_CAPITAL = (
    "The capital of {} is the city of",
    "The capital of {} is",
    "We travelled through {} and came to its capital, the city of",
    "He was born in {}, in the capital, which is called",
    "They left the country of {} and its capital,",
)

_BETWEEN = ("near", "behind", "beside", "before", "under", "by", "above", "next to", "in front of")

_WOMEN = (
    "Mary Anna Sarah Emma Emily Alice Jane Kate Lucy Laura Julia Helen Rose Ruth Grace Clara Ellen Martha Margaret "
    "Elizabeth Susan Linda Karen Lisa Nancy Betty Sandra Ashley Donna Carol Michelle Amanda Melissa Deborah Rebecca "
    "Rachel Hannah Olivia Sophia Maria Barbara Jennifer Jessica Patricia Amy Angela Nicole Katherine Christine "
    "Catherine Charlotte Diana Victoria Caroline Eleanor Fanny Harriet Agnes Anne Maggie Katharine Lily Mia Eva"
)

_MEN = (
    "John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony Mark Paul Steven "
    "Andrew Kenneth George Joshua Kevin Brian Edward Ronald Timothy Jason Jeffrey Ryan Jacob Gary Nicholas Eric "
    "Jonathan Stephen Larry Justin Scott Brandon Benjamin Samuel Gregory Frank Alexander Patrick Jack Dennis Peter "
    "Henry Adam Nathan Arthur Philip Walter Ralph Tom Harry Fred Martin Simon Oliver Edmund Felix Hugo Dick Tim Timmy"
)

_PEOPLE = (
    "woman/man girl/boy mother/father sister/brother daughter/son wife/husband queen/king lady/gentleman aunt/uncle "
    "princess/prince grandmother/grandfather mom/dad niece/nephew widow/widower actress/actor"
)

_PLACES = (
    "store garden park house school office station market church hospital restaurant library river beach farm bank "
    "hotel museum theatre kitchen"
)

_THINGS = (
    "book letter ring ball cake drink flower box key cup coat bag map apple picture basket knife hat lamp watch paper "
    "bottle shirt plate"
)

_EVENTS = (
    "war reign strike trial siege drought peace treaty plan journey project contract study march conflict revolt "
    "famine marriage quarrel voyage truce search"
)

_NOUNS = (
    "key/keys box/boxes book/books door/doors window/windows table/tables chair/chairs house/houses tree/trees "
    "flower/flowers road/roads river/rivers ship/ships boat/boats horse/horses dog/dogs cat/cats bird/birds "
    "letter/letters picture/pictures wall/walls room/rooms garden/gardens field/fields hill/hills stone/stones "
    "car/cars boy/boys girl/girls friend/friends soldier/soldiers officer/officers doctor/doctors teacher/teachers "
    "farmer/farmers lawyer/lawyers student/students king/kings author/authors lady/ladies man/men woman/women "
    "child/children village/villages island/islands"
)

_VERBS = "is/are was/were has/have does/do seems/seem looks/look"

_CAPITALS = (
    "France/Paris England/London Germany/Berlin Spain/Madrid Italy/Rome Russia/Moscow China/Beijing Japan/Tokyo "
    "Greece/Athens Egypt/Cairo Turkey/Ankara Iran/Tehran Iraq/Baghdad Syria/Damascus Lebanon/Beirut Portugal/Lisbon "
    "Ireland/Dublin Scotland/Edinburgh Wales/Cardiff Austria/Vienna Hungary/Budapest Poland/Warsaw Sweden/Stockholm "
    "Norway/Oslo Denmark/Copenhagen Finland/Helsinki Belgium/Brussels Canada/Ottawa Cuba/Havana Peru/Lima "
    "Chile/Santiago Ukraine/Kyiv Romania/Bucharest Bulgaria/Sofia Serbia/Belgrade Kenya/Nairobi Libya/Tripoli "
    "Venezuela/Caracas Afghanistan/Kabul Vietnam/Hanoi Thailand/Bangkok Qatar/Doha Australia/Canberra"
)

_ARGUMENTS = (
    "name size file last first count load state order time place value key line page group level left right width "
    "height length start end index data result error text word number path user date part point source target color "
    "limit total label table field weight mode type node model image string option filter message host port"
)

WORDS: tuple[frozenset[str], ...] = tuple(
    frozenset(words)
    for words in (
        _WOMEN.split(),
        _MEN.split(),
        _PLACES.split(),
        _THINGS.split(),
        _EVENTS.split(),
        [couple.split("/")[0] for couple in _NOUNS.split()],
        [couple.split("/")[1] for couple in _NOUNS.split()],
        [couple.split("/")[0] for couple in _PEOPLE.split()],
        [couple.split("/")[1] for couple in _PEOPLE.split()],
    )
)
"""Names and nouns, in sets of which one can stand for another."""

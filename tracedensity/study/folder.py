"""The folder of a sweep: what it says of itself, its parts, and how they are read."""

import errno
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from uuid import uuid4

import psutil

from tracedensity.alert import alert
from tracedensity.files import load
from tracedensity.study.table import SCHEMA, TableName, schema
from tracedensity.study.work import Files, Part, Work

if TYPE_CHECKING:
    import pandas as pd

MANIFEST = "sweep.json"

WANTED = "wanted.json"
"""How many prompts all runs together are about; it grows with `limit`, so that it is no part of the manifest."""

_NOTHING = "(nothing)"
"""What a manifest says of what it does not have."""

_BESIDE = re.compile(r"\..+\.(json|parquet|safetensors)\.(?P<host>.*)\.(?P<process>\d+)\.[0-9a-f]{32}")
"""What a file is called while it is written: which process of which machine does."""


_FULL = ": what is finished is kept; make room and run the same again"
_HINTS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EISDIR: ": a folder is where the sweep writes a file; remove it and run the same again",
}


@dataclass(frozen=True)
class Folder:
    """Where a sweep writes.

    Attributes:
        path: The folder.
        sweep: A hash of all that the rows depend on, which every file of rows has in it.
    """

    path: Path
    sweep: str

    @classmethod
    def of(cls, path: str | PathLike[str], about: Mapping[str, Any], resume: bool) -> "Folder":
        """The folder for a sweep, made or found.

        Args:
            path: The folder.
            about: All that the rows depend on, as what JSON can hold.
            resume: Whether it may hold a part of this sweep already.

        Raises:
            ValueError: If it is no folder, or holds something else or, unless it may, this sweep.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"`out` must be a folder, got {str(path)!r}, which is a file.")
        about = json.loads(json.dumps(about))  # tuples are lists
        folder = cls(path, sweep_of(about))
        manifest = path / MANIFEST
        if not manifest.exists():
            names = [name for name in os.listdir(path) if not name.startswith(".")] if path.is_dir() else []
            if names and not manifest.exists():  # another shard may have begun in between
                raise ValueError(f"`out` must be empty, new, or the folder of a sweep, got {str(path)!r}.")
            path.mkdir(parents=True, exist_ok=True)
            folder.write(MANIFEST, (json.dumps({"schema": SCHEMA, **about}, indent=2) + "\n").encode())
            return folder
        if not resume:
            raise ValueError(f"`out` must be new without `resume`, got {str(path)!r}, which holds a sweep.")
        held = read_manifest(path, "out")
        held.pop("schema")
        if (difference := _difference(held, about)) is not None:
            name, before, now = difference
            raise ValueError(
                f"`out` holds a sweep with {name} = {_short(before)}, got {_short(now)}. Go on with the options that "
                "it was begun with, which are in its sweep.json, or take another folder."
            )
        return folder

    def write(self, name: str, content: bytes) -> None:
        """Write a file beside, then rename it.

        Raises:
            OSError: If it cannot be written, with the file's name; nothing half written stays.
        """
        path = self.path / name
        beside = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.{uuid4().hex}")
        try:
            path.parent.mkdir(exist_ok=True)
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError as error:
            hint = _HINTS.get(error.errno or 0, "")
            raise OSError(error.errno, os.strerror(error.errno or 0) + hint, str(path)) from error
        finally:
            beside.unlink(missing_ok=True)

    def want(self, n_prompts: int) -> None:
        """Write down how many prompts all shards of a run are about, unless another run was about more."""
        if n_prompts > _wanted(self.path):
            self.write(WANTED, (json.dumps({"n_prompts": n_prompts}) + "\n").encode())

    def tidy(self) -> None:
        """Remove what killed runs have left beside files; not what a run on another machine is writing."""
        for left in (file for pattern in (".*", "*/.*") for file in self.path.glob(pattern)):
            found = _BESIDE.fullmatch(left.name)
            if found and found["host"] == platform.node() and not psutil.pid_exists(int(found["process"])):
                left.unlink(missing_ok=True)

    def add(self, files: Files) -> None:
        """Write the files of a part, in their order."""
        for name, content in files.items():
            self.write(name, content)

    def has(self, part: Part, work: Work, retry_errors: bool = False) -> bool:
        """Whether a part is there, whole and readable, with at least the prompts that are wanted.

        Args:
            part: Which part.
            work: What was to be done with it.
            retry_errors: Whether a part in which a prompt has an error counts as missing.
        """
        try:
            # all columns: checksums are looked at only of what is read
            tables = [read_part(self.path / part.path(table), table, self.sweep) for table in get_args(TableName)]
            prompts = tables[0].select(["index", "id", "error"]).to_pylist()
            for path in (path for row in prompts if row["error"] is None for path in work.kept(row["index"])):
                load(self.path / path)
        except (OSError, ValueError):
            return False
        if retry_errors and any(row["error"] is not None for row in prompts):
            return False
        wanted = [context.id for context in part.contexts]
        numbers = {row["index"] for row in prompts if row["error"] is None}
        # a run that was killed while a part grew, or was made anew, has written some of its tables
        thresholds, points = ({*table.column("index").unique().to_pylist()} for table in tables[1:])
        whole = points == numbers >= thresholds
        return whole and [row["id"] for row in prompts[: len(wanted)]] == wanted


def _wanted(path: Path) -> int:
    """How many prompts a sweep is about; 0 if it does not say so."""
    try:
        return int(json.loads((path / WANTED).read_bytes())["n_prompts"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def read_manifest(path: str | PathLike[str], name: str = "path") -> dict[str, Any]:
    """What a folder of a sweep says of itself.

    Args:
        path: The folder.
        name: What the user knows it by.

    Raises:
        ValueError: If it is none, or was written by a version whose columns are others.
    """
    manifest = Path(path) / MANIFEST
    try:
        about = json.loads(manifest.read_bytes())
        if not isinstance(about, dict) or "schema" not in about:
            raise ValueError(f"its {MANIFEST} is none")
    except (OSError, ValueError) as error:
        raise ValueError(f"`{name}` must be the folder of a sweep, got {os.fspath(path)!r} ({error}).") from error
    if (version := about["schema"]) != SCHEMA:
        raise ValueError(f"`{name}` must be a sweep with columns of version {SCHEMA}, got version {version}.")
    return about


def sweep_of(about: Mapping[str, Any]) -> str:
    """The hash of a manifest that files of rows have in them."""
    rest = {name: value for name, value in about.items() if name != "schema"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def read_part(path: Path, table: str, sweep: str) -> Any:
    """The rows of a part, as a pyarrow table.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is damaged, or of another sweep.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path, page_checksum_verification=True)
        about = json.loads((rows.schema.metadata or {})[b"tracedensity"])
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    if (about["table"], about["schema"], about["sweep"]) != (table, SCHEMA, sweep):
        raise ValueError(f"{path} belongs to another sweep.")
    known = schema(table)
    # the names and types of columns have no checksum
    if any(field.name not in known.names or field.type != known.field(field.name).type for field in rows.schema):
        raise ValueError(f"{path} cannot be read (its columns are others).")
    for place, field in enumerate(known):
        if field.name not in rows.schema.names:  # written before there was such a column
            rows = rows.add_column(place, field, pa.nulls(len(rows), field.type))
    return rows


def read_sweep(path: str | PathLike[str], table: TableName | str = "prompts") -> "pd.DataFrame":
    """The rows that a sweep has written, in the order of its prompts.

    An alert says how many prompts are not there yet, and whether some were run with another version than the rest.

    Args:
        path: Its folder.
        table: ``"prompts"``, one row per prompt; ``"thresholds"``, one per prompt and threshold; ``"points"``, one per
            prompt and size of the density papers. The columns are in `tracedensity.study.table.TABLES` and in the docs.

    Returns:
        The table; `attrs["sweep"]` is what the folder says of itself.

    Raises:
        ValueError: If it is no folder of a sweep, or a part of it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if table not in get_args(TableName):
        raise ValueError(f"`table` must be one of {list(get_args(TableName))}, got {table!r}.")
    about = read_manifest(path)
    parts = sorted((Path(path) / "prompts").glob("part-*.parquet"), key=lambda part: int(part.stem.split("-")[1]))
    if not parts:
        raise ValueError(f"`path` must be a sweep with rows, got {os.fspath(path)!r}, in which no part is finished.")
    try:
        keys = pa.concat_tables([pq.read_table(part, columns=["index", "versions"]) for part in parts]).to_pandas()
        rows = [read_part(Path(path) / table / part.name, table, sweep_of(about)) for part in parts]
    except (OSError, ValueError) as error:
        raise ValueError(f"{error} Run the sweep again: damaged parts are made anew.") from error
    n_wanted = max(_wanted(Path(path)), int(keys["index"].iloc[-1]) + 1)
    if len(keys) < n_wanted:
        alert(f"{os.fspath(path)} has {len(keys)} of {n_wanted} prompts: a run or shard of the sweep has not ended.")
    if keys["versions"].nunique() > 1:
        alert(f"{os.fspath(path)} was gone on with in other versions: {'; then '.join(keys['versions'].unique())}.")
    found: Any = pa.concat_tables(rows).to_pandas()
    # while a part grows, its rows of prompts are written last
    found = found[found["index"].isin(keys["index"])].reset_index(drop=True)
    found.attrs["sweep"] = about
    return found


def _difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first thing in which two nested dictionaries differ, by its name."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            found = _difference(before.get(key, _NOTHING), now.get(key, _NOTHING), f"{name}.{key}" if name else key)
            if found is not None:
                return found
        return None
    # as they are written, which is what the hash is of: 1, 1.0 and true are the same to Python
    return None if json.dumps(before) == json.dumps(now) else (name, before, now)


def _short(value: Any) -> str:
    text = value if value == _NOTHING else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."

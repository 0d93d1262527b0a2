"""What the findings rest on: models, texts, and the sweeps of one over the other."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import tracedensity as td

WORDS = 20
"""Words of a context. The papers take 40, which these models read as 60 to 150 tokens."""

LENGTHS = (8, 16, 32, 64)
"""Tokens of nested contexts."""

THRESHOLDS = (0.5, 0.8, 0.9)
"""Faithfulnesses at which sizes are taken."""

TARGET = THRESHOLDS[-1]
"""The one that findings are about where they are about one."""

ASSETS = Path(td.__file__).parent / "assets"

TRAINED = ("books-gpt2", "books-llama", "stories260K")
NULL = "shuffled"
"""The null control: books-gpt2, the entries of each of its weight tensors in a random order. Weights as a model is
initialised with would predict all tokens alike, which a circuit without edges does as well.
"""


@dataclass(frozen=True)
class Study:
    """A sweep.

    Attributes:
        model: Which model.
        corpus: Which text.
        kind: What for.
        limit: How many contexts.
        options: Options of `td.sweep`.
    """

    model: str
    corpus: str
    kind: str
    limit: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model}-{self.corpus}-{self.kind}"


@dataclass(frozen=True)
class Places:
    """Where things lie.

    Attributes:
        data: Folder with ``wikitext2`` and ``books``.
        models: Folder with ``stories260K``, which may be absent.
        out: Folder of the sweeps; those that are there already are gone on with.
    """

    data: Path
    models: Path
    out: Path

    def model(self, name: str) -> str | None:
        """What `td.load_model` takes for a model; None if it is not there.

        The null control is made when it is first asked for.
        """
        if name == "stories260K":
            folder = self.models / name
            return str(folder) if (folder / "config.json").is_file() else None
        if name != NULL:
            return name
        folder = self.out / "models" / NULL
        if not (folder / "config.json").is_file():
            shuffle(ASSETS / "books-gpt2", folder)
        return str(folder)

    def text(self, corpus: str) -> tuple[Path, Path]:
        """The text of a corpus, and another of its kind in which tokens are counted.

        Raises:
            ValueError: If they are not there.
        """
        files = {
            "wikitext": ("wikitext2/test.txt", "wikitext2/valid.txt"),
            "books": ("books/valid.txt", "books/train-0.txt"),
        }[corpus]
        text, counted = (self.data / file for file in files)
        if not (text.is_file() and counted.is_file()):
            raise ValueError(f"`--data` must hold {files[0]} and {files[1]}, got {self.data}.")
        return text, counted


def shuffle(model: Path, folder: Path) -> None:
    """Write a model whose weights are another's, the entries of each tensor in a random order."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(model / "model.safetensors")
    mixed = {
        name: each.flatten()[torch.randperm(each.numel(), generator=generator)].view_as(each)
        for name, each in sorted(weights.items())
    }
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    for file in (*(ASSETS / "tokenizer").iterdir(), model / "config.json"):  # the last says that all is there
        (folder / file.name).write_bytes(file.read_bytes())


DOCUMENTS: Mapping[str, int] = {"wikitext": 50, "books": 9}
"""From so many articles, or books, as many contexts each; WikiText's test part has some articles more, for those that
are short.
"""

CORPORA = (*DOCUMENTS,)


def studies(n: int) -> list[Study]:
    """All sweeps: `n` contexts of each model and corpus, fewer of the same where it is dear."""
    words: dict[str, Any] = {"context_words": WORDS}
    no_baselines = {"baselines": False}  # they take as long as the rest
    found = []

    def add(model: str, corpus: str, kind: str, limit: int, **options: Any) -> None:
        n_groups = limit // len(LENGTHS) if kind == "nested" else limit
        each = {"per_document": math.ceil(n_groups / DOCUMENTS[corpus]), "thresholds": THRESHOLDS}
        found.append(Study(model, corpus, kind, limit, {**each, **options}))

    for model in (*TRAINED, NULL):
        for corpus in CORPORA:
            add(model, corpus, "norm", n, **words)
            add(model, corpus, "flow", max(n // 3, 12), method="flow", **words, **no_baselines)
        add(model, "wikitext", "nested", max(n, 48), context_tokens=LENGTHS, **no_baselines)
        if model != NULL:
            searched = {"method": "best", "refine": True, "part_size": 4}  # each takes seconds
            add(model, "wikitext", "tight", max(n // 20, 12), **searched, **words, **no_baselines)
    return found


def of_checkpoints(n: int) -> Study:
    """The sweep of `n` contexts that every checkpoint of a training gets."""
    options = {"context_words": WORDS, "per_document": math.ceil(n / DOCUMENTS["wikitext"]), "thresholds": THRESHOLDS}
    return Study("books-gpt2", "wikitext", "steps", n, {**options, "baselines": False})


def run(
    study: Study, places: Places, counts: dict[tuple[str, str], Any], checkpoint: Path | None = None
) -> td.Sweep | None:
    """Run a sweep, or go on with it; None where there is no such model.

    Args:
        study: The sweep.
        places: Where things lie.
        counts: Counts of tokens, by tokenizer and corpus, which grows.
        checkpoint: The model to run in place of the one that is named, whose sweep is one of several.
    """
    model = places.model(study.model) if checkpoint is None else str(checkpoint)
    if model is None:
        return None
    out = places.out / study.name if checkpoint is None else places.out / study.kind / checkpoint.name
    text, counted = places.text(study.corpus)
    key = ("stories" if study.model == "stories260K" else "books", study.corpus)
    if key not in counts:
        counts[key] = td.study.count_tokens(model, counted)
    return td.sweep(model, text, out, counts=counts[key], limit=study.limit, **{"part_size": 32, **study.options})

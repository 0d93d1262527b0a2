"""Test the density papers' findings on the models that we have, and write the page that says what came of it.

    python -m studies.reproduce

Sweeps go on where an earlier run ended. Figures need kaleido and a Chrome or Chromium.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import tracedensity as td
from studies.corpora import DOCUMENTS, THRESHOLDS, WORDS, Places, run, studies
from studies.findings import Finding, Sweeps, findings
from training import train

ROOT = Path(__file__).parents[1]

_PAGE = """# Findings

The questions of the density papers ([2601.22795](https://arxiv.org/abs/2601.22795), withdrawn, and
[2605.27033](https://arxiv.org/abs/2605.27033)), asked of small models: the bundled books-gpt2 and books-llama, and
stories260K, a Llama of 260 thousand parameters trained on children's stories. What holds for them need not hold for
large ones; and the models are few, of one size, two of them trained on the same books. Verdicts follow rules that were
written down before the numbers were made.

`python -m studies.reproduce` makes everything on this page: {contexts:,} contexts of {words} words of WikiText-2 and of held-out
books for each model, {sweeps} sweeps and {prompts:,} curves in all. {took}

| | question | verdict |
|---|---|---|
{verdicts}

Terms: a *context* ends before the token that is predicted. Its *density* is the area under 1 - faithfulness (total variation
distance of the circuit's prediction to the model's) over log10 of the share of edges, or the share of edges that a faithfulness
needs ([method](method.md)). Intervals are those of 95% of a bootstrap over documents: articles of WikiText; books, of which there
are {books}, so that intervals there are rough. How each number is made: [studies](studies.md).

{findings}
"""


def main(
    data: Annotated[Path, typer.Option(help="Folder with wikitext2/ and books/.")] = ROOT.parent / "shared" / "data",
    models: Annotated[Path, typer.Option(help="Folder with stories260K/.")] = ROOT.parent / "shared" / "models",
    out: Annotated[Path, typer.Option(help="Where sweeps are kept.")] = ROOT / "runs" / "findings",
    contexts: Annotated[int, typer.Option(help="Contexts of each model and text.")] = 1000,
    tokens: Annotated[int, typer.Option(help="Tokens that checkpoints are trained on; 0 for none.")] = 1_500_000,
    page: Annotated[Path, typer.Option(help="The page to write; pictures go to images/ beside it.")] = ROOT
    / "docs" / "findings.md",
) -> None:
    """Run what is missing, and write the page."""
    out.mkdir(parents=True, exist_ok=True)
    places, counts = Places(data, models, out), {}
    clock = out / "seconds.json"
    seconds: dict[str, float] = json.loads(clock.read_text()) if clock.exists() else {}
    n_prompts = n_sweeps = 0

    def spent(name: str, since: float) -> None:
        seconds[name] = seconds.get(name, 0) + time.monotonic() - since
        clock.write_text(json.dumps(seconds))

    for study in studies(contexts):
        begun = time.monotonic()
        done = run(study, places, counts)
        if done is None:
            typer.echo(f"{study.name}: {models} has no such model, left out")
            continue
        typer.echo(f"{study.name}: {done}")
        spent(study.name, begun)
        n_prompts, n_sweeps = n_prompts + done.n_prompts, n_sweeps + 1
    if tokens:
        begun = time.monotonic()
        n_prompts, n_sweeps = n_prompts + checkpoints(places, counts, tokens, max(contexts // 5, 12)), n_sweeps + 6
        spent("training", begun)
    begun = time.monotonic()
    found = findings(Sweeps(out))
    spent("findings", begun)
    took = f"It took {sum(seconds.values()) / 60:.0f} minutes on {os.cpu_count()} cores."
    page.write_text(written(found, page.parent / "images", contexts, n_sweeps, n_prompts, took), encoding="utf-8")
    typer.echo(f"{page} written. {took}")


def checkpoints(places: Places, counts: dict[tuple[str, str], Any], tokens: int, n: int) -> int:
    """Train for a short time, and sweep six models of the way; how many prompts that were."""
    folder = places.out / "training"
    tokenizer = Path(td.__file__).parent / "assets" / "tokenizer" / "tokenizer.json"
    train.main(
        places.data / "books", out=folder, model="books-gpt2", tokens=tokens, tokenizer=tokenizer, keep=6,
        decay=0.4, compiled=shutil.which("cc") is not None, every=10**9, threads=os.cpu_count() or 1,
    )  # fmt: skip
    torch.set_num_threads(os.cpu_count() or 1)
    text, _ = places.text("wikitext")
    n_prompts = 0
    for path in td.study.checkpoints(folder / "steps"):
        done = td.sweep(
            str(path), text, places.out / "steps" / path.name, counts=counts["books", "wikitext"], limit=n, part_size=32,
            context_words=WORDS, per_document=-(-n // DOCUMENTS["wikitext"]), thresholds=THRESHOLDS, baselines=False,
        )  # fmt: skip
        typer.echo(f"{path.name}: {done}")
        n_prompts += done.n_prompts
    return n_prompts


def written(
    found: list[Finding], images: Path, contexts: int, n_sweeps: int, n_prompts: int, took: str
) -> str:
    """The page, its pictures written."""
    images.mkdir(exist_ok=True)
    for old in images.glob("finding-*.png"):
        old.unlink()
    parts = []
    for each in found:
        lines = [f"## ({each.key}) {each.question}", f"**{each.verdict[0].upper()}{each.verdict[1:]}.**", f"*Rule*: {each.rule}", each.text]
        for number, (about, figure) in enumerate(each.figures.items(), start=1):
            name = f"finding-{each.key}{number}.png"
            figure.write_image(images / name, width=720, scale=1.5)
            lines.append(f"![{about}](images/{name})")
        parts.append("\n\n".join(lines))
    return _PAGE.format(
        contexts=contexts, words=WORDS, sweeps=n_sweeps, prompts=n_prompts, took=took, books=DOCUMENTS["books"],
        verdicts="\n".join(f"| ({each.key}) | {each.question} | {each.verdict} |" for each in found),
        findings="\n\n".join(parts),
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)

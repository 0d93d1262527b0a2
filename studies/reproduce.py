"""Test the density papers' findings on the models that we have, and write the page that says what came of it.

    python -m studies.reproduce

Sweeps go on where an earlier run ended. Figures need kaleido and a Chrome or Chromium.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Annotated, Any

import plotly.graph_objects as go
import torch
import typer

import tracedensity as td
from studies.corpora import NULL, TARGET, WORDS, Places, of_checkpoints, run, studies
from studies.findings import FINDINGS, Finding, Sweeps
from studies.findings.dense import DENSE, SPARSE
from studies.findings.dynamic import RANGE
from studies.findings.long import CEILING
from studies.findings.phases import NEARER
from studies.findings.shared import PAPERS
from training import train

ROOT = Path(__file__).parents[1]

STORIES = "\nBeside them stands stories260K, a Llama of 0.3 million trained on children's stories."
"""What the page says of the model that need not be there."""


def main(
    data: Annotated[Path, typer.Option(help="Folder with wikitext2/ and books/.")] = ROOT.parent / "shared" / "data",
    models: Annotated[Path, typer.Option(help="Folder with stories260K/.")] = ROOT.parent / "shared" / "models",
    out: Annotated[Path, typer.Option(help="Where sweeps are kept.")] = ROOT / "runs" / "findings",
    contexts: Annotated[int, typer.Option(help="Contexts of each model and text.")] = 1000,
    tokens: Annotated[int, typer.Option(help="Tokens that checkpoints are trained on.")] = 1_000_000,
    page: Annotated[Path, typer.Option(help="The page to write; pictures go to images/ beside it.")] = ROOT
    / "docs"
    / "findings.md",
) -> None:
    """Run what is missing, and write the page."""
    begun, gone_on = time.monotonic(), out.exists()
    places, counts = Places(data, models, out), {}
    # sweeps take hours: what could fail behind them is tried before
    wanted = studies(contexts)
    for study in wanted:
        places.text(study.corpus)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.open("a").close()
    go.Figure().to_image("png")  # needs a browser
    out.mkdir(parents=True, exist_ok=True)
    steps = trained(places, tokens)
    swept: list[td.Sweep] = []
    for study in wanted:
        done = run(study, places, counts)
        if done is None:
            typer.echo(f"{study.name}: {models} has no such model, left out")
            continue
        typer.echo(f"{study.name}: {done}")
        swept.append(done)
    swept += checkpoints(steps, places, counts, max(contexts // 5, 12))
    sweeps = Sweeps(out)
    found: dict[str, Finding] = {}
    for letter, of in FINDINGS.items():
        found[letter] = of(sweeps)
        typer.echo(f"({letter}) {found[letter].verdict}")
    draw(found, page.parent / "images")
    took = f"{(time.monotonic() - begun) / 60:.0f} minutes on {os.cpu_count()} cores"
    about = {
        "contexts": f"{contexts:,}", "sweeps": len(swept), "prompts": f"{sum(each.n_prompts for each in swept):,}",
        "tokens": f"{tokens:,}", "stories": STORIES * ("stories260K" in sweeps.trained),
        "took": took + " (some sweeps had been made before)" * gone_on,
    }  # fmt: skip
    page.write_text(written(found, about), encoding="utf-8")
    typer.echo(f"{page} written. All of it took {about['took']}.")


def trained(places: Places, tokens: int) -> Path:
    """Train for a short time; the folder of six models of the way."""
    folder = places.out / "training"
    tokenizer = Path(td.__file__).parent / "assets" / "tokenizer" / "tokenizer.json"
    threads = torch.get_num_threads()
    # not as the bundled models were: in bfloat16, many processors would take hours
    train.main(
        places.data / "books", out=folder, model="books-gpt2", pattern="train-0.txt", tokens=tokens, batch=8, lr=2e-3,
        tokenizer=tokenizer, keep=6, half=False, muon=False, compiled=False, every=10**9,
        threads=os.cpu_count() or 1,
    )  # fmt: skip
    torch.set_num_threads(threads)
    return folder / "steps"


def checkpoints(steps: Path, places: Places, counts: dict[tuple[str, str], Any], n: int) -> list[td.Sweep]:
    """Sweep the models of a training."""
    swept = []
    for path in td.study.checkpoints(steps):
        done = run(of_checkpoints(n), places, counts, checkpoint=path)
        assert done is not None
        typer.echo(f"{path.name}: {done}")
        swept.append(done)
    return swept


def draw(found: Mapping[str, Finding], images: Path) -> None:
    """Write the pictures of the page."""
    images.mkdir(parents=True, exist_ok=True)
    for letter, each in found.items():
        for of, figure in each.figures.items():
            figure.write_image(images / f"finding-{letter}{'-' * bool(of)}{of}.png", width=720, scale=1.5)


def written(found: Mapping[str, Finding], about: Mapping[str, object]) -> str:
    """The page."""
    said: dict[str, object] = {
        **about, "words": WORDS, "null": NULL, "dense": f"{DENSE:.0%}", "sparse": f"{SPARSE:.0%}",
        "range": RANGE, "nearer": NEARER, "threshold": f"{TARGET:g}", "ceiling": f"{CEILING:.0%}",
        "papers": PAPERS,
    }  # fmt: skip
    for letter, each in found.items():
        said |= {f"{letter}_verdict": each.verdict, f"{letter}_details": each.details, f"{letter}_table": each.table}
        said |= {f"{letter}_{name}": text for name, text in each.also.items()}
    return Template((ROOT / "studies" / "page.md").read_text(encoding="utf-8")).substitute(said)


if __name__ == "__main__":
    typer.run(main)

"""Makes what the documentation shows: README's pictures, the executed notebooks, and the gallery with their figures.

Run ``python docs/pictures.py`` from the repository's root; it needs kaleido and a Chrome or Chromium.
"""

import os
import re
import shutil
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
from nbclient import NotebookClient

import tracedensity as td

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
PROMPT = "said the old man, and shook his"

INTRODUCTION = """# Gallery

The figures of the notebooks in [examples](../examples), each with the line that makes it. Pictures stand still here; in
a notebook they answer the mouse, and sliders move. [How figures are made, exported and read](figures.md).

(Made by `python docs/pictures.py`.)
"""


REPORT = """## A report

```py
td.report(model, "said the old man, and shook his", compare="Once upon a time there was a little").save("report.html")
```

![The top of a report on two prompts](images/report.png)
"""


def main() -> None:
    """Make everything anew."""
    readme()
    shown_elsewhere()
    parts = [INTRODUCTION]
    for old in IMAGES.glob("[0-9]*.png"):
        old.unlink()
    for source in sorted((ROOT / "examples").glob("*.py")):
        notebook = executed(source)
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        parts += gallery(notebook, source.stem)
    parts.append(REPORT)
    (ROOT / "docs" / "gallery.md").write_text("\n".join(parts), encoding="utf-8")


def readme() -> None:
    """The two pictures at the top of the README."""
    model = td.load_model("books-llama")
    curve = td.density(model, PROMPT)
    circuit = curve.circuit(faithfulness=0.9)
    drawn = circuit.plot(
        td.attribute(model, PROMPT), ranking=curve.ranking, tokens=td.top_tokens(model, circuit),
        prediction=curve.top_text,
    )  # fmt: skip
    for name, figure in (("circuit", drawn), ("curve", curve.plot())):
        figure.write_image(IMAGES / f"{name}.png", width=720, height=560, scale=1.5)


def shown_elsewhere() -> None:
    """What is no plotly figure: a strip, and the top of a report, as a browser shows them."""
    from playwright.sync_api import sync_playwright

    model = td.load_model("books-llama")
    text = "The old man sat by the fire, and the child sat upon his knee"
    n_tokens = len(td.capture(model, text, keep="z").tokens)
    strip = td.plot.density_strip(
        [td.density(model, text, position=place, baselines=False) for place in range(1, n_tokens)]
    )
    report = td.report(model, PROMPT, compare="Once upon a time there was a little")
    with sync_playwright() as run, TemporaryDirectory() as folder:
        browser = run.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, made, size in (("strip", strip, (700, 150)), ("report", report, (1100, 1100))):
            path = Path(folder) / f"{name}.html"
            made.save(path)
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            page.goto(path.as_uri())
            page.wait_for_timeout(1000)
            page.screenshot(path=IMAGES / f"{name}.png")
            page.close()
        browser.close()


def executed(source: Path) -> nbformat.NotebookNode:
    """A notebook with its outputs, figures as plotly's JSON and, for viewers that run no script, as pictures."""
    notebook = jupytext.read(source)
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype+png"
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # not at random: the same source makes the same file
        cell.metadata.pop("execution", None)  # when it was run
    return notebook


def gallery(notebook: nbformat.NotebookNode, name: str) -> Iterator[str]:
    """The title of a notebook, and each of its figures below the text and the lines before it."""
    said, shown = [], 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            if title := re.match(r"# (.*)", cell.source):
                yield f"## [{title[1]}](../examples/{name}.ipynb)\n"
            said.append(re.sub(r"\A##", "###", re.sub(r"\A# .*\n*", "", cell.source)) + "\n")
            continue
        pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        if pictures:
            yield from said
            yield f"```py\n{cell.source}\n```\n"
        for picture in pictures:
            shown += 1
            path = IMAGES / f"{name[:2]}-{shown}.png"
            path.write_bytes(b64decode(picture))
            yield f"![Figure {shown} of this notebook](images/{path.name})\n"
        if "density_strip" in cell.source:
            yield from said
            yield f"```py\n{cell.source}\n```\n\n![A text in colours](images/strip.png)\n"
        if pictures or cell.outputs:
            said = []


if __name__ == "__main__":
    main()

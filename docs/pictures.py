"""Makes what the documentation shows: README's pictures, the executed notebooks, and the gallery with their figures.

Run ``python docs/pictures.py`` from the repository's root; it needs kaleido and a Chrome or Chromium.
"""

import os
import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

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


def main() -> None:
    """Make everything anew."""
    readme()
    parts = [INTRODUCTION]
    for old in IMAGES.glob("[0-9]*.png"):
        old.unlink()
    for source in sorted((ROOT / "examples").glob("*.py")):
        notebook = executed(source)
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        parts += gallery(notebook, source.stem)
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
            title = re.match(r"# (.*)", cell.source)
            if title:
                yield f"## [{title[1]}](../examples/{name}.ipynb)\n"
            said.append(re.sub(r"^#+ (.*)\n*", "" if title else r"**\1.** ", cell.source))
            continue
        pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        strips = [output for output in cell.outputs if "image/png" not in output.get("data", {})]
        if pictures:
            yield from said
            yield f"\n```py\n{cell.source}\n```\n"
        for picture in pictures:
            shown += 1
            path = IMAGES / f"{name[:2]}-{shown}.png"
            path.write_bytes(b64decode(picture))
            yield f"![{cell.source.splitlines()[-1]}](images/{path.name})\n"
        if pictures or strips:
            said = []


if __name__ == "__main__":
    main()

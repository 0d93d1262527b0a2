"""What a newcomer copies runs as it stands: the lines of README and docs, and every example as a notebook."""

import re
from base64 import b64decode
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if "```python" in page.read_text("utf-8")
]
_TALES = "Once upon a time there was a {} who lived in an old house by the {}, and went every day to the market. " * 3
GIVEN = {
    "prompts.txt": "\n\n".join(
        _TALES.format(*[who, where] * 3) for who in ("king", "girl") for where in ("sea", "wood")
    ),
    "other.txt": _TALES.format(*["man", "river"] * 3),
}
"""Files that pages speak of as the reader's own."""

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_lines_of_a_page_run_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in GIVEN.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, path.name, "exec"), names)
    assert "td" in names


def test_pictures_of_the_readme_say_what_the_model_says():
    import tracedensity as td

    curve = td.density(td.load_model("books-llama"), "said the old man, and shook his", baselines=False)
    claim = re.search(r"(\d+) of ([\d,]+) edges say", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert claim
    assert curve.n_edges == int(claim[2].replace(",", ""))
    # another machine's rounding may shift a crossing by an edge or two
    assert curve.minimal_size(0.9) == pytest.approx(int(claim[1]), abs=2)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_as_a_notebook(path):
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    nbformat.validate(notebook)
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs)
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert any("text/html" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_committed_notebook_is_the_source_that_was_run(path):
    source, notebook = jupytext.read(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in source.cells
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    figures = [output.data for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert figures
    assert all("image/png" in data for data in figures)  # for viewers that run no script


def test_the_gallery_shows_what_is_in_the_notebooks():
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    sources = [cell.source for path in EXAMPLES for cell in jupytext.read(path).cells]
    shown = re.findall(r"```py\n(.*?)\n```", gallery, re.DOTALL)
    assert shown.pop().startswith("td.report(")  # a page, after all figures
    assert set(shown) <= set(sources)
    notebooks = [nbformat.read(path.with_suffix(".ipynb"), as_version=4) for path in EXAMPLES]
    pictures = [
        output.data["image/png"]
        for notebook in notebooks for cell in notebook.cells for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]  # fmt: skip
    files = re.findall(r"\]\((images/\d[^)]*)\)", gallery)
    assert [(ROOT / "docs" / file).read_bytes() for file in files] == [b64decode(picture) for picture in pictures]


def test_pictures_and_pages_that_are_linked_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links {target}"

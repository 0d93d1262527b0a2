"""What figures of large circuits cost: to make, to draw in a browser, to point at and to zoom."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

import tracedensity as td
from tracedensity.plot import plot_circuit, write_html
from tracedensity.provenance import Provenance

_ASK = """async () => {
  const figure = document.querySelector(".js-plotly-plot"), axis = figure._fullLayout.xaxis;
  const elapsed = async action => {
    const start = performance.now();
    await action();
    return performance.now() - start;
  };
  const other = document.body.appendChild(document.createElement("div"));
  other.style = "width:1200px;height:900px";
  const draw = await elapsed(() => Plotly.newPlot(other, figure.data, figure.layout));
  const hover = await elapsed(async () => {
    for (let place = 0; place < 50; place++) Plotly.Fx.hover(figure, {xval: place + 0.3, yval: 9.4});
  });
  const zoom = await elapsed(() => Plotly.relayout(figure, {"xaxis.range": [8, 24]}));
  return [draw, hover / 50, zoom];
}"""


def main(
    n_edges: Annotated[str, typer.Option(help="Sizes of circuits.")] = "1000,10000,100000",
    n_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 64,
) -> None:
    """Print a row per size of circuit: milliseconds to make, draw, hover and zoom, and megabytes of JSON."""
    from playwright.sync_api import sync_playwright

    torch.set_num_threads(1)
    graph = td.TokenGraph(12, 12, n_tokens)
    generator = torch.Generator().manual_seed(0)
    values = {kind: torch.rand(shape, generator=generator) for kind, shape in graph.shapes.items()}
    texts = tuple(f" t{place}" for place in range(n_tokens))
    about = Provenance("random", "", tuple(range(n_tokens)), texts, "norm")
    scores = td.Scores(graph, values, about)
    ranking = scores.rank("top")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    print(f"{'edges':>8} {'drawn':>8} {'make ms':>9} {'MB':>6} {'draw ms':>9} {'hover ms':>9} {'zoom ms':>9}")
    with sync_playwright() as run, tempfile.TemporaryDirectory() as folder:
        browser = run.chromium.launch(executable_path=found, args=["--no-sandbox"])
        plot_circuit(ranking.circuit(10), scores=scores)  # imports
        for size in map(int, n_edges.split(",")):
            start = time.perf_counter()
            figure = plot_circuit(ranking.circuit(size), scores=scores, ranking=ranking)
            made = 1e3 * (time.perf_counter() - start)
            path = Path(folder) / "figure.html"
            write_html(figure, path)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(path.as_uri())
            page.wait_for_selector(".js-plotly-plot .main-svg")
            draw, hover, zoom = page.evaluate(_ASK)
            megabytes = len(figure.to_json()) / 1e6
            drawn = min(size, 10_000)
            print(f"{size:8,} {drawn:8,} {made:9.0f} {megabytes:6.2f} {draw:9.0f} {hover:9.1f} {zoom:9.0f}")
            page.close()
        browser.close()


if __name__ == "__main__":
    typer.run(main)

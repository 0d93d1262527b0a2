"""Figures and pages in a real browser: they open without a word, answer the mouse, and no label hides another."""

import re
import shutil
from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch
from conftest import random_model
from drawn import curve_of, provenance
from planted import by_rarity, nested, planted, write_sweep

import tracedensity as td
from tracedensity.plot import (
    activations_page,
    dark,
    density_strip,
    plot_attention,
    plot_circuit,
    plot_component,
    plot_composition,
    plot_curve,
    plot_curves,
    plot_difference,
    plot_growth,
    plot_heatmap,
    plot_top,
    write_html,
)
from tracedensity.plot.page import figure_div
from tracedensity.plot.page import page as whole_page
from tracedensity.reporting import MOST

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARTEFACTS = Path(__file__).parent / "artefacts"
SHORT = "said the old man, and shook his"  # 10 tokens
LONG = (  # 40 tokens
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch"
)
CONTENTS = ("composition", "layers", "recurrence", "prediction", "phases")
HOSTILE = "he said <script>alert(1)</script> and \"then\" 'so' & $x$ <img src=x onerror=alert(2)>"

# Texts that a reader has to read, and whether two of them lie over one another.
OVERLAPS = """within => {
  const names = ".gtitle, .gtitle-subtitle, .xtick text, .x2tick text, .x3tick text, .ytick text, .y2tick text, " +
    ".xtitle, .x2title, .ytitle, .y2title, .legendtext, .slider-label, .annotation-text, .cbtitle text, .cbaxis text";
  const inside = names.split(", ").map(name => (within || "") + name).join(", ");
  const texts = [...document.querySelectorAll(inside)].filter(text => text.textContent.trim());
  const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()])
    .filter(([_, box]) => box.width > 0 && box.height > 0);
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const [one, a] = boxes[i], [other, b] = boxes[j];
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (across > 2 && down > 3) found.push(`${one} | ${other}`);
  }
  return found;
}"""

# How many edges a circuit's figure draws: lines end to end have a gap after each.
DRAWN = """() => {
  const figure = document.querySelector("#circuit") || document.querySelector(".js-plotly-plot");
  return figure._fullData.filter(trace => trace.visible === true && ["head", "MLP", "skip connection"]
    .includes(trace.name) && !trace.showlegend).map(trace => Array.from(trace.x).filter(Number.isNaN).length)
    .reduce((sum, count) => sum + count, 0);
}"""


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra [dev], is not installed")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path, request):
    """Opens a figure or page; what the browser says or asks for in the meantime is an error when the test is over."""
    pages, said = [], []

    def open_page(shown, width=1280, scheme="light", name=None):
        path = tmp_path / "page.html"
        write_html(shown, path)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
        page.on("request", lambda asked: said.extend([asked.url] * (asked.url != path.as_uri())))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length == 0 || window.Plotly")
        pages.append((page, name or re.sub(r"\W+", "_", request.node.name), width, scheme))
        return page

    yield open_page
    for page, name, width, scheme in pages:
        ARTEFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTEFACTS / f"{name}_{width}_{scheme}.png", full_page=True)
        page.close()
    assert said == []


@pytest.fixture(scope="module")
def model():
    return td.load_model("books-llama")


@pytest.fixture(scope="module")
def curves(model):
    return {prompt: td.density(model, prompt, baselines=prompt == SHORT) for prompt in (SHORT, LONG)}


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> dict[str, go.Figure]:
    """The figures of studies."""
    few, table = {"n_bootstrap": 20}, planted(120, density=by_rarity)
    models = {f"a-model-of-name-{seed}": planted(120, seed=seed) for seed in range(3)}
    shapley = td.study.shap_values(table, regressor="ridge", n_null=5, **few)
    folder = tmp_path_factory.mktemp("contents") / "sweep"
    write_sweep(folder, table)
    contents = td.study.contents(folder, n_null=20, **few)
    return {
        "factors": td.study.factors(table, n_permutations=20, **few).plot(),
        "lengths": td.study.lengths(nested(0.2), outcomes=("area", "size"), n_permutations=20, **few).plot(),
        "thresholds": td.study.thresholds(table, **few).plot(),
        "compare": td.study.compare(models, n_permutations=20, **few).plot(),
        "trend": td.study.trend(models, n_permutations=20, **few).plot(),
        "shap": shapley.plot(),
        "dependence": shapley.plot("rarity_target"),
        **{f"contents_{what}": contents.plot(what) for what in CONTENTS},
    }


@pytest.fixture(scope="module")
def figures(model, curves, studied):
    """Each figure that there is, of a short and of a long prompt, of a task, or of a study."""
    made: dict[str, go.Figure] = {}
    for size, (prompt, curve) in zip(("short", "long"), curves.items(), strict=True):
        scores, circuit = td.attribute(model, prompt), curve.circuit(faithfulness=0.8)
        held = td.capture(model, prompt)
        made |= {
            f"curve_{size}": plot_curve(curve),
            f"circuit_{size}": plot_circuit(
                circuit, scores=scores, ranking=curve.ranking, tokens=td.top_tokens(model, circuit)
            ),
            f"growth_{size}": plot_growth(curve, scores=scores, max_edges=300),
            f"composition_{size}": plot_composition(curve),
            f"heads_{size}": plot_heatmap(curve, over="head"),
            f"tokens_{size}": plot_heatmap(scores, over="token"),
            f"attention_{size}": plot_attention(held, n=4),
            f"neurons_{size}": plot_top(held.top_neurons(8)),
            f"difference_{size}": plot_difference(circuit, curve.circuit(faithfulness=0.5), scores=scores),
        }
    graph = td.TokenGraph(12, 12, 64)
    generator = torch.Generator().manual_seed(0)
    values = {kind: torch.rand(shape, generator=generator) for kind, shape in graph.shapes.items()}
    large = td.Scores(graph, values, provenance([f" t{place}" for place in range(64)]))
    made["curve_large"] = plot_curve(curve_of(large.rank("top")))
    made["circuit_large"] = plot_circuit(large.rank().circuit(2_000), scores=large)
    wide = td.ComponentGraph(12, 12, 12)
    values = {"edge": torch.rand(wide.shapes["edge"], generator=generator)}
    about = provenance([" a", " b"])
    made["component_large"] = plot_component(td.Scores(wide, values, about).rank().circuit(200))
    made["tight"] = plot_curve(td.density(model, SHORT, refine=True, budget=20, thresholds=(0.5, 0.9)))
    made["curves"] = plot_curves(list(curves.values()))
    gpt2 = td.load_model("books-gpt2")
    task = td.tasks.pronoun(gpt2, n=4, solved=True)
    scores = td.attribute(gpt2, task, graph="component", method="eap")
    ranking = scores.rank()
    made["component"] = plot_component(ranking.circuit(60), scores=scores)
    made["component_difference"] = plot_difference(ranking.circuit(60), scores.rank("top").circuit(40), scores=scores)
    return made | studied


NAMES = [
    *(
        f"{name}_{size}"
        for size in ("short", "long")
        for name in (
            "curve", "circuit", "growth", "composition", "heads", "tokens", "attention", "neurons", "difference"
        )
    ),
    "curve_large", "circuit_large", "component_large", "tight", "curves", "component", "component_difference",
    "factors", "lengths", "thresholds", "compare", "trend", "shap", "dependence",
    *(f"contents_{what}" for what in CONTENTS),
]  # fmt: skip


@pytest.fixture(scope="module", params=[(1280, "light"), (400, "dark")], ids=["wide-light", "narrow-dark"])
def sheet(request, browser, figures, tmp_path_factory):
    """All figures on one page, and what the browser says or asks for meanwhile."""
    width, scheme = request.param
    path = tmp_path_factory.mktemp("sheet") / "sheet.html"
    path.write_text(whole_page("all figures", [figure_div(figure, name) for name, figure in figures.items()]), "utf-8")
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda asked: said.extend([asked.url] * (asked.url != path.as_uri())))
    opened.goto(path.as_uri())
    for name in figures:
        opened.wait_for_selector(f"#{name} .main-svg")
    yield opened, width, scheme, said
    opened.close()


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_opens_and_no_label_lies_over_another(sheet, name):
    opened, width, scheme, said = sheet
    ARTEFACTS.mkdir(exist_ok=True)
    opened.locator(f".figure:has(#{name})").screenshot(path=ARTEFACTS / f"{name}_{width}_{scheme}.png")
    assert opened.evaluate(OVERLAPS, f"#{name} ") == []
    assert opened.query_selector(f"#{name} .gl-container canvas") is None  # browsers have few of them, or none
    ground = opened.evaluate(f"getComputedStyle(document.querySelector('#{name} .main-svg')).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 27)")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width  # a wide figure scrolls by itself
    assert said == []


def test_nothing_stands_beside_a_figure(opened, figures):
    page = opened(figures["curve_short"], 400)
    assert page.evaluate("document.querySelector('.figure').clientWidth") == 400 - 32


def test_labels_over_one_another_would_be_found(opened, figures):
    crowded = go.Figure(figures["circuit_long"]).update_layout(width=None)
    crowded.add_annotation(text="here", x=0.5, y=0.5, showarrow=False)
    crowded.add_annotation(text="and here", x=0.5, y=0.5, showarrow=False)
    page = opened(crowded.update_layout(meta={"min_width": 0}), 400)
    page.wait_for_selector(".js-plotly-plot .main-svg")
    found = page.evaluate(OVERLAPS)
    assert "and here | here" in found
    assert len(found) > 10  # names of tokens
    for looked_at in (".gtitle", ".gtitle-subtitle", ".xtick text", ".ytick text", ".xtitle", ".ytitle", ".legendtext"):
        assert page.query_selector(looked_at), looked_at


def test_every_figure_is_among_those_tried(figures):
    assert set(figures) == set(NAMES)


def test_a_figure_made_dark_is_what_a_page_makes_of_a_light_one(opened, figures):
    def colours(page):
        return page.evaluate(
            "[...document.querySelectorAll('.main-svg path, .main-svg text')].map(e => getComputedStyle(e))"
            ".map(s => [s.stroke, s.fill].join())"
        )

    switched = opened(figures["curve_short"], scheme="dark", name="switched")
    switched.wait_for_selector(".js-plotly-plot .main-svg")
    made = opened(dark(figures["curve_short"]), scheme="light", name="made_dark")
    made.wait_for_selector(".js-plotly-plot .main-svg")
    assert colours(switched) == colours(made)


@pytest.mark.parametrize("width", [1280, 400])
def test_the_slider_moves_and_as_many_edges_are_drawn_as_it_says(opened, curves, figures, width):
    page = opened(figures["growth_short"], width)
    rail = page.wait_for_selector(".slider-rail-touch-rect").bounding_box()
    assert page.evaluate(DRAWN) == curves[SHORT].minimal_size(0.9)
    seen = []
    for share in (0.01, 0.4, 0.99):
        page.mouse.click(rail["x"] + share * rail["width"], rail["y"] + rail["height"] / 2)
        page.wait_for_timeout(300)
        said = page.text_content(".slider-label")
        title = page.text_content(".gtitle")
        size = int(re.sub(r"\D", "", said))
        assert f"Circuit of {size:,} of 1,143 edges" in title
        assert page.evaluate(DRAWN) == min(size, 300)
        seen.append(size)
    assert seen[0] < seen[1] < seen[2] == 1143


def test_the_mouse_is_told_of_a_head(opened, curves, figures):
    page = opened(figures["circuit_short"])
    page.wait_for_selector(".js-plotly-plot .main-svg")
    place = page.evaluate("""() => {
      const figure = document.querySelector(".js-plotly-plot"), axes = figure._fullLayout;
      const trace = figure._fullData.find(trace => trace.name === "head, under the mouse");
      const box = figure.getBoundingClientRect();
      return [box.left + axes.xaxis._offset + axes.xaxis.d2p(trace.x[0]),
              box.top + axes.yaxis._offset + axes.yaxis.d2p(trace.y[0])];
    }""")
    page.mouse.move(*place)
    page.wait_for_selector(".hoverlayer .hovertext")
    told = page.text_content(".hoverlayer")
    assert re.search(r"a\d\.h\d", told)
    for word in ("→", "score", "in circuits from", "edges on", "says"):
        assert word in told


class TestReports:
    def test_of_one_prompt_a_newcomer_reads_the_three_answers(self, opened, model, curves):
        report = td.report(model, SHORT)
        assert len(report.html().encode()) < 6_000_000
        page = opened(report.html())
        page.wait_for_selector("#circuit .main-svg")
        text = page.inner_text("main")
        size = curves[SHORT].minimal_size(0.9)
        assert f"{size} of 1,143 edges" in text  # how many suffice for 90%
        assert "suffice for 90% faithfulness" in text
        assert re.search(r"The heads that it can least do without[^.]*: a\d\.h\d", text)  # which heads matter most
        assert re.search(r"The tokens that its information comes from[^:]*: ' \w+' \(0\.\d\d\)", text)
        for section in (
            "next token", "How faithful a circuit of each size is", "The circuit", "What circuits are made of",
            "Which heads and neurons", "Provenance", "transformer-lens ", "seed 0",
        ):  # fmt: skip
            assert section in text
        assert page.evaluate(DRAWN) == size

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [1280, 400])
    def test_of_two_prompts_fits_every_window(self, opened, model, width, scheme):
        made = td.report(model, SHORT, compare=LONG).html()
        assert len(made.encode()) < 6_000_000
        page = opened(made, width, scheme)
        page.wait_for_selector("#circuit-2 .main-svg")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OVERLAPS) == []

    def test_of_a_large_model_and_of_two_prompts_alike(self, opened):
        large = random_model(
            n_layers=12, n_heads=12, d_model=48, d_head=4, n_ctx=64, act_fn="gelu", normalization_type="LN"
        )
        ids = [place % 20 for place in range(60)]
        made = td.report(large, ids, compare=[*ids[:-1], 3], baselines=False, thresholds=(0.5, 0.9)).html()
        assert len(made.encode()) < 6_000_000
        page = opened(made, 400)
        page.wait_for_selector("#circuit-2 .main-svg")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert page.evaluate(OVERLAPS) == []

    def test_the_slider_of_a_page_shows_the_first_so_many_of_what_is_there(self, opened, model, curves):
        page = opened(td.report(model, LONG).html())
        rail = page.wait_for_selector("#circuit .slider-rail-touch-rect").bounding_box()
        circuit = curves[LONG].minimal_size(0.9)
        assert page.evaluate(DRAWN) == min(circuit, MOST)
        assert circuit > MOST
        for share in (0.01, 0.35, 0.5):
            page.mouse.click(rail["x"] + share * rail["width"], rail["y"] + rail["height"] / 2)
            page.wait_for_timeout(400)
            size = int(re.sub(r"\D", "", page.text_content("#circuit .slider-label")))
            assert page.evaluate(DRAWN) == min(size, MOST)
        page.click("#theme")  # the other theme shows the same circuit
        page.wait_for_timeout(400)
        assert page.evaluate(DRAWN) == min(size, MOST)

    def test_of_a_task(self, opened):
        gpt2 = td.load_model("books-gpt2")
        page = opened(td.report(gpt2, td.tasks.pronoun(gpt2, n=4, solved=True), method="eap").html(), 400)
        page.wait_for_selector("#circuit .main-svg")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert "4 pairs" in page.title()

    def test_text_of_prompts_is_shown_and_never_run(self, opened, model):
        page = opened(td.report(model, HOSTILE).html(), scheme="dark")
        page.wait_for_selector("#circuit .main-svg")
        assert "<script>alert(1)</script>" in page.inner_text(".text").replace("\n", "")
        assert page.query_selector("img") is None

    def test_the_button_changes_the_theme_and_back(self, opened, figures):
        page = opened(figures["curve_short"])
        page.wait_for_selector(".js-plotly-plot .main-svg")
        ground = "getComputedStyle(document.querySelector('.main-svg')).backgroundColor"
        seen = [page.evaluate(ground)]
        for _ in range(2):
            page.click("#theme")
            page.wait_for_timeout(200)
            seen.append(page.evaluate(ground))
        assert seen == ["rgb(255, 255, 255)", "rgb(21, 23, 27)", "rgb(255, 255, 255)"]

    def test_activations(self, opened, model):
        page = opened(activations_page(td.capture(model, SHORT)), 400)
        page.wait_for_selector("#top_neurons .main-svg")
        assert page.evaluate(OVERLAPS) == []


def test_a_strip_needs_no_script(opened, model, tmp_path):
    curves = [td.density(model, SHORT, position=place, baselines=False) for place in range(4, 10)]
    strip = density_strip(curves)
    strip.save(tmp_path / "strip.html")
    page = opened((tmp_path / "strip.html").read_text(encoding="utf-8"), 400)
    assert "script" not in page.content()
    assert "shook" in page.inner_text("body")


def test_ten_thousand_edges_are_drawn_as_few_traces(opened):
    graph = td.TokenGraph(12, 12, 64)
    generator = torch.Generator().manual_seed(0)
    values = {kind: torch.rand(shape, generator=generator) for kind, shape in graph.shapes.items()}
    about = provenance([f" t{place}" for place in range(64)])
    ranking = td.Scores(graph, values, about).rank("top")
    page = opened(plot_circuit(ranking.circuit(10_000), scores=td.Scores(graph, values, about)))
    page.wait_for_selector(".js-plotly-plot .main-svg")
    assert page.evaluate(DRAWN) == 10_000
    n_traces = page.evaluate("document.querySelector('.js-plotly-plot')._fullData.length")
    assert n_traces < 30

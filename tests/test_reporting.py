"""Reports without a browser: findings hold what the library's other functions say, and the page holds the findings."""

import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from component_cases import EQUAL
from conftest import random_model
from test_left_as_it_was import fail_after, flushes, state

import tracedensity as td
from tracedensity.graph import flatten
from tracedensity.graph.component import ComponentGraph
from tracedensity.graph.token import TokenGraph
from tracedensity.plot import density_page
from tracedensity.reporting import MOST, Report

PROMPT = [3, 1, 4, 1, 5]
OTHER = [9, 2, 6, 5, 3]
TASK = replace(EQUAL, name="made up")
TURNED = replace(TASK, clean=TASK.corrupted, corrupted=TASK.clean, name="turned")
STORY = "said the old man"
HOSTILE = "<script>alert(1)</script> \"a\" 'b' & $x$ <img src=x onerror=alert(2)>"
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def books():
    return td.load_model("books-llama")


@pytest.fixture(scope="module")
def own_model():
    """One that no other test touches."""
    return random_model(model_name="tiny-gpt2", act_fn="gelu_new", normalization_type="LN")


@pytest.fixture(scope="module")
def made(own_model):
    return td.report(own_model, PROMPT, compare=OTHER)


@pytest.fixture(scope="module")
def made_page(made):
    return made.html()


@pytest.fixture(scope="module")
def of_task(own_model):
    return td.report(own_model, TASK)


def outside_plotly(page):
    from plotly.offline import get_plotlyjs

    assert page.count(get_plotlyjs()) == 1
    return page.replace(get_plotlyjs(), "")


class Page(HTMLParser):
    """Ids, tables and text of a page; what is within <script> and <style> is no text."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.tables, self.text, self.tags, self._silent, self._cell = [], [], "", [], False, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._silent = tag in ("script", "style")
        self.ids += [value for name, value in attributes if name == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = tag

    def handle_endtag(self, tag):
        self._silent = False
        if tag == self._cell:
            self._cell = None

    def handle_data(self, data):
        if self._silent:
            return
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data

    def table(self, first):
        """The rows of the tables whose first column has this title, without their heads."""
        return [table[1:] for table in self.tables if table[0][0] == first]


def edges_of(circuit):
    return flatten(circuit.graph, circuit.kept).tolist()


# -- findings on a prompt --------------------------------------------------------------------------


def test_the_curve_and_the_circuit_are_those_of_the_library(own_model, made):
    for finding, prompt in zip(made.findings, (PROMPT, OTHER), strict=True):
        curve = td.density(own_model, prompt)
        assert finding.curve.to_dict() == curve.to_dict()
        assert edges_of(finding.circuit) == edges_of(curve.circuit(faithfulness=0.9))
        assert finding.circuit.faithfulness >= 0.9
        scores = td.attribute(own_model, prompt)
        assert torch.equal(flatten(scores.graph, finding.scores.values), flatten(scores.graph, scores.values))


def test_nodes_are_those_of_the_circuit_the_most_needed_first(own_model, made):
    for finding in made.findings:
        expected = td.minimality(own_model, finding.circuit, by="node")
        assert finding.nodes["loss"].is_monotonic_decreasing
        assert list(finding.nodes.index) == [*range(len(expected))]
        columns = ["node", "size", "loss", "faithfulness"]
        assert finding.nodes[columns].to_dict("records") == expected.iloc[::-1][columns].to_dict("records")
        assert len(finding.nodes) > 3


def test_candidates_are_the_most_probable_next_tokens(own_model, made):
    for finding, prompt in zip(made.findings, (PROMPT, OTHER), strict=True):
        with torch.no_grad():
            probabilities = own_model(torch.tensor([prompt]))[0, -1].softmax(-1)
        best = probabilities.topk(5)
        assert [text for text, _ in finding.candidates] == [str(token) for token in best.indices.tolist()]
        shares = [share for _, share in finding.candidates]
        assert shares == pytest.approx(best.values.tolist(), rel=1e-5)
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1
        assert finding.candidates[0] == (finding.curve.top_text, pytest.approx(finding.curve.top_probability))


def test_a_vocabulary_of_three_has_three_candidates():
    model = random_model(act_fn="gelu", normalization_type="LN", d_vocab=3)
    found = td.report(model, [0, 2, 1], baselines=False).findings[0].candidates
    assert len(found) == 3 and sum(share for _, share in found) == pytest.approx(1.0)


def test_neurons_have_the_effects_that_attribution_says(own_model, made):
    for finding, prompt in zip(made.findings, (PROMPT, OTHER), strict=True):
        effect = td.attribute(own_model, prompt, method="eap", neurons=True).values["neuron"]
        sizes = finding.neurons["effect"].abs().tolist()
        assert sizes == pytest.approx(effect.abs().flatten().topk(10).values.tolist())
        for name, pos, value, _ in finding.neurons.itertuples(index=False):
            layer, neuron = (int(number) for number in re.fullmatch(r"m(\d+)\.n(\d+)", name).groups())
            assert float(effect[layer, pos, neuron]) == pytest.approx(value)


@torch.no_grad()
def test_neurons_are_measured_by_running_the_model_without_them(own_model, made):
    for finding, prompt in zip(made.findings, (PROMPT, OTHER), strict=True):
        tokens, top = torch.tensor([prompt]), finding.curve.top_token
        whole = own_model(tokens)[0, -1].log_softmax(-1)[top]
        for name, pos, _, measured in finding.neurons.itertuples(index=False):
            layer, neuron = (int(number) for number in re.fullmatch(r"m(\d+)\.n(\d+)", name).groups())

            def without(post, hook, pos=pos, neuron=neuron):
                post[0, pos, neuron] = 0.0
                return post

            logits = own_model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", without)])
            assert float(logits[0, -1].log_softmax(-1)[top] - whole) == pytest.approx(measured, abs=1e-5)


def test_tokens_are_measured_by_running_the_circuit_without_their_embeddings(own_model, made):
    for finding in made.findings:
        circuit = finding.circuit
        for position, size, loss, left in finding.origins.itertuples(index=False):
            kept = {kind: mask.clone() for kind, mask in circuit.kept.items()}
            kept["head"][0, ..., position] = False
            kept["resid_attn"][0, position] = False
            less = circuit.of_edges(kept)
            assert circuit.n_edges - less.n_edges == size > 0
            assert less.verify(own_model).faithfulness == pytest.approx(left, abs=1e-6)
            assert circuit.verify(own_model).faithfulness - left == pytest.approx(loss, abs=1e-6)


def test_flow_and_tokens_are_those_of_the_circuit(own_model, made):
    for finding in made.findings:
        flow = td.trace_flow(finding.circuit, finding.scores)
        assert torch.equal(finding.flow.origins, flow.origins)
        assert torch.equal(finding.flow.heads, flow.heads)
        said = td.top_tokens(own_model, finding.circuit)
        for kind, tokens in said.tokens.items():
            known = tokens >= 0
            assert torch.equal(finding.tokens.tokens[kind][known], tokens[known])


def test_tokens_are_known_of_all_circuits_that_are_drawn(made):
    for finding in made.findings:
        for size in finding.curve.sizes.tolist():
            circuit = finding.curve.circuit(size=size)
            assert 0 <= size <= MOST
            for name in circuit.edge_names():
                assert len(finding.tokens.of(*circuit.graph.edge_index(name))) == 3


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"method": "eap-ig", "steps": 2, "signed": True}, id="effects"),
        pytest.param({"method": "random", "seed": 4}, id="random"),
        pytest.param({"method": "eap", "ablation": "mean", "position": 2}, id="another ablation and position"),
        pytest.param({"graph": "component", "positions": True, "method": "eap"}, id="components, positions"),
        pytest.param({"graph": "component", "ungroup": True}, id="components, every head its own keys"),
    ],
)
def test_scores_are_those_that_the_ranking_was_made_of(options, tiny_llama):
    (finding,) = td.report(tiny_llama, PROMPT, baselines=False, **options).findings
    again = finding.scores.rank(signed=options.get("signed", False))
    for kind, rank in finding.curve.ranking.rank.items():
        assert torch.equal(again.rank[kind], rank)
    about = finding.curve.provenance
    assert (finding.scores.provenance.method, finding.scores.provenance.seed) == (about.method, about.seed)
    assert finding.scores.provenance.token_ids == about.token_ids


def test_a_search_s_smaller_circuit_is_the_one_that_is_looked_at(tiny_gpt2):
    report = td.report(tiny_gpt2, PROMPT, refine=True, budget=40, baselines=False, thresholds=(0.9,))
    (finding,) = report.findings
    assert isinstance(finding.curve, td.TightCurve)
    assert finding.circuit.certificate is not None
    assert finding.circuit.n_edges == finding.curve.minimal_size(0.9) <= finding.curve.published.minimal_size(0.9)
    assert set(finding.nodes["node"]) == set(td.minimality(tiny_gpt2, finding.circuit, by="node")["node"])
    assert "published (edges)" in report.html()


def test_a_model_of_heads_alone_has_no_neurons():
    model = random_model(attn_only=True, normalization_type="LN", model_name="heads")
    report = td.report(model, PROMPT, baselines=False)
    (finding,) = report.findings
    assert finding.neurons is None
    assert finding.flow.mlps.tolist() == []
    page = Page(outside_plotly(report.html()))
    assert page.table("neuron") == [] and len(page.table("head or MLP")) == 1


# -- findings on tasks -----------------------------------------------------------------------------


def test_a_task_is_looked_at_on_the_component_graph(own_model, of_task):
    (finding,) = of_task.findings
    assert isinstance(finding.curve.ranking.graph, ComponentGraph)
    curve = td.density(own_model, TASK, graph="component")
    assert finding.curve.to_dict() == curve.to_dict()
    assert (finding.candidates, finding.flow, finding.tokens, finding.neurons) == ((), None, None, None)
    expected = td.minimality(own_model, finding.circuit, by="node")
    assert finding.nodes["loss"].tolist() == expected["loss"].tolist()[::-1]
    scores = td.attribute(own_model, TASK, graph="component")
    assert torch.equal(finding.scores.values["edge"], scores.values["edge"])


def first_logit(logits, examples):
    return logits.float()[:, 0]


def test_a_function_of_the_user_s_measures_all_of_it(own_model):
    report = td.report(own_model, TASK, metric=first_logit, baselines=False)
    (finding,) = report.findings
    expected = td.minimality(own_model, finding.circuit, by="node", metric=first_logit)
    assert finding.nodes["loss"].tolist() == expected["loss"].tolist()[::-1]
    assert finding.scores.provenance.metric == finding.curve.metric == "first_logit"
    assert "metric=first_logit" in report.command
    assert "first_logit" in Page(outside_plotly(report.html())).text


# -- the page --------------------------------------------------------------------------------------


def test_the_page_of_a_prompt_holds_its_findings(made):
    alone = replace(made, findings=made.findings[:1])
    (finding,) = alone.findings
    page = Page(outside_plotly(alone.html()))
    assert {"curve", "circuit", "composition", "heads"} <= set(page.ids)
    assert "How much of the model does this prediction need?" in page.text
    size, n_edges = finding.circuit.n_edges, finding.curve.n_edges
    assert f"{size} of {n_edges} edges" in page.text and "suffice for 90% faithfulness" in page.text
    (candidates,) = page.table("next token")
    assert candidates == [[f"'{text}'", f"{share:.3f}", ""] for text, share in finding.candidates]
    (nodes,) = page.table("head or MLP")
    expected = finding.nodes.head(12)
    assert [row[:3] for row in nodes] == [
        [name, str(size), f"{reached:.3f}"]
        for name, size, reached in expected[["node", "size", "faithfulness"]].itertuples(index=False)
    ]
    (neurons,) = page.table("neuron")
    assert [row[0] for row in neurons] == finding.neurons["neuron"].tolist()
    assert [float(row[2]) for row in neurons] == pytest.approx(finding.neurons["measured"].tolist(), abs=6e-4)
    assert [float(row[3]) for row in neurons] == pytest.approx(finding.neurons["effect"].tolist(), abs=6e-4)
    assert finding.curve.provenance.fingerprint in page.text
    assert alone.command in page.text


def test_shares_of_the_flow_are_those_of_heads_and_mlps(made, made_page):
    (rows, _) = Page(outside_plotly(made_page)).table("head or MLP")
    (finding, _) = made.findings
    for name, _, _, share, way, says in rows:
        layer, *head = (int(number) for number in re.findall(r"\d+", name))
        flow = finding.flow.heads[layer, head[0]] if head else finding.flow.mlps[layer]
        assert share == f"{float(flow):.1%}"
        assert ("→" in way) == bool(head)
        assert says.count("'") == 6  # three tokens


def test_two_prompts_are_set_side_by_side(made_page):
    page = Page(outside_plotly(made_page))
    assert len(page.ids) == len(set(page.ids))
    figures = {"curve", "circuit", "composition", "heads"}
    assert {f"{name}-{number}" for name in figures for number in (1, 2)} | {"compared", "difference"} <= set(page.ids)
    assert len(page.table("next token")) == len(page.table("head or MLP")) == len(page.table("neuron")) == 2
    assert "How much of the model do these two need?" in page.text


@pytest.mark.parametrize(
    ("first", "second", "options", "joint", "figures"),
    [
        pytest.param(PROMPT, [9, 2, 6], {}, True, {"compared", "difference"}, id="prompts of two lengths"),
        pytest.param(PROMPT, PROMPT, {}, True, {"compared", "difference"}, id="the same twice"),
        pytest.param(PROMPT, TASK, {}, False, set(), id="a prompt and a task"),
        pytest.param(PROMPT, TASK, {"graph": "component"}, False, {"difference"}, id="both on the component graph"),
        pytest.param(TASK, TURNED, {}, True, {"compared", "difference"}, id="tasks"),
    ],
)  # fmt: skip
def test_whatever_is_compared_has_a_page(first, second, options, joint, figures, own_model):
    report = td.report(own_model, first, compare=second, baselines=False, thresholds=(0.9,), **options)
    page = Page(outside_plotly(report.html()))
    assert figures <= set(page.ids)
    assert ("compared" in page.ids) == joint
    assert ("by tv here and by logit_diff there, on no common scale" in page.text) == (not joint)
    assert {"curve-1", "curve-2", "circuit-1", "circuit-2"} <= set(page.ids)


def test_the_page_of_a_task_holds_its_pairs(of_task):
    page = Page(outside_plotly(of_task.html()))
    assert "How much of the model does 'made up' need?" in page.text
    assert "of its edges are on a path from the input to the logits" in page.text
    assert {"curve", "circuit", "composition", "heads"} <= set(page.ids)
    (nodes,) = page.table("head or MLP")
    assert [row[0] for row in nodes] == of_task.findings[0].nodes["node"].head(12).tolist()
    assert {len(row) for row in nodes} == {3}  # nothing is said of flow


@pytest.mark.parametrize("subject", [pytest.param(PROMPT, id="a prompt"), pytest.param(TASK, id="a task")])
def test_a_circuit_of_no_edge_at_all_has_a_page_too(subject, own_model):
    report = td.report(own_model, subject, faithfulness=1e-9, baselines=False)
    (finding,) = report.findings
    assert finding.circuit.n_edges == 0 and len(finding.nodes) == 0
    assert "It has no heads: nothing is moved from one token to another." in Page(outside_plotly(report.html())).text


def test_the_whole_graph_is_asked_for_as_a_whole_number(own_model):
    report = td.report(own_model, PROMPT, faithfulness=1, baselines=False)
    assert report.faithfulness == 1.0
    assert "100% faithfulness" in Page(outside_plotly(report.html())).text


def test_one_token_has_a_page(own_model):
    assert "curve" in Page(outside_plotly(td.report(own_model, [3], baselines=False).html())).ids


def test_a_page_needs_no_network_and_is_small_enough_to_send(books):
    text = f"{STORY}, and the young man of the house said that he had seen the old"
    report = td.report(books, text, compare=text, baselines=False, thresholds=(0.9,))
    page = report.html()
    assert report.findings[0].circuit.n_edges > MOST / 2  # as many lines as there can be
    assert len(page.encode()) < 6_000_000
    rest = outside_plotly(page)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", rest)
    assert re.findall(r"<script[^>]+src", rest) == []


def test_text_of_prompts_is_shown_and_never_run(books):
    report = td.report(books, HOSTILE, compare=f"{HOSTILE}!", baselines=False, thresholds=(0.5,))
    rest = outside_plotly(report.html())
    page = Page(rest)
    assert "alert(1)" in page.text and "onerror=alert(2)" in page.text
    assert "img" not in page.tags and "<script>alert" not in rest
    figures = 2 + 4 * 2  # side by side, and of each prompt
    assert page.tags.count("script") == rest.count("<script") == rest.count("</script") == figures + 2
    assert html.escape(report.command) in rest


def test_names_of_tasks_models_and_functions_are_never_run(of_task):
    (finding,) = of_task.findings
    about = replace(finding.curve.provenance, task=replace(TASK, name=ATTACK), model=ATTACK, metric=ATTACK)
    curve = replace(finding.curve, metric=ATTACK, ranking=replace(finding.curve.ranking, provenance=about))
    circuit = replace(finding.circuit, provenance=about, metric=ATTACK)
    scores = replace(finding.scores, provenance=about)
    hostile = replace(finding, curve=curve, circuit=circuit, scores=scores)
    for several in ((hostile,), (hostile, finding)):
        rest = outside_plotly(Report(several, 0.9, ATTACK, {ATTACK: ATTACK}).html())
        page = Page(rest)
        assert "img" not in page.tags and "<script>alert" not in rest and "<img" not in rest
        assert page.text.count("alert(1)") >= 3
        assert rest.count("<script") == rest.count("</script")


def test_tokens_are_never_run(made):
    (finding, _) = made.findings
    about = replace(finding.curve.provenance, texts=(ATTACK,) * len(PROMPT))
    ranking = replace(finding.curve.ranking, provenance=about)
    hostile = replace(
        finding,
        curve=replace(finding.curve, top_text=ATTACK, ranking=ranking),
        circuit=replace(finding.circuit, provenance=about),
        candidates=tuple(("<img>", share) for _, share in finding.candidates),
        tokens=replace(finding.tokens, texts=dict.fromkeys(range(20), "<img>")),
    )
    rest = outside_plotly(replace(made, findings=(hostile,)).html())
    page = Page(rest)
    assert page.table("next token")[0][0][0] == "'<img>'"
    assert page.table("head or MLP")[0][0][-1] == "'<img>', '<img>', '<img>'"
    assert "img" not in page.tags and "<script>alert" not in rest and "<img" not in rest


# -- the short page of a curve alone ---------------------------------------------------------------


def test_the_short_page_says_where_a_curve_is_from(made):
    (finding, _) = made.findings
    page = Page(outside_plotly(density_page(finding.curve)))
    about = finding.curve.provenance
    assert f"Model {about.model} ({about.fingerprint}), token ids {PROMPT}." in page.text
    assert "Edges scored by norm, ordered by greedy, metric tv, seed 0, skip connections ablated" in page.text


# -- how to make it again --------------------------------------------------------------------------


def test_the_command_makes_the_same_bytes(own_model, made, made_page, monkeypatch, tmp_path):
    assert made.command == (
        "td.report(model, [3, 1, 4, 1, 5], compare=[9, 2, 6, 5, 3], faithfulness=0.9, path='report.html')"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(eval(made.command, {"td": td, "model": own_model}), Report)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == made_page.encode()


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_options_are_in_the_command(kind, own_model):
    options = {"method": "eap", "thresholds": (0.7,), "baselines": False, "position": -2, "seed": 3}
    report = td.report(own_model, kind(PROMPT), faithfulness=0.7, **options)
    written = ", ".join(f"{name}={value!r}" for name, value in options.items())
    assert report.command == f"td.report(model, {PROMPT}, faithfulness=0.7, {written}, path='report.html')"
    again = eval(report.command.replace(", path='report.html'", ""), {"td": td, "model": own_model})
    assert again.findings[0].curve.to_dict() == report.findings[0].curve.to_dict()
    assert edges_of(again.findings[0].circuit) == edges_of(report.findings[0].circuit)


def test_text_and_tasks_are_in_the_command(books, of_task):
    text = 'the "old" man\'s'
    report = td.report(books, text, baselines=False, thresholds=(0.9,))
    assert f"td.load_model('books-llama'), {text!r}, faithfulness=0.9, baselines=False" in report.command
    assert of_task.command == "td.report(model, task, faithfulness=0.9, path='report.html')"


def test_the_report_says_what_it_was_made_with(made, made_page):
    assert made.versions.keys() == {"tracedensity", "transformer-lens", "torch", "plotly", "python"}
    assert made.versions["tracedensity"] == td.__version__
    text = Page(outside_plotly(made_page)).text
    assert f"torch {made.versions['torch']}" in text


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -0.5, 1.5, float("nan")])
def test_a_faithfulness_out_of_range_is_refused_before_anything_is_run(bad, own_model, monkeypatch):
    monkeypatch.setattr("tracedensity.reporting.density", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(ValueError, match=f"`faithfulness` must be above 0 and at most 1, got {bad!r}"):
        td.report(own_model, PROMPT, faithfulness=bad)


def test_a_folder_that_does_not_exist_is_refused_before_anything_is_run(own_model, monkeypatch, tmp_path):
    monkeypatch.setattr("tracedensity.reporting.density", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(ValueError, match="`path` must be a file in a folder that exists, got "):
        td.report(own_model, PROMPT, path=tmp_path / "nowhere" / "report.html")


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        pytest.param(PROMPT, {"method": "magic"}, "`method` must be one of", id="method"),
        pytest.param(PROMPT, {"budget": 3}, "`budget` must be left out without `refine=True`", id="budget"),
        pytest.param(PROMPT, {"graph": "magic"}, "`graph` must be one of", id="graph"),
        pytest.param([], {}, "`prompt` must hold at least one token", id="empty prompt"),
        pytest.param([99], {}, "`prompt` must hold token ids from 0 to 19", id="token"),
        pytest.param("text", {}, "`prompt` must be token ids: this model has no tokenizer", id="text"),
        pytest.param(TASK, {"graph": "token"}, "`prompt` must be one prompt on the token graph, got a task", id="task"),
        pytest.param(PROMPT, {"compare": [99]}, "`prompt` must hold token ids from 0 to 19", id="the other prompt"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_file(prompt, options, words, own_model, tmp_path):
    with pytest.raises(ValueError, match=words) as refused:
        td.report(own_model, prompt, path=tmp_path / "report.html", **options)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_an_option_that_there_is_not_is_refused(own_model):
    with pytest.raises(ValueError, match=r"`options` must be those of `td.density`, got budgets"):
        td.report(own_model, PROMPT, budgets=3)


def test_the_page_of_a_report_is_written_whole_or_not_at_all(made, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made.save(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# -- the model is left as it was -------------------------------------------------------------------


@pytest.mark.parametrize("subject", [pytest.param(PROMPT, id="a prompt"), pytest.param(TASK, id="a task")])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(subject, training, tiny_llama):
    tiny_llama.train(training)
    before, flushed = state(tiny_llama), flushes()
    td.report(tiny_llama, subject, baselines=False)
    assert state(tiny_llama) == before
    assert flushes() == flushed
    tiny_llama.eval()


@pytest.mark.parametrize(("error", "n_passes"), [(RuntimeError, 1), (KeyboardInterrupt, 7), (RuntimeError, 12)])
def test_the_model_is_left_as_it_was_after_an_error_in_the_middle(error, n_passes, tiny_gpt2, monkeypatch):
    before, flushed = state(tiny_gpt2), flushes()
    fail_after(monkeypatch, tiny_gpt2, n_passes, error)
    with pytest.raises(error):
        td.report(tiny_gpt2, PROMPT, baselines=False)
    assert state(tiny_gpt2) == before
    assert flushes() == flushed


def test_the_graph_of_a_prompt_is_of_its_tokens(made):
    assert all(isinstance(finding.circuit.graph, TokenGraph) for finding in made.findings)
    assert repr(made).count("DensityCurve: ") == 2


def test_several_prompts_are_one_sentence(own_model):
    with pytest.raises(ValueError, match="`prompt` must be one prompt, or a `Task` of several, got several prompts"):
        td.report(own_model, [[1, 2, 3], [2, 1, 3]])
    with pytest.raises(ValueError, match=r"must be one prompt here, got a list of 2\. `td.density` takes several"):
        td.attribute(own_model, [[1, 2, 3], [2, 1, 3]])

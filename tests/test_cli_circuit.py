"""The command line on the graph of heads and MLPs: tasks, pairs from files, circuits."""

import html
import json
from typing import get_args

import pytest

import tracedensity as td
from tracedensity.choices import TaskName
from tracedensity.cli import main

TASK = ["--task", "induction", "--n", "4", "--model", "books-gpt2"]


@pytest.fixture(scope="module")
def model():
    return td.load_model("books-gpt2")


@pytest.fixture(autouse=True)
def _loaded_once(model, monkeypatch):
    """Loading takes a second each time."""
    monkeypatch.setitem(td.__dict__, "load_model", lambda name_or_model="books-gpt2", **_: model)


def test_the_tasks_of_the_command_line_are_those_of_the_library():
    assert get_args(TaskName) == td.tasks.NAMES


def test_circuit_says_what_the_library_says(model, capsys, tmp_path):
    path = tmp_path / "circuit.safetensors"
    assert main(["circuit", *TASK, "--method", "eap", "--size", "40", "--json", "--out", str(path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    task = td.tasks.make("induction", model, n=4)
    scores = td.attribute(model, task, graph="component", method="eap")
    circuit = scores.rank("greedy").circuit(40).verify(model)
    solved = task.solved(model)
    assert printed["size"] == 40 and printed["n_edges"] == circuit.graph.n_edges
    assert printed["pruned_size"] == circuit.pruned_size
    assert printed["faithfulness"] == pytest.approx(circuit.faithfulness, abs=1e-4)
    assert [edge["edge"] for edge in printed["edges"]] == circuit.edge_names()
    _, index = circuit.graph.edge_index(printed["edges"][0]["edge"])
    assert printed["edges"][0]["score"] == pytest.approx(float(scores.values["edge"][index]), abs=1e-4)
    assert (printed["task"], printed["method"], printed["metric"]) == ("induction", "eap", "logit_diff")
    assert printed["n_examples"] == 4 and printed["ablation"] == "counterfactual"
    assert printed["accuracy"] == pytest.approx(solved.accuracy)
    assert printed["mean_logit_difference"] == pytest.approx(solved.mean_logit_difference, abs=1e-4)

    loaded = td.load(path)
    assert loaded.edge_names() == circuit.edge_names()
    assert loaded.provenance.task is not None and len(loaded.provenance.task) == 4
    assert main(["verify", str(path)]) == 0
    assert "(logit_diff)" in (said := capsys.readouterr().out) and "verified" in said
    assert main(["show", str(path), "--html", str(tmp_path / "circuit.html")]) == 0
    assert "read as value" in (tmp_path / "circuit.html").read_text()


def test_circuit_prints_the_task_and_the_strongest_edges(capsys, tmp_path):
    files = [tmp_path / "circuit.html", tmp_path / "circuit.json"]
    options = ["--method", "eap", "--ungroup", "--html", str(files[0]), "--benchmark", str(files[1])]
    assert main(["circuit", *TASK, *options]) == 0
    said = capsys.readouterr().out
    assert "Task('induction', 4 pairs" in said and "Solved(" in said
    assert "of its edges are on a path from the input to the logits" in said
    assert "->logits" in said
    circuit = td.read_benchmark(files[1]).circuit
    assert circuit.n_edges == circuit.graph.n_edges // 20
    assert files[0].stat().st_size > 1e6  # plotly is in it


def test_a_prompt_has_a_circuit_too(capsys):
    assert main(["circuit", "said the old man", "--method", "eap", "--size", "10", "--seed", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["task"], printed["ablation"], printed["metric"], printed["seed"]) == (None, "resample", "tv", 3)
    assert printed["accuracy"] is None


def test_pairs_of_one_length_have_positions(capsys):
    assert main(["attribute", "--task", "pronoun", "--same-length", "--positions", "--method", "eap", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert 1 < printed["n_examples"] < 32 and all("@" in each["edge"] for each in printed["edges"])


def test_density_of_each_example(capsys):
    assert main(["density", *TASK, "--method", "eap", "--no-baselines", "--per-example", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["task"], printed["n_examples"], printed["score_metric"]) == ("induction", 4, "logit_diff")
    assert printed["full"] > printed["empty"]
    assert {len(sizes) for sizes in printed["minimal_size_per_example"].values()} == {4}
    assert all(row["pruned"] <= row["first"] for row in printed["minimal_size"].values())
    assert main(["density", *TASK, "--method", "eap", "--no-baselines"]) == 0
    said = capsys.readouterr().out
    assert "Task('induction', 4 pairs" in said and "after pruning" in said


def test_density_of_a_task(capsys, tmp_path):
    path, page = tmp_path / "curve.safetensors", tmp_path / "curve.html"
    options = ["--method", "eap", "--no-baselines", "--save", str(path), "--html", str(page), "--json"]
    assert main(["density", *TASK, *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["metric"], printed["ablation"], printed["method"]) == ("logit_diff", "counterfactual", "eap")
    curve = td.load(path)
    assert curve.minimal_size(0.9) == printed["minimal_size"]["0.9"]["first"]
    assert curve.values.shape == (len(curve.sizes), 4)
    text = page.read_text()
    assert "How much of the model does &#x27;induction&#x27; need?" in text or "'induction'" in text
    assert "circuit between" not in text
    assert main(["show", str(path)]) == 0
    assert "induction (4)" in capsys.readouterr().out


def test_attribute_prints_the_edges_that_matter_most(model, capsys):
    options = ["--method", "eap", "--ablation", "mean"]
    assert main(["attribute", *TASK, *options, "--top", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    scores = td.attribute(
        model, td.tasks.make("induction", model, n=4), graph="component", method="eap", ablation="mean"
    )
    top = scores.top(3)
    assert [each["edge"] for each in printed["edges"]] == list(top["edge"])
    assert [each["score"] for each in printed["edges"]] == pytest.approx(list(top["score"]), rel=1e-3)
    assert (printed["task"], printed["method"], printed["ablation"]) == ("induction", "eap", "mean")
    assert main(["attribute", *TASK, *options, "--top", "3"]) == 0
    assert str(top["edge"][0]) in capsys.readouterr().out
    assert main(["attribute", *TASK, *options, "--top", "2", "--nodes", "max", "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert [each["node"] for each in nodes] == list(scores.of_nodes("max").index[:2])


def test_attribute_tells_neurons_and_tokens_apart_and_knows_both_graphs(model, capsys):
    prompt = "said the old man"
    assert (
        main(["attribute", prompt, "--graph", "component", "--neurons", "--method", "eap", "--top", "500", "--json"])
        == 0
    )
    assert ".n" in "".join(each["edge"] for each in json.loads(capsys.readouterr().out)["edges"])
    assert main(["attribute", prompt, "--graph", "component", "--positions", "--method", "eap", "--json"]) == 0
    assert all("@" in each["edge"] for each in json.loads(capsys.readouterr().out)["edges"])
    assert main(["attribute", prompt, "--top", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["method"] == "norm" and printed["edges"][0]["edge"] == td.attribute(model, prompt).top(1)["edge"][0]


def test_circuits_of_nodes_and_of_tokens(capsys):
    sizes = []
    for size in ([], ["--size", "1"], ["--size", "6"]):
        assert main(["circuit", *TASK, "--method", "eap", "--nodes", "sum", *size, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        sizes.append(printed["size"])
    assert len({edge["edge"].split("->")[0] for edge in printed["edges"]}) == 6
    assert sizes[1] == 1 and sizes[0] >= printed["n_edges"] // 20
    assert main(["circuit", *TASK, "--nodes", "sum", "--size", "99"]) == 2
    assert "`--size` must be a number of nodes from 1 to" in capsys.readouterr().err
    assert main(["circuit", *TASK, "--method", "eap", "--positions", "--size", "60", "--json"]) == 0
    assert all("@" in each["edge"] for each in json.loads(capsys.readouterr().out)["edges"])


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """Two circuits in files."""
    folder = tmp_path_factory.mktemp("circuits")
    task = td.tasks.make("induction", model, n=4)
    ranking = td.attribute(model, task, graph="component", method="eap").rank("greedy")
    paths = [folder / f"{size}.safetensors" for size in (20, 40)]
    for path, size in zip(paths, (20, 40), strict=True):
        ranking.circuit(size).verify(model).save(path)
    return paths


def test_check_leaves_out_whole_heads_and_mlps(model, saved, capsys):
    assert main(["check", str(saved[0]), "--by", "node", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = td.minimality(model, td.load(saved[0]), by="node")
    assert [row["node"] for row in printed["nodes"]] == list(expected["node"])
    assert [row["loss"] for row in printed["nodes"]] == pytest.approx(list(expected["loss"]), abs=1e-5)
    assert main(["check", str(saved[0]), "--by", "node"]) == 0
    assert "without each node, least needed first" in capsys.readouterr().out
    assert main(["check", str(saved[0]), "--by", "token"]) == 2
    assert "`by` must be 'edge' or 'node' but on the token graph, got 'token'" in capsys.readouterr().err


def test_check_says_what_each_edge_is_worth_and_what_is_missing(model, saved, capsys):
    assert main(["check", str(saved[0]), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    circuit = td.load(saved[0])
    edges = td.minimality(model, circuit)
    assert [each["edge"] for each in printed["edges"]] == list(edges["edge"])
    assert [each["loss"] for each in printed["edges"]] == pytest.approx(list(edges["loss"]), abs=1e-4)
    complete = td.completeness(model, circuit)
    assert printed["complement"] == pytest.approx(complete.complement, abs=1e-4)
    assert [each["model"] for each in printed["knockouts"]] == pytest.approx(complete.model.tolist(), abs=1e-4)
    assert main(["check", str(saved[0])]) == 0
    said = capsys.readouterr().out
    assert "Completeness(20 knockouts" in said and edges["edge"][0] in said


def test_compare_counts_what_is_common(saved, capsys):
    assert main(["compare", *map(str, saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"first": 20, "second": 40, "both": 20, "jaccard": 0.5}
    assert main(["compare", *map(str, saved)]) == 0
    assert (
        "20 edges of both, 0 of the first only, 20 of the second only; Jaccard overlap 0.500" in capsys.readouterr().out
    )


@pytest.mark.parametrize("suffix", ["safetensors", "graphml", "dot", "csv", "json"])
def test_convert_writes_what_the_library_writes(suffix, model, saved, capsys, tmp_path):
    out, circuit = tmp_path / f"circuit.{suffix}", td.load(saved[0])
    assert main(["convert", str(saved[0]), str(out)]) == 0
    assert capsys.readouterr().out == f"20 edges written to {out}.\n"
    if suffix == "safetensors":
        assert td.load(out).edge_names() == circuit.edge_names()
    elif suffix == "json":
        assert td.read_benchmark(out).circuit.edge_names() == circuit.edge_names()
        again = tmp_path / "again.safetensors"
        assert main(["convert", str(out), str(again)]) == 0
        assert td.load(again).edge_names() == circuit.edge_names()
        assert main(["show", str(out)]) == 0
        capsys.readouterr()
        scored = tmp_path / "scored.json"
        td.write_benchmark(
            circuit, scored, td.attribute(model, circuit.provenance.subject, graph="component", method="eap")
        )
        assert main(["convert", str(scored), str(out)]) == 0
        assert json.loads(out.read_text())["edges"] == json.loads(scored.read_text())["edges"]
        assert main(["compare", str(out), str(saved[0]), "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["jaccard"] == 1
    else:
        text = html.unescape(out.read_text())
        assert all(name in text for name in (circuit.nodes() if suffix == "dot" else circuit.edge_names()))


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("convert", ["circuit.png"], "`OUT` must end in one of .safetensors, .graphml, .dot, .csv, .json"),
        ("convert", ["nowhere/circuit.dot"], "in a folder that exists"),
        ("compare", ["missing.safetensors"], "which does not exist"),
        ("check", ["--model"], "requires an argument"),
    ],
)
def test_bad_files_are_one_sentence(command, words, sentence, saved, capsys):
    assert main([command, str(saved[0]), *words]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.out == "" and said.err.count("\n") == 1


def test_a_benchmark_file_names_no_task(saved, capsys, tmp_path):
    out = tmp_path / "circuit.json"
    assert main(["convert", str(saved[0]), str(out)]) == 0
    for command in ("check", "verify"):
        assert main([command, str(out)]) == 2
        assert "`CIRCUIT` must say what it was found on, got a benchmark file" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_pairs_come_from_files(suffix, capsys, tmp_path):
    path = tmp_path / f"pairs.{suffix}"
    row = {"clean": "said the old man", "corrupted": "said the old king", "answer": " and", "distractor": " of"}
    if suffix == "csv":
        path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    else:
        path.write_text(json.dumps(row) + "\n")
    assert main(["circuit", "--pairs", str(path), "--method", "eap", "--size", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_examples"] == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["circuit", "--task", "capitals"], "`model` must hold"),
        (["circuit", "--task", "riddles"], "'riddles' is not one of"),
        (["density", *TASK, "--graph", "token"], "`prompt` must be one prompt on the token graph, got a task"),
        (["density", *TASK, "--position", "2"], "`position` must be left to the task"),
        (["circuit", "a prompt", "--ablation", "counterfactual"], "without a corrupted counterpart"),
        (["circuit", "a prompt", "--metric", "logit_diff"], "for a task without distractors"),
        (["circuit", "a prompt", "--out", "circuit.json"], "`circuit.json` must not end in .json"),
        (["circuit", "a prompt", "--benchmark", "circuit.json", "--positions"], "`--benchmark` must come without"),
        (["density", "a prompt", "--signed"], "`signed` must be left out for method 'norm'"),
        (["circuit", "a prompt", "--same-length"], "`--same-length` must come with `--task` or `--pairs`"),
        (
            ["circuit", "--task", "pronoun", "--positions"],
            "on the command line `--same-length`, keeps pairs of one length",
        ),
        (["circuit", *TASK, "--nodes", "sum", "--family", "top"], "`family` must be left out where whole nodes enter"),
        (["attribute", "a prompt", "--top", "0"], "`--top` must be at least 1, got 0"),
        (["attribute", "a prompt", "--nodes", "sum"], "`graph` must be a component graph for scores of nodes"),
        (["attribute", "a prompt", "--neurons"], " or random for neurons, got 'norm'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, sentence, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.out == "" and said.err.count("\n") == 1

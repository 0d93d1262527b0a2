"""Reports and pictures from the command line: what the library would have drawn, or one sentence and no file."""

import html
import inspect
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import typer
from conftest import random_model

import tracedensity as td
from tracedensity import cli
from tracedensity.activations import Activations
from tracedensity.cli import app, main
from tracedensity.loading import load_model
from tracedensity.plot import (
    activations_page,
    density_strip,
    plot_composition,
    plot_curve,
    plot_curves,
    plot_difference,
    plot_growth,
    plot_heatmap,
    write_html,
)
from tracedensity.plot.theme import DARK

MAN, KING, SHORT = "said the old man", "said the old king", "then the king"
TASK = ["--task", "induction", "--n", "4", "--method", "eap"]
COMMANDS = ("report", "plot", "activations", "strip")


@pytest.fixture(scope="module")
def model():
    return td.load_model("books-gpt2")


@pytest.fixture(autouse=True)
def _loaded_once(model, monkeypatch):
    """Loading takes a second each time."""
    monkeypatch.setitem(td.__dict__, "load_model", lambda name_or_model="books-gpt2", **_: model)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def results(model):
    """Curves of three prompts, one of another length, and of a task; and a circuit of each."""
    curves = {
        "man": td.density(model, MAN, baselines=False),
        "king": td.density(model, KING, baselines=False),
        "short": td.density(model, SHORT, baselines=False),
        "task": td.density(
            model, td.tasks.make("induction", model, n=4), graph="component", method="eap", baselines=False
        ),
    }
    return curves | {f"{name}-circuit": curve.circuit(faithfulness=0.5) for name, curve in curves.items()}


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    """Each of these, saved under its name."""
    folder = tmp_path_factory.mktemp("saved")
    for name, result in results.items():
        result.save(folder / f"{name}.safetensors")
    td.write_benchmark(results["task-circuit"], folder / "benchmark.json")
    return folder


def files(folder, names):
    return [str(folder / (name if "." in name else f"{name}.safetensors")) for name in names]


def refused(capsys, tmp_path, why):
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Error: ") and why in said.err
    assert said.err.index("\n") == len(said.err) - 1
    assert list(tmp_path.iterdir()) == []


def command_of(page):
    """The command that a page says makes it again."""
    (found,) = re.findall(r"<code>(.*?)</code>", page.split("To make it again:")[1], re.DOTALL)
    return html.unescape(found)


# -- report ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(model):
    return td.report(model, "then")


@pytest.fixture
def asked(made, monkeypatch):
    """What the library is asked for a report on, each time answered with the same one and no work."""
    calls = []
    monkeypatch.setitem(
        td.__dict__, "report", lambda model, *prompt, **options: calls.append((*prompt, options)) or made
    )
    return calls


@pytest.fixture
def no_page(monkeypatch):
    """Where it is not about the page: drawing takes time."""
    monkeypatch.setattr(td.Report, "html", lambda self: "a page")


def test_a_report_is_the_page_of_the_library_with_its_defaults(made, capsys, tmp_path):
    assert main(["report", "then"]) == 0
    expected = replace(made, command="tracedensity report then")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == expected.html()
    (finding,) = made.findings
    said = f"{finding.curve!r}\n\nWritten to report.html: open it in a browser.\n"
    assert capsys.readouterr() == (said, "")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_every_option_of_a_report_reaches_the_library(made, asked, tmp_path):
    words = ["report", MAN, "--compare", KING, "-o", "both.html", *shlex.split(
        "--model books-gpt2 --graph token --method eap --family top --refine --budget 5 --metric kl --ablation mean "
        "--keep-residual --faithfulness 0.8 --position -2 --seed 3 --device cpu"
    )]  # fmt: skip
    assert main(words) == 0
    ((prompt, options),) = asked
    assert prompt == MAN
    assert options == {
        "compare": KING, "graph": "token", "method": "eap", "family": "top", "refine": True, "budget": 5,
        "metric": "kl", "ablation": "mean", "keep_residual": True, "faithfulness": 0.8, "position": -2, "seed": 3,
    }  # fmt: skip
    assert options.keys() - {"compare", "faithfulness"} <= defaults_of(td.density).keys()
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert page == replace(made, command=shlex.join(["tracedensity", *words])).html()


def test_the_command_in_the_page_is_the_one_that_was_given(asked, tmp_path):
    prompt = '"it\'s" <b>$x$</b> &amp;'
    words = ["report", prompt, "--faithfulness", "0.5", "--out", "a report.html"]
    assert main(words) == 0
    page = (tmp_path / "a report.html").read_bytes()
    assert shlex.split(command_of(page.decode())) == ["tracedensity", *words]
    assert main(shlex.split(command_of(page.decode()))[1:]) == 0
    assert (tmp_path / "a report.html").read_bytes() == page
    assert asked == [(prompt, {"compare": None, "faithfulness": 0.5})] * 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param('it\'s "new" \\ $HOME `id` !', id="signs of the shell"),
        pytest.param("a caf\u00e9\nit's\t\u202e\x85\U0001f600 \\n $x", id="what cannot be seen"),
        pytest.param("\n", id="a line break"),
    ],
)
def test_a_shell_reads_the_command_as_it_was_given(prompt, asked, tmp_path):
    words = ["report", prompt, "-o", "report.html"]
    assert main(words) == 0
    assert [given for given, _ in asked] == [prompt]
    command = command_of((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert command.isprintable()
    shell = f"tracedensity() {{ printf '%s\\0' \"$@\"; }}; {command}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert done.stdout.decode().split("\0")[:-1] == words


@pytest.mark.usefixtures("no_page")
def test_a_task_has_a_report_and_a_prompt_may_stand_beside_it(asked):
    assert main(["report", *TASK, "--compare", MAN]) == 0
    ((task, options),) = asked
    assert (task.name, len(task)) == ("induction", 4)
    assert options == {"compare": MAN, "graph": "component", "method": "eap"}


@pytest.mark.usefixtures("no_page")
def test_pairs_from_a_file_have_a_report(asked, tmp_path):
    row = {"clean": "said the old man", "corrupted": "said the old king", "answer": " and", "distractor": " of"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["report", "--pairs", "pairs.jsonl"]) == 0
    ((task, options),) = asked
    assert (len(task), options) == (1, {"compare": None, "graph": "component"})


@pytest.mark.parametrize(
    ("words", "why"),
    [
        pytest.param([], "give one of `PROMPT`, `--task` and `--pairs`", id="nothing"),
        pytest.param([MAN, "--task", "ioi"], "give one of `PROMPT`, `--task` and `--pairs`", id="prompt and task"),
        pytest.param([MAN, "--faithfulness", "0"], "`faithfulness` must be above 0 and at most 1, got 0", id="0"),
        pytest.param([MAN, "--faithfulness", "nan"], "`faithfulness` must be above 0 and at most 1, got nan", id="nan"),
        pytest.param([MAN, "--budget", "3"], "`budget` must be left out without `refine=True`", id="budget"),
        pytest.param([MAN, "--metric", "logit_diff"], "`metric` must be one of", id="metric"),
        pytest.param([MAN, "--method", "magic"], "'magic' is not one of", id="method"),
        pytest.param([MAN, "--position", "9"], "`position` must be a token of the prompt", id="position"),
        pytest.param([MAN, "--n", "4"], "`--n` must come with `--task`", id="pairs of a prompt"),
        pytest.param(
            [*TASK, "--graph", "token"], "`prompt` must be one prompt on the token graph", id="a task by token"
        ),
        pytest.param([MAN, "--compare", ""], "`prompt` must hold at least one token", id="nothing to compare"),
        pytest.param(
            [MAN, "-o", "nowhere/report.html"], "a folder that exists, got 'nowhere/report.html'", id="no folder"
        ),
        pytest.param([MAN, "-o", "report.png"], "`--out` must end in .html, got 'report.png'", id="no page"),
        pytest.param([MAN, "-o", "."], "must be a file in a folder that exists, got '.'", id="a folder"),
    ],
)  # fmt: skip
def test_a_report_that_cannot_be_made_is_one_sentence_and_no_file(words, why, capsys, tmp_path):
    assert main(["report", *words]) == 2
    refused(capsys, tmp_path, why)


# -- plot ------------------------------------------------------------------------------------------

DRAWN = {
    "one curve": ([], ["man"], lambda man: plot_curve(man)),
    "one curve, by its kind": (["curve"], ["man"], lambda man: plot_curve(man)),
    "two curves": ([], ["man", "king"], lambda *two: plot_curves(two, names=["man", "king"])),
    "two curves, by their kind": (["curve"], ["man", "short"], lambda *two: plot_curves(two, names=["man", "short"])),
    "three curves": (
        [], ["man", "king", "short"], lambda *three: plot_curves(three, names=["man", "king", "short"]),
    ),
    "circuits of a curve": (["circuits"], ["man"], lambda man: plot_growth(man)),
    "composition": (["composition"], ["man"], lambda man: plot_composition(man)),
    "composition of a task": (["composition"], ["task"], lambda task: plot_composition(task)),
    "heads of a curve": (["heads"], ["man"], lambda man: plot_heatmap(man)),
    "heads of two curves": (["heads"], ["man", "short"], lambda a, b: plot_heatmap(a, minus=b)),
    "tokens of a curve": (["tokens"], ["man"], lambda man: plot_heatmap(man, over="token")),
    "tokens of two curves": (["tokens"], ["man", "king"], lambda a, b: plot_heatmap(a, over="token", minus=b)),
    "one circuit": ([], ["man-circuit"], lambda man: man.plot()),
    "one circuit, by its kind": (["circuit"], ["task-circuit"], lambda task: task.plot()),
    "two circuits": (
        [], ["man-circuit", "king-circuit"], lambda a, b: plot_difference(a, b, names=("man-circuit", "king-circuit")),
    ),
    "two circuits, by their kind": (
        ["circuit"], ["king-circuit", "man-circuit"],
        lambda a, b: plot_difference(a, b, names=("king-circuit", "man-circuit")),
    ),
    "heads of a circuit": (["heads"], ["task-circuit"], lambda task: plot_heatmap(task)),
    "heads of two circuits": (["heads"], ["man-circuit", "short-circuit"], lambda a, b: plot_heatmap(a, minus=b)),
    "tokens of a circuit": (["tokens"], ["man-circuit"], lambda man: plot_heatmap(man, over="token")),
    "tokens of two circuits": (
        ["tokens"], ["man-circuit", "king-circuit"], lambda a, b: plot_heatmap(a, over="token", minus=b),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_a_plot_is_the_figure_of_the_library(name, results, folder, capsys, tmp_path):
    kind, names, draw = DRAWN[name]
    words = ["plot", *files(folder, names), *(["--kind", *kind] if kind else []), "--out", "figure.json"]
    assert main(words) == 0
    assert capsys.readouterr() == ("Written to figure.json.\n", "")
    drawn = json.loads((tmp_path / "figure.json").read_text())
    assert drawn == json.loads(draw(*(results[each] for each in names)).to_json())
    assert [path.name for path in tmp_path.iterdir()] == ["figure.json"]


def test_every_kind_is_drawn():
    choices = get_args(get_args(get_type_hints(cli.plot)["kind"])[0])
    assert {kind for kinds, _, _ in DRAWN.values() for kind in kinds} == set(choices)


@pytest.mark.parametrize("name", [name for name in DRAWN if name.startswith(("one", "two", "circuits", "heads of a "))])
def test_a_dark_plot_has_dark_colours_only(name, folder, tmp_path):
    kind, names, _ = DRAWN[name]
    words = [*files(folder, names), *(["--kind", *kind] if kind else [])]
    assert main(["plot", *words, "-o", "figure.json", "--theme", "dark"]) == 0
    colours = set(re.findall(r'#[0-9A-F]{6}(?=[\\"])', (tmp_path / "figure.json").read_text()))
    assert colours <= set(DARK.values())


def test_a_page_is_written_where_the_name_says_so(results, folder, tmp_path):
    assert main(["plot", *files(folder, ["man"]), "-o", "figure.html"]) == 0
    write_html(results["man"].plot(), tmp_path / "expected.html")
    assert (tmp_path / "figure.html").read_text() == (tmp_path / "expected.html").read_text()


def test_a_file_of_the_benchmark_is_drawn(folder, tmp_path):
    assert main(["plot", *files(folder, ["benchmark.json"]), "-o", "figure.json"]) == 0
    expected = td.read_benchmark(folder / "benchmark.json").circuit.plot()
    assert (tmp_path / "figure.json").read_text() == expected.to_json()


@pytest.mark.parametrize(
    ("names", "words", "why"),
    [
        pytest.param(
            ["man"],
            ["--kind", "circuit"],
            "`--kind` must be one of curve, circuits, composition, heads, ",
            id="a curve is no circuit",
        ),
        pytest.param(
            ["man-circuit"],
            ["--kind", "curve"],
            "`--kind` must be one of circuit, heads, tokens for",
            id="a circuit is no curve",
        ),
        pytest.param(
            ["man-circuit"], ["--kind", "circuits"], "got 'circuits' for ['man-circuit']", id="a circuit has no others"
        ),
        pytest.param(
            ["man", "man-circuit"],
            [],
            "`FILE` must be all curves or all circuits, got some of both",
            id="curve and circuit",
        ),
        pytest.param(
            ["man-circuit", "man"], ["--kind", "heads"], "`FILE` must be all curves or all circuits", id="heads of both"
        ),
        pytest.param(
            ["man", "king"],
            ["--kind", "circuits"],
            "`FILE` must be at most 1 for the kind 'circuits', got 2",
            id="circuits of two",
        ),
        pytest.param(
            ["man", "king"],
            ["--kind", "composition"],
            "at most 1 for the kind 'composition', got 2",
            id="composition of two",
        ),
        pytest.param(
            ["man", "king", "short"], ["--kind", "heads"], "at most 2 for the kind 'heads', got 3", id="heads of three"
        ),
        pytest.param(
            ["man-circuit", "man-circuit", "man-circuit"],
            [],
            "`FILE` must be at most 2 for the kind 'circuit', got 3",
            id="three circuits",
        ),
        pytest.param(
            ["man-circuit", "man-circuit", "man-circuit"],
            ["--kind", "tokens"],
            "at most 2 for the kind 'tokens', got 3",
            id="tokens of three",
        ),
        pytest.param(
            ["man", "task"], [], "`curves` must be of one metric, got logit_diff, tv", id="curves of two metrics"
        ),
        pytest.param(
            ["man-circuit", "short-circuit"], [], "`second` must be a circuit of the same graph", id="two lengths"
        ),
        pytest.param(
            ["man-circuit", "task-circuit"],
            ["--kind", "heads"],
            "`minus` must have the kind of graph of",
            id="two graphs",
        ),
        pytest.param(
            ["man", "short"], ["--kind", "tokens"], "prompts of different lengths by head", id="tokens of two lengths"
        ),
        pytest.param(["task-circuit"], ["--kind", "tokens"], "whose positions are summed, got 'token'", id="no tokens"),
        pytest.param(
            ["task"],
            ["--kind", "circuits"],
            "`circuit` must be one of a TokenGraph to be drawn",
            id="circuits of a task",
        ),
        pytest.param(["man"], ["--kind", "pie"], "'pie' is not one of 'curve', ", id="kind"),
        pytest.param(["man"], ["--theme", "blue"], "'blue' is not one of 'light', ", id="theme"),
        pytest.param(["nowhere"], [], "nowhere.safetensors', which does not exist", id="no such file"),
        pytest.param([], [], "Missing argument 'FILE...'", id="no file at all"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence_and_no_file(names, words, why, folder, capsys, tmp_path):
    assert main(["plot", *files(folder, names), *words, "--out", "figure.json"]) == 2
    refused(capsys, tmp_path, why)


@pytest.mark.parametrize(
    ("out", "why"),
    [
        pytest.param(["-o", "figure.gif"], "`path` must end in .html, .json or one of .png, .svg", id="no format"),
        pytest.param(["-o", "figure"], "`path` must end in .html, .json or one of .png, .svg", id="no suffix"),
        pytest.param(["-o", "nowhere/figure.html"], "a folder that exists, got 'nowhere/figure.html'", id="no folder"),
        pytest.param([], "Missing option '--out' / '-o'", id="no file"),
    ],
)
def test_a_plot_needs_a_file_to_be_written_to(out, why, folder, capsys, tmp_path):
    assert main(["plot", *files(folder, ["man"]), *out]) == 2
    refused(capsys, tmp_path, why)


# -- activations -----------------------------------------------------------------------------------


def test_activations_prints_what_writes_most(model, capsys):
    assert main(["activations", MAN]) == 0
    held = td.capture(model, MAN)
    assert capsys.readouterr() == (f"{held.top_heads()!r}\n\n{held.top_neurons()!r}\n", "")
    assert main(["activations", MAN, "--top", "3", "--position", "2"]) == 0
    held = td.capture(model, MAN, position=2)
    assert capsys.readouterr() == (f"{held.top_heads(3)!r}\n\n{held.top_neurons(3)!r}\n", "")


@pytest.mark.parametrize("heads", [None, "a0.h1", "a3.h5,a0.h0"])
def test_activations_draws_what_heads_attend_to(heads, model, tmp_path):
    assert main(["activations", MAN, "--html", "page.html", *(["--heads", heads] if heads else [])]) == 0
    expected = activations_page(td.capture(model, MAN), None if heads is None else heads.split(","))
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("top", [[], ["--top", "1000"]])
def test_a_model_with_fewer_heads_has_them_all_printed(top, model, capsys, monkeypatch):
    small = random_model(n_layers=1, n_heads=2, act_fn="gelu", d_mlp=6, d_vocab=model.cfg.d_vocab)
    small.tokenizer, small.to_tokens = model.tokenizer, model.to_tokens
    monkeypatch.setitem(td.__dict__, "load_model", lambda **_: small)
    assert main(["activations", SHORT, *top]) == 0
    held = td.capture(small, SHORT)
    assert capsys.readouterr().out == f"{held.top_heads(2)!r}\n\n{held.top_neurons(6)!r}\n"


def test_a_model_without_mlps_has_heads_printed_alone(model, capsys, monkeypatch, tmp_path):
    small = random_model(attn_only=True, d_vocab=model.cfg.d_vocab)
    small.tokenizer, small.to_tokens = model.tokenizer, model.to_tokens
    monkeypatch.setitem(td.__dict__, "load_model", lambda **_: small)
    assert main(["activations", SHORT, "--html", "page.html"]) == 0
    assert capsys.readouterr().out == f"{td.capture(small, SHORT).top_heads(8)!r}\n"  # all there are
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="top_heads"' in page and 'id="top_neurons"' not in page


@pytest.mark.parametrize(
    ("words", "why"),
    [
        pytest.param([], "give a `PROMPT`", id="no prompt"),
        pytest.param([""], "`prompt` must hold at least one token", id="an empty prompt"),
        pytest.param([MAN, "--top", "0"], "`--top` must be at least 1, got 0", id="nothing to print"),
        pytest.param([MAN, "--heads", "a0.h0"], "`--heads` must come with `--html`", id="heads that are not drawn"),
        pytest.param(
            [MAN, "--heads", "a9.h0", "--html", "page.html"], "must be a head of books-gpt2, from", id="no such head"
        ),
        pytest.param([MAN, "--heads", "", "--html", "page.html"], "must be that of a head, such as", id="no head"),
        pytest.param([MAN, "--position", "9"], "`position` must be a token of the prompt", id="position"),
        pytest.param([MAN, "--html", "nowhere/page.html"], "a folder that exists", id="no folder"),
    ],
)
def test_activations_that_cannot_be_shown_are_one_sentence_and_no_file(words, why, capsys, tmp_path):
    assert main(["activations", *words]) == 2
    refused(capsys, tmp_path, why)


# -- strip -----------------------------------------------------------------------------------------


def strip_of(model, text, threshold=0.9, theme="light", **options):
    """The strip whose curves are fine where they are read."""
    options = {"thresholds": (threshold,), "baselines": False, **options}
    n_tokens = len(td.capture(model, text, keep="z").tokens)
    curves = [td.density(model, text, position=position, **options) for position in range(n_tokens)]
    return density_strip(curves, threshold=threshold, theme=theme)


def test_a_strip_is_that_of_the_library(model, capsys, tmp_path):
    assert main(["strip", "then", "--html", "strip.html"]) == 0
    strip = strip_of(model, "then")
    assert capsys.readouterr() == (f"{strip!r}\n", "")
    strip.save(tmp_path / "expected.html")
    assert (tmp_path / "strip.html").read_text() == (tmp_path / "expected.html").read_text()
    assert len(strip.text.splitlines()) == 1 + 3  # predictions after each of three tokens


def test_every_option_of_a_strip_reaches_the_library(model, capsys, tmp_path):
    assert main(["strip", "then", "--threshold", "0.7", "--method", "flow", "--theme", "dark", "--html", "s.html"]) == 0
    strip = strip_of(model, "then", 0.7, "dark", method="flow")
    assert capsys.readouterr().out == f"{strip!r}\n"
    assert strip.html in (tmp_path / "s.html").read_text()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        pytest.param([], "Missing argument 'TEXT'", id="no text"),
        pytest.param([""], "`prompt` must hold at least one token", id="an empty text"),
        pytest.param(["\udcff"], "`PROMPT` must be UTF-8 text", id="bytes"),
        pytest.param([SHORT, "--threshold", "0"], "above 0 and at most 1, got [0.0]", id="threshold 0"),
        pytest.param([SHORT, "--threshold", "1.5"], "above 0 and at most 1, got [1.5]", id="threshold above 1"),
        pytest.param([SHORT, "--method", "relp"], "on the token graph, got 'relp'", id="method of the other graph"),
        pytest.param([SHORT, "--theme", "blue"], "'blue' is not one of 'light', ", id="theme"),
        pytest.param([SHORT, "--html", "nowhere/strip.html"], "a folder that exists", id="no folder"),
    ],
)
def test_a_strip_that_cannot_be_made_is_one_sentence_and_no_file(words, why, capsys, tmp_path):
    assert main(["strip", *words, *(["--html", "strip.html"] if "--html" not in words else [])]) == 2
    refused(capsys, tmp_path, why)


# -- all of them -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("command", "written"), [("report", "a"), ("report", "a\n"), ("activations", "a\n"), ("strip", "a\n")]
)
def test_the_text_may_come_from_standard_input(command, written, asked, capsys, monkeypatch):
    assert main([command, "a"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(written))
    assert main([command, "-"]) == 0
    assert capsys.readouterr().out == expected
    assert {prompt for prompt, _ in asked} <= {"a"}


@pytest.mark.usefixtures("asked", "no_page")
@pytest.mark.parametrize("command", ["report", "activations", "strip"])
def test_model_and_device_reach_the_loader(command, model, monkeypatch):
    loaded = []
    monkeypatch.setitem(td.__dict__, "load_model", lambda **options: loaded.append(options) or model)
    assert main([command, "a", "--model", "some model", "--device", "cpu"]) == 0
    assert main([command, "a"]) == 0
    assert loaded == [{"name_or_model": "some model", "device": "cpu"}, {}]


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from tracedensity.cli import main\n"
        f"codes = [main([command, '--help']) for command in {COMMANDS}]\n"
        "heavy = {'torch', 'transformer_lens', 'plotly', 'pandas', 'numpy', 'rich'} & sys.modules.keys()\n"
        "print(codes, heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "[0, 0, 0, 0] set()\n"
    assert all(f"tracedensity {command}" in done.stdout for command in COMMANDS)


def defaults_of(function):
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def options_of(command):
    return {option.name: option for option in typer.main.get_command(app).commands[command].params}


def test_help_of_reports_names_the_defaults_of_the_library():
    said = {name: option.show_default for name, option in options_of("report").items()}
    said = {name: default for name, default in said.items() if isinstance(default, str)}
    defaults = {**defaults_of(td.density), **defaults_of(td.report), "n": defaults_of(td.tasks.induction)["n"]}
    defaults["model"] = defaults_of(load_model)["name_or_model"]
    decided_by_the_graph = {name: said.pop(name) for name in ("method", "metric", "ablation")}
    assert decided_by_the_graph["method"].startswith("norm;") and decided_by_the_graph["metric"].startswith("tv;")
    assert all(defaults[name] is None for name in decided_by_the_graph)
    said["graph"] = said["graph"].removesuffix("; component for tasks")
    assert said == {name: str(defaults[name]) for name in said}
    assert said.keys() == {"model", "graph", "n", "family", "budget", "faithfulness", "position", "seed"}


def test_help_of_pictures_names_the_defaults_of_the_library():
    assert options_of("activations")["top"].default == defaults_of(Activations.top_heads)["k"]
    assert options_of("activations")["top"].default == defaults_of(Activations.top_neurons)["k"]
    assert options_of("activations")["position"].show_default == str(defaults_of(td.capture)["position"])
    assert options_of("strip")["threshold"].default == defaults_of(density_strip)["threshold"]
    for command, draw in (("strip", density_strip), ("plot", plot_curve), ("plot", plot_heatmap)):
        assert options_of(command)["theme"].default == defaults_of(draw)["theme"]

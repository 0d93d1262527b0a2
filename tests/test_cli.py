"""The command line: what it prints where, and that it refuses bad input in one sentence."""

import inspect
import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer

import tracedensity as td
from benchmarks.lens import HookedTransformer, HookedTransformerConfig
from tracedensity.choices import FaithfulnessMetric, Metric
from tracedensity.cli import app, main
from tracedensity.faithfulness import faithfulness
from tracedensity.loading import bundled_models, load_model
from tracedensity.plot import density_page

LETTERS = "abcdefghié "
PROMPT = "a bad café"


class Spelling:
    """As much of a tokenizer as the library and TransformerLens use; a token is a letter."""

    padding_side = "right"

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(LETTERS[i] for i in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return LETTERS[token]


def make(seed: int) -> HookedTransformer:
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_heads=4, d_head=4, n_ctx=12, d_vocab=len(LETTERS), d_mlp=24,
        act_fn="gelu", init_weights=False, model_name=f"tiny-{seed}",
    )  # fmt: skip
    model = HookedTransformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    model.tokenizer = Spelling()  # pyright: ignore
    model.to_tokens = lambda text, **_: torch.tensor([[LETTERS.index(letter) for letter in text]])  # pyright: ignore
    return model


MODELS = {f"tiny-{seed}": make(seed) for seed in (0, 1)}


def load_tiny(name_or_model: str = "tiny-0", *, device: str | None = None) -> HookedTransformer:
    if name_or_model not in MODELS:
        raise ValueError(f"`name_or_model` must be one of {list(MODELS)}, got {name_or_model!r}.")
    return MODELS[name_or_model]


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(td.__dict__, "load_model", load_tiny)


@pytest.fixture(scope="module")
def curve() -> td.DensityCurve:
    return td.density(MODELS["tiny-0"], PROMPT)


@pytest.fixture
def circuit_file(curve: td.DensityCurve, tmp_path: Path) -> Path:
    path = tmp_path / "circuit.safetensors"
    curve.circuit(faithfulness=0.9).save(path)
    return path


@pytest.fixture
def explained(curve: td.DensityCurve, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts that the command line asks about, each answered with the same curve and no work."""
    prompts = []
    monkeypatch.setitem(td.__dict__, "density", lambda model, prompt, **_: prompts.append(prompt) or curve)
    return prompts


def plain(curve: td.DensityCurve) -> dict[str, Any]:
    return json.loads(json.dumps(curve.to_dict()))


# -- what is printed -----------------------------------------------------------------------------------


def test_density_prints_the_curve_of_the_library_with_its_defaults(curve, capsys):
    assert main(["density", PROMPT]) == 0
    assert capsys.readouterr() == (f"{curve!r}\n", "")


def test_json_is_one_object_that_holds_the_curve(curve, capsys):
    assert main(["density", PROMPT, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found == plain(curve)
    assert {
        "model", "method", "tokens", "n_edges", "entropy", "top_token", "auc", "sizes", "faithfulness", "minimal_size",
    } <= found.keys()  # fmt: skip
    assert {"first", "stable", "fraction"} <= found["minimal_size"]["0.9"].keys()
    assert found["tokens"] == list(PROMPT)
    assert printed.err == ""


def test_every_option_reaches_the_library(capsys):
    options = (
        "--model tiny-1 --method random --family top --thresholds 0.7,0.6 --metric kl --keep-residual "
        "--attention open --no-baselines --position -2 --seed 3 --json"
    )
    assert main(["density", PROMPT, *options.split()]) == 0
    expected = td.density(
        MODELS["tiny-1"], PROMPT, method="random", family="top", thresholds=(0.6, 0.7), metric="kl",
        keep_residual=True, attention="open", baselines=False, position=-2, seed=3,
    )  # fmt: skip
    assert json.loads(capsys.readouterr().out) == plain(expected)


@pytest.mark.usefixtures("explained")
def test_the_device_reaches_the_loader(monkeypatch):
    asked = []
    monkeypatch.setitem(td.__dict__, "load_model", lambda **options: asked.append(options) or MODELS["tiny-0"])
    assert main(["density", PROMPT, "--device", "cpu"]) == 0
    assert main(["density", PROMPT]) == 0
    assert asked == [{"device": "cpu"}, {}]


@pytest.mark.parametrize("written", [PROMPT, f"{PROMPT}\n"], ids=["as it is", "by echo"])
def test_the_prompt_may_come_from_standard_input(written, explained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(written))
    assert main(["density", "-"]) == 0
    assert explained == [PROMPT]


def test_what_is_saved_is_shown_and_verified(curve, tmp_path, capsys):
    curve_file, circuit_file = str(tmp_path / "curve.safetensors"), str(tmp_path / "circuit.safetensors")
    assert main(["density", PROMPT, "--save", curve_file, "--circuit", circuit_file, "--faithfulness", "0.99"]) == 0
    assert capsys.readouterr().out == f"{curve!r}\n"
    assert main(["show", curve_file]) == 0
    assert capsys.readouterr().out == f"{curve!r}\n"
    circuit = td.load(circuit_file)
    assert isinstance(circuit, td.Circuit)
    assert circuit.n_edges == curve.minimal_size(0.99) != curve.minimal_size(0.9)
    assert main(["show", circuit_file]) == 0
    assert capsys.readouterr().out == f"{circuit!r}\n"
    assert main(["verify", circuit_file]) == 0
    assert f"the file says {circuit.faithfulness:.6f}: verified." in capsys.readouterr().out


@pytest.mark.usefixtures("explained")
def test_pages_are_written_for_results_new_and_saved(curve, circuit_file, tmp_path, capsys):
    page, curve_file = tmp_path / "page.html", tmp_path / "curve.safetensors"
    assert main(["density", PROMPT, "--html", str(page), "--faithfulness", "0.99"]) == 0
    assert page.read_text(encoding="utf-8") == density_page(curve, faithfulness=0.99)
    curve.save(curve_file)
    assert main(["show", str(curve_file), "--html", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == density_page(curve)
    assert main(["show", str(circuit_file), "--html", str(page)]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("claimed_above", "code", "verdict"),
    [
        pytest.param(2e-4, 1, "it falls short", id="too much"),
        pytest.param(0.5e-4, 0, "verified", id="within rounding"),
        pytest.param(-0.1, 0, "verified", id="too little"),
    ],
)
def test_verify_tells_a_circuit_that_falls_short(claimed_above, code, verdict, circuit_file, capsys):
    circuit = td.load(circuit_file)
    assert isinstance(circuit, td.Circuit)
    assert circuit.faithfulness is not None
    measured, claimed = circuit.faithfulness, circuit.faithfulness + claimed_above
    replace(circuit, faithfulness=claimed).save(circuit_file)
    assert main(["verify", str(circuit_file)]) == code
    printed = capsys.readouterr().out
    assert verdict in printed
    assert f"{claimed:.6f}" in printed
    assert abs(float(printed.split("faithfulness ")[1].split()[0]) - measured) < 1e-5


@pytest.mark.usefixtures("explained")
def test_other_libraries_are_silent_and_our_own_warnings_are_one_line(monkeypatch, capsys):
    def load_noisily(**_: Any) -> HookedTransformer:
        print("Loaded pretrained model tiny into HookedTransformer")
        warnings.warn_explicit("of no interest", UserWarning, "theirs.py", 1, "transformer_lens")
        warnings.warn_explicit("of interest", UserWarning, "ours.py", 1, "tracedensity.loading")
        return MODELS["tiny-0"]

    monkeypatch.setitem(td.__dict__, "load_model", load_noisily)
    assert main(["density", PROMPT, "--json"]) == 0
    printed = capsys.readouterr()
    json.loads(printed.out)
    assert printed.err == "Warning: of interest\n"


def test_tokens_that_the_terminal_cannot_show_are_escaped(circuit_file, curve, tmp_path, monkeypatch):
    curve.save(path := tmp_path / "curve.safetensors")
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="koi8-r"))
    assert main(["show", str(path)]) == 0
    assert b"'a bad caf\\xe9'" in written.getvalue()


def test_models_are_listed_one_a_line_and_then_what_else_can_be_given(capsys):
    assert main(["models"]) == 0
    *listed, other = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(bundled_models())
    assert "folder" in other


def test_the_version_is_the_package_s(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tracedensity {td.__version__}\n"


def test_help_is_what_no_command_gives(capsys):
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


# -- help ----------------------------------------------------------------------------------------------


def test_help_names_the_defaults_of_the_library():
    options = typer.main.get_command(app).commands["density"].params  # pyright: ignore
    said = {option.name: option.show_default for option in options if isinstance(option.show_default, str)}
    defaults = {name: parameter.default for name, parameter in inspect.signature(td.density).parameters.items()}
    defaults["model"] = inspect.signature(load_model).parameters["name_or_model"].default
    defaults["thresholds"] = ",".join(f"{each:g}" for each in defaults["thresholds"])
    assert said.pop("faithfulness") == "0.9"  # a choice of the command line's own
    decided_by_the_graph = {name: said.pop(name) for name in ("method", "metric", "ablation", "n")}
    assert decided_by_the_graph["method"].startswith("norm;") and decided_by_the_graph["metric"].startswith("tv;")
    assert all(defaults.get(name) is None for name in decided_by_the_graph)
    said["graph"] = said["graph"].removesuffix("; component for tasks")
    assert said == {name: str(defaults[name]) for name in said}
    assert said.keys() == {"model", "graph", "family", "thresholds", "attention", "steps", "position", "seed", "budget"}


def test_help_names_the_metrics_that_measure_faithfulness():
    for metric in get_args(Metric):
        if metric in get_args(FaithfulnessMetric):
            faithfulness(metric, torch.zeros(1))
        else:
            with pytest.raises(ValueError, match="`metric` must be one of"):
                faithfulness(metric, torch.zeros(1))


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from tracedensity.cli import main; code = main(['density', '--help']);"
        "heavy = {'torch', 'transformer_lens', 'plotly', 'pandas', 'numpy', 'rich'} & sys.modules.keys();"
        "print(code, heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "0 set()\n"
    assert "norm-ratio" in done.stdout
    assert "nucleus" in done.stdout


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        pytest.param(["density", ""], "`prompt` must hold at least one token", id="empty prompt"),
        pytest.param(
            ["density", "a" * 13], "`prompt` must fit the context of tiny-0, 12 tokens, got 13", id="long prompt"
        ),
        pytest.param(["density", "\udcff"], "`PROMPT` must be UTF-8 text", id="a prompt of bytes"),
        pytest.param(["density", PROMPT, "--method", "magic"], "'magic' is not one of 'norm', ", id="method"),
        pytest.param(["density", PROMPT, "--family", "magic"], "'magic' is not one of 'greedy', ", id="family"),
        pytest.param(["density", PROMPT, "--metric", "magic"], "'magic' is not one of 'tv', ", id="metric"),
        pytest.param(["density", PROMPT, "--attention", "shut"], "'shut' is not one of 'masked', ", id="attention"),
        pytest.param(["density", PROMPT, "--model", "magic"], "must be one of ['tiny-0', 'tiny-1'], got", id="model"),
        pytest.param(["density", PROMPT, "--thresholds", "0,0.5"], "at most 1, got [0.0].", id="threshold 0"),
        pytest.param(["density", PROMPT, "--thresholds", "1.5"], "at most 1, got [1.5].", id="threshold above 1"),
        pytest.param(["density", PROMPT, "--thresholds", "nan"], "at most 1, got [nan].", id="threshold nan"),
        pytest.param(["density", PROMPT, "--thresholds", "half"], "such as 0.5,0.9, got 'half'", id="no threshold"),
        pytest.param(["density", PROMPT, "--position", "10"], "from -10 to 9, got 10", id="position"),
        pytest.param(["density", PROMPT, "--position", "last"], "Invalid value for '--position'", id="no position"),
        pytest.param(
            ["density", PROMPT, "--faithfulness", "0.5"], "must come with `--circuit` or `--html`", id="no circuit"
        ),
        pytest.param(
            ["density", PROMPT, "--circuit", "c", "--faithfulness", "9"], "at most 1, got 9.", id="faithfulness"
        ),
        pytest.param(
            ["density", PROMPT, "--save", "no/such/file"], "a folder that exists, got 'no/such/file'", id="folder"
        ),
        pytest.param(
            ["density", PROMPT, "--save", "."], "must be a file in a folder that exists, got '.'", id="a folder"
        ),
        pytest.param(["density"], "give one of `PROMPT`, `--task` and `--pairs`", id="no prompt"),
        pytest.param(["circuit", PROMPT, "--task", "ioi"], "give one of `PROMPT`, `--task` and", id="prompt and task"),
        pytest.param(["circuit", PROMPT, "--n", "4"], "`--n` must come with `--task`", id="pairs of a prompt"),
        pytest.param(["circuit", PROMPT, "--solved"], "`--solved` must come with", id="solved prompt"),
        pytest.param(["circuit", "--pairs", "no.csv"], "no.csv", id="no pairs"),
        pytest.param(["circuit", PROMPT, "--size", "100000"], "`size` must be a number of edges from 0", id="size"),
        pytest.param(["circuit", PROMPT, "--ablation", "mode"], "'mode' is not one of", id="ablation"),
        pytest.param(
            ["density", PROMPT, "--method", "relp"], "on the token graph, got 'relp'", id="method of the other"
        ),
        pytest.param(["density", PROMPT, "--magic"], "No such option: --magic", id="option"),
        pytest.param(["conjure"], "No such command 'conjure'. Try 'tracedensity --help'.", id="command"),
        pytest.param(["show", "no-such-file"], "got 'no-such-file', which does not exist", id="no file to show"),
        pytest.param(["verify", "no-such-file"], "got 'no-such-file', which does not exist", id="no file to verify"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, why, capsys):
    assert main(arguments) == 2
    refused(capsys, why)


def refused(capsys: pytest.CaptureFixture[str], why: str) -> None:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Error: ")
    assert why in printed.err
    assert printed.err.index("\n") == len(printed.err) - 1


def test_a_damaged_circuit_file_is_refused(circuit_file, capsys):
    circuit_file.write_bytes(circuit_file.read_bytes()[:-5])
    for command in ("show", "verify"):
        assert main([command, str(circuit_file)]) == 2
        refused(capsys, "which is damaged or something else")


def test_a_circuit_is_not_verified_on_another_model(circuit_file, capsys):
    assert main(["verify", str(circuit_file), "--model", "tiny-1"]) == 2
    refused(capsys, "must be the one that this was computed on, tiny-0")


def test_verifying_needs_the_model_where_the_file_s_name_for_it_says_nothing(circuit_file, monkeypatch, capsys):
    monkeypatch.delitem(MODELS, "tiny-0")
    assert main(["verify", str(circuit_file)]) == 2
    refused(capsys, "Or give the model of the circuit, tiny-0, with `--model`.")


def test_a_curve_is_not_verified(curve, tmp_path, capsys):
    path = tmp_path / "curve.safetensors"
    curve.save(path)
    assert main(["verify", str(path)]) == 2
    refused(capsys, "must be a saved circuit")


def test_a_file_that_the_system_withholds_is_named(monkeypatch, capsys):
    def load(**_: Any) -> None:
        raise PermissionError(13, "Permission denied", "weights")

    monkeypatch.setitem(td.__dict__, "load_model", load)
    assert main(["density", PROMPT]) == 2
    refused(capsys, "weights: Permission denied.")


def test_an_interrupt_is_one_word_and_exit_code_130(monkeypatch, capsys):
    def load(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(td.__dict__, "load_model", load)
    assert main(["density", PROMPT]) == 130
    assert capsys.readouterr() == ("", "Interrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    def load(**_: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setitem(td.__dict__, "load_model", load)
    with pytest.raises(RuntimeError, match="ours"):
        main(["density", PROMPT])


def test_a_reader_that_leaves_early_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tracedensity.cli", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")

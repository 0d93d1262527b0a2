"""Sweeps and studies from the command line, as a newcomer would try them."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from planted import planted, write_sweep
from tokenizers import Tokenizer

import tracedensity as td
from tracedensity.cli import main
from tracedensity.study.table import SCHEMA, TABLES
from training.train import build, write, write_tokenizer

TEXT = "\n\n".join(
    f"Once upon a time there {verb} a little {who} in the old house near the {place}, and every day they went to "
    f"the {other}."
    for who, verb in (("girl", "was"), ("boy", "lived"), ("dog", "slept"))
    for place, other in (("wood", "river"), ("sea", "hills"))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sweep over contexts of two lengths, made on the command line."""
    path = tmp_path_factory.mktemp("sweep")
    (path / "tales.txt").write_text(TEXT)
    arguments = ["sweep", str(path / "tales.txt"), "--out", str(path / "out"), "--context-tokens", "4,8"]
    assert main([*arguments, "--thresholds", "0.5,0.9", "--counts", str(path / "tales.txt"), "--part-size", "16"]) == 0
    return path


def test_a_sweep_says_what_it_did_and_goes_on_where_it_ended(folder, capsys):
    arguments = ["sweep", str(folder / "tales.txt"), "-o", str(folder / "out"), "--context-tokens", "4,8", "--json"]
    options = ["--thresholds", "0.5,0.9", "--counts", str(folder / "tales.txt"), "--part-size", "16"]
    assert main([*arguments, *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["n_made"] == 0 and said["n_prompts"] == len(td.read_sweep(folder / "out")) > 16
    assert main([*arguments, *options, "--method", "flow"]) == 2
    assert "options.method" in capsys.readouterr().err
    assert main([*arguments, *options, "--no-resume"]) == 2


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("table", [*TABLES])
def test_tables_can_be_had_as_one_file(suffix, table, folder, tmp_path, capsys):
    out = tmp_path / f"table{suffix}"
    assert main(["study", "table", str(folder / "out"), "--table", table, "--out", str(out)]) == 0
    assert "rows written" in capsys.readouterr().out
    read = {".csv": pd.read_csv, ".jsonl": lambda path: pd.read_json(path, lines=True), ".parquet": pd.read_parquet}
    rows = read[suffix](out)
    assert [*rows.columns] == [column.name for column in TABLES[table]]
    known = td.read_sweep(folder / "out", table)
    assert len(rows) == len(known)
    if suffix == ".csv":
        for column in (each.name for each in TABLES[table] if each.type.startswith("list")):
            assert [*map(json.loads, rows[column])] == [each.tolist() for each in known[column]]


@pytest.mark.parametrize(
    ("arguments", "words", "n_figures"),
    [
        (["factors", "--outcome", "auc", "--permutations", "50"], "gzip_ratio", 1),
        (["lengths", "--permutations", "50"], "falls", 1),
        (["lengths", "--outcome", "size", "--permutations", "50"], "size", 1),
        (["thresholds"], "segments", 1),
        (["contents", "--share", "0.05"], "skip connections", 5),
    ],
)
def test_each_study_prints_a_table_and_writes_figures(arguments, words, n_figures, folder, tmp_path, capsys):
    name, *options = arguments
    out, csv = tmp_path / "page.html", tmp_path / "table.csv"
    command = ["study", name, str(folder / "out"), *options, "--bootstrap", "10", "--html", str(out), "--csv", str(csv)]
    assert main(command) == 0, capsys.readouterr().err
    assert words in capsys.readouterr().out
    assert out.read_text().count('class="plotly-graph-div"') == n_figures
    assert len(pd.read_csv(csv))


def test_models_are_compared_by_their_folders(folder, tmp_path, capsys):
    options = ["--context-tokens", "4,8", "--thresholds", "0.5,0.9", "--part-size", "16", "--no-baselines"]
    other = tmp_path / "llama"
    assert main(["sweep", str(folder / "tales.txt"), "-o", str(other), "--model", "books-llama", *options]) == 0
    capsys.readouterr()
    out = tmp_path / "page.html"
    few = ["--bootstrap", "10", "--permutations", "50", "--html", str(out)]
    assert main(["study", "compare", str(folder / "out"), str(other), *few]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "books-gpt2" in said and "books-llama" in said and out.exists()
    csv = tmp_path / "table.csv"
    for name, columns in (
        ("families", ["pairs", "n_pairs"]),
        ("reliability", ["model", "halves"]),
        ("matrix", ["model"]),
    ):
        asked = ["--families", "GPT-2,Llama", "--table", name, "--csv", str(csv)]
        assert main(["study", "compare", str(folder / "out"), str(other), *few[:4], *asked]) == 0
        assert "between families" in capsys.readouterr().out
        assert [*pd.read_csv(csv).columns[: len(columns)]] == columns
    assert main(["study", "compare", str(folder / "out"), str(other), "--families", "Llama"]) == 2
    assert "`--families` must be 2 names" in capsys.readouterr().err
    assert main(["study", "compare", str(other)]) == 2
    assert "two or more" in capsys.readouterr().err


def test_checkpoints_are_swept_one_after_another_and_followed(folder, tmp_path, capsys):
    tokenizer = Tokenizer.from_file(str(Path(td.__file__).parent / "assets" / "tokenizer" / "tokenizer.json"))
    for step in (2, 10):
        torch.manual_seed(step)
        write(build("books-gpt2"), tmp_path / "steps" / f"step-{step}")
        write_tokenizer(tokenizer, tmp_path / "steps" / f"step-{step}")
    command = ["sweep", str(folder / "tales.txt"), "--checkpoints", f"{tmp_path}/steps", "-o", f"{tmp_path}/out"]
    options = ["--context-tokens", "8", "--limit", "6", "--thresholds", "0.5", "--no-baselines", "--json"]
    assert main([*command, *options]) == 0, capsys.readouterr().err
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(each["path"]).name for each in said] == ["step-2", "step-10"]
    page = tmp_path / "page.html"
    few = ["--bootstrap", "10", "--permutations", "20", "--html", str(page)]
    assert main(["study", "trend", str(tmp_path / "out"), *few]) == 0, capsys.readouterr().err
    assert "step-10" in capsys.readouterr().out and page.read_text().count('class="plotly-graph-div"') == 1
    same = tmp_path / "elsewhere" / "step-2"
    shutil.copytree(tmp_path / "out" / "step-2", same)
    assert main(["study", "trend", str(tmp_path / "out" / "step-2"), str(same), *few[:4]]) == 0
    assert str(same) in capsys.readouterr().out  # of two folders of one name neither is lost
    assert main(["study", "trend", str(same), str(same)]) == 2
    assert "must be different sweeps" in capsys.readouterr().err
    assert main([*command, "--model", "books-gpt2"]) == 2
    assert "`--model` must be left out" in capsys.readouterr().err


def test_text_in_other_languages_and_scripts_is_swept(tmp_path):
    text = "Es war einmal ein alter Mann.\n\n從前有一個老人。\n\nЖил-был старик у самого синего моря.\n\nكان يا ما كان"  # noqa: RUF001
    (tmp_path / "others.txt").write_text(text, encoding="utf-8")
    done = td.sweep(
        "books-gpt2", tmp_path / "others.txt", tmp_path / "out", context_tokens=8, baselines=False, progress=False
    )
    table = done.table()
    assert done.n_errors == 0 and table["document"].nunique() == 4
    assert (table["surprisal"] > 0).all() and (table["n_tokens"] == 9).all()


def test_one_faithfulness_is_reached_by_halving(tmp_path, capsys):
    out = tmp_path / "circuit.safetensors"
    prompt = "Once upon a time there was a little"
    assert main(["study", "target", prompt, "-f", "0.8", "--circuit", str(out), "--json"]) == 0, capsys.readouterr().err
    said = json.loads(capsys.readouterr().out)
    circuit = td.load(out)
    assert isinstance(circuit, td.Circuit) and circuit.n_edges == said["size"]
    assert circuit.verify("books-gpt2").faithfulness == pytest.approx(said["faithfulness"], abs=1e-5)
    assert said["faithfulness"] >= 0.8 and said["n_runs"] < 60
    assert main(["study", "target", prompt, "-f", "2"]) == 2
    assert "`faithfulness` must be above 0" in capsys.readouterr().err


def test_what_is_no_sweep_is_one_sentence(tmp_path, capsys):
    for command in ("factors", "lengths", "thresholds", "shap", "contents"):
        assert main(["study", command, str(tmp_path)]) == 2
        assert "must be the folder of a sweep" in capsys.readouterr().err
    assert main(["study", "table", str(tmp_path), "--out", str(tmp_path / "x.txt")]) == 2
    assert main(["sweep", str(tmp_path / "none.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_nothing_asked_is_help_and_one_sweep_is_none_to_compare(folder, capsys):
    assert main(["study"]) == 0
    assert "\n  factors " in capsys.readouterr().out
    assert main(["study", "compare", str(folder / "out")]) == 2
    assert "`DIR` must be two or more sweeps" in capsys.readouterr().err


def test_controls_are_named(folder, tmp_path, capsys):
    asked = ["study", "factors", str(folder / "out"), "--bootstrap", "0", "--permutations", "0", "--controls"]
    assert main([*asked, "entropy,margin", "--csv", str(tmp_path / "table.csv")]) == 0
    found = pd.read_csv(tmp_path / "table.csv").set_index("covariate")["controls"]
    assert {*found["n_tokens"]} == {"entropy, margin"} and {*found["margin"]} == {"entropy"}
    assert main([*asked, "entropy,mood"]) == 2
    assert "`controls` must be some of" in capsys.readouterr().err


def test_counts_need_a_model_whose_tokens_they_are(folder, capsys):
    assert main(["study", "factors", str(folder / "out"), "--counts", str(folder / "tales.txt")]) == 2
    assert "`--counts` must come with `--model`" in capsys.readouterr().err


def test_counts_of_other_texts_and_other_models_are_refused(folder, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("Another text.")
    for study in ("factors", "shap"):
        command = ["study", study, str(folder / "out")]
        assert main([*command, "--model", "books-gpt2"]) == 2
        assert "`--model` must come with `--counts`" in capsys.readouterr().err
        asked = [*command, "--counts", str(tmp_path / "other.txt"), "--model", "books-gpt2"]
        assert main(asked) == 2
        assert "rarities are known of the counts of 'tales.txt'" in capsys.readouterr().err
        # the same counts are no news, but the model is another
        assert main([*command, "--counts", str(folder / "tales.txt"), "--model", "books-llama"]) == 2
        assert "`model` must be that of the sweep" in capsys.readouterr().err
    own = ["--counts", str(folder / "tales.txt"), "--model", "books-gpt2", "--permutations", "20", "--bootstrap", "5"]
    assert main(["study", "factors", str(folder / "out"), *own]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("option", ["--bootstrap", "--permutations", "--null"])
def test_nothing_is_drawn_less_than_never(option, folder, capsys):
    studies = {"--bootstrap": ["factors", "thresholds", "shap", "contents"], "--permutations": ["factors", "lengths"]}
    for study in studies.get(option, ["shap"]):
        assert main(["study", study, str(folder / "out"), option, "-1"]) == 2
        assert f"'{option}': Input should be greater than or equal to 0" in capsys.readouterr().err


def test_contents_tell_of_components_and_write_them(folder, tmp_path, capsys):
    csv = tmp_path / "components.csv"
    few = ["--bootstrap", "5", "--share", "0.05", "--table", "recurrence", "--csv", str(csv)]
    assert main(["study", "contents", str(folder / "out"), *few]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    rows = pd.read_csv(csv)
    sure = rows[rows["p_holm"] < 0.05]
    more, less = (sure["often"] > sure["expected"]).sum(), (sure["often"] < sure["expected"]).sum()
    assert f"{more} of {len(rows)} come more often" in said and f"{less} less often" in said
    first = rows.sort_values("often", ascending=False, kind="stable").iloc[0]
    assert f"most often {first['component']} {first['often']:.0%}, " in said
    table = said.splitlines()[1:30]
    assert max(map(len, table)) < 120 and "_low" not in table[0]


def test_shapley_values_say_how_far_they_are_and_write_groups(tmp_path, capsys):
    (tmp_path / "sweep").mkdir()
    write_sweep(tmp_path / "sweep", planted(60, density=lambda known, _: 0.4 * known["rarity_target"] - 2.5))
    csv = tmp_path / "groups.csv"
    few = ["--regressor", "ridge", "--null", "3", "--folds", "2", "--bootstrap", "5"]
    command = ["study", "shap", str(tmp_path / "sweep"), *few]
    assert main([*command, "--table", "groups", "--csv", str(csv)]) == 0, capsys.readouterr().err
    assert not capsys.readouterr().err  # no bar where nobody looks
    assert pd.read_csv(csv)["group"][0] == "rarity"
    assert main([*command, "--csv", str(csv)]) == 0
    assert pd.read_csv(csv)["covariate"][0] == "rarity_target"
    table = td.read_sweep(tmp_path / "sweep")
    td.study.shap_values(table, regressor="ridge", n_null=3, n_folds=2, n_bootstrap=5, progress=True)
    assert "100%" in capsys.readouterr().err
    assert main([*command[:3], "--folds", "1"]) == 2
    assert "`n_folds` must be at least 2" in capsys.readouterr().err


def test_every_figure_of_a_study_can_be_drawn_light_and_dark():
    table = planted(60)
    few = {"n_bootstrap": 10, "n_permutations": 20}
    found = [
        td.study.factors(table, outcomes=("auc",), **few),
        td.study.compare({"a": table, "b": planted(60, 1)}, **few),
        td.study.thresholds(table, n_bootstrap=10),
        td.study.trend({"a": table, "b": planted(60, 1)}, **few),
    ]
    for each in found:
        for theme in ("light", "dark"):
            assert each.plot(theme=theme).data
        with pytest.raises(ValueError, match="`theme` must be"):
            each.plot(theme="blue")


def test_the_schema_is_in_the_docs():
    text = (Path(__file__).parents[1] / "docs" / "studies.md").read_text()
    assert f"version {SCHEMA}" in text
    for columns in TABLES.values():
        for column in columns:
            assert f"| `{column.name}` | {column.type} | {column.about} |" in text

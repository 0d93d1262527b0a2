"""The page of findings: its rules, its statistics, and that every number it asks for is made."""

import re
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from pandas import DataFrame
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from studies.corpora import LENGTHS, TRAINED, Places, studies
from studies.findings import FINDINGS, Finding, _verdict, intraclass
from studies.reproduce import ROOT, written


def test_verdicts_say_where_a_rule_holds():
    assert _verdict({"x": [True, True], "y": [True]}) == "Reproduced"
    assert _verdict({"x": [False, False], "y": [False]}) == "Not reproduced"
    found = _verdict({"x": [True, True], "y": [False, True, False], "z": [False]})
    assert found == "It depends (yes: x; in 1 of 3: y; no: z)"


def test_intraclass_is_that_of_the_analysis_of_variance():
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 10)
    values = generator.normal(0, 1, 40)[group] + generator.normal(0, 2, 400)
    squares = anova_lm(ols("values ~ C(group)", DataFrame({"values": values, "group": group})).fit())["mean_sq"]
    between, within = squares["C(group)"], squares["Residual"]
    assert intraclass(values, group) == pytest.approx((between - within) / (between + 9 * within))
    uneven = np.repeat(np.arange(80), np.arange(80) % 10 + 1)
    shared = intraclass(generator.normal(0, 2, 80)[uneven] + generator.normal(0, 1, len(uneven)), uneven)
    assert shared == pytest.approx(0.8, abs=0.1)


def test_the_page_asks_for_what_is_found(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(go.Figure, "write_image", lambda self, path, **_: Path(path).write_bytes(b""))
    also = {"a": {"ratios": "R", "null": "N"}}
    figures = {letter: {"": go.Figure()} for letter in FINDINGS}
    figures["f"]["predictions"] = go.Figure()
    found = {letter: Finding("Yes", "| t |", figures[letter], also.get(letter, {})) for letter in FINDINGS}
    about = {"contexts": 1, "sweeps": 2, "prompts": 3, "tokens": 4, "took": "Long."}
    page = written(found, tmp_path / "images", about)
    assert "$" not in page and "Long." in page
    shown = set(re.findall(r"\(images/(finding[^)]+)\)", page))
    assert shown == {path.name for path in (tmp_path / "images").iterdir()}


def test_every_model_is_swept_for_every_question(tmp_path: Path):
    found = studies(1000)
    assert len({study.name for study in found}) == len(found)
    for model in TRAINED:
        kinds = {(study.corpus, study.kind) for study in found if study.model == model}
        assert kinds == {("wikitext", "norm"), ("books", "norm"), ("wikitext", "flow"), ("wikitext", "nested"),
                         ("wikitext", "tight")}  # fmt: skip
    assert all(study.limit >= 1000 for study in found if study.kind == "norm")
    assert all(study.limit % len(LENGTHS) == 0 for study in found if study.kind == "nested")
    places = Places(tmp_path, tmp_path, tmp_path)
    assert places.model("stories260K") is None and places.model("books-gpt2") == "books-gpt2"
    with pytest.raises(ValueError, match="`--data` must hold wikitext2"):
        places.text("wikitext")
    assert (ROOT / "studies" / "page.md").is_file()

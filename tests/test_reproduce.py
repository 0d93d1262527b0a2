"""The script behind the page of findings, end to end: sweeps, a training, pictures, the page."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from test_browser import BROWSERS

from studies import reproduce
from studies.corpora import Study
from studies.findings import FINDINGS, Sweeps
from training import train

PAGE = "$g_verdict\n$g_table\nof $contexts contexts, $sweeps sweeps, $prompts prompts, $tokens tokens, in $took"


def small(name: str) -> transformers.GPT2LMHeadModel:
    """A model that learns little, and fast."""
    assert name == "books-gpt2"
    shape: dict[str, Any] = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 4096}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(bos_token_id=0, eos_token_id=0, activation_function="gelu_pytorch_tanh", **shape)
    )


@pytest.fixture
def given(tmp_path: Path, monkeypatch) -> dict[str, Any]:
    """Two small sweeps, one of a model that is not there, and a training of 79 steps."""
    draw = np.random.default_rng(0).choice
    words = ["the", "old", "man", "and", "his", "young", "wife", "went", "down", "to", "a", "small", "house"]
    for name in ("wikitext2/test", "wikitext2/valid", "books/valid", "books/train-0"):
        path = tmp_path / "data" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(" ".join(draw(words, 40)) for _ in range(14)))
    cut = {"context_words": 20, "per_document": 1, "thresholds": (0.5, 0.9)}
    wanted = [
        Study("books-gpt2", "wikitext", "norm", 12, cut),
        Study("stories260K", "wikitext", "norm", 12, cut),
        Study("books-gpt2", "books", "flow", 12, {**cut, "method": "flow", "baselines": False}),
    ]
    monkeypatch.setattr(reproduce, "studies", lambda n: wanted)
    monkeypatch.setattr(reproduce, "FINDINGS", {"g": lambda sweeps: FINDINGS["g"](replace(sweeps, n_draws=50))})
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "page.md").write_text(PAGE)
    monkeypatch.setattr(reproduce.os, "cpu_count", lambda: 1)  # threads of tiny models wait for each other
    monkeypatch.setattr(train, "build", small)
    monkeypatch.setattr(train, "N_CTX", 32)
    return {
        "data": tmp_path / "data", "models": tmp_path, "out": tmp_path / "runs" / "findings", "contexts": 12,
        "tokens": 20_000, "page": tmp_path / "docs" / "new" / "page.md",
    }  # fmt: skip


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="pictures need a browser")
def test_all_is_run_once_and_the_page_says_what_came_of_it(given, capsys):
    pytest.importorskip("kaleido")
    reproduce.main(**given)
    out, page, said = given["out"], given["page"], capsys.readouterr().out
    assert said.count("12 of 12 prompts run") == 2 + 6 and "error" not in said
    assert f"stories260K-wikitext-norm: {given['models']} has no such model, left out" in said
    names = {path.name for path in out.iterdir()}
    assert names == {"books-gpt2-wikitext-norm", "books-gpt2-books-flow", "steps", "training"}
    found = FINDINGS["g"](Sweeps(out, n_draws=50))
    assert f"(g) {found.verdict}" in said
    text = page.read_text()
    assert text.startswith(f"{found.verdict}\n{found.table}\nof 12 contexts, 8 sweeps, 96 prompts, 20,000 tokens, in ")
    took = re.compile(r"\d+ minutes on 1 cores$")
    assert took.search(text)
    picture = page.parent / "images" / "finding-g.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture.unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}

    reproduce.main(**given)
    said = capsys.readouterr().out
    assert said.count("0 of 12 prompts run") == 2 + 6
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    again = page.read_text().removesuffix(" (some sweeps had been made before)")
    assert again != page.read_text() and took.sub("", again) == took.sub("", text) and picture.is_file()


def test_what_would_fail_behind_the_sweeps_fails_before_them(given, monkeypatch):
    monkeypatch.setattr(reproduce, "run", lambda *_, **__: pytest.fail("a sweep was run"))
    given["page"].mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        reproduce.main(**given)
    assert not given["out"].exists()
    monkeypatch.setattr(reproduce.go.Figure, "to_image", lambda *_: b"")
    given["page"] /= "page.md"
    with pytest.raises(ValueError, match="few enough for different steps, got 6 for 4 steps"):
        reproduce.main(**{**given, "tokens": 1000})
    (given["data"] / "books" / "valid.txt").unlink()
    with pytest.raises(ValueError, match="`--data` must hold books/valid"):
        reproduce.main(**given)

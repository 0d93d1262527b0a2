"""Sweeps: their rows are what `td.density` gives, and however a run ends, nothing is lost and nothing doubled."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

import tracedensity as td
from tracedensity.estimation import Estimation
from tracedensity.ground import Ground
from tracedensity.model import as_transformer
from tracedensity.model.offload import is_offloading
from tracedensity.study import engines, progress, work
from tracedensity.study.contexts import Context
from tracedensity.study.covariates import unique_prompts
from tracedensity.study.folder import Folder
from tracedensity.study.sweep import _shard
from tracedensity.study.table import TABLES, curve_rows
from tracedensity.study.work import Done, Part, Work, Worker, density_options, identity_of

VOCABULARY = 20  # of the tiny models
OPTIONS: dict[str, Any] = {"part_size": 4, "thresholds": (0.5, 0.9), "progress": False}


def drawn(n: int, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths."""
    random_ = random.Random(seed)
    return [[random_.randrange(VOCABULARY) for _ in range(random_.randrange(2, 9))] for _ in range(n)]


PROMPTS = drawn(10)


def files(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, hidden files as well."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tiny_gpt2, tmp_path_factory) -> Path:
    """A sweep that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    td.sweep(tiny_gpt2, PROMPTS, folder / "sweep", **OPTIONS)
    return folder / "sweep"


def leaving_first(kept: Mapping[str, Any]) -> int:
    return int(kept["head"][..., 0].sum() + sum(each[:, 0].sum() for kind, each in kept.items() if kind != "head"))


def test_every_row_is_what_density_gives(tiny_model, tmp_path):
    done = td.sweep(tiny_model, PROMPTS, tmp_path / "sweep", **OPTIONS)
    assert (done.n_prompts, done.n_made, done.n_errors) == (10, 10, 0)
    prompts, thresholds, points = (done.table(name) for name in TABLES)
    for number, prompt in enumerate(PROMPTS):
        curve = td.density(tiny_model, prompt, thresholds=(0.5, 0.9), also=("top1", "nucleus", "entropy"))
        row = prompts.iloc[number]
        assert row["tokens"].tolist() == prompt and row["n_tokens"] == len(prompt)
        assert row["n_edges"] == curve.n_edges
        assert row["sizes"].tolist() == curve.sizes.tolist()
        np.testing.assert_allclose(row["faithfulness"], curve.faithfulness, atol=1e-5)
        assert row["auc"] == pytest.approx(curve.auc, abs=1e-5)
        assert row["entropy"] == pytest.approx(curve.entropy, abs=1e-5)
        assert (row["top_token"], row["top_text"]) == (curve.top_token, curve.top_text)
        logits = tiny_model(torch.tensor([prompt])).detach()[0, -1].softmax(-1).sort(descending=True).values
        assert row["margin"] == pytest.approx(float(logits[0] - logits[1]), abs=1e-5)
        own = thresholds[thresholds["index"] == number].reset_index(drop=True)
        table = curve.table()
        for name in ("threshold", "size", "stable_size", "fraction", "faithfulness"):
            np.testing.assert_allclose(own[name], table[name], atol=1e-5)
        for _, each in own.iterrows():
            kept = curve.circuit(size=int(each["size"])).kept
            parts = [int(kept[kind].sum()) for kind in ("head", "mlp")]
            assert each["by_part"].tolist() == [*parts, int(each["size"]) - sum(parts)]
            assert sum(each["by_quarter"]) == each["size"]
            heads = kept["head"].flatten(2).any(2).sum()
            states = sum(int(kept[kind].any(1).sum()) for kind in ("mlp", "resid_attn", "resid_mlp"))
            from_first = leaving_first(kept)
            n_later = curve.n_edges - leaving_first(curve.ranking.graph.exists)
            assert each["later_fraction"] == pytest.approx((each["size"] - from_first) / n_later)
            assert from_first == row["from_first"][row["sizes"].tolist().index(int(each["size"]))]
            assert each["n_components"] == int(heads) + states == (row["entered"] <= each["size"]).sum()
        grid = points[points["index"] == number]
        assert grid["size"].tolist() == [int(share * curve.n_edges) for share in grid["share"]]
        place = torch.searchsorted(curve.sizes, torch.tensor(grid["size"].to_numpy()))
        np.testing.assert_allclose(grid["faithfulness"], curve.faithfulness[place], atol=1e-5)
        for name in ("top1", "nucleus", "entropy"):
            np.testing.assert_allclose(grid[name], curve.also[name][place], atol=1e-4)
        known = grid["random"].notna()
        assert curve.random is not None
        assert set(grid["size"][known]) == set(curve.random.sizes.tolist())


@pytest.mark.parametrize("given", [{}, {"method": "best", "refine": True, "budget": 20}], ids=["published", "tight"])
def test_baselines_and_their_areas_are_those_of_density(given, tiny_gpt2, tmp_path):
    """The areas by trapezoids in a plain loop, those of the curve from the last circuit of so many edges."""
    prompts = PROMPTS[1:3]
    done = td.sweep(tiny_gpt2, prompts, tmp_path / "sweep", **OPTIONS, **given)
    for number, row in done.table().iterrows():
        curve = td.density(tiny_gpt2, prompts[number], thresholds=(0.5, 0.9), **given)
        points, heights = done.table("points").query("index == @number"), {}
        for name, known in (("random", curve.random), ("inverse", curve.inverse)):
            heights[name] = dict(zip(known.sizes.tolist(), known.faithfulness.tolist(), strict=True))
            expected = [heights[name].get(size, np.nan) for size in points["size"]]
            assert points[name].tolist() == pytest.approx(expected, abs=1e-5, nan_ok=True)
        own = list(zip(curve.sizes.tolist(), curve.faithfulness.tolist(), strict=True))
        heights["coarse"] = {size: [height for run, height in own if run <= size][-1] for size in heights["random"]}
        for name, known in heights.items():
            sizes, area = [size for size in known if size], 0.0
            assert len(sizes) > 3
            for low, high in pairwise(sizes):
                area += (1 - (known[low] + known[high]) / 2) * (np.log10(high) - np.log10(low))
            assert row[f"auc_{name}"] == pytest.approx(area, abs=1e-5)


def test_other_metrics_of_the_same_circuits_are_those_of_evaluate(tiny_gpt2):
    curve = td.density(tiny_gpt2, PROMPTS[0], also=("top1", "kl"), baselines=False)
    found = td.evaluate(tiny_gpt2, PROMPTS[0], curve.ranking, curve.sizes, metrics=("top1", "kl"))
    for name in ("top1", "kl"):
        np.testing.assert_allclose(curve.also[name], found.metrics[name], atol=1e-5)


def test_a_run_again_writes_nothing_and_gives_the_same(tiny_gpt2, whole):
    before = {name: (whole / name).stat().st_mtime_ns for name in files(whole)}
    done = td.sweep(tiny_gpt2, PROMPTS, whole, **OPTIONS)
    assert (done.n_prompts, done.n_made) == (10, 0)
    assert {name: (whole / name).stat().st_mtime_ns for name in files(whole)} == before


def test_two_runs_write_the_same_bytes(tiny_gpt2, whole, tmp_path):
    td.sweep(tiny_gpt2, PROMPTS, tmp_path / "again", **OPTIONS)
    assert files(tmp_path / "again") == files(whole)


def test_shards_write_together_what_one_run_writes(tiny_gpt2, whole, tmp_path, monkeypatch):
    for name, value in {"ID": "3", "MIN": "1", "MAX": "3", "STEP": "2"}.items():  # --array=1-3:2
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    out = tmp_path / "shards"
    assert td.sweep(tiny_gpt2, PROMPTS, out, shard="auto", **OPTIONS).n_prompts == 4
    assert td.sweep(tiny_gpt2, PROMPTS, out, shard="0/2", **OPTIONS).n_prompts == 6
    assert files(out) == files(whole)


def test_shards_of_tasks_of_an_array_are_all_different(monkeypatch):
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="written out"):
        _shard("auto")
    found = []
    for task in (4, 6):
        for rank in range(3):
            given = {"ARRAY_TASK_ID": task, "ARRAY_TASK_MIN": 4, "ARRAY_TASK_MAX": 6, "ARRAY_TASK_STEP": 2}
            for name, value in {**given, "PROCID": rank, "STEP_NUM_TASKS": 3}.items():
                monkeypatch.setenv(f"SLURM_{name}", str(value))
            found.append(_shard("auto"))
    assert found == [(number, 6) for number in range(6)]
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "6")  # sent again alone: all that is missing
    for name in ("PROCID", "STEP_NUM_TASKS"):
        monkeypatch.delenv(f"SLURM_{name}")
    assert _shard("auto") == (0, 1)


def test_an_array_that_is_a_list_and_numbers_that_are_none_are_refused(monkeypatch):
    """--array=3,6 has no task 4 and 5, whose parts nobody would run."""
    monkeypatch.setenv("SLURM_PROCID", "x")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="SLURM_PROCID must be a number, got 'x'"):
        _shard("auto")
    monkeypatch.setenv("SLURM_PROCID", "0")
    for name, value in {"ID": 3, "MIN": 3, "MAX": 6, "STEP": 1, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(ValueError, match="where the array is a list: it has 2 tasks from 3 to 6"):
        _shard("auto")
    monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "3")
    assert _shard("auto") == (0, 4)


def test_two_runs_at_once_leave_what_the_other_writes(tiny_gpt2, whole, tmp_path):
    out = tmp_path / "sweep"
    shutil.copytree(whole, out)
    node = os.uname().nodename
    living = [out / "prompts" / f".part-00000.parquet.{node}.{os.getpid()}.{'a' * 32}",
              out / f".sweep.json.elsewhere.1.{'b' * 32}"]  # fmt: skip
    dead = out / f".sweep.json.{node}.{2**22 - 1}.{'c' * 32}"
    for path in [*living, dead]:
        path.write_bytes(b"half")
    td.sweep(tiny_gpt2, PROMPTS, out, **OPTIONS)
    assert all(path.exists() for path in living) and not dead.exists()


def test_parts_that_are_not_there_yet_are_spoken_of(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "sweep")
    (tmp_path / "sweep" / "prompts" / "part-00000.parquet").unlink()
    with pytest.warns(UserWarning, match="has 6 of 10 prompts"):
        assert len(td.read_sweep(tmp_path / "sweep")) == 6


def test_the_last_parts_and_other_shards_are_missed_as_well(tiny_gpt2, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "sweep")
    for table in TABLES:
        (tmp_path / "sweep" / table / "part-00002.parquet").unlink()
    with pytest.warns(UserWarning, match="has 8 of 10 prompts"):
        td.read_sweep(tmp_path / "sweep")
    done = td.sweep(tiny_gpt2, PROMPTS, tmp_path / "shard", shard="0/3", limit=8, **OPTIONS)
    with pytest.warns(UserWarning, match="has 4 of 8 prompts"):
        done.table()


def test_while_a_part_grows_tables_are_about_the_same_prompts(tiny_gpt2, whole, tmp_path):
    """Killed between the tables of a part that gets more prompts."""
    out = tmp_path / "sweep"
    td.sweep(tiny_gpt2, PROMPTS, out, limit=6, **OPTIONS)
    shutil.copy(whole / "points" / "part-00001.parquet", out / "points" / "part-00001.parquet")
    assert td.read_sweep(out, "points")["index"].unique().tolist() == [*range(6)]


def test_rows_of_several_versions_are_spoken_of(tiny_gpt2, whole, tmp_path, monkeypatch, recwarn):
    td.read_sweep(whole)
    out = shutil.copytree(whole, tmp_path / "sweep")
    (out / "prompts" / "part-00001.parquet").unlink()
    monkeypatch.setattr(work, "versions", lambda: {"tracedensity": "99"})
    assert not recwarn.list
    td.sweep(tiny_gpt2, PROMPTS, out, **OPTIONS)
    with pytest.warns(UserWarning, match=r"in other versions: torch .*; then tracedensity 99\."):
        td.read_sweep(out)


def test_rows_without_a_column_that_came_later_can_be_read(whole, tmp_path):
    out = tmp_path / "sweep"
    shutil.copytree(whole, out)
    for part in (out / "thresholds").iterdir():
        pq.write_table(pq.read_table(part).drop_columns(["robust_size"]), part)
    before, after = td.read_sweep(whole, "thresholds"), td.read_sweep(out, "thresholds")
    pd.testing.assert_frame_equal(before, after)


def test_a_limit_may_be_raised(tiny_gpt2, whole, tmp_path):
    out = tmp_path / "limited"
    assert td.sweep(tiny_gpt2, PROMPTS, out, limit=6, **OPTIONS).n_made == 6
    assert len(td.read_sweep(out)) == 6
    assert td.sweep(tiny_gpt2, PROMPTS, out, **OPTIONS).n_made == 6  # the part of 2 is made anew, and one of 2 new
    assert files(out) == files(whole)
    assert td.sweep(tiny_gpt2, PROMPTS, out, limit=6, **OPTIONS).n_made == 0


def test_a_killed_run_loses_the_part_in_flight_at_most(tiny_gpt2, whole, tmp_path):
    """SIGKILL at 20 random moments, then a run to the end: the files are those of a run that nothing stopped."""
    out, seen, random_ = tmp_path / "killed", set[str](), random.Random(0)
    began = time.monotonic()
    td.sweep(tiny_gpt2, PROMPTS, tmp_path / "timed", **OPTIONS)
    usual = time.monotonic() - began
    for number in range(20):
        if number % 5 == 0:
            shutil.rmtree(out, ignore_errors=True)
            seen = set()
        child = os.fork()
        if not child:
            try:
                td.sweep(tiny_gpt2, PROMPTS, out, **OPTIONS)
            finally:
                os._exit(0)
        time.sleep(random_.uniform(0, 1.2) * usual)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = {name for name in files(out) if name.startswith("prompts/part-")} if out.exists() else set()
        assert seen <= now  # what was finished stays
        seen = now
        for name, content in files(out).items() if out.exists() else ():
            if not Path(name).name.startswith("."):
                assert content == files(whole)[name]
    td.sweep(tiny_gpt2, PROMPTS, out, **OPTIONS)
    assert files(out) == files(whole)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("robust", "strike"), [(False, 3), (["prepend"], 18)], ids=["refined", "robust"])
def test_ctrl_c_in_a_search_ends_the_sweep_and_not_the_search_alone(robust, strike, tiny_gpt2, tmp_path, monkeypatch):
    """What a search has found so far is no row: a run to the end has the files of a run that nothing stopped."""
    options = {**OPTIONS, "part_size": 1, "refine": True, "budget": 30, "thresholds": (0.8,), "robust": robust}
    plain, tried, calls = tmp_path / "plain", Ground.tried, 0
    td.sweep(tiny_gpt2, PROMPTS[:2], plain, **options)

    def struck(self: Ground, kept: torch.Tensor) -> object:
        nonlocal calls
        calls += 1
        if calls == strike:
            signal.raise_signal(signal.SIGINT)
        return tried(self, kept)

    monkeypatch.setattr(Ground, "tried", struck)
    with pytest.raises(KeyboardInterrupt):
        td.sweep(tiny_gpt2, PROMPTS[:2], tmp_path / "struck", **options)
    assert not list((tmp_path / "struck").glob("prompts/*.parquet"))
    assert td.sweep(tiny_gpt2, PROMPTS[:2], tmp_path / "struck", **options).n_made == 2
    assert files(tmp_path / "struck") == files(plain)


def test_several_processes_that_are_killed_lose_nothing(tmp_path):
    """The whole group gets a SIGKILL, or the process that writes alone, whose workers then end by themselves."""
    given = {"part_size": 2, "thresholds": (0.5,), "baselines": False, "progress": False}
    given |= {"curves": True, "circuits": 0.5}  # whose files come before the rows
    prompts = [[0, *prompt] for prompt in drawn(24)]
    td.sweep("books-gpt2", prompts, tmp_path / "whole", workers=1, **given)
    expected, out, seen = files(tmp_path / "whole"), tmp_path / "killed", set[str]()
    script = (
        "import json, sys, tracedensity as td\n"
        "prompts, given = (json.loads(sys.argv[place]) for place in (1, 3))\n"
        "td.sweep('books-gpt2', prompts, sys.argv[2], workers=2, **given)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, json.dumps(prompts), str(out), json.dumps(given)]
    for together in (True, False):
        process = subprocess.Popen(command, start_new_session=True)
        enough = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < enough:
            now = {name for name in (files(out) if out.exists() else ()) if name.startswith("prompts/part-")}
            if len(now) >= len(seen) + 2:  # in the middle of the work
                break
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if together:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        assert not psutil.wait_procs(workers, timeout=60)[1]
        now = {name for name in files(out) if name.startswith("prompts/part-")}
        assert seen < now
        seen = now
    assert seen < {name for name in expected if name.startswith("prompts/part-")}  # both ended before their end
    td.sweep("books-gpt2", prompts, out, workers=2, **given)
    assert files(out) == expected


@pytest.mark.parametrize("how", ["cut", "spoilt", "spoilt later", "of other columns", "gone", "of another sweep"])
@pytest.mark.parametrize("table", [*TABLES])
def test_a_damaged_part_is_made_anew(how, table, tiny_gpt2, whole, tmp_path):
    out = tmp_path / "sweep"
    shutil.copytree(whole, out)
    part = out / table / "part-00001.parquet"
    content = part.read_bytes()
    if how == "gone":
        part.unlink()
    elif how == "cut":
        part.write_bytes(content[: len(content) // 2])
    elif how == "spoilt":
        part.write_bytes(content[:200] + bytes([content[200] ^ 255]) + content[201:])
    elif how == "spoilt later":  # in one of the last columns
        chunk = pq.ParquetFile(part).metadata.row_group(0).column(pq.ParquetFile(part).metadata.num_columns - 1)
        starts = [each for each in (chunk.dictionary_page_offset, chunk.data_page_offset) if each is not None]
        place = min(starts) + chunk.total_compressed_size - 2
        part.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
    elif how == "of other columns":
        rows = pq.read_table(part)
        pq.write_table(rows.rename_columns([*rows.column_names[:-1], "something"]), part)
    else:
        td.sweep(tiny_gpt2, PROMPTS, tmp_path / "other", **{**OPTIONS, "seed": 1})
        part.write_bytes((tmp_path / "other" / table / "part-00001.parquet").read_bytes())
    if how != "gone" or table != "prompts":
        with pytest.raises(ValueError, match="Run the sweep again"):
            td.read_sweep(out, table)
    assert td.sweep(tiny_gpt2, PROMPTS, out, **OPTIONS).n_made == 4
    assert files(out) == files(whole)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"method": "flow"}, r"options\.method = null, got \"flow\""),
        ({"seed": 7}, "options.seed = 0, got 7"),
        ({"part_size": 5}, "part_size = 4, got 5"),
        ({"threads": 2}, "threads = 1, got 2"),
        ({"curves": True}, "curves = false, got true"),
    ],
)
def test_changed_options_are_refused_by_name(changed, named, tiny_gpt2, whole):
    before = files(whole)
    with pytest.raises(ValueError, match=named):
        td.sweep(tiny_gpt2, PROMPTS, whole, **{**OPTIONS, **changed})
    assert files(whole) == before


def test_the_same_weights_in_another_precision_are_refused(tiny_gpt2, whole, tmp_path):
    rounded = deepcopy(tiny_gpt2)
    for weight in rounded.parameters():
        weight.data = weight.data.bfloat16().float()
    td.sweep(rounded, PROMPTS[:2], tmp_path / "float32", **OPTIONS)
    with pytest.raises(ValueError, match=r'holds a sweep with dtype = "float32", got "float64"'):
        td.sweep(rounded.double(), PROMPTS[:2], tmp_path / "float32", **OPTIONS)


def test_options_are_the_same_however_they_are_written(tiny_gpt2, whole):
    for thresholds in (np.array([0.5, 0.9]), [0.5, np.float64(0.9)], torch.tensor([0.5, 0.9], dtype=torch.float64)):
        assert td.sweep(tiny_gpt2, PROMPTS, whole, **{**OPTIONS, "thresholds": thresholds}).n_made == 0
    assert td.sweep(tiny_gpt2, PROMPTS, whole, seed=np.int64(0), **OPTIONS).n_made == 0


def test_what_a_manifest_lacks_or_has_in_another_type_is_named(tiny_gpt2, whole, tmp_path):
    for name, words in (("dtype", r"dtype = \(nothing\), got \"float32\""), ("threads", "threads = true, got 1")):
        shutil.copytree(whole, tmp_path / name)
        about = json.loads((whole / "sweep.json").read_text())
        about.pop(name)
        held = about | ({"threads": True} if name == "threads" else {})
        (tmp_path / name / "sweep.json").write_text(json.dumps(held))
        with pytest.raises(ValueError, match=words):
            td.sweep(tiny_gpt2, PROMPTS, tmp_path / name, **OPTIONS)


def test_other_prompts_or_another_model_are_refused(tiny_gpt2, tiny_llama, whole):
    with pytest.raises(ValueError, match=r"holds a sweep with prompts\.sources"):
        td.sweep(tiny_gpt2, drawn(10, seed=1), whole, **OPTIONS)
    with pytest.raises(ValueError, match="holds a sweep with model"):
        td.sweep(tiny_llama, PROMPTS, whole, **OPTIONS)
    with pytest.raises(ValueError, match="must be new without `resume`"):
        td.sweep(tiny_gpt2, PROMPTS, whole, resume=False, **OPTIONS)


def test_a_folder_of_something_else_is_left_alone(tiny_gpt2, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="must be empty, new, or the folder of a sweep"):
        td.sweep(tiny_gpt2, PROMPTS, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="which is a file"):
        td.sweep(tiny_gpt2, PROMPTS, tmp_path / "letter.txt", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_wrong_options_are_refused_before_anything_is_written(tiny_gpt2, tmp_path):
    out = tmp_path / "sweep"
    for wrong, words in (
        ({"metric": "nonsense"}, "`metric` must be one of"),
        ({"method": "nrom"}, "`method` must be one of"),
        ({"ablation": "counterfactual"}, "`ablation` must be one of"),
        ({"graph": "component", "method": "norm"}, "`method` must be"),
        ({"family": "tallest"}, "`family` must be one of"),
        ({"limit": 0}, "`limit` must be at least 1"),
        ({"shard": "2/2"}, "`shard` must be from 0/2 to 1/2"),
        ({"shard": "some"}, "`shard` must be like"),
        ({"context_words": True}, "`context_words` must be at least 1 and a whole number, got True"),
        ({"shard": "0/0"}, "`shard` must be of at least one run"),
        ({"ablation": 1j}, "`ablation` must be numbers or names"),
        ({"workers": 2}, "`model` must be a name or a folder"),
        ({"engine": "ray"}, "`model` must be a name or a folder"),
        ({"circuits": 1.5}, "`circuits` must be faithfulnesses"),
        ({"loading": {"device": "cpu"}}, "`loading` must be left out"),
        ({"context_words": 1000}, "no text is long enough to be cut"),
        ({"gpus": -1}, "`gpus` must be 0 or more"),
        ({"gpus": 1}, '`gpus` must be left out without `engine="ray"`'),
    ):
        given = ["one two three"] if "context_words" in wrong else PROMPTS
        with pytest.raises(ValueError, match=words):
            td.sweep(tiny_gpt2, given, out, **{**OPTIONS, **wrong})
        assert not out.exists()
    with pytest.raises(TypeError, match="no option 'sizes'"):
        td.sweep(tiny_gpt2, PROMPTS, out, sizes=(1, 2))


@pytest.mark.usefixtures("unchecked")
def test_odd_arguments_are_refused_by_name_and_numpy_is_none(tiny_gpt2, tmp_path):
    out = tmp_path / "sweep"
    for wrong, words in (
        ({"thresholds": 0.5}, "`thresholds` must be several numbers"),
        ({"thresholds": "0.5"}, "`thresholds` must be several numbers"),
        ({"circuits": "0.5"}, "`circuits` must be faithfulnesses"),
        ({"circuits": None}, "`circuits` must be faithfulnesses"),
        ({"part_size": 1.5}, "`part_size` must be at least 1 and a whole number"),
        ({"context_tokens": "1,2"}, "`context_tokens` must be a whole number or several"),
        ({"position": "x"}, "`position` must be a whole number"),
        ({"counts": "none.txt"}, "`counts` must be counts, or text files that are there"),
        ({"context_words": 1, "position": -2}, "`position` must be left out where text is cut"),
    ):
        with pytest.raises(ValueError, match=words):
            td.sweep(tiny_gpt2, ["one two three"], out, **{**OPTIONS, **wrong})
        assert not out.exists()
    given = {**OPTIONS, "part_size": np.int64(4), "threads": np.int64(1), "limit": np.int64(2)}
    td.sweep(tiny_gpt2, PROMPTS, out, circuits=np.array([0.9, 0.90000001]), **given)
    assert len(list((out / "circuits").iterdir())) == 4 and (out / "circuits/0000000-0.9.safetensors").exists()
    text = [{"prompt": "Once upon a time there was a girl"}]
    cuts = {"context_words": np.int64(2)}, {"context_tokens": np.array([1, 2])}
    for number, cut in enumerate(cuts):
        assert td.sweep("books-gpt2", text, tmp_path / str(number), limit=1, **cut, **OPTIONS).n_errors == 0


def test_another_tokenizer_is_another_sweep(tmp_path):
    """The same weights and the same entries, of which others are merged."""
    model = td.load_model()
    text = ["Once upon a time there was a little girl"]
    td.sweep(model, text, tmp_path / "sweep", baselines=False, **OPTIONS)
    before = as_transformer(model).tokenization
    model.to_tokens(["one", "one two three"])  # which pads, and says so in the tokenizer
    assert as_transformer(model).tokenization == before
    other = deepcopy(model)
    about = json.loads(other.tokenizer.backend_tokenizer.to_str())
    about["model"]["merges"] = about["model"]["merges"][:200]
    other.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(about))
    assert as_transformer(other).vocabulary == as_transformer(model).vocabulary
    with pytest.raises(ValueError, match="holds a sweep with tokenizer"):
        td.sweep(other, text, tmp_path / "sweep", baselines=False, **OPTIONS)


def test_robust_and_pruned_sizes_are_columns(tiny_gpt2, tmp_path):
    given = {"graph": "component", "robust": ("mean",)}
    table = td.sweep(tiny_gpt2, PROMPTS[:2], tmp_path / "sweep", **given, **OPTIONS).table("thresholds")
    for number, prompt in enumerate(PROMPTS[:2]):
        curve = td.density(tiny_gpt2, prompt, thresholds=(0.5, 0.9), **given).table()
        own = table[table["index"] == number]
        for name in ("robust_size", "pruned_size"):
            assert own[name].tolist() == curve[name].tolist()
    table = td.sweep(tiny_gpt2, PROMPTS[:2], tmp_path / "other", **OPTIONS).table("thresholds")
    assert table[["robust_size", "pruned_size"]].isna().all(axis=None)


def test_a_process_keeps_its_model_for_the_next_sweep_of_it(monkeypatch):
    loaded, usual = [], work.load_model

    def load(*given: Any, **options: Any) -> Any:
        loaded.append(given)
        return usual(*given, **options)

    monkeypatch.setattr(work, "load_model", load)
    model = as_transformer(td.load_model())
    first = Work("books-gpt2", identity_of(model), {}, density_options({}), "first")
    worker = Worker(first)
    monkeypatch.setattr(engines, "_workers", {first.key: worker})
    part = Part(0, 0, (Context("a", (0, 1, 2)),))
    assert engines._run(first, part, os.getpid()).n_errors == 0
    assert engines._run(replace(first, sweep="second"), part, os.getpid()).n_errors == 0 and len(loaded) == 1
    other = {**first.identity, "fingerprint": "another"}
    with pytest.raises(ValueError, match="must be the same for all workers"):  # loaded again, as its weights are others
        engines._run(replace(first, sweep="third", identity=other), part, os.getpid())
    assert len(loaded) == 2


@pytest.mark.parametrize("position", [-2, 1])
def test_a_position_is_that_of_density(position, tiny_gpt2, tmp_path):
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 2][:3]
    table = td.sweep(tiny_gpt2, prompts, tmp_path / "sweep", position=position, **OPTIONS).table()
    for number, prompt in enumerate(prompts):
        curve = td.density(tiny_gpt2, prompt, position=position, thresholds=(0.5, 0.9))
        assert table["sizes"][number].tolist() == curve.sizes.tolist()
        assert table["auc"][number] == pytest.approx(curve.auc, abs=1e-5)
        assert table["entropy"][number] == pytest.approx(curve.entropy, abs=1e-5)
        assert len(table["tokens"][number]) == len(prompt[: position % len(prompt) + 1])


def test_a_bad_prompt_is_a_row_with_its_error(tiny_gpt2, tmp_path):
    given = [PROMPTS[0], [999], [], "text without a tokenizer", list(range(VOCABULARY)) * 3, PROMPTS[1]]
    done = td.sweep(tiny_gpt2, given, tmp_path / "sweep", **{**OPTIONS, "part_size": 8})
    table = done.table()
    assert (done.n_prompts, done.n_errors) == (6, 4)
    assert table["error"].notna().tolist() == [False, True, True, True, True, False]
    for number, words in (
        (1, "token ids from 0 to"),
        (2, "at least one token"),
        (3, "no tokenizer"),
        (4, "fit the context"),
    ):
        assert words in table["error"][number]
    assert set(done.table("points")["index"]) == {0, 5}
    alone = td.density(tiny_gpt2, PROMPTS[1], thresholds=(0.5, 0.9))
    assert table["auc"][5] == pytest.approx(alone.auc, abs=1e-5)


def test_a_value_that_is_not_finite_is_the_error_of_its_prompt_only(tiny_gpt2, tmp_path):
    """A hook of the user's spoils what follows one token."""

    def spoil(value: torch.Tensor, hook: object) -> torch.Tensor:
        return value.masked_fill((value == spoilt).all(-1, keepdim=True), torch.nan)

    spoilt = tiny_gpt2.W_E[7].detach()
    prompts = [[1, 2, 3], [1, 7, 3], [4, 5]]
    with tiny_gpt2.hooks(fwd_hooks=[("hook_embed", spoil)]):
        table = td.sweep(tiny_gpt2, prompts, tmp_path / "sweep", **OPTIONS).table()
    assert table["error"].notna().tolist() == [False, True, False]
    assert table[["entropy", "margin", "top_token"]].notna().all(axis=1).tolist() == [True, False, True]
    assert "NaN" in table["error"][1] or "finite" in table["error"][1]


def test_a_forward_pass_that_fails_is_the_error_of_its_prompt_only(tiny_gpt2, tmp_path):
    """On a CPU, memory that is full is one RuntimeError among others; it may be so for batches and for long prompts."""

    def full(value: torch.Tensor, hook: object) -> torch.Tensor:
        if value.shape[1] > 5:
            raise RuntimeError("can't allocate memory")
        return value

    prompts = [[1, 2, 3], [1, 2, 3, 4, 5, 6], [4, 5]]
    with tiny_gpt2.hooks(fwd_hooks=[("hook_embed", full)]):
        done = td.sweep(tiny_gpt2, prompts, tmp_path / "sweep", **OPTIONS)
    assert done.table()["error"].fillna("").tolist() == ["", "can't allocate memory", ""]


def test_rows_that_cannot_be_made_are_the_error_of_their_prompt(tiny_gpt2, tmp_path, monkeypatch):
    def rows_of(curve: td.DensityCurve) -> Any:
        if curve.provenance.token_ids == tuple(PROMPTS[1]):
            raise ValueError("no rows")
        return curve_rows(curve)

    monkeypatch.setattr("tracedensity.study.work.curve_rows", rows_of)
    done = td.sweep(tiny_gpt2, PROMPTS[:3], tmp_path / "sweep", **OPTIONS)
    assert done.table()["error"].fillna("").tolist() == ["", "no rows", ""]
    assert set(done.table("points")["index"]) == {0, 2}


def test_what_comes_of_a_part_is_forgotten_when_it_is_written(tiny_gpt2, tmp_path, monkeypatch):
    """So that memory does not grow with the number of prompts."""
    made: list[weakref.ref[Done]] = []
    usual = Worker.__call__

    def done(self: Worker, part: Part) -> Done:
        gc.collect()
        assert sum(each() is not None for each in made) <= 1
        found = usual(self, part)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Worker, "__call__", done)
    td.sweep(tiny_gpt2, drawn(40), tmp_path / "sweep", **OPTIONS)
    assert len(made) == 10


def test_curves_and_circuits_are_written_on_request(tiny_gpt2, tmp_path):
    out = tmp_path / "sweep"
    td.sweep(tiny_gpt2, PROMPTS[:3], out, curves=True, circuits=0.5, **OPTIONS)
    table = td.read_sweep(out)
    for number, prompt in enumerate(PROMPTS[:3]):
        curve = td.load(out / "curves" / f"{number:07d}.safetensors")
        assert isinstance(curve, td.DensityCurve)
        assert curve.auc == pytest.approx(table["auc"][number])
        assert curve.provenance.token_ids == tuple(prompt)
        circuit = td.load(out / "circuits" / f"{number:07d}-0.5.safetensors")
        assert isinstance(circuit, td.Circuit)
        assert circuit.verify(tiny_gpt2).faithfulness >= 0.5


@pytest.mark.parametrize("damage", ["gone", "cut", "spoilt"])
@pytest.mark.parametrize("kind", ["curves", "circuits"])
def test_damaged_curves_and_circuits_are_made_anew(kind, damage, tiny_gpt2, tmp_path):
    out, given = tmp_path / "sweep", {"curves": True, "circuits": (0.5, 0.9), **OPTIONS}
    td.sweep(tiny_gpt2, PROMPTS[:6], out, **given)
    before = files(out)
    spoilt = sorted((out / kind).iterdir())[1]
    content = spoilt.read_bytes()
    if damage == "gone":
        spoilt.unlink()
    else:
        spoilt.write_bytes(content[:-9] if damage == "cut" else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    assert td.sweep(tiny_gpt2, PROMPTS[:6], out, **given).n_made == 4
    assert files(out) == before


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("can't allocate memory"), MemoryError()]
)
def test_errors_of_the_machine_may_be_tried_again(error, tiny_gpt2, whole, tmp_path, monkeypatch):
    """Another program's memory runs out for one prompt; the next run, if it is told so, makes its part anew."""
    usual = Estimation.curve

    def short_of_memory(self: Estimation, tokens: torch.Tensor, *rest: Any) -> Any:
        if tokens.tolist() == PROMPTS[1]:
            raise error
        return (yield from usual(self, tokens, *rest))

    out = tmp_path / "sweep"
    monkeypatch.setattr(Estimation, "curve", short_of_memory)
    done = td.sweep(tiny_gpt2, PROMPTS, out, **OPTIONS)
    assert done.n_errors == 1 and done.table()["error"][1] == (str(error) or "MemoryError")
    monkeypatch.setattr(Estimation, "curve", usual)
    assert td.sweep(tiny_gpt2, PROMPTS, out, **OPTIONS).n_made == 0
    done = td.sweep(tiny_gpt2, PROMPTS, out, retry_errors=True, **OPTIONS)
    assert (done.n_made, done.n_errors) == (4, 0)
    assert files(out) == files(whole)


def test_workers_offload_what_their_sweep_offloads(tiny_gpt2, tmp_path, monkeypatch):
    seen, usual = [], Worker._done

    def done(self: Worker, part: Any) -> Any:
        seen.append((self.work.offload, is_offloading()))
        return usual(self, part)

    monkeypatch.setattr(Worker, "_done", done)
    with td.offload_activations():
        td.sweep(tiny_gpt2, PROMPTS[:2], tmp_path / "sweep", method="eap", graph="component", **OPTIONS)
    td.sweep(tiny_gpt2, PROMPTS[:2], tmp_path / "other", method="eap", graph="component", **OPTIONS)
    assert seen == [(True, True), (False, False)]
    assert files(tmp_path / "sweep") == files(tmp_path / "other")


@pytest.mark.parametrize(
    "options",
    [{"graph": "component"}, {"method": "best", "refine": True, "budget": 60}, {"method": "eap", "ablation": "mean"}],
)
def test_other_graphs_and_methods_are_swept_as_well(options, tiny_gpt2, tmp_path):
    table = td.sweep(tiny_gpt2, PROMPTS[:2], tmp_path / "sweep", **{**OPTIONS, **options}).table()
    for number, prompt in enumerate(PROMPTS[:2]):
        curve = td.density(tiny_gpt2, prompt, thresholds=(0.5, 0.9), **options)
        assert table["sizes"][number].tolist() == curve.sizes.tolist()
        assert table["auc"][number] == pytest.approx(curve.auc, abs=1e-5)
        if isinstance(curve, td.TightCurve):
            first = [leaving_first(curve.circuit(size=size).kept) for size in curve.sizes.tolist()]
            assert table["from_first"][number].tolist() == first
        elif options.get("graph") == "component":
            assert table["from_first"][number] is None


def test_targets_and_rarities(tmp_path):
    model = td.load_model()
    text = "Once upon a time there was a little girl who lived in a small house near the wood."
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat and the dog\nthe end\n")
    counts = td.study.count_tokens(model, corpus)
    the = model.to_single_token(" the")
    n, v = int(counts.of_token.sum()), len(counts.of_token)
    assert counts.of_token[the] == 1  # the others begin their lines, and have no space before them
    done = td.sweep(
        model, [{"prompt": text, "target": " the"}, {"prompt": text, "target": the}, text], tmp_path / "sweep",
        counts=counts, baselines=False, thresholds=(0.5,), progress=False,
    )  # fmt: skip
    table = done.table()
    assert table["target"].tolist()[:2] == [the, the] and pd.isna(table["target"][2])
    assert table["rarity_target"][0] == pytest.approx(-np.log10((1 + 1) / (n + v)))
    probability = model(text)[0, -1].double().softmax(-1).detach().numpy()
    unigram = (counts.of_token + 1) / (n + v)
    assert table["surprisal"][0] == pytest.approx(-np.log(probability[the]), abs=1e-4)
    assert table["rarity_expected"][0] == pytest.approx(-(probability * np.log10(unigram)).sum(), abs=1e-4)
    kl = (probability * (np.log(probability) - np.log(unigram))).sum()
    assert table["kl_unigram"][0] == pytest.approx(kl, abs=1e-4)
    last = done.table("points").query("index == 0 and share == 1.0").iloc[0]
    assert last["unigram_tv"] == pytest.approx(np.abs(probability - unigram).sum() / 2, abs=1e-4)
    assert table["text"].tolist() == [text] * 3 and table["text_hash"].nunique() == 1


def test_several_processes_write_what_one_writes(tmp_path):
    prompts = [f"Once upon a time there were {each}" for each in ("two", "three little", "many of the old")]
    options = {"part_size": 2, "thresholds": (0.5,), "baselines": False, "progress": False}
    td.sweep("books-gpt2", prompts, tmp_path / "one", workers=1, **options)
    td.sweep("books-gpt2", prompts, tmp_path / "two", workers=2, **options)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_slow_disk_that_gets_full_ends_the_run_of_several_processes(tmp_path):
    """More is done than is written, and waits, when the error comes."""
    script = (
        "import sys, time, tracedensity as td\n"
        "from tracedensity.study.folder import Folder\n"
        "usual, written = Folder.write, []\n"
        "def write(self, name, content):\n"
        "    if len(written) == 2:\n"
        "        time.sleep(8)\n"
        "        raise OSError(28, 'No space left on device', name)\n"
        "    written.append(name)\n"
        "    usual(self, name, content)\n"
        "Folder.write = write\n"
        "given = dict(part_size=1, thresholds=(0.5,), baselines=False, progress=False)\n"
        "td.sweep('books-gpt2', [[0, each] for each in range(100)], sys.argv[1], workers=2, **given)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "sweep")]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1 and "No space left on device" in said
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_slow_disk_holds_several_processes_up_and_no_more(tmp_path, monkeypatch):
    def write(self: Folder, name: str, content: bytes) -> None:
        time.sleep(0.3)  # a part takes less
        usual(self, name, content)

    usual = Folder.write
    monkeypatch.setattr(Folder, "write", write)
    given = {"part_size": 1, "thresholds": (0.5,), "baselines": False, "progress": False}
    done = td.sweep("books-gpt2", [[0, each] for each in range(30)], tmp_path / "sweep", workers=2, **given)
    assert (done.n_made, done.n_errors, len(done.table())) == (30, 0, 30)


def test_memory_is_that_of_the_group_of_processes(tmp_path):
    def say(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert engines._main_memory(tmp_path) == psutil.virtual_memory().total  # where nothing says anything
    say("proc/self/cgroup", "9:name=systemd:/\n4:memory:/job/7\n0::/slice/job\n")
    say("sys/fs/cgroup/slice/job/memory.max", "max\n")
    assert engines._main_memory(tmp_path) == psutil.virtual_memory().total
    say("sys/fs/cgroup/slice/memory.max", "3000000\n")
    assert engines._main_memory(tmp_path) == 3_000_000
    say("sys/fs/cgroup/memory/job/7/memory.limit_in_bytes", "2000000\n")
    assert engines._main_memory(tmp_path) == 2_000_000


def test_tokens_that_part_a_character_are_prompts_of_their_own(tmp_path):
    """Their texts are all the same question marks."""
    model = td.load_model()
    pieces = [(0, *as_transformer(model).pieces(letter)[:1]) for letter in "\u72d7\u5c0f\u0416"]
    assert len(set(pieces)) == 3
    done = td.sweep(model, [*pieces, pieces[0]], tmp_path / "sweep", **{**OPTIONS, "baselines": False})
    table = done.table()
    assert table["text"].nunique() == 1 and table["text_hash"].nunique() == 3
    assert unique_prompts(table.iloc[:3])["index"].tolist() == [0, 1, 2]
    with pytest.warns(UserWarning, match="1 of 4 prompts have the text of another"):
        unique_prompts(table)


def test_a_worker_ends_with_what_started_it_even_where_nobody_has_buried_that():
    parent = subprocess.Popen(["sleep", "300"])
    script = "import sys; from tracedensity.study.engines import _end_with; _end_with(int(sys.argv[1]))"
    worker = subprocess.Popen([sys.executable, "-c", script, str(parent.pid)])
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=8)
        parent.kill()  # and is a zombie until it is waited for
        assert worker.wait(timeout=60) == 1
    finally:
        worker.kill()
        parent.wait()


def test_two_workers_of_ray_write_what_one_process_writes(tmp_path):
    given = {"part_size": 3, "baselines": False, "progress": False, "thresholds": (0.5,)}
    given |= {"curves": True, "circuits": 0.5}
    prompts = [[10**6], *([0, *prompt] for prompt in drawn(11))]  # the first is no prompt
    td.sweep("books-gpt2", prompts, tmp_path / "here", workers=1, **given)
    # Ray stays as long as its process does, so it has one of its own
    script = (
        "import json, sys, tracedensity as td\n"
        "prompts, given = (json.loads(sys.argv[place]) for place in (1, 3))\n"
        "for limit in (4, None):\n"
        "    done = td.sweep('books-gpt2', prompts, sys.argv[2], engine='ray', workers=2, limit=limit, **given)\n"
        "    print(done.n_made, done.n_errors)"
    )
    given_on = [json.dumps(prompts), str(tmp_path / "ray"), json.dumps(given)]
    command = [sys.executable, "-W", "ignore", "-c", script, *given_on]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "1", "9", "0"]  # the second run makes what the first had not, and its last part
    assert files(tmp_path / "ray") == files(tmp_path / "here")


def test_a_full_disk_is_one_sentence_and_loses_nothing(tiny_gpt2, whole, tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    size = sum(map(len, files(whole).values()))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={max(4096 * 8, size // 2)}", "tmpfs", str(out)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be made here")
    try:
        with pytest.raises(OSError, match="make room and run the same again"):
            td.sweep(tiny_gpt2, PROMPTS, out / "sweep", **OPTIONS)
        assert not list((out / "sweep").rglob(".*"))
        kept = {name for name in files(out / "sweep") if name.startswith("prompts/")}
        assert all(files(whole)[name] == (out / "sweep" / name).read_bytes() for name in kept)
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(out)], check=True)
        td.sweep(tiny_gpt2, PROMPTS, out / "sweep", **OPTIONS)
        assert files(out / "sweep") == files(whole)
    finally:
        subprocess.run(["umount", str(out)], check=False)


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_no_trace(where, tiny_gpt2, whole, tmp_path, monkeypatch):
    out, written = tmp_path / "sweep", []
    owner = {"fsync": os, "replace": Path}[where]
    usual = getattr(owner, where)

    def full(*given: Any) -> Any:
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(given)
        return usual(*given)

    monkeypatch.setattr(owner, where, full)
    with pytest.raises(OSError, match=r"No space.* is kept; make room"):
        td.sweep(tiny_gpt2, PROMPTS, out, **OPTIONS)
    assert files(out) and not list(out.rglob(".*"))
    monkeypatch.setattr(owner, where, usual)
    td.sweep(tiny_gpt2, PROMPTS, out, **OPTIONS)
    assert files(out) == files(whole)


def test_a_folder_in_place_of_a_file_is_told(tiny_gpt2, whole, tmp_path):
    out = tmp_path / "sweep"
    shutil.copytree(whole, out)
    (out / "prompts" / "part-00000.parquet").unlink()
    (out / "prompts" / "part-00000.parquet").mkdir()
    with pytest.raises(OSError, match="a folder is where the sweep writes a file"):
        td.sweep(tiny_gpt2, PROMPTS, out, **OPTIONS)


def test_the_manifest_says_what_was_done(whole):
    about = json.loads((whole / "sweep.json").read_text())
    assert about["options"]["thresholds"] == [0.5, 0.9]
    assert about["components"][:2] == ["a0.h0", "a0.h1"]
    assert td.read_sweep(whole).attrs["sweep"] == about


def test_what_is_no_sweep_is_refused(tmp_path, whole):
    with pytest.raises(ValueError, match="must be the folder of a sweep"):
        td.read_sweep(tmp_path)
    with pytest.raises(ValueError, match="`table` must be one of"):
        td.read_sweep(whole, "rows")
    (tmp_path / "sweep.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="columns of version 1, got version 0"):
        td.read_sweep(tmp_path)
    for damaged in ("", "[]", "{}"):
        (tmp_path / "sweep.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"`out` must be the folder of a sweep, got .*(json is none|line 1)"):
            td.sweep("books-gpt2", ["one two"], tmp_path)
    (tmp_path / "sweep.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match="no part is finished"):
        td.read_sweep(tmp_path)


def test_the_model_and_its_threads_come_back_as_they_were(tiny_gpt2, tmp_path):
    before = torch.get_num_threads(), {name: value.clone() for name, value in tiny_gpt2.state_dict().items()}
    td.sweep(tiny_gpt2, PROMPTS[:2], tmp_path / "sweep", **OPTIONS)
    assert torch.get_num_threads() == before[0]
    assert all(value.equal(before[1][name]) for name, value in tiny_gpt2.state_dict().items())
    assert not any(point.fwd_hooks for point in tiny_gpt2.hook_dict.values())


def test_the_bar_does_not_count_what_was_there_already_as_fast():
    bar = progress.bar_of(1000, "prompt", True)
    bar.start_t = bar.last_print_t = bar._time() - 1000  # parts are looked through
    for _ in range(10):
        progress.skip(bar, 80)
    bar.last_print_t, bar.start_t = bar.last_print_t - 10, bar.start_t - 10
    bar.update(100)
    assert bar.n == 900
    assert bar.format_dict["rate"] == pytest.approx(10, rel=0.01)
    bar.close()
    progress.skip(progress.bar_of(10, "prompt", False), 5)


def test_workers_that_load_another_model_say_so():
    model = as_transformer(td.load_model())
    for what in ("fingerprint", "tokenizer", "held_by", "dtype", "device"):
        identity = {**identity_of(model), what: "another"}
        with pytest.raises(ValueError, match=f"for all workers, got {what} .* and 'another' elsewhere"):
            _ = Worker(Work("books-gpt2", identity, {}, density_options({}), "sweep")).model

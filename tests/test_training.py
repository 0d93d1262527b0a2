"""The recipe of the bundled models: its batches, its measures, and that an interrupted run ends as a whole one does."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import tracedensity as td
from training import train
from training.corpus import BOS_ID, batches, repeated_window, text_windows, train_tokenizer
from training.measure import bits_per_byte, induction

IDS = np.arange(1, 2000, dtype=np.uint16) % 50 + 1
OPTIONS = {"n_ctx": 32, "n_entries": 64, "batch": 4, "repeated": 0.5, "seed": 3}


def test_batches_do_not_depend_on_where_the_run_was_taken_up():
    whole = batches(IDS, **OPTIONS)
    for _ in range(20):  # across an epoch, of 15 batches
        next(whole)
    tokens, counted = next(whole)
    again, counted_again = next(batches(IDS, **OPTIONS, first_step=20))
    assert torch.equal(tokens, again)
    assert torch.equal(counted, counted_again)


def test_an_epoch_holds_the_text_once_behind_its_first_tokens():
    windows = text_windows(IDS, 32, epoch=1, seed=0)
    assert (windows[:, 0] == BOS_ID).all()
    text = windows[:, 1:]
    assert all((row[1:] - row[:-1]).remainder(50).eq(1).all() for row in text)  # consecutive in IDS
    assert len({tuple(row) for row in text.tolist()}) >= len(text) - 31


def test_a_repeated_window_counts_what_can_be_predicted():
    tokens, predictable = repeated_window(IDS, 32, 64, np.random.default_rng(0))
    period = int((~predictable).sum()) - 1
    assert tokens[0] == BOS_ID
    assert torch.equal(tokens[1 + period :], tokens[1 : len(tokens) - period])
    assert predictable.tolist() == [False] * (1 + period) + [True] * (31 - period)


def test_measures_of_a_model_that_knows_nothing():
    model = train.build("books-gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # uniform predictions: 12 bits per token
    first, second = induction(model, 4096, n_sequences=2)
    assert first == pytest.approx(math.log(4096))
    assert second == pytest.approx(math.log(4096))


def test_bits_per_byte_by_hand(tmp_path):
    (tmp_path / "train-0.txt").write_text("abab " * 2000)
    tokenizer = train_tokenizer([tmp_path / "train-0.txt"], 300)
    model = train.build("books-gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    text = "abab " * 600
    n_tokens = len(tokenizer.encode(text).ids) // 31 * 31
    n_bytes = len(tokenizer.decode(tokenizer.encode(text).ids[:n_tokens]))
    assert bits_per_byte(model, tokenizer, text, 32) == pytest.approx(12 * n_tokens / n_bytes)


def test_models_are_kept_of_different_steps_of_one_schedule(tmp_path):
    assert train.kept_steps(1024, 6) == {0, 4, 16, 64, 256, 1024}
    for n, n_steps in ((1, 100), (6, 10)):
        with pytest.raises(ValueError, match=f"got {n} for {n_steps} steps"):
            train.kept_steps(n_steps, n)
    for step in (0, 25, 100):
        (tmp_path / f"step-{step:06d}").mkdir()
    train.require_kept(tmp_path, train.kept_steps(100, 3), 100)
    with pytest.raises(ValueError, match="must be those that the run was begun with"):
        train.require_kept(tmp_path, train.kept_steps(120, 3), 100)


@pytest.mark.parametrize("name", ["books-gpt2", "books-llama"])
def test_an_interrupted_run_ends_as_a_whole_one(tmp_path, monkeypatch, name):
    (tmp_path / "train-0.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely.\n" * 400)
    options = {"model": name, "tokens": 4 * 256, "batch": 1, "every": 2, "compiled": False, "threads": 1}
    train.main(tmp_path, out=tmp_path / "whole", keep=2, **options)

    save, calls = train.save, []

    def save_and_stop(*arguments):
        save(*arguments)
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(tmp_path, out=tmp_path / "parts", **options)
    monkeypatch.setattr(train, "save", save)
    with pytest.raises(ValueError, match=r"there should be models of \[0\], got \[\]"):
        train.main(tmp_path, out=tmp_path / "parts", keep=2, **options)
    train.main(tmp_path, out=tmp_path / "parts", **options)

    kept = td.study.checkpoints(tmp_path / "whole" / "steps")
    assert [path.name for path in kept] == ["step-000000", "step-000004"]
    before, after = (td.load_model(path) for path in kept)
    assert before.tokenizer.decode(before.to_tokens("Call me Ishmael.")[0]) == "<|endoftext|>Call me Ishmael."
    assert not torch.equal(before.W_E, after.W_E) and td.load_model(kept[1]).cfg.n_layers == 4

    whole, parts = (load_file(tmp_path / run / "checkpoint.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=1e-6, msg=key)
    assert Tokenizer.from_file(str(tmp_path / "parts" / "tokenizer.json")).get_vocab_size() <= 4096

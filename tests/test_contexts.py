"""How prompts are read from files and cut out of text."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import tracedensity as td
from tracedensity.model import Transformer, as_transformer
from tracedensity.study.contexts import Corpus, Cut

ARTICLES = """ = First =

 One two three four five six seven
 = = Part = =
 eight nine

 = Second =

 a b c d e
"""
BLOCKS = "one two three four\nfive six\n\n\nseven eight nine ten\n"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return as_transformer(td.load_model())


@pytest.fixture
def written(tmp_path: Path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def contexts(given: object, model: Transformer, cut: Cut | None = None, column: str | None = None) -> list:
    return list(Corpus.of(given, cut or Cut(), column).contexts(model))


def test_each_line_of_text_is_a_prompt_unless_it_is_cut(written, model):
    found = contexts(written("some.txt", "one\n\n  \ntwo three\n"), model)
    assert [(each.id, each.prompt, each.target) for each in found] == [
        ("some.txt:0", "one", None),
        ("some.txt:3", "two three", None),
    ]


def test_lines_of_spaces_do_not_part_documents(written, model):
    """Verses of one book are set off by them."""
    found = contexts(written("some.txt", "one two\n \nthree four\n\nfive six\n"), model, Cut(words=1))
    assert [each.document for each in found] == ["some.txt:0", "some.txt:0", "some.txt:1"]


def test_any_file_of_text_can_be_cut(written, model):
    whole = contexts(written("some.txt", BLOCKS), model, Cut(words=1))
    for name in ("some.md", "some"):
        found = contexts(written(name, BLOCKS), model, Cut(words=1))
        assert [(each.prompt, each.target) for each in found] == [(each.prompt, each.target) for each in whole]
        with pytest.raises(ValueError, match="needs `context_words` or `context_tokens`"):
            contexts(written(name, BLOCKS), model)
    with pytest.raises(ValueError, match="which has bytes that are none"):
        contexts(written("some.bin", "one\0two three"), model, Cut(words=1))


def test_pieces_do_not_overlap_nor_reach_over_paragraphs_and_know_the_next_word(written, model):
    found = contexts(written("some.txt", BLOCKS), model, Cut(words=1))
    assert [(each.prompt, each.target) for each in found] == [
        ("one", " two"), ("three", " four"), ("five", " six"), ("seven", " eight"), ("nine", " ten"),
    ]  # fmt: skip
    assert [each.document for each in found] == ["some.txt:0"] * 3 + ["some.txt:1"] * 2
    assert len({each.id for each in found}) == 5


def test_articles_are_the_documents_of_wiki_text(written, model):
    found = contexts(written("wiki.txt", ARTICLES), model, Cut(words=4))
    assert [(each.document, each.prompt) for each in found] == [
        ("wiki.txt:0", "One two three four"),
        ("wiki.txt:1", "a b c d"),
    ]


def test_a_document_gives_no_more_pieces_than_asked_for(written, model):
    found = contexts(written("some.txt", BLOCKS), model, Cut(words=1, per_document=2))
    assert [each.prompt for each in found] == ["one", "three", "seven", "nine"]


def test_nested_contexts_end_at_the_same_target(written, model):
    text = "Once upon a time there was a little girl who lived in a house."
    found = contexts(written("some.txt", text), model, Cut(tokens=(2, 4)))
    ids, bos = model.pieces(text), model.beginning
    assert bos
    first = found[:2]
    assert [each.prompt for each in first] == [(*bos, *ids[2:4]), (*bos, *ids[:4])]
    assert {each.target for each in first} == {ids[4]}
    assert len({each.group for each in first}) == 1
    assert [each.id.rsplit(":", 1)[1] for each in first] == ["2", "4"]
    assert found[2].group != first[0].group


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_tables_may_say_more_than_the_prompt(suffix, written, model, tmp_path):
    rows = pd.DataFrame({
        "text": ["one two", "three"], "id": ["a", "b"], "document": ["x", "x"], "domain": ["prose", None],
        "target": [" three", None],
    })  # fmt: skip
    path = tmp_path / f"some{suffix}"
    if suffix == ".jsonl":
        path.write_text(rows.to_json(orient="records", lines=True))
    elif suffix == ".csv":
        rows.to_csv(path, index=False)
    else:
        rows.to_parquet(path)
    first, second = contexts(path, model)
    assert (first.id, first.prompt, first.target, first.document, first.domain) == (
        "a",
        "one two",
        " three",
        "x",
        "prose",
    )
    assert (second.target, second.domain, second.source) == (None, "", path.name)


def test_lists_frames_and_ids_are_taken_as_well(model):
    assert [each.prompt for each in contexts(["one", [1, 2], "two"], model)] == ["one", (1, 2), "two"]
    frame = pd.DataFrame({"content": ["one"]})
    assert contexts(frame, model)[0].prompt == "one"
    assert contexts([{"prompt": "one", "document": "d"}], model)[0].document == "d"


def test_a_bad_row_is_a_context_with_its_error(written, model):
    lines = ['{"prompt": "fine"}', "{not json", '{"prompt": null}', '{"other": 1}', '{"prompt": {"a": 1}}']
    found = contexts(written("some.jsonl", "\n".join(lines)), model)
    assert [bool(each.error) for each in found] == [False, True, True, True, True]
    assert "no JSON" in found[1].error and "missing" in found[2].error and "column" in found[3].error
    assert len({each.id for each in found}) == 5


def test_lines_of_json_may_have_columns_of_their_own(written, model):
    found = contexts(written("some.jsonl", '{not json\n{"other": 1}\n{"prompt": "fine"}'), model)
    assert [bool(each.error) for each in found] == [True, True, False]
    with pytest.raises(ValueError, match=r"some\.jsonl: the column of prompts must be one of"):
        contexts(written("some.jsonl", '{"other": 1}\n' * 40), model)
    # a first line that cannot be read says nothing of the columns
    for n_rows in (2, 40):
        with pytest.raises(ValueError, match=r"some\.jsonl: the column of prompts must be one of"):
            contexts(written("some.jsonl", "{not json\n" + '{"other": 1}\n' * n_rows), model)
    found = contexts(written("some.jsonl", "{not json\n" * 40 + '{"prompt": "fine"}'), model)
    assert [bool(each.error) for each in found] == [True] * 40 + [False]
    assert all(each.error for each in contexts(written("some.jsonl", "{not json\n" * 3), model))


def test_a_table_of_which_no_row_has_the_column_is_refused(written, model):
    for given in (pd.DataFrame({"other": ["a", "b"]}), [{"other": "a"}], written("some.jsonl", '{"other": 1}\n' * 2)):
        for cut in (Cut(), Cut(words=1)):
            with pytest.raises(ValueError, match=r"column of prompts must be one of .* Say which it is with `column`"):
                contexts(given, model, cut)
    with pytest.raises(ValueError, match=r"must be one of \['txt'\], got \['text'\]"):
        contexts(pd.DataFrame({"text": ["a"]}), model, column="txt")
    assert [bool(each.error) for each in contexts([{"other": "a"}, {"prompt": "b"}, {"other": "c"}], model)] == [
        True, False, True,
    ]  # fmt: skip


def test_a_list_with_a_file_is_a_list_of_files(written, tmp_path):
    some = str(written("some.txt", "one two"))
    with pytest.raises(ValueError, match=r"got 'missing\.txt', which does not exist"):
        Corpus.of([some, "missing.txt"], Cut())
    with pytest.raises(ValueError, match="files only or prompts only, got files and a list"):
        Corpus.of([Path(some), [1, 2]], Cut())
    assert Corpus.of(["word " * 100 + ".txt"], Cut()).given  # too long for a name


def test_damage_of_a_file_is_told_by_its_name(tmp_path, written, model):
    path = tmp_path / "some.parquet"
    pd.DataFrame({"text": [f"number {each} of {7 * each}" for each in range(5000)]}).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[300:2000] = bytes(each ^ 0x5A for each in content[300:2000])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.parquet', damaged"):
        contexts(path, model)
    with pytest.raises(ValueError, match=r"some\.csv', which is none"):
        contexts(written("some.csv", 'prompt,id\n"one two,a\nthree,b\n'), model)
    with pytest.raises(ValueError, match="which is UTF-16"):
        contexts(written("some.txt", "one two\n".encode("utf-16")), model)
    fine, deep = contexts(written("some.jsonl", '{"prompt": "fine"}\n' + "[" * 100_000 + "\n"), model)
    assert not fine.error and "no JSON" in deep.error
    odd = Path(os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9.txt"))
    odd.write_text("one two")
    assert contexts(odd, model)[0].source == "caf?.txt"


def test_wrapped_text_is_cut_by_paragraphs(written, model):
    wrapped = "one two three\nfour five\n\nsix seven\neight nine ten\n"
    found = contexts(written("some.md", wrapped), model, Cut(words=4))
    assert [each.prompt for each in found] == ["one two three four", "six seven eight nine"]
    assert [each.target for each in found] == [" five", " ten"]
    assert {each.document for each in found} == {"some.md"} and len({each.id for each in found}) == 2
    # where a line is long enough, each is cut by itself
    assert [each.prompt for each in contexts(written("some.txt", wrapped), model, Cut(words=2))] == [
        "one two", "eight nine",
    ]  # fmt: skip
    assert not contexts(written("some.txt", wrapped), model, Cut(words=9))


def test_files_that_are_missing_are_no_prompts():
    with pytest.raises(ValueError, match=r"must be files that exist, or prompts, got 'a\.txt', which does not exist"):
        Corpus.of(["a.txt", "b.txt"], Cut())
    assert Corpus.of(["We read notes.txt", "b.txt"], Cut()).given


def test_a_formula_in_a_text_is_no_title(written, model):
    found = contexts(written("some.txt", "one two three\n\n = x + y = \n\nfour five six\n"), model, Cut(words=1))
    assert [each.document for each in found] == ["some.txt:0", "some.txt:1", "some.txt:1", "some.txt:2"]


def test_names_that_are_numbers_stay_whole_where_some_are_missing(model):
    frame = pd.DataFrame({"prompt": ["one", "two", "three"], "id": [1, None, 3]})
    assert [each.id for each in contexts(frame, model)] == ["1", "prompts:1", "3"]


def test_columns_of_a_frame_may_be_called_by_numbers():
    assert Corpus.of(pd.DataFrame({np.int64(3): ["a"], "prompt": ["one"]}), Cut()).about


def test_bytes_that_are_no_text_are_the_error_of_their_row(tmp_path, model):
    path = tmp_path / "some.txt"
    path.write_bytes("fine text\n".encode("utf-8-sig") + b"caf\xe9 text\n" + b"more text\n")
    whole = contexts(path, model)
    assert [each.prompt for each in whole[::2]] == ["fine text", "more text"]
    with pytest.raises(ValueError, match="UTF-8 can write"):  # what makes it an error when it is read
        model.tokens(whole[1].prompt)
    for cut in (Cut(words=1), Cut(tokens=(1,))):
        found = contexts(path, model, cut)
        assert ["UTF-8" in each.error for each in found].count(True) == 1
    table = tmp_path / "excel.csv"
    table.write_bytes("prompt,id\none,caf\xe9\n".encode("utf-8-sig"))
    assert contexts(table, model)[0].id == "caf\xe9"


def test_whatever_a_row_holds_it_is_a_prompt_or_an_error(model):
    good = [torch.tensor([1, 2, 3]), np.array([1, 2, 3]), {"prompt": [1, 2, 3], "target": 5.0}]
    bad = [pd.NA, np.nan, b"bytes", {"prompt": "a", "target": 5.5}, {"prompt": "a", "target": [1]}, 7, [1.5]]
    found = contexts([*good, *bad], model)
    assert [each.prompt for each in found[:3]] == [(1, 2, 3)] * 3 and found[2].target == 5
    assert all(each.error for each in found[3:])
    frame = pd.DataFrame({"prompt": [np.array([1, 2]), np.array([3])], "target": [1, None]})
    assert [(each.prompt, each.target) for each in contexts(frame, model)] == [((1, 2), 1), ((3,), None)]
    assert [each.prompt for each in contexts(pd.Series(["one", "two"]), model)] == ["one", "two"]


def test_a_target_that_is_no_text_is_the_error_of_its_row(written, model):
    table = written("latin.csv", b"prompt,target\none two,caf\xe9\nthree,four\n")
    lines = written("some.jsonl", '{"prompt": "one", "target": "\\ud800"}\n{"prompt": "two", "target": "three"}\n')
    for path in (table, lines):
        first, second = contexts(path, model)
        assert "the target must be text that UTF-8 can write" in first.error and not second.error


def test_cells_may_be_books_and_names_of_files_are_files(tmp_path, model):
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "word " * 40_000 + "\n")
    limit = csv.field_size_limit()
    assert len(contexts(str(path), model)[0].prompt) == 200_000 and csv.field_size_limit() == limit
    assert len(contexts([str(path), str(path)], model)) == 2


def test_rows_of_one_document_have_names_of_their_own_and_share_its_limit(model):
    rows = [{"prompt": "one two three four", "id": name, "document": "book"} for name in "ab"]
    found = contexts(rows, model, Cut(words=1, per_document=3))
    assert [(each.id, each.document) for each in found] == [("a:0:0", "book"), ("a:0:1", "book"), ("b:0:0", "book")]


def test_a_table_is_cut_like_text(written, model):
    rows = [{"text": "one two three\nfour five", "id": "book", "domain": "prose"}]
    found = contexts(written("some.jsonl", "\n".join(map(json.dumps, rows))), model, Cut(words=1))
    assert [(each.prompt, each.document, each.domain) for each in found] == [
        ("one", "book", "prose"), ("four", "book", "prose"),
    ]  # fmt: skip


def test_what_is_said_of_a_corpus_changes_with_its_content_and_not_with_its_folder(written, tmp_path):
    first = Corpus.of(written("some.txt", "one"), Cut()).about
    other = tmp_path / "other"
    other.mkdir()
    (other / "some.txt").write_text("one")
    assert Corpus.of(other / "some.txt", Cut()).about == first
    (other / "some.txt").write_text("two")
    assert Corpus.of(other / "some.txt", Cut()).about != first
    assert Corpus.of(["one"], Cut()).about != Corpus.of(["two"], Cut()).about


def test_files_of_one_name_have_contexts_of_different_names(written, model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "some.txt").write_text("two")
    found = contexts([written("some.txt", "one"), other / "some.txt"], model)
    assert [each.id for each in found] == ["some.txt:0", "some.txt#2:0"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"words": 0}, "`context_words` must be at least 1"),
        ({"tokens": (4, 0)}, "`context_tokens` must be at least 1"),
        ({"words": 4, "tokens": (4,)}, "give one of"),
        ({"per_document": 2}, "nothing is cut"),
        ({"tokens": (4, 4)}, "different numbers"),
    ],
)
def test_a_cut_that_is_none_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Cut(**options)


def test_what_is_no_prompts_is_refused(tmp_path, written, model):
    with pytest.raises(ValueError, match="does not exist"):
        Corpus.of(tmp_path / "none.txt", Cut())
    with pytest.raises(ValueError, match="is a folder"):
        Corpus.of(tmp_path, Cut())
    with pytest.raises(ValueError, match=r"end in one of \.txt"):
        Corpus.of(written("some.pdf", "x"), Cut())
    with pytest.raises(ValueError, match="got none"):
        Corpus.of([], Cut())
    with pytest.raises(ValueError, match="column of prompts must be one of"):
        contexts(written("some.csv", "a,b\n1,2\n"), model)
    with pytest.raises(ValueError, match="which is none"):
        contexts(written("some.parquet", "text"), model)

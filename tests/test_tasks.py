"""Tasks to be had: every pair has the property that its task is about, for every tokenizer there is."""

import csv
import json
import re
from collections.abc import Callable

import pytest
import torch
from conftest import STORIES, random_model

import tracedensity as td
from benchmarks.lens import HAS_HOOKED, HookedTransformer
from tracedensity import tasks
from tracedensity.model import Transformer, as_transformer
from tracedensity.task import Task

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

GPT2 = STORIES.parent / "gpt2-tokenizer"
BOOKS = ("ioi", "agreement", "pronoun", "docstring", "induction")
POSSIBLE = {
    "books-gpt2": BOOKS,
    "books-llama": BOOKS,
    "stories260K": ("ioi", "pronoun", "induction"),
    "gpt2": tasks.NAMES,
    "tiny-gpt2": ("induction",),
    "tiny-llama": ("induction",),
}
EVERY = [(model, name) for model, names in POSSIBLE.items() for name in names]
N_CHANGED = dict.fromkeys(tasks.NAMES, 1) | {"docstring": 4}
"""Tokens in which corrupted prompts differ from clean ones."""


@pytest.fixture(scope="module")
def named(request) -> Callable[[str], HookedTransformer]:
    """The model of a name, loaded once; for "gpt2" a random one with the real tokenizer."""
    loaded: dict[str, HookedTransformer] = {}

    def model(name: str) -> HookedTransformer:
        if name == "stories260K":
            return request.getfixturevalue("stories")
        if name.startswith("tiny"):
            return request.getfixturevalue(name.replace("-", "_"))
        if name not in loaded:
            loaded[name] = gpt2_vocabulary() if name == "gpt2" else td.load_model(name, device="cpu")
        return loaded[name]

    return model


def gpt2_vocabulary() -> HookedTransformer:
    if not GPT2.is_dir():
        pytest.skip("the GPT-2 tokenizer is not beside the checkout")
    from transformers import GPT2TokenizerFast

    shape = {"n_layers": 1, "d_model": 4, "n_heads": 1, "d_mlp": 4, "n_ctx": 128, "d_vocab": 50257}
    model = random_model(model_name="random", act_fn="gelu_new", normalization_type="LN", **shape)
    tokenizer = GPT2TokenizerFast.from_pretrained(GPT2, local_files_only=True)
    if HAS_HOOKED:
        model.set_tokenizer(tokenizer)
    else:
        tokenizer.pad_token = tokenizer.eos_token
        model.tokenizer, model.cfg.tokenizer_prepends_bos = tokenizer, False
    return model


# -- every task has the property that it is named for ----------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def check_ioi(task: Task, model: Transformer) -> None:
    orders = set()
    for clean, corrupted, (answer,), (distractor,) in rows(task):
        answer, distractor = answer.strip(), distractor.strip()
        assert words(clean).count(answer) == 1 and words(clean).count(distractor) == 2
        assert words(corrupted).count(answer) == 1 and words(corrupted).count(distractor) == 1
        (third,) = set(words(corrupted)) - set(words(clean))
        assert third[0].isupper() and words(corrupted).count(third) == 1
        orders.add(clean.index(answer) < clean.index(distractor))
    assert orders == {True, False}


def check_greater_than(task: Task, model: Transformer) -> None:
    known = {f"{year:02}" for year in range(100)} & set(model.model.tokenizer.get_vocab())
    assert len(known) > 90
    for clean, corrupted, answer, distractor in rows(task):
        century, start, again = re.findall(r"from the year (\d\d)(\d\d) to the year (\d\d)$", clean)[0]
        assert century == again
        assert corrupted == clean.replace(f"{century}{start}", f"{century}01")
        assert all(later > start for later in answer)
        assert all(year <= start for year in distractor)
        assert answer and distractor and {*answer, *distractor} == known
        assert model.texts(model.tokens(clean)).count(f" {century}") == 2
        assert model.texts(model.tokens(clean)).count(start) == 1


def check_agreement(task: Task, model: Transformer) -> None:
    verbs = {"is": "are", "was": "were", "has": "have", "does": "do", "seems": "seem", "looks": "look"}

    def is_plural(noun: str) -> bool:
        return noun in ("men", "women", "children") or noun.endswith("s")

    for clean, corrupted, (answer,), (distractor,) in rows(task):
        _, subject, *between, attractor = words(clean)
        _, other, *same, last = words(corrupted)
        assert between == same and attractor == last
        assert is_plural(subject) != is_plural(other) and is_plural(subject) != is_plural(attractor)
        assert subject[0] == other[0]
        singular, plural = (distractor, answer) if is_plural(subject) else (answer, distractor)
        assert verbs[singular.strip()] == plural.strip()


def check_pronoun(task: Task, model: Transformer) -> None:
    known = dict.fromkeys(["Lily", "Mary", "Emily", "mother", "woman", "aunt"], 0)
    known |= dict.fromkeys(["Tim", "John", "William", "father", "man", "uncle"], 1)
    met = 0
    for clean, corrupted, (answer,), (distractor,) in rows(task):
        (one,) = set(words(clean)) - set(words(corrupted))
        (other,) = set(words(corrupted)) - set(words(clean))
        pronouns = (" she", " he", " She", " He", " her", " his")
        gender = pronouns.index(answer) % 2
        assert pronouns.index(distractor) == pronouns.index(answer) + 1 - 2 * gender
        assert answer[1].isupper() == distractor[1].isupper() == clean.endswith(".")
        met += (one in known) + (other in known)
        assert known.setdefault(one, gender) == gender
        assert known.setdefault(other, 1 - gender) == 1 - gender
    assert met > 5


def check_capitals(task: Task, model: Transformer) -> None:
    known = {"France": " Paris", "England": " London", "Germany": " Berlin", "Japan": " Tokyo", "Cuba": " Havana"}
    for clean, corrupted, (answer,), (distractor,) in rows(task):
        (one,) = set(words(clean)) - set(words(corrupted))
        (other,) = set(words(corrupted)) - set(words(clean))
        assert known.setdefault(one, answer) == answer
        assert known.setdefault(other, distractor) == distractor
        assert answer.strip() not in clean


def check_docstring(task: Task, model: Transformer) -> None:
    for clean, corrupted, (answer,), (distractor,) in rows(task):
        defined, others = (
            re.findall(r"^def \w+\(self, (.+)\):$", text, re.M)[0].split(", ") for text in (clean, corrupted)
        )
        assert len({*defined, *others}) == 8
        assert re.findall(r":param (\w+): ", clean) == defined[:2]
        assert answer == f" {defined[2]}"
        assert distractor.strip() in {*defined} - {defined[2]}
        assert clean.endswith("\n    :param") and clean.split("\n")[1:] == corrupted.split("\n")[1:]


def check_induction(task: Task, model: Transformer) -> None:
    tokenizer = model.model.tokenizer
    for clean, corrupted, (answer,), (distractor,) in rows(task):
        if tokenizer is not None:
            assert clean[0] == corrupted[0] == tokenizer.bos_token_id
            clean, corrupted = clean[1:], corrupted[1:]
            assert not {*clean, *corrupted} & {*tokenizer.all_special_ids}
        followers = [clean[i + 1] for i in range(len(clean) - 1) if clean[i] == clean[-1]]
        assert followers == [answer]
        assert clean[-1] == corrupted[-1] and corrupted.count(clean[-1]) == 1
        assert clean.count(answer) == corrupted.count(answer) == 1
        assert distractor in clean and distractor != answer


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def rows(task: Task):
    return zip(task.clean, task.corrupted, task.answer, task.distractor, strict=True)


def test_every_task_is_checked():
    assert set(CHECKS) == set(tasks.NAMES)
    assert all(callable(getattr(tasks, name)) for name in tasks.NAMES)


@pytest.mark.parametrize(("which", "name"), EVERY)
def test_pairs_are_what_the_task_is_about(named, which, name):
    model = as_transformer(named(which))
    task = tasks.make(name, model, n=24, seed=1)
    assert (task.name, len(task), task.vocabulary) == (name, 24, model.vocabulary)
    assert len({*zip(task.clean, task.corrupted, strict=True)}) == 24
    CHECKS[name](task, model)


@pytest.mark.parametrize(("which", "name"), EVERY)
def test_pairs_differ_in_the_words_alone_position_by_position(named, which, name):
    model = as_transformer(named(which))
    for clean, corrupted, answer, distractor in rows(tasks.make(name, model, n=24)):
        one, other = model.tokens(clean), model.tokens(corrupted)
        assert len(one) == len(other)
        assert int((one != other).sum()) == N_CHANGED[name]
        assert not {*answer} & {*distractor}
        for option in (*answer, *distractor):
            if isinstance(option, str):
                assert model.texts([model.single_token(option)]) == [option]
                if name != "greater_than":
                    assert model.texts(model.tokens(clean + option)) == [*model.texts(one), option]


@pytest.mark.parametrize(("which", "name"), EVERY)
def test_a_seed_gives_the_same_pairs_and_fewer_are_the_first_of_more(named, which, name):
    model = named(which)
    before = torch.get_rng_state()
    task, again, other = (tasks.make(name, model, n=16, seed=seed) for seed in (3, 3, 4))
    assert task.to_dict() == again.to_dict() != other.to_dict()
    assert tasks.make(name, model, n=5, seed=3).to_dict() == task[:5].to_dict()
    assert torch.get_rng_state().equal(before)


def test_pairs_that_the_tokenizer_reads_otherwise_are_not_taken(named):
    model = as_transformer(named("books-gpt2"))

    def fits(clean: str, corrupted: str, answer: str) -> bool:
        return tasks._fits(model, tasks._Pair(clean, corrupted, (answer,), (" Mary",)))

    assert fits("We saw Emily and", "We saw Lucy and", " John")
    assert not fits("We saw Emily and", "We saw Barbara and", " John")  # " Bar", "b", "ara"
    assert not fits("We w", "We w", "as")  # one token, " was"


def test_swapped_names_make_the_distractor_right(named):
    for clean, corrupted, (answer,), (distractor,) in rows(tasks.ioi(named("books-gpt2"), 16, corruption="swap")):
        answer, distractor = answer.strip(), distractor.strip()
        assert words(clean).count(answer) == words(corrupted).count(distractor) == 1
        assert words(clean).count(distractor) == words(corrupted).count(answer) == 2


def test_induction_begins_as_prompts_of_the_model_do(named, monkeypatch):
    model = named("books-gpt2")
    with_start = tasks.induction(model, 2, length=5)
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    without = tasks.induction(model, 2, length=5)
    assert [len(prompt) for prompt in with_start.clean] == [10, 10]
    assert [prompt[1:] for prompt in with_start.clean] == [*without.clean]


def test_a_task_is_refused_by_another_tokenizer(named, stories):
    with pytest.raises(ValueError, match="must be made for the tokenizer of stories260K"):
        tasks.ioi(named("books-gpt2"), 2).solved(stories)


# -- what a model solves ---------------------------------------------------------------------------


def test_pairs_are_had_one_by_one_and_by_length(named):
    task = td.tasks.pronoun(named("books-gpt2"), n=16)
    assert [pair.clean[0] for pair in task] == list(task.clean)
    assert task[-1].to_dict() == task[15].to_dict() == task[[15]].to_dict()
    lengths = [len(as_transformer(named("books-gpt2")).tokens(prompt)) for prompt in task.clean]
    common = max(sorted(set(lengths)), key=lengths.count)
    same = task.of_length(named("books-gpt2"))
    assert list(same.clean) == [prompt for prompt, n in zip(task.clean, lengths, strict=True) if n == common]
    td.attribute(named("books-gpt2"), same, graph="component", method="eap", positions=True)
    with pytest.raises(ValueError, match=r"`n_tokens` must be one of \[.*\], got 99"):
        task.of_length(named("books-gpt2"), 99)
    for wrong in (16, [16], -17):
        with pytest.raises(IndexError, match="`part` must be a pair from -16 to 15, got"):
            task[wrong]


def test_an_answer_that_is_given_twice_counts_once(named):
    model = named("books-gpt2")
    once, twice = (td.Task([[5, 6, 7]], answer=[answer], distractor=[[9]]) for answer in ([4, 8], [4, 8, 4]))
    assert twice.solved(model).mean_logit_difference == once.solved(model).mean_logit_difference
    with pytest.raises(ValueError, match=r"`distractor` must hold no answer, got .* as both in pair 0"):
        td.Task([[5, 6, 7]], answer=[[4, 8]], distractor=[[8]]).solved(model)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"clean": None}, "`clean` must be texts or token ids"),
        ({"clean": [[1, 2]], "answer": [1.5]}, "`answer` must be tokens, as texts or ids, got a float"),
        ({"clean": [[1, 2]], "answer": 1.5}, "`answer` must be tokens, as texts or ids, got a float"),
        ({"clean": [[1, 2]], "position": 1.5}, "`position` must be a whole number, got 1.5"),
        ({"clean": [[1, 2]], "attention_mask": "no"}, "`attention_mask` must be numbers"),
    ],
)
def test_what_is_no_task_is_refused(values, sentence, unchecked):
    with pytest.raises(ValueError, match=sentence):
        td.Task(**values)


def test_a_long_prompt_does_not_fill_the_screen():
    assert len(repr(td.Task(["word " * 500] * 3))) < 140


@pytest.mark.parametrize(
    ("which", "name"),
    [("books-llama", "induction"), ("books-llama", "ioi"), ("books-gpt2", "agreement"), ("stories260K", "pronoun")],
)
def test_solved_keeps_the_first_pairs_that_the_model_solves(named, which, name):
    model = named(which)
    task = tasks.make(name, model, n=8, solved=True)
    for clean, _, (answer,), (distractor,) in rows(task):
        reader = as_transformer(model)
        with torch.no_grad():
            logits = model(reader.tokens(clean)[None])[0, -1]
        assert logits[reader.single_token(answer)] > logits[reader.single_token(distractor)]
    assert task.to_dict() == tasks.make(name, model, n=160).where_solved(model)[:8].to_dict()


def test_models_solve_what_they_were_trained_for(named):
    for which in ("books-gpt2", "books-llama"):
        assert tasks.induction(named(which)).solved(named(which)).accuracy > 0.9
        assert tasks.pronoun(named(which)).solved(named(which)).accuracy > 0.9


def test_too_few_solved_pairs_are_said_in_numbers(named, monkeypatch):
    monkeypatch.setattr(tasks, "_TRIES", 1)
    with pytest.raises(ValueError, match=r"books-gpt2 solves, \d+ of the 32 of 'agreement' .*, got 32\. Ask for fewer"):
        tasks.agreement(named("books-gpt2"), solved=True)


# -- what cannot be had ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "name", "message"),
    [
        (
            "books-gpt2",
            "capitals",
            r"at least 2 countries and their capitals .* single tokens, got 1 of \d+ with books",
        ),
        ("books-llama", "greater_than", r"century and two digits, got \[' 1', '7', '3', '2'\]"),
        ("stories260K", "greater_than", "century and two digits"),
        ("stories260K", "agreement", "at least 2 nouns in both numbers"),
        ("stories260K", "docstring", "at least 8 names of arguments"),
        ("tiny-gpt2", "ioi", "must have a tokenizer for the task 'ioi', got none with tiny-gpt2"),
    ],
)
def test_a_tokenizer_without_the_words_is_refused(named, which, name, message):
    with pytest.raises(ValueError, match=message):
        tasks.make(name, named(which))


def test_no_pair_comes_twice_and_no_more_are_given_than_there_are(stories, monkeypatch):
    monkeypatch.setattr(tasks, "_IOI", ("At last {first} met {second}, and {giver} said to",))
    task = tasks.ioi(stories, 12)  # three names: six choices of two of them, in two orders
    assert len({*task.clean}) == 12
    with pytest.raises(ValueError, match=r"at most the number of different pairs of 'ioi' .* about 12, got 13"):
        tasks.ioi(stories, 13)


def test_values_out_of_range_are_refused(tiny_gpt2, unchecked):
    with pytest.raises(ValueError, match="`n` must be at least 1, got 0"):
        tasks.induction(tiny_gpt2, 0)
    for length in (2, 17):  # 17 and 16 tokens are one more than the context
        with pytest.raises(ValueError, match=f"`length` must be from 3 to 16, .*got {length}"):
            tasks.induction(tiny_gpt2, length=length)
    assert len(tasks.induction(tiny_gpt2, 1, length=16).clean[0]) == 31
    with pytest.raises(ValueError, match=r"`corruption` must be 'third' or 'swap', got 'fourth'"):
        tasks.ioi(tiny_gpt2, corruption="fourth")
    with pytest.raises(ValueError, match=r"`name` must be a task, got 'iou'\. There are ioi, greater_than"):
        tasks.make("iou", tiny_gpt2)


# -- files -----------------------------------------------------------------------------------------

COLUMNS = ("clean", "corrupted", "answer", "distractor")


@pytest.mark.parametrize("name", ["ioi", "docstring", "induction"])
def test_a_task_comes_back_from_files(named, tmp_path, name):
    model = named("books-gpt2")
    task = tasks.make(name, model, n=6)
    table = [dict(zip(COLUMNS, row, strict=True)) for row in rows(task)]
    lines = [{key: value if isinstance(value, str) else [*value] for key, value in row.items()} for row in table]
    (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    assert tasks.from_jsonl(tmp_path / f"{name}.jsonl", model).to_dict() == task.to_dict()

    with open(tmp_path / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for line in lines:
            writer.writerow(
                {key: value if isinstance(value, str) else json.dumps(value) for key, value in line.items()}
            )
    assert tasks.from_csv(tmp_path / f"{name}.csv", model).to_dict() == task.to_dict()
    unbound = tasks.from_csv(str(tmp_path / f"{name}.csv"), name="mine")
    assert (unbound.vocabulary, unbound.name, unbound.clean) == ("", "mine", task.clean)


def test_the_columns_of_public_benchmarks_are_ids(tmp_path):
    path = tmp_path / "ioi.csv"
    path.write_text(
        ',clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n'
        '470,"Then, A and B sat. A said to","Then, A and B sat. C said to",x,47764,26757\n'
        '184,"Then, D and ""B"" sat.","Then, D and ""C"" sat.",x,"[1, 2]",3\n',
        encoding="utf-8-sig",
    )  # fmt: skip
    task = tasks.from_csv(path)
    assert task.clean == ("Then, A and B sat. A said to", 'Then, D and "B" sat.')
    assert (task.answer, task.distractor) == (((47764,), (1, 2)), ((26757,), (3,)))
    assert tasks.from_csv(path, corrupted="corrupted_hard").corrupted == ("x", "x")
    assert tasks.from_csv(path, corrupted=None, answer=None).corrupted is None


def test_columns_may_have_other_names_and_be_absent(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "[not a list", "next": [" a", 5]}\n\n{"text": [1, 2], "next": 7}\n', encoding="utf-8")
    task = tasks.from_jsonl(path, clean="text", answer="next")
    assert task.clean == ("[not a list", (1, 2)) and task.answer == ((" a", 5), (7,))
    assert task.corrupted is None and task.distractor is None
    (tmp_path / "own.csv").write_text("text,next\n[not a list,33\n", encoding="utf-8")
    task = tasks.from_csv(tmp_path / "own.csv", clean="text", answer="next")
    assert (task.clean, task.answer) == (("[not a list",), (("33",),))  # a number is text there


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        pytest.param("", {}, "at least one prompt, got .*file.csv', which has none", id="empty"),
        pytest.param("clean,answer\n", {}, "at least one prompt", id="a header only"),
        pytest.param("text,answer\na,b\n", {}, "`clean` must be a column .*'clean'. It has text, answer", id="text"),
        pytest.param("clean,next\na,b\n", {}, "`answer` must be a column of", id="no answer"),
        pytest.param("clean,answer\na,b\n", {"corrupted": "x"}, "`corrupted` must be a column .* got 'x'", id="asked"),
        pytest.param("clean,answer\na,b\nc,\n", {}, "`answer` .* nothing .*csv', row 3, column 'answer'", id="a gap"),
        pytest.param("clean,answer\na,b,c\n", {}, "as many cells .*, 2, got 3 in .*row 2", id="a comma in text"),
        pytest.param('clean,answer\n"a,b\n', {}, "must be a CSV file, .*damaged", id="open quotes"),
        pytest.param('clean,answer\n"[1, 2.5]",b\n', {}, r"`clean` .*, got \[1, 2.5\] in .*row 2", id="a fraction"),
        pytest.param("clean,correct_idx\na,-1\n", {}, "`answer` must be a token, .*got -1 in", id="negative"),
        pytest.param(
            'clean,corrupted,answer\na,a,b\n"[1, 2]","[1, 2, 3]",b\n', {},
            "equal length, got 3 tokens in column 'corrupted' for 2 in column 'clean' in .*csv', row 3", id="unequal",
        ),
    ],
)  # fmt: skip
def test_a_faulty_table_is_refused_by_name(tmp_path, content, options, message):
    path = tmp_path / "file.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tasks.from_csv(path, **options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"clean": "The man", "corrupted": "The old man", "answer": " was"}, "got 4 tokens .* for 3 .*, line 2"),
        ({"clean": "The man", "answer": " wasbeen"}, "`answer` must be single tokens, .*line 2, column 'answer'"),
        ({"clean": "The man", "distractor": 4096, "answer": " was"}, "`distractor` must hold .* line 2"),
        ({"clean": [1, 5000], "answer": " was"}, r"token ids from 0 to 4095, got \[5000\].*line 2, column 'clean'"),
        ({"clean": "The man", "answer": " was", "corrupted": None}, "`corrupted` must be given in every row.*line 2"),
        ({"clean": ["The man"], "answer": " was"}, "`clean` must be text or a list of token ids, got .*line 2"),
        ({"clean": "The man", "answer": True}, "`answer` must be a token, .*got True"),
        ("The man", "one JSON object per line, got '\"The man\"' in .*line 2"),
    ],
)
def test_a_line_that_the_model_cannot_read_is_refused_by_name(named, tmp_path, line, message):
    path = tmp_path / "file.jsonl"
    path.write_text("\n" + json.dumps(line), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tasks.from_jsonl(path, named("books-gpt2"))


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a file, got .*, which is a folder"):
        tasks.from_csv(tmp_path)
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        tasks.from_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "latin.csv").write_bytes("clean,answer\ncafé,a\n".encode("latin-1"))
    with pytest.raises(ValueError, match="must be a text file in UTF-8"):
        tasks.from_csv(tmp_path / "latin.csv")

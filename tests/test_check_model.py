"""The check of a model at first use: it holds for every family, and each way of being wrong is named."""

import copy
import json
import re
from typing import Any

import pytest
import torch
from test_families import CASES, model_of

import tracedensity as td
from tracedensity.cli import main
from tracedensity.model import entry
from tracedensity.model.adapter import Visiting
from tracedensity.model.place import Point

PROMPT = [3, 1, 4, 1, 5]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_family_computes_what_its_graph_says(name, kind):
    report = td.check_model(model_of(name, kind))
    assert report.ok
    assert report.kind == kind
    assert len(report.table()) >= 15
    assert report.table()["error"].max() < 1e-5
    assert f"ModelReport({name}: {kind} of TransformerLens" in repr(report)
    assert " NO " not in "".join(line for line in repr(report).splitlines() if "e-" in line)


# What would go unnoticed otherwise: a change to a sound model, or to what is believed of it.


def other_output(model: Any, adapter: type, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(adapter, "W_O", lambda self, layer: (1 + (layer == 1)) * model.blocks[layer].attn.W_O.detach())
    return r"layer 1 what heads write is off by \d+\.\d%"


def other_reading(model: Any, adapter: type, monkeypatch: pytest.MonkeyPatch) -> str:
    projection = adapter.projection

    def reversed_heads(self: Any, name: str, layer: int) -> Any:
        weight, bias = projection(self, name, layer)
        return (weight.flip(0) if name == "k" else weight), bias

    monkeypatch.setattr(adapter, "projection", reversed_heads)
    return r"layer 0 what heads read \(k\) is off by"


def other_norm(model: Any, adapter: type, monkeypatch: pytest.MonkeyPatch) -> str:
    norm = adapter.norm

    def centred(self: Any, name: str, layer: int) -> Any:
        found = norm(self, name, layer)
        return None if found is None else type(found)(found.weight, found.bias, not found.centred, found.eps)

    monkeypatch.setattr(adapter, "norm", centred)
    return r"layer 0 what heads read \(q\) is off by"


def half_a_middle(model: Any, adapter: type, monkeypatch: pytest.MonkeyPatch) -> str:
    """As with the bridge's `hook_resid_mid`: what is put there reaches the MLP and not the skip connection."""

    def only_the_branch(self: Any, layer: int, edit: Any) -> Any:
        return [Visiting(self.place("mlp_in", layer), edit)]

    monkeypatch.setattr(adapter, "skip_attn", only_the_branch)
    return "layer 0 what the MLP reads beside an edited connection is off by"


def edits_in_vain(model: Any, adapter: type, monkeypatch: pytest.MonkeyPatch) -> str:
    """As those of a pattern that is shown when it has been used."""
    attach = Point.attach

    def seen_only(self: Point, visit: Any, *, first: bool = False) -> Any:
        if ".hook_pattern" not in str(self.point.name):
            return attach(self, visit, first=first)
        return attach(self, lambda value: (visit(value), None)[1], first=first)

    monkeypatch.setattr(Point, "attach", seen_only)
    return "layer 0 edited patterns and values is off by"


def a_hook_that_never_fires(model: Any, adapter: type, monkeypatch: pytest.MonkeyPatch) -> str:
    attach = Point.attach

    def deaf(self: Point, visit: Any, *, first: bool = False) -> Any:
        is_z = str(self.point.name).endswith(("blocks.1.attn.hook_z", "blocks.1.attn.o.hook_in"))
        return (lambda: None) if is_z else attach(self, visit, first=first)

    monkeypatch.setattr(Point, "attach", deaf)
    return "must show 'z' in every layer, got none in layer 1: the hook never fired"


WRONGS = [other_output, other_reading, other_norm, half_a_middle, edits_in_vain, a_hook_that_never_fires]


@pytest.mark.parametrize("wrong", WRONGS)
@pytest.mark.parametrize("name", ["gpt2", "llama3"])
@pytest.mark.parametrize("kind", sorted({kind for _, kind in CASES}))
def test_what_is_wrong_is_an_error_that_names_layer_and_quantity(name, kind, wrong, monkeypatch):
    model = copy.deepcopy(model_of(name, kind))  # which nobody has seen
    adapter = type(entry.adapter_of(model))
    words = wrong(model, adapter, monkeypatch)
    with pytest.raises(ValueError, match=words) as error:
        td.density(model, PROMPT)
    assert "\n" not in str(error.value)
    if "never fired" not in words:
        report = td.check_model(model)
        assert not report.ok
        assert re.search(r"\n  NO  ", repr(report))
    monkeypatch.undo()


def test_a_model_is_checked_once(monkeypatch, tiny_gpt2):
    from tracedensity.model import check

    td.check_model(tiny_gpt2)
    monkeypatch.setattr(check, "_examine", lambda model: pytest.fail("checked again"))
    td.attribute(tiny_gpt2, PROMPT, method="norm")


def test_hooks_of_the_user_are_left_out_and_stay(tiny_gpt2):
    model = copy.deepcopy(tiny_gpt2)
    calls = []

    def steer(value: torch.Tensor, hook: object) -> torch.Tensor:
        calls.append(value)
        return value + 1

    model.add_hook("blocks.0.hook_attn_out", steer)
    assert td.check_model(model).ok
    assert not calls
    model(torch.tensor([PROMPT]))
    assert len(calls) == 1


def test_another_precision_is_checked_anew(tiny_gpt2):
    model = copy.deepcopy(tiny_gpt2)
    assert td.check_model(model).dtype == torch.float32
    model.to(torch.bfloat16)
    report = td.check_model(model)
    assert report.dtype == torch.bfloat16
    assert report.ok


def test_a_refusal_is_for_models_only():
    with pytest.raises(ValueError, match="must be a HookedTransformer or TransformerBridge"):
        td.check_model(torch.nn.Linear(1, 1))


def test_the_command_line_says_what_holds(capsys, monkeypatch):
    assert main(["check", "books-gpt2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("ModelReport(books-gpt2: ") and "  NO  " not in text.replace("neurons", "")
    assert main(["check", "books-gpt2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["dtype"] == "float32" and all(each["holds"] for each in found["findings"])
    assert main(["check", "books-gpt2", "--by", "node"]) != 0
    assert "leave out `--by` for a model" in capsys.readouterr().err

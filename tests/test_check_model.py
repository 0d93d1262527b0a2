"""The check of a model at first use: it holds for every family, and each way of being wrong is named."""

import copy
import json
import re
from typing import Any

import pytest
import torch
from test_families import CASES, EXPERTS, model_of

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
    assert {"what neurons write", "activations of neurons"} <= {*report.table()["quantity"]} or name in EXPERTS


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


def other_neurons(model: Any, adapter: type, monkeypatch: pytest.MonkeyPatch) -> str:
    W_out = adapter.W_out
    monkeypatch.setattr(adapter, "W_out", lambda self, layer: W_out(self, layer).flip(0))
    return "layer 0 what neurons write is off by"


def neurons_that_cannot_be_edited(model: Any, adapter: type, monkeypatch: pytest.MonkeyPatch) -> str:
    attach = Point.attach

    def seen_only(self: Point, visit: Any, *, first: bool = False) -> Any:
        is_post = str(self.point.name).endswith((".mlp.hook_post", ".mlp.out.hook_in"))
        return attach(self, (lambda value: (visit(value), None)[1]) if is_post else visit, first=first)

    monkeypatch.setattr(Point, "attach", seen_only)
    return "layer 0 edited activations of neurons is off by"


def other_activation(model: Any, adapter: type, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(adapter, "activation", lambda self, layer: torch.relu)
    return "layer 0 activations of neurons is off by"


def other_scale(model: Any, adapter: type, monkeypatch: pytest.MonkeyPatch) -> str:
    """As if a hook showed the scale of another norm."""
    place = adapter.place

    def swapped(self: Any, name: str, layer: int) -> Any:
        return place(self, {"attn_in_scale": "mlp_in_scale", "mlp_in_scale": "attn_in_scale"}.get(name, name), layer)

    monkeypatch.setattr(adapter, "place", swapped)
    return "layer 0 what the norm before attention divides by is off by"


WRONGS = [
    other_output, other_reading, other_norm, half_a_middle, edits_in_vain, a_hook_that_never_fires, other_neurons,
    neurons_that_cannot_be_edited, other_activation, other_scale,
]  # fmt: skip


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


class Silent:
    """A place that is never passed."""

    def attach(self, visit: Any, *, first: bool = False) -> Any:
        return lambda: None


@pytest.mark.parametrize("site", ["attn_in_scale", "mlp_in_scale", "pre", "pre_linear", "post"])
@pytest.mark.parametrize("kind", sorted({kind for _, kind in CASES}))
def test_no_hook_that_something_depends_on_stays_silent(kind, site, monkeypatch):
    model = model_of.__wrapped__("llama3", kind)
    adapter = type(entry.adapter_of(model))
    place = adapter.place
    monkeypatch.setattr(
        adapter, "place", lambda self, name, layer: Silent() if name == site else place(self, name, layer)
    )
    with pytest.raises(ValueError, match=f"must show '{site}' in every layer, got none in layer 0"):
        td.check_model(model)


def test_of_a_model_that_gives_nan_nothing_is_known_to_hold():
    model = copy.deepcopy(model_of("gpt2", CASES[0][1]))
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    report = td.check_model(model)
    assert not report.ok and "NO  nothing could be compared: values are NaN or infinite" in repr(report)


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
    assert text.startswith("ModelReport(books-gpt2: ") and "  NO  " not in text
    assert main(["check", "books-gpt2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["dtype"] == "float32" and all(each["holds"] for each in found["findings"])
    assert main(["check", "books-gpt2", "--by", "node"]) != 0
    assert "leave out `--by` for a model" in capsys.readouterr().err


def test_how_a_model_is_loaded_stands_before_the_command(capsys):
    assert main(["--dtype", "bfloat16", "--backend", "bridge", "check", "books-llama", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["class"], found["dtype"]) == ("TransformerBridge", "bfloat16")
    assert main(["--device-map", '{"": "cpu"}', "check", "books-llama", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["class"], found["dtype"]) == ("TransformerBridge", "float32")
    assert main(["--device-map", '{"": ', "check", "books-llama"]) == 2
    assert "`--device-map` must be a name or a JSON object" in capsys.readouterr().err
    assert main(["--device-map", '{"": "cuda:99"}', "check", "books-llama"]) == 2
    assert "`device_map` must name devices that this machine has, or 'disk', got 'cuda:99'" in capsys.readouterr().err

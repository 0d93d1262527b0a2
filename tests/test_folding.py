"""What processed weights do and do not change, as docs/method.md says."""

import copy

import pytest
import torch

import tracedensity as td
from benchmarks.lens import HAS_HOOKED
from tracedensity.graph import flatten

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
ALL_OFF = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
    "refactor_factored_attn_matrices": False,
}


def processed(model, **options):
    folded = copy.deepcopy(model)
    if HAS_HOOKED:
        folded.load_and_process_state_dict(folded.state_dict(), **{**ALL_OFF, **options})
    else:
        folded.process_weights(**{**ALL_OFF, **options})
    return folded


def curves(model, other, ranking):
    sizes = range(0, ranking.n_edges, 7)
    return [td.evaluate(m, PROMPT, ranking, sizes).metrics["tv"] for m in (model, other)]


def test_folded_norms_leave_every_circuit_as_it_is(tiny_model):
    folded = processed(tiny_model, fold_ln=True)
    ours, theirs = curves(tiny_model, folded, td.attribute(tiny_model, PROMPT).rank())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_scores_differ_only_in_the_last_state(tiny_model):
    folded = processed(tiny_model, fold_ln=True)
    one, two = td.attribute(tiny_model, PROMPT), td.attribute(folded, PROMPT)
    differs = (flatten(one.graph, one.values) - flatten(two.graph, two.values)).abs() > 1e-5
    assert differs.tolist()[:-2] == [False] * (one.graph.n_edges - 2)
    assert all(differs[-2:])


def test_centred_weights_change_scores_and_folded_value_biases_change_circuits(tiny_gpt2):
    ranking = td.attribute(tiny_gpt2, PROMPT).rank()
    centred = processed(tiny_gpt2, fold_ln=True, center_writing_weights=True)
    one, two = td.attribute(tiny_gpt2, PROMPT), td.attribute(centred, PROMPT)
    assert (one.values["head"] - two.values["head"]).abs().max() > 1e-3
    ours, theirs = curves(tiny_gpt2, processed(tiny_gpt2, fold_value_biases=True), ranking)
    assert (ours - theirs).abs().max() > 1e-3


def test_processed_weights_are_another_model(tiny_model):
    circuit = td.density(tiny_model, PROMPT, baselines=False).circuit(faithfulness=0.8)
    with pytest.raises(ValueError, match="makes another model"):
        circuit.verify(processed(tiny_model, fold_ln=True))

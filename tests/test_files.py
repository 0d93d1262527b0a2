"""Saved results come back the same, and nothing half-written stays."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tracedensity as td

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def curve(tiny_gpt2):
    return td.density(tiny_gpt2, PROMPT)


def test_curve_comes_back(curve, tmp_path):
    curve.save(tmp_path / "curve.safetensors")
    again = td.load(tmp_path / "curve.safetensors")
    assert isinstance(again, td.DensityCurve)
    assert again.to_dict() == curve.to_dict()
    for kind, rank in curve.ranking.rank.items():
        assert torch.equal(again.ranking.rank[kind], rank)


def test_circuit_comes_back_and_verifies(curve, tiny_gpt2, tmp_path):
    circuit = curve.circuit(faithfulness=0.9)
    circuit.save(tmp_path / "circuit.safetensors")
    again = td.load(tmp_path / "circuit.safetensors")
    assert isinstance(again, td.Circuit)
    assert again.edge_names() == circuit.edge_names()
    assert again.faithfulness == circuit.faithfulness
    assert again.verify(tiny_gpt2).faithfulness == pytest.approx(circuit.faithfulness, abs=1e-6)
    with safe_open(tmp_path / "circuit.safetensors", "pt") as file:
        about = json.loads(file.metadata()["tracedensity"])
    assert about["provenance"]["token_ids"] == PROMPT
    assert about["versions"]["torch"] == torch.__version__


def test_files_can_be_read_by_whom_the_user_lets(curve, tmp_path):
    (tmp_path / "other").write_text("")
    curve.save(tmp_path / "curve.safetensors")
    assert (tmp_path / "curve.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_circuit_of_another_model_is_refused(curve, tiny_llama):
    with pytest.raises(ValueError, match="must be the one that this was computed on"):
        curve.circuit(faithfulness=0.9).verify(tiny_llama)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "foreign", "empty"])
def test_damaged_file_gets_one_sentence(curve, tmp_path, damage):
    path = tmp_path / "circuit.safetensors"
    curve.circuit(faithfulness=0.9).save(path)
    content = path.read_bytes()
    if damage == "foreign":
        save_file({"x": torch.ones(2)}, path)
    else:
        path.write_bytes({
            "truncated": content[: len(content) // 2],
            "flipped": content[:-3] + bytes([1 - content[-3]]) + content[-2:],  # another number of edges
            "text": b"not a file of tensors",
            "empty": b"",
        }[damage])  # fmt: skip
    with pytest.raises(ValueError, match=r"must be a file saved by tracedensity, got .* damaged or something else"):
        td.load(path)


def test_no_flipped_bit_is_read(curve, tmp_path):
    path = tmp_path / "curve.safetensors"
    curve.save(path)
    content = path.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match="damaged or something else"):
            td.load(path)


def test_what_is_no_file_gets_one_sentence(curve, tmp_path):
    with pytest.raises(FileNotFoundError, match="which is a folder"):
        td.load(tmp_path)
    for path in (tmp_path / "nowhere" / "curve.safetensors", tmp_path):
        with pytest.raises(ValueError, match="`path` must be a file in a folder that exists"):
            curve.save(path)


def test_missing_file_gets_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        td.load(tmp_path / "nowhere.safetensors")


def test_a_failing_save_leaves_the_old_file(curve, tmp_path, monkeypatch):
    path = tmp_path / "curve.safetensors"
    curve.save(path)
    before = path.read_bytes()

    def fail(*arguments):  # everything is written by then, beside
        raise KeyboardInterrupt

    monkeypatch.setattr("tracedensity.files.Path.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        curve.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

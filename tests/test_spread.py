"""Models in several places: in many files, on several devices, on disk; the numbers are those of the model in one."""

import gc
import tempfile
from importlib.metadata import version

import pytest
import torch
from elsewhere import Devices, at, spread
from families import bridged, hugging_face

import tracedensity as td
from benchmarks.lens import HAS_HOOKED
from tracedensity.loading.converted import bridged as bridge_of
from tracedensity.loading.wanted import Wanted
from tracedensity.model import as_transformer
from tracedensity.model.offload import away

PROMPT = [3, 1, 4, 1, 5, 9]
TASK = td.Task(clean=[PROMPT], corrupted=[[3, 7, 4, 1, 5, 8]], answer=[12], distractor=[35])


def circuit_of(model):
    return td.attribute(model, PROMPT).rank().circuit(60)


WORK = {
    "flow": lambda model: td.attribute(model, PROMPT, method="flow").values,
    "eap-ig": lambda model: td.attribute(model, PROMPT, method="eap-ig").values,
    "neurons": lambda model: td.attribute(model, PROMPT, method="eap", neurons=True).values,
    **{
        f"component {method}": lambda model, method=method: (
            td.attribute(model, TASK, graph="component", method=method).values
        )
        for method in ("eap", "eap-ig", "eap-qk", "relp", "flow")
    },
    "curve": lambda model: {"curve": td.density(model, PROMPT, ablation="mean").faithfulness},
    "curve of a task": lambda model: {
        "curve": td.density(model, TASK, graph="component", method="eap", baselines=False).faithfulness
    },
    "activations": lambda model: {"z": td.capture(model, PROMPT).z},
    "top tokens": lambda model: {
        kind: tokens.float() for kind, tokens in td.top_tokens(model, circuit_of(model)).tokens.items()
    },
}
ON_TOKENS = ("flow", "eap-ig", "neurons", "curve", "activations", "top tokens")


def work_on(name):
    return [each for each in WORK if name != "gpt-j" or each not in ON_TOKENS]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for kind, value in expected.items():
        torch.testing.assert_close(found[kind].to("cpu"), value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


def layers_apart(hf_model):
    """The first layers on one device, the others on the next two, and the unembedding where its weights are."""
    inner = "model" if hasattr(hf_model, "model") else "transformer"
    body = getattr(hf_model, inner)
    layers = "layers" if hasattr(body, "layers") else "h"
    tied = hf_model.config.tie_word_embeddings
    device_map = {inner: "xpu:0", "lm_head": "xpu:0" if tied else "xpu:2"}
    device_map |= {f"{inner}.{layers}.{layer}": f"xpu:{min(layer, 2)}" for layer in range(len(getattr(body, layers)))}
    last = next(name for name in ("norm", "ln_f") if hasattr(body, name))
    return {**device_map, f"{inner}.{last}": "xpu:2"}


# -- several devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "gpt-j", "gpt2"])
def test_layers_on_several_devices(name):
    """Devices are made up; as real ones do, they refuse what is on two at a time."""
    model, hf_model = bridged(name), hugging_face(name)
    expected = {each: WORK[each](model) for each in work_on(name)}
    device_map = layers_apart(hf_model)
    with spread(hf_model, device_map) as devices:
        wanted = Wanted(None, torch.float32, ("bridge",), device_map)
        apart = bridge_of(hf_model, name, wanted, None)
        apart.cfg.model_name = name
        assert len({parameter.device for parameter in apart.parameters()}) == 3
        assert as_transformer(apart).device == torch.device("xpu:0")
        assert as_transformer(apart).fingerprint() == as_transformer(model).fingerprint()
        for each, values in expected.items():
            before = devices.moves
            found = WORK[each](apart)
            assert devices.moves > before
            assert_same(found, values)


def test_devices_that_are_made_up_refuse_what_real_ones_do(monkeypatch):
    hf_model = hugging_face("llama3")
    device_map = layers_apart(hf_model)
    monkeypatch.setattr("tracedensity.model.transformer.Transformer._at_home", lambda self, visit: visit)
    with spread(hf_model, device_map):
        apart = bridge_of(hf_model, "llama3", Wanted(None, torch.float32, ("bridge",), device_map), None)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            td.attribute(apart, TASK, graph="component", method="eap")


# -- activations in main memory ----------------------------------------------------------------------------


def test_a_tensor_goes_to_main_memory_and_comes_back():
    with Devices() as devices:
        there = at(torch.arange(6.0).view(2, 3).T, torch.device("xpu:1"))
        back = away(there)
        assert devices.moves == 1 and callable(back)
        assert back().device == torch.device("xpu:1") and devices.moves == 2
        assert torch.equal(back(), there)
    here = torch.ones(3)
    assert away(here) is here


@pytest.mark.parametrize("each", ["eap-ig", "neurons", "component eap-ig", "component relp"])
def test_whatever_is_kept_may_be_elsewhere(each, monkeypatch):
    """Everything but weights that autograd saves is really given up, and results are the same to the last digit."""
    model = bridged("llama3")
    expected, brought = WORK[each](model), []
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def put_away(value):
        assert value.untyped_storage().data_ptr() not in weights
        kept = value.detach().numpy().copy()

        def back():
            brought.append(kept.nbytes)
            return torch.tensor(kept)

        return back

    monkeypatch.setattr("tracedensity.model.offload.away", put_away)
    with td.offload_activations():
        found = WORK[each](model)
        assert len(brought) > 10 * model.cfg.n_layers
        with td.offload_activations(False):
            n_brought = len(brought)
            WORK[each](model)
    WORK[each](model)
    assert len(brought) == n_brought  # where it is not wanted, nothing goes away
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[kind], expected[kind]) for kind in found)


# -- disk ---------------------------------------------------------------------------------------------------


on_disk = pytest.mark.skipif(version("transformer-lens").startswith("3."), reason="TransformerLens 3 refuses it")


@on_disk
@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_weights_on_disk(name, tmp_path):
    hugging_face(name).save_pretrained(tmp_path, max_shard_size="20KB")
    whole = td.load_model(tmp_path, backend="bridge")
    model = td.load_model(tmp_path, device_map={"": "disk"})
    names = [each for each, parameter in model.named_parameters() if parameter.is_meta]
    assert len(names) > 10
    assert as_transformer(model).device == torch.device("cpu")
    assert as_transformer(model).fingerprint() == as_transformer(whole).fingerprint()
    for each in work_on(name):
        assert_same(WORK[each](model), WORK[each](whole))
    assert [each for each, parameter in model.named_parameters() if parameter.is_meta] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@on_disk
def test_experts_are_written_to_disk_in_another_form_and_go_with_their_model(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))  # tests beside this one write there as well
    hugging_face("mixtral").save_pretrained(folder)
    whole = td.load_model(folder, backend="bridge")
    model = td.load_model(folder, device_map={"": "disk"})
    assert_same(WORK["eap-ig"](model), WORK["eap-ig"](whole))
    assert as_transformer(model).fingerprint() == as_transformer(whole).fingerprint()
    assert [*elsewhere.iterdir()]
    del model
    gc.collect()
    assert not [*elsewhere.iterdir()]


@pytest.mark.skipif(not version("transformer-lens").startswith("3."), reason="TransformerLens 4 runs it")
def test_what_the_installed_transformer_lens_cannot_run_is_one_sentence(tmp_path):
    hugging_face("llama3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`device_map` must be one that the installed .* \{'': 'disk'\}: ") as error:
        td.load_model(tmp_path, device_map={"": "disk"})
    assert "\n" not in str(error.value)


# -- many files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["bridge", *(["hooked"] if HAS_HOOKED else [])])
def test_weights_in_many_files(backend, tmp_path):
    hf_model = hugging_face("llama3")
    hf_model.save_pretrained(tmp_path / "one")
    hf_model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len([*(tmp_path / "many").glob("*.safetensors")]) > 3
    one, many = (td.load_model(tmp_path / name, backend=backend) for name in ("one", "many"))
    assert as_transformer(one).fingerprint() == as_transformer(many).fingerprint()
    assert_same(WORK["flow"](many), WORK["flow"](one))


def test_a_missing_file_is_one_sentence(tmp_path):
    hugging_face("llama3").save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[2].unlink()
    with pytest.raises(ValueError, match="whose weights do not load: ") as error:
        td.load_model(tmp_path)
    assert "\n" not in str(error.value)


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "everywhere"}, "`device_map` must be one of 'auto', 'balanced'"),
        ({"device_map": "auto", "device": "cpu"}, "`device` must be left out beside `device_map`"),
        ({"device_map": "auto", "backend": "hooked"}, "`backend` must be left out beside `device_map`"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        td.load_model("books-gpt2", **options)


def test_a_map_of_one_device_is_that_device(tmp_path):
    model = td.load_model("books-gpt2", device_map={"": "cpu"})
    assert type(model).__name__ == "TransformerBridge"
    with pytest.raises(ValueError, match="`device_map` must be left out for a model that is loaded already"):
        td.load_model(model, device_map="auto")


def test_weights_that_come_from_nowhere_are_one_sentence():
    model = bridged("llama3")
    model.blocks[1].attn.o.original_component.to("meta")
    with pytest.raises(ValueError, match=r"`model` must have weights, got .* on the meta device and come from nowhere"):
        td.attribute(model, PROMPT)

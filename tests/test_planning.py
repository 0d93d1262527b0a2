"""Plans: what they say is what is measured, on models and on configurations of models that nobody could run here."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import STORIES, random_model
from families import BY_HAND, FAMILIES, UNKNOWN, bridged, hooked, hugging_face

import tracedensity as td
from benchmarks.lens import HAS_HOOKED
from benchmarks.memory import JOBS, WITH_GRADIENTS, Rows
from tracedensity.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["TransformerBridge", *(["HookedTransformer"] if HAS_HOOKED else [])])
def model(request):
    loaded = td.load_model("books-gpt2", backend="bridge" if request.param == "TransformerBridge" else "hooked")
    td.check_model(loaded)  # once, so that it is not counted
    return loaded


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("books-gpt2", []),
        ("books-gpt2", ["--offload", "--backend", "bridge"]),
        ("books-gpt2", ["--dtype", "bfloat16", "--backend", "hooked" if HAS_HOOKED else "bridge"]),
        pytest.param(str(STORIES), [], marks=pytest.mark.slow),
    ],
)
def test_memory_and_work_are_as_measured(name, options):
    """In a process of its own: checks of annotations keep arguments alive."""
    run = [sys.executable, "-m", "benchmarks.memory", "--json", *options, "--tokens", "64", name]
    found = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    n_jobs = len(WITH_GRADIENTS) if "--offload" in options else len(JOBS) + 2
    assert len(rows) == (2 if HAS_HOOKED and not options else 1) * n_jobs
    for row in (row for row in rows if "eap-qk" not in row["job"]):  # attention alone is run again, at a guess
        assert row["memory"]["planned"] == pytest.approx(row["memory"]["measured"], rel=0.2), row
        passes = row.get("passes", {"planned": 0, "measured": 0})
        assert passes["planned"] == passes["measured"], row


def test_a_task_needs_as_many_passes_as_it_has_examples(model):
    prompt = list(range(3, 15))
    task = td.Task(clean=[prompt] * 3, corrupted=[[5, *prompt[1:]]] * 3)
    with Rows(model) as rows:
        td.attribute(model, task, graph="component", method="eap-ig")
    plan = td.plan(model, 12, graph="component", method="eap-ig", ablation="counterfactual", n_examples=3)
    assert plan.forward_passes == rows.tokens / 12


def test_what_is_offloaded_is_not_on_the_device(model):
    job = {"graph": "component", "method": "eap", "ablation": "mean"}
    usual = td.plan(model, 64, **job)
    with td.offload_activations():
        plan = td.plan(model, 64, **job)
    assert usual.offloaded == 0 and plan.offloaded > 0.9 * usual.activations
    assert plan.memory < usual.memory and plan.weights == usual.weights and plan.ranks == usual.ranks
    assert "in main memory" in repr(plan) and "in main memory" not in repr(usual)
    assert td.plan(model, 64, **job) == usual


@pytest.mark.parametrize("n_ctx", [1, 2, 8])
def test_a_short_context_is_no_obstacle(n_ctx):
    small = random_model(act_fn="gelu_new", normalization_type="LN", n_ctx=n_ctx)
    assert td.plan(small, n_ctx, method="eap").activations > 0


def test_an_architecture_that_is_no_decoder_is_one_sentence():
    from transformers import T5Config

    with pytest.raises(
        ValueError, match="must have an architecture that TransformerLens can convert, got 't5'"
    ) as error:
        td.plan(T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2), 5, method="eap")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_of_every_family_is_planned(name):
    config = copy.deepcopy(hugging_face(name).config)
    plan = td.plan(config, 30, graph="component", method="eap", ablation="counterfactual")
    by_loading = HAS_HOOKED and name not in UNKNOWN and name not in BY_HAND
    model = hooked(name) if by_loading else bridged(name)
    whole = td.plan(model, 30, graph="component", method="eap", ablation="counterfactual")
    assert (plan.n_edges, plan.forward_passes) == (whole.n_edges, whole.forward_passes)
    assert plan.weights == pytest.approx(whole.weights, rel=0.1)
    assert plan.activations == pytest.approx(whole.activations, rel=0.3)


def test_experts_are_no_wider_in_half_precision():
    """What gradients need of a product is its narrow weight, of an expert as of any other."""
    config = copy.deepcopy(hugging_face("mixtral").config)
    job = {"graph": "component", "method": "eap", "ablation": "counterfactual"}
    wide, narrow = (td.plan(config, 30, dtype=dtype, **job) for dtype in (torch.float32, torch.bfloat16))
    assert narrow.activations < 1.2 * wide.activations


def test_long_rotations_and_recurrent_models():
    from transformers import MambaConfig, Phi3Config

    factors = {"rope_type": "longrope", "short_factor": [1.0] * 24, "long_factor": [2.0] * 24}
    config = Phi3Config(
        vocab_size=64, hidden_size=192, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096, original_max_position_embeddings=256, pad_token_id=0,
        rope_parameters={**factors, "rope_theta": 10000.0},
    )  # fmt: skip
    assert td.plan(config, 100, graph="component", method="eap").activations > 0
    with pytest.raises(ValueError, match="must have an architecture that TransformerLens can convert, got 'mamba'"):
        td.plan(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2), 100)


@pytest.mark.parametrize("thing", [{"n_layers": 2}, 3, torch.nn.Linear(2, 2)])
def test_something_else_is_refused(thing):
    with pytest.raises(ValueError, match="`model_or_config` must be a model of TransformerLens, a configuration of"):
        td.plan(thing, 9)


def test_an_architecture_that_cannot_be_split_is_refused_by_name():
    from transformers import FalconConfig

    config = FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"got 'falcon': TransformerLens cannot split .* Falcon's new decoder"):
        td.plan(config, 5, method="eap")


def test_weights_are_those_of_the_model(model):
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    assert td.plan(model, 8).weights == sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


# -- configurations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2", "gpt-j", "falcon-rw", "qwen2-moe"])
def test_a_configuration_says_what_its_model_does(name, tmp_path):
    job = {"graph": "component", "method": "eap", "ablation": "mean"}
    hugging_face(name).save_pretrained(tmp_path)
    of_model, of_config = td.plan(td.load_model(tmp_path), 40, **job), td.plan(tmp_path, 40, **job)
    assert of_config.n_edges == of_model.n_edges
    assert of_config.activations == pytest.approx(of_model.activations, rel=0.1)
    assert of_config.workspace == pytest.approx(of_model.workspace, rel=0.1)
    assert of_config.weights == pytest.approx(of_model.weights, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_layers", [2, 5])
def test_a_wide_configuration_is_rehearsed_in_a_narrow_copy(n_layers, dtype, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, vocab_size=300,
        num_hidden_layers=n_layers, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = td.load_model(tmp_path, dtype=dtype)
    for job in ({"method": "eap"}, {"graph": "component", "method": "eap", "ablation": "mean"}, {"method": "flow"}):
        of_model, of_config = td.plan(model, 96, **job), td.plan(tmp_path, 96, dtype=dtype, **job)
        assert of_config.n_edges == of_model.n_edges and of_config.forward_passes == of_model.forward_passes
        assert of_config.weights == pytest.approx(of_model.weights, rel=0.001)
        assert of_config.activations == pytest.approx(of_model.activations, rel=0.05)
        assert of_config.workspace == pytest.approx(of_model.workspace, rel=0.05)


def test_a_model_of_seventy_billion_weights_is_planned_here():
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    plan = td.plan(config, 100, graph="component", method="eap", ablation="counterfactual", dtype=torch.bfloat16)
    readers, n_edges = 64 + 8 + 8, 0
    for layer in range(80):  # by hand: what each layer's readers read
        n_edges += (1 + 65 * layer) * readers + (1 + 65 * layer + 64)
    assert plan.n_edges == n_edges + 1 + 65 * 80
    attention = 8192 * 128 * (2 * 64 + 2 * 8)
    weights = 80 * (attention + 3 * 8192 * 28672 + 2 * 8192) + 2 * 128256 * 8192 + 8192
    assert plan.weights == pytest.approx(2 * weights, rel=0.02)
    assert plan.forward_passes == 5
    assert plan.memory == plan.weights + plan.activations + plan.ranks + plan.workspace


# -- what is shown, and what is refused -----------------------------------------------------------------


def test_it_is_read_at_a_glance(tmp_path, capsys):
    plan = td.plan("books-gpt2", 30, n_circuits=20)
    text = repr(plan)
    assert text.startswith("Plan(books-gpt2, token graph, norm, 30 tokens, 20 circuits)\n")
    assert "13.6 MB" in text if HAS_HOOKED else "MB" in text
    assert "<th>how much</th>" in plan._repr_html_()
    assert main(["plan", "books-gpt2", "--tokens", "30", "--circuits", "20"]) == 0
    assert capsys.readouterr().out == f"{text}\n"
    assert main(["plan", "books-gpt2", "--tokens", "30", "--circuits", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_edges"] == plan.n_edges and found["memory"] == plan.memory
    eap = ["plan", "books-gpt2", "--tokens", "30", "--method", "eap", "--json"]
    assert main(["--offload", *eap]) == 0
    assert json.loads(capsys.readouterr().out)["offloaded"] > 0
    assert main(eap) == 0
    assert json.loads(capsys.readouterr().out)["offloaded"] == 0  # the option is over with its command
    assert main(["plan", "books-gpt2", "--tokens", "30", "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] < 0.6 * plan.weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": 0}, "`n_tokens` must be a whole number of at least 1, got 0."),
        ({"n_tokens": -3}, "`n_tokens` must be a whole number of at least 1, got -3."),
        ({"n_tokens": 5000}, "`n_tokens` must fit the context of books-gpt2, 256 tokens, got 5000."),
        ({"n_circuits": -1}, "`n_circuits` must be a whole number of at least 0, got -1."),
        ({"graph": "tree"}, "`graph` must be one of"),
        ({"method": "guess"}, "`method` must be one of"),
        ({"ablation": "counterfactual"}, "`ablation` must be one of"),
        ({"positions": True}, "`positions` must be left out on the token graph"),
        ({"n_examples": 4}, "`n_examples` must be left out on the token graph"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message.replace("`", ".").replace(".", r".")) as error:
        td.plan("books-gpt2", **{"n_tokens": 10, **options})
    assert "\n" not in str(error.value)


def test_a_model_has_a_precision_of_its_own(model):
    with pytest.raises(ValueError, match="`dtype` must be left out for a model"):
        td.plan(model, 10, dtype=torch.bfloat16)


def test_planning_leaves_a_model_as_it_was(model):
    before = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    td.plan(model, 100, graph="component", method="relp")
    assert [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()] == before

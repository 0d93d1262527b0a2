"""Models from everywhere, with the logits of the original and one sentence where it cannot be."""

import json
import logging
import os
import shutil
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import STORIES, hooked_only
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)
from transformers import logging as hugging_face_logging

import tracedensity as td
from tracedensity.loading import ASSETS, bundled, bundled_models, converted, entry

TOKENIZER = ASSETS / "tokenizer"
CONFIGS = {
    # Folder names that TransformerLens would take for another architecture.
    "a-bert-and-llama": GPT2Config(
        vocab_size=4096, n_embd=24, n_layer=2, n_head=3, n_positions=40, initializer_range=0.2
    ),
    "gemma-like": LlamaConfig(
        vocab_size=4096,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.2,
    ),
}
TEXTS = ["Once", " Once  upon\n\n a time", "it's 12,345 — naïve 日本語 \t!", "tail ", ""]


@pytest.fixture(scope="session", params=CONFIGS)
def folder(request, tmp_path_factory):
    """A small random model in float16 and the shared tokenizer, laid out like a downloaded model."""
    path = tmp_path_factory.mktemp("models") / request.param
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[request.param])
        for name, parameter in model.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return save(model.half(), path)


def save(model, path):
    """The folder, with the model and the shared tokenizer in it."""
    hugging_face_logging.disable_progress_bar()
    model.save_pretrained(path)
    hugging_face_logging.enable_progress_bar()
    return shutil.copytree(TOKENIZER, path, dirs_exist_ok=True)


def in_cache(name, folder, cache, monkeypatch):
    """A copy of the folder where a model of that name would lie that the Hub was asked for."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return shutil.copytree(folder, repository / "snapshots" / "abc")


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the folder to do damage to."""
    return shutil.copytree(folder, tmp_path / "broken")


def original(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


# -- a folder ----------------------------------------------------------------------------------------


def test_a_folder_gives_the_logits_of_its_model(folder):
    model = td.load_model(folder, device="cpu")
    tokens = torch.randint(4096, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), original(folder)(tokens).logits, rtol=0, atol=1e-4)


def test_a_loaded_model_is_plain(folder):
    model = td.load_model(str(folder))
    assert model.cfg.model_name == folder.name
    assert model.cfg.dtype == next(model.parameters()).dtype == torch.float32
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert model.cfg.normalization_type in ("LN", "RMS")  # "LNPre" and "RMSPre" would be folded
    assert not any((model.cfg.use_attn_result, model.cfg.use_split_qkv_input, model.cfg.use_hook_mlp_in))


def test_no_weight_is_processed(folder):
    """Norm weights, value biases and means of the writing weights are those of the file."""
    model, hf = td.load_model(folder), original(folder)
    if "bert" in folder.name:
        block = hf.transformer.h[1]
        pairs = [
            (model.blocks[1].ln1.w, block.ln_1.weight),
            (model.blocks[1].mlp.W_out, block.mlp.c_proj.weight),
            (model.blocks[1].attn.b_V.flatten(), block.attn.c_attn.bias[48:]),
            (model.W_U, hf.lm_head.weight.T),
        ]
    else:
        block = hf.model.layers[1]
        pairs = [
            (model.blocks[1].ln2.w, block.post_attention_layernorm.weight),
            (model.blocks[1].mlp.W_out, block.mlp.down_proj.weight.T),
            (model.W_U, hf.lm_head.weight.T),
        ]
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("text", TEXTS)
def test_text_becomes_one_bos_and_the_tokens_of_its_tokenizer(folder, text):
    ids = td.load_model(folder).to_tokens(text)[0].tolist()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert ids == [0, *tokenizer(text).input_ids]
    assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_precision_on_request(folder, dtype):
    model = td.load_model(folder, device="cpu", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.cfg.dtype == dtype


def test_loading_says_nothing_and_changes_nothing(folder, capfd, caplog):
    before = (dict(os.environ), list(warnings.filters), logging.root.manager.disable, torch.get_rng_state())
    bars = hugging_face_logging.is_progress_bar_enabled()
    td.load_model(folder)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    after = (dict(os.environ), list(warnings.filters), logging.root.manager.disable, torch.get_rng_state())
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])
    assert hugging_face_logging.is_progress_bar_enabled() == bars


def test_a_folder_without_tokenizer_takes_token_ids(broken):
    for file in TOKENIZER.iterdir():
        (broken / file.name).unlink()
    model = td.load_model(broken)
    assert model.tokenizer is None
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 4096)


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert td.load_model(f"~/{folder.name}").cfg.model_name == folder.name


@pytest.mark.parametrize("folder", ["gemma-like"], indirect=True)  # learned positions are all kept
@pytest.mark.parametrize(
    ("backend", "n_ctx"), [pytest.param("hooked", converted.LONGEST_CONTEXT, marks=hooked_only), ("bridge", 131_072)]
)
def test_a_long_context_is_limited_where_positions_allow_it_and_memory_asks_for_it(broken, backend, n_ctx):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131_072}))
    assert td.load_model(broken, backend=backend).cfg.n_ctx == n_ctx


def cut_short(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def edit_weights(path, change):
    file = path / "model.safetensors"
    weights = load_file(file)
    change(weights, next(name for name in weights if "mlp" in name and "weight" in name))
    save_file(weights, file, metadata={"format": "pt"})


DAMAGE = {
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), "config.json is damaged"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), "config.json is damaged"),
    "config lacks a type": (lambda path: (path / "config.json").write_text("{}"), "config.json is damaged or lacks"),
    "unknown type": (
        lambda path: (path / "config.json").write_text('{"model_type": "nonsense"}'),
        "whose weights do not load",
    ),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "whose weights do not load"),
    "weights cut short": (cut_short, "whose weights do not load"),
    "a weight is missing": (
        lambda path: edit_weights(path, lambda weights, name: weights.pop(name)),
        "must hold all weights .* lacks 1, the first .*mlp",
    ),
    "a weight is NaN": (
        lambda path: edit_weights(path, lambda weights, name: weights[name].fill_(float("nan"))),
        "must have finite weights",
    ),
    "tokenizer is no JSON": (
        lambda path: (path / "tokenizer.json").write_text("{"),
        "must have a tokenizer that loads, or none",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_gets_one_sentence(damage, broken):
    change, words = DAMAGE[damage]
    change(broken)
    with pytest.raises(ValueError, match=words) as error:
        td.load_model(broken)
    assert str(broken) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_in_place_of_a_folder_is_refused(folder):
    with pytest.raises(ValueError, match="must be the folder of a model, got the file"):
        td.load_model(folder / "config.json")


@pytest.mark.parametrize("backend", [pytest.param("hooked", marks=hooked_only), "bridge"])
def test_a_conversion_that_loses_weights_is_refused(folder, backend, monkeypatch):
    """As TransformerLens would do with a bias that it does not know of."""
    name = {"hooked": "_converted", "bridge": "bridged"}[backend]
    convert = getattr(converted, name)

    def lossy(*arguments):
        model = convert(*arguments)
        with torch.no_grad():
            model.blocks[0].mlp.W_out.zero_()
        return model

    monkeypatch.setattr(converted, name, lossy)
    with pytest.raises(ValueError, match="whose logits come out different by"):
        td.load_model(folder, backend=backend)
    if backend == "hooked":
        assert type(td.load_model(folder)).__name__ == "TransformerBridge"  # which loses nothing


@hooked_only
@pytest.mark.parametrize("folder", ["a-bert-and-llama"], indirect=True)  # which is a GPT-2
def test_an_architecture_that_transformerlens_lacks_is_refused(broken):
    """GPT-2 with an MLP that is not four times as wide, for one."""
    config = json.loads((broken / "config.json").read_text())
    hugging_face_logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(GPT2Config(**{**config, "n_inner": 50})).save_pretrained(broken)
    hugging_face_logging.enable_progress_bar()
    with pytest.raises(ValueError, match=r"architecture that TransformerLens can convert, .* GPT2LMHeadModel"):
        td.load_model(broken, backend="hooked")
    assert type(td.load_model(broken)).__name__ == "TransformerBridge"


# -- real models -------------------------------------------------------------------------------------


def test_stories_gives_the_logits_of_its_authors_and_of_hugging_face(stories):
    hf = original(STORIES)
    with np.load(STORIES / "reference_logits.npz") as reference:
        for kind in ("story", "random"):
            tokens = torch.from_numpy(reference[f"{kind}_tokens"]).long()
            with torch.no_grad():
                logits = stories(tokens)
                torch.testing.assert_close(logits, hf(tokens).logits, rtol=0, atol=1e-4)
            torch.testing.assert_close(logits, torch.from_numpy(reference[f"{kind}_logits"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_stories_reads_text_as_its_tokenizer_does(stories, text):
    ids = stories.to_tokens(text)[0].tolist()
    assert ids == AutoTokenizer.from_pretrained(STORIES)(text).input_ids
    assert ids[0] == 1
    assert 1 not in ids[1:]


@pytest.mark.parametrize("name", bundled_models())
def test_a_bundled_model_gives_the_logits_of_its_original(name):
    model = td.load_model(name, device="cpu")
    assert model.cfg.model_name == name
    tokens = model.to_tokens("Once upon a time there was a little girl who lived by the wood. " * 10)
    assert tokens.shape[1] > 100
    ids = AutoTokenizer.from_pretrained(TOKENIZER)("Once upon a time").input_ids
    assert model.to_tokens("Once upon a time")[0].tolist() == [0, *ids]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), original(ASSETS / name)(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", bundled_models())
def test_what_is_left_of_the_difference_is_rounding(name):
    """Random tokens drive activations to where float32 alone costs 2e-4, in either library."""
    model = td.load_model(name, device="cpu", dtype=torch.float64)
    hf = AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float64).eval()
    tokens = torch.randint(4096, (2, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model(tokens) - hf(tokens).logits).abs().max()
    # Hugging Face keeps rotary angles in float32; without them the difference is 1e-13.
    assert difference < (1e-4 if "llama" in name else 1e-9)


def test_a_bundled_name_wins_over_a_folder_of_that_name(folder, tmp_path, monkeypatch):
    """`./name` is the folder."""
    for room in (bundled, entry):
        monkeypatch.setattr(room, "ASSETS", tmp_path / "assets")
    shutil.copytree(folder, tmp_path / "assets" / "books-gpt2")
    shutil.copytree(TOKENIZER, tmp_path / "assets" / "tokenizer")
    (tmp_path / "books-gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert list(bundled_models()) == ["books-gpt2"]
    assert td.load_model().cfg.model_name == "books-gpt2"
    with pytest.raises(ValueError, match=r"has no config\.json"):
        td.load_model("./books-gpt2")


# -- a name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "no-such-model", "no/such/folder", "/no/such/folder"])
def test_an_unknown_name_lists_what_is_accepted(name):
    with pytest.raises(ValueError, match=r"bundled model .* TransformerLens model name") as error:
        td.load_model(name)
    assert all(bundled in str(error.value) for bundled in bundled_models())
    assert "\n" not in str(error.value)


def test_a_slip_of_the_pen_is_pointed_out():
    with pytest.raises(ValueError, match=r"Did you mean .*'gpt2-small'"):
        td.load_model("gpt2-smal")


OTHERS = {
    "google-bert/bert-base-cased": (
        AutoModelForMaskedLM,
        BertConfig(vocab_size=4096, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12),
    ),
    "google-t5/t5-small": (
        AutoModelForSeq2SeqLM,
        T5Config(vocab_size=4096, d_model=12, d_kv=4, d_ff=12, num_layers=1, num_heads=2),
    ),
}


@pytest.mark.parametrize("repository", OTHERS)
def test_a_model_that_is_no_decoder_is_refused(repository, tmp_path, monkeypatch):
    """As it lies in the cache of the Hub, which some versions would else ask first."""
    kind, config = OTHERS[repository]
    name = repository.split("/")[1]
    made = save(kind.from_config(config), tmp_path / "made")
    for each in (name, repository):  # TransformerLens 3.9 has the one, 4 the other
        in_cache(each, made, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=f"must be a decoder that TransformerLens can load, got '{name}'"):
        td.load_model(name)


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "tiiuae/falcon-7b"])  # the other one is for bridges only
def test_an_unreachable_hub_is_an_error_within_seconds(name, no_cache, monkeypatch):
    """Even where nobody said that there is no network; the Hub's own client would try for 20 seconds."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    started = time.perf_counter()
    with pytest.raises(
        OSError, match=f"'{name}' is not in the Hugging Face cache and the Hub cannot be reached"
    ) as error:
        td.load_model(name)
    assert time.perf_counter() - started < 15
    assert "\n" not in str(error.value)
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("folder", ["a-bert-and-llama"], indirect=True)  # what lies in the cache is a GPT-2
def test_a_cached_model_loads_without_the_hub(folder, tmp_path, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    held = in_cache("gpt2", folder, tmp_path, monkeypatch)
    (held / "config.json").write_text(json.dumps({**config, "n_ctx": 40}))
    model = td.load_model("gpt2-small")
    assert model.cfg.model_name == "gpt2"
    assert not model.training
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), original(folder)(tokens).logits, rtol=0, atol=1e-4)


# -- an object ---------------------------------------------------------------------------------------


def test_a_hooked_transformer_comes_back_as_it_was(tiny_model):
    tiny_model.train()
    assert td.load_model(tiny_model) is tiny_model
    assert td.load_model(tiny_model, device="cpu", dtype=torch.float32) is tiny_model
    assert tiny_model.training
    tiny_model.eval()


def test_a_loaded_model_is_not_moved_behind_its_owners_back(tiny_gpt2):
    with pytest.raises(ValueError, match="`dtype` must be left out for a model that is loaded already"):
        td.load_model(tiny_gpt2, dtype=torch.float64)
    with pytest.raises(ValueError, match="`device` must be left out for a model that is loaded already"):
        td.load_model(tiny_gpt2, device="meta")
    assert next(tiny_gpt2.parameters()).dtype == torch.float32


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(1, 1)])
def test_another_object_is_refused(thing):
    with pytest.raises(ValueError, match=f"a HookedTransformer or a TransformerBridge, got {type(thing).__name__}"):
        td.load_model(thing)


# -- device and precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(folder, device):
    with pytest.raises(ValueError, match=f"`device` must be one that this machine has, got '{device}'"):
        td.load_model(folder, device=device)


def test_a_type_that_is_no_floating_point_is_refused(folder):
    with pytest.raises(ValueError, match=r"`dtype` must be one of torch.float32, .* got torch.int64"):
        td.load_model(folder, dtype=torch.int64)


def test_without_a_gpu_the_device_is_the_cpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert next(td.load_model(folder).parameters()).device.type == "cpu"

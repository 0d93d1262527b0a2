"""What every test shares: checked shapes, no network, two tiny models and one real one."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models are tiny: a second thread costs more than it saves, above all where tests run on every core. Set for the
# programs and notebooks that tests start as well, hence before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

from jaxtyping import install_import_hook

# Before anything imports the packages: every call in every test run checks its shapes and types.
install_import_hook(["tracedensity", "training"], "checking.checked")

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import pytest
import torch

from benchmarks.lens import HAS_HOOKED, HookedTransformer, HookedTransformerConfig, parameters_of

torch.set_num_threads(1)

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
SHAPE = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_head": 4, "d_mlp": 24, "n_ctx": 32, "d_vocab": 20}

hooked_only = pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")


def random_model(**options: object) -> HookedTransformer:
    """A seeded model whose biases and norm weights are random too: zeros and ones would hide mistakes."""
    config = HookedTransformerConfig(**{**SHAPE, "init_weights": False, "device": "cpu", **options})
    model = HookedTransformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            if name.split(".")[-2].startswith("ln") and name.endswith("w"):
                parameter.add_(1)
    return model.eval()


def embedded(model: HookedTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """What enters the first block."""
    weights = parameters_of(model)
    stream = weights["embed.W_E"][tokens]
    return stream + weights["pos_embed.W_pos"][: tokens.shape[1]] if "pos_embed.W_pos" in weights else stream


def n_hooks(model: HookedTransformer) -> int:
    """Hooks at all hook points, of which a bridge has some under two names."""
    points = set(model.hook_dict.values())
    return sum(len(point._forward_hooks) + len(point._backward_hooks) for point in points)


@pytest.fixture(scope="session")
def tiny_gpt2() -> HookedTransformer:
    """LayerNorm, learned positions, biases everywhere; no tokenizer."""
    return random_model(model_name="tiny-gpt2", act_fn="gelu_new", normalization_type="LN")


@pytest.fixture(scope="session")
def tiny_llama() -> HookedTransformer:
    """RMSNorm, rotary positions, gated MLP, four heads that share two key/value heads; no tokenizer."""
    return random_model(
        model_name="tiny-llama",
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        positional_embedding_type="rotary",
        rotary_dim=4,
        n_key_value_heads=2,
    )


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def tiny_model(request: pytest.FixtureRequest) -> HookedTransformer:
    """Each of the two tiny models in turn."""
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each of two of the models of `component_cases` in turn, by name."""
    return request.param


@pytest.fixture(scope="session")
def stories() -> HookedTransformer:
    """A real Llama of 260,000 parameters, where it lies beside the checkout."""
    if not STORIES.is_dir():
        pytest.skip("the stories260K model is not beside the checkout")
    import tracedensity as td

    return td.load_model(STORIES, device="cpu")


@pytest.fixture(scope="module")
def unexamined() -> Iterator[None]:
    """For models by the hundred, each compared with an oracle: the check at first use would take most of the time."""
    from tracedensity.model import entry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "examined", lambda model: SimpleNamespace(require=lambda: None))
        yield


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run the library: the checks of the annotations would refuse an unknown choice before we do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def ctrl_c():
    """Ctrl-C as at a terminal: jobs in the background of a shell are started with it ignored."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)

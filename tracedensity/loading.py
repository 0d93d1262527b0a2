"""Models to explain: the bundled ones, a folder on disk, any TransformerLens name, or the user's own object."""

import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812
    from torch import dtype as DType  # noqa: N812
    from transformer_lens import HookedTransformer
else:
    # torch and TransformerLens take seconds to import: here only once a model is loaded.
    Device = DType = HookedTransformer = Any

ASSETS = Path(__file__).parent / "assets"
LONGEST_CONTEXT = 4096

_BUNDLED = {
    "books-gpt2": "GPT-2 architecture (LayerNorm, learned positions, biases), trained on public-domain books",
    "books-llama": "Llama architecture (RMSNorm, rotary positions, gated MLP, grouped queries), same books",
}


def bundled_models() -> dict[str, str]:
    """Name of each model that comes with the package, with one line on what it is."""
    return {name: line for name, line in _BUNDLED.items() if (ASSETS / name / "config.json").is_file()}


def load_model(
    name_or_model: str | os.PathLike[str] | object = "books-gpt2",
    *,
    device: str | Device | None = None,
    dtype: DType | None = None,
) -> HookedTransformer:
    """A TransformerLens model with the weights as they were trained, ready to be explained.

    No weight processing is applied: neither folding of norms or value biases, nor centring of weights.
    The logits are those of the Hugging Face model, and so are the vectors that each head and neuron
    writes. It matters: a score such as the L1 norm of a contribution changes when the writing weights
    are centred, and the last norm's share in it when that norm's weight is folded into the
    unembedding. What a masked run predicts does not depend on folding the norms before a sublayer, as
    that leaves all written vectors alone. A model of your own is explained as it is, processed or not.

    A model from a folder that could read more is limited to prompts of `LONGEST_CONTEXT` tokens.
    Text becomes tokens as the model's Hugging Face tokenizer makes them, after one beginning-of-sequence
    token, which comes first by TransformerLens' convention even where that tokenizer would not add it.

    Args:
        name_or_model: The name of a bundled model (see `bundled_models`); or the path of a folder in
            Hugging Face layout (write ``./books-gpt2`` for a folder named like a bundled model); or a
            TransformerLens model name such as ``"gpt2"``, downloaded unless it is cached; or a
            `HookedTransformer`, which comes back untouched.
        device: Where to put the model. By default the GPU that CUDA shows, else the CPU. Apple's ``"mps"`` is
            taken only when asked for: its results differ too much to verify a circuit found elsewhere.
        dtype: Floating-point type of the weights, by default float32.

    Returns:
        The model in eval mode; `cfg.model_name` is the bundled name, the folder's, or TransformerLens' own.

    Raises:
        ValueError: If there is no such model, its files are damaged, TransformerLens does not know the
            architecture or gives other logits, or `device` or `dtype` is not to be had.
        OSError: If a model must be downloaded and the Hugging Face Hub cannot be reached.
    """
    if not isinstance(name_or_model, str | os.PathLike):
        return _untouched(name_or_model, device, dtype)
    device, dtype = _device(device), _dtype(dtype)
    name = os.fspath(name_or_model)
    if name in bundled_models():
        return _from_folder(ASSETS / name, name, device, dtype, tokenizer_folder=ASSETS / "tokenizer")
    if name and (path := Path(name).expanduser()).exists():
        return _from_folder(path, path.resolve().name, device, dtype, tokenizer_folder=path)
    return _from_transformer_lens(name, device, dtype)


def _untouched(model: object, device: str | Device | None, dtype: DType | None) -> HookedTransformer:
    # By name, so that no import of seconds is needed to refuse an object; subclasses count.
    if not any(cls.__name__ == "HookedTransformer" for cls in type(model).__mro__):
        raise ValueError(
            f"`name_or_model` must be a name, a folder or a HookedTransformer, got {type(model).__name__}."
        )
    hooked: Any = model
    at = next(hooked.parameters())
    # Moving it would change the caller's own object.
    if device is not None and _device(device) not in (at.device, _device(at.device.type)):
        raise ValueError(
            f"`device` must be left out for a model that is loaded already, got {device} for one on {at.device}. "
            "Move it with `model.to(...)` first."
        )
    if dtype is not None and dtype != at.dtype:
        raise ValueError(
            f"`dtype` must be left out for a model that is loaded already, got {dtype} for one in {at.dtype}. "
            "Convert it with `model.to(...)` first."
        )
    return hooked


# -- device and precision ------------------------------------------------------------------------


def _device(device: str | Device | None) -> Device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    # Torch raises what it likes here, an AssertionError where it is built without CUDA.
    except Exception as error:
        raise ValueError(f"`device` must be one that this machine has, got {str(device)!r}. Try 'cpu'.") from error
    return chosen


def _dtype(dtype: DType | None) -> DType:
    import torch

    if dtype is None:
        return torch.float32
    accepted = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if dtype not in accepted:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, accepted))}, got {dtype!r}.")
    return dtype


# -- a folder ------------------------------------------------------------------------------------


def _from_folder(folder: Path, name: str, device: Device, dtype: DType, *, tokenizer_folder: Path) -> HookedTransformer:
    config = _config(folder)
    with _quiet():
        hf_model = _hugging_face_model(folder, dtype)
        # The class that really loaded says more than what the file claims, or leaves out.
        config["architectures"] = [type(hf_model).__name__]
        # An old name that TransformerLens asks GPT-2 for, and that newer files do not have.
        config.setdefault("n_ctx", config.get("n_positions"))
        try:
            model = _converted(hf_model, config, name, device, dtype)
        except Exception as error:
            raise ValueError(
                f"`name_or_model` must have an architecture that TransformerLens can convert, got {folder} with "
                f"{type(hf_model).__name__}: {_first_line(error)}"
            ) from error
        _compare(model, hf_model, folder)
        if (tokenizer := _tokenizer(tokenizer_folder)) is not None:
            model.set_tokenizer(tokenizer)
            model.cfg.tokenizer_name = str(tokenizer_folder)
    return model


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(f"`name_or_model` must be the folder of a model, got the file {folder}. Give {folder.parent}.")
    if not file.is_file():
        raise ValueError(
            f"`name_or_model` must be a folder in Hugging Face layout, got {folder}, which has no config.json."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`name_or_model` must be a folder in Hugging Face layout, got {folder}, whose config.json is damaged "
            "or lacks `model_type`."
        ) from error
    return config


def _hugging_face_model(folder: Path, dtype: DType) -> Any:
    from transformers import AutoModelForCausalLM

    # TransformerLens picks the class of a model by words in its path: "bert" in a folder's name would
    # load BertForPreTraining. Its own loading is therefore not used.
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise ValueError(
            f"`name_or_model` must be a folder with a causal language model, got {folder}, whose weights do not "
            f"load: {_first_line(error)}"
        ) from error
    hf_model, info = loaded
    # Hugging Face fills what a file lacks with random numbers.
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"`name_or_model` must hold all weights of its model, got {folder}, which lacks {len(missing)}, "
            f"the first {missing[0]}."
        )
    return hf_model.eval()


def _converted(hf_model: Any, config: dict[str, Any], name: str, device: Device, dtype: DType) -> HookedTransformer:
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict

    # TransformerLens reads a model's architecture from its path where that holds "llama" or "gemma", so it
    # gets the configuration alone, in a folder of a neutral name.
    with tempfile.TemporaryDirectory(prefix="model-") as neutral:
        (Path(neutral) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        cfg = get_pretrained_model_config(neutral, hf_cfg=config, device=str(device), dtype=dtype)
        state = get_pretrained_state_dict(neutral, cfg, hf_model, dtype=dtype)
    # Each layer keeps a mask of context by context: 17 GB where a model may read 131,072 tokens.
    if cfg.positional_embedding_type == "rotary":
        cfg.n_ctx = min(cfg.n_ctx, LONGEST_CONTEXT)
    cfg.model_name = name
    cfg.tokenizer_name = None  # else it is looked for in the neutral folder
    model = HookedTransformer(cfg, move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.to(str(device), print_details=False)
    return model.eval()


def _compare(model: HookedTransformer, hf_model: Any, folder: Path) -> None:
    """Raise a ValueError where the logits of the converted model are not those of the original.

    Conversion can leave something out in silence: a bias that the architecture seldom has, a way to
    scale positions. Half-precision models are not compared: rounding hides what would be looked for.
    """
    import torch

    if model.cfg.dtype not in (torch.float32, torch.float64):
        return
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (1, min(64, model.cfg.n_ctx)), generator=generator)
    with torch.no_grad():
        expected = hf_model(tokens).logits
        logits = model(tokens.to(model.cfg.device)).cpu()
    if not expected.isfinite().all():
        raise ValueError(f"`name_or_model` must have finite weights, got {folder}, whose logits are NaN or infinite.")
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
    # Far above rounding (1e-5, or 1e-3 with a GPU's TF32), far below what a lost weight does.
    if not difference < 1e-2:
        raise ValueError(
            f"`name_or_model` must have an architecture that TransformerLens can convert, got {folder} with "
            f"{type(hf_model).__name__}, whose logits come out different by {difference:.0%} of the largest."
        )


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; None where there is none: token ids still work as prompts."""
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / file).is_file() for file in files):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"`name_or_model` must have a tokenizer that loads, or none, got {folder}: {_first_line(error)}"
        ) from error


# -- a name --------------------------------------------------------------------------------------


def _from_transformer_lens(name: str, device: Device, dtype: DType) -> HookedTransformer:
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import make_model_alias_map

    known = make_model_alias_map()
    if name.lower() not in known:
        near = get_close_matches(name.lower(), [*bundled_models(), *known], n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"`name_or_model` must be a bundled model ({_listing()}), a folder in Hugging Face layout, "
            f"a TransformerLens model name or a HookedTransformer, got {name!r}.{hint}"
        )
    official = known[name.lower()]
    reachable = _hub_has(official)
    with _quiet(bars=True), _offline(not reachable):  # a download may take minutes
        try:
            model = HookedTransformer.from_pretrained_no_processing(name, device=str(device), dtype=dtype)
        except OSError as error:
            if reachable:  # a gated model, a missing file, a full disk
                raise OSError(f"The model {name!r} could not be loaded: {_first_line(error)}") from error
            raise OSError(
                f"The model {name!r} is not in the Hugging Face cache and the Hub cannot be reached: connect, give "
                f"the folder of a model, or take a bundled one ({_listing()})."
            ) from error
        except Exception as error:  # encoders and the like, which TransformerLens lists but loads elsewhere
            raise ValueError(
                f"`name_or_model` must be a decoder that TransformerLens can load, got {name!r}: {_first_line(error)}"
            ) from error
    return model.eval()


def _hub_has(repository: str) -> bool:
    """Whether the Hugging Face Hub answers: one short question, where its own client would retry for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repository, "config.json"), timeout=5)
    except HfHubHTTPError:  # it answers, if only to say no: the download will say why
        return True
    except Exception:
        return False
    return True


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """While open, the Hub's client looks into its cache only, and fails at once."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# -- words and noise -----------------------------------------------------------------------------


def _listing() -> str:
    return ", ".join(bundled_models()) or "none in this installation"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def _quiet(*, bars: bool = False) -> Iterator[None]:
    """While open, nothing that loading a model says is shown: prints, warnings, logs, and bars unless wanted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm's, on its first import into a notebook without widgets
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
        from transformers.utils import logging as hugging_face_logging

    shown, hub_hidden = hugging_face_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    level = logging.root.manager.disable
    if not bars:
        hugging_face_logging.disable_progress_bar()  # the Hub's as well
    logging.disable(max(level, logging.WARNING))
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if not bars and shown:
            hugging_face_logging.enable_progress_bar()
            if hub_hidden:
                disable_progress_bars()

"""Models in a folder on disk, in Hugging Face layout."""

import json
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tracedensity.loading.converted import built, plain
from tracedensity.loading.quiet import first_line, quiet
from tracedensity.loading.wanted import Wanted


def from_folder(folder: Path, name: str, wanted: Wanted, *, tokenizer_folder: Path) -> Any:
    config = read_config(folder)
    with quiet():
        hf_model = _hugging_face_model(folder, wanted)
        # The class that really loaded says more than what the file claims, or leaves out.
        config = plain(config, hf_model)
        tokenizer = _tokenizer(tokenizer_folder)
        compare = _comparison(hf_model, folder)
        for backend in wanted.backends:
            try:
                model = built(backend, hf_model, config, name, wanted, tokenizer)
                compare(model)
            except Exception as error:
                if backend != wanted.backends[-1]:
                    continue
                if isinstance(error, _LogitsError):
                    raise
                if wanted.device_map is not None:
                    raise ValueError(
                        "`device_map` must be one that the installed TransformerLens can run, got "
                        f"{wanted.device_map}: {first_line(error)}"
                    ) from error
                raise ValueError(
                    f"`name_or_model` must have an architecture that TransformerLens can convert, got {folder} with "
                    f"{type(hf_model).__name__}: {first_line(error)}"
                ) from error
            if tokenizer is not None:
                model.cfg.tokenizer_name = str(tokenizer_folder)
            return model
    raise AssertionError("no class to try")


class _LogitsError(ValueError):
    """A model that was converted predicts something else."""


def read_config(folder: Path) -> dict[str, Any]:
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


def _hugging_face_model(folder: Path, wanted: Wanted) -> Any:
    from transformers import AutoModelForCausalLM

    # TransformerLens picks the class of a model by words in its path: "bert" in a folder's name would
    # load BertForPreTraining. Its own loading is therefore not used.
    # the fast kernels of experts know no float64
    options: Any = {"experts_implementation": "eager"} if str(wanted.dtype) == "torch.float64" else {}
    offloaded = None
    if wanted.device_map is not None:
        offloaded = tempfile.TemporaryDirectory(prefix="weights-")  # of weights that are on disk in another form
        options |= {"device_map": wanted.device_map, "offload_folder": offloaded.name}
    options |= {"attn_implementation": "eager", "local_files_only": True, "trust_remote_code": False}  # or no patterns
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted.dtype, output_loading_info=True, **options
        )
    except Exception as error:
        raise ValueError(
            f"`name_or_model` must be a folder with a causal language model, got {folder}, whose weights do not "
            f"load: {first_line(error)}"
        ) from error
    hf_model, info = loaded
    # Hugging Face fills what a file lacks with random numbers.
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"`name_or_model` must hold all weights of its model, got {folder}, which lacks {len(missing)}, "
            f"the first {missing[0]}."
        )
    if offloaded is not None:
        weakref.finalize(hf_model, offloaded.cleanup)
    return hf_model.eval()


def _comparison(hf_model: Any, folder: Path) -> Callable[[Any], None]:
    """A function that raises a ValueError where the logits of a TransformerLens model are not those of the original.

    Conversion can leave something out in silence: a bias that the architecture seldom has, a way to
    scale positions. Half-precision models are not compared: rounding hides what would be looked for.
    """
    import torch

    from tracedensity.model.spread import home

    if hf_model.dtype not in (torch.float32, torch.float64):
        return lambda model: None
    generator = torch.Generator().manual_seed(0)
    config = hf_model.config.get_text_config()
    n_ctx = min(64, getattr(config, "max_position_embeddings", None) or 64)
    tokens = torch.randint(config.vocab_size, (1, n_ctx), generator=generator)
    with torch.no_grad():
        expected = hf_model(tokens.to(home(hf_model))).logits.cpu()  # before parts of it are wrapped

    def compare(model: Any) -> None:
        with torch.no_grad():
            logits = model(tokens.to(home(model))).cpu()
        if not expected.isfinite().all():
            raise _LogitsError(
                f"`name_or_model` must have finite weights, got {folder}, whose logits are NaN or infinite."
            )
        difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
        # Far above rounding (1e-5, or 1e-3 with a GPU's TF32), far below what a lost weight does.
        if not difference < 1e-2:
            raise _LogitsError(
                f"`name_or_model` must have an architecture that TransformerLens can convert, got {folder} with "
                f"{type(hf_model).__name__}, whose logits come out different by {difference:.0%} of the largest."
            )

    return compare


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
            f"`name_or_model` must have a tokenizer that loads, or none, got {folder}: {first_line(error)}"
        ) from error

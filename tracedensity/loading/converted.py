"""What TransformerLens makes of a model of Hugging Face."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tracedensity.choices import Backend
from tracedensity.loading.wanted import Wanted

LONGEST_CONTEXT = 4096


def plain(config: dict[str, Any], hf_model: Any) -> dict[str, Any]:
    """A configuration as TransformerLens reads it."""
    architectures = hf_model.config.architectures = [type(hf_model).__name__]
    # n_ctx is an old name that TransformerLens asks GPT-2 for, and that newer files do not have.
    return {"n_ctx": config.get("n_positions"), **config, "architectures": architectures}


def built(
    backend: Backend, hf_model: Any, config: dict[str, Any], name: str, wanted: Wanted, tokenizer: Any = None
) -> Any:
    """A model of TransformerLens that is made of one of Hugging Face."""
    if config.get("model_type") == "falcon" and config.get("new_decoder_architecture"):
        raise ValueError("TransformerLens cannot split the projections of Falcon's new decoder (40B, 180B).")
    if backend == "bridge":
        return bridged(hf_model, name, wanted, tokenizer)
    model = _converted(hf_model, config, name, wanted)
    if tokenizer is not None:
        model.set_tokenizer(tokenizer)
    return model


def require_runnable(cfg: Any) -> None:
    """Raise a ValueError where a `HookedTransformer` could be made, and could not be run."""
    if cfg.num_experts and str(cfg.dtype) != "torch.float32":
        raise ValueError(f"HookedTransformer has experts in float32 only, got {cfg.dtype}. Take a TransformerBridge.")


def _converted(hf_model: Any, config: dict[str, Any], name: str, wanted: Wanted) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    with configuration_alone(config, wanted) as (neutral, cfg):
        state = get_pretrained_state_dict(neutral, cfg, hf_model, dtype=wanted.dtype)
    cfg.model_name = name
    cfg.tokenizer_name = None  # else it is looked for in the neutral folder
    model = HookedTransformer(cfg, move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.to(str(wanted.device), print_details=False)
    return model.eval()


@contextmanager
def configuration_alone(config: dict[str, Any], wanted: Wanted) -> Iterator[tuple[str, Any]]:
    """A folder with the configuration alone, and what `HookedTransformer` makes of that.

    Its name is neutral: TransformerLens reads a model's architecture from a path that holds "llama" or "gemma".
    """
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    with tempfile.TemporaryDirectory(prefix="model-") as neutral:
        (Path(neutral) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        cfg = get_pretrained_model_config(neutral, hf_cfg=config, dtype=wanted.dtype, **wanted.placed)
        # Each layer keeps a mask of context by context: 17 GB where a model may read 131,072 tokens.
        if cfg.positional_embedding_type == "rotary":
            cfg.n_ctx = min(cfg.n_ctx, LONGEST_CONTEXT)
        require_runnable(cfg)
        yield neutral, cfg


def bridged(hf_model: Any, name: str, wanted: Wanted, tokenizer: Any) -> Any:
    """The same model, of which parts are wrapped."""
    from torch.random import fork_rng
    from transformer_lens.model_bridge import TransformerBridge

    if wanted.device is not None:
        hf_model = hf_model.to(wanted.device)
    options: Any = {"hf_model": hf_model, "dtype": wanted.dtype, **wanted.placed}
    with fork_rng(devices=[]), nullcontext(tokenizer) if tokenizer is not None else _stand_in() as words:
        # parts of it begin as random numbers
        model: Any = TransformerBridge.boot_transformers(name, tokenizer=words, **options)
    if tokenizer is None:
        model.tokenizer = None
    model.cfg.model_name = name
    return made_ready(model)


def made_ready(bridge: Any) -> Any:
    """A bridge as it is to be explained.

    Raises:
        ValueError: If it is no decoder that the graphs describe.
    """
    from tracedensity.model import adapter_of

    bridge.cfg.default_prepend_bos = True  # as `HookedTransformer` does for all of them
    adapter_of(bridge)
    return bridge.eval()


@contextmanager
def _stand_in() -> Iterator[Any]:
    """A tokenizer for models without one: a bridge is not built without, and looks it up by name, offline or not."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with tempfile.TemporaryDirectory() as folder:
        words.save_pretrained(folder)
        yield AutoTokenizer.from_pretrained(folder, bos_token="a", eos_token="a", pad_token="a")

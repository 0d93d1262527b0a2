"""Models that are not loaded: what is known of them from their configuration."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracedensity.choices import Backend
from tracedensity.loading.bundled import ASSETS, bundled_models
from tracedensity.loading.converted import built, configuration_alone, plain
from tracedensity.loading.folder import read_config
from tracedensity.loading.hub import hub_has, official_name, offline
from tracedensity.loading.quiet import first_line, quiet
from tracedensity.loading.wanted import Wanted, backends_of, device_of

if TYPE_CHECKING:
    from torch import dtype as DType  # noqa: N812
else:
    DType = Any


def configuration(model_or_config: object) -> Any:
    """Hugging Face's configuration of a model that is not loaded; None for an object that is no name and none of these.

    Raises:
        ValueError: If there is no such model.
        OSError: If it must be downloaded and the Hub cannot be reached.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if not isinstance(model_or_config, str | os.PathLike):
        return model_or_config.get_text_config() if isinstance(model_or_config, PreTrainedConfig) else None
    name = os.fspath(model_or_config)
    folder = ASSETS / name if name in bundled_models() else Path(name).expanduser()
    if name and folder.exists():
        read_config(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.name_or_path = name if name in bundled_models() else folder.resolve().name
        return config.get_text_config()
    official = official_name(name, ("bridge",))
    reachable = hub_has(official)
    with quiet(), offline(not reachable):
        try:
            return AutoConfig.from_pretrained(official, trust_remote_code=False).get_text_config()
        except OSError as error:
            raise OSError(
                f"The configuration of {name!r} is not in the Hugging Face cache and the Hub cannot be reached: "
                f"connect, or give a folder with its config.json. ({first_line(error)})"
            ) from error


def miniature(config: Any, n_layers: int, dtype: DType) -> Any:
    """A model of a configuration's architecture with few layers, narrow ones, and random weights.

    All widths are divided by one number, so that heads, and ratios of widths, are those of the model.
    """
    from torch.random import fork_rng
    from transformers import AutoModelForCausalLM

    def made(backend: Backend, wanted: Wanted) -> Any:
        small = _narrowed(config, n_layers)
        hf_model = AutoModelForCausalLM.from_config(small, attn_implementation="eager", dtype=dtype).eval()
        return built(backend, hf_model, plain(small.to_dict(), hf_model), small.model_type, wanted)

    with quiet(), fork_rng(devices=[]):
        return _first_that_builds(made, dtype, config.model_type)


def _narrowed(config: Any, n_layers: int) -> Any:
    """A configuration of few layers, narrow ones."""
    small = copy.deepcopy(config)
    given = small.to_dict()
    widths = [name for name in _WIDTHS if isinstance(given.get(name), int) and given[name] > 0]
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = [d_head, *(given[name] for name in widths)]
    factor = next(each for each in range(max(1, d_head // 8), 0, -1) if all(value % each == 0 for value in values))
    changes = {name: given[name] // factor for name in widths}
    changes |= {"vocab_size": 64, "num_hidden_layers": n_layers}
    if hasattr(small, "max_position_embeddings"):  # where positions have no table, there may be none
        changes["max_position_embeddings"] = 64
    changes |= dict.fromkeys((name for name in given if name.endswith("_token_id") and given[name] is not None), 0)
    for name in ("layer_types", "attention_layers", "mlp_layer_types"):
        if isinstance(getattr(small, name, None), list):
            changes[name] = getattr(small, name)[:n_layers]
    for name, value in changes.items():
        setattr(small, name, value)
    scalings = [getattr(small, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    for factors in {id(each): each for each in scalings}.values():  # two names of one, often
        for each, value in factors.items():
            if isinstance(value, list):
                factors[each] = value[: len(value) // factor]
    return small


_WIDTHS = (
    "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "head_dim",
    "word_embed_proj_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "rotary_dim",
)  # fmt: skip
"""What configurations call widths."""


def weight_bytes(config: Any, dtype: DType) -> int:
    """Bytes of the weights of a model, and of its tables, which is never made."""
    import torch
    from transformers import AutoModelForCausalLM

    from tracedensity.model.spread import bytes_of

    def made(backend: Backend, wanted: Wanted) -> int:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if backend == "hooked":
                from transformer_lens import HookedTransformer

                with configuration_alone(plain(config.to_dict(), model), wanted) as (_, cfg):
                    cfg.tokenizer_name = None
                    model = HookedTransformer(cfg, move_to_device=False)
        return bytes_of(model)

    with quiet():
        return _first_that_builds(made, dtype, config.model_type)


def _first_that_builds(build: Callable[[Backend, Wanted], Any], dtype: DType, name: str) -> Any:
    """What the first class gives that knows an architecture."""
    wanted = Wanted(device_of("cpu"), dtype, backends_of(None))
    for backend in wanted.backends:
        try:
            return build(backend, wanted)
        except Exception as error:
            if backend == wanted.backends[-1]:
                raise ValueError(
                    "`model_or_config` must have an architecture that TransformerLens can convert, got "
                    f"{name!r}: {first_line(error)}"
                ) from error
    raise AssertionError("no class to try")

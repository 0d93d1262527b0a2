"""Models that TransformerLens and the Hugging Face Hub know by name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from tracedensity.choices import Backend
from tracedensity.loading.bundled import bundled_models, listing_of_bundled
from tracedensity.loading.converted import made_ready, require_runnable
from tracedensity.loading.quiet import first_line, quiet
from tracedensity.loading.wanted import Wanted


def official_name(name: str, backends: tuple[Backend, ...]) -> str:
    """What the Hugging Face Hub calls a model.

    Raises:
        ValueError: If TransformerLens does not know the name.
    """
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    known = {official.lower(): official for official in [*OFFICIAL_MODEL_NAMES, *MODEL_ALIASES]}
    known |= {alias.lower(): official for official, aliases in MODEL_ALIASES.items() for alias in aliases}
    # a bridge may know the architecture of a model that no list holds
    by_id = "bridge" in backends and re.fullmatch(r"[^/]+/[^/]+", name)
    official = known.get(name.lower(), name if by_id else None)
    if official is None:
        near = get_close_matches(name.lower(), [*bundled_models(), *known], n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"`name_or_model` must be a bundled model ({listing_of_bundled()}), a folder in Hugging Face layout, "
            f"a TransformerLens model name or a model of TransformerLens, got {name!r}.{hint}"
        )
    return official


def from_hub(name: str, wanted: Wanted) -> Any:
    official = official_name(name, wanted.backends)
    reachable = hub_has(official)
    refusal: Exception | None = None
    with quiet(bars=True), offline(not reachable):  # a download may take minutes
        able: tuple[Backend, ...] = tuple(each for each in wanted.backends if each != "hooked" or _is_listed(name))
        for backend in able or wanted.backends:
            try:
                return _downloaded(official, name, wanted, backend)
            except OSError as error:
                if reachable:  # a gated model, a missing file, a full disk
                    raise OSError(f"The model {name!r} could not be loaded: {first_line(error)}") from error
                if refusal is None:
                    raise OSError(
                        f"The model {name!r} is not in the Hugging Face cache and the Hub cannot be reached: connect, "
                        f"give the folder of a model, or take a bundled one ({listing_of_bundled()})."
                    ) from error
            except Exception as error:  # encoders and the like, which TransformerLens lists but loads elsewhere
                refusal = refusal or error
    raise ValueError(
        f"`name_or_model` must be a decoder that TransformerLens can load, got {name!r}: {first_line(refusal)}"
    ) from refusal


def _is_listed(name: str) -> bool:
    """Whether `HookedTransformer` knows a name, which it refuses otherwise."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        get_official_model_name(name)
    except ValueError:
        return False
    return True


def _downloaded(official: str, name: str, wanted: Wanted, backend: Backend) -> Any:
    if backend == "hooked":
        from transformer_lens import HookedTransformer
        from transformer_lens.loading_from_pretrained import get_pretrained_model_config

        require_runnable(get_pretrained_model_config(name, dtype=wanted.dtype, **wanted.placed))
        return HookedTransformer.from_pretrained_no_processing(name, dtype=wanted.dtype, **wanted.placed).eval()
    from torch.random import fork_rng
    from transformer_lens.model_bridge import TransformerBridge

    with fork_rng(devices=[]):
        spread = {} if wanted.device_map is None else {"device_map": wanted.device_map}
        model: Any = TransformerBridge.boot_transformers(official, dtype=wanted.dtype, **wanted.placed, **spread)
    return made_ready(model)


def hub_has(repository: str) -> bool:
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
def offline(offline: bool) -> Iterator[None]:
    """While open, the Hub's client looks into its cache only, and fails at once."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before

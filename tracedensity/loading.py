"""Models to explain: the bundled ones, a folder on disk, any TransformerLens name, or the user's own object."""

import copy
import io
import json
import logging
import os
import re
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812
    from torch import dtype as DType  # noqa: N812
else:
    # torch and TransformerLens take seconds to import: here only once a model is loaded.
    Device = DType = Any

ASSETS = Path(__file__).parent / "assets"
LONGEST_CONTEXT = 4096

Backend: TypeAlias = Literal["hooked", "bridge"]
"""A class of TransformerLens: `HookedTransformer` (3.9) or `TransformerBridge` (3.9 and 4)."""

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
    backend: Backend | str | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
) -> Any:
    """A TransformerLens model with the weights as they were trained, ready to be explained.

    No weight processing is applied: neither folding of norms or value biases, nor centring of weights.
    The logits are those of the Hugging Face model, and so are the vectors that each head and neuron
    writes. It matters: a score such as the L1 norm of a contribution changes when the writing weights
    are centred, and the last norm's share in it when that norm's weight is folded into the
    unembedding. What a masked run predicts does not depend on folding the norms before a sublayer, as
    that leaves all written vectors alone. A model of your own is explained as it is, processed or not.

    It is a `HookedTransformer` where the installed TransformerLens has that class (before 4.0) and knows the
    architecture, else a `TransformerBridge`; scores and circuits do not depend on which. A `HookedTransformer` from a
    folder that could read more is limited to prompts of `LONGEST_CONTEXT` tokens.
    Text becomes tokens as the model's Hugging Face tokenizer makes them, after one beginning-of-sequence
    token, which comes first by TransformerLens' convention even where that tokenizer would not add it.

    Args:
        name_or_model: The name of a bundled model (see `bundled_models`); or the path of a folder in
            Hugging Face layout (write ``./books-gpt2`` for a folder named like a bundled model); or a
            TransformerLens model name such as ``"gpt2"``, or one of the Hugging Face Hub, downloaded unless it is
            cached; or a `HookedTransformer` or `TransformerBridge`, which comes back untouched.
        device: Where to put the model. By default the GPU that CUDA shows, else the CPU. Apple's ``"mps"`` is
            taken only when asked for: its results differ too much to verify a circuit found elsewhere.
        dtype: Floating-point type of the weights, by default float32.
        backend: The class to take, ``"hooked"`` or ``"bridge"``; by default whichever there is, see above.
        device_map: In place of `device`, how the layers are spread: over several GPUs with ``"auto"``, or a dictionary
            from names of Hugging Face's modules to devices. The model is a bridge then. On a machine without a GPU,
            TransformerLens 4 also runs weights from ``"disk"``, layer by layer: slow, in little memory.

    Returns:
        The model in eval mode; `cfg.model_name` is the bundled name, the folder's, or TransformerLens' own.

    Raises:
        ValueError: If there is no such model, its files are damaged, TransformerLens does not know the
            architecture or gives other logits, or `device`, `dtype`, `backend` or `device_map` is not to be had.
        OSError: If a model must be downloaded and the Hugging Face Hub cannot be reached.
    """
    if not isinstance(name_or_model, str | os.PathLike):
        return _untouched(name_or_model, device, dtype, {"backend": backend, "device_map": device_map})
    if device_map is not None:
        wanted = _spread(device_map, device, dtype, backend)
    else:
        wanted = _Wanted(_device(device), _dtype(dtype), _backends(backend))
    import torch

    name = os.fspath(name_or_model)
    with torch.inference_mode(False):  # weights that are made in it can have no part in a gradient, ever
        if name in bundled_models():
            return _from_folder(ASSETS / name, name, wanted, tokenizer_folder=ASSETS / "tokenizer")
        if name and (path := Path(name).expanduser()).exists():
            return _from_folder(path, path.resolve().name, wanted, tokenizer_folder=path)
        return _from_hub(name, wanted)


@dataclass(frozen=True)
class _Wanted:
    """How a model is wanted.

    Attributes:
        device: Where; None where a map says so.
        dtype: Precision.
        backends: The classes to try, in this order.
        device_map: Where each module is; None for one device.
    """

    device: Device | None
    dtype: DType
    backends: tuple[Backend, ...]
    device_map: Any = None

    @property
    def placed(self) -> dict[str, Any]:
        """The device as an argument, where there is one."""
        return {} if self.device is None else {"device": str(self.device)}


def _untouched(model: object, device: str | Device | None, dtype: DType | None, others: Mapping[str, object]) -> Any:
    # By name, so that no import of seconds is needed to refuse an object; subclasses count.
    if not {"HookedTransformer", "TransformerBridge"} & {cls.__name__ for cls in type(model).__mro__}:
        raise ValueError(
            "`name_or_model` must be a name, a folder, a HookedTransformer or a TransformerBridge, "
            f"got {type(model).__name__}."
        )
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"`{name}` must be left out for a model that is loaded already, got {value!r}.")
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


def _backends(backend: str | None) -> tuple[Backend, ...]:
    """The classes to try, in this order."""
    with _no_warnings():
        # Asked for as an attribute, a class that 4.0 has removed raises.
        has_hooked = find_spec("transformer_lens.HookedTransformer") is not None
    if backend is None:
        return ("hooked", "bridge") if has_hooked else ("bridge",)
    if backend == "hooked" and not has_hooked:
        raise ValueError(
            "`backend` must be 'bridge' with the TransformerLens that is installed, which has no HookedTransformer "
            "(4.0 removed it), got 'hooked'."
        )
    if backend not in get_args(Backend):
        raise ValueError(f"`backend` must be 'hooked' or 'bridge', got {backend!r}.")
    return (cast(Backend, backend),)


def _spread(device_map: object, device: object, dtype: DType | None, backend: str | None) -> _Wanted:
    """How a model is wanted whose layers are in several places."""
    if device is not None:
        raise ValueError(
            f"`device` must be left out beside `device_map`, which says where everything is, got {device}."
        )
    if backend not in (None, "bridge"):
        raise ValueError(
            f"`backend` must be left out beside `device_map`, which only a TransformerBridge has, got {backend!r}."
        )
    named = ("auto", "balanced", "balanced_low_0", "sequential")
    if not (isinstance(device_map, Mapping) or device_map in named):
        raise ValueError(
            f"`device_map` must be one of {', '.join(map(repr, named))}, or a dictionary from modules to devices, "
            f"got {device_map!r}."
        )
    return _Wanted(
        None, _dtype(dtype), ("bridge",), dict(device_map) if isinstance(device_map, Mapping) else device_map
    )


# -- a folder ------------------------------------------------------------------------------------


def _from_folder(folder: Path, name: str, wanted: _Wanted, *, tokenizer_folder: Path) -> Any:
    config = _config(folder)
    with _quiet():
        hf_model = _hugging_face_model(folder, wanted)
        # The class that really loaded says more than what the file claims, or leaves out.
        config = _plain(config, hf_model)
        tokenizer = _tokenizer(tokenizer_folder)
        compare = _comparison(hf_model, folder)
        for backend in wanted.backends:
            try:
                model = _built(backend, hf_model, config, name, wanted, tokenizer)
                compare(model)
            except Exception as error:
                if backend != wanted.backends[-1]:
                    continue
                if isinstance(error, _LogitsError):
                    raise
                if wanted.device_map is not None:
                    raise ValueError(
                        "`device_map` must be one that the installed TransformerLens can run, got "
                        f"{wanted.device_map}: {_first_line(error)}"
                    ) from error
                raise ValueError(
                    f"`name_or_model` must have an architecture that TransformerLens can convert, got {folder} with "
                    f"{type(hf_model).__name__}: {_first_line(error)}"
                ) from error
            if tokenizer is not None:
                model.cfg.tokenizer_name = str(tokenizer_folder)
            return model
    raise AssertionError("no class to try")


class _LogitsError(ValueError):
    """A model that was converted predicts something else."""


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


def _plain(config: dict[str, Any], hf_model: Any) -> dict[str, Any]:
    """A configuration as TransformerLens reads it."""
    architectures = hf_model.config.architectures = [type(hf_model).__name__]
    # n_ctx is an old name that TransformerLens asks GPT-2 for, and that newer files do not have.
    return {"n_ctx": config.get("n_positions"), **config, "architectures": architectures}


def _hugging_face_model(folder: Path, wanted: _Wanted) -> Any:
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
            f"load: {_first_line(error)}"
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


def _built(
    backend: Backend, hf_model: Any, config: dict[str, Any], name: str, wanted: _Wanted, tokenizer: Any = None
) -> Any:
    """A model of TransformerLens that is made of one of Hugging Face."""
    if backend == "bridge":
        return _bridged(hf_model, name, wanted, tokenizer)
    model = _converted(hf_model, config, name, wanted)
    if tokenizer is not None:
        model.set_tokenizer(tokenizer)
    return model


def _converted(hf_model: Any, config: dict[str, Any], name: str, wanted: _Wanted) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    with _neutral(config, wanted) as (neutral, cfg):
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
def _neutral(config: dict[str, Any], wanted: _Wanted) -> Iterator[tuple[str, Any]]:
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
        yield neutral, cfg


def _bridged(hf_model: Any, name: str, wanted: _Wanted, tokenizer: Any) -> Any:
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
    return _made_ready(model)


def _made_ready(bridge: Any) -> Any:
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
            f"`name_or_model` must have a tokenizer that loads, or none, got {folder}: {_first_line(error)}"
        ) from error


# -- a configuration -----------------------------------------------------------------------------


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
        _config(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.name_or_path = name if name in bundled_models() else folder.resolve().name
        return config.get_text_config()
    official = _official(name, ("bridge",))
    reachable = _hub_has(official)
    with _quiet(), _offline(not reachable):
        try:
            return AutoConfig.from_pretrained(official, trust_remote_code=False).get_text_config()
        except OSError as error:
            raise OSError(
                f"The configuration of {name!r} is not in the Hugging Face cache and the Hub cannot be reached: "
                f"connect, or give a folder with its config.json. ({_first_line(error)})"
            ) from error


def miniature(config: Any, n_layers: int, dtype: DType) -> Any:
    """A model of a configuration's architecture with few layers, narrow ones, and random weights.

    All widths are divided by one number, so that heads, and ratios of widths, are those of the model.
    """
    from torch.random import fork_rng
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config)
    given = small.to_dict()
    widths = [name for name in _WIDTHS if isinstance(given.get(name), int) and given[name] > 0]
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = [d_head, *(given[name] for name in widths)]
    factor = next(each for each in range(max(1, d_head // 8), 0, -1) if all(value % each == 0 for value in values))
    changes = {name: given[name] // factor for name in widths}
    changes |= {"vocab_size": 64, "num_hidden_layers": n_layers, "max_position_embeddings": 64}
    changes |= dict.fromkeys((name for name in given if name.endswith("_token_id") and given[name] is not None), 0)
    for name in ("layer_types", "attention_layers", "mlp_layer_types"):
        if isinstance(getattr(small, name, None), list):
            changes[name] = getattr(small, name)[:n_layers]
    for name, value in changes.items():
        setattr(small, name, value)
    for name in ("rope_parameters", "rope_scaling"):
        factors: dict[str, Any] = getattr(small, name, None) or {}
        for each, value in factors.items():
            if isinstance(value, list):
                factors[each] = value[: len(value) // factor]

    def made(backend: Backend, wanted: _Wanted) -> Any:
        hf_model = AutoModelForCausalLM.from_config(small, attn_implementation="eager", dtype=dtype).eval()
        return _built(backend, hf_model, _plain(small.to_dict(), hf_model), small.model_type, wanted)

    with _quiet(), fork_rng(devices=[]):
        return _first_that_builds(made, dtype, small.model_type)


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

    def made(backend: Backend, wanted: _Wanted) -> int:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if backend == "hooked":
                from transformer_lens import HookedTransformer

                with _neutral(_plain(config.to_dict(), model), wanted) as (_, cfg):
                    cfg.tokenizer_name = None
                    model = HookedTransformer(cfg, move_to_device=False)
        return bytes_of(model)

    with _quiet():
        return _first_that_builds(made, dtype, config.model_type)


def _first_that_builds(build: Callable[[Backend, _Wanted], Any], dtype: DType, name: str) -> Any:
    """What the first class gives that knows an architecture."""
    wanted = _Wanted(_device("cpu"), dtype, _backends(None))
    for backend in wanted.backends:
        try:
            return build(backend, wanted)
        except Exception as error:
            if backend == wanted.backends[-1]:
                raise ValueError(
                    "`model_or_config` must have an architecture that TransformerLens can convert, got "
                    f"{name!r}: {_first_line(error)}"
                ) from error
    raise AssertionError("no class to try")


# -- a name --------------------------------------------------------------------------------------


def _official(name: str, backends: tuple[Backend, ...]) -> str:
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
            f"`name_or_model` must be a bundled model ({_listing()}), a folder in Hugging Face layout, "
            f"a TransformerLens model name or a model of TransformerLens, got {name!r}.{hint}"
        )
    return official


def _from_hub(name: str, wanted: _Wanted) -> Any:
    official = _official(name, wanted.backends)
    reachable = _hub_has(official)
    refusal: Exception | None = None
    with _quiet(bars=True), _offline(not reachable):  # a download may take minutes
        for backend in wanted.backends:
            try:
                return _downloaded(official, name, wanted, backend)
            except OSError as error:
                if reachable:  # a gated model, a missing file, a full disk
                    raise OSError(f"The model {name!r} could not be loaded: {_first_line(error)}") from error
                if refusal is None:
                    raise OSError(
                        f"The model {name!r} is not in the Hugging Face cache and the Hub cannot be reached: connect, "
                        f"give the folder of a model, or take a bundled one ({_listing()})."
                    ) from error
            except Exception as error:  # encoders and the like, which TransformerLens lists but loads elsewhere
                refusal = refusal or error
    raise ValueError(
        f"`name_or_model` must be a decoder that TransformerLens can load, got {name!r}: {_first_line(refusal)}"
    ) from refusal


def _downloaded(official: str, name: str, wanted: _Wanted, backend: Backend) -> Any:
    if backend == "hooked":
        from transformer_lens import HookedTransformer

        return HookedTransformer.from_pretrained_no_processing(name, dtype=wanted.dtype, **wanted.placed).eval()
    from torch.random import fork_rng
    from transformer_lens.model_bridge import TransformerBridge

    with fork_rng(devices=[]):
        spread = {} if wanted.device_map is None else {"device_map": wanted.device_map}
        model: Any = TransformerBridge.boot_transformers(official, dtype=wanted.dtype, **wanted.placed, **spread)
    return _made_ready(model)


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


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextmanager
def _no_warnings() -> Iterator[None]:
    """While open, warnings are not shown: above all tqdm's, on its first import into a notebook without widgets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _quiet(*, bars: bool = False) -> Iterator[None]:
    """While open, nothing that loading a model says is shown: prints, warnings, logs, and bars unless wanted."""
    with _no_warnings():
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
        from transformers.utils import logging as hugging_face_logging

    shown, hub_hidden = hugging_face_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    level = logging.root.manager.disable
    if not bars:
        hugging_face_logging.disable_progress_bar()  # the Hub's as well
    logging.disable(max(level, logging.WARNING))
    try:
        with _no_warnings(), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
        if not bars and shown:
            hugging_face_logging.enable_progress_bar()
            if hub_hidden:
                disable_progress_bars()

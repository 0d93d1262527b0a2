"""The door of this room: a model by its name, its folder, or as it is."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracedensity.choices import Backend
from tracedensity.loading.bundled import ASSETS, bundled_models
from tracedensity.loading.folder import from_folder
from tracedensity.loading.hub import from_hub
from tracedensity.loading.wanted import Wanted, backends_of, device_of, dtype_of, spread_over

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812
    from torch import dtype as DType  # noqa: N812
else:
    Device = DType = Any


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
        wanted = spread_over(device_map, device, dtype, backend)
    else:
        wanted = Wanted(device_of(device), dtype_of(dtype), backends_of(backend))
    import torch

    name = os.fspath(name_or_model)
    with torch.inference_mode(False):  # weights that are made in it can have no part in a gradient, ever
        if name in bundled_models():
            return from_folder(ASSETS / name, name, wanted, tokenizer_folder=ASSETS / "tokenizer")
        if name and (path := Path(name).expanduser()).exists():
            return from_folder(path, path.resolve().name, wanted, tokenizer_folder=path)
        return from_hub(name, wanted)


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
    if device is not None and device_of(device) not in (at.device, device_of(at.device.type)):
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

"""How a model is wanted: where, in which precision, as which class."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast, get_args

from tracedensity.choices import Backend
from tracedensity.loading.quiet import no_warnings

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812
    from torch import dtype as DType  # noqa: N812
else:
    # torch and TransformerLens take seconds to import: here only once a model is loaded.
    Device = DType = Any


@dataclass(frozen=True)
class Wanted:
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


def device_of(device: str | Device | None) -> Device:
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


def dtype_of(dtype: DType | None) -> DType:
    import torch

    if dtype is None:
        return torch.float32
    accepted = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if dtype not in accepted:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, accepted))}, got {dtype!r}.")
    return dtype


def backends_of(backend: str | None) -> tuple[Backend, ...]:
    """The classes to try, in this order."""
    with no_warnings():
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


def spread_over(device_map: object, device: object, dtype: DType | None, backend: str | None) -> Wanted:
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
    for place in set(device_map.values()) - {"disk"} if isinstance(device_map, Mapping) else ():
        try:
            device_of(f"cuda:{place}" if isinstance(place, int) else place)
        except ValueError as error:
            raise ValueError(
                f"`device_map` must name devices that this machine has, or 'disk', got {place!r}."
            ) from error
    return Wanted(
        None, dtype_of(dtype), ("bridge",), dict(device_map) if isinstance(device_map, Mapping) else device_map
    )

"""What a backward pass needs of a forward pass, kept in main memory until then."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from tracedensity.model.spread import memory_of, storages

_wanted: ContextVar[bool] = ContextVar("offload_activations", default=False)


@contextmanager
def offload_activations(wanted: bool = True) -> Iterator[None]:
    """While open, what gradient methods need of their forward passes is kept in main memory, not on the model's device.

    Each tensor goes there when its layer has run, and comes back when the backward pass has reached the layer. Results
    are the same to the last digit; each call takes longer by the two ways. Weights stay where they are. What is looked
    at itself, inputs of heads and MLPs and their gradients, stays too: `plan` says how much that is, if it is asked
    within. For a model in main memory nothing changes.

    Args:
        wanted: False keeps everything on the device, within a block that does not.
    """
    before = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(before)


def is_offloading() -> bool:
    """Whether such a block is open."""
    return _wanted.get()


@contextmanager
def offloaded(model: torch.nn.Module) -> Iterator[None]:
    """While open, which is for a forward pass, what it keeps goes to main memory if that is wanted."""
    if not is_offloading():
        yield
        return
    weights = storages(model)

    def pack(value: Tensor) -> Tensor | Callable[[], Tensor]:
        return value if memory_of(value) in weights else away(value)

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def away(value: Tensor) -> Tensor | Callable[[], Tensor]:
    """What brings a tensor back from main memory; the tensor itself if it is there."""
    device = value.device
    if device.type == "cpu":
        return value
    kept = value.detach().to("cpu")
    return lambda: kept.to(device)

"""Models that are spread: weights on several devices, or kept on disk until they are needed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def home(model: torch.nn.Module) -> torch.device:
    """Where a model takes its tokens, and where everything is computed that it does not compute itself."""
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            return weight.device if not weight.is_meta else torch.device(_hook(module).execution_device)
    raise ValueError("`model` must have weights, got one without any.")


def memory_of(tensor: torch.Tensor) -> int:
    """A number for the memory that a tensor shares with its views, also where nothing is in it."""
    return tensor.untyped_storage()._cdata


def storages(model: torch.nn.Module) -> dict[int, torch.UntypedStorage]:
    """The memory of all weights and tables, once of those that share it, by its number."""
    return {memory_of(each): each.untyped_storage() for each in (*model.parameters(), *model.buffers())}


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of weights and tables."""
    return sum(storage.nbytes() for storage in storages(model).values())


@contextmanager
def at_hand(module: torch.nn.Module) -> Iterator[None]:
    """While open, weights of a module that are kept elsewhere are where it runs; what is read of them stays."""
    away = [each for each in module.modules() if any(weight.is_meta for weight in each.parameters(recurse=False))]
    with ExitStack() as stack:
        if away:
            from accelerate.utils import align_module_device

            for each in away:
                _hook(each)
                stack.enter_context(align_module_device(each))
        yield


def _hook(module: Any) -> Any:
    """What brings a module's weights when it runs."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        raise ValueError(
            f"`model` must have weights, got a {type(module).__name__} whose weights are on the meta device and come "
            "from nowhere. Load the model with its weights."
        )
    return hook

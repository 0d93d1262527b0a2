"""Devices that this machine does not have: tensors are marked with one, and what real ones would refuse raises."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
FAKE = "xpu"


class Devices(TorchFunctionMode):
    """While open, ``xpu:0`` and its like are devices, whose tensors live in main memory.

    Attributes:
        moves: How many tensors went from one to another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moves = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:  # made anew each time it is asked for
            return where(args[0])
        if function in (Tensor.to, Tensor.cpu, Tensor.type_as):
            return self._moved(function, args, kwargs)
        if function is torch.autograd.grad:
            found = function(*args, **kwargs)
            inputs = args[1] if len(args) > 1 else kwargs["inputs"]
            inputs = [inputs] if isinstance(inputs, Tensor) else inputs
            return tuple(
                None if grad is None else at(grad, where(each)) for grad, each in zip(found, inputs, strict=True)
            )
        asked = kwargs.get("device")
        if asked is not None:
            asked = torch.device(asked)
            kwargs["device"] = CPU
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if function in (Tensor.__getitem__, Tensor.__setitem__, Tensor.copy_, Tensor.index_put_):
            given = given[:1]  # indices may be on the CPU
        device = asked or _common(function, given)
        found = function(*args, **kwargs)
        if isinstance(found, torch.Size):  # of which tree_map makes a tuple
            return found
        return tree_map(lambda each: at(each, device) if isinstance(each, Tensor) else each, found)

    def _moved(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value, *rest = args
        target = CPU if function is Tensor.cpu else kwargs.pop("device", None)
        plain = []
        for each in rest:
            if isinstance(each, Tensor):
                target = where(each)
                plain.append(each.dtype)
            elif isinstance(each, torch.device | str):
                target = torch.device(each)
            else:
                plain.append(each)
        kwargs.pop("non_blocking", None)
        target = where(value) if target is None else torch.device(target)
        made = value.to(*plain, **kwargs) if plain or kwargs else value
        if target == where(value):
            return at(made, target)
        self.moves += 1
        return at(made.clone() if made is value else made, target)


def where(tensor: Tensor) -> torch.device:
    return getattr(tensor, "_at", CPU)


def at(tensor: Tensor, device: torch.device) -> Tensor:
    tensor._at = device
    return tensor


def _common(function: Any, tensors: list[Tensor]) -> torch.device:
    """The device of all of them; numbers on the CPU go with everything."""
    devices = {where(each) for each in tensors if torch.Tensor.dim(each) or where(each) != CPU}
    if len(devices) > 1:
        name = getattr(function, "__name__", str(function))
        raise RuntimeError(f"Expected all tensors to be on the same device, got {sorted(map(str, devices))}: {name}")
    return devices.pop() if devices else CPU


@contextmanager
def spread(hf_model: Any, device_map: Mapping[str, str]) -> Iterator[Devices]:
    """While open, there are such devices, and modules of a model are on them as accelerate would put them there."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    make = torch.nn.Parameter.__new__

    def made(cls: Any, data: Any = None, *args: Any, **kwargs: Any) -> Any:  # which no mode is told of
        parameter = make(cls, data, *args, **kwargs)
        return parameter if data is None else at(parameter, where(data))

    with Devices() as devices, mock.patch.object(torch.nn.Parameter, "__new__", made):
        for name, module in hf_model.named_modules():
            parts = [part for part in device_map if name == part or name.startswith(f"{part}.")]
            if not parts:
                continue
            device = torch.device(device_map[max(parts, key=len)])
            for each in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                at(each, device)
            if name in device_map or [*module.parameters(recurse=False)]:
                hook = AlignDevicesHook(execution_device=device, io_same_device=False)
                hook.init_hook = lambda module: module
                add_hook_to_module(module, hook)
        hf_model.hf_device_map = dict(device_map)
        yield devices

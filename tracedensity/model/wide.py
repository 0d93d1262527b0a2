"""Float32 computation with weights in half precision."""

from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

HALF = (torch.float16, torch.bfloat16)


def widened(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """While open, a model with weights in half precision computes in float32, and nothing of it is changed.

    The rounding of half precision adds up over layers to some percent of a gradient, and small gradients vanish in
    float16. Weights are widened one at a time, where they are multiplied, and again on the way back: no wide copy of
    the model is ever held. Activations take twice the memory.

    Args:
        dtype: Precision of the weights; nothing is done unless it is a half one.
    """
    return _Wide() if dtype in HALF else nullcontext()


class _Product(torch.autograd.Function):
    """``x @ weight`` with a weight that takes no gradient and stays narrow while the product waits for its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0] @ weight.float().transpose(-1, -2), None


class _Wide(TorchFunctionMode):
    """Whatever is made of a wide and a narrow tensor is wide, and what is wide stays so."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in _LOOKED_UP:
            made = function(*args, **kwargs)
            return made.float() if _narrow(made) and not _is_view(function, args) else made
        if function in _CONVERSIONS and args and isinstance(args[0], Tensor):
            return _converted(function, args, kwargs)
        if function is functional.linear and _mixed(args[0], args[1]):
            x, weight, *bias = args
            bias = bias[0] if bias else kwargs.get("bias")
            made = _Product.apply(x, weight.transpose(0, 1))
            return made if bias is None else made + bias
        if function in _SUMS and _mixed(args[1], args[2]):
            return args[0] + _Product.apply(args[1], args[2])
        if function in _PRODUCTS and _mixed(args[0], args[1]):
            return _Product.apply(args[0], args[1])
        lists = [value for value in args if isinstance(value, tuple | list)]
        tensors = [value for value in (*args, *kwargs.values(), *chain(*lists)) if isinstance(value, Tensor)]
        mixed = any(map(_narrow, tensors)) and any(value.dtype == torch.float32 for value in tensors)
        if mixed and not function.__name__.endswith("_"):  # what is written to keeps its type
            args = tuple(map(_wide, args))
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)


_LOOKED_UP = (functional.embedding, Tensor.__getitem__)
_CONVERSIONS = (Tensor.to, Tensor.type_as, Tensor.half, Tensor.bfloat16)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)
_SUMS = (torch.addmm, torch.baddbmm)


def _is_view(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether something is part of a tensor as it is, as weights of one expert are, which a product is to widen."""
    index = args[1]
    number = isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point()
    return function is Tensor.__getitem__ and (isinstance(index, slice | int) or number)


def _narrow(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF


def _mixed(x: object, weight: object) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float32 and _narrow(weight)


def _wide(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_wide, value))
    return value.float() if _narrow(value) else value


def _converted(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A conversion, to a device only where it would make a wide tensor narrow."""
    if args[0].dtype != torch.float32:
        return function(*args, **kwargs)
    if function in (Tensor.half, Tensor.bfloat16):
        return args[0]
    if function is Tensor.type_as:
        return args[0] if _narrow(args[1]) else function(*args, **kwargs)
    if kwargs.get("dtype") in HALF:
        kwargs = {name: value for name, value in kwargs.items() if name != "dtype"}
    rest = [value.device if _narrow(value) else value for value in args[1:] if value not in HALF]
    return function(args[0], *rest, **kwargs) if rest or kwargs else args[0]
